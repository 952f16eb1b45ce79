// SPDX-License-Identifier: BSD-3-Clause
//
// Tells whether the parameters and buffers of modules have changed, in one call for all of them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "../kernels/isa.h"
#include "facts.h"

namespace fusedsep {

// The part of DLPack 1.x's exchange interface that is used here: a description of a Python tensor without a copy or a
// reference, for as long as Python does not run. (github.com/dmlc/dlpack, include/dlpack/dlpack.h)
struct DLPackTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t rank;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLPackExchange {
  uint32_t major, minor;
  DLPackExchange* older;
  void* allocate;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, DLPackTensor* out);
  void* current_stream;
};
constexpr uint32_t kDLPackMajor = 1;
constexpr int32_t kDLPackCpu = 1;

// Null where torch.Tensor has no such interface.
inline const DLPackExchange* exchange_of(py::handle tensor_class) {
  const py::object capsule = py::getattr(tensor_class, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* exchange = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return exchange->major == kDLPackMajor && exchange->tensor_from_object != nullptr ? exchange : nullptr;
}

// Whether every element between the first and the last one belongs to the tensor, in whatever order.
inline bool fills_its_memory(const DLPackTensor& tensor) {
  constexpr int32_t kMostDimensions = 8;
  std::array<int32_t, kMostDimensions> order;
  if (tensor.rank > kMostDimensions || (tensor.rank > 0 && tensor.strides == nullptr)) return false;
  int32_t count = 0;
  for (int32_t d = 0; d < tensor.rank; ++d) {
    if (tensor.shape[d] != 1) order[size_t(count++)] = d;
  }
  std::sort(order.begin(), order.begin() + count,
            [&](int32_t a, int32_t b) { return tensor.strides[a] < tensor.strides[b]; });
  int64_t elements = 1;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t d = order[size_t(i)];
    if (tensor.strides[d] != elements) return false;
    elements *= tensor.shape[d];
  }
  return true;
}

// Pieces of memory, hashed by several threads. The result does not depend on the threads.
class PiecewiseHash {
 public:
  void add(const void* data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kPieceBytes) {
      pieces_.push_back({static_cast<const char*>(data) + i, std::min(kPieceBytes, bytes - i)});
    }
  }

  template <class ParallelFor>
  uint64_t value(const Isa& isa, uint64_t seed, const ParallelFor& parallel_for) const {
    std::vector<size_t> jobs{0};  // neighbouring pieces, until they are as long as one or a little longer
    int64_t bytes = 0;
    for (size_t i = 0; i < pieces_.size(); ++i) {
      bytes += pieces_[i].bytes;
      if (bytes < kPieceBytes && i + 1 < pieces_.size()) continue;
      jobs.push_back(i + 1);
      bytes = 0;
    }
    std::vector<uint64_t> hashes(pieces_.size());
    parallel_for(int64_t(jobs.size()) - 1, [&](int64_t begin, int64_t end) {
      for (size_t i = jobs[size_t(begin)]; i < jobs[size_t(end)]; ++i) {
        hashes[i] = isa.fingerprint(pieces_[i].data, size_t(pieces_[i].bytes), i);
      }
    });
    return isa.fingerprint(hashes.data(), hashes.size() * sizeof(uint64_t), seed);
  }

 private:
  // What a thread takes at a time: long against the time that a thread takes to begin.
  static constexpr int64_t kPieceBytes = 256 * 1024;
  struct Piece {
    const char* data;
    int64_t bytes;
  };
  std::vector<Piece> pieces_;
};

