// y = (y +) s R[index] x A^T B^T (+ bias) for few rows, in one launch, each token with an R of its own if need be.
//
// A cluster of programs shares the sum over K.  Each copies its share of x and A to shared memory, leaves its part of z
// there, reads the parts of all others for its share of the tokens, adds them up in order, and makes u of these tokens.
// Then each reads all of u and makes its share of N.  Several clusters make the same z and u and share N.  Before Hopper
// there are no clusters, and each program makes all of z.  R, B, and y where it is added to are read into registers while
// the copies are under way.
//
// Counted for T = 64, N = K = 4096 on an H100, 4 clusters of 8 programs.  A round is a wait for memory that depends on the
// round before:
//                                                         r = 16   r = 64
//     x and A, in four steps of 128 columns                  1        2     all four steps at once; three, then the fourth
//     z of the other programs, then u of them                2        2
// The version before this one needed 27 and 87 rounds.  In its loop over K each read of A waited for the product before
// it, 16 and 64 rounds; R took 4 and 16, B and y 5, z and u 2.  On an H100 it added 20 and 56 us to the base GEMM
// (bench/results/h100/2026-11-26-6e73597-decode.json), 0.7 us for each round.  That 100 of 132 multiprocessors have
// nothing to do is not the cause: more clusters only repeat z.
// Where each token has its own R, a warp reads r / 16 of them in turn: three rounds more at r = 64.
// Each program copies 80 KB (r = 16) or 128 KB (r = 64) from L2, at 64 bytes a cycle in 0.7 or 1.2 us.
// Prediction: 5 us (r = 16) and 7 us (r = 64), with the launch and the cluster's two barriers.  Not measured.
// Without clusters the 32 steps are 8 (r = 16) or 11 (r = 64) rounds, 128 and 512 before.  Each program copies 640 KB or
// 1 MB, 7 or 12 us on an A100, and that is what limits there.

#include <algorithm>
#include <type_traits>

#include "loraxs.h"

#include "device.cuh"
#include "trace.h"

