// z = x A^T, u = s z R^T, gram = s z^T other: the narrow side of the primitive, for many rows.
//
// A block takes 64 rows and a share of K.  Each of its four warps walks every fourth step of 32 columns with buffers of
// its own, so that the loop has no barrier; their four parts of z are added up in order at the end.  The products with R
// and with `other` are made on tensor cores from fp32 numbers split into two bf16 each: hi hi + hi lo + lo hi, 2^-16.
//
// Counted for T = 8192, K = 4096, r = 64 on an H200 (4.3 TB/s, 132 multiprocessors): x is read once, 67 MB, 16 us; each of
// 128 blocks reads A from L2, 67 MB more.  2 T r K = 4.3 GFLOP, 8 us at 500 TFLOP/s (mma.sync), beside the reads.
// Shared memory moves 2 bytes in and 2 out for each byte read, 256 of its cycles for 8 KB of x: 56 B/ns a
// multiprocessor where memory gives 33.  So 16 us is the floor.  One block of four warps a multiprocessor leaves the
// latency of every step open, and on Hopper the library's product is faster: config.py does not pick this kernel there.

#include <algorithm>
#include <type_traits>

#include "loraxs.h"

#include "shrink_finish.cuh"
#include "trace.h"

namespace loraxs {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kStep = 32;

// Sizes for one width of the rank's tile, in bytes of shared memory.
template <int RANK>
struct Cut {
  static constexpr int tiles = Finish<RANK>::tiles;
  static constexpr int stages = RANK > 32 ? 3 : 4;     // of a warp's buffer; Hopper has room for two blocks
  static constexpr int x_bytes = kRows * kStep * 2, stage_bytes = x_bytes + RANK * kStep * 2;
  static constexpr int loop_bytes = kWarps * stages * stage_bytes;
  static constexpr int sum_bytes = kWarps * kRows * RANK * 4;
  static constexpr int finish_bytes = Finish<RANK>::R_bytes + Finish<RANK>::rows_bytes;
  static constexpr int bytes = std::max({loop_bytes, sum_bytes, finish_bytes});
};

static_assert(Cut<64>::bytes <= 99 * 1024, "what a block may have on every GPU from Ampere on");

// Where element (k, 8 chunk) of a step's A lies that is contiguous along the rank: rows of RANK elements, their chunks
// exchanged so that the eight rows one lane group reads at once, 8 i and 8 i + 1, fall on different banks.
template <int RANK>
__device__ int transposed_at(int k, int chunk) {
  int const turn = ((k >> 3) << 1 | (k & 1)) & (Cut<RANK>::tiles - 1);
  return k * RANK * 2 + (chunk ^ turn) * 16;
}

template <class T, int RANK, bool TRANSPOSED>
__device__ void start_copies(loraxs_shrink_args const& p, unsigned char* to, int64_t row, int64_t k, int lane) {
  int const g = lane / 4, j = lane % 4;
  auto const x = static_cast<T const*>(p.x.data);
  auto const A = static_cast<T const*>(p.A.data);
  int64_t const left = p.K - (k + 8 * j);
  int const bytes = left <= 0 ? 0 : left >= 8 ? 16 : int(left) * 2;
#pragma unroll 2
  for (int i = g; i < kRows; i += 8) {
    int const take = row + i < p.T ? bytes : 0;
    copy_async(to + i * kStep * 2 + j * 16, take ? x + (row + i) * p.x.row + k + 8 * j : x, take);
  }
  to += Cut<RANK>::x_bytes;
  if constexpr (!TRANSPOSED) {
#pragma unroll 2
    for (int i = g; i < RANK; i += 8) {
      int const take = i < p.r ? bytes : 0;
      copy_async(to + i * kStep * 2 + j * 16, take ? A + i * p.A.row + k + 8 * j : A, take);
    }
  } else {
#pragma unroll 2
    for (int at = lane; at < kStep * RANK / 8; at += 32) {
      int const i = at / Cut<RANK>::tiles, chunk = at % Cut<RANK>::tiles;
      int64_t const ranks = p.r - 8 * chunk;
      int const take = k + i >= p.K || ranks <= 0 ? 0 : ranks >= 8 ? 16 : int(ranks) * 2;
      copy_async(to + transposed_at<RANK>(i, chunk), take ? A + (k + i) * p.A.column + 8 * chunk : A, take);
    }
  }
}

// z += x A^T over one step of 32 columns.  Lane j has columns 8 j .. 8 j + 7 of its rows; product h takes four of them.
template <class T, int RANK, bool TRANSPOSED>
__device__ void multiply(float (&z)[4][Cut<RANK>::tiles][4], unsigned char const* from, int lane) {
  int const g = lane / 4, j = lane % 4;
  uint32_t x[4][2][4];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto const wide = *reinterpret_cast<uint4 const*>(from + (16 * m + 8 * half + g) * kStep * 2 + j * 16);
      x[m][0][half] = wide.x, x[m][0][2 + half] = wide.y, x[m][1][half] = wide.z, x[m][1][2 + half] = wide.w;
    }
  }
  from += Cut<RANK>::x_bytes;
