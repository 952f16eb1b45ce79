// SPDX-License-Identifier: BSD-3-Clause
//
// The stream to launch on.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include "../../cuda/types.h"

namespace fusedsep::cuda {

// Of that device. torch's CUDA library has the function in every version, but is not there to link with in a torch
// without CUDA, under which the extension is to load as well; a tensor on a GPU proves that it is loaded.
inline Stream current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    STD_TORCH_CHECK(library != nullptr, "libtorch_cuda.so is not loaded: ", dlerror());
    void* const symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(symbol != nullptr, "torch's CUDA library does not tell its current stream: ", dlerror());
    return reinterpret_cast<Function>(symbol);
  }();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<Stream>(stream);
}

}  // namespace fusedsep::cuda
