// Work on several threads whose result does not depend on how many there are: tasks are cut by the shape of the problem
// alone.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace kdops {

// Memory that this thread's last calls gave back, for its next ones: the kernel's work for each page of fresh memory costs
// more than what small problems do with it.
class Reserve {
  static constexpr size_t kMost = size_t(16) << 20;  // bytes; larger problems hardly notice the pages
  std::vector<std::pair<size_t, void*>> blocks;      // the last given back is at the end
  size_t held = 0;

 public:
  static Reserve& mine() {
    static thread_local Reserve reserve;
    return reserve;
  }

  // At least `bytes`, aligned to a cache line; `bytes` becomes what there is.
  void* take(size_t& bytes) {
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
      if (block->first < bytes || block->first > 2 * bytes) continue;
      void* const memory = block->second;
      bytes = block->first;
      held -= bytes;
      blocks.erase(std::next(block).base());
      return memory;
    }
    return ::operator new(bytes, std::align_val_t(64));
  }

  void give(size_t bytes, void* memory) {
    blocks.emplace_back(bytes, memory);
    for (held += bytes; held > kMost; blocks.erase(blocks.begin())) {
      held -= blocks.front().first;
      ::operator delete(blocks.front().second, std::align_val_t(64));
    }
  }

  ~Reserve() {
    for (const auto& block : blocks) ::operator delete(block.second, std::align_val_t(64));
  }
};

struct GiveBack {
  size_t bytes = 0;

  void operator()(void* memory) const {
    Reserve::mine().give(bytes, memory);
  }
};

template <typename T>
using Buffer = std::unique_ptr<T[], GiveBack>;

// Uninitialised numbers, aligned to a cache line.
template <typename T>
Buffer<T> allocate(int64_t count) {
  size_t bytes = static_cast<size_t>(count) * sizeof(T);
  T* const memory = static_cast<T*>(Reserve::mine().take(bytes));
  return Buffer<T>(memory, GiveBack{bytes});
}

// body(task, scratch) for every task; `scratch` points to scratch_size numbers of type T that no other running task
// uses, aligned to a cache line. All memory is taken here, because nothing may throw inside parallel_for.
template <typename T, typename Body>
void for_each_task(int64_t tasks, int64_t scratch_size, const Body& body) {
  const int64_t slots = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t pitch = (scratch_size + kLine - 1) / kLine * kLine;
  const Buffer<T> scratch = allocate<T>(slots * pitch);
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t task = slot * tasks / slots; task < (slot + 1) * tasks / slots; ++task) {
        body(task, scratch.get() + slot * pitch);
      }
    }
  });
}

}  // namespace kdops
