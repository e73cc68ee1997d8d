/* kernels.h: what an instruction set's file includes after its vocabulary: every op for every type,
 * then the table of them. All of it is static but the table: nothing compiled with wide
 * instructions may be found by the linker for anybody else. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "isa.h"
#include "names.h"

#if defined(__FAST_MATH__)
#error "fastnorm's results are defined to the bit: build it without -ffast-math"
#endif

#define T f32
#define HAS_HALF HAS_HALF_LOADS
#include "kernels_of_type.h"
#undef T
#undef HAS_HALF
#define T f64
#define HAS_HALF 0
#include "kernels_of_type.h"
#undef T
#undef HAS_HALF

/* Of n variances. */
static void rstds(double *values, double eps, ptrdiff_t n)
{
    const vd8 padding = vd8_set1(eps), one = vd8_set1(1);
    ptrdiff_t i = 0;
    NO_UNROLL for (; VW_f64 > 1 && i + 8 <= n; i += 8)
        vd8_store_f64(values + i,
                      vd8_div(one, vd8_sqrt(vd8_add(vd8_load_f64(values + i), padding))));
    NO_UNROLL for (; i < n; i++) values[i] = 1.0 / sqrt(values[i] + eps);
}

#define FN_STRING_(word) #word
#define FN_STRING(word) FN_STRING_(word)
enum {
    narrow_cols_f32 = VW_f32 > 1 ? 4 * VW_f32 : 0,
    narrow_cols_f64 = VW_f64 > 1 ? 4 * VW_f64 : 0
};
#define OF_EACH_TYPE(word) {[FN_F32] = word##_f32, [FN_F64] = word##_f64}
/* An op's name reaches the table as it stands in FN_OPS: from here on the words are plain again. */
#undef layer_norm
#undef layer_norm_backward
#undef layer_norm_columns
#undef moments
#undef widen_add
#undef narrow
#undef load_elements
#undef store_elements
#undef row_moments
#undef row_squares
#undef plane_dots
#undef planes_dots
#undef plane_pass
#undef planes_pass
#undef columns_pass
#undef column_terms
#undef channel_sums
#define FN_KERNELS(op) .op = OF_EACH_TYPE(op),

const fn_isa FN_PASTE(fn_isa,
                      FN_ISA) = {.name = FN_STRING(FN_ISA),
                                 .narrow_cols = OF_EACH_TYPE(narrow_cols),
                                 .layer_norm_columns = OF_EACH_TYPE(layer_norm_columns),
                                 .widen_add = OF_EACH_TYPE(widen_add),
                                 .narrow = OF_EACH_TYPE(narrow),
                                 .rstds = rstds,
                                 .channels = {.load_elements = OF_EACH_TYPE(load_elements),
                                              .store_elements = OF_EACH_TYPE(store_elements),
                                              .row_moments = OF_EACH_TYPE(row_moments),
                                              .row_squares = OF_EACH_TYPE(row_squares),
                                              .plane_dots = OF_EACH_TYPE(plane_dots),
                                              .planes_dots = OF_EACH_TYPE(planes_dots),
                                              .plane_pass = OF_EACH_TYPE(plane_pass),
                                              .planes_pass = OF_EACH_TYPE(planes_pass),
                                              .columns_pass = OF_EACH_TYPE(columns_pass),
                                              .column_terms = OF_EACH_TYPE(column_terms),
                                              .channel_sums = OF_EACH_TYPE(channel_sums)},
                                 FN_OPS(FN_KERNELS)};
