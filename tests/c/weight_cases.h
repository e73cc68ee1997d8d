/* weight_cases.h: the cases of checksums.c with norms of weights: vectors in rows, side by side and with
 * axes around them, of each type, forward and backward, with a gain and as unit norm. */
#include "inputs.h"

/* Samples, outer, kinds, inner. */
static const ptrdiff_t weight_shapes[][4] = {
    {1, 1, 7, 65}, {1, 1, 3, 2049}, {5, 1, 1, 1024}, {1, 65, 7, 1}, {1, 1100, 5, 1},
    {2, 9, 70, 1}, {1, 3, 1030, 1}, {1, 1, 40, 1},   {2, 5, 4, 3},  {1, 1, 1, 70001},
};

typedef struct {
    const ptrdiff_t *shape;
    fn_dtype dtype, compute;
    int unit, given; /* no gains but an eps; the norms are given, backward */
} weight_case;

/* Lines of every kind of row in turn. */
static block new_weights(const weight_case *c, uint64_t seed, int mixed, size_t offset)
{
    const ptrdiff_t *d = c->shape, lines = d[0] * d[1], length = d[2] * d[3];
    const size_t bytes = (size_t)length * size_of(c->dtype);
    block b = new_block((size_t)lines * bytes, offset);
    for (ptrdiff_t r = 0; r < lines; r++)
        fill_row(b.data + (size_t)r * bytes, mixed && r % 3 == 0 ? MIXED : PLAIN, c->dtype,
                 seed + (uint64_t)r, length);
    return b;
}

static uint64_t run_weight(const weight_case *c, const channel_way *w)
{
    const ptrdiff_t *d = c->shape, count = d[0] * d[2], n = count * d[1] * d[3];
    block v = new_weights(c, 1, 1, w->offset), dw = new_weights(c, 1000, 0, w->offset);
    block y = new_weights(c, 1, 1, w->offset), g = new_vector(PLAIN, c->compute, 3, count, 0);
    double *norm = calloc((size_t)(2 * count), 8);
    unsigned char *refused = calloc((size_t)count, 1);
    fn_weight_norm_args a = {.samples = d[0],
                             .outer = d[1],
                             .kinds = d[2],
                             .inner = d[3],
                             .v = w->in_place ? y.data : v.data,
                             .w = y.data, /* where a vector is refused, v is left there */
                             .v_type = c->dtype,
                             .dw_type = c->dtype,
                             .w_type = c->dtype,
                             .g = c->unit ? NULL : g.data,
                             .g_type = c->compute,
                             .eps = c->unit ? 1e-12 : -1,
                             .norm = norm,
                             .along = norm + count,
                             .refused = refused,
                             .w_is_warm = 1};
    if (fn_weight_norm(&a, c->compute, 0)) abort();
    uint64_t h = hash(hash(ANY, y.data, n, c->dtype), norm, count, FN_F64);
    for (ptrdiff_t u = 0; u < count; u++) h = (h ^ refused[u]) * 31;
    memset(y.data, 0, (size_t)n * size_of(c->dtype));
    a.v = v.data;
    a.dw = dw.data;
    a.given = c->given;
    if (fn_weight_norm(&a, c->compute, 0)) abort();
    h = hash(h, y.data, n, c->dtype);
    for (ptrdiff_t u = 0; u < count; u++) {
        h = (h ^ refused[u]) * 31;
        if (!refused[u]) h = hash(h, &norm[count + u], 1, FN_F64);
    }
    const block all[] = {v, dw, y, g};
    for (int i = 0; i < 4; i++) free(all[i].memory);
    free(norm);
    free(refused);
    return h;
}

static int run_weights(const char *isa, int brief)
{
    static const char *const names[] = {"f32", "f64", "f16", "bf16"};
    int failures = 0;
    for (size_t s = 0; s < sizeof weight_shapes / sizeof *weight_shapes; s++)
        for (int dtype = FN_F32; dtype <= FN_BF16; dtype++) {
            const ptrdiff_t *d = weight_shapes[s];
            const weight_case c = {.shape = d,
                                   .dtype = (fn_dtype)dtype,
                                   .compute = dtype == FN_F64 ? FN_F64 : FN_F32,
                                   .unit = (int)s + dtype & 1,
                                   .given = (int)s & 2};
            if (d[3] == 1 && d[2] > 1 && c.dtype != c.compute)
                continue; /* as the contract has it */
            uint64_t first = 0;
            for (int k = 0; k < (brief ? 1 : CHANNEL_WAYS); k++) {
                fn_force_partition(channel_ways[k].parts);
                const uint64_t h = run_weight(&c, &channel_ways[k]);
                fn_force_partition(0);
                if (k == 0) first = h;
                if (h == first) continue;
                fprintf(stderr, "%s weights-%s-%tdx%tdx%tdx%td: other bits %s\n", isa, names[dtype],
                        d[0], d[1], d[2], d[3], channel_ways[k].name);
                failures++;
            }
            printf("%s weight_norm-%s-%tdx%tdx%tdx%td %016llx\n", isa, names[dtype], d[0], d[1],
                   d[2], d[3], (unsigned long long)first);
        }
    return failures;
}
