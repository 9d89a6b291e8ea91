// A GPU for csrc/device.cuh on a CPU: the kernels of shrink.cu and decode.cu run as they are, a fiber for each thread.
//
// What it finds out: wrong numbers, reads of memory that is not there yet or no longer (shared memory starts as NaN and is
// NaN again when its block has ended, an asynchronous copy is NaN until it is waited for), and, by running the threads in
// another order (LORAXS_EMULATOR_ORDER), results that depend on it.  A launch fails, with a RuntimeError in Python, where a
// barrier is waited for that not all threads reach, where a read or write is not aligned, and where there is no memory
// (emulator.fenced puts an operand next to a page that is none).  It counts the bank conflicts of asynchronous copies and
// of matrices that are read from shared memory.  What it cannot find out: speed, other bank conflicts, anything about TMA
// or wgmma, and a missing __syncwarp: here matrix instructions bring a warp's lanes together, and on a GPU they do not make
// what one lane has written visible to the others.

#pragma once

#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "loraxs.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define __global__
#define __device__
#define __launch_bounds__(...)

namespace loraxs::emulator {

struct Barrier {
  int expected, arrived = 0;
  long generation = 0;
  void arrive(std::function<void()> const& last = {}) {
    if (++arrived < expected) return;
    if (last) last();
    arrived = 0, ++generation;
  }
};

struct Copy {
  void* to;
  std::array<unsigned char, 16> bytes;
};

struct Warp {
  Barrier barrier{32};
  void* lanes[32];
  std::map<long, std::map<int, void const*>> copies;  // by their number: where each lane's goes
};

struct Block {
  dim3 index;
  int rank, running;
  std::vector<unsigned char> memory;
  unsigned char* shared;
  Barrier barrier;
  std::vector<Warp> warps;
  Block(dim3 index, int rank, int threads, int bytes)
      : index(index), rank(rank), running(threads), memory(bytes + 128, 0xff), barrier{threads}, warps(threads / 32) {
    shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
  }
};

struct Thread {
  dim3 index;
  Block* block;
  ucontext_t context;
  bool done = false;
  std::vector<Copy> started;
  std::deque<std::vector<Copy>> groups;
  long cluster_generation = 0, copied = 0;
  Warp& warp() { return block->warps[index.x / 32]; }
  int lane() const { return index.x % 32; }
};

inline Thread* self;
inline ucontext_t scheduler;
inline dim3 grid;
inline std::vector<std::unique_ptr<Block>>* cluster;
inline Barrier* cluster_barrier;
inline long progress, conflicts;
inline std::function<void()>* body;
inline std::vector<std::unique_ptr<unsigned char[]>> stacks;  // which the next cluster takes again

constexpr int kFailed = -100;  // a status
inline std::string failure;  // why the launch cannot go on, if it cannot

inline void yield() { swapcontext(&self->context, &scheduler); }

// From inside a thread, which does not go on, nor does any other.
inline void fail(std::string const& why) {
  failure = why;
  yield();
}

inline void wait(Barrier& barrier, long generation) {
  while (barrier.generation == generation) yield();
  ++progress;
}

inline void sync(Barrier& barrier, std::function<void()> const& last = {}) {
  long const generation = barrier.generation;
  ++progress;
  barrier.arrive(last);
  wait(barrier, generation);
}

// Every lane of the warp hands in `mine`; the last one to come does `work` on all of them.
template <class Record>
void together(Record& mine, std::function<void(Record* const*)> const& work) {
  Warp& warp = self->warp();
  warp.lanes[self->lane()] = &mine;
  sync(warp.barrier, [&] { work(reinterpret_cast<Record* const*>(warp.lanes)); });
}

// Eight lanes read or write 16 bytes each at once: on all banks, or one after another.
template <class At>
void count_conflicts(At const& at) {
  int most = 0, on[8] = {};
  for (int i = 0; i < 8; ++i) most = std::max(most, ++on[reinterpret_cast<uintptr_t>(at(i)) / 16 % 8]);
  conflicts += most - 1;
}

inline void enter() {
  (*body)();
  self->done = true;
  ++progress;
  Block& block = *self->block;
  if (--block.running == 0) std::fill(block.memory.begin(), block.memory.end(), 0xff);
  yield();
}

// The threads of a block, or of all, by warps.
using Warps = std::vector<std::vector<Thread*>>;

// A thread until it waits for others; whether it has come further.
inline bool step(Thread* thread) {
  if (thread->done || !failure.empty()) return false;
  long const before = progress;
  self = thread;
  swapcontext(&scheduler, &thread->context);
  return progress != before;
}

// All of them once, in order: so all warps stay together.
inline bool in_turn(std::vector<Warps> const& blocks) {
  bool further = false;
  for (auto const& warps : blocks) {
    for (auto const& warp : warps) {
      for (Thread* thread : warp) further |= step(thread);
    }
  }
  return further;
}

// A block as far as it comes without the others, and of it a warp as far as it comes: so they part as far as they can.
inline bool greedily(std::vector<Warps> const& blocks) {
  bool further = false;
  for (auto const& warps : blocks) {
    for (bool block = true; block; further |= block) {
      block = false;
      for (auto const& warp : warps) {
        for (bool any = true; any; block |= any) {
          any = false;
          for (Thread* thread : warp) any |= step(thread);
        }
      }
    }
  }
  return further;
}

inline void run_cluster(std::vector<std::unique_ptr<Block>>& blocks, int threads) {
  Barrier barrier{int(blocks.size()) * threads};
  cluster = &blocks, cluster_barrier = &barrier;
  std::vector<std::unique_ptr<Thread>> all;
  std::vector<Warps> order;
  for (auto& block : blocks) {
    order.emplace_back(threads / 32);
    for (int i = 0; i < threads; ++i) {
      auto thread = std::make_unique<Thread>();
      thread->index = dim3(i), thread->block = block.get();
      constexpr int size = 1 << 17;
      if (stacks.size() == all.size()) stacks.emplace_back(new unsigned char[size]);
      getcontext(&thread->context);
      thread->context.uc_stack.ss_sp = stacks[all.size()].get();
      thread->context.uc_stack.ss_size = size;
      makecontext(&thread->context, enter, 0);
      order.back()[i / 32].push_back(thread.get());
      all.push_back(std::move(thread));
    }
  }
  char const* given = std::getenv("LORAXS_EMULATOR_ORDER");  // 0: in turn; any other: greedily, shuffled by it
  int const seed = given ? std::atoi(given) : 0;
  if (seed) {
    std::mt19937 random{unsigned(seed)};
    std::shuffle(order.begin(), order.end(), random);
    for (auto& warps : order) {
      std::shuffle(warps.begin(), warps.end(), random);
      for (auto& warp : warps) std::shuffle(warp.begin(), warp.end(), random);
    }
  }
  while (seed ? greedily(order) : in_turn(order)) {
  }
  bool const left = std::any_of(all.begin(), all.end(), [](auto const& thread) { return !thread->done; });
  if (left && failure.empty()) failure = "a barrier is waited for that not all threads reach";
}

// Where a thread uses memory that is none.  (Its stack is its own: the signal's handler leaves it like any wait.)
inline void no_memory(int, siginfo_t* what, void*) {
  char text[64];
  std::snprintf(text, sizeof text, "there is no memory at %p", what->si_addr);
  fail(text);
}

}  // namespace loraxs::emulator

