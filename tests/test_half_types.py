"""float16 and bfloat16: loaded exactly, computed in float32, rounded once where they are stored.

What holds for every op is tested of all in helpers/calls.py.
"""

import itertools

import numpy as np
import pytest

import fastnorm
from fastnorm import _core, accuracy, reference

from .helpers.arrays import assert_same_bits, guarded, placed
from .helpers.calls import BACKWARD, CALLS, FORWARD, Problem, ops_called
from .helpers.storage import (
    FLOAT32,
    FLOAT64,
    HALVES,
    LIMITS,
    STORAGE,
    cast,
    compute_type,
    rounded,
    special_rows,
)

LENGTHS = (1, 2, 7, 8, 16, 31, 33, 64, 65, 100, 256, 257, 769, 1024, 1025, 2048, 2049, 3001)
halves = pytest.mark.parametrize("half", HALVES, ids=str)
storage = pytest.mark.parametrize("kind", STORAGE, ids=str)


def test_every_op_is_called():
    """The list that these and other tests go over leaves none out."""
    assert ops_called() == set(_core.OPS)


# ---- conversions ---------------------------------------------------------------------------------


def all_numbers(half):
    return np.arange(1 << 16, dtype=np.uint16).view(half).reshape(256, 256)


@halves
@pytest.mark.parametrize("wide", [FLOAT32, FLOAT64], ids=str)
def test_every_number_is_loaded_exactly(isa, half, wide):
    """Through the sum with -0, which changes no number and is of the wider type."""
    x = all_numbers(half)
    nothing = np.full(x.shape, -0.0, wide)
    for view in (x, x[:, ::-1], x.T, np.repeat(x, 3, axis=1)[:, ::3], placed(x, 2), x[:, :-1]):
        residual = nothing[: view.shape[0], : view.shape[1]]
        _, total = fastnorm.add_layer_norm(view, residual)
        assert_same_bits(total, cast(np.ascontiguousarray(view), wide))


def hard_to_round(rng, wide, half):
    """Ties and their neighbours over the range of `half`, its edges, and numbers of any bits."""
    numbers = cast(all_numbers(half).ravel(), FLOAT64)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [np.nextafter(ties.astype(wide), side) for side in (-np.inf, np.inf)]
    largest, _, least = LIMITS[half.name]
    unit = float(accuracy.ulp(largest, half))
    edges = [largest, largest + unit / 2, largest + unit * 0.4999, 2 * largest, least / 2]
    edges = cast([*edges, least * 0.5000001, least / 4, np.inf, 0.0, -0.0], wide)
    any_bits = rng.integers(0, 256, 40_000 * wide.itemsize, np.uint8).view(wide)
    every = np.concatenate([ties.astype(wide), *beside, edges, -edges, any_bits])
    return every[: len(every) // 300 * 300].reshape(-1, 300)


@halves
@pytest.mark.parametrize("wide", [FLOAT32, FLOAT64], ids=str)
def test_stores_round_once_to_nearest_even(isa, half, wide, rng):
    """A constant row is exactly its bias: so every number can be made to be stored."""
    values = hard_to_round(rng, wide, half)
    want = rounded(values, half)
    x = np.ones(values.shape, wide)
    n = values.shape[1]
    got = fastnorm.adaptive_layer_norm(x, np.zeros_like(x), values, n, dtype=half)
    # A sum that begins with 0 has lost the sign of -0.
    assert_same_bits(got + half.type(0), want + half.type(0))
    sparse = np.zeros((len(values), 2 * n), half)
    fastnorm.adaptive_layer_norm(x, np.zeros_like(x), values, n, dtype=half, out=sparse[:, ::2])
    assert_same_bits(np.ascontiguousarray(sparse[:, ::2]), got)
    assert not sparse[:, 1::2].any(), "written between the elements"


@pytest.fixture(params=[True, False], ids=["bf16 instructions", "without"])
def bf16_instructions(request):
    """With the CPU's own rounding to bfloat16, where it has one, and without."""
    used = _core.use_bf16_instructions(request.param)
    if request.param and not used:
        pytest.skip("this CPU lacks AVX512_BF16")
    yield
    _core.use_bf16_instructions(True)


@halves
def test_rows_in_groups_round_once_to_nearest_even(isa, half, rng, bf16_instructions):
    """op_half.h's own stores: numbers below the normal ones, zeros, infinities and NaNs too."""
    values = hard_to_round(rng, FLOAT32, half)
    values[values == 0] = 0  # y is 0 + bias, which is never -0
    x = np.ones((2, values.shape[1]), half)
    for bias, want in zip(values, rounded(values, half), strict=True):
        got = fastnorm.layer_norm(x, values.shape[1], None, bias)
        assert_same_bits(got, np.broadcast_to(want, x.shape))


def test_float64_is_rounded_to_float32_once(isa, rng):
    numbers = rng.integers(0, 1 << 32, 3000, np.uint32).view(FLOAT32)
    numbers = cast(numbers[np.isfinite(numbers)][:2700], FLOAT64)
    ties = (numbers + np.nextafter(cast(numbers, FLOAT32), np.float32(np.inf))) / 2
    for values in (ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf)):
        n = values.size
        got = fastnorm.layer_norm(np.ones((1, n)), n, None, values, dtype="f4")
        assert_same_bits(got[0] + FLOAT32.type(0), cast(values, FLOAT32) + FLOAT32.type(0))


