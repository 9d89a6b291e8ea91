// The shrink for Hopper: z = x A^T, u = s z R^T, gram = s z^T other, by few programs with copies by TMA and wgmma.
//
// A program takes 128 rows at a time and keeps on taking, in order.  One thread starts the copies, 64 columns of x and of
// A at a time; each of two warpgroups multiplies 64 rows, and while they make u and the gram two others take the next
// unit.  So four multiprocessors can be enough to make u while the GEMM runs on all others: `ready` tells the GEMM which
// rows of u are there, and it waits for those of a tile only when it comes to the tile's tail.  The rank is always 64
// wide; what lies past r is not read from memory, only computed.
//
// Counted for K = 4096, r = 64: 128 rows are 1.05 MB of x and 0.52 MB of A, through one multiprocessor's port to L2 (64
// bytes a cycle, 112 GB/s at 1.75 GHz) in 14 us at least, and 16,384 cycles, 9.4 us, of its tensor cores.  The GEMM with
// N = 4096 needs 128 rows each 25 us from each of four programs.  With T = 8192 on 64 programs: 67 MB of x from memory
// at 3.0 TB/s, 22 us; 34 MB of A from L2.

#include <cuda.h>

#include <algorithm>
#include <type_traits>

#include "shrink_finish.cuh"
#include "trace.h"

namespace loraxs {
namespace {

constexpr int kRank = 64, kStep = 64, kGroups = 2, kUnit = kGroups * kRows, kThreads = 128 * (2 * kGroups + 1);
constexpr int kSpan = 128;  // bytes of a row in shared memory: what TMA and wgmma swizzle
constexpr int x_bytes = kUnit * kSpan, stage_bytes = x_bytes + kStep * kSpan;
constexpr int rows_bytes = kGroups * Finish<kRank>::rows_bytes, R_bytes = Finish<kRank>::R_bytes;
constexpr int kMostStages = 8, barriers_bytes = 2 * kMostStages * 8;
constexpr int kMost = 227 * 1024;  // of shared memory a program may have

struct Problem {
  CUtensorMap x, A;
  loraxs_shrink_args args;
  int stages;
  LORAXS_TRACED(void* trace = nullptr;)
};

__device__ uint32_t address(void const* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// A barrier of TMA: `full` once the bytes of a stage are there, `empty` once the eight warps have read it.
__device__ void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count) : "memory");
}
__device__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(address(barrier)) : "memory");
}
__device__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
                   address(barrier)), "r"(bytes)
               : "memory");
}
__device__ void barrier_wait(uint64_t* barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra out;\nbra again;\nout:\n}" ::"r"(
          address(barrier)), "r"(phase)
      : "memory");
}

