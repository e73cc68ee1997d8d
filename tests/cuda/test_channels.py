"""Batch, group and instance norm on device arrays: whole calls, acted out by the PTX interpreter,
and what cannot be done, said by name."""

import inspect

import numpy as np
import pytest

import fastnorm

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
pytest.importorskip("numba.cuda", reason="numba, which compiles the kernels, is not installed")

from fastnorm import cuda
from fastnorm.cuda import compiler, ops
from fastnorm.cuda.signatures import CHANNELS

from . import acted, channel_calls, libraries
from .channel_calls import DEFAULTS
from .libraries import BFLOAT16, Tensor, host, placed

if compiler.available():
    pytest.skip(compiler.available(), allow_module_level=True)

EPS = DEFAULTS["eps"]
N, C, S = 3, 4, (2, 6)


@pytest.fixture(autouse=True)
def stage(monkeypatch, driver, layouts):
    libraries.install(monkeypatch)
    stage = acted.Stage(driver, layouts)
    yield stage
    if stage.failure:
        raise stage.failure


def call(op, **given):
    """The op by its arguments' names, ndarrays placed in device memory; ndarrays come back."""
    result = channel_calls.call(op, **{name: on_device(value) for name, value in given.items()})
    parts = result if isinstance(result, tuple) else (result,)
    return [None if part is None else host(part) for part in parts]


def on_device(value):
    return Tensor(placed(value)) if isinstance(value, np.ndarray) else value


def made(*shape, seed=0, dtype=np.float32):
    return (np.random.default_rng(seed).standard_normal(shape) + 0.25).astype(dtype)


def near(got, want, dtype=np.float32, scale=1.0):
    assert got.dtype == dtype
    assert got.shape == np.shape(want)
    allowed = {2: 2.0**-8, 4: 1e-6, 8: 1e-12}[got.dtype.itemsize] * scale
    error = np.abs(got.astype(float) - want)
    assert (error <= allowed * np.maximum(1, np.abs(want))).all(), error.max()


def normalized(x, axes, eps=EPS):
    x = x.astype(float)
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    rstd = 1 / np.sqrt(var + eps)
    return (x - mean) * rstd, mean, rstd


def gradient(dy, xh, rstd, axes):
    return rstd * (dy - dy.mean(axes, keepdims=True) - xh * (dy * xh).mean(axes, keepdims=True))


def by_channel(parameter, ndim=4):
    return parameter.astype(float).reshape(*parameter.shape, *[1] * (ndim - 2))


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["f4", "bf16"])
def test_group_norm(dtype):
    x, dy, w, b = made(N, C, *S, dtype=dtype), made(N, C, *S, seed=1, dtype=dtype), made(C), made(C)
    y, mean, rstd = call("group_norm", x=x, num_groups=2, weight=w, bias=b, return_stats=True)
    xh, m, r = normalized(x.reshape(N, 2, -1), 2)
    xh = xh.reshape(x.shape)
    near(y, xh * by_channel(w) + by_channel(b), dtype)
    near(mean, m[..., 0])
    near(rstd, r[..., 0])
    dx, dw, db = call("group_norm_backward", dy=dy, x=x, num_groups=2, mean=mean, rstd=rstd,
                      weight=w, bias=b)  # fmt: skip
    wide = dy.astype(float)
    g = (wide * by_channel(w)).reshape(N, 2, -1)
    near(dx, gradient(g, xh.reshape(N, 2, -1), r, 2).reshape(x.shape), dtype, 2)
    near(dw, (wide * xh).sum((0, 2, 3)), scale=10)
    near(db, wide.sum((0, 2, 3)), scale=10)


