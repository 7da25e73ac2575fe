// The forward kernels of csrc/contrast.cu, and how its kernels read and write neighbouring values.
#pragma once

#include <cstring>

#include "common/launch.h"
#include "contrast.h"

namespace kdops {
namespace {

constexpr int kWarps = 8;         // of a forward block
constexpr int kAhead = 3;         // steps of a forward thread that are in shared memory or on their way
constexpr int kRows = 8;          // of each input in a forward thread's registers
constexpr int64_t kLongest = 2048;  // sums of a forward thread, which bounds their rounding error
constexpr int kThreads = 256;     // of every other kernel

__host__ __device__ constexpr int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

template <int Bytes>
using Word = std::conditional_t<
    Bytes == 2, unsigned short,
    std::conditional_t<Bytes == 4, unsigned, std::conditional_t<Bytes == 8, uint2, uint4>>>;

template <typename T, typename U>
__device__ T bits_as(U bits) {
  static_assert(sizeof(T) == sizeof(U));
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// Count neighbouring values of a row, read at once and kept as one word until they are used.
template <typename scalar_t, int Count>
struct Values {
  Word<sizeof(scalar_t) * Count> word;

  __device__ float operator[](int i) const {
    if constexpr (Count == 1) {
      return static_cast<float>(bits_as<scalar_t>(word));
    } else if constexpr (sizeof(scalar_t) == 4) {
      return bits_as<scalar_t>(i == 0 ? word.x : word.y);
    } else {
      unsigned both;
      if constexpr (Count == 2)
        both = word;
      else
        both = i < 2 ? word.x : word.y;
      if constexpr (std::is_same_v<scalar_t, BFloat16>)
        return bits_as<float>(i % 2 == 0 ? both << 16 : both & 0xffff0000u);  // one instruction each
      else
        return static_cast<float>(bits_as<scalar_t>(static_cast<Word<2>>(both >> i % 2 * 16)));
    }
  }
};

// Through the read-only path: no kernel here writes what it reads.
template <int Count, typename scalar_t>
__device__ Values<scalar_t, Count> read(const scalar_t* from) {
  return {__ldg(reinterpret_cast<const Word<sizeof(scalar_t) * Count>*>(from))};
}

// Reads into shared memory while the thread goes on: a thread waits for its own groups of words, and for nobody else's. Words that
// no other warp reads pass by the L1 cache.
template <int Count, bool Shared = true, typename scalar_t>
__device__ void read_ahead(Values<scalar_t, Count>* to, const scalar_t* from) {
#ifdef __CUDA_ARCH__
  if constexpr (!Shared) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2;"
                 :
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from), "n"(sizeof(*to))
                 : "memory");
    return;
  } else if constexpr (sizeof(*to) >= 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                 :
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from), "n"(sizeof(*to))
                 : "memory");
    return;
  }
#endif
  *to = read<Count>(from);
}

__device__ void end_group() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all groups but the last Later ones have arrived.
template <int Later>
__device__ void await_groups() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(Later) : "memory");
#endif
}

template <typename scalar_t, int Count>
__device__ void write(scalar_t* to, const float (&values)[Count]) {
  using Whole = Word<sizeof(scalar_t) * Count>;
  alignas(Whole) scalar_t narrow[Count];
#pragma unroll
  for (int n = 0; n < Count; ++n) narrow[n] = static_cast<scalar_t>(values[n]);
  *reinterpret_cast<Whole*>(to) = *reinterpret_cast<const Whole*>(narrow);
}

// Square tiles that cover all pairs of rows, `along` of them in a row; of symmetric distances each pair of tiles once: on
// the diagonal, one beside it, and so on, around the end.
struct Tiles {
  int64_t along_x, along_y;
  bool symmetric;

  __host__ __device__ int64_t count() const {
    return symmetric ? along_x * (along_x + 1) / 2 : along_x * along_y;
  }

  __device__ int64_t x(int64_t tile) const {
    return symmetric ? tile % along_x : tile / along_y;
  }

  __device__ int64_t y(int64_t tile) const {
    return symmetric ? (tile % along_x + tile / along_x) % along_x : tile % along_y;
  }
};

// Adds the first Count values over the 32 lanes of a warp. An exchange with the lane at distance Offset halves the
// number of values that a lane is responsible for; afterwards its first max(Count / 32, 1) values are the sums from
// number `first` (returned) on.
template <int Count, int Offset = 16, int N>
__device__ int add_over_warp(float (&values)[N]) {
  constexpr int half = Count > 1 ? Count / 2 : 1;
  int first = 0;
  if constexpr (Count > 1) {
    const bool upper = threadIdx.x & Offset;
    first = upper ? half : 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(~0u, sent, Offset);
    }
  } else {
    values[0] += __shfl_xor_sync(~0u, values[0], Offset);
  }
  if constexpr (Offset > 1) first += add_over_warp<half, Offset / 2>(values);
  return first;
}

// What a warp works on: of which batch and share of the features, and the first row of each of its tiles. A last tile that is
// not full begins earlier, so that rows are a fixed step apart; what others write it leaves out.
template <int RX, int RY>
struct Work {
  int64_t part, own_x, own_y, first_x, first_y;  // part is batch * shares + share

