// SPDX-License-Identifier: BSD-3-Clause
//
// fusedsep._C: ISA control, build facts, a fingerprint of parameters, and the kernels on NumPy arrays.
// Importing it also registers the operators of ops.cpp.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "facts.h"
#include "fusedsep_build_info.h"
#include "geometry.h"
#include "parameters.h"
#include "run.h"
#include "tensors.h"

namespace py = pybind11;

namespace fusedsep {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
Array<T> separable_conv2d(const Array<T>& x, const Array<T>& dw_weight, const std::optional<Array<double>>& dw_bias,
                          const Array<T>& pw_weight, const std::optional<Array<double>>& pw_bias,
                          const std::array<int64_t, 4>& pads, int64_t stride, int64_t dilation, int64_t activation,
                          int64_t pointwise_activation, bool channels_last, const std::string& isa_name,
                          int64_t threads, int64_t tiles_per_image, std::optional<bool> share_tiles,
                          std::optional<Array<T>> out) {
  const Geometry g{stride, dilation, pads[0], pads[1], pads[2], pads[3], activation, pointwise_activation};
  check_geometry(g);
  check_range("threads", threads, 1, 1 << 16);
  if (x.ndim() != 4) throw std::invalid_argument("x must have four dimensions");
  SeparableParams<T> params{};
  params.batch = x.shape(0);
  params.in_channels = x.shape(channels_last ? 3 : 1);
  params.height = x.shape(channels_last ? 1 : 2);
  params.width = x.shape(channels_last ? 2 : 3);
  if (dw_weight.ndim() != 3 || dw_weight.shape(0) != params.in_channels || dw_weight.shape(1) != 3 ||
      dw_weight.shape(2) != 3 || params.in_channels < 1) {
    throw std::invalid_argument("dw_weight must have shape (channels of x, 3, 3)");
  }
  if (pw_weight.ndim() != 2 || pw_weight.shape(0) < 1 || pw_weight.shape(1) != params.in_channels) {
    throw std::invalid_argument("pw_weight must have shape (out_channels, channels of x)");
  }
  params.out_channels = pw_weight.shape(0);
  if (dw_bias.has_value() && dw_bias->size() != params.in_channels) {
    throw std::invalid_argument("dw_bias must have one element a channel of x");
  }
  if (pw_bias.has_value() && pw_bias->size() != params.out_channels) {
    throw std::invalid_argument("pw_bias must have one element an output channel");
  }
  params.out_height = output_size("height", params.height, g.pad_top, g.pad_bottom, g);
  params.out_width = output_size("width", params.width, g.pad_left, g.pad_right, g);
  element_count(params.batch, params.out_channels, params.out_height, params.out_width);
  params.stride = stride;
  params.dilation = dilation;
  params.pad_top = g.pad_top;
  params.pad_left = g.pad_left;
  params.channels_last = channels_last;
  params.activation = Activation(activation);
  params.pointwise_activation = Activation(pointwise_activation);

  const std::vector<py::ssize_t> shape =
      channels_last ? std::vector<py::ssize_t>{params.batch, params.out_height, params.out_width, params.out_channels}
                    : std::vector<py::ssize_t>{params.batch, params.out_channels, params.out_height, params.out_width};
  Array<T> y = out.has_value() ? *out : Array<T>(shape);
  if (std::vector<py::ssize_t>(y.shape(), y.shape() + y.ndim()) != shape) {
    throw std::invalid_argument("out must have the shape of the result");
  }

  const SeparableKernels<T>& kernels = find_isa(isa_name).separable<T>();
  Workspace packed;
  T* weights = static_cast<T*>(
      packed.get(size_t(kernels.packed_size(params.in_channels, params.out_channels, channels_last)) * sizeof(T)));
  kernels.pack(
      {dw_weight.data(), nullptr, dw_bias.has_value() ? dw_bias->data() : nullptr, pw_weight.data(), nullptr,
       pw_bias.has_value() ? pw_bias->data() : nullptr, params.in_channels, params.out_channels, channels_last},
      weights);
  params.x = x.data();
  params.y = y.mutable_data();
  params.packed = weights;
  Plan plan = plan_for(kernels, params, threads);
  if (tiles_per_image > 0) {
    const int64_t pixels = TiledMaps(params).pixels;
    check_range("tiles_per_image", tiles_per_image, (pixels + kMaxTilePixels - 1) / kMaxTilePixels, pixels);
    plan.unit = 1;
    plan.tiles_per_image = tiles_per_image;
  }
  if (share_tiles.has_value()) plan.share_tiles = *share_tiles;
  // The ranges that `threads` threads would take, one after the other.
  run_separable(kernels, params, plan, threads, [threads](int64_t count, const auto& f) {
    const int64_t ranges = count < threads ? count : threads;
    for (int64_t i = 0; i < ranges; ++i) f(i * count / ranges, (i + 1) * count / ranges);
  });
  return y;
}

template <typename T>
void define_separable_conv2d(py::module_& m) {
  using namespace py::literals;
  m.def(
      "separable_conv2d", &separable_conv2d<T>, "x"_a.noconvert(), "dw_weight"_a.noconvert(), "dw_bias"_a,
      "pw_weight"_a.noconvert(), "pw_bias"_a, py::kw_only(), "pads"_a = std::array<int64_t, 4>{1, 1, 1, 1},
      "stride"_a = 1, "dilation"_a = 1, "activation"_a = 1, "pointwise_activation"_a = 1, "channels_last"_a = false,
      "isa"_a, "threads"_a = 1, "tiles_per_image"_a = 0, "share_tiles"_a = std::nullopt,
      "out"_a.noconvert() = std::nullopt,
      "The kernels on NumPy arrays: x is (N, C, H, W), or (N, H, W, C) with channels_last; pads are left, right, top, "
      "bottom. `threads`, `tiles_per_image` and `share_tiles` choose the split, which runs in this thread.");
}

uint64_t fingerprint(const std::vector<std::pair<uintptr_t, size_t>>& memory) {
  const Isa& isa = active_isa();
  uint64_t hash = memory.size();
  for (const auto& [address, bytes] : memory) {
    hash = isa.fingerprint(reinterpret_cast<const void*>(address), bytes, hash);
  }
  return hash;
}

// Floating-point operations done, and their sum. Others may run Python, and this too, meanwhile.
std::pair<int64_t, float> multiply_adds(int64_t rounds, float factor, float addend, const std::string& isa_name) {
  const Isa& isa = find_isa(isa_name);
  check_range("rounds", rounds, 0, int64_t(1) << 40);
  py::gil_scoped_release release;
  return {2 * rounds * isa.multiply_adds_per_round, isa.multiply_adds(rounds, factor, addend)};
}

std::string compiler() {
#if defined(__clang__)
  return __VERSION__;
#else
  return "GCC " __VERSION__;
#endif
}

// Elements of what the operator `pack` returns for the ISA in use.
int64_t packed_size(int64_t in_channels, int64_t out_channels, bool channels_last, int64_t element_size) {
  const Isa& isa = active_isa();
  const int64_t size = element_size == 4 ? isa.separable_f32.packed_size(in_channels, out_channels, channels_last)
                                         : isa.separable_f64.packed_size(in_channels, out_channels, channels_last);
  return int64_t(sizeof(PackedHeader)) / element_size + size;
}

// The same of `pack_depthwise`.
int64_t depthwise_packed_size(int64_t channels, int64_t kernel, int64_t element_size) {
  const Isa& isa = active_isa();
  const int64_t size = element_size == 4 ? isa.separable_f32.depthwise_map_packed_size(channels, kernel)
                                         : isa.separable_f64.depthwise_map_packed_size(channels, kernel);
  return int64_t(sizeof(PackedHeader)) / element_size + size;
}

py::dict plan(int64_t batch, int64_t in_channels, int64_t out_channels, int64_t out_pixels, bool channels_last,
              int64_t threads, const std::string& isa_name) {
  SeparableParams<float> params{};
  params.batch = batch;
  params.in_channels = in_channels;
  params.out_channels = out_channels;
  params.out_height = out_pixels;
  params.out_width = 1;
  params.channels_last = channels_last;
  const Plan plan = plan_for(find_isa(isa_name).separable_f32, params, threads);
  py::dict result;
  result["tiles_per_image"] = plan.tiles_per_image;
  result["share_tiles"] = plan.share_tiles;
  return result;
}

}  // namespace
}  // namespace fusedsep