def test_group_norm_of_channels_that_come_last():
    x, dy, w = made(N, 5, 4, 8), made(N, 5, 4, 8, seed=1), made(8)
    y, mean, rstd = call("group_norm", x=x, num_groups=2, weight=w, channel_axis=-1,
                         return_stats=True, activation="relu")  # fmt: skip
    xh, m, r = normalized(x.reshape(N, 20, 2, 4), (1, 3))
    near(y, np.maximum(xh.reshape(x.shape) * w, 0))
    near(mean, m[:, 0, :, 0])
    dx, dw, db = call("group_norm_backward", dy=dy, x=x, num_groups=2, mean=mean, rstd=rstd,
                      weight=w, channel_axis=3)  # fmt: skip
    g = (dy.astype(float) * w).reshape(N, 20, 2, 4)
    near(dx, gradient(g, xh, r, (1, 3)).reshape(x.shape), scale=3)
    near(dw, (dy * xh.reshape(x.shape)).sum((0, 1, 2)), scale=10)
    near(db, dy.astype(float).sum((0, 1, 2)), scale=10)


def test_groups_of_samples_without_more_axes():
    x, w = made(N, 12), made(12)
    (y,) = call("group_norm", x=x, num_groups=3, weight=w)
    near(y, normalized(x.reshape(N, 3, 4), 2)[0].reshape(N, 12) * w)


@pytest.mark.parametrize("pairs", [False, True], ids=["shared", "pairs"])
def test_instance_norm(pairs):
    x, w = made(N, C, *S), made(*((N, C) if pairs else (C,)))
    running = [made(C), made(C) ** 2]
    arrays = [on_device(array.copy()) for array in running]
    y, mean, rstd = call("instance_norm", x=x, weight=w, running_mean=arrays[0],
                         running_var=arrays[1], return_stats=True)  # fmt: skip
    xh, _, r = normalized(x, (2, 3))
    near(y, xh * by_channel(w))
    batch = x.astype(float).mean((0, 2, 3)), x.astype(float).var((2, 3), ddof=1).mean(0)
    for got, old, new in zip(arrays, running, batch, strict=True):
        near(host(got), 0.9 * old + 0.1 * new)
    dy = made(N, C, *S, seed=1)
    dx, dw, _ = call("instance_norm_backward", dy=dy, x=x, mean=mean, rstd=rstd, weight=w)
    near(dx, gradient(dy * by_channel(w), xh, r, (2, 3)), scale=3)
    near(dw, (dy * xh).sum((2, 3) if pairs else (0, 2, 3)), scale=10)
    (y,) = call("instance_norm", x=x, use_input_stats=False, running_mean=running[0],
                running_var=running[1])  # fmt: skip
    near(y, (x - by_channel(running[0])) / np.sqrt(by_channel(running[1]) + EPS), scale=3)


BATCHES = {"first": ((N, C, *S), 1, (0, 2, 3)), "last": ((N, 5, 4, 8), -1, (0, 1, 2)),
           "none": ((70, 6), 1, (0,))}  # fmt: skip


@pytest.mark.parametrize("case", BATCHES)
def test_batch_norm(case):
    shape, axis, axes = BATCHES[case]
    x, dy = made(*shape), made(*shape, seed=1)
    count, form = shape[axis], [1] * len(shape)
    form[axis] = count
    w, b = made(count), made(count, seed=2)
    xh, m, r = normalized(x, axes)
    for dialect in ("torch", "flax") if case == "none" else ("torch",):
        running = [on_device(made(count)), on_device(made(count) ** 2)]
        y, mean, rstd = call(
            "batch_norm", x=x, weight=w, bias=b, running_mean=running[0], running_var=running[1],
            training=True, dialect=dialect, channel_axis=axis, return_stats=True,
        )  # fmt: skip
        near(y, xh * w.reshape(form) + b.reshape(form))
        near(mean, m.ravel(), np.float64, 1e6)
        torch = dialect == "torch"
        keep, ddof = (0.9, 1) if torch else (0.1, 0)
        wide = x.astype(float)
        near(host(running[0]), keep * made(count) + (1 - keep) * wide.mean(axes))
        near(host(running[1]), keep * made(count) ** 2 + (1 - keep) * wide.var(axes, ddof=ddof))
    dx, dw, db = call("batch_norm_backward", dy=dy, x=x, weight=w, mean=mean,
                      rstd=rstd, training=True, channel_axis=axis)  # fmt: skip
    near(dx, gradient(dy * w.reshape(form).astype(float), xh, r, axes), scale=3)
    near(dw, (dy * xh).sum(axes), scale=10)
    near(db, dy.astype(float).sum(axes), scale=10)


