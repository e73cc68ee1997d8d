/* channel_cases.h: the cases of checksums.c with channels: group, instance and batch norm over planes
 * and over rows of channels, forward and backward, of each type; and moments of both. */
#include "inputs.h"

/* Samples, channels, elements of a plane, channels of a group. */
static const ptrdiff_t channel_shapes[][4] = {
    {1, 4, 1, 2},    {3, 6, 7, 3},   {2, 4, 64, 2},  {2, 6, 257, 3},  {1, 34, 65, 17},
    {2, 2, 2049, 1}, {130, 5, 3, 5}, {3, 22, 9, 11}, {2, 12, 250, 6},
};

/* LAST and the two after it are the first three over rows of channels. */
typedef enum {
    GROUP,
    BATCH,
    GIVEN,
    LAST,
    LAST_BATCH,
    LAST_GIVEN,
    MOMENTS,
    CHANNEL_KINDS
} channel_kind;
static const char *const channel_kinds[] = {"group",      "batch",      "given",  "last",
                                            "last_batch", "last_given", "moments"};

/* Differences that must not matter. */
typedef struct {
    const char *name;
    size_t offset;
    int parts, in_place, cold;
} channel_way;

static const channel_way channel_ways[] = {
    {"as it is", 0, 0, 0, 0}, {"misaligned", 24, 0, 0, 0},        {"in 3 parts", 0, 3, 0, 0},
    {"in place", 8, 2, 1, 0}, {"not past the cache", 0, 0, 0, 1},
};

enum { CHANNEL_WAYS = sizeof channel_ways / sizeof *channel_ways };

typedef struct {
    channel_kind kind;
    ptrdiff_t samples, channels, size, group;
    fn_dtype dtype, compute;
    int parameters; /* bits: a weight, a bias, an activation */
} channel_case;

static ptrdiff_t elements_of(const channel_case *c) { return c->samples * c->channels * c->size; }

static int is_given(const channel_case *c) { return c->kind == GIVEN || c->kind == LAST_GIVEN; }
static int lies_last(const channel_case *c) { return c->kind >= LAST && c->kind <= LAST_GIVEN; }

/* Planes side by side. */
static void to_rows(const channel_case *c, char *data)
{
    const size_t size = size_of(c->dtype), sample = (size_t)(c->channels * c->size) * size;
    char *planes = malloc(sample);
    for (ptrdiff_t s = 0; s < c->samples; s++, data += sample) {
        memcpy(planes, data, sample);
        for (ptrdiff_t j = 0; j < c->channels; j++)
            for (ptrdiff_t i = 0; i < c->size; i++)
                memcpy(data + (size_t)(i * c->channels + j) * size,
                       planes + (size_t)(j * c->size + i) * size, size);
    }
    free(planes);
}

/* Planes are of every kind of row in turn; those that are out of range are refused. */
static block new_planes(const channel_case *c, uint64_t seed, int mixed, size_t offset)
{
    const size_t bytes = (size_t)c->size * size_of(c->dtype);
    block b = new_block((size_t)elements_of(c) * size_of(c->dtype), offset);
    for (ptrdiff_t p = 0; p < c->samples * c->channels; p++)
        fill_row(b.data + (size_t)p * bytes, mixed && p % 3 == 0 ? MIXED : PLAIN, c->dtype,
                 seed + (uint64_t)p, c->size);
    if (lies_last(c)) to_rows(c, b.data);
    return b;
}

static fn_channels layout_of(const channel_case *c)
{
    const ptrdiff_t groups = c->channels / c->group, size = c->size, channels = c->channels;
    const ptrdiff_t samples = c->samples, all = samples * size;
    switch (c->kind) {
    case GROUP:
        return (fn_channels){samples * groups, c->group * size, 1, 0, c->group, size, groups, 1};
    case GIVEN: return (fn_channels){samples * channels, size, 1, 0, 1, size, channels, 1};
    case LAST: return (fn_channels){samples * groups, 0, 1, 0, c->group, size, groups, channels};
    case LAST_BATCH: return (fn_channels){channels, 0, 1, 0, 1, all, channels, channels};
    case LAST_GIVEN: return (fn_channels){samples * channels, 0, 1, 0, 1, size, channels, channels};
    default: return (fn_channels){channels, size, samples, channels * size, 1, size, channels, 1};
    }
}

