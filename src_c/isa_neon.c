/* isa_neon.c: the kernels in neon. */
#if !defined(__aarch64__)
#error "isa_neon.c is for aarch64"
#endif
#include <stddef.h>

#include "vec_neon.h"

#include "kernels.h"
