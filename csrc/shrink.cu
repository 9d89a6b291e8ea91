#include "loraxs.h"
extern "C" int loraxs_shrink(const loraxs_shrink_args*) { return LORAXS_NO_SUCH_KERNEL; }