namespace loraxs {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kTokens = 64;
constexpr int kSlab = 32, kStep = 128;  // columns of x: that a warp multiplies at a time; that a program copies at a time

template <int RANK>
struct Cut {
  static constexpr int tiles = RANK / 8, pitch = RANK + 8;  // of 16-bit rows of u
  static constexpr int slab_bytes = (kTokens + RANK) * kSlab * 2, step_bytes = kStep / kSlab * slab_bytes;  // of x and A
  static constexpr int steps = std::min(4, 99 * 1024 / step_bytes);  // that are there or under way
  // Later: parts of z, [share of K][token][]; then their sum, and z of the tokens this program makes u of, half of it
  // each; and u, of these tokens and of all.
  static constexpr int z_bytes = kWarps * 16 * RANK * 4;
  static constexpr int bytes = std::max(steps * step_bytes, z_bytes + 2 * kTokens * pitch * 2);
};
static_assert(2 * kTokens <= kWarps * 16);
static_assert(Cut<128>::bytes <= 99 * 1024 && Cut<128>::steps == 2, "what a block may have on every GPU from Ampere on");

// Whether `count` elements at a multiple of `count` can be read at once, in every row.
template <class T>
__device__ bool can_read_wide(loraxs_matrix const& m, int count) {
  return m.column == 1 && m.row % count == 0 && reinterpret_cast<uintptr_t>(m.data) % (count * sizeof(T)) == 0;
}

// Four elements from `from` on, of which `there` are there, in as many words as it takes; WIDE: all or none, aligned.
template <class T, bool WIDE>
__device__ void read_four(uint32_t* to, T const* from, int64_t step, int64_t there) {
  if constexpr (WIDE && sizeof(T) == 4) {
    auto const found = there > 0 ? *reinterpret_cast<uint4 const*>(from) : uint4{0, 0, 0, 0};
    to[0] = found.x, to[1] = found.y, to[2] = found.z, to[3] = found.w;
  } else if constexpr (WIDE) {
    auto const found = there > 0 ? *reinterpret_cast<uint2 const*>(from) : uint2{0, 0};
    to[0] = found.x, to[1] = found.y;
  } else {
    uint32_t found[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) found[i] = i < there ? from[i * step].bits : 0;
#pragma unroll
    for (int i = 0; i < int(sizeof(T)); ++i) to[i] = sizeof(T) == 4 ? found[i] : found[2 * i] | found[2 * i + 1] << 16;
  }
}

// Start to copy 128 columns of `rows` rows, from column k on, into slabs: zeros past `valid` rows and past column `end`.
template <class T, int RANK>
__device__ void copy_rows(unsigned char* to, loraxs_matrix const& m, int64_t k, int64_t end, int rows, int64_t valid,
                          bool wide) {
  int const j = threadIdx.x % 4, slab = threadIdx.x / 8 % 4, first = threadIdx.x / 32 * 2 + threadIdx.x / 4 % 2;
  k += kSlab * slab + 8 * j;
  int const left = int(std::clamp<int64_t>(end - k, 0, 8));
  auto from = static_cast<T const*>(m.data) + first * m.row + k * m.column;
  to += slab * Cut<RANK>::slab_bytes;
  if (wide) {
    for (int i = first; i < rows; i += 2 * kWarps, from += 2 * kWarps * m.row) {
      copy_async(to + swizzled<4>(i, j), from, i < valid ? 2 * left : 0);
    }
  } else {
#pragma unroll 1
    for (int i = first; i < rows; i += 2 * kWarps, from += 2 * kWarps * m.row) {
      uint32_t words[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        read_four<T, false>(words + 2 * half, from + 4 * half * m.column, m.column, i < valid ? left - 4 * half : 0);
      }
      *reinterpret_cast<uint4*>(to + swizzled<4>(i, j)) = {words[0], words[1], words[2], words[3]};
    }
  }
}

// What a warp needs of R for 16 ranks of u: lane j has columns 4 j .. 4 j + 3 of each 16, of rows g and g + 8.
template <int RANK>
struct Ranks {
  int slot;  // of R, or negative: none
  uint32_t words[RANK / 16][2][4];

  __device__ void load(loraxs_decode_args const& p, int token, int rank) {
    slot = p.index ? p.index[token] : 0;
    bool const whole = p.r % 4 == 0 && p.R_next % 4 == 0;
    if (p.R_type == LORAXS_FP32) {
      whole && can_read_wide<fp32>(p.R, 4) ? load<fp32, true>(p, rank) : load<fp32, false>(p, rank);
    } else {  // only bits are moved
      whole && can_read_wide<bf16>(p.R, 4) ? load<bf16, true>(p, rank) : load<bf16, false>(p, rank);
    }
  }

  template <class T, bool WIDE>
  __device__ void load(loraxs_decode_args const& p, int rank) {
    int const g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = rank + 8 * half + g;
      auto const from = static_cast<T const*>(p.R.data) + slot * p.R_next + row * p.R.row;
#pragma unroll
      for (int k = 0; k < RANK / 16; ++k) {
        int const column = 16 * k + 4 * j;
        int64_t const there = slot >= 0 && row < p.r ? p.r - column : 0;
        read_four<T, WIDE>(words[k][half], from + column * p.R.column, p.R.column, there);
      }
    }
  }

  __device__ float at(int k, int half, int i, int type) const {
    uint32_t const both = words[k][half][i / 2];
    auto const bits = uint16_t(i % 2 ? both >> 16 : both);
    switch (type) {
      case LORAXS_BF16: return widen(bf16{bits});
      case LORAXS_FP16: return widen(fp16{bits});
      default: return widen(fp32{words[k][half][i]});
    }
  }

