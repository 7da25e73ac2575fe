// How the CUDA files launch their kernels: on torch's stream, in one-dimensional grids.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "tensors.h"

namespace kdops {

// Its tensor's device is the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard;
};

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int64_t multiprocessors(const Tensor& t) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index()));
  return count;
}

// The architecture whose code a kernel has, such as 90: a device may run code for one before its own.
template <typename... Parameters>
int architecture(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  return attributes.ptxVersion;
}

// The dynamic shared memory of this block.
__device__ inline float4* block_memory() {
  extern __shared__ float4 memory[];
  return memory;
}

// An empty grid is no work. `shared` is the dynamic shared memory of a block, in bytes.
template <typename... Parameters, typename... Arguments>
void launch(cudaStream_t stream, int64_t blocks, int threads, size_t shared, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "kdops: these tensors need a grid of ", blocks,
                  " blocks, which is more than CUDA takes.");
  if (blocks == 0) return;
  if (shared > kWithoutAsking) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace kdops
