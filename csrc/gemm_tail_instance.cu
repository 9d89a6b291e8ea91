// One GEMM of gemm_tail.cuh.  CMakeLists.txt compiles this file once for each LORAXS_TYPE (bf16, fp16), LORAXS_TRANSPOSED
// (0, 1) and LORAXS_TILE (a number of gemm_tail_tiles.h), so that they compile side by side.

#include <cstring>

#include "gemm_tail.cuh"
#include "gemm_tail_instances.h"
#include "launch.h"

namespace loraxs {
namespace {

namespace gemm = cutlass::gemm;
namespace epilogue = cutlass::epilogue;

struct Cooperative {
  using Mainloop = gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = epilogue::TmaWarpSpecializedCooperative;
};
struct Pingpong {
  using Mainloop = gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = epilogue::TmaWarpSpecialized;
};

template <int number>
struct Choice;
#define LORAXS_CHOICE(number, block_t, block_n, cluster, schedule) \
  template <>                                                      \
  struct Choice<number> {                                          \
    using Tile = Shape<Int<block_t>, Int<block_n>, Int<kTileK>>;   \
    using Cluster = Shape<Int<cluster>, _1, _1>;                   \
    using Schedule = schedule;                                     \
  };
LORAXS_TILES(LORAXS_CHOICE)

using bf16 = cutlass::bfloat16_t;
using fp16 = cutlass::half_t;

// Plain aliases, not members of a template: nested in one, the epilogue builder's break nvcc's host pass.
using Type = LORAXS_TYPE;
using Tile = Choice<LORAXS_TILE>::Tile;
using Cluster = Choice<LORAXS_TILE>::Cluster;
using Schedule = Choice<LORAXS_TILE>::Schedule;
using RowMajor = cutlass::layout::RowMajor;
using LayoutB = cute::conditional_t<LORAXS_TRANSPOSED, RowMajor, cutlass::layout::ColumnMajor>;
constexpr int kAlignment = 16 / sizeof(Type);

// Without C, an output that y is added to: it would take a descriptor, 1,100 instructions beside 1,500, and 16 KB (128 x 256)
// or 8 KB of shared memory, but none of the 4 or 6 stages.
using Epilogue = typename epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
    epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, kAlignment, Type, RowMajor, kAlignment,
    Schedule::Epilogue,
    epilogue::fusion::LinCombPerColBias<Type, float, Type, void, float>>::CollectiveOp;
using Mainloop = TailMainloop<typename gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Type, RowMajor, kAlignment, Type, LayoutB, kAlignment, float,
    Tile, Cluster, gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    Schedule::Mainloop>::CollectiveOp>;
using Kernel = gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;

template <class Stride>
Stride stride(loraxs_matrix const& matrix) {
  if constexpr (cute::is_constant_v<1, decltype(get<0>(Stride{}))>) return Stride{_1{}, matrix.column, 0};
  else return Stride{matrix.row, _1{}, 0};
}

template <class T>
T const* data(loraxs_matrix const& matrix) { return static_cast<T const*>(matrix.data); }

// CuTe only prints what the driver says of a descriptor; one that was refused is left empty.
template <class Tma>
bool described(Tma const& tma) {
  static constexpr TmaDescriptor none{};
  return std::memcmp(tma.get_tma_descriptor(), &none, sizeof(none)) != 0;
}

}  // namespace

int LORAXS_INSTANCE(LORAXS_TYPE, LORAXS_TRANSPOSED, LORAXS_TILE)(loraxs_gemm_tail_args const& args) {
  auto const kernel = reinterpret_cast<void const*>(cutlass::device_kernel<Kernel>);
  if (cudaError_t error = allow(kernel, Kernel::SharedStorageSize)) return error;
  int const T = int(args.T), N = int(args.N), K = args.W.data ? int(args.K) : 0, r = int(args.r);
  int const both = kTileK * (ceil_div(K, kTileK) + ceil_div(r, kTileK));
  using StrideA = typename Mainloop::StrideA;
  using StrideB = typename Mainloop::StrideB;
  typename Kernel::Arguments arguments{
      gemm::GemmUniversalMode::kGemm,
      {T, N, both, 1},
      {data<Type>(args.x), stride<StrideA>(args.x), data<Type>(args.W), stride<StrideB>(args.W),
       data<Type>(args.u), stride<StrideA>(args.u), data<Type>(args.B), stride<StrideB>(args.B), K, r, args.ready},
      {{}, nullptr, {}, static_cast<Type*>(args.y.data), stride<typename Epilogue::StrideD>(args.y)},
      {}};
  arguments.epilogue.thread.bias_ptr = static_cast<Type const*>(args.bias);
  using Scheduler = decltype(arguments.scheduler);
  arguments.scheduler.max_swizzle_size = args.swizzle;
  arguments.scheduler.raster_order = static_cast<decltype(Scheduler::raster_order)>(args.raster);
  arguments.hw_info.sm_count = args.multiprocessors;
  auto params = Kernel::to_underlying_arguments(arguments, nullptr);
  auto const& loop = params.mainloop;
  if (!(described(loop.tma_load_a) && described(loop.tma_load_b) && described(loop.u) && described(loop.B) &&
        described(params.epilogue.tma_store_d))) {
    return LORAXS_NOT_DESCRIBED;
  }
  auto const threads = int(Kernel::get_block_shape().x), cluster = int(size<0>(Cluster{}));
  bool const early = args.overlap != 0;
  dim3 const grid = Kernel::get_grid_shape(params);
  LORAXS_TRACED(params.mainloop.trace = trace_launch(kTraceTail, grid.x * grid.y);)
  return start(kernel, {grid, threads, Kernel::SharedStorageSize, cluster, early, args.stream},
               &params);
}

}  // namespace loraxs