/* Unit u of y, wherever it lies. */
static uint64_t hash_unit(uint64_t h, const fn_channels *l, const char *y, ptrdiff_t u,
                          fn_dtype dtype)
{
    const size_t size = size_of(dtype);
    if (l->step == 1) {
        for (ptrdiff_t r = 0; r < l->rows; r++)
            h = hash(h, y + (size_t)(u * l->stride + r * l->row_stride) * size,
                     l->planes * l->plane, dtype);
        return h;
    }
    const ptrdiff_t groups = l->step / l->planes;
    y += (size_t)(u / groups * l->plane * l->step + u % groups * l->planes) * size;
    for (ptrdiff_t i = 0; i < l->plane; i++)
        h = hash(h, y + (size_t)(i * l->step) * size, l->planes, dtype);
    return h;
}

typedef struct {
    double *mean, *variance, *rstd, *sums;
    unsigned char *refused;
} channel_numbers;

static channel_numbers new_numbers(const channel_case *c)
{
    const size_t n = (size_t)(c->samples * c->channels);
    channel_numbers k = {calloc(n, 8), calloc(n, 8), calloc(n, 8), calloc(6 * n, 8), calloc(n, 1)};
    for (size_t i = 0; is_given(c) && i < n; i++) {
        k.mean[i] = 0.5 + (double)i;
        k.rstd[i] = 0.25 + 0.125 * (double)i;
    }
    return k;
}

static void free_numbers(const channel_numbers *k)
{
    free(k->mean);
    free(k->variance);
    free(k->rstd);
    free(k->sums);
    free(k->refused);
}

static int channels_streamed; /* calls so far that wrote past the cache */

static uint64_t run_units(const channel_case *c, const channel_way *w)
{
    const ptrdiff_t n = elements_of(c), units = layout_of(c).units;
    block x = new_planes(c, 1, 1, w->offset), dy = new_planes(c, 1000, 0, w->offset);
    block y = new_planes(c, 5, 0, w->offset);
    block weight = new_vector(PLAIN, c->compute, 3, c->channels, 0);
    block bias = new_vector(PLAIN, c->compute, 4, c->channels, 0);
    channel_numbers k = new_numbers(c);
    if (w->in_place) memcpy(y.data, x.data, (size_t)n * size_of(c->dtype));
    fn_channel_norm_args a = {.layout = layout_of(c),
                              .x = w->in_place ? y.data : x.data,
                              .y = y.data,
                              .x_type = c->dtype,
                              .y_type = c->dtype,
                              .weight = c->parameters & 1 ? weight.data : NULL,
                              .bias = c->parameters & 2 ? bias.data : NULL,
                              .mean = k.mean,
                              .variance = k.variance,
                              .rstd = k.rstd,
                              .refused = k.refused,
                              .eps = 1e-5,
                              .given = is_given(c),
                              .activation = c->parameters & 4 ? FN_SILU : FN_NO_ACTIVATION,
                              .y_is_warm = !w->cold};
    channels_streamed += fn_plan_channel_norm(&a, c->compute, 0).stream;
    if (fn_channel_norm(&a, c->compute, 0)) abort();
    uint64_t h = hash(hash(ANY, k.mean, units, FN_F64), k.rstd, units, FN_F64);
    for (ptrdiff_t u = 0; u < units; u++) h = (h ^ k.refused[u]) * 31;
    for (ptrdiff_t u = 0; u < units; u++) /* what is refused is left as it was */
        if (!k.refused[u]) h = hash_unit(h, &a.layout, y.data, u, c->dtype);
    block dx = new_planes(c, 6, 0, w->offset);
    for (ptrdiff_t u = 0; u < units; u++)
        if (!(k.rstd[u] > 0)) k.rstd[u] = 1;
    fn_channel_norm_backward_args b = {.layout = layout_of(c),
                                       .dy = dy.data,
                                       .x = x.data,
                                       .dx = dx.data,
                                       .dy_type = c->dtype,
                                       .x_type = c->dtype,
                                       .weight = a.weight,
                                       .mean = k.mean,
                                       .rstd = k.rstd,
                                       .sums = k.sums,
                                       .refused = k.refused,
                                       .given = a.given,
                                       .dx_is_warm = !w->cold};
    channels_streamed += fn_plan_channel_norm_backward(&b, c->compute, 0).stream;
    if (fn_channel_norm_backward(&b, c->compute, 0)) abort();
    h = hash(h, dx.data, n, c->dtype);
    const ptrdiff_t planes = b.layout.planes;
    for (ptrdiff_t u = 0; u < units; u++) {
        h = (h ^ k.refused[u]) * 31;
        if (!k.refused[u]) h = hash(h, k.sums + 2 * u * planes, 2 * planes, FN_F64);
    }
    const block all[] = {x, dy, y, dx, weight, bias};
    for (int i = 0; i < 6; i++) free(all[i].memory);
    free_numbers(&k);
    return h;
}

