"""The forward kernels' PTX, executed by the interpreter: against float64, to the bit on repeat,
and what it moves."""

import math

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
pytest.importorskip("numba.cuda", reason="numba, which compiles the kernels, is not installed")

from fastnorm.cuda import compiler, plan

from .running import BFLOAT16, F2, F4, F8, WIDE, Call, assert_near, compute_type, random

if compiler.available():
    pytest.skip(compiler.available(), allow_module_level=True)

EPS = 1e-5


# ---- forward ------------------------------------------------------------------------------------


def forward_call(x, rms=False, y=None, parameters=None, eps=EPS, **layout):
    """A call that asks for all results."""
    rows, cols = x.shape
    arrays = {"x": x, "weight": random(cols, parameters or x.dtype, 1)}
    if not rms:
        arrays["bias"] = random(cols, parameters or x.dtype, 2)
    arrays["y"] = np.zeros(x.shape, y or x.dtype)
    for name in ("rstd",) if rms else ("mean", "rstd"):
        arrays[name] = np.zeros(rows, compute_type(x.dtype))
    return Call(arrays, numbers={"eps": eps}, **layout)


def run_forward(call, rms=False, **options):
    planned = call.plan(plan.forward, rms=rms, return_stats=True, **options)
    outputs = [name for name in ("y", "sum", "mean", "rstd") if name in call.arrays]
    got, stats = call.run(planned, outputs)
    return got, stats[0], planned.steps[0].spec


def wanted_forward(call, rms=False):
    """y, mean and rstd in longdouble; a row that holds what is not finite is all NaN."""
    x = call.arrays["x"].astype(WIDE)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = 0 * x[:, :1] if rms else x.mean(1, keepdims=True)
        variance = ((x - mean) ** 2).mean(1, keepdims=True)
        rstd = 1 / np.sqrt(variance + WIDE(call.numbers["eps"]))
        xh = np.where(x == mean, 0 * x, (x - mean) * rstd)
        y = xh * call.arrays["weight"].astype(WIDE)
        if not rms:
            y = y + call.arrays["bias"].astype(WIDE)
    lost = ~np.isfinite(x).all(1)
    y[lost], mean[lost], rstd[lost] = np.nan, np.nan, np.nan
    return y, mean[:, 0], rstd[:, 0]


def check_forward(x, rms=False, **more):
    call = forward_call(x, rms, **more)
    got, traffic, spec = run_forward(call, rms)
    y, mean, rstd = wanted_forward(call, rms)
    precise = 1e-14 if compute_type(x.dtype) == F8 else 1e-6
    assert_near(got["y"], y, precise)
    np.testing.assert_allclose(got["rstd"].astype(WIDE), rstd, rtol=precise)
    if not rms:
        spread = np.where(np.isfinite(mean), np.abs(mean) + 1 / rstd, 1)
        assert_near(got["mean"], mean, precise, terms=spread)
    return got, traffic, spec


@pytest.mark.parametrize("cols", [1, 3, 100, 256, 1024, 1001, 2304])
def test_forward_widths(cols):
    check_forward(random((9, cols), F4))


@pytest.mark.parametrize("dtype", [F2, BFLOAT16, F8], ids=str)
def test_forward_types(dtype):
    for rows in (1, 70):
        check_forward(random((rows, 256), dtype))


