/* channels_last.c: group, instance and batch norm where channels lie side by side, over the rows and
 * blocks of op_channels.h. No arithmetic on elements is done in this file.
 *
 * A sample is so many rows of channels. Blocks of its rows are summed in T, a number a channel, by their
 * distance from a pivot of each channel, and added in order in double; then channels of a group are
 * merged in double, and what a row takes is formed: pivot, factor, shift and slope of each channel. The
 * pass over the rows comes straight after, while the sample is still in a cache. Where samples do not
 * share well among the threads, blocks do, and then rows: the same additions in the same order. */
#include <stdlib.h>

#include "channels.h"

/* Elements of a strip, and of the rows that are written in ascending order; columns of a block that are
 * converted at a time. */
enum { STRIP = 512, PASS_ELEMENTS = 1 << 13, TILE_COLS = 64 };

/* Bytes to what is fetched while blocks are summed. */
enum { FETCH_AHEAD = 1 << 16 };

/* Sums of blocks are formed again, about pivots that lie nearer, up to so often. */
enum { MOST_SUMS = 3 };

/* A call: a norm, its gradients, or moments alone. */
typedef struct {
    fn_channels layout;
    ptrdiff_t samples, rows, cols, groups, blocks; /* rows, groups and blocks are of a sample */
    double per_row, per_plane;
    const void *x, *dy;
    void *y; /* y or dx; NULL: not wanted */
    fn_dtype x_type, dy_type, y_type, dtype;
    fn_activation activation;
    int stream;
    ptrdiff_t ahead;              /* elements to what is fetched meanwhile */
    const unsigned char *refused; /* of each unit, or NULL */
    const fn_channel_norm_args *forward;
    const fn_channel_norm_backward_args *backward;
    const fn_channels_last_moments_args *moments;
    char *rooms, *sums; /* of all samples and blocks, where blocks are cut over threads */
} last_call;

/* What is known of a sample: `cols` numbers of each kind, sums at first and then what a row takes; these
 * as T, laid out again and again as far as a strip may reach. */
typedef struct {
    double *numbers[4];
    char *terms[4];
} sample_room;

/* ---- room ------------------------------------------------------------------------------------- */

static ptrdiff_t term_count(const last_call *c)
{
    const ptrdiff_t all = c->rows * c->cols;
    return all - c->cols < STRIP ? all : c->cols + STRIP;
}

static size_t room_bytes(const last_call *c)
{
    return 4 * (bytes_of(c->cols, FN_F64) + bytes_of(term_count(c), c->dtype));
}

static sample_room room_at(const last_call *c, char *at)
{
    sample_room room;
    for (int k = 0; k < 4; k++) {
        room.numbers[k] = (double *)at;
        at += bytes_of(c->cols, FN_F64);
    }
    for (int k = 0; k < 4; k++) {
        room.terms[k] = at;
        at += bytes_of(term_count(c), c->dtype);
    }
    return room;
}

static sample_room room_of(const last_call *c, ptrdiff_t sample)
{
    return room_at(c, c->rooms + (size_t)sample * room_bytes(c));
}

/* Of a block: three sums, each with room for a whole vector at its end. */
static ptrdiff_t sums_apart(const last_call *c) { return (c->cols + 15) / 16 * 16; }

static size_t sum_bytes(const last_call *c) { return bytes_of(3 * sums_apart(c), c->dtype); }

static int reads_plain(const last_call *c)
{
    return c->x_type == c->dtype && (!c->dy || c->dy_type == c->dtype);
}

static int writes_plain(const last_call *c) { return c->y_type == c->dtype && !c->activation; }

/* Blocks of x and dy that are converted. */
static size_t tile_bytes(const last_call *c)
{
    return reads_plain(c) ? 0 : bytes_of(2 * TILE_COLS * FN_CHANNEL_ROWS, c->dtype);
}

/* Strips of x, dy and the result. */
static size_t strip_bytes(const last_call *c)
{
    return reads_plain(c) && writes_plain(c) ? 0 : bytes_of(3 * STRIP, c->dtype);
}

/* ---- sums ------------------------------------------------------------------------------------- */

