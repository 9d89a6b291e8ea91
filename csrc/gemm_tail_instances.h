// What the instances of gemm_tail_instance.cu are called.

#pragma once

#include "gemm_tail_tiles.h"
#include "loraxs.h"

#define LORAXS_INSTANCE_(type, transposed, tile) gemm_tail_##type##_##transposed##_##tile
#define LORAXS_INSTANCE(type, transposed, tile) LORAXS_INSTANCE_(type, transposed, tile)

namespace loraxs {

#define LORAXS_DECLARE(number, ...)                                     \
  int LORAXS_INSTANCE(bf16, 0, number)(loraxs_gemm_tail_args const&);   \
  int LORAXS_INSTANCE(bf16, 1, number)(loraxs_gemm_tail_args const&);   \
  int LORAXS_INSTANCE(fp16, 0, number)(loraxs_gemm_tail_args const&);   \
  int LORAXS_INSTANCE(fp16, 1, number)(loraxs_gemm_tail_args const&);
LORAXS_TILES(LORAXS_DECLARE)
#undef LORAXS_DECLARE

}  // namespace loraxs