  // u += R z^T for eight rows of z, `z` this lane's, row g, from column 4 j on: on tensor cores, both split.
  __device__ void multiply(float (&u)[4], float const* z, int type) const {
#pragma unroll
    for (int k = 0; k < RANK / 16; ++k) {
      auto const four = *reinterpret_cast<float4 const*>(z + 16 * k);
      Split const z0 = split(four.x, four.y), z1 = split(four.z, four.w);
      Split R[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) R[i] = split(at(k, i % 2, i / 2 * 2, type), at(k, i % 2, i / 2 * 2 + 1, type));
      uint32_t const high[4] = {R[0].high, R[1].high, R[2].high, R[3].high};
      uint32_t const low[4] = {R[0].low, R[1].low, R[2].low, R[3].low};
      mma<bf16>(u, low, z0.high, z1.high);
      mma<bf16>(u, high, z0.low, z1.low);
      mma<bf16>(u, high, z0.high, z1.high);
    }
  }
};

// What a warp needs for 16 columns of y: of B, lane j has ranks 4 j .. 4 j + 3 of each 16; and what y is added to.
template <class T, int RANK>
struct Columns {
  uint32_t B[2][RANK / 16][2], before[kTokens / 16][2][2], bias[2];

  // Whether two columns of y can be read at once, in every row.
  __device__ static bool together(loraxs_decode_args const& p) { return can_read_wide<T>(p.y, 2) && p.N % 2 == 0; }

  template <bool WIDE>
  __device__ void load_B(loraxs_decode_args const& p, int64_t column) {
    int const g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      int64_t const c = column + 8 * n + g;
      auto const from = static_cast<T const*>(p.B.data) + c * p.B.row;
#pragma unroll
      for (int k = 0; k < RANK / 16; ++k) {
        int const rank = 16 * k + 4 * j;
        read_four<T, WIDE>(B[n][k], from + rank * p.B.column, p.B.column, c < p.N ? p.r - rank : 0);
      }
    }
  }

  template <bool TOGETHER>
  __device__ void load_before(loraxs_decode_args const& p, int64_t column) {
    int const g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < kTokens / 16; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int64_t const t = 16 * m + 8 * half + g;
        auto const row = static_cast<T const*>(p.y.data) + t * p.y.row;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          int64_t const c = column + 8 * n + 2 * j, there = p.add && t < p.T ? p.N - c : 0;
          auto const from = row + c * p.y.column;
          if constexpr (TOGETHER) {
            before[m][n][half] = there > 0 ? *reinterpret_cast<uint32_t const*>(from) : 0;
          } else {
            before[m][n][half] = (there > 0 ? from[0].bits : 0) | uint32_t(there > 1 ? from[p.y.column].bits : 0) << 16;
          }
        }
      }
    }
  }

  __device__ void load(loraxs_decode_args const& p, int64_t column) {
    p.r % 4 == 0 && can_read_wide<T>(p.B, 4) ? load_B<true>(p, column) : load_B<false>(p, column);
    together(p) ? load_before<true>(p, column) : load_before<false>(p, column);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      int64_t const c = column + 8 * n + 2 * (threadIdx.x % 4), there = p.bias ? p.N - c : 0;
      auto const from = static_cast<T const*>(p.bias) + c;
      bias[n] = (there > 0 ? from[0].bits : 0) | uint32_t(there > 1 ? from[1].bits : 0) << 16;
    }
  }

  // y of these columns, all tokens.
  __device__ void expand(loraxs_decode_args const& p, T const* u, int64_t column) const {
    int const g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
    bool const aligned = together(p);
#pragma unroll
    for (int m = 0; m < kTokens / 16; ++m) {
      if (16 * m >= p.T) continue;
      float y[2][4] = {};
#pragma unroll
      for (int k = 0; k < RANK / 16; ++k) {
        auto const upper = *reinterpret_cast<uint2 const*>(u + (16 * m + g) * Cut<RANK>::pitch + 16 * k + 4 * j);
        auto const lower = *reinterpret_cast<uint2 const*>(u + (16 * m + g + 8) * Cut<RANK>::pitch + 16 * k + 4 * j);
        uint32_t const a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
        for (int n = 0; n < 2; ++n) loraxs::mma<T>(y[n], a, B[n][k][0], B[n][k][1]);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int64_t const t = 16 * m + 8 * half + g, c = column + 8 * n + 2 * j;
          if (t >= p.T || c >= p.N) continue;
          uint32_t const old = before[m][n][half];
          float const first = y[n][2 * half] + widen(T{uint16_t(bias[n])}) + widen(T{uint16_t(old)});
          float const second = y[n][2 * half + 1] + widen(T{uint16_t(bias[n] >> 16)}) + widen(T{uint16_t(old >> 16)});
          uint32_t const both = pair<T>(first, second);
          auto const to = static_cast<T*>(p.y.data) + t * p.y.row + c * p.y.column;
          if (aligned) {
            *reinterpret_cast<uint32_t*>(to) = both;
          } else {
            to[0] = T{uint16_t(both)};
            if (c + 1 < p.N) to[p.y.column] = T{uint16_t(both >> 16)};
          }
        }
      }
    }
  }
};