/* Of an array: rows `apart` rows apart, n columns of each, from an element on: where they lie, or, as soon
 * as an array is converted, one after the other in `room`. */
static const void *tile_at(const last_call *c, const void *data, fn_dtype type, ptrdiff_t at,
                           ptrdiff_t apart, ptrdiff_t rows, ptrdiff_t n, char *room)
{
    const fn_channel_table *table = &fn_active_isa->channels;
    const ptrdiff_t from = apart * c->cols, size = fn_size_of(c->dtype);
    if (!room) return at_element(data, type, at);
    const ptrdiff_t rows_each = n == from ? rows : 1;
    for (ptrdiff_t r = 0; r < rows; r += rows_each)
        table->load_elements[c->dtype](room + r * n * size, at_element(data, type, at + r * from),
                                       type, rows_each * n);
    return room;
}

/* The sums of rows row0, row0 + apart, ...; without dy, those of x. */
static void sum_rows(const last_call *c, const void *dy, ptrdiff_t row0, ptrdiff_t apart,
                     ptrdiff_t rows, const char *pivots, char *into, char *tiles)
{
    const ptrdiff_t size = fn_size_of(c->dtype), most = tiles ? TILE_COLS : c->cols;
    char *dy_tiles = tiles ? tiles + TILE_COLS * FN_CHANNEL_ROWS * size : NULL;
    for (ptrdiff_t j = 0, n; j < c->cols; j += n) {
        n = c->cols - j < most ? c->cols - j : most;
        const ptrdiff_t at = row0 * c->cols + j;
        const void *x = tile_at(c, c->x, c->x_type, at, apart, rows, n, tiles), *g = NULL;
        if (dy) g = tile_at(c, dy, c->dy_type, at, apart, rows, n, dy_tiles);
        fn_active_isa->channels.channel_sums[c->dtype](x, g, tiles ? n : apart * c->cols, rows, n,
                                                       c->ahead, pivots + j * size, into + j * size,
                                                       sums_apart(c));
    }
}

static void sum_block(const last_call *c, const sample_room *room, ptrdiff_t sample,
                      ptrdiff_t block, char *into, char *tiles)
{
    const ptrdiff_t skipped = block * FN_CHANNEL_ROWS, left = c->rows - skipped;
    sum_rows(c, c->dy, sample * c->rows + skipped, 1,
             left < FN_CHANNEL_ROWS ? left : FN_CHANNEL_ROWS, room->terms[0], into, tiles);
}

/* A block's sums, of n columns from column j on, to those of the blocks before it. */
static void add_block(const last_call *c, const sample_room *room, const char *sums, ptrdiff_t j,
                      ptrdiff_t n, int is_first)
{
    for (int k = 0; k < (c->dy ? 3 : 2); k++)
        fn_active_isa->widen_add[c->dtype](room->numbers[k] + j,
                                           sums + (k * sums_apart(c) + j) * fn_size_of(c->dtype), n,
                                           !is_first);
}

/* Pivots, in double and as terms; each is a number of the type that is computed in. */
static double *pivots_of(const sample_room *room) { return room->numbers[3]; }

static void lay_out_pivots(const last_call *c, const sample_room *room)
{
    fn_active_isa->narrow[c->dtype](room->terms[0], pivots_of(room), c->cols);
}

/* Backward, the unit's mean, rounded. */
static void take_pivots(const last_call *c, const sample_room *room, ptrdiff_t sample)
{
    const fn_channel_norm_backward_args *a = c->backward;
    double *pivots = pivots_of(room);
    for (ptrdiff_t j = 0, u = sample * c->groups; j < c->cols; j += c->layout.planes, u++)
        for (ptrdiff_t k = 0; k < c->layout.planes; k++)
            pivots[j + k] = rounded(a->mean[a->given ? u % c->layout.kinds : u], c->dtype);
    lay_out_pivots(c, room);
}

/* Forward, the means of a block's worth of rows that lie all over the sample (an odd number of rows
 * apart: in step with no power of two). */
