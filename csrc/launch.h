// Starting a kernel from the host; any error is returned, and none is left for whoever asks CUDA next.

#pragma once

#include <cuda_runtime.h>

#include "loraxs.h"

namespace loraxs {

struct Launch {
  dim3 grid;
  int threads, shared_bytes, cluster;
  bool early;  // start before the launch before has ended
  loraxs_stream stream;
};

// Let the kernel have this much shared memory.  It also makes this thread's context, if it has none.
inline cudaError_t allow(void const* kernel, int shared_bytes) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

inline cudaError_t start(void const* kernel, Launch const& how, void* args) {
  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (how.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = how.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (how.early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  void* all[] = {args};
  cudaError_t error = cudaLaunchKernelExC(&config, kernel, all);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

}  // namespace loraxs
