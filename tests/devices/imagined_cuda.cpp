// Lets a CPU build of torch believe that there is a CUDA device: autograd, generators and devices without a number ask
// for one below Python. It computes nothing; see imagined_cuda.py. Must be loaded before torch has looked.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

using c10::DeviceIndex;
using c10::Stream;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
    c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, 0); }
    DeviceIndex deviceCount() const noexcept override { return 1; }
    Stream getStream(c10::Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
    Stream getDefaultStream(c10::Device device) const override { return Stream(Stream::DEFAULT, device); }
    Stream exchangeStream(Stream stream) const noexcept override { return Stream(Stream::DEFAULT, stream.device()); }
    bool queryStream(const Stream&) const override { return true; }
};

struct CUDAHooks final : CUDAHooksInterface {
    explicit CUDAHooks(CUDAHooksArgs) {}
    void init() const override {}
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasCUDA() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    DeviceIndex current_device() const override { return 0; }
    Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
    bool isPinnedPtr(const void*) const override { return false; }
    Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
    const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