static void find_pivots(const last_call *c, const sample_room *room, ptrdiff_t sample,
                        char *scratch)
{
    double *pivots = pivots_of(room);
    const ptrdiff_t rows = c->rows < FN_CHANNEL_ROWS ? c->rows : FN_CHANNEL_ROWS;
    const ptrdiff_t apart = c->rows < 2 * FN_CHANNEL_ROWS ? 1 : (c->rows / FN_CHANNEL_ROWS - 1) | 1;
    memset(room->terms[0], 0, (size_t)(c->cols * fn_size_of(c->dtype)));
    sum_rows(c, NULL, sample * c->rows, apart, rows, room->terms[0], scratch,
             tile_bytes(c) ? scratch + sum_bytes(c) : NULL);
    const double per_row = 1.0 / (double)rows;
    fn_active_isa->widen_add[c->dtype](pivots, scratch, c->cols, 0);
    for (ptrdiff_t j = 0; j < c->cols; j++) pivots[j] = rounded(pivots[j] * per_row, c->dtype);
    lay_out_pivots(c, room);
}

static void begin_sample(const last_call *c, const sample_room *room, ptrdiff_t sample,
                         char *scratch)
{
    if (c->backward)
        take_pivots(c, room, sample);
    else
        find_pivots(c, room, sample, scratch);
}

/* The mean of a channel of n rows beyond its pivot, and squared deviations from the mean. */
typedef struct {
    double shift, squares;
} column_moments;

FN_INLINE column_moments moments_of_column(const last_call *c, const sample_room *room, ptrdiff_t j)
{
    const double sum = room->numbers[0][j], shift = sum * c->per_row;
    const double squares = room->numbers[1][j] - shift * sum;
    return (column_moments){shift, squares < 0 ? 0 : squares};
}

/* Whether a pivot was farther off than its rounding may cost, and is moved. */
static int recentre(const last_call *c, const sample_room *room)
{
    double *pivots = pivots_of(room);
    int moves = 0;
    for (ptrdiff_t j = 0; j < c->cols; j++) {
        const column_moments m = moments_of_column(c, room, j);
        if (!(m.shift * room->numbers[0][j] > m.squares * 0.25)) continue;
        const double moved = rounded(pivots[j] + m.shift, c->dtype);
        moves |= moved != pivots[j];
        pivots[j] = moved;
    }
    if (moves) lay_out_pivots(c, room);
    return moves;
}

static void sum_sample(const last_call *c, const sample_room *room, ptrdiff_t sample, char *scratch)
{
    char *tiles = tile_bytes(c) ? scratch + sum_bytes(c) : NULL;
    begin_sample(c, room, sample, scratch);
    for (int times = 1;; times++) {
        for (ptrdiff_t b = 0; b < c->blocks; b++) {
            sum_block(c, room, sample, b, scratch, tiles);
            add_block(c, room, scratch, 0, c->cols, b == 0);
        }
        if (c->backward || times == MOST_SUMS || !recentre(c, room)) return;
    }
}

/* ---- what a row takes ------------------------------------------------------------------------- */

/* Channels are merged by their distance from the pivot of the first, whose moments are given. */
static void merge_channels(const last_call *c, const sample_room *room, ptrdiff_t j0, double *mean,
                           double *squares)
{
    const double n = (double)c->rows, *pivots = pivots_of(room) + j0;
    double *own = room->numbers[2] + j0;
    own[0] = *mean;
    for (ptrdiff_t j = 1; j < c->layout.planes; j++) {
        const column_moments column = moments_of_column(c, room, j0 + j);
        own[j] = (pivots[j] - pivots[0]) + column.shift;
        *mean += own[j];
        *squares += column.squares;
    }
    *mean *= c->per_plane;
    for (ptrdiff_t j = 0; j < c->layout.planes; j++)
        *squares += n * ((own[j] - *mean) * (own[j] - *mean));
}

FN_INLINE int moments_of_unit(const last_call *c, const sample_room *room, ptrdiff_t j,
                              unit_moments *m)
{
    const double first = pivots_of(room)[j];
    column_moments all = moments_of_column(c, room, j);
    if (c->layout.planes > 1) merge_channels(c, room, j, &all.shift, &all.squares);
    m->pivot = rounded(first + all.shift, c->dtype);
    m->shift = (first - m->pivot) + all.shift;
    m->variance = all.squares * c->per_plane * c->per_row;
    return all.squares <= largest_squares(c->dtype);
}

