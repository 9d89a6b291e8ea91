// What of the interface is not a kernel: which instance of the GEMM, and what a status means.

#include <cuda_runtime.h>

#include "gemm_tail_instances.h"
#include "loraxs.h"
#include "trace.h"

#ifndef LORAXS_ARCHITECTURES
#error "CMakeLists.txt says for which architectures this is built"
#endif

extern "C" int loraxs_gemm_tail(const loraxs_gemm_tail_args* args) {
#ifdef LORAXS_HOPPER
  using Instance = int (*)(loraxs_gemm_tail_args const&);
#define LORAXS_ROW(number, ...)                                                                \
  {{loraxs::LORAXS_INSTANCE(bf16, 0, number), loraxs::LORAXS_INSTANCE(bf16, 1, number)},       \
   {loraxs::LORAXS_INSTANCE(fp16, 0, number), loraxs::LORAXS_INSTANCE(fp16, 1, number)}},
  static constexpr Instance instances[][2][2] = {LORAXS_TILES(LORAXS_ROW)};
#undef LORAXS_ROW
  constexpr int tiles = sizeof(instances) / sizeof(instances[0]);
  if (args->tile < 0 || args->tile >= tiles || args->type < 0 || args->type > LORAXS_FP16) return LORAXS_NO_SUCH_KERNEL;
  return instances[args->tile][args->type][args->transposed != 0](*args);
#else
  (void)args;
  return LORAXS_NOT_BUILT_FOR;
#endif
}

#ifdef LORAXS_HOPPER
namespace loraxs {
int shrink_tma(loraxs_shrink_args const& args);  // shrink_tma.cu
}
#endif

extern "C" int loraxs_shrink_tma(const loraxs_shrink_args* args) {
#ifdef LORAXS_HOPPER
  return loraxs::shrink_tma(*args);
#else
  (void)args;
  return LORAXS_NOT_BUILT_FOR;
#endif
}

#ifdef LORAXS_TRACE
namespace loraxs {
namespace {
Record *on_host, *on_device;
int64_t records, used;
uint32_t launches;
}  // namespace

Record* trace_launch(uint32_t kernel, unsigned programs) {
  if (programs > records) return nullptr;
  if (used + programs > records) used = 0;
  int64_t const first = used;
  ++launches;
  for (uint32_t i = 0; i < programs; ++i) on_host[used++] = {kernel, i, launches};
  return on_device + first;
}
}  // namespace loraxs

extern "C" int loraxs_trace(void* memory, int64_t count) {
  using namespace loraxs;
  if (int status = cudaHostRegister(memory, count * sizeof(Record), cudaHostRegisterMapped)) return status;
  if (int status = cudaHostGetDevicePointer(reinterpret_cast<void**>(&on_device), memory, 0)) return status;
  on_host = static_cast<Record*>(memory), records = count, used = 0;
  return LORAXS_OK;
}
#endif

extern "C" int loraxs_ready(void) {
  int driver = 0, runtime = 0;
  if (int status = cudaDriverGetVersion(&driver)) return status;
  if (int status = cudaRuntimeGetVersion(&runtime)) return status;
  return driver / 1000 < runtime / 1000 ? int(cudaErrorInsufficientDriver) : int(LORAXS_OK);
}

extern "C" const char* loraxs_message(int status) {
  switch (status) {
    case LORAXS_NO_SUCH_KERNEL: return "there is no kernel for this type, tile or rank";
    case LORAXS_NOT_DESCRIBED: return "the driver refuses to describe an operand to the copy engine (TMA)";
    case LORAXS_NOT_BUILT_FOR: return "the CUDA core was built without sm_90a, which this kernel needs";
    default: return cudaGetErrorString(static_cast<cudaError_t>(status));
  }
}

extern "C" const char* loraxs_architectures(void) { return LORAXS_ARCHITECTURES; }