#define threadIdx (::loraxs::emulator::self->index)
#define blockIdx (::loraxs::emulator::self->block->index)
#define gridDim (::loraxs::emulator::grid)

inline void __syncthreads() { loraxs::emulator::sync(loraxs::emulator::self->block->barrier); }
inline void __syncwarp() { loraxs::emulator::sync(loraxs::emulator::self->warp().barrier); }

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

inline float widen(fp32 value) {
  float found;
  std::memcpy(&found, &value.bits, 4);
  return found;
}
inline float widen(bf16 value) {
  uint32_t const bits = uint32_t(value.bits) << 16;
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}
inline float widen(fp16 value) {
  _Float16 found;
  std::memcpy(&found, &value.bits, 2);
  return float(found);
}

template <class T>
uint16_t rounded(float value);
template <>
inline uint16_t rounded<bf16>(float value) {
  if (std::isnan(value)) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <>
inline uint16_t rounded<fp16>(float value) {
  auto const found = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &found, 2);
  return bits;
}

template <class T>
uint32_t pair(float low, float high) {
  return uint32_t(rounded<T>(high)) << 16 | rounded<T>(low);
}

template <class T>
void mma(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  struct Record {
    float* d;
    uint32_t a[4], b[2];
  } mine{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::together<Record>(mine, [](Record* const* lanes) {
    float A[16][16], B[16][8];
    auto const element = [](uint32_t both, int which) { return widen(T{uint16_t(both >> 16 * which)}); };
    for (int lane = 0; lane < 32; ++lane) {
      int const g = lane / 4, j = lane % 4;
      for (int e = 0; e < 2; ++e) {
        for (int i = 0; i < 4; ++i) A[g + 8 * (i % 2)][2 * j + 8 * (i / 2) + e] = element(lanes[lane]->a[i], e);
        for (int i = 0; i < 2; ++i) B[2 * j + 8 * i + e][g] = element(lanes[lane]->b[i], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int e = 0; e < 4; ++e) {
        int const row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += A[row][k] * B[k][column];
        lanes[lane]->d[e] += sum;
      }
    }
  });
}

template <bool transposed = false>
void load_matrices(uint32_t (&d)[4], void const* row) {
  struct Record {
    uint32_t* d;
    void const* row;
  } mine{d, row};
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("a row of a matrix is not aligned");
  emulator::together<Record>(mine, [](Record* const* lanes) {
    for (int q = 0; q < 4; ++q) {
      emulator::count_conflicts([&](int i) { return lanes[8 * q + i]->row; });
      for (int lane = 0; lane < 32; ++lane) {
        uint16_t both[2];
        for (int e = 0; e < 2; ++e) {
          int const g = lane / 4, two = 2 * (lane % 4) + e;
          auto const from = static_cast<uint16_t const*>(lanes[8 * q + (transposed ? two : g)]->row);
          both[e] = from[transposed ? g : two];
        }
        lanes[lane]->d[q] = uint32_t(both[1]) << 16 | both[0];
      }
    }
  });
}

inline void load_transposed(uint32_t (&d)[4], void const* row) { load_matrices<true>(d, row); }

inline void copy_async(void* to, void const* from, int bytes) {
  emulator::Copy copy{to, {}};
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes < 0 || bytes > 16) {
    emulator::fail("an asynchronous copy of fewer than 0 or more than 16 bytes, or not aligned");
  }
  if (bytes) std::memcpy(copy.bytes.data(), from, bytes);
  std::memset(to, 0xff, 16);
  emulator::self->started.push_back(copy);
  auto& all = emulator::self->warp().copies;
  auto& same = all[emulator::self->copied];
  same[emulator::self->lane()] = to;
  if (same.size() == 32) {
    for (int q = 0; q < 4; ++q) emulator::count_conflicts([&](int i) { return same[8 * q + i]; });
    all.erase(emulator::self->copied);
  }
  ++emulator::self->copied;
}
inline void copy_commit() {
  emulator::self->groups.push_back(std::move(emulator::self->started));
  emulator::self->started.clear();
}
template <int left>
void copy_wait() {
  auto& groups = emulator::self->groups;
  for (; groups.size() > left; groups.pop_front()) {
    for (auto const& copy : groups.front()) std::memcpy(copy.to, copy.bytes.data(), 16);
  }
}

inline unsigned char* shared_memory() { return emulator::self->block->shared; }

inline int cluster_size() { return int(emulator::cluster->size()); }
inline int cluster_rank() { return emulator::self->block->rank; }
inline void cluster_arrive() {
  emulator::self->cluster_generation = emulator::cluster_barrier->generation;
  ++emulator::progress;
  emulator::cluster_barrier->arrive();
}
inline void cluster_leave() { cluster_arrive(); }
inline void cluster_wait() { emulator::wait(*emulator::cluster_barrier, emulator::self->cluster_generation); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
template <class T>
T const* of_block(T const* mine, int rank) {
  auto const offset = reinterpret_cast<unsigned char const*>(mine) - emulator::self->block->shared;
  return reinterpret_cast<T const*>((*emulator::cluster)[rank]->shared + offset);
}

inline void launch_dependents() {}
inline void wait_for_launch_before() {}

struct Launch {
  dim3 grid;
  int threads, shared_bytes, cluster;
  bool early;
  loraxs_stream stream;
};

template <class Args>
int launch(void (*kernel)(Args), Launch const& how, Args args) {
  std::function<void()> body = [&] { kernel(args); };
  emulator::body = &body, emulator::grid = how.grid, emulator::failure.clear();
  struct sigaction handler = {}, before;
  handler.sa_sigaction = emulator::no_memory, handler.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &handler, &before);
  for (unsigned y = 0; y < how.grid.y; ++y) {
    for (unsigned x = 0; x < how.grid.x; x += how.cluster) {
      std::vector<std::unique_ptr<emulator::Block>> blocks;
      for (int rank = 0; rank < how.cluster; ++rank) {
        blocks.push_back(
            std::make_unique<emulator::Block>(dim3(x + rank, y), rank, how.threads, how.shared_bytes));
      }
      if (emulator::failure.empty()) emulator::run_cluster(blocks, how.threads);
    }
  }
  sigaction(SIGSEGV, &before, nullptr);
  return emulator::failure.empty() ? LORAXS_OK : emulator::kFailed;
}

}  // namespace loraxs
