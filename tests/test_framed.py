"""The nearly straight path: calls that _core checks by itself, and sends down as dispatch.py would.

What they give is right by other tests; here, that both ways give the same bits, and that such calls
take the short one.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest

import fastnorm
from fastnorm import _core, dispatch

from .helpers.arrays import assert_same_bits

X = (2, 6, 5, 8)
KINDS = ("f4", "f8", "f2", ml_dtypes.bfloat16)


def layouts(rng, kind):
    """Arrays of shape X, lying in all sorts of ways."""
    big = rng.standard_normal((4, 7, 10, 16)).astype(kind)
    yield "contiguous", np.ascontiguousarray(big[:2, :6, :5, :8])
    yield "part", big[:2, 1:, :5, :8]
    yield "steps", big[::2, :6, ::2, ::2]
    yield "backwards", big[1::-1, 5::-1, 4::-1, 7::-1]
    yield "fortran", np.asfortranarray(big[:2, :6, :5, :8])
    yield "broadcast", np.broadcast_to(big[:1, :1, :5, :8], X)


@pytest.fixture(autouse=True)
def _known_bfloat16():
    """_core learns ml_dtypes' type when it is first used."""
    fastnorm.layer_norm(np.ones(3, ml_dtypes.bfloat16))


@pytest.fixture
def short():
    """A way to call an op that fails where the call goes through dispatch.py."""

    def call(name, *args, **kwargs):
        def refuse(*_):
            raise AssertionError(f"{name} took the long way")

        _core.register(name, refuse)
        try:
            return getattr(fastnorm, name)(*args, **kwargs)
        finally:
            _core.register(name, dispatch.handlers[name])

    return call


def long_layer_norm(
    x, shape, w, b, eps, *, axis=None, out=None, dtype=None, stats=False, activation=None
):
    return dispatch.handlers["layer_norm"](
        x, shape, w, b, eps, axis, out, dtype, stats, activation, None, None
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: np.dtype(k).name)
def test_layer_norm_in_any_layout_along_any_axis(kind, rng, short):
    for (name, x), axis in itertools.product(layouts(rng, kind), (None, 0, 1, 2, -3, 3)):
        n = X[-1 if axis is None else axis]
        w, b = rng.standard_normal((2, n)).astype(kind)
        for params in ((None, None), (w, b), (w.astype("f8"), None)):
            got = short("layer_norm", x, None, *params, axis=axis, return_stats=True)
            want = long_layer_norm(x, None, *params, 1e-5, axis=axis, stats=True)
            assert_same_bits(got, want, f"{name} {axis}")


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu", "gelu_tanh"])
def test_result_types_and_activations(activation, rng, short):
    x = rng.standard_normal((4, 33)).astype("f4")
    w, b = rng.standard_normal((2, 33)).astype("f4")
    for dtype, stats in itertools.product((np.float16, "f4", np.dtype("f8"), np.int8), (0, 1)):
        kind = np.dtype(dtype) if dtype == "f4" else dtype
        got = short(
            "layer_norm", x, 33, w, b, dtype=kind, activation=activation, return_stats=bool(stats)
        )
        want = long_layer_norm(
            x, 33, w, b, 1e-5, dtype=kind, stats=bool(stats), activation=activation
        )
        assert_same_bits(got, want, f"{dtype} {stats}")


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: np.dtype(k).name)
def test_rms_norm(kind, rng, short):
    for (name, x), axis in itertools.product(layouts(rng, kind), (None, 1)):
        w = rng.standard_normal(X[axis or 3]).astype(kind)
        for offset, rounds in itertools.product((0.0, 1.0), (False, True)):
            got = short(
                "rms_norm", x, None, w, axis=axis, offset=offset, round_before_weight=rounds,
                activation="silu", return_stats=True,
            )  # fmt: skip
            want = dispatch.handlers["rms_norm"](
                x, None, w, None, axis, None, None, offset, rounds, True, "silu", None, None
            )
            assert_same_bits(got, want, f"{name} {axis} {offset} {rounds}")


def test_parameters_of_their_own_for_each_head(rng, short):
    x = rng.standard_normal((3, 5, 2, 8)).astype("f2")
    for shape in ((2, 8), (5, 1, 8), (1, 8), (3, 1, 2, 8)):
        w, b = rng.standard_normal((2, *shape)).astype("f4")
        got = short("layer_norm", x, 8, w, b, activation="relu")
        assert_same_bits(got, long_layer_norm(x, 8, w, b, 1e-5, activation="relu"), str(shape))


