// SPDX-License-Identifier: BSD-3-Clause
#include <memory>
#include <mutex>
#include <vector>

#include "device.h"
#include "forward.h"

namespace fusedsep::cuda {

const Device& device_of(int index) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Device>> devices;
  const std::lock_guard<std::mutex> lock(mutex);
  if (devices.size() <= size_t(index)) devices.resize(size_t(index) + 1);
  if (devices[size_t(index)] == nullptr) {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, index));
      return int64_t(value);
    };
    devices[size_t(index)].reset(new Device{attribute(cudaDevAttrMultiProcessorCount),
                                            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                                            attribute(cudaDevAttrComputeCapabilityMajor) >= 8});
  }
  return *devices[size_t(index)];
}

}  // namespace fusedsep::cuda