/* Moments of the planes, and of the same arrays as rows of channels. */
static uint64_t run_both_moments(const channel_case *c, const channel_way *w)
{
    const ptrdiff_t units = c->samples * c->channels;
    block x = new_planes(c, 1, 0, w->offset);
    double *sums = calloc((size_t)(3 * units), 8);
    const fn_channels_last_moments_args a = {.samples = c->samples,
                                             .rows = c->size,
                                             .cols = c->channels,
                                             .x = x.data,
                                             .x_type = c->dtype,
                                             .sums = sums};
    if (fn_channels_last_moments(&a, c->compute, 0)) abort();
    uint64_t h = hash(ANY, sums, 3 * units, FN_F64);
    fn_plane_moments_args m = {.rows = units,
                               .cols = c->size,
                               .x = x.data,
                               .x_type = c->dtype,
                               .sums = sums};
    if (fn_plane_moments(&m, c->compute, 0)) abort();
    h = hash(h, sums, 3 * units, FN_F64);
    free(sums);
    free(x.memory);
    return h;
}

static int run_channel_case(const char *isa, const channel_case *c, int way_count)
{
    static const char *const names[] = {"f32", "f64", "f16", "bf16"};
    int failures = 0;
    uint64_t first = 0;
    for (int k = 0; k < way_count; k++) {
        fn_force_partition(channel_ways[k].parts);
        const uint64_t h = c->kind == MOMENTS ? run_both_moments(c, &channel_ways[k])
                                              : run_units(c, &channel_ways[k]);
        fn_force_partition(0);
        if (k == 0) first = h;
        if (h == first) continue;
        fprintf(stderr, "%s channels-%s: other bits %s\n", isa, channel_kinds[c->kind],
                channel_ways[k].name);
        failures++;
    }
    printf("%s channels_%s-%s-%tdx%tdx%td %016llx\n", isa, channel_kinds[c->kind], names[c->dtype],
           c->samples, c->channels, c->size, (unsigned long long)first);
    return failures;
}

static int run_channels(const char *isa, int brief)
{
    int failures = 0;
    for (int kind = 0; kind < CHANNEL_KINDS; kind++)
        for (size_t s = 0; s < sizeof channel_shapes / sizeof *channel_shapes; s++)
            for (int dtype = FN_F32; dtype <= FN_BF16; dtype++) {
                const ptrdiff_t *d = channel_shapes[s];
                const channel_case c = {.kind = (channel_kind)kind,
                                        .samples = d[0],
                                        .channels = d[1],
                                        .size = d[2],
                                        .group = d[3],
                                        .dtype = (fn_dtype)dtype,
                                        .compute = dtype == FN_F64 ? FN_F64 : FN_F32,
                                        .parameters = (int)s + kind + dtype};
                failures += run_channel_case(isa, &c, brief ? 1 : CHANNEL_WAYS);
            }
    return failures;
}

/* 9 MB, of planes that begin and end within cache lines, and of units that do. */
static int run_channel_streams(const char *isa)
{
    static const channel_case cases[] = {
        {GROUP, 14, 300, 537, 4, FN_F32, FN_F32, 3},
        {BATCH, 14, 150, 537, 1, FN_F64, FN_F64, 1},
        {LAST, 14, 300, 537, 4, FN_F32, FN_F32, 3},
        {LAST_BATCH, 14, 150, 537, 3, FN_F64, FN_F64, 1},
    };
    int failures = 0;
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        channels_streamed = 0;
        failures += run_channel_case(isa, &cases[k], CHANNEL_WAYS);
        if (channels_streamed == 2 * (CHANNEL_WAYS - 1)) continue;
        fprintf(stderr, "%s: channels of 9 MB went past the cache %d times\n", isa,
                channels_streamed);
        failures++;
    }
    return failures;
}