@pytest.mark.parametrize("lead", [(3,), (3, 4), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: np.dtype(k).name)
def test_adaptive_layer_norm(kind, lead, rng, monkeypatch):
    x = rng.standard_normal((*lead, 9)).astype(kind)
    parameters = rng.standard_normal((2, 3, 9)).astype(kind)
    rows = rng.standard_normal((2, 9)).astype(kind)
    handle = dispatch.handlers["adaptive_layer_norm"]

    def refuse(*_):
        raise AssertionError("adaptive_layer_norm took the long way")

    monkeypatch.setitem(dispatch.handlers, "adaptive_layer_norm", refuse)
    for (scale, shift), stats in itertools.product((parameters, rows, (rows[0], None)), (0, 1)):
        got = fastnorm.adaptive_layer_norm(x, scale, shift, return_stats=bool(stats))
        want = handle(
            x, scale, shift, None, 1e-6, None, None, None, None, None, True, bool(stats), None
        )
        assert_same_bits(got, want)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: np.dtype(k).name)
@pytest.mark.parametrize("axis", [None, 1, 0, -1])
def test_backward(kind, axis, rng, short):
    for (name, x), (_, dy) in zip(layouts(rng, kind), layouts(rng, kind), strict=True):
        w, b = rng.standard_normal((2, X[-1 if axis is None else axis])).astype(kind)
        shape = None if axis is not None else 8
        _, mean, rstd = fastnorm.layer_norm(x, shape, axis=axis, return_stats=True)
        kept = [np.expand_dims(s, -1 if axis is None else axis) for s in (mean, rstd)]
        for mask in ((True, True, True), (False, True, False), (True, False, False)):
            want = dispatch.handlers["layer_norm_backward"](
                dy, x, shape, mean, rstd, w, b, axis, mask, False, None, None
            )
            for stats in ((mean, rstd), kept):
                got = short(
                    "layer_norm_backward", dy, x, shape, *stats, w, b, axis=axis, output_mask=mask
                )
                assert [g is None for g in got] == [not m for m in mask]
                for a, c in zip(got, want, strict=True):
                    if a is not None:
                        assert_same_bits(a, c, f"{name} {mask}")
        got = short("rms_norm_backward", dy, x, shape, rstd, w, axis=axis, offset=1.0)
        want = dispatch.handlers["rms_norm_backward"](
            dy, x, shape, rstd, w, axis, 1.0, (True, True), False, None, None
        )
        assert_same_bits(got, want, name)


def test_outputs(rng, short):
    x = rng.standard_normal(X).astype("f4")
    want = fastnorm.layer_norm(x, axis=1, activation="relu")
    for out in (np.empty_like(x), x):
        assert short("layer_norm", x, axis=1, activation="relu", out=out) is out
        assert_same_bits(out, want)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activations_after_norms_of_channels(activation, dtype, rng, monkeypatch):
    from fastnorm import channels

    x = rng.standard_normal((2, 6, 5, 7)).astype(dtype)
    w, b, mean = rng.standard_normal((3, 6)).astype(dtype)
    var = np.array([0.5, 1, 2, 3, 4, 5], dtype)
    rest = (None, None, False, activation)  # out, dtype, return_stats
    calls = {
        "group_norm": ((x, 3), (x, 3, w, b, 1e-5, 1, *rest), {}),
        "instance_norm": (
            (x, None, None), (x, None, None, w, b, True, 0.1, 1e-5, 1, "torch", *rest), {}
        ),
        "batch_norm": (
            (x, mean, var), (x, mean, var, w, b, False, 0.1, 1e-5, 1, "torch", *rest), {}
        ),
        "batch_norm in training": (
            (x, None, None), (x, None, None, w, b, True, 0.1, 1e-5, 1, "torch", *rest),
            {"training": True},
        ),
    }  # fmt: skip
    handlers = dict(channels.handlers)

    def refuse(*_):
        raise AssertionError("took the long way")

    for name, (given, all_given, options) in calls.items():
        op = name.split()[0]
        with monkeypatch.context() as patch:
            patch.setitem(channels.handlers, op, refuse)
            got = getattr(fastnorm, op)(*given, w, b, activation=activation, **options)
        assert_same_bits(got, handlers[op](*all_given), name)


def test_units_out_of_range_before_an_activation(rng):
    """They are put right first; the activation comes after."""
    x = rng.standard_normal((2, 4, 6)).astype("f4")
    x[1, 2] *= np.float32(1e30)
    want = np.maximum(fastnorm.group_norm(x, 2), 0)
    assert_same_bits(fastnorm.group_norm(x, 2, activation="relu"), want)
    far = np.float32(x)
    got = fastnorm.group_norm(far, 2, activation="relu", out=far)
    assert got is far
    assert_same_bits(far, want)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: np.dtype(k).name)
