// The end of both shrink kernels, shrink.cu and shrink_tma.cu: four warps have z of 64 rows as fragments; they store it,
// u = s z R^T, and these rows' part of gram = s z^T other.
//
// The products are made on tensor cores from fp32 numbers split into two bf16 each: hi hi + hi lo + lo hi, 2^-16.

#pragma once

#include "device.cuh"

namespace loraxs {

constexpr int kRows = LORAXS_SHRINK_ROWS;
static_assert(kRows == 16 * 4, "each warp takes 16 rows");

// Shared memory, in bytes: R in two halves; z and `other`, likewise, where a gram is asked for.
template <int RANK>
struct Finish {
  static constexpr int tiles = RANK / 8;               // fragments of z beside each other
  static constexpr int pitch = RANK + 8;               // of 16-bit rows: eight of them fall on all banks
  static constexpr int R_bytes = 2 * RANK * pitch * 2, rows_bytes = 4 * kRows * pitch * 2;
};

template <int RANK>
using Fragments = float[Finish<RANK>::tiles][4];  // of z or u: 16 rows of a warp

// R, split, into shared memory.
template <int RANK>
__device__ void load_R(loraxs_shrink_args const& p, uint16_t* high, int thread, int threads) {
  constexpr int pitch = Finish<RANK>::pitch;
  auto const low = high + RANK * pitch;
  auto const R = static_cast<float const*>(p.R.data);
#pragma unroll 4
  for (int at = 2 * thread; at < RANK * RANK; at += 2 * threads) {
    int const o = at / RANK, i = at % RANK;
    bool const in = o < p.r && i < p.r;
    Split const found = split(in ? R[o * p.R.row + i * p.R.column] : 0.0f,
                              in && i + 1 < p.r ? R[o * p.R.row + (i + 1) * p.R.column] : 0.0f);
    *reinterpret_cast<uint32_t*>(high + o * pitch + i) = found.high;
    *reinterpret_cast<uint32_t*>(low + o * pitch + i) = found.low;
  }
}

// Store z (16 rows of each of the four warps), u, and the gram of the 64 rows, the block-th.  R_high: from load_R, by
// these or other threads; rows: shared memory.  sync() is a barrier of the four warps, made once; stored() is called when
// a thread has stored its part of u.
template <class T, int RANK, class Sync, class Stored>
__device__ void finish(loraxs_shrink_args const& p, Fragments<RANK> const& z, int64_t block, uint16_t const* R_high,
                       uint16_t* rows, int thread, Sync sync, Stored stored) {
  constexpr int tiles = Finish<RANK>::tiles, pitch = Finish<RANK>::pitch, threads = 128;
  int const warp = thread / 32, lane = thread % 32, g = lane / 4, j = lane % 4;
  auto const R_low = R_high + RANK * pitch;
  auto const z_high = rows, z_low = z_high + kRows * pitch;
  auto const other_high = z_low + kRows * pitch, other_low = other_high + kRows * pitch;
  int64_t const block_row = block * kRows;
  if (p.other) {
#pragma unroll 8
    for (int at = 2 * thread; at < kRows * RANK; at += 2 * threads) {
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
      if (block_row + t < p.T && c < p.r) {
        float* const to = p.z + (block_row + t) * p.r + c;
        if (p.r % 2 == 0) {
          *reinterpret_cast<float2*>(to) = {first, second};
        } else {
          to[0] = first;
          if (c + 1 < p.r) to[1] = second;
        }
      }
      Split const found = split(first, second);
      high[n][half] = found.high, low[n][half] = found.low;
      if (p.other) {
        *reinterpret_cast<uint32_t*>(z_high + t * pitch + c) = found.high;
        *reinterpret_cast<uint32_t*>(z_low + t * pitch + c) = found.low;
      }
    }
  }
  sync();
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
  stored();
  if (!p.other) return;
  // Rows of this warp, 16 of the rank; z is read transposed.
  int const i = lane % 8, q = lane / 8;
  for (int m = 16 * warp; m < RANK; m += 16 * 4) {
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
        if (row < p.r && column < p.r) p.gram[(block * p.r + row) * p.r + column] = p.s * gram[n][e];
      }
    }
  }
}

}  // namespace loraxs
