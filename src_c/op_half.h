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

/* Less than a round over the lanes, added to their sums. */
OUTLINE void half_sum_rest(const uint16_t *x, float *room, ptrdiff_t n, vec sum[VECTORS],
                           fn_dtype dtype)
{
    NO_UNROLL for (ptrdiff_t i = 0; i < n; i += VW)
    {
        uint16_t last[VW] = {0};
        const uint16_t *from = x + i;
        if (n - i < VW) {
            NO_UNROLL for (ptrdiff_t k = 0; k < n - i; k++) last[k] = from[k];
            from = last;
        }
        const vec v = dtype == FN_F16 ? v_load_f16(from) : v_load_bf16(from);
        v_store(room + i, v); /* a room has room for a vector more */
        sum[i / VW] = v_add(sum[i / VW], v);
    }
}

/* block_sum of a block that goes into `room` as well. Unless they are NULL, x_ahead and y_ahead are
 * fetched meanwhile. */
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
        if (x_ahead) UNROLL for (int k = 0; k < LANES; k += 32) {
            __builtin_prefetch(x_ahead + i + k, 0, 2);
            __builtin_prefetch(y_ahead + i + k, 1, 2);
        }
    }
    if (i < n) {
        vec in_memory[VECTORS]; /* a copy, so that the sums themselves stay in registers */
        UNROLL for (int k = 0; k < VECTORS; k++) in_memory[k] = sum[k];
        half_sum_rest(x + i, room + i, n - i, in_memory, dtype);
        return v_fold(in_memory, VECTORS);
    }
    return v_fold(sum, VECTORS);
}

#define half_sum FN_OF_T(half_sum)
OUTLINE quarter half_sum(const fn_layer_norm_args *a, ptrdiff_t row, int rows, float *room)
{
    const fn_rows *xs = &a->steps->x, *ys = &a->steps->outputs[0].y;
    const uint16_t *x = row_at(&a->shape, xs, row), *x_ahead = NULL, *y_ahead = NULL;
    const ptrdiff_t n = a->shape.cols;
    if (a->fetch == FN_FETCH_IN_PASSES) {
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

#ifndef HAS_BF16_INSTRUCTIONS
INLINE int v_store2_bf16_quick(uint16_t *p, vec a, vec b) { return (void)p, (void)a, (void)b, 0; }
#endif

typedef enum { TO_F16, TO_BF16, TO_BF16_QUICK } half_rounding;

OUTLINE void store_bf16(uint16_t *y, vec first, vec second) { v_store2_bf16(y, first, second); }

INLINE void store_halves(uint16_t *y, vec first, vec second, const half_rounding how)
{
    if (how == TO_F16)
        v_store2_f16(y, first, second);
    else if (how == TO_BF16)
        v_store2_bf16(y, first, second);
    else if (__builtin_expect(!v_store2_bf16_quick(y, first, second), 0))
        store_bf16(y, first, second); /* seldom, so not repeated where it is asked for */
}

/* Two vectors of each of two rows. A weight of 1 and a bias of -0 change no bit. */
INLINE void half_affine_as(const half_pass *all, ptrdiff_t n, const half_rounding how)
{
    const half_pass p = *all;
    for (ptrdiff_t i = 0; i + 2 * VW <= n; i += 2 * VW) {
        vec w[2], b[2], out[2];
        UNROLL for (int k = 0; k < 2; k++) {
            w[k] = p.w ? v_load(p.w + i + k * VW) : v_set1(1);
            b[k] = p.b ? v_load(p.b + i + k * VW) : v_set1(-0.0F);
        }
        UNROLL for (int r = 0; r < 2; r++) {
            UNROLL for (int k = 0; k < 2; k++) {
                const vec x = v_load(p.x[r] + i + k * VW);
                out[k] = v_fma(normalise(x, p.pivot[r], p.rstd[r], p.shift[r]), w[k], b[k]);
            }
            store_halves(p.y[r] + i, out[0], out[1], how);
        }
    }
}

OUTLINE void half_affine(const half_pass *p, ptrdiff_t n, fn_dtype dtype)
{
    if (dtype == FN_F16)
        half_affine_as(p, n, TO_F16);
#ifdef HAS_BF16_INSTRUCTIONS
    else if (fn_has_bf16_instructions)
        half_affine_as(p, n, TO_BF16_QUICK);
#endif
    else
        half_affine_as(p, n, TO_BF16);
}

/* What is left of a row past element i: less than two vectors. */
OUTLINE void half_rest(const half_pass *p, int r, const row_stats *stats, ptrdiff_t i, ptrdiff_t n,
                       fn_dtype dtype)
{
    float rest[2 * VW] = {0};
    uint16_t rounded[2 * VW];
    affine_strip(p->x[r] + i, rest, p->w ? p->w + i : NULL, p->b ? p->b + i : NULL, n - i, stats, 0,
                 0);
    if (dtype == FN_F16)
        v_store2_f16(rounded, v_load(rest), v_load(rest + VW));
    else
        v_store2_bf16(rounded, v_load(rest), v_load(rest + VW));
    NO_UNROLL for (ptrdiff_t k = i; k < n; k++) p->y[r][k] = rounded[k - i];
}

#define half_group FN_OF_T(half_group)
OUTLINE void half_group(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row, int rows,
                        const group_stats *stats)
{
    const fn_steps *s = a->steps;
    const fn_output *o = &s->outputs[0];
    const ptrdiff_t n = a->shape.cols, whole = n / (2 * VW) * (2 * VW);
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
        half_affine(&p, n, space->half);
        for (int r = 0; r < 2 && whole < n; r++) {
            const row_stats row_of = stats_in_group(stats, first + r);
            half_rest(&p, r, &row_of, whole, n, space->half);
        }
        fetch_share(space->ahead);
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
