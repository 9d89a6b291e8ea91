// In the place of the CUDA runtime: the real core's host code runs, each of its calls is written down as a line of JSON,
// and nothing is launched.  `recorder_take` hands the lines out; `recorder_fail` has one kind of call fail from then on.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <sstream>
#include <string>

namespace {

std::string lines, taken, failing;
cudaError_t last = cudaSuccess;

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}

template <class T>
std::string list(T const* values, unsigned count) {
  std::ostringstream text;
  for (unsigned i = 0; i < count; ++i) text << (i ? ", " : "[") << values[i];
  return text.str() + "]";
}

cudaError_t answer(const char* call) {
  if (failing != call) return cudaSuccess;
  return last = cudaErrorInvalidValue;
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (failing == "encode") return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 1, sizeof(*map));
  std::ostringstream line;
  line << "{\"call\": \"encode\", \"address\": " << reinterpret_cast<uintptr_t>(address) << ", \"sizes\": "
       << list(sizes, rank) << ", \"strides\": " << list(strides, rank - 1) << ", \"box\": " << list(box, rank) << "}\n";
  lines += line.str();
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) const char* recorder_take() {
  taken.swap(lines);
  lines.clear();
  return taken.c_str();
}
__attribute__((visibility("default"))) void recorder_fail(const char* call) { failing = call; }
__attribute__((visibility("default"))) int recorder_last() { return last; }

// What nvcc's own code calls, and what stubs of kernels would: those are never called by name.
void __cudaInitModule() {}
void __cudaGetKernel() {}
void __cudaLaunchKernel() {}
void __cudaPopCallConfiguration() {}
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return answer("attribute"); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 132, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = failing == "driver" ? 12080 : 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetLastError() {
  cudaError_t const error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "CUDA's own words" : "other words of CUDA's";
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *entry = std::strcmp(name, "cuTensorMapEncodeTiled") ? nullptr : reinterpret_cast<void*>(encode);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel, void**) {
  int cluster = 1, early = 0;
  for (unsigned i = 0; i < how->numAttrs; ++i) {
    auto const& each = how->attrs[i];
    if (each.id == cudaLaunchAttributeClusterDimension) cluster = each.val.clusterDim.x;
    if (each.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      early = each.val.programmaticStreamSerializationAllowed;
    }
  }
  unsigned const grid[] = {how->gridDim.x, how->gridDim.y, how->gridDim.z};
  std::ostringstream line;
  line << "{\"call\": \"launch\", \"kernel\": \"" << names()[kernel] << "\", \"grid\": " << list(grid, 3)
       << ", \"threads\": " << how->blockDim.x << ", \"shared\": " << how->dynamicSmemBytes
       << ", \"cluster\": " << cluster << ", \"early\": " << (early ? "true" : "false") << "}\n";
  lines += line.str();
  return answer("launch");
}

}  // extern "C"
