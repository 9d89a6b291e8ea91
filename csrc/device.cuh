// What the kernels written here use of the GPU, by name: matrix instructions, asynchronous copies, clusters, launches.
//
// A fragment is what one lane holds of a tile.  With g = lane / 4 and j = lane % 4, in the instruction m16n8k16:
//     a[0], a[1]  rows g, g + 8, columns 2j, 2j + 1;     a[2], a[3]  the same rows, columns 2j + 8, 2j + 9
//     b[0], b[1]  column g, rows 2j, 2j + 1 and 2j + 8, 2j + 9
//     d[0], d[1]  row g, columns 2j, 2j + 1;             d[2], d[3]  row g + 8
// The sum over k may run in any order, as long as a and b agree on it: where both come from memory that is contiguous
// along k, lane j takes its elements side by side, in one wide load.
//
// Without nvcc this is tests/emulator/emulator.h, which runs the same kernels on a CPU.

#pragma once

#ifndef __CUDACC__
#include "emulator.h"
#else

#include <cuda_fp16.h>

#include <type_traits>

#include "launch.h"

namespace loraxs {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct fp32 {
  uint32_t bits;
};

__device__ inline float widen(fp32 value) { return __uint_as_float(value.bits); }
__device__ inline float widen(bf16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
__device__ inline float widen(fp16 value) { return __half2float(__ushort_as_half(value.bits)); }

// Two numbers rounded to nearest, the first in the low half.
template <class T>
__device__ uint32_t pair(float low, float high);
template <>
__device__ inline uint32_t pair<bf16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
__device__ inline uint32_t pair<fp16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// d += a b in fp32.
template <class T>
__device__ void mma(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<bf16>(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<fp16>(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane 8 q + i gives the address of row i of matrix q (16 bytes),
// and gets row g, columns 2j and 2j + 1 of each; or, transposed, column g, rows 2j and 2j + 1.
__device__ inline void load_matrices(uint32_t (&d)[4], void const* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ inline void load_transposed(uint32_t (&d)[4], void const* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Start to copy `bytes` of the 16 at `from` to shared memory, and zeros for the rest; the L2 cache fetches the 256 bytes
// around them.  Of no bytes nothing is read, and `from` may be anywhere.
__device__ inline void copy_async(void* to, void const* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(bytes)
               : "memory");
}
// What was started since the last call becomes a group.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait for all groups of this thread but the last `left`.
template <int left>
__device__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char loraxs_shared_memory[];
  return loraxs_shared_memory;
}

// A cluster: blocks that run at the same time and can read each other's shared memory.
__device__ inline int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return int(__clusterSizeInBlocks());
#else
  return 1;
#endif
}
__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return int(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}
// Before the end: nothing that was written is for the others, only what was read is done with.
__device__ inline void cluster_leave() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive_relaxed();
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#endif
}
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cluster_arrive();
  cluster_wait();
#else
  __syncthreads();
#endif
}
template <class T>
__device__ T const* of_block(T const* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T const*>(__cluster_map_shared_rank(const_cast<T*>(mine), rank));
#else
  return mine;
#endif
}

// Let the next launch start, if it was launched to start early; it waits for this one's results by itself.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Wait for the results of the launch before, where this one has started early.
__device__ inline void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class Args>
int launch(void (*kernel)(Args), Launch const& how, Args args) {
  auto const address = reinterpret_cast<void const*>(kernel);
  if (how.shared_bytes > 48 * 1024) {
    if (cudaError_t error = allow(address, how.shared_bytes)) return error;
  }
  return start(address, how, &args);
}

}  // namespace loraxs

#endif

namespace loraxs {

constexpr int64_t up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Where 16 bytes lie in shared memory, the chunk-th of a row of `chunks` (2, 4 or 8), exchanged so that eight rows below each
// other fall on all banks, for each chunk.
template <int chunks>
__device__ int swizzled(int row, int chunk) {
  return ((row * chunks + chunk) ^ (row * chunks / 8 % chunks)) * 16;
}

// z += x A^T for ROWS rows, RANK ranks and 32 columns, which lie as swizzled<4> says; A TRANSPOSED as swizzled<RANK / 8>.
template <class T, int ROWS, int RANK, bool TRANSPOSED>
__device__ void multiply(float (&z)[ROWS / 16][RANK / 8][4], unsigned char const* x, unsigned char const* A, int lane) {
  int const i = lane % 8, q = lane / 8;  // the lane gives the address of row i of matrix q
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t rows[ROWS / 16][4];
#pragma unroll
    for (int m = 0; m < ROWS / 16; ++m) {
      load_matrices(rows[m], x + swizzled<4>(16 * m + 8 * (q % 2) + i, 2 * h + q / 2));
    }
#pragma unroll
    for (int n = 0; n < RANK / 8; n += 2) {
      uint32_t ranks[4];  // two of each tile
      if constexpr (TRANSPOSED) {
        load_transposed(ranks, A + swizzled<RANK / 8>(16 * h + 8 * (q % 2) + i, n + q / 2));
      } else {
        load_matrices(ranks, A + swizzled<4>(8 * (n + q / 2) + i, 2 * h + q % 2));
      }
#pragma unroll
      for (int m = 0; m < ROWS / 16; ++m) {
        mma<T>(z[m][n], rows[m], ranks[0], ranks[1]);
        mma<T>(z[m][n + 1], rows[m], ranks[2], ranks[3]);
      }
    }
  }
}

// Two floats, each as the sum of two bf16.  An infinite one becomes NaN where the halves are multiplied.
struct Split {
  uint32_t high, low;
};
__device__ inline Split split(float first, float second) {
  uint32_t const high = pair<bf16>(first, second);
  float const first_high = widen(bf16{uint16_t(high)}), second_high = widen(bf16{uint16_t(high >> 16)});
  return {high, pair<bf16>(first - first_high, second - second_high)};
}

// The width of a tile for rank r: one of 16, 32, 64, 128; `call(std::integral_constant)` with it.
template <int most, class Call>
int with_rank(int64_t r, Call call) {
  if (r <= 16) return call(std::integral_constant<int, 16>{});
  if (r <= 32) return call(std::integral_constant<int, 32>{});
  if (r <= 64) return call(std::integral_constant<int, 64>{});
  if constexpr (most >= 128) {
    if (r <= 128) return call(std::integral_constant<int, 128>{});
  }
  return LORAXS_NO_SUCH_KERNEL;
}

}  // namespace loraxs