/* What a row takes of channel j, of parameter p. */
FN_INLINE void channel_numbers(const last_call *c, const sample_room *room, ptrdiff_t j,
                               ptrdiff_t p, const unit_moments *m)
{
    const fn_channel_norm_args *a = c->forward;
    const double factor = m->rstd * number_at(a->weight, c->dtype, p, 1);
    room->numbers[0][j] = m->pivot;
    room->numbers[1][j] = factor;
    room->numbers[2][j] = number_at(a->bias, c->dtype, p, 0) - m->shift * factor;
}

/* Found, from the sums: whether they are in range, and all weights times rstd. */
FN_INLINE int unit_fits(const last_call *c, const sample_room *room, ptrdiff_t j, ptrdiff_t p,
                        unit_moments *m)
{
    const fn_channel_norm_args *a = c->forward;
    int fits = moments_of_unit(c, room, j, m) & rstd_fits(a, m);
    for (ptrdiff_t k = 0; k < c->layout.planes; k++)
        fits &= weight_fits(number_at(a->weight, c->dtype, p + k, 1), m->rstd, c->dtype);
    return fits;
}

static void forward_numbers(const last_call *c, const sample_room *room, ptrdiff_t sample)
{
    const fn_channel_norm_args *a = c->forward;
    const ptrdiff_t planes = c->layout.planes;
    ptrdiff_t u = sample * c->groups, kind = u % c->layout.kinds;
    for (ptrdiff_t j = 0; j < c->cols; j += planes, u++) {
        const ptrdiff_t p = kind * planes;
        unit_moments m;
        if (a->given)
            m = fn_given_moments(a, kind);
        else
            keep_moments(a, u, unit_fits(c, room, j, p, &m), &m);
        for (ptrdiff_t k = 0; k < planes; k++) channel_numbers(c, room, j + k, p + k, &m);
        kind = kind + 1 < c->layout.kinds ? kind + 1 : 0;
    }
}

static void backward_numbers(const last_call *c, const sample_room *room, ptrdiff_t sample)
{
    const fn_channel_norm_backward_args *a = c->backward;
    const gradient_bounds bounds = gradient_bounds_of(a);
    const ptrdiff_t planes = c->layout.planes;
    double *const *to = room->numbers;
    ptrdiff_t u = sample * c->groups, kind = u % c->layout.kinds;
    for (ptrdiff_t j = 0; j < c->cols; j += planes, u++) {
        const ptrdiff_t own = a->given ? kind : u;
        const double mean = a->mean[own], rstd = a->rstd[own];
        double terms[4] = {rounded(mean, c->dtype)}, *sums = a->sums + 2 * u * planes, total = 0;
        for (ptrdiff_t k = 0; k < planes; k++) total += to[0][j + k];
        unit_gradients unit = begun_gradients(a, &bounds, mean, rstd, terms[0], total);
        for (ptrdiff_t k = 0; k < planes; k++) {
            const double w = number_at(a->weight, c->dtype, kind * planes + k, 1);
            sums[2 * k] = to[1][j + k];
            sums[2 * k + 1] = to[2][j + k];
            add_plane(&bounds, w, &unit, sums + 2 * k);
            to[1][j + k] = rstd * w;
        }
        a->refused[u] = (unsigned char)!finish_gradients(a, &bounds, &unit, terms);
        for (ptrdiff_t k = 0; k < planes; k++) {
            to[0][j + k] = a->given ? 0 : terms[0]; /* given: x has no part in it */
            to[2][j + k] = terms[2];
            to[3][j + k] = terms[3];
        }
        kind = kind + 1 < c->layout.kinds ? kind + 1 : 0;
    }
}