// A hash of the types, shapes, strides and bytes of the tensors at `places`: dictionary[key][name] for each
// (dictionary, key, name), where None stands for no tensor. None if one is missing, is of neither class, is not on the
// CPU, or has gaps in its memory, and where torch has no way to tell.
template <class ParallelFor>
py::object fingerprint_of(const py::tuple& places, const py::type& tensor_class, const py::type& parameter_class,
                          const ParallelFor& parallel_for) {
  const Entries entries(places, 3);
  const DLPackExchange* const exchange = exchange_of(tensor_class);
  if (exchange == nullptr) return py::none();
  PiecewiseHash hash;
  std::vector<int64_t> shapes;
  for (Py_ssize_t i = 0; i < entries.end(); i += 3) {
    PyObject* const kept = entries.value(i);
    if (kept == nullptr || !PyDict_Check(kept)) return py::none();
    PyObject* const found = Entries::get(kept, entries.at(i, 2));
    if (found == Py_None) {
      shapes.push_back(-1);
      continue;
    }
    if (found == nullptr) return py::none();
    PyObject* const its_class = reinterpret_cast<PyObject*>(Py_TYPE(found));
    if (its_class != tensor_class.ptr() && its_class != parameter_class.ptr()) return py::none();
    DLPackTensor tensor;
    if (exchange->tensor_from_object(found, &tensor) != 0) {  // a type that DLPack does not know
      PyErr_Clear();
      return py::none();
    }
    int64_t bytes = tensor.dtype_bits / 8;
    shapes.insert(shapes.end(), {tensor.dtype_code, tensor.dtype_bits, tensor.rank});
    for (int32_t d = 0; d < tensor.rank; ++d) bytes *= tensor.shape[d];
    if (tensor.device_type != kDLPackCpu || (bytes > 0 && !fills_its_memory(tensor))) return py::none();
    for (int32_t d = 0; d < tensor.rank; ++d) shapes.insert(shapes.end(), {tensor.shape[d], tensor.strides[d]});
    hash.add(static_cast<const char*>(tensor.data) + tensor.byte_offset, bytes);
  }
  const Isa& isa = active_isa();
  const uint64_t seed = isa.fingerprint(shapes.data(), shapes.size() * sizeof(int64_t), shapes.size());
  return py::int_(hash.value(isa, seed, parallel_for));
}

// The tensors at `places`, as above; None where there is none.
inline py::tuple tensors_at(const py::tuple& places) {
  const Entries entries(places, 3);
  py::tuple tensors(size_t(entries.end() / 3));
  for (Py_ssize_t i = 0; i < entries.end(); i += 3) {
    PyObject* const kept = entries.value(i);
    PyObject* found = kept == nullptr || !PyDict_Check(kept) ? nullptr : Entries::get(kept, entries.at(i, 2));
    tensors[size_t(i / 3)] = py::reinterpret_borrow<py::object>(found == nullptr ? Py_None : found);
  }
  return tensors;
}

// The addresses of `tensors`, of which some may be None, and how often each has been changed. None where it cannot be
// told: for tensors that were made in inference mode, which do not count, of other classes, and where torch has no way.
inline py::object versions_of(const py::tuple& tensors, const py::type& tensor_class, const py::type& parameter_class) {
  const DLPackExchange* const exchange = exchange_of(tensor_class);
  if (exchange == nullptr) return py::none();
  static PyObject* const version_name = PyUnicode_InternFromString("_version");
  std::vector<int64_t> numbers;
  numbers.reserve(2 * tensors.size());
  for (const py::handle tensor_or_none : tensors) {
    PyObject* const found = tensor_or_none.ptr();
    if (found == Py_None) {
      numbers.push_back(-1);
      continue;
    }
    PyObject* const its_class = reinterpret_cast<PyObject*>(Py_TYPE(found));
    if (its_class != tensor_class.ptr() && its_class != parameter_class.ptr()) return py::none();
    const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(found, version_name));
    DLPackTensor tensor;
    if (!version || exchange->tensor_from_object(found, &tensor) != 0) {
      PyErr_Clear();
      return py::none();
    }
    numbers.push_back(int64_t(reinterpret_cast<intptr_t>(tensor.data)) + int64_t(tensor.byte_offset));
    numbers.push_back(PyLong_AsLongLong(version.ptr()));
  }
  return py::bytes(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t));
}

}  // namespace fusedsep