#pragma unroll
  for (int n = 0; n < Cut<RANK>::tiles; n += 2) {
    uint32_t A[2][2][2];  // [h][tile][]
    if constexpr (!TRANSPOSED) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        auto const wide = *reinterpret_cast<uint4 const*>(from + (8 * (n + tile) + g) * kStep * 2 + j * 16);
        A[0][tile][0] = wide.x, A[0][tile][1] = wide.y, A[1][tile][0] = wide.z, A[1][tile][1] = wide.w;
      }
    } else {
      int const i = lane % 8, q = lane / 8;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int const k = 8 * (i / 2) + 4 * h + 2 * (q % 2) + i % 2;
        uint32_t found[4];
        load_transposed(found, from + transposed_at<RANK>(k, n + q / 2));
        A[h][0][0] = found[0], A[h][0][1] = found[1], A[h][1][0] = found[2], A[h][1][1] = found[3];
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        mma<T>(z[m][n], x[m][h], A[h][0][0], A[h][0][1]);
        mma<T>(z[m][n + 1], x[m][h], A[h][1][0], A[h][1][1]);
      }
    }
  }
}

template <class T, int RANK>
__device__ void finish_block(loraxs_shrink_args const& p, Fragments<RANK> const& z, unsigned char* memory) {
  auto const R = reinterpret_cast<uint16_t*>(memory);
  load_R<RANK>(p, R, threadIdx.x, kThreads);
  auto const rows = R + Finish<RANK>::R_bytes / 2;
  finish<T, RANK>(p, z, blockIdx.x, R, rows, threadIdx.x, [] { __syncthreads(); }, [] {});
}

template <class T, int RANK, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads) shrink_kernel(loraxs_shrink_args const p) {
  using C = Cut<RANK>;
  LORAXS_TRACED(Trace trace; if (threadIdx.x == 0) trace.begin(p.trace, blockIdx.x + gridDim.x * blockIdx.y);)
  if (p.overlap) launch_dependents();
  auto const memory = shared_memory();
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t const row = int64_t(blockIdx.x) * kRows;
  int64_t const share = up(up(p.K, kStep), gridDim.y), first = share * blockIdx.y;  // in steps
  int64_t const last = std::min(first + share, up(p.K, kStep));
  int64_t const steps = last > first + warp ? up(last - first - warp, kWarps) : 0;  // of this warp
  auto const buffer = memory + warp * C::stages * C::stage_bytes;
  auto const begin = [&](int64_t step) {
    if (step < steps) {
      start_copies<T, RANK, TRANSPOSED>(p, buffer + step % C::stages * C::stage_bytes, row,
                                        kStep * (first + warp + kWarps * step), lane);
    }
    copy_commit();
  };
  float z[4][C::tiles][4] = {};
#pragma unroll
  for (int step = 0; step < C::stages - 1; ++step) begin(step);
  for (int64_t step = 0; step < steps; ++step) {
    copy_wait<C::stages - 2>();
    __syncwarp();  // all lanes' copies of this step are there, and all have read the one before
    begin(step + C::stages - 1);
    multiply<T, RANK, TRANSPOSED>(z, buffer + step % C::stages * C::stage_bytes, lane);
  }
  LORAXS_TRACED(trace.tiles(steps);)
  __syncthreads();
  auto const sums = reinterpret_cast<float4*>(memory);  // [warp][m][tile][lane]
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < C::tiles; ++n) {
      sums[((warp * 4 + m) * C::tiles + n) * 32 + lane] = {z[m][n][0], z[m][n][1], z[m][n][2], z[m][n][3]};
    }
  }
  __syncthreads();
  Fragments<RANK> mine;