// Copy a box of the matrix that `map` describes, from (column, row) on.
__device__ void copy_box(void* to, CUtensorMap const* map, uint64_t* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          address(to)), "l"(map), "r"(address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// What wgmma is told of 64 rows of 128 bytes, swizzled; groups of eight rows follow each other.
__device__ uint64_t described(void const* shared) {
  return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 | (address(shared) & 0x3FFFF) >> 4;
}

// z (+)= x A^T for 64 rows, 64 ranks and 16 columns.
#define LORAXS_WGMMA(type, transposed)                                                                            \
  asm volatile(                                                                                                   \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"                                                            \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                 \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
      "%29,%30,%31}, %32, %33, add, 1, 1, 0, " transposed ";\n}"                                                  \
      : "+f"(z[0][0]), "+f"(z[0][1]), "+f"(z[0][2]), "+f"(z[0][3]), "+f"(z[1][0]), "+f"(z[1][1]), "+f"(z[1][2]),  \
        "+f"(z[1][3]), "+f"(z[2][0]), "+f"(z[2][1]), "+f"(z[2][2]), "+f"(z[2][3]), "+f"(z[3][0]), "+f"(z[3][1]),  \
        "+f"(z[3][2]), "+f"(z[3][3]), "+f"(z[4][0]), "+f"(z[4][1]), "+f"(z[4][2]), "+f"(z[4][3]), "+f"(z[5][0]),  \
        "+f"(z[5][1]), "+f"(z[5][2]), "+f"(z[5][3]), "+f"(z[6][0]), "+f"(z[6][1]), "+f"(z[6][2]), "+f"(z[6][3]),  \
        "+f"(z[7][0]), "+f"(z[7][1]), "+f"(z[7][2]), "+f"(z[7][3])                                                \
      : "l"(x), "l"(A), "r"(add))

template <class T, bool TRANSPOSED>
__device__ void multiply(Fragments<kRank>& z, uint64_t x, uint64_t A, int add) {
  if constexpr (std::is_same_v<T, bf16>) {
    if constexpr (TRANSPOSED) LORAXS_WGMMA("bf16", "1");
    else LORAXS_WGMMA("bf16", "0");
  } else {
    if constexpr (TRANSPOSED) LORAXS_WGMMA("f16", "1");
    else LORAXS_WGMMA("f16", "0");
  }
}

// Barriers of threads: 0 is __syncthreads'; one for each group; one for all; and for each group its turns, which its
// partner passes on: to multiply (a barrier's phase is told by its parity, so nobody may wait for one but the next) and
// to finish (in shared memory that the two share).
enum Turn { kMultiply = 6, kFinish = 10 };
__device__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
__device__ void groups_sync() { asm volatile("bar.sync 5, 512;" ::: "memory"); }
__device__ void turn_wait(Turn turn, int group) { asm volatile("bar.sync %0, 256;" ::"r"(turn + group) : "memory"); }
__device__ void turn_pass(Turn turn, int group) {
  asm volatile("bar.arrive %0, 256;" ::"r"(turn + (group ^ kGroups)) : "memory");
}

template <class T, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, 1) shrink_tma_kernel(__grid_constant__ Problem const problem) {
  auto const& p = problem.args;
  int64_t const units = up(p.T, kUnit);
  int const steps = int(up(p.K, kStep)), stages = problem.stages;
  auto const memory = shared_memory() + (1024 - address(shared_memory()) % 1024) % 1024;
  auto const R = reinterpret_cast<uint16_t*>(memory + stages * stage_bytes);
  auto const full = reinterpret_cast<uint64_t*>(memory + stages * stage_bytes + R_bytes), empty = full + kMostStages;
  auto const rows = reinterpret_cast<uint16_t*>(empty + kMostStages);
  int const group = int(threadIdx.x) / 128 - 1, thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      barrier_init(full + stage, 1);
      barrier_init(empty + stage, 4 * kGroups);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (group < 0 && thread / 32 == 1 && p.ready) {  // before anybody counts: what is there is of an earlier call
    for (int64_t unit = blockIdx.x + int64_t(gridDim.x) * (thread % 32); unit < units; unit += gridDim.x * 32) {
      p.ready[unit] = 0;
    }
  }
  __syncthreads();
  int stage = 0, phase = 0;
  if (group < 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (thread / 32 == 1) {
      __threadfence();  // the GEMM must not find the earlier call's either
      __syncwarp();
      launch_dependents();
    }
    if (thread != 0) return;
    for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
      for (int step = 0; step < steps; ++step) {
        barrier_wait(empty + stage, phase ^ 1);
        barrier_expect(full + stage, stage_bytes);
        auto const to = memory + stage * stage_bytes;
        int const k = step * kStep;
        copy_box(to, &problem.x, full + stage, k, int(unit * kUnit));
        copy_box(to + x_bytes, &problem.A, full + stage, TRANSPOSED ? 0 : k, TRANSPOSED ? k : 0);
        if (++stage == stages) stage = 0, phase ^= 1;
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
  LORAXS_TRACED(Trace trace; if (thread == 0 && group == 0) trace.begin(problem.trace, blockIdx.x);)
  load_R<kRank>(p, R, group * 128 + thread, 128 * 2 * kGroups);
  groups_sync();
  int const half = group % kGroups, first = group / kGroups;  // this group takes every other unit of the program
  auto const skip = [&](int by) {
    stage += by;
    phase ^= (stage / stages) & 1;
    stage %= stages;
  };
  skip(first * steps);
  for (int64_t unit = blockIdx.x + int64_t(first) * gridDim.x; unit < units; unit += 2 * gridDim.x, skip(steps)) {
    bool const wait = unit != blockIdx.x, pass = unit + gridDim.x < units;
    if (wait) turn_wait(kMultiply, group);
    Fragments<kRank> z;
    for (int step = 0; step < steps; ++step) {
      barrier_wait(full + stage, phase);
      auto const from = memory + stage * stage_bytes;
      uint64_t const x = described(from + half * kRows * kSpan), A = described(from + x_bytes);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int i = 0; i < kStep / 16; ++i) {  // 16 columns further: 32 bytes along a row, or 16 rows
        multiply<T, TRANSPOSED>(z, x + 2 * i, A + (TRANSPOSED ? 16 * kSpan / 16 : 2) * i, step + i);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (thread % 32 == 0) barrier_arrive(empty + stage);
      if (++stage == stages) stage = 0, phase ^= 1;
    }
    if (pass) turn_pass(kMultiply, group);
    if (wait && p.other) turn_wait(kFinish, group);
    int64_t const block = unit * kGroups + half;
    auto const told = [&] {
      if (!p.ready) return;
      asm volatile("fence.proxy.async;" ::: "memory");  // u is written by threads and read by TMA
      group_sync(group);
      if (thread == 0) {
        __threadfence();
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p.ready + unit) : "memory");
      }
    };
    if (block * kRows < p.T) {
      auto const shared = rows + half * Finish<kRank>::rows_bytes / 2;
      finish<T, kRank>(p, z, block, R, shared, thread, [=] { group_sync(group); }, told);
    } else {
      told();
    }
    if (pass && p.other) turn_pass(kFinish, group);
    LORAXS_TRACED(trace.tiles(1);)
  }
}

