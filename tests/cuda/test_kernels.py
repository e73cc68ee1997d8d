"""The kernels themselves, as compiled PTX that the interpreter runs, against float64."""

import importlib.util

import numpy as np
import pytest

from fastnorm import reference
from fastnorm.cuda import compiler, plan

if importlib.util.find_spec("ml_dtypes") is None:
    pytest.skip("ml_dtypes is not installed", allow_module_level=True)
if why := compiler.available():
    pytest.skip(why, allow_module_level=True)

from .running import DTYPES, Call

TYPES = ("float32", "float16", "bfloat16", "float64")
#: Half a unit of the last place, relative to a number.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}
COMPUTED = {"float32": 1e-6, "float64": 2e-15}
#: One of each layout: lanes of a warp, a warp, blocks, wide rows; odd widths move less at a time.
WIDTHS = (1, 3, 8, 100, 257, 768, 1024, 4096, 4100)


def row_arrays(rng, rows, cols, kind, mean=0.0, scale=1.0):
    x = (rng.standard_normal((rows, cols)) * scale + mean).astype(DTYPES[kind])
    weight = rng.standard_normal((1, cols)).astype(np.float32)
    bias = rng.standard_normal((1, cols)).astype(np.float32)
    return x, weight, bias


def forward_call(x, weight=None, bias=None, out=None, **options):
    kind = out or x.dtype.name
    arrays = {"x": x, "weight": weight, "bias": bias, "y": np.zeros(x.shape, DTYPES[kind])}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    if options.pop("stats", False):
        compute = np.dtype(plan.compute_type(x.dtype.name))
        arrays |= {"mean": np.zeros(len(x), compute), "rstd": np.zeros(len(x), compute)}
    return Call(arrays, **options)


def run_forward(call, rms=False, **options):
    """y, and the statistics of each launch."""
    planned = call.plan(plan.forward, rms=rms, **options)
    outputs = [name for name in ("y", "sum", "mean", "rstd") if name in call.arrays]
    return call.run(planned, outputs)


def assert_close(got, want, x_kind, scale=None):
    """Within the rounding of what is stored, and that of what is computed in."""
    compute = plan.compute_type(x_kind)
    wide, kind = got.astype(np.float64), got.dtype.name
    scale = np.maximum(1, np.abs(want).max(initial=0)) if scale is None else scale
    bound = ROUNDING[kind] * np.abs(want) * 1.0001 + COMPUTED[compute] * scale
    bound += 2.0**-25 if kind == "float16" else 0  # its subnormal numbers
    off = np.abs(wide - want) - bound
    assert (off <= 0).all(), f"off by {off.max():g} more than the {bound.max():g} there is"


# ---- forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("cols", WIDTHS)
def test_layer_norm(kind, cols, rng):
    x, weight, bias = row_arrays(rng, 5, cols, kind)
    got, stats = run_forward(forward_call(x, weight, bias))
    wide = x.astype(np.float64)
    want = reference.layer_norm(wide, cols, weight[0].astype(float), bias[0].astype(float))
    assert_close(got["y"], want, kind)
    assert_read_and_written_once(stats, x, "x", "y")


def assert_read_and_written_once(stats, x, *names):
    """Each element once; where a row divides by 16 bytes, by 16 bytes at a time."""
    row_bytes = x.shape[1] * x.itemsize
    for name in names:
        traffic = stats[0][name]
        moved = traffic.loads if name == "x" else traffic.stores
        assert sum(width * count for width, count in moved.items()) == x.nbytes, (name, moved)
        if row_bytes % 16 == 0:
            assert set(moved) == {16}, (name, moved)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("cols", [64, 768])
def test_rms_norm(kind, cols, rng):
    x, weight, _ = row_arrays(rng, 6, cols, kind)
    got, _ = run_forward(forward_call(x, weight), rms=True)
    want = reference.rms_norm(x.astype(np.float64), cols, weight[0].astype(float), 1e-5)
    assert_close(got["y"], want, kind)


def test_wide_rows(rng):
    """Of more than 128 KB: read twice."""
    x, weight, bias = row_arrays(rng, 2, 40_000, "float32", mean=3.0)
    got, stats = run_forward(forward_call(x, weight, bias))
    want = reference.layer_norm(x.astype(float), 40_000, weight[0].astype(float),
                                bias[0].astype(float))  # fmt: skip
    assert_close(got["y"], want, "float32")
    assert stats[0]["y"].stored == x.nbytes
    assert stats[0]["x"].loaded <= 2.5 * x.nbytes


