/* activation.h: relu, silu, gelu and gelu by tanh of a strip of T, in place.
 *
 * Each is a fixed sequence of IEEE operations, the same for each instruction set. The exponentials
 * come as 4^f 2^2k with |f| <= 1/2, and 2^k is multiplied in twice: so they reach as far below the
 * normal numbers as the results do, which are rounded once there. The error measured is at most 3
 * ulps of the result, for x of any size; below the normal numbers, 2 of the least of them. At
 * -infinity relu is 0, and silu and both kinds of gelu are -0, their limit. */

#ifndef FN_ACTIVATION
#define FN_ACTIVATION

enum {
    /* t = x + this rounds x to an integer k, and v_power_of_2(t) is 2^k. */
    POWERS_OF_2,
    /* Below the first all results are -0; above the second e^-x does not count. */
    SILU_FROM,
    SILU_TO,
    GELU_TANH_FROM,
    GELU_TANH_TO,
    /* From here on the tail of the normal distribution, times x, rounds to 0. */
    GELU_TO,
    TAIL_SLOPE,
    /* log2(e)/2 and log2(e)/4, each in two parts. */
    SILU_RATE,
    SILU_RATE_LOW,
    GELU_RATE,
    GELU_RATE_LOW,
    /* log2(e) sqrt(2/pi) (1 + 0.044715 x^2) as CONSTANT + SQUARE x^2, each in two parts. The first of
     * CONSTANT has few enough bits for its difference from the rounded sum to be exact. */
    GELU_TANH_CONSTANT,
    GELU_TANH_CONSTANT_LOW,
    GELU_TANH_SQUARE,
    GELU_TANH_SQUARE_LOW,
};

static const float activation_numbers_f32[] = {
    [POWERS_OF_2] = 0x1.8p23f + 127,
    [SILU_FROM] = -110,
    [SILU_TO] = 40,
    [GELU_TANH_FROM] = -11,
    [GELU_TANH_TO] = 8,
    [GELU_TO] = 14.5,
    [TAIL_SLOPE] = 0x1.40d83ap+1f,
    [SILU_RATE] = 0x1.715476p-1f,
    [SILU_RATE_LOW] = 0x1.4ae0cp-27f,
    [GELU_RATE] = 0x1.715476p-2f,
    [GELU_RATE_LOW] = 0x1.4ae0cp-28f,
    [GELU_TANH_CONSTANT] = 0x1.26aecp+0f,
    [GELU_TANH_CONSTANT_LOW] = 0x1.0de73ap-23f,
    [GELU_TANH_SQUARE] = 0x1.a5a7dp-5f,
    [GELU_TANH_SQUARE_LOW] = -0x1.151aaep-30f,
};
static const double activation_numbers_f64[] = {
    [POWERS_OF_2] = 0x1.8p52 + 1023,
    [SILU_FROM] = -760,
    [SILU_TO] = 80,
    [GELU_TANH_FROM] = -22,
    [GELU_TANH_TO] = 11,
    [GELU_TO] = 38.6875,
    [TAIL_SLOPE] = 0x1.40d931ff62706p+1,
    [SILU_RATE] = 0x1.71547652b82fep-1,
    [SILU_RATE_LOW] = 0x1.777d0ffda0d24p-57,
    [GELU_RATE] = 0x1.71547652b82fep-2,
    [GELU_RATE_LOW] = 0x1.777d0ffda0d24p-58,
    [GELU_TANH_CONSTANT] = 0x1.26aec21bce76p+0,
    [GELU_TANH_CONSTANT_LOW] = -0x1.ad12d7a64bcebp-50,
    [GELU_TANH_SQUARE] = 0x1.a5a7cf7572a98p-5,
    [GELU_TANH_SQUARE_LOW] = -0x1.b91c940e4cfcfp-59,
};

/* (4^f - 1) / f for |f| <= 0.5005, the highest power first: 4^f then has a relative error of 1.6e-9,
 * and 3.4e-17 for double. These and the next are minimax fits in relative error, in which each
 * coefficient was rounded in turn and the rest fitted again. */
