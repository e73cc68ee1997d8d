/* inputs.h: what the cases of checksums.c are made from: rows of every kind from integers by exact
 * steps, memory that ends where it is used up, and sums over bits. */
#ifndef INPUTS_H
#define INPUTS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "fastnorm.h"

/* ---- inputs ---------------------------------------------------------------------------------- */

/* What a row holds. MIXED gives every row of a case a kind of its own. */
enum {
    PLAIN,
    LARGE_MEAN,
    RECENTRED, /* one unit in the last place around 2^24 (2^53): the rounded mean is far off */
    ALTERNATING,
    RAMP,
    MANY_SCALES,
    SPIKE,
    OUTLIER,
    CONSTANT,
    ZERO,
    TINY, /* denormal */
    HUGE_,
    LARGEST,
    HAS_NAN,
    HAS_INFINITY,
    MIXED
};

static uint64_t mix(uint64_t a) /* splitmix64 */
{
    a += 0x9e3779b97f4a7c15u;
    a = (a ^ a >> 30) * 0xbf58476d1ce4e5b9u;
    a = (a ^ a >> 27) * 0x94d049bb133111ebu;
    return a ^ a >> 31;
}

/* 2^exponent, by its bits. */
static double power(int exponent)
{
    const uint64_t bits = exponent > -1023 ? (uint64_t)(exponent + 1023) << 52
                                           : (uint64_t)1 << (exponent + 1074);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

typedef struct {
    int mantissa, least, most; /* bits, exponents of the least denormal and the largest number */
} format;

static const format formats[FN_DTYPE_COUNT] = {{24, -149, 127}, {53, -1074, 1023}};

/* Element i of n; every step is exact in the row's own type. */
static double element(int kind, fn_dtype dtype, uint64_t seed, ptrdiff_t i, ptrdiff_t n)
{
    const uint64_t r = mix(seed * 0x10001u + (uint64_t)i);
    const format f = formats[dtype];
    const double small = (double)(int64_t)(r >> 42) - 0x1p21; /* -2^21 .. 2^21 - 1 */
    switch (kind) {
    case LARGE_MEAN: return power(f.mantissa - 1) + (double)(r >> 56);
    case RECENTRED: return power(f.mantissa) + 2.0 * (double)(r >> 62);
    case ALTERNATING: return i % 2 ? 0.296875 : -0.296875;
    case RAMP: return (double)i * 0x1p-10;
    case MANY_SCALES: return small * power((int)(r & 31) - 36);
    case SPIKE: return r % 100 ? small * 0x1p-31 : 10000;
    case OUTLIER: return i + 1 == n;
    case CONSTANT: return 0x1.19999ap0 * (1 + (double)(seed & 7));
    case ZERO: return r & 1 ? 0.0 : -0.0;
    case TINY: return small * power(f.least);
    case HUGE_: return small * power(f.most - 21);
    case LARGEST: return (r & 1 ? 1 : -1) * (2 - power(1 - f.mantissa)) * power(f.most);
    case HAS_NAN: return i == n / 2 ? (double)__builtin_nan("") : small * 0x1p-21;
    case HAS_INFINITY: return i == n / 3 ? (double)__builtin_inf() : small * 0x1p-21;
    default: return small * 0x1p-21;
    }
}

/* The same of a half type, by its bits, of which the last `fraction` ones are the fraction. */
static uint16_t half_element(int kind, int fraction, uint64_t seed, ptrdiff_t i, ptrdiff_t n)
{
    const uint64_t r = mix(seed * 0x10001u + (uint64_t)i);
    const unsigned sign = (unsigned)(r >> 63) << 15, infinity = 0x7fffu >> fraction << fraction;
    const unsigned one = infinity >> 1 & infinity, part = (unsigned)r & ((1u << fraction) - 1);
    const unsigned small = sign | (one - ((unsigned)(r >> 60 & 3) << fraction) + part);
    switch (kind) {
    case LARGE_MEAN: return (uint16_t)(one + (5u << fraction) + (part & 3));
    case RECENTRED: return (uint16_t)(one + (part & 1));
    case ALTERNATING: return (uint16_t)(one | (unsigned)i % 2 << 15);
    case RAMP: return (uint16_t)(i < (ptrdiff_t)infinity ? i : 0);
    case MANY_SCALES: return (uint16_t)(sign | r % infinity);
    case SPIKE: return (uint16_t)(r % 100 ? small : one + (9u << fraction));
    case OUTLIER: return (uint16_t)(i + 1 == n ? one : 0);
    case CONSTANT: return (uint16_t)(one + (seed & 7));
    case ZERO: return (uint16_t)sign;
    case TINY: return (uint16_t)(sign | part);
    case HUGE_: return (uint16_t)(sign | (infinity - (1u << fraction) + part));
    case LARGEST: return (uint16_t)(sign | (infinity - 1));
    case HAS_NAN: return (uint16_t)(i == n / 2 ? infinity + 1 : small);
    case HAS_INFINITY: return (uint16_t)(i == n / 3 ? infinity : small);
    default: return (uint16_t)small;
    }
}

static size_t size_of(fn_dtype dtype)
{
    static const size_t sizes[] = {4, 8, 2, 2, 1};
    return sizes[dtype];
}

static void put(void *array, ptrdiff_t i, double value, fn_dtype dtype)
{
    if (dtype == FN_F64)
        ((double *)array)[i] = value;
    else
        ((float *)array)[i] = (float)value;
}

static double get_half(uint16_t bits, int fraction, int bias)
{
    const unsigned exponent = (bits & 0x7fffu) >> fraction, part = bits & ((1u << fraction) - 1);
    double value = power((exponent ? (int)exponent : 1) - bias - fraction);
    value *= part + (exponent ? (double)(1u << fraction) : 0);
    if (exponent == 0x7fffu >> fraction) value = part ? __builtin_nan("") : __builtin_inf();
    return bits >> 15 ? -value : value;
}

static double get(const void *array, ptrdiff_t i, fn_dtype dtype)
{
    switch (dtype) {
    case FN_F64: return ((const double *)array)[i];
    case FN_F16: return get_half(((const uint16_t *)array)[i], 10, 15);
    case FN_BF16: return get_half(((const uint16_t *)array)[i], 7, 127);
    case FN_I8: return ((const signed char *)array)[i];
    default: return (double)((const float *)array)[i];
    }
}

static void fill_row(void *row, int kind, fn_dtype dtype, uint64_t seed, ptrdiff_t n)
{
    if (kind == MIXED) kind = (int)(mix(seed) % MIXED);
    for (ptrdiff_t i = 0; i < n; i++)
        if (dtype == FN_F16 || dtype == FN_BF16)
            ((uint16_t *)row)[i] = half_element(kind, dtype == FN_F16 ? 10 : 7, seed, i, n);
        else
            put(row, i, element(kind, dtype, seed, i, n), dtype);
}

/* ---- arrays ---------------------------------------------------------------------------------- */

/* Memory that starts `offset` bytes past a cache line and ends with its last element, so that a
 * sanitizer sees a step beyond either end. */
typedef struct {
    char *memory, *data;
} block;

static block new_block(size_t bytes, size_t offset)
{
    void *memory;
    if (posix_memalign(&memory, 64, bytes + offset)) abort();
    return (block){memory, (char *)memory + offset};
}

static block new_vector(int kind, fn_dtype dtype, uint64_t seed, ptrdiff_t n, size_t offset)
{
    block b = new_block((size_t)n * size_of(dtype), offset);
    fill_row(b.data, kind, dtype, seed, n);
    return b;
}

/* ---- checksums ------------------------------------------------------------------------------- */

enum { ANY = 0x2545f491 }; /* what a hash begins with */

/* FNV-1a over bits, 64 at a time; every NaN is the same NaN. */
static uint64_t hash(uint64_t h, const void *array, ptrdiff_t n, fn_dtype dtype)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        const double value = get(array, i, dtype);
        uint64_t bits;
        memcpy(&bits, &value, sizeof bits);
        if (value != value) bits = 0x7ff8000000000000u;
        h = (h ^ bits) * 0x100000001b3u;
    }
    return h;
}

#endif
