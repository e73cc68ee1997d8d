/* op_half.h: groups of rows of a half type, in and out, with nothing else to do than normalise them.
 * They are converted as they are summed, and rounded as they come out of the affine pass, which
 * saves a pass at either end. The bits are those of the general way (steps.h). T is float here. */
#if HAS_HALF

/* The type of such a call's rows; 0, which is none of them, where it is of another kind. */
#define half_call FN_OF_T(half_call)
static fn_dtype half_call(const fn_layer_norm_args *a)
{
    const fn_steps *s = a->steps;
    if (s->output_count != 1 || s->mask.data || s->lengths || s->starts || s->activation ||
        s->round_before_weight || has_sum(s))
        return 0;
    const fn_rows *x = &s->x, *y = &s->outputs[0].y;
    const fn_rows *w = &s->outputs[0].weight, *b = &s->outputs[0].bias;
    const int halves = (x->dtype == FN_F16 || x->dtype == FN_BF16) && y->dtype == x->dtype;
    const int common = !w->stride && !w->outer_strides && !b->stride && !b->outer_strides;
    return halves && common && !x->col_strides && !y->col_strides ? x->dtype : 0;
}

INLINE vec load_half(const uint16_t *p, const fn_dtype dtype)
{
    return dtype == FN_F16 ? v_load_f16(p) : v_load_bf16(p);
}

/* Past the end there is +0. */
INLINE vec load_some_halves(const uint16_t *p, ptrdiff_t n, const fn_dtype dtype)
{
    uint16_t room[VW] = {0};
    if (n >= VW) return load_half(p, dtype);
    NO_UNROLL for (ptrdiff_t k = 0; k < n; k++) room[k] = p[k];
    return load_half(room, dtype);
}

/* block_sum of a block that goes into `room` as well. x_ahead and y_ahead are fetched meanwhile. */
INLINE quarter half_sum_as(const uint16_t *x, float *room, ptrdiff_t n, const uint16_t *x_ahead,
                           const uint16_t *y_ahead, const fn_dtype dtype)
{
    vec sum[VECTORS];
    UNROLL for (int k = 0; k < VECTORS; k++) sum[k] = v_zero();
    ptrdiff_t i = 0;
    NO_UNROLL for (; i + LANES <= n; i += LANES)
    {
        UNROLL for (int k = 0; k < VECTORS; k++) {
            const vec v = load_half(x + i + k * VW, dtype);
            v_store(room + i + k * VW, v);
            sum[k] = v_add(sum[k], v);
        }
        UNROLL for (int k = 0; k < LANES; k += 32) {
            __builtin_prefetch(x_ahead + i + k, 0, 3);
            __builtin_prefetch(y_ahead + i + k, 1, 3);
        }
    }
    UNROLL for (int k = 0; k < VECTORS; k++) {
        const ptrdiff_t at = i + k * VW;
        if (at >= n) break;
        const vec v = load_some_halves(x + at, n - at, dtype);
        v_store(room + at, v); /* a room has room for a vector more */
        sum[k] = v_add(sum[k], v);
    }
    return v_fold(sum, VECTORS);
}

#define half_sum FN_OF_T(half_sum)
OUTLINE quarter half_sum(const fn_layer_norm_args *a, ptrdiff_t row, int rows, float *room)
{
    const fn_rows *xs = &a->steps->x, *ys = &a->steps->outputs[0].y;
    const uint16_t *x = row_at(&a->shape, xs, row), *x_ahead = x, *y_ahead = x;
    const ptrdiff_t n = a->shape.cols;
    if (a->fetch) {
        x_ahead = x + 2 * rows * (xs->stride / 2);
        y_ahead = (const uint16_t *)ys->data + (row + rows) * (ys->stride / 2);
    }
    if (xs->dtype == FN_F16) return half_sum_as(x, room, n, x_ahead, y_ahead, FN_F16);
    return half_sum_as(x, room, n, x_ahead, y_ahead, FN_BF16);
}