static void hand_out_moments(const last_call *c, const sample_room *room, ptrdiff_t sample)
{
    double *into = c->moments->sums + sample * c->cols;
    const ptrdiff_t each = c->samples * c->cols;
    for (ptrdiff_t j = 0; j < c->cols; j++) {
        const column_moments m = moments_of_column(c, room, j);
        into[j] = pivots_of(room)[j];
        into[each + j] = m.shift;
        into[2 * each + j] = m.squares;
    }
}

static int term_kinds(const last_call *c) { return c->dy ? 4 : 3; }

/* Terms repeated until they are long enough for a strip from any column on. */
static void lay_out_terms(const last_call *c, const sample_room *room)
{
    const ptrdiff_t size = fn_size_of(c->dtype), all = term_count(c);
    for (int k = 0; k < term_kinds(c); k++) {
        char *t = room->terms[k];
        for (ptrdiff_t i = c->cols, n; i < all; i += n) {
            n = all - i < i ? all - i : i;
            memcpy(t + i * size, t, (size_t)(n * size));
        }
    }
}

/* Batch norm's inference: forward_numbers' arithmetic, by vectors. */
static int takes_given_terms(const last_call *c, const sample_room *room)
{
    const fn_channel_norm_args *a = c->forward;
    if (!a || !a->given || a->layout.planes > 1 || a->layout.kinds != c->cols) return 0;
    fn_active_isa->channels.column_terms[c->dtype](NULL, a->mean, a->rstd, a->weight, a->bias,
                                                   c->cols, (void *const *)room->terms);
    return 1;
}

static void take_numbers(const last_call *c, const sample_room *room, ptrdiff_t sample)
{
    if (c->forward)
        forward_numbers(c, room, sample);
    else
        backward_numbers(c, room, sample);
    for (int k = 0; c->y && k < term_kinds(c); k++)
        fn_active_isa->narrow[c->dtype](room->terms[k], room->numbers[k], c->cols);
}

/* From the sums to the terms. */
static void finish_sums(const last_call *c, const sample_room *room, ptrdiff_t sample)
{
    if (c->moments) {
        hand_out_moments(c, room, sample);
        return;
    }
    if (!takes_given_terms(c, room)) take_numbers(c, room, sample);
    if (c->y) lay_out_terms(c, room);
}

/* ---- the pass --------------------------------------------------------------------------------- */

/* n elements from element `at`, the first of which lies in column j. */
static void pass_strip(const last_call *c, const sample_room *room, ptrdiff_t at, ptrdiff_t n,
                       ptrdiff_t j, int stream, char *strips)
{
    const fn_channel_table *table = &fn_active_isa->channels;
    const ptrdiff_t strip = STRIP * fn_size_of(c->dtype);
    const int bare = c->backward && c->backward->given, direct = writes_plain(c);
    const void *dy = NULL, *terms[4];
    if (c->dy) dy = as_computed(c->dy, c->dy_type, at, n, c->dtype, strips ? strips + strip : NULL);
    const void *x = bare ? dy : as_computed(c->x, c->x_type, at, n, c->dtype, strips);
    for (int k = 0; k < 4; k++) terms[k] = at_element(room->terms[k], c->dtype, j);
    char *y = (char *)c->y + at * fn_size_of(c->y_type), *to = direct ? y : strips + 2 * strip;
    table->columns_pass[c->dtype](x, bare ? NULL : dy, to, n, terms, stream);
    if (!direct) table->store_elements[c->dtype](y, c->y_type, to, n, c->activation);
}

/* Strips begin with a line of y where they go past the cache, but for the first. */
static void pass_elements(const last_call *c, const sample_room *room, ptrdiff_t at, ptrdiff_t n,
                          ptrdiff_t j, char *strips)
{
    const ptrdiff_t size = fn_size_of(c->y_type);
    ptrdiff_t head = 0;
    if (c->stream) head = (ptrdiff_t)(-((uintptr_t)c->y + (uintptr_t)(at * size)) % 64) / size;
    for (ptrdiff_t m; n > 0; n -= m, at += m, j = (j + m) % c->cols, head = 0) {
        m = head ? head : STRIP;
        if (m > n) m = n;
        pass_strip(c, room, at, m, j, c->stream && !head, strips);
    }
}