def test_batch_norm_in_inference():
    x, rm, rv, w = made(N, C, *S), made(C), made(C) ** 2, made(C)
    want = (x - by_channel(rm)) / np.sqrt(by_channel(rv) + EPS) * by_channel(w)
    into = on_device(x)
    rest = {"running_mean": on_device(rm), "running_var": on_device(rv), "weight": on_device(w)}
    assert channel_calls.call("batch_norm", x=into, out=into, **rest) is into
    near(host(into), want, scale=3)
    dy = made(N, C, *S, seed=1)
    dx, dw, db = call("batch_norm_backward", dy=dy, x=x, running_mean=rm, running_var=rv, weight=w,
                      output_mask=(True, False, False))  # fmt: skip
    near(dx, dy * by_channel(w) / np.sqrt(by_channel(rv) + EPS), scale=3)
    assert dw is db is None


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0)])
def test_no_elements(shape):
    x, running = np.zeros(shape, np.float32), on_device(made(4))
    y, mean, rstd = call("batch_norm", x=x, running_mean=running, training=True,
                         return_stats=True)  # fmt: skip
    assert y.shape == shape
    assert (mean == 0).all()
    assert np.isnan(rstd).all()
    assert (host(running) == made(4)).all()
    y, mean, rstd = call("group_norm", x=x, num_groups=2, return_stats=True)
    assert mean.shape == (shape[0], 2)
    assert np.isnan(rstd).all()
    _, dw, _ = call("group_norm_backward", dy=y, x=x, num_groups=2, mean=mean, rstd=rstd)
    assert (dw == 0).all()


# ---- calls ---------------------------------------------------------------------------------------


def test_signatures_are_those_of_the_public_functions():
    for op, names in CHANNELS.items():
        function = getattr(fastnorm, op, None)
        if function is not None:
            assert tuple(inspect.signature(function).parameters) == names


def test_kept_calls(monkeypatch):
    given = {"x": made(N, C, *S), "num_groups": 2, "weight": made(C), "bias": made(C)}
    kept = cuda.op("group_norm")
    call("group_norm", **given)
    before = len(kept)
    monkeypatch.setattr(ops, "checked", None)
    call("group_norm", **given)
    assert len(kept) == before
    with pytest.raises(TypeError):
        call("group_norm", **given | {"eps": 1e-3})


def test_explain(driver):
    given = {"x": made(N, C, *S), "num_groups": 2}
    values = DEFAULTS | given
    said = cuda.explain("group_norm", {name: on_device(values.get(name)) for name in
                                       CHANNELS["group_norm"]})  # fmt: skip
    assert driver.launches() == []
    assert (said["rows"], said["cols"], said["dtype"]) == (6, 24, "float32")


# ---- modules -------------------------------------------------------------------------------------

