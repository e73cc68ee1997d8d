"""The interpreter's floating point: rounded as PTX says, judged by exact fractions."""

from fractions import Fraction

import numpy as np
import pytest

from .floats import BF16, F16, F32, F64, finite_words
from .ptx import DOCUMENTED_ULPS
from .ptx_lines import compute, dtype_of

COUNT = 1024
MODES = ("rn", "rz", "rm", "rp")
EXACT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "fma": lambda a, b, c: a * b + c,
}


def assert_rounded(known, words, exact, mode, inputs):
    for place, (word, value) in enumerate(zip(words, exact, strict=True)):
        if value:
            given = [hex(int(each[place])) for each in inputs]
            assert known.is_rounded(word, value, mode), (hex(int(word)), given, mode)


def words_of(array):
    """The bits of an array."""
    return array.view(f"u{array.itemsize}")


def check(text, name, known, words, mode):
    """A line's results for finite words, against the fraction that they must be the rounding of."""
    arrays = [word.view(dtype_of(known.name)) for word in words]
    found = words_of(compute(text, arrays, [known.name] * len(words), known.name))
    values = [[known.value(word) for word in each] for each in words]
    exact = [EXACT[name](*each) for each in zip(*values, strict=True)]
    assert_rounded(known, found, exact, mode, words)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("known", [F32, F64], ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_operations(name, known, mode, rng):
    a, b = (finite_words(known, rng, COUNT) for _ in range(2))
    if name == "div":
        one = known.words.type(1) << known.words.type(known.fraction + 1)
        b, a = np.where(b << 1 == 0, one, b), np.where(a << 1 == 0, one, a)
        if mode != "rn":  # remainders of tiny numbers are lost
            a, b = (np.where(abs(w.view(dtype_of(known.name))) < 1e-30, one, w) for w in (a, b))
            a, b = (finite_near(known, rng) for _ in range(2))
    check(f"{name}.{mode}.{known.name} $z, $a, $b;", name, known, [a, b], mode)


def finite_near(known, rng):
    """Numbers near 1, which no operation takes out of range."""
    one = ((1 << known.exponent - 1) - 1) << known.fraction
    words = one + rng.integers(-8 << known.fraction, 8 << known.fraction, COUNT)
    return words.astype(known.words)


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
@pytest.mark.parametrize("known", [F16, BF16], ids=lambda f: f.name)
def test_operations_of_halves(name, known, rng):
    words = [finite_words(known, rng, COUNT) for _ in range(2)]
    check(f"{name}.rn.{known.name} $z, $a, $b;", name, known, words, "rn")


def cancelling(known, rng):
    """Factors and a sum's last term that nearly cancels the product, or lies just below it."""
    dtype = dtype_of(known.name)
    a, b = (finite_near(known, rng).view(dtype) for _ in range(2))
    power = rng.choice([0, 0, 0, -known.fraction, -known.fraction - 1, -2 * known.fraction], COUNT)
    with np.errstate(all="ignore"):
        c = -np.ldexp(a * b, power) * (
            1 + np.ldexp(dtype.type(1), -known.fraction) * rng.integers(-2, 3, COUNT)
        )
        half = np.ldexp(a * b, -known.fraction - 1)
        c = np.where(rng.random(COUNT) < 0.3, np.ldexp(dtype.type(1), np.frexp(half)[1]), c)
    return [words_of(each.astype(dtype)) for each in (a, b, c)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("known", [F32, F64], ids=lambda f: f.name)
def test_fma_is_fused(known, mode, rng):
    text = f"fma.{mode}.{known.name} $z, $a, $b, $c;"
    check(text, "fma", known, [finite_words(known, rng, COUNT) for _ in range(3)], mode)
    check(text, "fma", known, cancelling(known, rng), mode)


@pytest.mark.parametrize("known", [F16, BF16], ids=lambda f: f.name)
def test_fma_of_halves_is_fused(known, rng):
    words = [finite_words(known, rng, COUNT) for _ in range(3)]
    check(f"fma.rn.{known.name} $z, $a, $b, $c;", "fma", known, words, "rn")


def test_fma_is_not_rounded_by_way_of_float64():
    """The exact sum lies just below the middle of two floats; in float64 it is the middle."""
    odd = np.float32(1 + 2.0**-23)
    a, b, c = np.float32([2.0**-24]) * odd, np.float32([1 - 2.0**-23]), np.float32([odd])
    twice = (a.astype("f8") * b + c).astype("f4")
    assert twice == np.float32(1 + 2.0**-22)
    assert compute("fma.rn.f32 $z, $a, $b, $c;", [a, b, c], ["f32"] * 3, "f32") == odd


SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-40, -1e-40]


@pytest.mark.parametrize("known", ["f32", "f64"])
def test_infinities_nan_and_zeros(known):
    dtype = dtype_of(known)
    a, b, c = (g.ravel().astype(dtype) for g in np.meshgrid(SPECIAL, SPECIAL, SPECIAL))
    with np.errstate(all="ignore"):
        wanted = {"add": a + b, "sub": a - b, "mul": a * b, "div": a / b}
        wanted["fma"] = np.where(np.isinf(c) & np.isfinite(a) & np.isfinite(b), c, a * b + c)
    for name, right in wanted.items():
        count = 3 if name == "fma" else 2
        text = f"{name}.rn.{known} $z, {', '.join('$' + letter for letter in 'abc'[:count])};"
        found = compute(text, [a, b, c][:count], [known] * count, known)
        assert ((found == right) | (np.isnan(found) & np.isnan(right))).all(), name
        exact = (a == 0) | (b == 0) | ~np.isfinite(right)
        assert (np.signbit(found) == np.signbit(right))[exact & ~np.isnan(right)].all(), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("known", [F32, F64], ids=lambda f: f.name)
def test_roots(known, mode, rng):
    a = words_of(np.abs(finite_near(known, rng).view(dtype_of(known.name))))
    found = compute(
        f"sqrt.{mode}.{known.name} $z, $a;",
        [a.view(dtype_of(known.name))],
        [known.name],
        known.name,
    )
    for word, square in zip(words_of(found), a, strict=True):
        exact, root, last = known.value(square), int(word), known.value
        low, high = last(root) ** 2, last(root + 1) ** 2
        if mode == "rn":
            below, above = (last(root - 1) + last(root)) / 2, (last(root) + last(root + 1)) / 2
            assert below**2 <= exact <= above**2
        elif mode == "rp":
            assert last(root - 1) ** 2 < exact <= low
        else:
            assert low <= exact < high


@pytest.mark.parametrize("known", ["f32", "f64"])
def test_reciprocals(known, rng):
    a = rng.standard_normal(COUNT).astype(dtype_of(known))
    assert (compute(f"rcp.rn.{known} $z, $a;", [a], [known], known) == 1 / a).all()


def test_extremes():
    a, b = (g.ravel().astype("f4") for g in np.meshgrid(SPECIAL, SPECIAL))
    low = compute("min.f32 $z, $a, $b;", [a, b], ["f32"] * 2, "f32")
    high = compute("max.f32 $z, $a, $b;", [a, b], ["f32"] * 2, "f32")
    strict = compute("max.NaN.f32 $z, $a, $b;", [a, b], ["f32"] * 2, "f32")
    for place, (one, two) in enumerate(zip(a, b, strict=True)):
        numbers = [v for v in (one, two) if not np.isnan(v)] or [np.float32(np.nan)]
        order = sorted(numbers, key=lambda v: (v, not np.signbit(v)))
        assert np.array_equal(low[place], order[0], equal_nan=True)
        assert np.array_equal(high[place], order[-1], equal_nan=True)
        if not np.isnan(order[0]):
            assert np.signbit(low[place]) == np.signbit(order[0])
            assert np.signbit(high[place]) == np.signbit(order[-1])
    assert (np.isnan(strict) == (np.isnan(a) | np.isnan(b))).all()


def test_flushing_and_saturation():
    a = np.float32([1e-40, -1e-40, 0.25, -3, 7, np.nan, 1.2e-38, 0])
    one = np.ones_like(a)
    flushed = compute("mul.rn.ftz.f32 $z, $a, $b;", [a, one], ["f32"] * 2, "f32")
    assert np.array_equal(flushed[:5], np.float32([0, -0.0, 0.25, -3, 7]))
    assert np.signbit(flushed[1])
    small = compute("mul.rn.ftz.f32 $z, $a, $b;", [a, one / 4], ["f32"] * 2, "f32")
    assert small[6] == 0  # the result is what is small
    clamped = compute("add.rn.sat.f32 $z, $a, $b;", [a, 0 * one], ["f32"] * 2, "f32")
    assert np.array_equal(clamped, np.float32([1e-40, 0, 0.25, 0, 1, 0, 1.2e-38, 0]))


def test_signs_and_kinds():
    a = np.float32([1.5, -0.0, np.inf, np.nan, 1e-40, -2, 3, 0])
    assert np.array_equal(compute("neg.f32 $z, $a;", [a], ["f32"], "f32"), -a, equal_nan=True)
    assert np.array_equal(compute("abs.f32 $z, $a;", [a], ["f32"], "f32"), abs(a), equal_nan=True)
    signs = compute("copysign.f32 $z, $a, $b;", [a, np.full_like(a, 3)], ["f32"] * 2, "f32")
    assert np.array_equal(np.signbit(signs), np.signbit(a))
    kinds = {
        "finite": np.isfinite(a),
        "infinite": np.isinf(a),
        "notanumber": np.isnan(a),
        "number": ~np.isnan(a),
        "subnormal": a == np.float32(1e-40),
        "normal": np.isfinite(a) & (abs(a) > 1e-38),
    }
    for kind, right in kinds.items():
        text = f"testp.{kind}.f32 %p1, $a; selp.u32 $z, 1, 0, %p1;"
        assert np.array_equal(compute(text, [a], ["f32"], "u32"), right), kind


def test_signs_of_packed_halves():
    a = np.uint32([0x80003C00, 0x0001FFFF])
    assert list(compute("neg.bf16x2 $z, $a;", [a], ["b32"], "b32")) == [0x0000BC00, 0x80017FFF]
    assert list(compute("abs.f16x2 $z, $a;", [a], ["b32"], "b32")) == [0x00003C00, 0x00017FFF]


@pytest.mark.parametrize("known", [F16, BF16], ids=lambda f: f.name)
def test_packed_arithmetic_is_that_of_the_halves(known, rng):
    words = [finite_words(known, rng, 2 * COUNT) for _ in range(3)]
    text = f"fma.rn.{known.name}x2 $z, $a, $b, $c;"
    packed = compute(text, [w.view(np.uint32) for w in words], ["b32"] * 3, "b32")
    text = f"fma.rn.{known.name} $z, $a, $b, $c;"
    alone = compute(
        text, [w.view(dtype_of(known.name)) for w in words], [known.name] * 3, known.name
    )
    assert np.array_equal(packed.view(np.uint16), words_of(alone))


# Approximate functions

APPROXIMATE = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: 1 / a,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_are_rounded_and_moved(name, rng):
    a = rng.uniform(0.01, 3, COUNT).astype("f4")
    text = f"{name}.approx.f32 $z, $a;"
    right = APPROXIMATE[name](a.astype("f8")).astype("f4")
    assert np.array_equal(compute(text, [a], ["f32"], "f32"), right)
    unit = np.spacing(abs(right)).astype("f8")
    for ulps in (3, -2):
        moved = compute(text, [a], ["f32"], "f32", ulps=ulps)
        assert np.array_equal(moved, (right + ulps * unit).astype("f4"))
    only = compute(text, [a], ["f32"], "f32", ulps={name: 1})
    assert np.array_equal(only, (right + unit).astype("f4"))
    assert np.array_equal(compute(text, [a], ["f32"], "f32", ulps={"other": 1}), right)
    assert DOCUMENTED_ULPS[name] >= 1


def test_random_errors_stay_within_what_is_asked(rng):
    a = rng.uniform(0.5, 1, COUNT).astype("f4")
    exact = np.exp2(a.astype("f8")).astype("f4")
    text = "ex2.approx.f32 $z, $a;"
    moved = compute(text, [a], ["f32"], "f32", ulps=2, seed=1)
    steps = np.rint((moved - exact) / np.spacing(exact))
    assert set(steps) == {-2, -1, 0, 1, 2}
    assert np.array_equal(moved, compute(text, [a], ["f32"], "f32", ulps=2, seed=1))
    assert not np.array_equal(moved, compute(text, [a], ["f32"], "f32", ulps=2, seed=2))


def test_approximations_of_special_values():
    a = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1, 200])
    for ulps in (0, 5):  # which are exact whatever the error
        power = compute("ex2.approx.f32 $z, $a;", [a], ["f32"], "f32", ulps=ulps)[[2, 3, 4, 7]]
        assert np.array_equal(power, [np.inf, 0, np.nan, np.inf], equal_nan=True)
        root = compute("rsqrt.approx.f32 $z, $a;", [a], ["f32"], "f32", ulps=ulps)[[0, 1, 2, 3, 6]]
        assert np.array_equal(root, [np.inf, -np.inf, 0, np.nan, np.nan], equal_nan=True)
    flushed = compute("rsqrt.approx.ftz.f32 $z, $a;", [a], ["f32"], "f32")
    assert flushed[5] == np.inf


