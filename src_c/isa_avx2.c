/* isa_avx2.c: the kernels in avx2. */
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "isa_avx2.c needs -mavx2 -mfma -mf16c"
#endif
#include <stddef.h>

#include "vec_avx2.h"

#include "kernels.h"