#pragma unroll
  for (int n = 0; n < C::tiles; ++n) {
    float4 sum = sums[(warp * C::tiles + n) * 32 + lane];
#pragma unroll
    for (int other = 1; other < kWarps; ++other) {
      float4 const part = sums[((other * 4 + warp) * C::tiles + n) * 32 + lane];
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    mine[n][0] = sum.x, mine[n][1] = sum.y, mine[n][2] = sum.z, mine[n][3] = sum.w;
  }
  __syncthreads();
  if (gridDim.y == 1) return finish_block<T, RANK>(p, mine, memory);
#pragma unroll
  for (int n = 0; n < C::tiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int64_t const t = row + 16 * warp + 8 * (e / 2) + lane / 4;
      int const c = 8 * n + 2 * (lane % 4) + e % 2;
      if (t < p.T && c < p.r) p.parts[(blockIdx.y * p.T + t) * p.r + c] = mine[n][e];
    }
  }
}

// The second launch, where several blocks have shared K.
template <class T, int RANK>
__global__ void __launch_bounds__(kThreads) finish_kernel(loraxs_shrink_args const p) {
  LORAXS_TRACED(Trace trace; if (threadIdx.x == 0) trace.begin(p.trace, blockIdx.x);)
  if (p.overlap) launch_dependents();
  LORAXS_TRACED(trace.waiting();)
  wait_for_launch_before();
  LORAXS_TRACED(trace.waited();)
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Fragments<RANK> z = {};
  for (int part = 0; part < p.split; ++part) {
#pragma unroll
    for (int n = 0; n < Cut<RANK>::tiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int64_t const t = int64_t(blockIdx.x) * kRows + 16 * warp + 8 * (e / 2) + lane / 4;
        int const c = 8 * n + 2 * (lane % 4) + e % 2;
        if (t < p.T && c < p.r) z[n][e] += p.parts[(part * p.T + t) * p.r + c];
      }
    }
  }
  finish_block<T, RANK>(p, z, shared_memory());
}

template <class T, int RANK>
int run(loraxs_shrink_args p) {
  auto const blocks = unsigned(up(p.T, kRows));
  LORAXS_TRACED(p.trace = trace_launch(kTraceShrink, blocks * p.split);)
  Launch how{dim3(blocks, p.split), kThreads, Cut<RANK>::bytes, 1, false, p.stream};
  int const status = p.transposed ? launch(shrink_kernel<T, RANK, true>, how, p)
                                  : launch(shrink_kernel<T, RANK, false>, how, p);
  if (status != LORAXS_OK || p.split == 1) return status;
  LORAXS_TRACED(p.trace = trace_launch(kTraceFinish, blocks);)
  how = {dim3(blocks), kThreads, Cut<RANK>::finish_bytes, 1, p.overlap != 0, p.stream};
  return launch(finish_kernel<T, RANK>, how, p);
}

}  // namespace
}  // namespace loraxs

extern "C" int loraxs_shrink(const loraxs_shrink_args* args) {
  using namespace loraxs;
  return with_rank<64>(args->r, [&](auto rank) {
    switch (args->type) {
      case LORAXS_BF16: return run<bf16, rank()>(*args);
      case LORAXS_FP16: return run<fp16, rank()>(*args);
      default: return int(LORAXS_NO_SUCH_KERNEL);
    }
  });
}