@pytest.mark.parametrize("cols", [100, 1024])
@pytest.mark.parametrize("mean", [1e3, 1e6])
def test_means_far_from_zero(cols, mean, rng):
    """The mean rounded to float32 is off by 0.03 standard deviations at 1e6; y must not be."""
    x, _, _ = row_arrays(rng, 4, cols, "float32", mean=mean)
    got, _ = run_forward(forward_call(x))
    assert_close(got["y"], reference.layer_norm(x.astype(float), cols), "float32")


@pytest.mark.parametrize("cols", [100, 1024])
@pytest.mark.parametrize("scale", [1e38, 3e-39, 1e-30, 1e20])
def test_rows_whose_squares_leave_the_range(cols, scale, rng):
    x, _, _ = row_arrays(rng, 4, cols, "float32")
    x = (x / np.abs(x).max() * np.float32(3) * scale).astype(np.float32)
    got, _ = run_forward(forward_call(x), rms=False)
    with np.errstate(all="ignore"):
        want = reference.layer_norm(x.astype(float), cols)
    assert_close(got["y"], want, "float32")


def test_constant_rows_are_the_bias(rng):
    _, weight, bias = row_arrays(rng, 1, 768, "float32")
    x = np.repeat(np.float32([[0], [1], [-1e30], [1e-40]]), 768, axis=1)
    got, _ = run_forward(forward_call(x, weight, bias))
    np.testing.assert_array_equal(got["y"], np.broadcast_to(bias, x.shape))


@pytest.mark.parametrize("cols", [100, 1024])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_with_what_is_not_finite_is_nan_and_its_neighbours_are_not(cols, bad, rng):
    x, _, _ = row_arrays(rng, 5, cols, "float32")
    x[2, 7] = bad
    got, _ = run_forward(forward_call(x))
    assert np.isnan(got["y"][2]).all()
    assert np.isfinite(np.delete(got["y"], 2, axis=0)).all()


@pytest.mark.parametrize("cols", [96, 768, 4096])
def test_bits_do_not_depend_on_the_batch(cols, rng):
    x, weight, bias = row_arrays(rng, 9, cols, "float32")
    all_rows, _ = run_forward(forward_call(x, weight, bias))
    again, _ = run_forward(forward_call(x, weight, bias))
    alone, _ = run_forward(forward_call(x[4:5], weight, bias))
    assert all_rows["y"].tobytes() == again["y"].tobytes()
    assert all_rows["y"][4].tobytes() == alone["y"][0].tobytes()


@pytest.mark.parametrize(("misalign", "stride"), [(4, 770), (8, 770), (0, 772)])
def test_rows_that_lie_badly(misalign, stride, rng):
    x, weight, bias = row_arrays(rng, 5, 768, "float32")
    call = forward_call(x, weight, bias, misalign=misalign, strides={"x": stride, "y": stride + 2})
    got, _ = run_forward(call)
    want = reference.layer_norm(x.astype(float), 768, weight[0].astype(float),
                                bias[0].astype(float))  # fmt: skip
    assert_close(got["y"], want, "float32")


def test_statistics(rng):
    x, _, _ = row_arrays(rng, 7, 768, "float32", mean=5.0)
    got, _ = run_forward(forward_call(x, stats=True), return_stats=True)
    wide = x.astype(float)
    np.testing.assert_allclose(got["mean"], wide.mean(1), rtol=1e-6)
    np.testing.assert_allclose(got["rstd"], 1 / np.sqrt(wide.var(1) + 1e-5), rtol=1e-6)