def test_masks_lengths_and_moments(kind, rng, short):
    for (name, x), axis in itertools.product(layouts(rng, kind), (None, 1)):
        n = X[-1 if axis is None else axis]
        lead = tuple(length for d, length in enumerate(X) if d != (3 if axis is None else axis))
        mask = rng.random(X) < 0.6
        lengths = rng.integers(0, n + 1, lead)
        for given in ({"mask": mask}, {"mask": mask.T.copy().T}, {"lengths": lengths}):
            got = short("layer_norm", x, axis=axis, **given)
            want = dispatch.handlers["layer_norm"](
                x, None, None, None, 1e-5, axis, None, None, False, None,
                given.get("lengths"), given.get("mask"),
            )  # fmt: skip
            assert_same_bits(got, want, f"{name} {axis} {given.keys()}")
        assert_same_bits(
            short("moments", x, axis), dispatch.handlers["moments"](x, axis), f"{name} {axis}"
        )


@pytest.mark.parametrize("wrong", [-1, 9, 1 << 62])
def test_wrong_lengths_are_an_error_still(wrong, rng):
    x = rng.standard_normal((2, 8)).astype("f4")
    with pytest.raises(ValueError, match="lengths: got values from"):
        fastnorm.layer_norm(x, lengths=np.array([3, wrong]))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: np.dtype(k).name)
def test_packed_rows(kind, rng, monkeypatch):
    x = rng.standard_normal((20, 3)).astype(kind)
    w, b = rng.standard_normal((2, 3)).astype("f8" if kind == "f8" else "f4")
    offsets = np.array([0, 4, 4, 11, 20])
    handlers = dict(dispatch.handlers)

    def refuse(*_):
        raise AssertionError("took the long way")

    for name in ("segment_layer_norm", "segment_rms_norm"):
        monkeypatch.setitem(dispatch.handlers, name, refuse)
    for weight, activation in itertools.product((None, w), (None, "gelu")):
        got = fastnorm.segment_layer_norm(x, offsets, weight, b, activation=activation)
        want = handlers["segment_layer_norm"](
            x, offsets, weight, b, 1e-5, None, None, False, activation
        )
        assert_same_bits(got, want)
        got = fastnorm.segment_rms_norm(x, offsets, weight, offset=1.0, activation=activation)
        want = handlers["segment_rms_norm"](
            x, offsets, weight, None, 1.0, None, None, False, activation
        )
        assert_same_bits(got, want)


@pytest.mark.parametrize("middle", [-1, 21, 12, 1 << 62])
def test_wrong_offsets_are_an_error_still(middle, rng):
    x = rng.standard_normal((20, 4)).astype("f4")
    with pytest.raises(ValueError, match="offsets: got"):
        fastnorm.segment_layer_norm(x, np.array([0, middle, 11, 20]))


@pytest.mark.parametrize("kind", ["f4", "f2"])
def test_large_calls_whose_parameters_are_of_another_type(kind, rng):
    """From 8 MB of x on such parameters are converted first, on the long way, to the same bits."""
    x = rng.standard_normal((2100, 1000)).astype("f4")
    w, b = rng.standard_normal((2, 1000)).astype(kind)
    for params, offset in (((w, b), 0.0), ((w, None), 1.0)):
        got = fastnorm.layer_norm(x, 1000, *params, activation="relu")
        part = fastnorm.layer_norm(x[:3].copy(), 1000, *params, activation="relu")
        assert_same_bits(got[:3], part)
        got = fastnorm.rms_norm(x, 1000, w, offset=offset, activation="relu")
        part = fastnorm.rms_norm(x[:3].copy(), 1000, w, offset=offset, activation="relu")
        assert_same_bits(got[:3], part)


def test_sums_that_underflow_have_one_sign(dtype):
    """Both ways give what the kernel does, -0 as -0."""
    tiny = np.finfo(dtype).tiny ** 0.8
    x, dy = np.full((4, 3), tiny, dtype).T, np.full((3, 4), -tiny, dtype)
    rstd = np.full(3, tiny, dtype)
    got = fastnorm.rms_norm_backward(dy, x, 4, rstd)
    want = dispatch.handlers["rms_norm_backward"](
        dy, x, 4, rstd, None, None, 0.0, (True, True), False, None, None
    )
    assert_same_bits(got, want)
