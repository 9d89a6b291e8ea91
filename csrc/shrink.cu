// z = x A^T, u = s z R^T, gram = s z^T other: the narrow side of the primitive, for many rows.
//
// A block takes 64 rows and a share of K.  Each of its four warps walks every fourth step of 32 columns with buffers of
// its own, so that the loop has no barrier; their four parts of z are added up in order at the end.  The products with R
// and with `other` are made on tensor cores from fp32 numbers split into two bf16 each: hi hi + hi lo + lo hi, 2^-16.
//
// Counted for T = 8192, K = 4096, r = 64 on an H200 (4.3 TB/s, 132 multiprocessors): x is read once, 67 MB, 16 us; each of
// 128 blocks reads A from L2, 67 MB more.  2 T r K = 4.3 GFLOP, 8 us at 500 TFLOP/s (mma.sync), beside the reads.
// Shared memory moves 2 bytes in and 2 out for each byte read, 256 of its cycles for 8 KB of x: 99 B/ns a
// multiprocessor where memory gives 33.  So 16 us is the floor; 20 us the prediction, the end of each block counted.

#include <algorithm>
#include <type_traits>

#include "loraxs.h"

#include "device.cuh"
#include "trace.h"

namespace loraxs {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = LORAXS_SHRINK_ROWS, kStep = 32;
static_assert(kRows == 16 * kWarps, "at the end each warp takes 16 rows");

// Sizes for one width of the rank's tile, in bytes of shared memory.
template <int RANK>
struct Cut {
  static constexpr int tiles = RANK / 8;               // fragments of z beside each other
  static constexpr int stages = RANK > 32 ? 3 : 4;     // of a warp's buffer; Hopper has room for two blocks
  static constexpr int x_bytes = kRows * kStep * 2, stage_bytes = x_bytes + RANK * kStep * 2;
  static constexpr int loop_bytes = kWarps * stages * stage_bytes;
  static constexpr int sum_bytes = kWarps * kRows * RANK * 4;
  static constexpr int pitch = RANK + 8;               // of 16-bit rows: eight of them fall on all banks
  static constexpr int finish_bytes = (2 * RANK + 4 * kRows) * pitch * 2;
  static constexpr int bytes = std::max({loop_bytes, sum_bytes, finish_bytes});
};

static_assert(Cut<64>::bytes <= 99 * 1024, "what a block may have on every GPU from Ampere on");

template <int RANK>
using Fragments = float[Cut<RANK>::tiles][4];  // of z or u: 16 rows of a warp

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

// Two floats, each as the sum of two bf16.
struct Split {
  uint32_t high, low;
};
__device__ Split split(float first, float second) {
  uint32_t const high = pair<bf16>(first, second);
  float const first_high = widen(bf16{uint16_t(high)}), second_high = widen(bf16{uint16_t(high >> 16)});
  return {high, pair<bf16>(first - first_high, second - second_high)};
}

// Store z (16 rows of each warp), u, and the block's gram.
template <class T, int RANK>
__device__ void finish(loraxs_shrink_args const& p, Fragments<RANK>& z, unsigned char* memory) {
  constexpr int tiles = Cut<RANK>::tiles, pitch = Cut<RANK>::pitch;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  auto const R_high = reinterpret_cast<uint16_t*>(memory), R_low = R_high + RANK * pitch;
  auto const z_high = R_low + RANK * pitch, z_low = z_high + kRows * pitch;
  auto const other_high = z_low + kRows * pitch, other_low = other_high + kRows * pitch;
  auto const R = static_cast<float const*>(p.R.data);
  int64_t const block_row = int64_t(blockIdx.x) * kRows;
  for (int at = 2 * threadIdx.x; at < RANK * RANK; at += 2 * kThreads) {
    int const o = at / RANK, i = at % RANK;
    bool const in = o < p.r && i < p.r;
    Split const found = split(in ? R[o * p.R.row + i * p.R.column] : 0.0f,
                              in && i + 1 < p.r ? R[o * p.R.row + (i + 1) * p.R.column] : 0.0f);
    *reinterpret_cast<uint32_t*>(R_high + o * pitch + i) = found.high;
    *reinterpret_cast<uint32_t*>(R_low + o * pitch + i) = found.low;
  }
  if (p.other) {
    for (int at = 2 * threadIdx.x; at < kRows * RANK; at += 2 * kThreads) {
      int const t = at / RANK, i = at % RANK;
      bool const in = block_row + t < p.T && i < p.r;
      float const* const from = p.other + (block_row + t) * p.r + i;
      Split const found = split(in ? from[0] : 0.0f, in && i + 1 < p.r ? from[1] : 0.0f);
      *reinterpret_cast<uint32_t*>(other_high + t * pitch + i) = found.high;
      *reinterpret_cast<uint32_t*>(other_low + t * pitch + i) = found.low;
    }
  }
  uint32_t high[tiles][2], low[tiles][2];  // [][half]: rows g and g + 8
#pragma unroll
  for (int n = 0; n < tiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const t = 16 * warp + 8 * half + g, c = 8 * n + 2 * j;
      float const first = z[n][2 * half], second = z[n][2 * half + 1];
      if (block_row + t < p.T) {
        float* const to = p.z + (block_row + t) * p.r + c;
        if (c < p.r) to[0] = first;
        if (c + 1 < p.r) to[1] = second;
      }
      Split const found = split(first, second);
      high[n][half] = found.high, low[n][half] = found.low;
      if (p.other) {
        *reinterpret_cast<uint32_t*>(z_high + t * pitch + c) = found.high;
        *reinterpret_cast<uint32_t*>(z_low + t * pitch + c) = found.low;
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int o = 0; o < tiles; ++o) {
    float u[4] = {};
#pragma unroll
    for (int n = 0; n < tiles; n += 2) {
      uint32_t const z_h[4] = {high[n][0], high[n][1], high[n + 1][0], high[n + 1][1]};
      uint32_t const z_l[4] = {low[n][0], low[n][1], low[n + 1][0], low[n + 1][1]};
      int const at = (8 * o + g) * pitch + 8 * n + 2 * j;
      auto const R_h = reinterpret_cast<uint32_t const*>(R_high + at);
      auto const R_l = reinterpret_cast<uint32_t const*>(R_low + at);
      mma<bf16>(u, z_l, R_h[0], R_h[4]);
      mma<bf16>(u, z_h, R_l[0], R_l[4]);
      mma<bf16>(u, z_h, R_h[0], R_h[4]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int64_t const t = block_row + 16 * warp + 8 * half + g;
      int const c = 8 * o + 2 * j;
      if (t < p.T && c < p.u.row) {
        auto const to = reinterpret_cast<uint32_t*>(static_cast<T*>(p.u.data) + t * p.u.row + c);
        *to = pair<T>(p.s * u[2 * half], p.s * u[2 * half + 1]);
      }
    }
  }
  if (!p.other) return;
  // Rows of this warp, 16 of the rank; z is read transposed.
  int const i = lane % 8, q = lane / 8;
  for (int m = 16 * warp; m < RANK; m += 16 * kWarps) {
    float gram[tiles][4] = {};
#pragma unroll
    for (int k = 0; k < kRows; k += 16) {
      uint32_t z_h[4], z_l[4];
      int const at = (k + 8 * (q / 2) + i) * pitch + m + 8 * (q % 2);
      load_transposed(z_h, z_high + at);
      load_transposed(z_l, z_low + at);
#pragma unroll
      for (int n = 0; n < tiles; n += 2) {
        uint32_t o_h[4], o_l[4];
        int const from = (k + 8 * (q % 2) + i) * pitch + 8 * (n + q / 2);
        load_transposed(o_h, other_high + from);
        load_transposed(o_l, other_low + from);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          mma<bf16>(gram[n + tile], z_l, o_h[2 * tile], o_h[2 * tile + 1]);
          mma<bf16>(gram[n + tile], z_h, o_l[2 * tile], o_l[2 * tile + 1]);
          mma<bf16>(gram[n + tile], z_h, o_h[2 * tile], o_h[2 * tile + 1]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int const row = m + g + 8 * (e / 2), column = 8 * n + 2 * j + e % 2;
        if (row < p.r && column < p.r) p.gram[(blockIdx.x * p.r + row) * p.r + column] = p.s * gram[n][e];
      }
    }
  }
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
  if (gridDim.y == 1) return finish<T, RANK>(p, mine, memory);
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
  finish<T, RANK>(p, z, shared_memory());
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
