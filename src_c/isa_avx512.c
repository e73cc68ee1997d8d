/* isa_avx512.c: the kernels in avx512. */
#if !defined(__AVX512F__) || !defined(__AVX512DQ__) || !defined(__AVX512BW__) ||                   \
    !defined(__AVX512VL__) || !defined(__BMI2__)
#error "isa_avx512.c needs -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mbmi2"
#endif
#include <stddef.h>

#include "vec_avx512.h"

#include "kernels.h"
