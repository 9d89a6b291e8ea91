// y = (y +) s R[index] x A^T B^T (+ bias) for few rows, in one launch, each token with an R of its own if need be.
//
// A cluster of programs shares the sum over K: each leaves its part of z in its shared memory, reads those of all others
// for its share of the tokens, in order, and makes u of these.  Then each reads all of u and makes its share of N.
// Several clusters make z and u alike and share N.  Where there are no clusters (before Hopper) each program makes all
// of z.  Operands go from memory to registers as the matrix instruction wants them, four or eight side by side.
//
// Counted for T = 64, N = K = 4096, r = 16 on an H200, 4 clusters of 8 programs: x 512 KB, A and B 128 KB each, y read
// and written 1 MB, R 64 x 1 KB: 1.8 MB, 0.4 us of memory; each cluster reads x, A and R, 2.8 MB of L2, 0.5 us.  The
// rest is latency, four dependent reads and three barriers: 4 us is the prediction, not measured yet.

#include <algorithm>
#include <type_traits>

#include "loraxs.h"

#include "device.cuh"
#include "trace.h"

namespace loraxs {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kTokens = 64;
constexpr int kLanes = 8;  // that share a row of R

template <int RANK>
struct Cut {
  static constexpr int tiles = RANK / 8, pitch = RANK + 8;      // of 16-bit rows of u
  // Parts of z, [share of K][token][]; then their sum, and z of the tokens this program makes u of, half of it each.
  static constexpr int z_bytes = kWarps * 16 * RANK * 4;
  static constexpr int bytes = z_bytes + 2 * kTokens * pitch * 2;
};
static_assert(2 * kTokens <= kWarps * 16);
static_assert(Cut<128>::bytes <= 99 * 1024, "what a block may have on every GPU from Ampere on");

// `count` elements along a row, from column k on, zeros past the limit; `wide`: they lie side by side and aligned.
template <class T, int count>
struct Run {
  uint32_t at[count / 2];
};
template <class T, int count>
__device__ Run<T, count> read(T const* row, int64_t k, int64_t limit, int64_t step, bool wide) {
  Run<T, count> found;
  if (wide && k + count <= limit) {
    if constexpr (count == 8) {
      auto const from = *reinterpret_cast<uint4 const*>(row + k);
      found.at[0] = from.x, found.at[1] = from.y, found.at[2] = from.z, found.at[3] = from.w;
    } else {
      auto const from = *reinterpret_cast<uint2 const*>(row + k);
      found.at[0] = from.x, found.at[1] = from.y;
    }
    return found;
  }
#pragma unroll
  for (int i = 0; i < count / 2; ++i) {
    uint32_t const low = k + 2 * i < limit ? row[(k + 2 * i) * step].bits : 0;
    uint32_t const high = k + 2 * i + 1 < limit ? row[(k + 2 * i + 1) * step].bits : 0;
    found.at[i] = low | high << 16;
  }
  return found;
}

// Whether `count` elements at a multiple of `count` can be read at once, in every row.
template <class T>
__device__ bool can_read_wide(loraxs_matrix const& m, int64_t row, int64_t column, int count) {
  return column == 1 && row % count == 0 && reinterpret_cast<uintptr_t>(m.data) % (count * sizeof(T)) == 0;
}

__device__ float element(void const* data, int64_t at, int type) {
  switch (type) {
    case LORAXS_BF16: return widen(static_cast<bf16 const*>(data)[at]);
    case LORAXS_FP16: return widen(static_cast<fp16 const*>(data)[at]);
    default: return static_cast<float const*>(data)[at];
  }
}

// This warp's part of z = x A^T, 16 tokens from `token` on: every `shares`-th step of 32 columns from `share` on.
template <class T, int RANK>
__device__ void shrink(loraxs_decode_args const& p, int64_t begin, int64_t end, int token, int share, int shares,
                       float (&z)[Cut<RANK>::tiles][4]) {
  int const lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  bool const wide_x = can_read_wide<T>(p.x, p.x.row, p.x.column, 8);
  bool const wide_A = can_read_wide<T>(p.A, p.A.row, p.A.column, 8);
  auto const x = static_cast<T const*>(p.x.data);
  auto const A = static_cast<T const*>(p.A.data);
  for (int64_t k = begin + 32 * share; k < end; k += 32 * shares) {
    Run<T, 8> rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const t = token + g + 8 * half;
      rows[half] = read<T, 8>(x + t * p.x.row, k + 8 * j, t < p.T ? end : 0, p.x.column, wide_x);
    }
#pragma unroll
    for (int n = 0; n < Cut<RANK>::tiles; ++n) {
      int const c = 8 * n + g;
      auto const ranks = read<T, 8>(A + c * p.A.row, k + 8 * j, c < p.r ? end : 0, p.A.column, wide_A);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t const a[4] = {rows[0].at[2 * h], rows[1].at[2 * h], rows[0].at[2 * h + 1], rows[1].at[2 * h + 1]};
        mma<T>(z[n], a, ranks.at[2 * h], ranks.at[2 * h + 1]);
      }
    }
  }
}