# ---- accuracy ------------------------------------------------------------------------------------


def assert_accurate(y, x, weight, bias, eps=1e-5, offset=0.0, rms=False):
    """Within half an ulp, and what float32 may err by."""
    wide = x.astype(np.float64)
    xh = reference.rms_norm(wide, eps=eps) if rms else reference.layer_norm(wide, eps=eps)
    w = 1.0 if weight is None else weight.astype(np.float64) + offset
    b = 0.0 if bias is None else bias.astype(np.float64)
    # An xh next to 0 is known to digits of the row, not to its own: accuracy.py.
    terms = np.abs(w) * np.maximum(np.abs(xh), 1) + np.abs(b)
    error = accuracy.stored_error(y, xh * w + b, terms)
    assert error <= 1, f"{y.dtype} {x.shape}: {error} of what is allowed"


@halves
@pytest.mark.parametrize("which", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
def test_layer_norm(isa, half, which, rng):
    for n in LENGTHS:
        x = cast(rng.standard_normal((5, n)) + 3, half)
        w, b = (cast(rng.standard_normal(n), half) if has else None for has in which)
        assert_accurate(fastnorm.layer_norm(x, n, w, b), x, w, b)


@halves
def test_rms_norm(isa, half, rng):
    for n in LENGTHS:
        x, w = cast(rng.standard_normal((5, n)) + 1, half), cast(rng.standard_normal(n), half)
        y = fastnorm.rms_norm(x, n, w, 1e-6, offset=1.0)
        assert_accurate(y, x, w, None, 1e-6, offset=1.0, rms=True)


@halves
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_special_rows(half, eps, rng):
    """Subnormal, huge and nearly constant rows, of which no other format would hold the squares."""
    for n in (2, 33, 257, 1025):
        x = special_rows(rng, n, half)
        x = x[np.isfinite(x.astype(np.float64)).all(-1)]
        assert_accurate(fastnorm.layer_norm(x, eps=eps), x, None, None, eps)


def test_a_float16_row_round_300(rng):
    """Its squares are beyond float16."""
    x = (300 + rng.standard_normal((4, 768))).astype(np.float16)
    assert_accurate(fastnorm.layer_norm(x), x, None, None)
    y = fastnorm.rms_norm(x)
    assert np.abs(y.astype(np.float32) - 1).max() < 0.05


@halves
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_backward(isa, half, name, rng):
    forward, backward = getattr(reference, name), getattr(reference, f"{name}_backward")
    for n in (1, 2, 33, 256, 1025, 2049):
        x, dy = cast(rng.standard_normal((2, 9, n)) + 1, half)
        w = cast(rng.standard_normal(n), half)
        stats = getattr(fastnorm, name)(x, return_stats=True)[1:]
        got = getattr(fastnorm, f"{name}_backward")(dy, x, n, *stats, w)
        wide, dy_wide, w_wide = (a.astype(np.float64) for a in (x, dy, w))
        eps = {} if name == "layer_norm" else {"eps": float(np.finfo("f4").eps)}
        xh, *exact_stats = forward(wide, return_stats=True, **eps)
        exact = backward(dy_wide, wide, n, *exact_stats, w_wide)
        terms = exact_stats[-1][:, None] * np.abs(dy_wide * w_wide).max(-1, keepdims=True)
        assert got[0].dtype == half
        assert accuracy.stored_error(got[0], exact[0], np.broadcast_to(terms, x.shape)) <= 1
        magnitudes = (np.abs(dy_wide) * np.maximum(1, np.abs(xh))).sum(0)
        assert got[1].dtype == FLOAT32
        assert accuracy.sum_error(got[1], exact[1], magnitudes) <= accuracy.bound(half)


# ---- the float32 result, rounded once ------------------------------------------------------------

# Where the sum is rounded to a half type before it is normalised, more than y is rounded.
UNROUNDED = {"add_layer_norm": 1, "add_rms_norm": 1, "adaptive_layer_norm gate": 1}
FROM_STORED = ("add_layer_norm_backward", "add_rms_norm_backward", "from output")


@halves
@pytest.mark.parametrize("name", FORWARD)
def test_forward_is_that_of_float32_rounded(half, name, rng):
    options = {"round_sum": False} if name in UNROUNDED else {}
    for n in (1, 5, 64, 300, 1025, 2049):
        p = Problem(rng, n, half)
        got = FORWARD[name](p, **options)
        want = FORWARD[name](p.converted(FLOAT32), **options)
        arrays = 1 + UNROUNDED.get(name, 0)
        rounds = tuple(rounded(a, half) for a in want[:arrays])
        assert_same_bits(got, rounds + want[arrays:], f"{n=}")


@halves
@pytest.mark.parametrize("name", [n for n in BACKWARD if not n.endswith(FROM_STORED)])
def test_backward_is_that_of_float32_rounded(half, name, rng):
    for n in (1, 5, 64, 300, 1025, 2049):
        p = Problem(rng, n, half)
        got, (dx, *sums) = BACKWARD[name](p), BACKWARD[name](p.converted(FLOAT32))
        assert_same_bits(got, (rounded(dx, half), *sums), f"{n=}")


@halves
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activations_are_rounded_once(isa, half, activation, rng):
    for n in (7, 64, 1030):
        p = Problem(rng, n, half)
        got = FORWARD["layer_norm"](p, activation=activation)
        y, *stats = FORWARD["layer_norm"](p.converted(FLOAT32), activation=activation)
        assert_same_bits(got, (rounded(y, half), *stats))


# ---- instruction sets and threads ----------------------------------------------------------------


@storage
@pytest.mark.parametrize("n", [1, 7, 16, 33, 64, 129, 256, 1024, 1025, 2049])
def test_instruction_sets(isa, kind, n, rng):
    """Of every op and type; of layer_norm and float32 there is more in test_bits.py."""
    p = Problem(rng, n, kind)
    got = {name: call(p) for name, call in CALLS.items()}
    _core.select_isa(_core.isa_names()[-1])
    for name, call in CALLS.items():
        assert_same_bits(got[name], call(p), name)


@storage
@pytest.mark.parametrize("n", [3, 65, 1025])
def test_partitions(kind, n, rng, partition):
    """dweight and dbias too: 2 x 9 x 3 rows are more blocks than one."""
    p = Problem(rng, n, kind, tokens=9)
    want = {name: call(p) for name, call in CALLS.items()}
    for parts in (2, 3, 7):
        partition(parts)
        for name, call in CALLS.items():
            assert_same_bits(call(p), want[name], f"{name}, {parts} parts")


@halves
def test_a_row_alone(half, rng):
    for n in (5, 64, 257, 1030):
        x = special_rows(rng, n, half)
        w, b = cast(rng.standard_normal((2, n)), half)
        want = fastnorm.layer_norm(x, n, w, b, return_stats=True)
        for r in range(len(x)):
            got = fastnorm.layer_norm(x[r], n, w, b, return_stats=True)
            assert_same_bits(got, tuple(a[r] for a in want), f"row {r}")


# ---- types of parameters and results -------------------------------------------------------------


@storage
def test_parameters_of_any_type(kind, rng):
    """They are converted to the type that is computed in, and promote nothing."""
    x = cast(rng.standard_normal((6, 70)), kind)
    computed = compute_type(kind)
    integers = [np.dtype("i2"), np.dtype("u1"), np.dtype(bool)]
    for w_type, b_type in itertools.product([*STORAGE, *integers], STORAGE):
        w = cast(rng.standard_normal(70) * 3, w_type)
        b = cast(rng.standard_normal(70), b_type)
        got = fastnorm.layer_norm(x, 70, w, b, return_stats=True)
        want = fastnorm.layer_norm(x, 70, cast(w, computed), cast(b, computed), return_stats=True)
        assert_same_bits(got, want, f"weight {w_type}, bias {b_type}")
        assert (got[0].dtype, got[1].dtype) == (kind, computed)
        _, mean, rstd = want
        got = fastnorm.layer_norm_backward(x, x, 70, mean, rstd, w, b)
        want = fastnorm.layer_norm_backward(
            x, x, 70, mean, rstd, cast(w, computed), cast(b, computed)
        )
        assert_same_bits(got, want, f"backward, weight {w_type}")


@storage
def test_parameters_of_every_row_of_any_type(kind, rng):
    """Those of samples and heads are converted as they are read."""
    x = cast(rng.standard_normal((2, 5, 3, 40)), kind)
    computed = compute_type(kind)
    for other in STORAGE:
        w, b = cast(rng.standard_normal((2, 3, 40)), other)
        got = fastnorm.layer_norm(x, 40, w, b)
        assert_same_bits(got, fastnorm.layer_norm(x, 40, cast(w, computed), cast(b, computed)))
        s, t = cast(rng.standard_normal((2, 2, 40)), other)
        got = fastnorm.adaptive_layer_norm(x, s, t)
        want = fastnorm.adaptive_layer_norm(x, cast(s, computed), cast(t, computed))
        assert_same_bits(got, want)


@pytest.mark.parametrize("kind", [k for k in STORAGE if k != FLOAT64], ids=str)
def test_one_row_of_parameters_with_axes_of_length_1(isa, kind, rng):
    """Where rows lie side by side, too."""
    for rows in (1, 9, 70, 200):
        x = cast(rng.standard_normal((rows, 40)), kind)
        w, b = cast(rng.standard_normal((2, 1, 40)), np.float16)
        want = fastnorm.layer_norm(x, 40, w[0], b[0])
        assert_same_bits(fastnorm.layer_norm(x, 40, w, b), want)
        assert_same_bits(fastnorm.layer_norm(np.asfortranarray(x), 40, w, b), want)
        want = fastnorm.rms_norm(x, 40, w[0], offset=1.0)
        assert_same_bits(fastnorm.rms_norm(np.asfortranarray(x), 40, w, offset=1.0), want)


@storage
@pytest.mark.parametrize("result", STORAGE, ids=str)
def test_result_types(isa, kind, result, rng):
    """dtype= takes what was computed and rounds it, once."""
    for n in (3, 64, 257, 1030):
        p = Problem(rng, n, kind)
        computed = compute_type(kind)
        for name in ("layer_norm", "layer_norm axis=1", "rms_norm", "layer_norm mask",
                     "segment_layer_norm", "layer_norm lengths"):  # fmt: skip
            y, *stats = FORWARD[name](p, dtype=computed)
            got = FORWARD[name](p, dtype=result)
            assert_same_bits(got, (rounded(y, result), *stats), name)
        out = np.empty(p.x.shape, result)
        got = FORWARD["layer_norm"](p, dtype=result, out=out)
        assert got[0] is out
        assert_same_bits(got, FORWARD["layer_norm"](p, dtype=result))


@halves
def test_names_of_result_types(half, rng):
    x = rng.standard_normal((3, 8)).astype(np.float32)
    want = fastnorm.layer_norm(x, dtype=half)
    assert_same_bits(fastnorm.layer_norm(x, dtype=half.name), want)
    assert_same_bits(fastnorm.layer_norm(x, dtype=half.type), want)


@halves
def test_gradients_of_another_type(half, rng):
    """dy is converted; dx has x's type."""
    x = cast(rng.standard_normal((5, 33)), half)
    _, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
    for other in STORAGE:
        dy = cast(rng.standard_normal((5, 33)), other)
        got = fastnorm.layer_norm_backward(dy, x, 33, mean, rstd)
        want = fastnorm.layer_norm_backward(cast(dy, FLOAT32), x, 33, mean, rstd)
        assert_same_bits(got, want)


# ---- the edges of the range ----------------------------------------------------------------------


@halves
def test_overflow_and_underflow_of_the_result(isa, half, rng):
    """What the type cannot hold is infinite, or a subnormal number, or 0."""
    largest, tiny, _ = LIMITS[half.name]
    x = cast(rng.standard_normal((9, 100)), half)
    for size in (largest, tiny, tiny / 200):
        weight = cast(np.full(100, size), FLOAT32)
        y32 = fastnorm.layer_norm(x.astype(FLOAT32), 100, weight)
        got = fastnorm.layer_norm(x, 100, weight)
        assert_same_bits(got, rounded(y32, half))
    assert (got != 0).any()
    assert (np.abs(got.astype(FLOAT64)) < tiny).all()


@halves
def test_overflow_of_the_sum(half):
    largest = LIMITS[half.name][0]
    x = np.full((2, 6), largest, half)
    x[1] = 1
    y, total = fastnorm.add_layer_norm(x, x)
    assert np.isinf(total[0].astype(FLOAT32)).all()
    assert np.isnan(y[0].astype(FLOAT32)).all()
    assert_same_bits(y[1], np.zeros(6, half))
    if half == np.float16:  # float32 holds the sum
        y, _ = fastnorm.add_layer_norm(x, x, round_sum=False)
        assert_same_bits(y, np.zeros((2, 6), half))


@halves
def test_poisoned_rows(half, rng):
    for n in (5, 64, 1030):
        x = cast(rng.standard_normal((9, n)), half)
        clean = fastnorm.layer_norm(x)
        x[2, n // 2], x[5, 0], x[8, -1] = np.nan, np.inf, -np.inf
        y = fastnorm.layer_norm(x)
        assert np.isnan(y[[2, 5, 8]].astype(FLOAT32)).all()
        others = [0, 1, 3, 4, 6, 7]
        assert_same_bits(y[others], clean[others])


@halves
def test_a_constant_row_is_exactly_bias(isa, half, rng):
    bias = cast(rng.standard_normal(1234), half)
    for value in (0.3, 1.1, LIMITS[half.name][0], LIMITS[half.name][2]):
        for eps in (1e-5, 0.0):
            y = fastnorm.layer_norm(np.full((5, 1234), value, half), 1234, None, bias, eps)
            assert_same_bits(y, np.broadcast_to(bias, (5, 1234)).copy())


# ---- places --------------------------------------------------------------------------------------


@halves
def test_alignment_and_what_lies_beside(isa, half, rng):
    for n in (1, 5, 17, 33, 129):
        x = cast(rng.standard_normal((9, n)), half)
        want = fastnorm.layer_norm(x)
        for offset in range(0, 64, 6):
            assert_same_bits(fastnorm.layer_norm(placed(x, offset)), want)
            with guarded(x.shape, half, offset) as out:
                fastnorm.layer_norm(x, out=out)
                assert_same_bits(np.array(out), want)


@halves
def test_in_place(isa, half, rng):
    for n, rows in itertools.product((1, 16, 65, 1024, 1025, 2049), (1, 4, 9)):
        x = special_rows(rng, n, half)[:rows]
        want = fastnorm.layer_norm(x, return_stats=True)
        got = fastnorm.layer_norm(x, out=x, return_stats=True)
        assert got[0] is x
        assert_same_bits(got, want, f"{rows} rows of {n}")


# ---- large calls ---------------------------------------------------------------------------------


@storage
def test_large_calls(kind, rng):
    """Threads, and the ways that only large calls take, change no bit."""
    x, residual = cast(rng.standard_normal((2, 2000, 770)), kind)
    first = slice(700, 703)
    for other in STORAGE:
        w = cast(rng.standard_normal(770), other)
        want = None
        for threads in (1, 2, 3):
            with fastnorm.num_threads(threads):
                y, mean, rstd = fastnorm.layer_norm(x, 770, w, w, return_stats=True)
                grads = fastnorm.layer_norm_backward(residual, x, 770, mean, rstd, w)
                rms = fastnorm.rms_norm(x, 770, w, offset=1.0)
                sums = fastnorm.add_rms_norm(x, residual, 770, w, offset=1.0)
                int8 = fastnorm.layer_norm(x, 770, w, dtype="i1")
            results = (y, mean, rstd, *grads, rms, *sums, *int8)
            want = want or results
            assert_same_bits(results, want, f"{threads} threads, weight {other}")
        assert_same_bits(fastnorm.layer_norm(x[first], 770, w, w), y[first])
        assert_same_bits(fastnorm.rms_norm(x[first], 770, w, offset=1.0), rms[first])
        assert_same_bits(fastnorm.layer_norm(x[first], 770, w, dtype="i1")[0], int8[0][first])
        few = fastnorm.layer_norm_backward(
            residual[first], x[first], 770, mean[first], rstd[first], w
        )
        assert_same_bits(few[0], grads[0][first])
