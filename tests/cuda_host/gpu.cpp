// SPDX-License-Identifier: BSD-3-Clause
//
// Two GPUs for torch that are no GPUs, to run the binding (csrc/bindings/cuda) with the emulated kernels and the Python
// code around them: torch's device type CUDA, with tensors in the memory of the host. New memory is NaN, an allocation
// is as long as was asked for, and every other operator is torch's for the CPU, on copies.
// What is launched runs at once, on whatever stream: streams, graphs and the order on a device are not modelled.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

namespace {

constexpr c10::DeviceType kType = c10::DeviceType::CUDA;
constexpr int kDevices = 2;
thread_local int current_device = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device getDevice() const override { return {kType, c10::DeviceIndex(current_device)}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() >= 0 && device.index() < kDevices, "there is no device ", device);
    current_device = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override { *event = nullptr; }
  void block(void*, const c10::Stream&) const override {}
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// By which torch knows that there is a GPU.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* const data = std::aligned_alloc(16, (bytes + 15) / 16 * 16);
    std::memset(data, 0xff, bytes);
    return {data, data, &std::free, Guard().getDevice()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;
REGISTER_ALLOCATOR(kType, &memory)

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

at::Tensor empty(c10::IntArrayRef sizes, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(sizes, &memory, kKeys, c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(sizes, strides, &memory, kKeys, c10::dtype_or_default(dtype));
}

// The same memory, for the other device.
at::Tensor on(c10::Device device, const at::Tensor& x) {
  const auto options = x.options().device(device);
  if (x.numel() == 0) return at::empty_strided(x.sizes(), x.strides(), options);
  return at::for_blob(x.data_ptr(), x.sizes())
      .strides(x.strides())
      .deleter([x](void*) {})
      .options(options)
      .target_device(device)
      .allocator(c10::GetAllocator(device.type()))
      .resizeable_storage()
      .make_tensor();
}
at::Tensor on_cpu(const at::Tensor& x) { return x.is_cuda() ? on(c10::kCPU, x) : x; }

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

// An operator of the CPU on the memory of its tensors.
void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  c10::Device device = Guard().getDevice();
  const auto argument_on_cpu = [&](const at::Tensor& x) {
    if (x.defined() && x.is_cuda()) device = x.device();
    return x.defined() ? on_cpu(x) : x;
  };
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  const std::vector<c10::IValue> arguments(stack->begin() + int64_t(first), stack->end());
  for (size_t i = first; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isDevice()) {
      if (value.toDevice().has_index()) device = value.toDevice();
      value = c10::Device(c10::kCPU);
    } else if (value.isTensor()) {
      value = argument_on_cpu(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& x : value.toTensorVector()) list.push_back(argument_on_cpu(x));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& x : value.toOptionalTensorVector()) {
        list.push_back(x.has_value() ? std::optional(argument_on_cpu(*x)) : x);
      }
      value = list;
    }
  }
  const std::vector<c10::IValue> own(stack->begin() + int64_t(first), stack->end());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t i = 0; i < count; ++i) {
    if (!arguments[i].isTensor() || !arguments[i].toTensor().defined()) continue;
    const at::Tensor &theirs = arguments[i].toTensor(), &result = own[i].toTensor();
    if (theirs.sizes() == result.sizes()) continue;  // otherwise it was resized, as an empty `out` is
    at::native::resize_(theirs, result.sizes());
    on_cpu(theirs).copy_(result);
  }
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    c10::IValue& value = (*stack)[first + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias != nullptr && alias->isWrite()) {
      for (size_t j = 0; j < count; ++j) {
        const auto* written = schema.arguments()[j].alias_info();
        if (written != nullptr && *written == *alias) value = arguments[j];
      }
    } else if (value.isTensor() && value.toTensor().defined()) {
      value = on(device, value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& x : value.toTensorVector()) list.push_back(on(device, x));
      value = list;
    }
  }
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("copy_", copy);
  // Which would choose among kernels of CUDA.
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
}
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}

extern "C" {

// What the binding asks torch's CUDA library for; it must have made the device the current one.
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = nullptr;
  return device == current_device ? 0 : 1;
}

int device_count() { return kDevices; }
int exchange_device(int device) {
  return device < 0 ? current_device : Guard().exchangeDevice({kType, c10::DeviceIndex(device)}).index();
}

}  // extern "C"