/* Rows of a sample of which some units are refused: the others' columns. */
static void pass_others(const last_call *c, const sample_room *room, ptrdiff_t row,
                        const unsigned char *refused, char *strips)
{
    const ptrdiff_t planes = c->layout.planes;
    for (ptrdiff_t g = 0; g < c->groups; g++)
        if (!refused[g])
            pass_elements(c, room, row * c->cols + g * planes, planes, g * planes, strips);
}

/* From the last rows on, which a cache has still. */
static void pass_sample(const last_call *c, const sample_room *room, ptrdiff_t sample,
                        ptrdiff_t row0, ptrdiff_t row1, char *strips)
{
    const unsigned char *refused = c->refused ? c->refused + sample * c->groups : NULL;
    if (!refused || !memchr(refused, 1, (size_t)c->groups)) {
        const ptrdiff_t some = c->cols < PASS_ELEMENTS ? PASS_ELEMENTS / c->cols : 1;
        for (ptrdiff_t n; row1 > row0; row1 -= n) {
            n = row1 - row0 < some ? row1 - row0 : some;
            pass_elements(c, room, (row1 - n) * c->cols, n * c->cols, 0, strips);
        }
        return;
    }
    for (ptrdiff_t row = row0; row < row1; row++) pass_others(c, room, row, refused, strips);
}

/* ---- how samples are shared -------------------------------------------------------------------- */

static int needs_sums(const last_call *c) { return !c->forward || !c->forward->given; }

static void whole_samples(const void *args, ptrdiff_t sample0, ptrdiff_t sample1, void *scratch)
{
    const last_call *c = args;
    const sample_room room = room_at(c, scratch);
    char *work = (char *)scratch + room_bytes(c);
    for (ptrdiff_t s = sample0; s < sample1; s++) {
        if (needs_sums(c)) sum_sample(c, &room, s, work);
        finish_sums(c, &room, s);
        if (c->y) pass_sample(c, &room, s, s * c->rows, (s + 1) * c->rows, work);
    }
    end_stream(c->stream, NULL);
}

static void sum_blocks(const void *args, ptrdiff_t block0, ptrdiff_t block1, void *scratch)
{
    const last_call *c = args;
    for (ptrdiff_t b = block0; b < block1; b++) {
        const sample_room room = room_of(c, b / c->blocks);
        sum_block(c, &room, b / c->blocks, b % c->blocks, c->sums + (size_t)b * sum_bytes(c),
                  scratch);
    }
}

static void add_columns(const void *args, ptrdiff_t col0, ptrdiff_t col1, void *scratch)
{
    const last_call *c = args;
    (void)scratch;
    for (ptrdiff_t b = 0; b < c->samples * c->blocks; b++) {
        const sample_room room = room_of(c, b / c->blocks);
        add_block(c, &room, c->sums + (size_t)b * sum_bytes(c), col0, col1 - col0,
                  b % c->blocks == 0);
    }
}

static void pass_rows(const void *args, ptrdiff_t row0, ptrdiff_t row1, void *scratch)
{
    const last_call *c = args;
    for (ptrdiff_t row = row0, end; row < row1; row = end) {
        const ptrdiff_t sample = row / c->rows;
        const sample_room room = room_of(c, sample);
        end = (sample + 1) * c->rows;
        if (end > row1) end = row1;
        pass_sample(c, &room, sample, row, end, scratch);
    }
    end_stream(c->stream, NULL);
}

static int sum_by_blocks(const last_call *c, int threads)
{
    for (int times = 1;; times++) {
        const int status = fn_run_rowwise(sum_blocks, c, c->samples * c->blocks, threads,
                                          tile_bytes(c));
        if (status != FN_OK) return status;
        fn_run_rowwise(add_columns, c, c->cols, threads, 0);
        int moves = 0;
        for (ptrdiff_t s = 0; s < c->samples && !c->backward && times < MOST_SUMS; s++) {
            const sample_room room = room_of(c, s);
            moves |= recentre(c, &room);
        }
        if (!moves) return FN_OK;
    }
}

