// In place of csrc/common/launch.h: kernels of CUDA on a CPU, where a thread of the GPU is a thread of the process.
//
// Blocks run one after the other. Shared memory is `static`, the dynamic part filled with NaN before each block; barriers are
// std::barrier. Copies that run ahead on a GPU are done at once.
#pragma once

#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "tensors.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct Index {
  unsigned x;
};

inline thread_local Index threadIdx, blockIdx;

namespace gpu {

constexpr int kMostThreads = 1024, kSharedBytes = 227 * 1024;

inline float4 shared[kSharedBytes / sizeof(float4)];
inline float exchanged[kMostThreads];
inline std::unique_ptr<std::barrier<>> block;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;

}  // namespace gpu

using std::isfinite;
using std::isnan;
using std::max;
using std::min;

inline void __syncthreads() {
  gpu::block->arrive_and_wait();
}

inline void __syncwarp() {
  gpu::warps[threadIdx.x / 32]->arrive_and_wait();
}

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  gpu::exchanged[threadIdx.x] = value;
  __syncwarp();
  const float other = gpu::exchanged[threadIdx.x ^ offset];
  __syncwarp();
  return other;
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}

inline float __saturatef(float x) {
  return x > 0 ? min(x, 1.0f) : 0.0f;  // of NaN 0
}

namespace kdops {

using cudaStream_t = void*;

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};

inline cudaStream_t current_stream(const Tensor&) {
  return nullptr;
}

inline int64_t multiprocessors(const Tensor&) {
  return 3;
}

template <typename... Parameters>
int architecture(void (*)(Parameters...)) {
  return 90;
}

inline float4* block_memory() {
  return gpu::shared;
}

template <typename... Parameters, typename... Arguments>
void launch(cudaStream_t, int64_t blocks, int threads, size_t bytes, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  STD_TORCH_CHECK(threads <= gpu::kMostThreads && threads % 32 == 0 && bytes <= gpu::kSharedBytes, "no GPU runs this");
  if (blocks == 0) return;
  gpu::block = std::make_unique<std::barrier<>>(threads);
  gpu::warps.clear();
  for (int warp = 0; warp < threads / 32; ++warp) gpu::warps.push_back(std::make_unique<std::barrier<>>(32));
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) {
    running.emplace_back([&, thread] {
      threadIdx.x = thread;
      for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        __syncthreads();
        if (thread == 0) std::memset(gpu::shared, 0xff, sizeof(gpu::shared));
        __syncthreads();
        kernel(arguments...);
      }
    });
  }
  for (auto& thread : running) thread.join();
}

}  // namespace kdops