static const float growth_f32[] = {0x1.74684p-12f, 0x1.0401ccp-9f, 0x1.42dd2ap-7f, 0x1.5d7c0cp-5f,
                                   0x1.3b2aecp-3f, 0x1.c6b0ap-2f,  0x1.ebfbep-1f,  0x1.62e43p+0f};
static const double growth_f64[] = {0x1.63ccca1dfc1fep-27, 0x1.c79bee7e50716p-24,
                                    0x1.e92fcd820cdd8p-21, 0x1.e4ca7d3a84147p-18,
                                    0x1.b524bda973b1cp-15, 0x1.62c025230e4cdp-12,
                                    0x1.ffcbfcf1d6219p-10, 0x1.430912f6b290fp-7,
                                    0x1.5d87fe784d078p-5,  0x1.3b2ab6fba5cdap-3,
                                    0x1.c6b08d704a65bp-2,  0x1.ebfbdff82c586p-1,
                                    0x1.62e42fefa39ecp+0};

/* The tail of the normal distribution beyond a, times e^(a^2/2), is A / (a (TAIL_SLOPE A + 2 + a S))
 * with A = a + a^2 P, for a from 0 to 14.6 (38.7 for double): relative error 6.5e-9, and 5.9e-18 for
 * double. No term is negative, so that none cancels. While a is large, errors of P and S hardly
 * count: A is in both places and a S is small beside it. */
static const float tail_p_f32[] = {0x1.0c27bcp-7f, 0x1.4ba3bp-4f, 0x1.766718p-2f, 0x1.c044e6p-1f};
static const float tail_s_f32[] = {0x1.02d33ap-16f, 0x1.4b4cc8p-6f, 0x1.a800cp-3f, 0x1.ae319ep-1f};
static const double tail_p_f64[] = {0x1.33480f43685dep-21, 0x1.2032bd9ee21ddp-16,
                                    0x1.0ae57cdcf4089p-12, 0x1.3cd10f6a7e4cp-9,
                                    0x1.08c30be44e14fp-6,  0x1.44114e297c0d3p-4,
                                    0x1.25a9f37ca0014p-2,  0x1.856b83b60f69cp-1,
                                    0x1.6b0fc913ce2efp+0,  0x1.b17c7dd087c86p+0};
static const double tail_s_f64[] = {0x1.811ec72bfcd71p-20, 0x1.6933f055c123fp-15,
                                    0x1.4d002de2fdf26p-11, 0x1.876d4f07c120dp-8,
                                    0x1.417e7a07a63fap-5,  0x1.7e393e48b64b9p-3,
                                    0x1.49c926d7c814cp-1,  0x1.913a49c35fd19p+0,
                                    0x1.3ce5756fc70abp+1};

#endif

#define activation_number(name) v_set1(FN_OF_T(activation_numbers)[name])
#define POLYNOMIAL(table, x)                                                                       \
    polynomial(FN_OF_T(table), sizeof FN_OF_T(table) / sizeof *FN_OF_T(table), x)

#define polynomial FN_OF_T(polynomial)
INLINE vec polynomial(const element *c, const size_t terms, vec x)
{
    vec y = v_set1(c[0]);
    UNROLL_LONG for (size_t k = 1; k < terms; k++) y = v_fma(y, x, v_set1(c[k]));
    return y;
}

/* x / (1 + 4^-(c (rate + rate_low))); c is x but where that makes no difference any more. */
#define x_logistic FN_OF_T(x_logistic)
INLINE vec x_logistic(vec x, vec c, vec rate, vec rate_low)
{
    const vec base = activation_number(POWERS_OF_2), t = v_fma(c, rate, base);
    const vec f = v_fnma(c, rate_low, v_fnma(c, rate, v_sub(t, base)));
    const vec power = v_power_of_2(t);
    const vec under = v_fma(power, power, v_fma(f, POLYNOMIAL(growth, f), v_set1(1)));
    return v_mul(v_mul(v_div(x, under), power), power);
}