  __device__ Work(unsigned block, const Tiles& tiles, const Problem& problem) {
    const int64_t warp = static_cast<int64_t>(block) * kWarps + threadIdx.x / 32, tile = warp % tiles.count();
    part = warp / tiles.count();
    own_x = tiles.x(tile) * RX;
    own_y = tiles.y(tile) * RY;
    first_x = min(own_x, problem.rows_x - RX);
    first_y = min(own_y, problem.rows_y - RY);
  }
};

// partial[batch][share][i][k]: distance of x_i and y_k over a share of the features: every `shares`-th piece of 32 * Count,
// so that all warps together read one run of each row. A warp computes RX x RY of them; of symmetric ones it writes
// both places.
template <typename scalar_t, int P, int RX, int RY, int Count>
__global__ void __launch_bounds__(32 * kWarps, 2)
    partial_distances(const scalar_t* x, Rows rows_of_x, const scalar_t* y, Rows rows_of_y, Problem problem,
                      int64_t shares, Tiles tiles, float* partial) {
  unsigned block = blockIdx.x;
  const int64_t step = shares * 32 * Count;
  int unread = 0;  // steps
  {
    const Work<RX, RY> work(block, tiles, problem);
    if (work.part >= problem.batches * shares) return;
    const int64_t begin = (work.part % shares * 32 + threadIdx.x % 32) * Count, batch = work.part / shares;
    if (begin < problem.features) unread = static_cast<int>((problem.features - begin + step - 1) / step);
    x += batch * rows_of_x.batch_stride + work.first_x * rows_of_x.row_stride + begin;
    y += batch * rows_of_y.batch_stride + work.first_y * rows_of_y.row_stride + begin;
  }

  // This thread's words of the rows of both tiles, kAhead steps of them.
  using Word = Values<scalar_t, Count>;
  constexpr int lanes = 32 * kWarps, slot = (RX + RY) * lanes;
  Word* const own = reinterpret_cast<Word*>(block_memory()) + threadIdx.x;
  const auto fetch = [&](Word* to) {
    if (unread > 0) {
      auto step_x = static_cast<unsigned>(rows_of_x.row_stride / Count);
      auto step_y = static_cast<unsigned>(rows_of_y.row_stride / Count);
      asm volatile("" : "+r"(step_x), "+r"(step_y));  // a pointer for every row, kept from step to step, fills the registers
#pragma unroll
      for (unsigned i = 0; i < RX; ++i)
        read_ahead<Count>(to + i * lanes, x + static_cast<uint64_t>(step_x) * (i * Count));
#pragma unroll
      for (unsigned k = 0; k < RY; ++k)
        read_ahead<Count>(to + (RX + k) * lanes, y + static_cast<uint64_t>(step_y) * (k * Count));
      x += step;
      y += step;
    }
    --unread;
    end_group();
  };
#pragma unroll 1
  for (int ahead = 0; ahead < kAhead - 1; ++ahead) fetch(own + ahead * slot);
  float sums[RX * RY] = {};
  Word *here = own, *free = own + (kAhead - 1) * slot;
  while (unread > 1 - kAhead) {
    await_groups<kAhead - 2>();
    fetch(free);
    float a[RX][Count];
#pragma unroll
    for (int i = 0; i < RX; ++i) {
      const Word word = here[i * lanes];
#pragma unroll
      for (int n = 0; n < Count; ++n) a[i][n] = word[n];
    }
#pragma unroll
    for (int k = 0; k < RY; ++k) {
      const Word word = here[(RX + k) * lanes];
#pragma unroll
      for (int n = 0; n < Count; ++n) {
        const float b = word[n];
#pragma unroll
        for (int i = 0; i < RX; ++i) {
          const float difference = a[i][n] - b;
          sums[i * RY + k] += P == 1 ? fabsf(difference) : difference * difference;
        }
      }
    }
    free = here;
    here = here == own + (kAhead - 1) * slot ? own : here + slot;
  }
  await_groups<0>();

  asm volatile("" : "+r"(block));  // where the sums belong is found again: kept all the while, it fills registers
  const Work<RX, RY> work(block, tiles, problem);
  constexpr int mine = (RX * RY + 31) / 32;
  const int first = add_over_warp<RX * RY>(sums);
#pragma unroll
  for (int n = first; n < first + mine; ++n) {
    const int64_t i = work.first_x + n / RY, k = work.first_y + n % RY;
    if (i < work.own_x || i >= problem.rows_x || k < work.own_y || k >= problem.rows_y) continue;
    partial[work.part * problem.pairs() + i * problem.rows_y + k] = sums[n - first];
    if (problem.symmetric) partial[work.part * problem.pairs() + k * problem.rows_y + i] = sums[n - first];
  }
}

__global__ void __launch_bounds__(kThreads)
    add_shares(const float* partial, int64_t shares, int64_t pairs, int64_t count, float* result) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;  // batch * pairs + pair
  if (n >= count) return;
  double sum = 0;
  for (int64_t c = 0; c < shares; ++c) sum += partial[(n / pairs * shares + c) * pairs + n % pairs];
  result[n] = static_cast<float>(sum);
}

}  // namespace
}  // namespace kdops