// y of 16 columns from `column` on, all tokens.  Lane j has ranks 4 j .. 4 j + 3 of each 16.
template <class T, int RANK>
__device__ void expand(loraxs_decode_args const& p, T const* u, int64_t column) {
  int const lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
  bool const wide = can_read_wide<T>(p.B, p.B.row, p.B.column, 4);
  auto const B = static_cast<T const*>(p.B.data);
  Run<T, 4> columns[2][RANK / 16];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    int64_t const c = column + 8 * n + g;
#pragma unroll
    for (int k = 0; k < RANK / 16; ++k) {
      columns[n][k] = read<T, 4>(B + c * p.B.row, 16 * k + 4 * j, c < p.N ? p.r : 0, p.B.column, wide);
    }
  }
  for (int token = 0; token < p.T; token += 16) {
    float y[2][4] = {};
#pragma unroll
    for (int k = 0; k < RANK / 16; ++k) {
      auto const upper = *reinterpret_cast<uint2 const*>(u + (token + g) * Cut<RANK>::pitch + 16 * k + 4 * j);
      auto const lower = *reinterpret_cast<uint2 const*>(u + (token + g + 8) * Cut<RANK>::pitch + 16 * k + 4 * j);
      uint32_t const a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
      for (int n = 0; n < 2; ++n) mma<T>(y[n], a, columns[n][k].at[0], columns[n][k].at[1]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int64_t const t = token + g + 8 * half, c = column + 8 * n + 2 * j;
        if (t >= p.T || c >= p.N) continue;
        auto const to = static_cast<T*>(p.y.data) + t * p.y.row + c * p.y.column;
        bool const two = c + 1 < p.N, together = two && p.y.column == 1 && reinterpret_cast<uintptr_t>(to) % 4 == 0;
        float first = y[n][2 * half], second = y[n][2 * half + 1];
        if (p.bias) {
          auto const bias = static_cast<T const*>(p.bias) + c;
          first += widen(bias[0]);
          if (two) second += widen(bias[1]);
        }
        if (p.add && together) {
          uint32_t const before = *reinterpret_cast<uint32_t const*>(to);
          first += widen(T{uint16_t(before)}), second += widen(T{uint16_t(before >> 16)});
        } else if (p.add) {
          first += widen(to[0]);
          if (two) second += widen(to[p.y.column]);
        }
        uint32_t const both = pair<T>(first, second);
        if (together) {
          *reinterpret_cast<uint32_t*>(to) = both;
        } else {
          to[0] = T{uint16_t(both)};
          if (two) to[p.y.column] = T{uint16_t(both >> 16)};
        }
      }
    }
  }
}

template <class T, int RANK>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(loraxs_decode_args const p) {
  LORAXS_TRACED(Trace trace; if (threadIdx.x == 0) trace.begin(p.trace, blockIdx.x);)
  constexpr int tiles = Cut<RANK>::tiles, pitch = Cut<RANK>::pitch;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const size = cluster_size(), rank = cluster_rank();
  auto const memory = shared_memory();
  auto const parts = reinterpret_cast<float*>(memory);  // [share][token][RANK]; the sum ends in the first
  auto const mine = parts + kTokens * RANK;             // z, a row for each of my tokens
  auto const made = reinterpret_cast<T*>(memory + Cut<RANK>::z_bytes);  // u of my tokens
  auto const u = made + kTokens * pitch;                                // of all tokens
  // z over this program's share of K: as many warps share it as need not take other tokens.
  int const blocks = p.T <= 16 ? 1 : p.T <= 32 ? 2 : 4, shares = kWarps / blocks, tokens = 16 * blocks;
  int64_t const share = 32 * up(up(p.K, 32), size), begin = std::min(share * rank, p.K);
  float z[tiles][4] = {};
  shrink<T, RANK>(p, begin, std::min(begin + share, p.K), 16 * (warp % blocks), warp / blocks, shares, z);
#pragma unroll
  for (int n = 0; n < tiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int const t = 16 * (warp % blocks) + 8 * (e / 2) + lane / 4, c = 8 * n + 2 * (lane % 4) + e % 2;
      parts[(warp / blocks * tokens + t) * RANK + c] = z[n][e];
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
  // u of every size-th token.
  int const own = p.T > rank ? int(up(p.T - rank, size)) : 0;
  for (int at = threadIdx.x; at < own * RANK; at += kThreads) {
    int const t = at / RANK * size + rank, c = at % RANK;
    float sum = 0.0f;
    for (int other = 0; other < size; ++other) sum += of_block(parts, other)[t * RANK + c];
    mine[at] = sum;
    if (p.z && int(blockIdx.x) < size && c < p.r) p.z[t * p.r + c] = sum;
  }
  __syncthreads();
  int const sub = threadIdx.x % kLanes;
  for (int at = threadIdx.x / kLanes; at < own * RANK; at += kThreads / kLanes) {
    int const row = at / RANK, o = at % RANK;
    int const slot = p.index ? p.index[row * size + rank] : 0;
    float sum = 0.0f;
    if (slot >= 0 && o < p.r) {
      int64_t const from = slot * p.R_next + o * p.R.row;
      for (int i = sub; i < p.r; i += kLanes) {
        sum += mine[row * RANK + i] * element(p.R.data, from + i * p.R.column, p.R_type);
      }
    }
#pragma unroll
    for (int over = kLanes / 2; over > 0; over /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, over);
    if (sub == 0) made[row * pitch + o] = T{uint16_t(pair<T>(p.s * sum, 0.0f))};
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
  for (int64_t column = 16 * (int64_t(blockIdx.x) * kWarps + warp); column < p.N; column += 16 * kWarps * gridDim.x) {
    expand<T, RANK>(p, u, column);
    LORAXS_TRACED(trace.tiles(1);)
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
