"""The backward kernels' PTX, executed by the interpreter: against float64, to the bit on repeat,
and what it moves."""

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
pytest.importorskip("numba.cuda", reason="numba, which compiles the kernels, is not installed")

from fastnorm.cuda import compiler, plan

from .running import BFLOAT16, F2, F4, F8, WIDE, Call, assert_near, compute_type, random

if compiler.available():
    pytest.skip(compiler.available(), allow_module_level=True)

EPS = 1e-5


def backward_call(
    x, dy=None, rms=False, parameters=None, outputs=("dx", "dweight", "dbias"), groups=None,
    **layout,
):  # fmt: skip
    """A call on the statistics that a forward call returns."""
    compute = compute_type(x.dtype)
    wide = x.astype(WIDE)
    mean = 0 * wide[:, :1] if rms else wide.mean(1, keepdims=True)
    rstd = 1 / np.sqrt(((wide - mean) ** 2).mean(1, keepdims=True) + EPS)
    count, cols = (groups or (1, 1))[1], x.shape[1]
    arrays = {"dy": random(x.shape, dy or x.dtype, 3), "x": x}
    arrays["weight"] = random((count, cols), parameters or x.dtype, 1)
    arrays["rstd"] = rstd[:, 0].astype(compute)
    if not rms:
        arrays["mean"] = mean[:, 0].astype(compute)
    for name in outputs:
        if name == "dx":
            arrays[name] = np.zeros(x.shape, x.dtype)
        elif not (rms and name == "dbias"):
            arrays[name] = np.zeros((count, cols), compute)
    own = dict.fromkeys(("weight", "dweight", "dbias"), groups) if groups else {}
    return Call(arrays, steps={k: v for k, v in own.items() if k in arrays}, **layout)


def run_backward(call, rms=False, **options):
    groups = call.steps.get("weight", (1, 1))
    planned = call.plan(plan.backward, rms=rms, groups=groups, **options)
    outputs = [name for name in ("dx", "dweight", "dbias") if name in call.arrays]
    got, stats = call.run(planned, outputs)
    return got, stats, [step.spec for step in planned.steps]


def check_backward(x, rms=False, offset=0.0, **more):
    call = backward_call(x, rms=rms, **more)
    call.numbers["offset"] = offset
    got, stats, specs = run_backward(call, rms, offset=offset != 0)
    arrays = call.arrays
    precise = 1e-13 if compute_type(x.dtype) == F8 else 1e-6
    wide, dy = x.astype(WIDE), arrays["dy"].astype(WIDE)
    div, mod = call.steps.get("weight", (1, 1))
    group = np.arange(len(x)) // div % mod
    g = dy * (arrays["weight"].astype(WIDE)[group] + offset)
    mean = 0 * wide[:, :1] if rms else wide.mean(1, keepdims=True)
    rstd = 1 / np.sqrt(((wide - mean) ** 2).mean(1, keepdims=True) + WIDE(EPS))
    xh = (wide - mean) * rstd
    dx = rstd * (
        g - (0 if rms else g.mean(1, keepdims=True)) - xh * (g * xh).mean(1, keepdims=True)
    )
    if "dx" in got:
        assert_near(got["dx"], dx, precise, rstd * np.abs(g).max(1, keepdims=True))
    for name, terms in (("dweight", dy * xh), ("dbias", dy)):
        if name in got:
            want, size = np.zeros(got[name].shape, WIDE), np.zeros(got[name].shape, WIDE)
            np.add.at(want, group, terms)
            np.add.at(size, group, np.maximum(np.abs(terms), np.abs(dy)))
            assert_near(got[name], want, precise, size)
    return got, stats, specs


@pytest.mark.parametrize("cols", [3, 128, 1001, 2048])
def test_backward_widths(cols):
    _, _, specs = check_backward(random((70, cols), F4))
    assert specs[0].kernel == "backward"


@pytest.mark.parametrize("dtype", [F2, BFLOAT16, F8], ids=str)
def test_backward_types(dtype):
    for rows in (1, 70):
        check_backward(random((rows, 256), dtype))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_backward_reads_each_element_once(rms):
    """Up to 8,192 columns of 16 bits; weights come from the cache."""
    x = random((5, 8192), BFLOAT16)
    _, stats, specs = check_backward(x, rms)
    main = stats[0]
    assert main["x"].loads == main["dy"].loads == main["dx"].stores == {16: x.nbytes // 16}
    assert main["local"].loaded == main["local"].stored == 0
    partials = "dweight_partials" if len(specs) > 1 else "dweight"
    assert set(main[partials].stores) == {16}


@pytest.mark.parametrize(
    ("dtype", "cols", "times"), [(BFLOAT16, 16384, 1), (F4, 20000, 2)], ids=str
)
def test_backward_of_wide_rows(dtype, cols, times):
    """dx by one pass that reads rows once or twice, gradients of parameters by another."""
    x = random((20, cols), dtype)
    _, stats, specs = check_backward(x)
    assert [spec.kernel for spec in specs][:2] == [
        "backward" if times == 1 else "backward_wide", "backward_columns",
    ]  # fmt: skip
    assert stats[0]["x"].loads == stats[0]["dy"].loads == {16: times * x.nbytes // 16}
    assert stats[1]["x"].loads == stats[1]["dy"].loads == {16: x.nbytes // 16}


def test_backward_of_large_means():
    check_backward((random((20, 256), F8) + 1e6).astype(F4))


@pytest.mark.parametrize("groups", [(3, 2), (1, 24), (12, 2)], ids=str)
def test_gradients_of_groups(groups):
    check_backward(random((24, 256), F4), groups=groups, offset=1.0)


def test_gradients_of_groups_of_wide_rows():
    check_backward(random((24, 9000), F4), groups=(3, 2))


def test_a_gradient_of_the_sum():
    call = backward_call(random((9, 256), BFLOAT16), parameters=F4)
    call.arrays["dsum"] = random((9, 256), BFLOAT16, 8)
    got, *_ = run_backward(call)
    plain, *_ = run_backward(backward_call(random((9, 256), BFLOAT16), parameters=F4))
    want = plain["dx"].astype(F4) + call.arrays["dsum"].astype(F4)
    assert got["dx"].tobytes() == want.astype(BFLOAT16).tobytes()


@pytest.mark.parametrize("outputs", [("dx",), ("dweight",), ("dbias",)], ids=str)
def test_one_gradient(outputs):
    got, *_ = check_backward(random((9, 256), F4), outputs=outputs)
    assert tuple(got) == outputs


def test_rows_of_no_spread_and_rows_that_are_not_finite():
    x = random((6, 256), F4)
    x[1], x[2, 3] = 7, np.nan
    call = backward_call(x, outputs=("dx",))
    call.arrays["rstd"][1] = np.inf  # of eps 0
    got, *_ = run_backward(call)
    assert (got["dx"][1] == 0).all()
    assert np.isnan(got["dx"][2]).all()
    assert np.isfinite(got["dx"][[0, 3, 4, 5]]).all()


def test_gradients_have_the_same_bits_on_repeat():
    x = random((70, 256), BFLOAT16)
    first, second = (run_backward(backward_call(x))[0] for _ in range(2))
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes()
    alone = run_backward(backward_call(x[3:4], outputs=("dx",)))
    many = run_backward(backward_call(x, outputs=("dx",)))
    assert alone[2] == many[2]


@pytest.mark.parametrize("width", [2, 4, 8])
def test_backward_of_narrow_accesses(width):
    x = random((5, 256), BFLOAT16)
    _, stats, _ = check_backward(x, misalign=width)
    assert set(stats[0]["x"].loads) == {width}
