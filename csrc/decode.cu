#include "loraxs.h"
extern "C" int loraxs_decode(const loraxs_decode_args*) { return LORAXS_NO_SUCH_KERNEL; }
