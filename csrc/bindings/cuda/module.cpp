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
  m.def("packed_size", &fusedsep::cuda::Packed<float>::size, "in_channels"_a, "out_channels"_a,
        "Elements of what the operator `pack` returns on a GPU.");
  py::dict build;
  build["nvcc"] = FUSEDSEP_NVCC_VERSION;
  build["targets"] = py::module_::import("json").attr("loads")(FUSEDSEP_CUDA_TARGETS_JSON);
  build["operators"] = py::make_tuple("pack", "separable_conv2d");
  build["dtypes"] = py::make_tuple("float32", "float16", "bfloat16");
  m.attr("build_info") = build;
}