static int finish_by_rows(const last_call *c, int threads)
{
    for (ptrdiff_t s = 0; s < c->samples; s++) {
        const sample_room room = room_of(c, s);
        finish_sums(c, &room, s);
    }
    if (!c->y) return FN_OK;
    return fn_run_rowwise(pass_rows, c, c->samples * c->rows, threads, strip_bytes(c));
}

static int run_by_blocks(last_call *c, int threads)
{
    const size_t of_rooms = (size_t)c->samples * room_bytes(c);
    const size_t of_sums = (size_t)(c->samples * c->blocks) * sum_bytes(c);
    c->rooms = malloc(of_rooms + of_sums + sum_bytes(c) + tile_bytes(c));
    if (!c->rooms) return FN_NO_MEMORY;
    c->sums = c->rooms + of_rooms;
    int status = FN_OK;
    if (needs_sums(c)) {
        for (ptrdiff_t s = 0; s < c->samples; s++) {
            const sample_room room = room_of(c, s);
            begin_sample(c, &room, s, c->sums + of_sums);
        }
        status = sum_by_blocks(c, threads);
    }
    if (status == FN_OK) status = finish_by_rows(c, threads);
    free(c->rooms);
    return status;
}

/* A block, or where rows are short as much as takes some time to sum. */
static ptrdiff_t fetched_ahead(const last_call *c)
{
    const ptrdiff_t least = FETCH_AHEAD / fn_size_of(c->dtype), block = FN_CHANNEL_ROWS * c->cols;
    return block > least ? block : least;
}

static int run(last_call *c, fn_plan plan)
{
    const fn_channels *l = &c->layout;
    c->groups = l->step / l->planes;
    c->samples = l->units / c->groups;
    c->rows = l->plane;
    c->per_row = 1.0 / (double)c->rows;
    c->per_plane = 1.0 / (double)l->planes;
    c->cols = l->step;
    c->blocks = (c->rows + FN_CHANNEL_ROWS - 1) / FN_CHANNEL_ROWS;
    c->stream = plan.stream;
    if (plan.bytes >= FETCH_BYTES && reads_plain(c)) c->ahead = fetched_ahead(c);
    if (plan.threads > 1 && c->samples < 4 * plan.threads && c->samples % plan.threads)
        return run_by_blocks(c, plan.threads);
    const size_t tiles = tile_bytes(c), strips = strip_bytes(c);
    const size_t of_sums = sum_bytes(c) + tiles;
    return fn_run_rowwise(whole_samples, c, c->samples, plan.threads,
                          room_bytes(c) + (of_sums > strips ? of_sums : strips));
}

int fn_channels_last_norm(const fn_channel_norm_args *a, fn_plan plan)
{
    last_call c = {.layout = a->layout,
                   .x = a->x,
                   .y = a->y,
                   .x_type = a->x_type,
                   .y_type = a->y_type,
                   .dtype = a->dtype,
                   .activation = a->activation,
                   .refused = a->given ? NULL : a->refused,
                   .forward = a};
    return run(&c, plan);
}

int fn_channels_last_norm_backward(const fn_channel_norm_backward_args *a, fn_plan plan)
{
    last_call c = {.layout = a->layout,
                   .x = a->x,
                   .dy = a->dy,
                   .y = a->dx,
                   .x_type = a->x_type,
                   .dy_type = a->dy_type,
                   .y_type = a->x_type,
                   .dtype = a->dtype,
                   .refused = a->refused,
                   .backward = a};
    return run(&c, plan);
}

int fn_channels_last_moments(const fn_channels_last_moments_args *a, fn_dtype dtype, int threads)
{
    const fn_channels l = {.units = a->samples,
                           .planes = a->cols,
                           .plane = a->rows,
                           .step = a->cols};
    const ptrdiff_t bytes = a->samples * a->rows * a->cols * fn_size_of(a->x_type);
    last_call c = {.layout = l,
                   .x = a->x,
                   .x_type = a->x_type,
                   .y_type = dtype,
                   .dtype = dtype,
                   .moments = a};
    return run(&c, (fn_plan){.threads = fn_planned_threads(bytes, independent_of(&l), threads),
                             .bytes = bytes});
}
