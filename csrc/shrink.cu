// z = x A^T, u = s z R^T, gram = s z^T other: the narrow side of the primitive, for many rows.
//
// A block takes 64 rows and a share of K.  Each of its four warps walks every fourth step of 32 columns with buffers of
// its own, so that the loop has no barrier; their four parts of z are added up in order at the end.  The products with R
// and with `other` are made on tensor cores from fp32 numbers split into two bf16 each: hi hi + hi lo + lo hi, 2^-16.
//
// Counted for T = 8192, K = 4096, r = 64 on an H200 (4.3 TB/s, 132 multiprocessors): x is read once, 67 MB, 16 us; each of
// 128 blocks reads A from L2, 67 MB more.  2 T r K = 4.3 GFLOP, 9 us at 500 TFLOP/s (mma.sync), beside the reads.
// Shared memory moves 2 bytes in and 2 out for each byte of x, 256 of its cycles for 8 KB of x: 56 B/ns a multiprocessor
// where memory gives 33.  So 16 us is the floor.
// For 4 KB of x a warp issues 235 instructions, or 277 where A is transposed (sm_80; 212 and 266 on sm_90a);
// tests/test_build.py keeps them below 300.  64 of them are matrix products, which keep a tensor core of an A100 busy for 512 cycles, so
// instructions do not limit.  The version before issued 902 and read 9 B/ns a multiprocessor on an H100
// (bench/results/NOTES.md); this one is not measured.  On Hopper config.py does not pick this kernel.

#include <algorithm>
#include <type_traits>

#include "loraxs.h"

#include "shrink_finish.cuh"
#include "trace.h"

namespace loraxs {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kStep = 32;  // columns that a warp takes at a time

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

// What a lane copies of its warp's steps: 16 bytes of every eighth row of x and of A.  Where A is contiguous along the rank
// its rows are columns of x, and the lane copies from every kRowsOfA-th.  What depends on the row is computed once.
template <class T, int RANK, bool TRANSPOSED>
class Source {
 public:
  __device__ Source(loraxs_shrink_args const& p, int64_t row, int64_t k, int lane)
      : lane(lane), x_next(8 * p.x.row * sizeof(T)), A_next(kRowsOfA * (TRANSPOSED ? p.A.column : p.A.row) * sizeof(T)) {
    int const g = lane / 4, j = lane % 4;
    x = reinterpret_cast<unsigned char const*>(static_cast<T const*>(p.x.data) + (row + g) * p.x.row + k + 8 * j);
    x_rows = int(up(std::min<int64_t>(p.T - row, kRows) - g, 8));
    auto const from = static_cast<T const*>(p.A.data);
    if constexpr (TRANSPOSED) {
      A = reinterpret_cast<unsigned char const*>(from + (k + first_k()) * p.A.column + 8 * chunk());
      A_bytes = std::clamp(int(p.r) - 8 * chunk(), 0, 8) * int(sizeof(T));
    } else {
      A = reinterpret_cast<unsigned char const*>(from + g * p.A.row + k + 8 * j);
      A_rows = int(up(p.r - g, 8));
    }
  }

  // Start to copy a step, of which `left` columns are there, all where it is WHOLE; then turn to the warp's next.
  template <bool WHOLE>
  __device__ void copy(unsigned char* to, int left = kStep) {
    int const j = lane % 4, bytes = WHOLE ? 16 : std::clamp(left - 8 * j, 0, 8) * int(sizeof(T));
    int const at = swizzled<4>(lane / 4, j);  // eight rows further likewise
    auto from = x;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i, from += x_next) {
      copy_async(to + at + 8 * i * kStep * int(sizeof(T)), from, i < x_rows ? bytes : 0);
    }
    x += kWarps * kStep * sizeof(T);
    to += Cut<RANK>::x_bytes;
    from = A;
#pragma unroll
    for (int i = 0; i < RANK / 8; ++i, from += A_next) {
      if constexpr (TRANSPOSED) {
        int const k = first_k() + kRowsOfA * i;
        copy_async(to + swizzled<Cut<RANK>::tiles>(k, chunk()), from, WHOLE || k < left ? A_bytes : 0);
      } else {
        copy_async(to + at + 8 * i * kStep * int(sizeof(T)), from, i < A_rows ? bytes : 0);
      }
    }
    A += TRANSPOSED ? kWarps * kStep / kRowsOfA * A_next : kWarps * kStep * int64_t(sizeof(T));
  }

 private:
  static constexpr int kRowsOfA = TRANSPOSED ? 32 / Cut<RANK>::tiles : 8;
  __device__ int first_k() const { return lane / Cut<RANK>::tiles; }
  __device__ int chunk() const { return lane % Cut<RANK>::tiles; }

  int const lane;
  unsigned char const *x, *A;
  int64_t const x_next, A_next;  // bytes
  int x_rows, A_rows = 0, A_bytes = 0;
};

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
  int const share = int(up(up(p.K, kStep), gridDim.y)), first = share * int(blockIdx.y);  // in steps
  int const last = std::min(first + share, int(up(p.K, kStep))), whole = std::min(last, int(p.K / kStep));
  int const steps = whole > first + warp ? int(up(whole - first - warp, kWarps)) : 0;  // of this warp
  auto const buffers = memory + warp * C::stages * C::stage_bytes;
  Source<T, RANK, TRANSPOSED> source(p, row, int64_t(kStep) * (first + warp), lane);
  int next = 0, now = 0;  // which buffer is written, which is read
  auto const after = [](int buffer) {
    return buffer == (C::stages - 1) * C::stage_bytes ? 0 : buffer + C::stage_bytes;
  };
  auto const begin = [&](int step) {
    if (step < steps) source.template copy<true>(buffers + next);
    copy_commit();
    next = after(next);
  };
  float z[4][C::tiles][4] = {};
#pragma unroll
  for (int step = 0; step < C::stages - 1; ++step) begin(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_wait<C::stages - 2>();
    __syncwarp();  // all lanes' copies of this step are there, and all have read the one before
    begin(step + C::stages - 1);
    multiply<T, kRows, RANK, TRANSPOSED>(z, buffers + now, buffers + now + C::x_bytes, lane);
    now = after(now);
  }
  if (first <= whole && whole < last && (whole - first) % kWarps == warp) {  // the end of K, part of a step
    __syncwarp();
    source.template copy<false>(buffers, int(p.K % kStep));
    copy_commit();
    copy_wait<0>();
    __syncwarp();
    multiply<T, kRows, RANK, TRANSPOSED>(z, buffers, buffers + C::x_bytes, lane);
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
