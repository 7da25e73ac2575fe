// Work on several threads whose result does not depend on how many there are: tasks are cut by the shape of the problem
// alone.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

namespace kdops {

struct AlignedDelete {
  void operator()(void* memory) const {
    ::operator delete(memory, std::align_val_t(64));
  }
};

template <typename T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;

// Uninitialised numbers, aligned to a cache line.
template <typename T>
Buffer<T> allocate(int64_t count) {
  return Buffer<T>(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t(64))));
}

// body(task, scratch) for every task; `scratch` points to scratch_size numbers of type T that no other running task
// uses. All memory is taken here, because nothing may throw inside parallel_for.
template <typename T, typename Body>
void for_each_task(int64_t tasks, int64_t scratch_size, const Body& body) {
  const int64_t slots = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const Buffer<T> scratch = allocate<T>(slots * scratch_size);
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t task = slot * tasks / slots; task < (slot + 1) * tasks / slots; ++task) {
        body(task, scratch.get() + slot * scratch_size);
      }
    }
  });
}

}  // namespace kdops
