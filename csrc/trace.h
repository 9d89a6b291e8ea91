// What each program of a kernel did, for bench/first_light.py --trace: only in a core that is built with LORAXS_TRACE=1.
//
// The records lie in memory of the host that the caller maps from a file: what was written there survives a kernel that
// is killed, and the process.  A launch takes as many as it has programs, the host notes whose they are, and one thread
// of each program writes the rest.

#pragma once

#ifndef LORAXS_TRACE
#define LORAXS_TRACED(...)
#else
#define LORAXS_TRACED(...) __VA_ARGS__

#include <stdint.h>

#include "loraxs.h"

/* Keep the records of the next launches in `count` of them at `memory`, zeros; when they are used up the first ones are
   used again. */
extern "C" LORAXS_API int loraxs_trace(void* memory, int64_t count);

namespace loraxs {

enum : uint32_t { kTraceShrink = 1, kTraceFinish = 2, kTraceDecode = 3, kTraceTail = 4 };

// Times are nanoseconds of %globaltimer, 0: not come so far.  bench/first_light.py reads this layout.
struct Record {
  uint32_t kernel, program, launch, multiprocessor;
  uint64_t start, waiting, waited, end;  // the last wait: for the launch before; decode: for its cluster
  uint64_t tiles;                        // done; shrink: steps of a warp, decode: blocks of 16 columns of a warp
};

// Records for a launch, as the device sees them; null: there is no memory for them.
Record* trace_launch(uint32_t kernel, unsigned programs);

#ifdef __CUDACC__

// In one thread of a program: begin(), then the rest; it ends with its scope.
class Trace {
 public:
  __device__ void begin(void* records, unsigned program) {
    if (records == nullptr || at != nullptr) return;
    at = static_cast<Record*>(records) + program;
    uint32_t multiprocessor;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
    at->multiprocessor = multiprocessor;
    note(&Record::start);
  }
  __device__ void waiting() { note(&Record::waiting); }
  __device__ void waited() { note(&Record::waited); }
  __device__ void tiles(uint64_t more) {
    done += more;
    if (at == nullptr) return;
    at->tiles = done;
    __threadfence_system();
  }
  __device__ ~Trace() { note(&Record::end); }

 private:
  __device__ void note(uint64_t Record::* what) {
    if (at == nullptr) return;
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    at->*what = now;
    __threadfence_system();
  }

  Record volatile* at = nullptr;
  uint64_t done = 0;
};

#endif

}  // namespace loraxs

#endif