@pytest.mark.parametrize(("dtype", "cols"), [(F4, 16384), (BFLOAT16, 32768)], ids=str)
def test_forward_of_64_KB_reads_each_element_once(dtype, cols):
    x = random((2, cols), dtype)
    _, traffic, spec = check_forward(x)
    assert spec.kernel == "forward"
    assert traffic["x"].loads == traffic["y"].stores == {16: x.nbytes // 16}
    assert traffic["weight"].loads == {16: x.nbytes // 16}
    assert traffic["local"].loaded == 0


@pytest.mark.parametrize(("dtype", "cols"), [(F4, 34000), (BFLOAT16, 40000)], ids=str)
def test_wide_rows_are_read_twice(dtype, cols):
    """And their first columns once more, for the pivot."""
    x = random((2, cols), dtype)
    x[1] += 100
    _, traffic, spec = check_forward(x)
    assert spec.kernel == "forward_wide"
    first = 1024 * 4 * 16 * 2
    assert traffic["x"].loads == {16: (2 * x.nbytes + first) // 16}
    assert traffic["y"].stores == {16: x.nbytes // 16}


def hard_rows(cols, dtype=F4):
    """Rows whose sums leave the range of float32, or whose mean hides their spread."""
    x = random((12, cols), F8, 7)
    x[1] += 1e6
    x[2] = x[2] * 1e-3 + 1e4
    x[3] *= 5e37
    x[4] *= 1e-30
    x[5] = 1234.567
    x[6] *= 1e20
    x[7, cols // 2] = np.nan
    x[8, cols // 2] = np.inf
    x[9] *= 1e-40
    x[10] = 3e38
    x[11, : cols // 2] -= 1e7
    return x.astype(dtype)


@pytest.mark.parametrize(
    ("cols", "rms"), [(256, False), (2304, False), (34000, False), (256, True), (34000, True)]
)
def test_hard_rows(cols, rms):
    x = hard_rows(cols)
    call = forward_call(x, rms)
    got, *_ = run_forward(call, rms)
    y, *_ = wanted_forward(call, rms)
    assert_near(got["y"], y)
    assert np.isnan(got["y"][7:9]).all()
    if not rms:
        for row in (5, 10):
            assert (got["y"][row] == call.arrays["bias"]).all()


def test_hard_rows_of_bfloat16():
    """Which stay as they came, and are scaled as such; the sum of two, too."""
    x = hard_rows(256, BFLOAT16)
    call = forward_call(x)
    got, *_ = run_forward(call)
    y, *_ = wanted_forward(call)
    assert_near(got["y"], y)
    call.arrays |= {"residual": np.zeros_like(x), "sum": np.zeros_like(x)}
    again, *_ = run_forward(call, round_sum=True)
    assert_near(again["y"], y)
    np.testing.assert_array_equal(again["sum"].astype(F4), x.astype(F4))


def test_hard_rows_without_eps():
    for scale in (1e-30, 1e-38, 1.0, 3e37):
        check_forward((random((4, 256), F8) * scale).astype(F4), eps=0.0)
    call = forward_call(np.full((2, 256), 0.1, F4), eps=0.0)
    got, *_ = run_forward(call)
    assert (got["y"] == call.arrays["bias"]).all()
    assert np.isposinf(got["rstd"]).all()


def test_a_rescued_row_leaves_its_neighbours_alone():
    x = hard_rows(256)
    whole = run_forward(forward_call(x))[0]
    for i in range(len(x)):
        alone = run_forward(forward_call(x[i : i + 1]))[0]
        for name in ("y", "mean", "rstd"):
            assert alone[name].tobytes() == whole[name][i : i + 1].tobytes()


def test_bits_do_not_depend_on_the_batch():
    x = random((300, 256), F4)
    whole = run_forward(forward_call(x))[0]["y"]
    assert whole.tobytes() == run_forward(forward_call(x))[0]["y"].tobytes()
    for rows in (1, 7, 299):
        assert run_forward(forward_call(x[-rows:]))[0]["y"].tobytes() == whole[-rows:].tobytes()


@pytest.mark.parametrize("case", ["misaligned", "padded", "reversed", "odd distance"])
def test_forward_layouts(case):
    layout = {
        "misaligned": {"misalign": 4},
        "padded": {"strides": {"x": 264}},
        "reversed": {"strides": {"y": 512}},
        "odd distance": {"strides": {"x": 257, "y": 259}},
    }[case]
    x = random((5, 256), F4)
    _, traffic, spec = check_forward(x, **layout)
    assert spec.access == {"misaligned": 4, "odd distance": 4}.get(case, 16)
    assert traffic["x"].loads == {spec.access: x.nbytes // spec.access}


def test_mixed_types():
    check_forward(random((5, 256), BFLOAT16), y=F4, parameters=F8)
    check_forward(random((5, 256), F4), y=F2, parameters=BFLOAT16)


ACTIVATIONS = {
    "relu": lambda v: np.maximum(v, 0),
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: v / 2 * np.vectorize(lambda u: math.erfc(-u))(v.astype(float) / 2**0.5),
    "gelu_tanh": lambda v: v / (1 + np.exp(-1.5957691216057308 * v * (1 + 0.044715 * v * v))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    x = random((4, 256), F4)
    x[0, :8] *= 30
    call = forward_call(x)
    call.arrays["weight"] *= np.float32(3)
    got, *_ = run_forward(call, activation=activation)
    y, *_ = wanted_forward(call)
    assert_near(got["y"], ACTIVATIONS[activation](y))


def sum_call(cols, dtype=BFLOAT16, rows=6, own=False, aliased=False):
    """x*gate + linear_bias + residual, gate one a pair of rows."""
    call = forward_call(random((rows, cols), dtype))
    arrays = call.arrays
    arrays["residual"] = random((rows, cols), dtype, 3)
    arrays["linear_bias"] = random(cols, dtype, 4)
    arrays["gate"] = random((rows // 2, cols), dtype, 5)
    arrays["sum"] = np.zeros((rows, cols), dtype)
    call.steps["gate"] = (2, rows // 2)
    if own:
        arrays["weight"] = random((rows, cols), dtype, 6)
        call.steps["weight"] = (1, rows)
        arrays["bias"] = random((3, cols), dtype, 7)
        call.steps["bias"] = (1, 3)
    return call


@pytest.mark.parametrize("cols", [256, 40000])
@pytest.mark.parametrize("round_sum", [False, True])
def test_sums(cols, round_sum):
    """Every step rounded to float32, as the CPU has it; the sum is exact to the bit."""
    call = sum_call(cols, own=cols == 256)
    a = {name: array.astype(F4) for name, array in call.arrays.items()}
    rows = np.arange(6)
    total = (a["x"] * a["gate"][rows // 2] + a["linear_bias"]) + a["residual"]
    got, *_ = run_forward(call, round_sum=round_sum)
    rounded = total.astype(BFLOAT16)
    assert got["sum"].tobytes() == rounded.tobytes()
    seen = (rounded if round_sum else total).astype(WIDE)
    mean = seen.mean(1, keepdims=True)
    xh = (seen - mean) / np.sqrt(seen.var(1, keepdims=True) + EPS)
    w, b = (
        a[name][rows % len(a[name])] if a[name].ndim == 2 else a[name]
        for name in ("weight", "bias")
    )
    assert_near(got["y"], xh * w.astype(WIDE) + b.astype(WIDE))


def test_rounding_before_the_weight_and_offset():
    call = forward_call(random((4, 256), BFLOAT16), rms=True)
    call.numbers["offset"] = 1.0
    got, *_ = run_forward(call, rms=True, round_before_weight=True, offset=True)
    x, w = call.arrays["x"].astype(WIDE), call.arrays["weight"].astype(WIDE)
    xh = (x / np.sqrt((x**2).mean(1, keepdims=True) + EPS)).astype(F4).astype(BFLOAT16)
    assert_near(got["y"], xh.astype(WIDE) * (w + 1))


# ---- what is empty ------------------------------------------------------------------------------


def test_nothing_to_sum():
    call = Call({"x": np.zeros((3, 0), F4), "y": np.zeros((3, 0), F4), "mean": np.ones(3, F4),
                 "rstd": np.ones(3, F4)})  # fmt: skip
    planned = plan.forward(3, 0, call.types, alignment=16, rms=False, return_stats=True)
    got, _ = call.run(planned, ["mean", "rstd"])
    assert (got["mean"] == 0).all()
    assert np.isnan(got["rstd"]).all()


# ---- the interpreter's approximate functions ----------------------------------------------------


@pytest.mark.parametrize("ulps", [-2, 2])
def test_errors_of_approximate_instructions_do_not_count(ulps):
    """1/sqrt and 1/n are refined, so a device's own rounding of the first guess is no matter."""
    call = forward_call(random((9, 256), F4))
    planned = call.plan(plan.forward, rms=False, return_stats=True)
    got, _ = call.run(planned, ["y"], ulps={"rsqrt": ulps, "rcp": ulps})
    assert_near(got["y"], wanted_forward(call)[0])
    assert got["y"].dtype.name == "float32"