MODULES = {
    "group": lambda: fastnorm.GroupNorm(2, C),
    "batch": lambda: fastnorm.BatchNorm(C, 1e-3, momentum=0.25, dialect="keras"),
    "instance": lambda: fastnorm.InstanceNorm(C, affine=True),
    "instance, tracked": lambda: fastnorm.InstanceNorm(C, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize(("kind", "training"), [
    *((kind, True) for kind in MODULES), ("batch", False), ("instance, tracked", False),
])  # fmt: skip
def test_modules(kind, training, monkeypatch):
    """Results, gradients and running statistics are those of the same module on the host."""
    monkeypatch.setattr(Tensor, "cpu", host, raising=False)
    x, dy = made(N, C, *S), made(N, C, *S, seed=1)
    ours, theirs = MODULES[kind](), MODULES[kind]()
    for norm in (ours, theirs):
        norm.weight, norm.bias = made(C, seed=2), made(C, seed=3)
        if hasattr(norm, "train"):
            norm(made(N, C, *S, seed=4))  # so that running statistics are no ones and zeros
            norm.train(training)
    y, saved = ours.forward(on_device(x))
    dx, grads = ours.backward(on_device(dy), saved)
    want, saved = theirs.forward(x)
    want_dx, want_grads = theirs.backward(dy, saved)
    near(host(y), want)
    near(host(dx), want_dx, scale=3)
    for name, grad in grads.items():
        near(host(grad), want_grads[name], scale=10)
    near(host(ours(on_device(x))), theirs(x))
    for name, array in ours.state_dict().items():
        near(array, theirs.state_dict()[name], array.dtype)


# ---- errors --------------------------------------------------------------------------------------

X = {"x": made(N, C, *S)}
GROUPS = X | {"num_groups": 2}
TRAINING = X | {"training": True, "running_mean": made(C), "running_var": made(C)}
ERRORS = {
    "axis of samples": ("group_norm", ValueError, "channel_axis", GROUPS | {"channel_axis": 0}),
    "no such axis": ("batch_norm", ValueError, "channel_axis", TRAINING | {"channel_axis": 4}),
    "axis between": ("group_norm", ValueError, "channel_axis", GROUPS | {"channel_axis": 2}),
    "divisor": ("group_norm", ValueError, "num_groups", GROUPS | {"num_groups": 3}),
    "no number": ("group_norm", TypeError, "num_groups", GROUPS | {"num_groups": 2.5}),
    "weight": ("group_norm", ValueError, "weight", GROUPS | {"weight": made(3)}),
    "pairs": ("instance_norm", ValueError, "bias", X | {"weight": made(N, C), "bias": made(C)}),
    "statistics": ("batch_norm", TypeError, "running_mean", X),
    "shape of them": ("batch_norm", ValueError, "running_var", TRAINING | {"running_var": made(3)}),
    "dialect": ("batch_norm", ValueError, "dialect", TRAINING | {"dialect": "jax"}),
    "momentum": ("batch_norm", ValueError, "momentum", TRAINING | {"momentum": np.inf}),
    "eps": ("batch_norm", ValueError, "eps", TRAINING | {"eps": -1.0}),
    "out": ("batch_norm", ValueError, "out", TRAINING | {"out": made(N, C)}),
    "x": ("batch_norm", ValueError, "x", TRAINING | {"x": made(4)}),
    "mean": ("group_norm_backward", ValueError, "mean", GROUPS | {
        "dy": made(N, C, *S), "mean": made(N, C), "rstd": made(N, 2)}),
    "type of mean": ("batch_norm_backward", TypeError, "mean", X | {
        "dy": made(N, C, *S), "mean": made(C), "rstd": made(C), "training": True}),
    "rstd": ("batch_norm_backward", TypeError, "rstd", X | {
        "dy": made(N, C, *S), "mean": made(C, dtype=np.float64), "training": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, driver):
    op, exception, name, given = ERRORS[case]
    with pytest.raises(exception) as caught:
        call(op, **given)
    assert str(caught.value).startswith(f"{name}: got "), caught.value
    assert "wanted" in str(caught.value)
    assert driver.launches() == []


def test_arrays_that_are_not_in_one_piece():
    x = Tensor(placed(made(N, C, *S)).transpose(0, 1, 3, 2))
    with pytest.raises(ValueError, match=r"^x: got .*contiguous"):
        call("group_norm", x=x, num_groups=2)


def test_running_statistics_that_lie_in_one_array():
    both = placed(made(2 * C))
    given = X | {"running_mean": Tensor(both[:C]), "running_var": Tensor(both[1 : C + 1])}
    with pytest.raises(ValueError, match=r"^running_mean: got .* overlaps running_var"):
        call("batch_norm", training=True, **given)