#define silu FN_OF_T(silu)
INLINE vec silu(vec x)
{
    x = v_max(activation_number(SILU_FROM), x);
    return x_logistic(x, v_min(activation_number(SILU_TO), x), activation_number(SILU_RATE),
                      activation_number(SILU_RATE_LOW));
}

/* x (1 + tanh(u)) / 2 is x / (1 + e^-2u). In far tails the last bits of 2u are many ulps of the
 * result, so it is formed in two parts. */
#define gelu_tanh FN_OF_T(gelu_tanh)
INLINE vec gelu_tanh(vec x)
{
    const vec constant = activation_number(GELU_TANH_CONSTANT);
    const vec square = activation_number(GELU_TANH_SQUARE);
    x = v_max(activation_number(GELU_TANH_FROM), x);
    const vec c = v_min(activation_number(GELU_TANH_TO), x);
    const vec s = v_mul(c, c), s_excess = v_fnma(c, c, s);
    const vec rate = v_fma(s, square, constant);
    const vec of_rounding = v_fma(s, square, v_sub(constant, rate));
    const vec of_numbers = v_fma(s, activation_number(GELU_TANH_SQUARE_LOW),
                                 activation_number(GELU_TANH_CONSTANT_LOW));
    return x_logistic(x, c, rate, v_add(v_fnma(s_excess, square, of_rounding), of_numbers));
}

/* max(x, 0) - a tail(a) for a = |x|: nothing cancels on the negative side, and little on the
 * positive. */
#define gelu FN_OF_T(gelu)
INLINE vec gelu(vec x)
{
    const vec base = activation_number(POWERS_OF_2), rate = activation_number(GELU_RATE);
    const vec a = v_min(activation_number(GELU_TO), v_abs(x));
    const vec s = v_mul(a, a), s_excess = v_fnma(a, a, s);
    const vec t = v_fnma(s, rate, base);
    const vec f_low = v_fnma(s, activation_number(GELU_RATE_LOW), v_mul(s_excess, rate));
    const vec f = v_add(v_fnma(s, rate, v_sub(base, t)), f_low);
    const vec power = v_power_of_2(t);
    const vec over = v_fma(s, POLYNOMIAL(tail_p, a), a);
    const vec rest = v_mul(a, POLYNOMIAL(tail_s, a));
    const vec under = v_add(v_fma(activation_number(TAIL_SLOPE), over, rest), v_set1(2));
    const vec ratio = v_div(over, under);
    const vec product = v_fma(ratio, v_mul(f, POLYNOMIAL(growth, f)), ratio);
    return v_fnma(v_mul(product, power), power, v_max(v_set1((element)-0.0), x));
}

/* x > 0 ? x : +0, and NaN where x is NaN. */
#define relu FN_OF_T(relu)
INLINE vec relu(vec x) { return v_add(v_max(v_zero(), x), v_zero()); }

#define activated FN_OF_T(activated)
INLINE vec activated(vec x, const fn_activation kind)
{
    return kind == FN_RELU   ? relu(x)
           : kind == FN_SILU ? silu(x)
           : kind == FN_GELU ? gelu(x)
                             : gelu_tanh(x);
}

#define activate FN_OF_T(activate)
INLINE void activate(element *p, ptrdiff_t n, const fn_activation kind)
{
    NO_UNROLL for (ptrdiff_t i = 0; i < n; i += VW)
        store_some(p + i, activated(load_some(p + i, n - i), kind), n - i);
}

#define activate_strip FN_OF_T(activate_strip)
OUTLINE void activate_strip(element *p, ptrdiff_t n, fn_activation kind)
{
    switch (kind) {
    case FN_NO_ACTIVATION: break;
    case FN_RELU: activate(p, n, FN_RELU); break;
    case FN_SILU: activate(p, n, FN_SILU); break;
    case FN_GELU: activate(p, n, FN_GELU); break;
    case FN_GELU_TANH: activate(p, n, FN_GELU_TANH); break;
    }
}