template <class T, int RANK>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(loraxs_decode_args const p) {
  LORAXS_TRACED(Trace trace; if (threadIdx.x == 0) trace.begin(p.trace, blockIdx.x);)
  using C = Cut<RANK>;
  constexpr int tiles = C::tiles, pitch = C::pitch;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  int const size = cluster_size(), rank = cluster_rank();
  auto const memory = shared_memory();
  // z over this program's share of K: as many warps share it as need not take other tokens.
  int const blocks = p.T <= 16 ? 1 : p.T <= 32 ? 2 : 4, shares = kWarps / blocks, tokens = 16 * blocks;
  int64_t const share = kSlab * up(up(p.K, kSlab), size), begin = std::min(share * rank, p.K);
  int64_t const end = std::min(begin + share, p.K);
  int const steps = int(up(end - begin, kStep));
  bool const wide_x = can_read_wide<T>(p.x, 8), wide_A = can_read_wide<T>(p.A, 8);
  auto const copy = [&](int step) {
    if (step < steps) {
      auto const to = memory + step % C::steps * C::step_bytes;
      copy_rows<T, RANK>(to, p.x, begin + kStep * step, end, tokens, p.T, wide_x);
      copy_rows<T, RANK>(to + kTokens * kSlab * 2, p.A, begin + kStep * step, end, RANK, p.r, wide_A);
    }
    copy_commit();
  };
#pragma unroll 1
  for (int step = 0; step < C::steps; ++step) copy(step);
  // Meanwhile, into registers: what is multiplied with z, and then with u.  A job: 16 ranks of u, of one of my tokens
  // (every size-th) where each has an R of its own, else of eight.
  int const own = p.T > rank ? int(up(p.T - rank, size)) : 0, at_once = p.index ? 1 : 8;
  int const jobs = RANK / 16 * int(up(own, at_once));
  auto const row_of = [&](int job) { return job / (RANK / 16) * at_once; };
  auto const ranks_of = [&](int job) { return job % (RANK / 16) * 16; };
  Ranks<RANK> R;
  if (warp < jobs) R.load(p, row_of(warp) * size + rank, ranks_of(warp));
  int64_t column = 16 * (int64_t(blockIdx.x) * kWarps + warp);
  Columns<T, RANK> columns;
  columns.load(p, column);
  float z[1][tiles][4] = {};
  for (int step = 0; step < steps; ++step) {
    copy_wait<C::steps - 1>();
    __syncthreads();
    auto const from = memory + step % C::steps * C::step_bytes;
    for (int slab = 0; slab < kStep / kSlab; ++slab) {
      if ((step * kStep / kSlab + slab) % shares != warp / blocks) continue;
      auto const x = from + slab * C::slab_bytes;
      multiply<T, 16, RANK, false>(z, x + warp % blocks * 16 * kSlab * 2, x + kTokens * kSlab * 2, lane);
    }
    __syncthreads();
    copy(step + C::steps);
  }
  auto const parts = reinterpret_cast<float*>(memory);  // [share][token][RANK]; the sum ends in the first
  auto const mine = parts + kTokens * RANK;             // z, a row for each of my tokens
  auto const made = reinterpret_cast<T*>(memory + C::z_bytes);  // u of my tokens
  auto const u = made + kTokens * pitch;                        // of all tokens
#pragma unroll
  for (int n = 0; n < tiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const t = 16 * (warp % blocks) + 8 * half + g;
      *reinterpret_cast<float2*>(parts + (warp / blocks * tokens + t) * RANK + 8 * n + 2 * j) = {z[0][n][2 * half],
                                                                                               z[0][n][2 * half + 1]};
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < tokens * RANK; at += kThreads) {
    float sum = parts[at];
    for (int part = 1; part < shares; ++part) sum += parts[part * tokens * RANK + at];
    parts[at] = sum;
  }
  LORAXS_TRACED(trace.waiting();)
  cluster_sync();
  for (int at = threadIdx.x; at < own * RANK; at += kThreads) {
    int const t = at / RANK * size + rank, c = at % RANK;
    float found[8];  // all under way at once
#pragma unroll
    for (int other = 0; other < 8; ++other) {
      auto const from = of_block(parts, std::min(other, size - 1));
      found[other] = other < size ? from[t * RANK + c] : 0.0f;
    }
    float sum = found[0];
#pragma unroll
    for (int other = 1; other < 8; ++other) sum += found[other];
    mine[at] = sum;
    if (p.z && int(blockIdx.x) < size && c < p.r) p.z[t * p.r + c] = sum;
  }
  __syncthreads();
  for (int job = warp; job < jobs; job += kWarps) {
    if (job != warp) R.load(p, row_of(job) * size + rank, ranks_of(job));
    float both[4] = {};  // ranks g and g + 8 of u, rows 2 j and 2 j + 1; one token: all rows are its
    int const row = row_of(job), last = own - 1;
    R.multiply(both, mine + std::min(row + (p.index ? 0 : g), last) * RANK + 4 * j, p.R_type);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int const to = row + (p.index ? 0 : 2 * j + e % 2);
      float const value = R.slot < 0 ? 0.0f : p.s * both[e];
      if (to >= own || (p.index && (j > 0 || e % 2 > 0))) continue;  // of one token four lanes have the same, twice
      made[to * pitch + ranks_of(job) + 8 * (e / 2) + g] = T{uint16_t(pair<T>(value, 0.0f))};
    }
  }
  cluster_sync();
  LORAXS_TRACED(trace.waited();)
  for (int at = threadIdx.x; at < tokens * RANK / 8; at += kThreads) {
    int const t = at / (RANK / 8), c = at % (RANK / 8) * 8;
    auto const to = reinterpret_cast<uint4*>(u + t * pitch + c);
    if (t < p.T) {
      *to = *reinterpret_cast<uint4 const*>(of_block(made, t % size) + t / size * pitch + c);
    } else {
      *to = uint4{0, 0, 0, 0};
    }
  }
  __syncthreads();
  cluster_leave();  // nothing of another program's is read from here on
  while (column < p.N) {
    columns.expand(p, u, column);
    LORAXS_TRACED(trace.tiles(1);)
    column += 16 * kWarps * gridDim.x;
    if (column < p.N) columns.load(p, column);
  }
  cluster_wait();
}

template <class T, int RANK>
int run(loraxs_decode_args p) {
  LORAXS_TRACED(p.trace = trace_launch(kTraceDecode, p.cluster * p.clusters);)
  Launch const how{dim3(p.cluster * p.clusters), kThreads, Cut<RANK>::bytes, p.cluster, false, p.stream};
  return launch(decode_kernel<T, RANK>, how, p);
}

}  // namespace
}  // namespace loraxs

extern "C" int loraxs_decode(const loraxs_decode_args* args) {
  using namespace loraxs;
  return with_rank<128>(args->r, [&](auto rank) {
    switch (args->type) {
      case LORAXS_BF16: return run<bf16, rank()>(*args);
      case LORAXS_FP16: return run<fp16, rank()>(*args);
      default: return int(LORAXS_NO_SUCH_KERNEL);
    }
  });
}
