/* names.h: the words of the kernels, bound to the type that T names when they are used.
 *
 * kernels.h defines T as f32, then as f64, and includes the same text for each. */
#ifndef FN_NAMES_H
#define FN_NAMES_H

#include <stddef.h>

/* Where code is repeated and where it is shared is decided here, not by the compiler: what is INLINE
 * is repeated for each set of constants it is called with, what is OUTLINE stands once. */
#define INLINE static inline __attribute__((always_inline))
#define OUTLINE static __attribute__((noinline))
#define COLD __attribute__((noinline, cold))
#define NO_UNROLL _Pragma("GCC unroll 1")
#ifdef __clang__
#define UNROLL_FULLY _Pragma("clang loop unroll(full)")
#else
#define UNROLL_FULLY _Pragma("GCC unroll 16")
#endif

#define FN_PASTE_(a, b) a##_##b
#define FN_PASTE(a, b) FN_PASTE_(a, b)
#define FN_OF_T(word) FN_PASTE(word, T)

typedef float element_f32;
typedef double element_f64;
enum { LANES_f32 = 64, LANES_f64 = 32, BLOCK = 1024 };

/* What a row of T is called among the types that arrays hold. */
#define FN_OWN_TYPE (sizeof(element) == sizeof(float) ? FN_F32 : FN_F64)

/* Elements of a row, lanes of a block, vectors that hold them. */
#define element FN_OF_T(element)
#define LANES FN_OF_T(LANES)
#define VW FN_OF_T(VW)
#define VECTORS (LANES / VW)
#define VECTORS_A_SWEEP FN_OF_T(VECTORS_A_SWEEP)

#define vec FN_OF_T(vec)
#define v_zero FN_OF_T(v_zero)
#define v_set1 FN_OF_T(v_set1)
#define v_load FN_OF_T(v_load)
#define v_loadn FN_OF_T(v_loadn)
#define v_store FN_OF_T(v_store)
#define v_storen FN_OF_T(v_storen)
#define v_stream FN_OF_T(v_stream)
#define v_firstn FN_OF_T(v_firstn)
#define v_add FN_OF_T(v_add)
#define v_sub FN_OF_T(v_sub)
#define v_mul FN_OF_T(v_mul)
#define v_fma FN_OF_T(v_fma)
#define v_fold FN_OF_T(v_fold)
#define quarter FN_OF_T(quarter)
#define quarter_hsum FN_OF_T(quarter_hsum)
#define quarter_hsum8 FN_OF_T(quarter_hsum8)
#define v_halves FN_OF_T(v_halves)
#define halves_hsum8 FN_OF_T(halves_hsum8)
#define wide FN_OF_T(wide)
#define wide_zero FN_OF_T(wide_zero)
#define wide_add FN_OF_T(wide_add)
#define wide_hsum FN_OF_T(wide_hsum)
#define vd8_load_element FN_OF_T(vd8_load)
#define vd8_store_element FN_OF_T(vd8_store)

#define v_compress FN_OF_T(v_compress)
#define v_keep FN_OF_T(v_keep)
#define v_larger FN_OF_T(v_larger)
#define v_largest FN_OF_T(v_largest)
#define v_div FN_OF_T(v_div)
#define v_clip127 FN_OF_T(v_clip127)
#define ints FN_OF_T(ints)
#define v_nearest FN_OF_T(v_nearest)
#define v_near_tie FN_OF_T(v_near_tie)
#define v_store_i8 FN_OF_T(v_store_i8)

#define v_fnma FN_OF_T(v_fnma)
#define v_max FN_OF_T(v_max)
#define v_min FN_OF_T(v_min)
#define v_abs FN_OF_T(v_abs)
#define v_power_of_2 FN_OF_T(v_power_of_2)

#endif