def test_approximate_division(rng):
    a, b = (rng.uniform(0.5, 2, 64).astype("f4") for _ in range(2))
    for kind in ("approx", "full"):
        found = compute(f"div.{kind}.f32 $z, $a, $b;", [a, b], ["f32"] * 2, "f32", ulps=1)
        assert np.array_equal(found, a / b + np.spacing(a / b))


def test_coarse_reciprocals_have_the_upper_word_alone(rng):
    a = rng.uniform(0.1, 9, 64)
    for name, exact in (("rcp", 1 / a), ("rsqrt", 1 / np.sqrt(a))):
        found = compute(f"{name}.approx.ftz.f64 $z, $a;", [a], ["f64"], "f64")
        assert (words_of(found) & 0xFFFF_FFFF == 0).all()
        assert (abs(found / exact - 1) < 2.0**-19).all()


# Conversions

NARROWING = [
    (F64, F32, MODES),
    (F64, F16, MODES),
    (F32, F16, MODES),
    (F32, BF16, ("rn", "rz")),
    (F64, BF16, ("rn",)),
]


@pytest.mark.parametrize(
    ("source", "target", "mode"),
    [(source, target, mode) for source, target, modes in NARROWING for mode in modes],
    ids=lambda value: getattr(value, "name", value),
)
def test_narrower_floats(source, target, mode, rng):
    """Near the target's range, at ties and close to them."""
    middle = finite_words(target, rng, COUNT).astype(np.uint64)
    exact = [target.value(word) for word in middle]
    dtype = dtype_of(source.name)
    with np.errstate(over="ignore"):
        near = np.array([float(value) for value in exact]).astype(dtype)
    steps = rng.integers(-3, 4, COUNT) + rng.integers(0, 2, COUNT) * (
        1 << source.fraction - target.fraction - 1
    )
    words = (words_of(near).astype(np.int64) + steps).astype(np.int64).astype(source.words)
    keep = np.isfinite(words.view(dtype))
    words = np.where(keep, words, words_of(dtype.type(1.0)))
    words = np.append(words[: COUNT // 2], finite_words(source, rng, COUNT // 2))
    text = f"cvt.{mode}.{target.name}.{source.name} $z, $a;"
    found = words_of(compute(text, [words.view(dtype)], [source.name], target.name))
    assert_rounded(target, found, [source.value(word) for word in words], mode, [words])


@pytest.mark.parametrize(
    ("source", "target"), [(F16, F32), (BF16, F32), (F16, F64), (F32, F64)], ids=lambda f: f.name
)
def test_wider_floats_are_exact(source, target, rng):
    words = finite_words(source, rng, COUNT)
    text = f"cvt.{target.name}.{source.name} $z, $a;"
    found = compute(text, [words.view(dtype_of(source.name))], [source.name], target.name)
    assert [target.value(w) for w in words_of(found)] == [source.value(w) for w in words]


@pytest.mark.parametrize("half", [F16, BF16], ids=lambda f: f.name)
def test_pairs_of_halves(half, rng):
    """The first operand is the upper half; NaN is one pattern."""
    a, b = (rng.standard_normal(COUNT).astype("f4") for _ in range(2))
    a[:3] = np.nan, np.inf, -1e30
    text = f"cvt.rn.{half.name}x2.f32 $z, $a, $b;"
    packed = compute(text, [a, b], ["f32"] * 2, "b32").view(np.uint16).reshape(-1, 2)
    single = f"cvt.rn.{half.name}.f32 $z, $a;"
    for column, values in ((1, a), (0, b)):
        alone = words_of(compute(single, [values], ["f32"], half.name))
        assert np.array_equal(packed[:, column], alone)
    negative = compute(f"cvt.rn.relu.{half.name}.f32 $z, $a;", [a], ["f32"], half.name)
    assert ((words_of(negative) == 0) == (a <= 0)).all()
    assert words_of(compute(single, [a], ["f32"], half.name))[0] & 0x7FFF > half.infinity


INTEGERS = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")


@pytest.mark.parametrize("target", [F16, F32, F64, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64", "s16"])
def test_integers_to_floats(source, target, rng):
    limits = np.iinfo(dtype_of(source))
    a = rng.integers(limits.min, limits.max, 512, dtype_of(source), endpoint=True)
    a >>= rng.integers(0, limits.bits, 512).astype(a.dtype)
    a[:3] = limits.max, limits.min, 1
    for mode in ("rn",) if target is BF16 else MODES:
        text = f"cvt.{mode}.{target.name}.{source} $z, $a;"
        found = words_of(compute(text, [a], [source], target.name))
        assert_rounded(target, found, [Fraction(int(v)) for v in a], mode, [words_of(a)])


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("target", ["s32", "u32", "s64", "u64", "s16", "u8"])
def test_floats_to_integers(source, target, rng):
    limits = np.iinfo(dtype_of(target))
    a = rng.uniform(-1.5, 1.5, 512) * 2.0 ** rng.integers(0, limits.bits + 1, 512)
    a = a.astype(dtype_of(source))
    a[:8] = np.nan, np.inf, -np.inf, 0.5, 1.5, -0.5, 2.5, -1.5
    rules = {
        "rni": round,
        "rzi": int,
        "rmi": lambda v: v.__floor__(),
        "rpi": lambda v: v.__ceil__(),
    }
    for mode, rule in rules.items():
        found = compute(f"cvt.{mode}.{target}.{source} $z, $a;", [a], [source], target)
        for value, result in zip(a, found, strict=True):
            if np.isnan(value):
                wide = limits.bits == 64 or source == "f64"
                assert words_of(result)[()] == (1 << limits.bits - 1 if wide else 0)
            elif np.isinf(value):
                assert result == (limits.max if value > 0 else limits.min)
            else:
                right = rule(Fraction(float(value)))
                assert result == min(max(right, limits.min), limits.max), (value, mode)


def test_whole_floats():
    a = np.float32([0.5, 1.5, -0.5, -1.5, 2.25, 1e30, np.inf, np.nan])
    for mode, rule in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        found = compute(f"cvt.{mode}.f32.f32 $z, $a;", [a], ["f32"], "f32")
        assert np.array_equal(found, rule(a), equal_nan=True)
    clamped = compute("cvt.sat.f32.f32 $z, $a;", [a], ["f32"], "f32")
    assert np.array_equal(clamped, np.float32([0.5, 1, 0, 0, 1, 1, 1, 0]))


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_integers_to_integers(source, target, rng):
    limits = np.iinfo(dtype_of(source))
    a = rng.integers(limits.min, limits.max, 256, dtype_of(source), endpoint=True)
    a[:2] = limits.min, limits.max
    found = compute(f"cvt.{target}.{source} $z, $a;", [a], [source], target)
    assert np.array_equal(found, a.astype(dtype_of(target)))
    clamped = compute(f"cvt.sat.{target}.{source} $z, $a;", [a], [source], target)
    goal = np.iinfo(dtype_of(target))
    assert [int(v) for v in clamped] == [min(max(int(v), goal.min), goal.max) for v in a]


def test_comparisons_of_floats():
    a, b = (g.ravel().astype("f4") for g in np.meshgrid(SPECIAL, SPECIAL))
    either = np.isnan(a) | np.isnan(b)
    ordered = {
        "eq": a == b, "ne": (a != b) & ~either, "lt": a < b, "le": a <= b, "gt": a > b,
        "ge": a >= b, "num": ~either, "nan": either,
    }  # fmt: skip
    unordered = {
        f"{name}u": ordered[name] | either for name in ("eq", "ne", "lt", "le", "gt", "ge")
    }
    for name, right in (ordered | unordered).items():
        text = f"setp.{name}.f32 %p1, $a, $b; selp.u32 $z, 1, 0, %p1;"
        assert np.array_equal(compute(text, [a, b], ["f32"] * 2, "u32"), right), name
