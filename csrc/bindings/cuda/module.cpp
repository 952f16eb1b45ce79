// SPDX-License-Identifier: BSD-3-Clause
//
// fusedsep._C_cuda: facts about the CUDA kernels of this build. Importing it also registers the operators of ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../cuda/packed.h"
#include "fusedsep_cuda_build_info.h"

PYBIND11_MODULE(_C_cuda, m) {
  namespace py = pybind11;
  using namespace py::literals;
  m.doc() = "CUDA kernels of fusedsep.";
  m.def(
      "packed_size",
      [](int64_t in_channels, int64_t out_channels, int64_t element_size) {
        using namespace fusedsep;
        return element_size == 4 ? cuda::Packed<float>::size(in_channels, out_channels)
                                 : cuda::Packed<float16>::size(in_channels, out_channels);
      },
      "in_channels"_a, "out_channels"_a, "element_size"_a,
      "Elements, of float32, of what the operator `pack` returns on a GPU for weights of 4 or 2 bytes.");
  py::dict build;
  build["nvcc"] = FUSEDSEP_NVCC_VERSION;
  build["targets"] = py::module_::import("json").attr("loads")(FUSEDSEP_CUDA_TARGETS_JSON);
  build["operators"] = py::make_tuple("pack", "pack_modules", "separable_conv2d", "separable_conv2d_training",
                                      "separable_conv2d_training_backward");
  build["dtypes"] = py::make_tuple("float32", "float16", "bfloat16");
  m.attr("build_info") = build;
}