typedef struct {
    const float *x[2];
    uint16_t *y[2];
    vec pivot[2], rstd[2], shift[2];
    const float *w, *b;
} half_pass;

INLINE void store_halves(uint16_t *y, vec first, vec second, ptrdiff_t left, const fn_dtype dtype)
{
    uint16_t room[2 * VW];
    uint16_t *to = left >= 2 * VW ? y : room;
    if (dtype == FN_F16)
        v_store2_f16(to, first, second);
    else
        v_store2_bf16(to, first, second);
    if (to == room)
        NO_UNROLL for (ptrdiff_t k = 0; k < left; k++) y[k] = room[k];
}

/* Two vectors of each of two rows. A weight of 1 and a bias of -0 change no bit. Of parameters what
 * lies past the end is not read; of rows it is there, and comes to nothing. */
INLINE void half_vectors(const half_pass *p, ptrdiff_t i, ptrdiff_t left, const fn_dtype dtype)
{
    vec w[2], b[2], out[2];
    UNROLL for (int k = 0; k < 2; k++) {
        const ptrdiff_t rest = left - k * VW > 0 ? left - k * VW : 0;
        w[k] = p->w ? load_some(p->w + i + k * VW, rest) : v_set1(1);
        b[k] = p->b ? load_some(p->b + i + k * VW, rest) : v_set1(-0.0F);
    }
    UNROLL for (int r = 0; r < 2; r++) {
        UNROLL for (int k = 0; k < 2; k++) {
            const vec x = v_load(p->x[r] + i + k * VW);
            out[k] = v_fma(normalise(x, p->pivot[r], p->rstd[r], p->shift[r]), w[k], b[k]);
        }
        store_halves(p->y[r] + i, out[0], out[1], left, dtype);
    }
}

INLINE void half_affine_as(const half_pass *all, ptrdiff_t n, const fn_dtype dtype)
{
    const half_pass p = *all;
    ptrdiff_t i = 0;
    for (; i + 2 * VW <= n; i += 2 * VW) half_vectors(&p, i, 2 * VW, dtype);
    if (i < n) half_vectors(&p, i, n - i, dtype);
}

OUTLINE void half_affine(const half_pass *p, ptrdiff_t n, fn_dtype dtype)
{
    if (dtype == FN_F16)
        half_affine_as(p, n, FN_F16);
    else
        half_affine_as(p, n, FN_BF16);
}

#define half_group FN_OF_T(half_group)
OUTLINE void half_group(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row, int rows,
                        const group_stats *stats)
{
    const fn_steps *s = a->steps;
    const fn_output *o = &s->outputs[0];
    half_pass p = {.w = parameter(&a->shape, s, space, &o->weight, 0, s->offset, row),
                   .b = parameter(&a->shape, s, space, &o->bias, 1, 0, row)};
    for (int first = 0; first < rows; first += 2) {
        for (int r = 0; r < 2; r++) {
            p.x[r] = stats->x[first + r];
            p.y[r] = row_at(&a->shape, &o->y, row + first + r);
            p.pivot[r] = v_set1(stats->pivot[first + r]);
            p.rstd[r] = v_set1(stats->rstd[first + r]);
            p.shift[r] = v_set1(stats->shift[first + r]);
        }
        half_affine(&p, a->shape.cols, space->half);
    }
}
#else
#define half_call FN_OF_T(half_call)
INLINE fn_dtype half_call(const fn_layer_norm_args *a) { return (void)a, (fn_dtype)0; }
#define half_sum FN_OF_T(half_sum)
INLINE quarter half_sum(const fn_layer_norm_args *a, ptrdiff_t row, int rows, element *room)
{
    (void)a, (void)row, (void)rows;
    return v_fold((vec *)room, 1);
}
#define half_group FN_OF_T(half_group)
INLINE void half_group(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row, int rows,
                       const group_stats *stats)
{
    (void)a, (void)space, (void)row, (void)rows, (void)stats;
}
#endif