@pytest.mark.parametrize(("x_kind", "y_kind"), [("float32", "bfloat16"), ("float16", "float32")])
def test_a_result_of_another_type(x_kind, y_kind, rng):
    x, weight, bias = row_arrays(rng, 3, 512, x_kind)
    got, _ = run_forward(forward_call(x, weight, bias, out=y_kind))
    want = reference.layer_norm(x.astype(float), 512, weight[0].astype(float),
                                bias[0].astype(float))  # fmt: skip
    assert got["y"].dtype == DTYPES[y_kind]
    assert_close(got["y"], want, x_kind)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activations(activation, rng):
    x, weight, bias = row_arrays(rng, 3, 256, "float32")
    got, _ = run_forward(forward_call(x, weight, bias), activation=activation)
    want = reference.layer_norm(x.astype(float), 256, weight[0].astype(float),
                                bias[0].astype(float), activation=activation)  # fmt: skip
    assert_close(got["y"], want, "float32", scale=4 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_residual_and_its_sum(kind, rng):
    x, weight, bias = row_arrays(rng, 4, 768, kind)
    residual = rng.standard_normal(x.shape).astype(x.dtype)
    arrays = {"x": x, "residual": residual, "weight": weight, "bias": bias,
              "y": np.zeros_like(x), "sum": np.zeros_like(x)}  # fmt: skip
    got, stats = run_forward(Call(arrays), round_sum=True)
    total = (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)
    assert got["sum"].tobytes() == total.tobytes()
    want = reference.layer_norm(total.astype(float), 768, weight[0].astype(float),
                                bias[0].astype(float))  # fmt: skip
    assert_close(got["y"], want, kind)
    assert stats[0]["residual"].loaded == x.nbytes
    assert stats[0]["sum"].stored == x.nbytes


# ---- backward -----------------------------------------------------------------------------------


def gradients(x, dy, weight, rms=False, sums=("dweight", "dbias"), **options):
    """dx and the sums from the plan's kernels, and in float64."""
    cols, compute = x.shape[1], np.dtype(plan.compute_type(x.dtype.name))
    wide = x.astype(np.float64)
    mean = np.zeros(len(x)) if rms else wide.mean(1)
    rstd = 1 / np.sqrt(np.square(wide - mean[:, None]).mean(1) + 1e-5)
    arrays = {"dy": dy, "x": x, "weight": weight, "mean": mean.astype(compute),
              "rstd": rstd.astype(compute), "dx": np.zeros_like(x)}  # fmt: skip
    if rms:
        del arrays["mean"]
    arrays |= {name: np.zeros((1, cols), compute) for name in sums}
    call = Call(arrays)
    planned = call.plan(plan.backward, rms=rms)
    got, stats = call.run(planned, ["dx", *sums], **options)
    return got, wanted(wide, dy.astype(float), weight[0].astype(float), mean, rstd, rms), stats


def wanted(x, dy, weight, mean, rstd, rms):
    xh = (x - mean[:, None]) * rstd[:, None]
    g = dy * weight
    dx = g - xh * (g * xh).mean(1, keepdims=True)
    if not rms:
        dx -= g.mean(1, keepdims=True)
    return {"dx": dx * rstd[:, None], "dweight": (dy * xh).sum(0), "dbias": dy.sum(0)}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("cols", [8, 100, 768, 2048])
def test_layer_norm_backward(kind, cols, rng):
    x, weight, _ = row_arrays(rng, 37, cols, kind)
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    got, want, stats = gradients(x, dy, weight)
    assert_close(got["dx"], want["dx"], kind, scale=4 * max(1, np.abs(want["dx"]).max()))
    for name in ("dweight", "dbias"):
        scale = np.sqrt(len(x)) * 8 * max(1, np.abs(want[name]).max())
        assert_close(got[name][0], want[name], kind, scale=scale)
    for name in ("x", "dy"):
        assert stats[0][name].loaded == x.nbytes, name
        if x.shape[1] * x.itemsize % 16 == 0:
            assert set(stats[0][name].loads) == {16}
    assert stats[0]["dx"].stored == x.nbytes


def test_rms_norm_backward(rng):
    x, weight, _ = row_arrays(rng, 20, 768, "float32")
    dy = rng.standard_normal(x.shape).astype(np.float32)
    got, want, _ = gradients(x, dy, weight, rms=True, sums=("dweight",))
    assert_close(got["dx"], want["dx"], "float32", scale=8)
    assert_close(got["dweight"][0], want["dweight"], "float32", scale=100)


def test_backward_of_wide_rows_goes_by_two_passes(rng):
    x, weight, _ = row_arrays(rng, 9, 20_000, "float32")
    dy = rng.standard_normal(x.shape).astype(np.float32)
    got, want, _ = gradients(x, dy, weight)
    assert_close(got["dx"], want["dx"], "float32", scale=8)
    assert_close(got["dweight"][0], want["dweight"], "float32", scale=100)
    assert_close(got["dbias"][0], want["dbias"], "float32", scale=100)


def test_backward_from_a_mean_that_was_rounded(rng):
    """At 1e6 standard deviations from 0 the saved mean is off by 0.03 of them."""
    x, weight, _ = row_arrays(rng, 6, 512, "float32", mean=1e6)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    got, want, _ = gradients(x, dy, weight)
    assert_close(got["dx"], want["dx"], "float32", scale=8)


@pytest.mark.parametrize("cols", [100, 1024])
def test_gradients_repeat_bit_for_bit(cols, rng):
    x, weight, _ = row_arrays(rng, 70, cols, "float32")
    dy = rng.standard_normal(x.shape).astype(np.float32)
    first, _, _ = gradients(x, dy, weight)
    second, _, _ = gradients(x, dy, weight)
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes()