// A matrix for TMA, its boxes 128 bytes wide and `rows` high; where it ends there are zeros.
template <class T>
bool describe(CUtensorMap& map, loraxs_matrix const& m, int64_t columns, int64_t rows, int64_t pitch, int box_rows) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  auto const error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
  auto const error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) (void)cudaGetLastError();
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || !entry) return false;
  cuuint64_t const sizes[] = {cuuint64_t(columns), cuuint64_t(rows)}, pitches[] = {cuuint64_t(pitch) * sizeof(T)};
  cuuint32_t const box[] = {kSpan / sizeof(T), cuuint32_t(box_rows)}, apart[] = {1, 1};
  auto const type = std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
             &map, type, 2, m.data, sizes, pitches, box, apart, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) ==
         CUDA_SUCCESS;
}

template <class T, bool TRANSPOSED>
int run(loraxs_shrink_args const& p) {
  Problem problem{{}, {}, p, 0};
  int const besides = 1024 + R_bytes + barriers_bytes + (p.other ? rows_bytes : 0);
  problem.stages = std::min(kMostStages, (kMost - besides) / stage_bytes);
  int const bytes = besides + problem.stages * stage_bytes, programs = int(std::min<int64_t>(p.programs, up(p.T, kUnit)));
  // In pairs, as the GEMM's programs are: a pair is on multiprocessors that belong together, and leaves whole pairs.
  int const cluster = p.ready && programs % 2 == 0 ? 2 : 1;
  auto const kernel = reinterpret_cast<void const*>(shrink_tma_kernel<T, TRANSPOSED>);
  if (cudaError_t error = allow(kernel, bytes)) return error;
  bool const known = describe<T>(problem.x, p.x, p.K, p.T, p.x.row, kUnit) &&
                     (TRANSPOSED ? describe<T>(problem.A, p.A, p.r, p.K, p.A.column, kStep)
                                 : describe<T>(problem.A, p.A, p.K, p.r, p.A.row, kRank));
  if (!known) return LORAXS_NOT_DESCRIBED;
  LORAXS_TRACED(problem.trace = trace_launch(kTraceShrink, unsigned(programs));)
  return start(kernel, {dim3(unsigned(programs)), kThreads, bytes, cluster, false, p.stream}, &problem);
}

}  // namespace

int shrink_tma(loraxs_shrink_args const& p) {
  if (p.r > kRank || p.type > LORAXS_FP16) return LORAXS_NO_SUCH_KERNEL;
  if (p.type == LORAXS_BF16) return p.transposed ? run<bf16, true>(p) : run<bf16, false>(p);
  return p.transposed ? run<fp16, true>(p) : run<fp16, false>(p);
}

}  // namespace loraxs
