// The mainloop of y = x W^T + u B^T: CUTLASS's warp-specialised TMA + wgmma loop, whose producer walks two operand pairs.
//
// After the tiles of (x, W) come those of (u, B), through descriptors of their own and the same buffers: the consumer
// warps never know.  The problem's K is 64 (ceil(K / 64) + ceil(r / 64)), so that the scheduler counts both; TMA reads
// zeros past K and past r.
//
// Counted for T = 8192, N = K = 4096, r = 64: 275 GFLOP + 4.3 GFLOP, 1.6 % more than the base GEMM whatever r <= 64, and
// 1.6 % more reads of L2; nothing is read or written anew.  On an H100 all of it takes less time than the library's
// x W^T alone, in the order of tiles that config.py picks (bench/results/NOTES.md).

#pragma once

#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

#include "trace.h"

namespace loraxs {

using namespace cute;

inline constexpr int kTileK = 64, kTileT = 128;  // of both tiles in gemm_tail_tiles.h, and what `ready` counts

template <class Base>
struct TailMainloop : Base {
  using typename Base::DispatchPolicy;
  using typename Base::ElementA;
  using typename Base::ElementB;
  using typename Base::InternalElementA;
  using typename Base::InternalElementB;
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::SmemLayoutA;
  using typename Base::SmemLayoutB;
  using typename Base::StrideA;
  using typename Base::StrideB;
  using typename Base::TensorStorage;
  using typename Base::TileShape;
  static_assert(size<0>(TileShape{}) == kTileT && size<2>(TileShape{}) == kTileK);
  using ClusterShape = typename DispatchPolicy::ClusterShape;
  using TmaA = typename Base::Params::TMA_A;
  using TmaB = typename Base::Params::TMA_B;

  struct Arguments {
    ElementA const* x;
    StrideA x_stride;
    ElementB const* W;
    StrideB W_stride;
    ElementA const* u;
    StrideA u_stride;
    ElementB const* B;
    StrideB B_stride;
    int K, r;
    uint32_t const* ready;
  };

  // The base's descriptors are those of x and W.
  struct Params : Base::Params {
    TmaA u;
    TmaB B;
    int T, K, r;
    uint32_t const* ready;
    LORAXS_TRACED(void* trace = nullptr;)
  };
  LORAXS_TRACED(Trace trace;)  // of the thread that issues the copies

  static TmaA descriptor_a(ElementA const* data, StrideA stride, int rows, int columns) {
    auto pointer = reinterpret_cast<InternalElementA const*>(data);
    auto tensor = make_tensor(pointer, make_layout(make_shape(rows, columns, 1), stride));
    return make_tma_copy_A_sm90(
        typename Base::GmemTiledCopyA{}, tensor, SmemLayoutA{}(_, _, Int<0>{}), TileShape{}, ClusterShape{});
  }

  static TmaB descriptor_b(ElementB const* data, StrideB stride, int rows, int columns) {
    auto pointer = reinterpret_cast<InternalElementB const*>(data);
    auto tensor = make_tensor(pointer, make_layout(make_shape(rows, columns, 1), stride));
    return make_tma_copy_B_sm90(
        typename Base::GmemTiledCopyB{}, tensor, SmemLayoutB{}(_, _, Int<0>{}), TileShape{}, ClusterShape{});
  }

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape const& problem, Arguments const& args, void*) {
    int T = get<0>(problem), N = get<1>(problem);
    auto u = descriptor_a(args.u, args.u_stride, T, args.r);
    auto B = descriptor_b(args.B, args.B_stride, N, args.r);
    if (args.K == 0) return {{u, B}, u, B, T, args.K, args.r, args.ready};
    auto x = descriptor_a(args.x, args.x_stride, T, args.K);
    auto W = descriptor_b(args.W, args.W_stride, N, args.K);
    return {{x, W}, u, B, T, args.K, args.r, args.ready};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    Base::prefetch_tma_descriptors(params);
    prefetch_tma_descriptor(params.u.get_tma_descriptor());
    prefetch_tma_descriptor(params.B.get_tma_descriptor());
  }