PYBIND11_MODULE(_C, m) {
  using namespace fusedsep;
  using namespace py::literals;
  m.doc() = "Kernels of fusedsep.";
  m.def("compiled_isas", &compiled_isas);
  m.def("supported_isas", &supported_isas);
  m.def("active_isa", [] { return std::string(active_isa().name); });
  m.def("use_isa", &use_isa, "name"_a);
  m.def("fingerprint", &fingerprint, "memory"_a,
        "A 64-bit hash of the bytes of [(address, bytes), ...], which must stay alive and unchanged meanwhile.");
  m.def("facts_hold", &facts_hold, "identical"_a, "same"_a, "equal"_a, "empty"_a, "absent"_a, "classes"_a,
        "Whether all entries of dictionaries are as they should be; flat tuples (csrc/bindings/facts.h).");
  m.def("dictionary_versions", &dictionary_versions, "dictionaries"_a,
        "Bytes that are others after any change of the dictionaries; None where Python does not count those.");
  m.def("are_unchanged", &are_unchanged, "dictionaries"_a, "versions"_a,
        "Whether dictionaries are as they were when dictionary_versions gave `versions`.");
  m.def(
      "fingerprint_of",
      [](const py::tuple& places, const py::type& tensor_class, const py::type& parameter_class) {
        return fingerprint_of(places, tensor_class, parameter_class, TorchParallelFor());
      },
      "places"_a, "tensor_class"_a, "parameter_class"_a,
      "A hash of the tensors at (dictionary, key, name, ...); None if they cannot be told "
      "(csrc/bindings/parameters.h).");
  m.def("tensors_at", &tensors_at, "places"_a,
        "The tensors at (dictionary, key, name, ...); None where there is none.");
  m.def("versions_of", &versions_of, "tensors"_a, "tensor_class"_a, "parameter_class"_a,
        "The addresses of tensors and how often each has been changed; None if they cannot be told "
        "(csrc/bindings/parameters.h).");
  m.def(
      "multiply_adds", &multiply_adds, "rounds"_a, "factor"_a, "addend"_a, "isa"_a,
      "x = x * factor + addend, `rounds` times in every lane of as many registers as the kernels use: the processor's "
      "limit in float32. Returns the number of floating-point operations and the sum of all lanes.");
  m.def("plan", &plan, "batch"_a, "in_channels"_a, "out_channels"_a, "out_pixels"_a, "channels_last"_a, "threads"_a,
        "isa"_a, "How a float32 call would be cut into tiles: of each image, or of all together in channels_last.");
  m.def("packed_size", &packed_size, "in_channels"_a, "out_channels"_a, "channels_last"_a, "element_size"_a);
  m.def("depthwise_packed_size", &depthwise_packed_size, "channels"_a, "kernel"_a, "element_size"_a);
  define_separable_conv2d<float>(m);
  define_separable_conv2d<double>(m);
  py::dict build;
  build["compiler"] = compiler();
  build["flags"] = py::module_::import("json").attr("loads")(FUSEDSEP_FLAGS_JSON);
  build["torch"] = FUSEDSEP_BUILT_WITH_TORCH;
  m.attr("build_info") = build;
}
