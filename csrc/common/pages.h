// Memory of large fresh results.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tensors.h"

namespace kdops {

// Asks for huge pages under a dense result that is about to be written. Its memory is often new to the process, and then
// the kernel's work for each of its pages costs several times what writing them does. A hint: where it is refused
// nothing changes, and memory outside of the tensor is left alone.
inline void prepare(const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(fresh.numel()) * fresh.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace kdops