  // The operands in tiles.  The kernel takes the number of tiles from the first two, so these span both segments.
  template <class ProblemShape>
  CUTLASS_DEVICE auto load_init(ProblemShape const& problem, Params const& params) const {
    auto [T, N, K, L] = problem;
    auto by_a = Step<_1, Underscore, _1>{};
    auto by_b = Step<Underscore, _1, _1>{};
    auto all = make_coord(_, _, _);
    return make_tuple(
        local_tile(params.tma_load_a.get_tma_tensor(make_shape(T, K, L)), TileShape{}, all, by_a),
        local_tile(params.tma_load_b.get_tma_tensor(make_shape(N, K, L)), TileShape{}, all, by_b),
        local_tile(params.u.get_tma_tensor(make_shape(T, K, L)), TileShape{}, all, by_a),
        local_tile(params.B.get_tma_tensor(make_shape(N, K, L)), TileShape{}, all, by_b));
  }

  template <class Inputs, class BlockCoord, class Iterator>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write, Inputs const& inputs,
                           BlockCoord const& coord, Iterator tile, int tiles, int, uint32_t rank,
                           TensorStorage& shared) {
    if (!elect_one_sync()) return;
    LORAXS_TRACED(trace.begin(params.trace, blockIdx.x + gridDim.x * blockIdx.y);)
    constexpr uint32_t width = size<0>(ClusterShape{}), height = size<1>(ClusterShape{});
    uint32_t const i = rank % width, j = rank / width;  // this program's place in the cluster
    // A tile of x or u goes to all programs in its row of the cluster, one of W or B to all in its column.
    uint16_t to_row = 0, to_column = 0;
    if constexpr (is_same_v<typename Base::GmemTiledCopyA, SM90_TMA_LOAD_MULTICAST>) {
      for (uint32_t other = 0; other < height; ++other) to_row |= uint16_t(1) << (i + other * width);
    }
    if constexpr (is_same_v<typename Base::GmemTiledCopyB, SM90_TMA_LOAD_MULTICAST>) {
      for (uint32_t other = 0; other < width; ++other) to_column |= uint16_t(1) << (other + j * width);
    }
    auto sA = make_tensor(make_smem_ptr(shared.smem_A.data()), SmemLayoutA{});
    auto sB = make_tensor(make_smem_ptr(shared.smem_B.data()), SmemLayoutB{});
    auto const m = get<0>(coord), n = get<1>(coord), l = get<3>(coord);
    auto walk = [&](TmaA const& tma_a, TmaB const& tma_b, auto const& tiles_a, auto const& tiles_b, int first, int last) {
      auto slice_a = tma_a.get_slice(j);
      auto slice_b = tma_b.get_slice(i);
      auto from_a = slice_a.partition_S(tiles_a(_, _, m, _, l));
      auto from_b = slice_b.partition_S(tiles_b(_, _, n, _, l));
      auto to_a = slice_a.partition_D(sA);
      auto to_b = slice_b.partition_D(sB);
      CUTLASS_PRAGMA_NO_UNROLL
      for (int at = first; at < last; ++at, ++write) {
        pipeline.producer_acquire(write);
        auto* barrier = pipeline.producer_get_barrier(write);
        copy(tma_a.with(*barrier, to_row), from_a(_, _, _, at), to_a(_, _, _, write.index()));
        copy(tma_b.with(*barrier, to_column), from_b(_, _, _, at), to_b(_, _, _, write.index()));
      }
    };
    int const base = (params.K + kTileK - 1) / kTileK;
    int const first = *tile, last = first + tiles;
    walk(params.tma_load_a, params.tma_load_b, get<0>(inputs), get<1>(inputs), first, min(last, base));
    // u may come from a launch that is still running: all but the tail overlaps with it.
    LORAXS_TRACED(trace.waiting();)
    if (params.ready == nullptr) asm volatile("griddepcontrol.wait;" ::: "memory");
    else if (m * kTileT < params.T) wait_for_rows(params.ready + m);
    LORAXS_TRACED(trace.waited();)
    walk(params.u, params.B, get<2>(inputs), get<3>(inputs), max(first, base) - base, last - base);
    LORAXS_TRACED(trace.tiles(1);)
  }

  // Both halves of a tile's rows of u are written, by threads (shrink_tma.cu), and may be read by TMA.
  CUTLASS_DEVICE static void wait_for_rows(uint32_t const* ready) {
    uint32_t halves;
    while (true) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(halves) : "l"(ready) : "memory");
      if (halves == 2) break;
      __nanosleep(100);
    }
    asm volatile("fence.proxy.async;" ::: "memory");
  }

  // What follows this launch follows the one before, too: this one ends after it.
  CUTLASS_DEVICE void load_tail(MainloopPipeline pipeline, PipelineState write) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    Base::load_tail(pipeline, write);
  }
};

}  // namespace loraxs
