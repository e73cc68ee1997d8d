"""Batch, group, instance norm and AdaIN: the same bits wherever arrays lie, whoever computes, in
any batch; `out`, types of results, activations.
"""

import itertools

import numpy as np
import pytest

import fastnorm
from fastnorm import _core, reference

from .helpers.arrays import assert_same_bits, guarded, placed
from .helpers.channels import (
    BACKWARD,
    BY_INPUT,
    BY_SAMPLE,
    FORWARD,
    Problem,
    adaptive,
    every_result,
    updating,
)
from .helpers.storage import (
    FLOAT32,
    FLOAT64,
    HALVES,
    STORAGE,
    cast,
    compute_type,
    rounded,
    special_rows,
)

storage = pytest.mark.parametrize("kind", STORAGE, ids=str)
halves = pytest.mark.parametrize("half", HALVES, ids=str)
by_input = pytest.mark.parametrize("name", BY_INPUT)
forward_calls = pytest.mark.parametrize("name", FORWARD)


# ---- layouts -------------------------------------------------------------------------------------


def laid_out(a):
    """The same values elsewhere and otherwise in memory."""
    wide = np.full((*a.shape[:-1], 2 * a.shape[-1] + 3), 5, a.dtype)
    wide[..., 1 : 1 + a.shape[-1]] = a
    yield "wider rows", wide[..., 1 : 1 + a.shape[-1]]
    yield "every second", np.repeat(a, 2, axis=-1)[..., ::2]
    yield "backwards", np.flip(np.flip(a).copy())
    yield "in Fortran's order", np.asfortranarray(a)
    order = (0, *range(2, a.ndim), 1)
    yield "channels last in memory", np.moveaxis(np.ascontiguousarray(a.transpose(order)), -1, 1)
    samples_last = np.ascontiguousarray(np.moveaxis(a, 0, -1))
    yield "samples last in memory", np.moveaxis(samples_last, -1, 0)
    yield "of swapped bytes", a.astype(a.dtype.newbyteorder(">"))
    unaligned = np.frombuffer(bytearray(b"0" + a.tobytes()), a.dtype, offset=1).reshape(a.shape)
    yield "unaligned", unaligned
    read_only = a.copy()
    read_only.flags.writeable = False
    yield "read-only", read_only
    yield "4 bytes on", placed(a, 4)


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT64, HALVES[0]], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((3, 4, 6, 5), 1), ((3, 6, 5, 4), -1), ((9, 4), 1)])
def test_layouts(kind, shape, axis, rng):
    p = Problem(rng, shape, kind, axis, groups=2)
    want = every_result(p)
    for how, x in laid_out(p.x):
        assert_same_bits(every_result(p.replaced(x=x)), want, f"x {how}")
    for how, dy in laid_out(p.dy):
        assert_same_bits(every_result(p.replaced(dy=dy)), want, f"dy {how}")
    for how, style in laid_out(p.style):
        got = adaptive(fastnorm, p.replaced(style=style))
        assert_same_bits(got, want[0], f"style {how}")
    parts = {n: np.repeat(getattr(p, n), 2, -1)[..., ::2] for n in ("weight", "bias", "own_weight",
                                                                  "mean", "var")}  # fmt: skip
    assert_same_bits(every_result(p.replaced(**parts)), want, "parameters")


def test_broadcast_arrays(rng):
    """Elements that share their memory, as those of an expanded gradient do."""
    p = Problem(rng, (3, 4, 5), FLOAT32, groups=2)
    plane = p.x[0, 0]
    for x, dy in (
        (np.broadcast_to(plane, p.x.shape), p.dy),
        (np.broadcast_to(p.x[:1], p.x.shape), p.dy),
        (p.x, np.broadcast_to(np.float32(1), p.x.shape)),
    ):
        whole = p.replaced(x=x.copy(), dy=dy.copy())
        assert_same_bits(every_result(p.replaced(x=x, dy=dy)), every_result(whole))


@pytest.mark.parametrize("kind", [FLOAT32, HALVES[0]], ids=str)
def test_axes_after_the_channels_are_one(kind, rng):
    """A plane is its elements in C order, however many axes they have."""
    p = Problem(rng, (2, 4, 3, 5, 2), kind, groups=2)
    arrays = {n: getattr(p, n).reshape(2, 4, 30) for n in ("x", "dy", "style")}
    flat = p.replaced(**arrays, along=[1, 4, 1])
    for got, want in zip(every_result(p), every_result(flat), strict=True):
        assert_same_bits(got.reshape(want.shape), want)


def test_what_is_no_array(rng):
    p = Problem(rng, (3, 4, 5), FLOAT64, groups=2)
    names = ("x", "dy", "style", "weight", "bias", "own_weight", "mean", "var")
    lists = p.replaced(**{n: getattr(p, n).tolist() for n in names})
    for calls in (FORWARD, BACKWARD):
        for name, call in calls.items():
            assert_same_bits(call(fastnorm, lists), call(fastnorm, p), name)
    integers = rng.integers(-9, 9, (3, 4, 5))
    got = fastnorm.group_norm(integers, 2)
    assert_same_bits(got, fastnorm.group_norm(integers.astype(np.float64), 2))


def test_channel_axes_agree(dtype, rng):
    """First, last and in the middle: the same numbers, though not the same bits."""
    p = Problem(rng, (3, 6, 7, 5), dtype, groups=3)
    for axis in (-1, 2, 3, -2):
        moved = {n: np.ascontiguousarray(np.moveaxis(getattr(p, n), 1, axis))
                 for n in ("x", "dy", "style")}  # fmt: skip
        other = p.replaced(**moved, axis=axis)
        for got, want in zip(every_result(other), every_result(p), strict=True):
            got = np.moveaxis(got, axis, 1) if got.ndim == 4 else got
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


# ---- out, dtype and activations ------------------------------------------------------------------


@storage
@forward_calls
def test_out(kind, name, rng):
    for shape, axis in (((3, 4, 50), 1), ((3, 50, 4), -1), ((70, 4), 1)):
        p = Problem(rng, shape, kind, axis, groups=2)
        want = FORWARD[name](fastnorm, p)
        with guarded(shape, p.dtype, p.dtype.itemsize) as out:
            got = FORWARD[name](fastnorm, p, out=out)
            assert got[0] is out
            assert_same_bits(got, want)
        for how, view in laid_out(np.zeros_like(p.x)):
            if how != "read-only":
                assert FORWARD[name](fastnorm, p, out=view)[0] is view
                np.testing.assert_array_equal(view, want[0], how)
        x = p.x.copy()
        got = FORWARD[name](fastnorm, p.replaced(x=x), out=x)
        assert got[0] is x
        assert_same_bits(got, want, "in place")


def test_out_of_adaptive_instance_norm(dtype, rng):
    p = Problem(rng, (3, 4, 50), dtype)
    want = adaptive(fastnorm, p)
    out = np.empty_like(p.x)
    assert adaptive(fastnorm, p, out=out) is out
    assert_same_bits(out, want)
    x = p.x.copy()
    assert adaptive(fastnorm, p.replaced(x=x), out=x) is x
    assert_same_bits(x, want)
    with pytest.raises(ValueError, match=r"^out: got an array that overlaps style"):
        adaptive(fastnorm, p, out=p.style)


@forward_calls
def test_in_place_through_a_view(name, rng):
    p = Problem(rng, (3, 4, 6, 5), FLOAT32, groups=2)
    memory = np.full((3, 4, 12, 9), 5, np.float32)
    view = memory[:, :, ::2, 2:7]
    view[...] = p.x
    want, before = FORWARD[name](fastnorm, p), memory.copy()
    got = FORWARD[name](fastnorm, p.replaced(x=view), out=memory[:, :, ::2, 2:7])
    assert_same_bits(got[1:], want[1:])
    before[:, :, ::2, 2:7] = want[0]
    assert_same_bits(memory, before)


@forward_calls
def test_out_that_overlaps(name, rng):
    """Other elements of x, or any of a parameter, would be written before they are read."""
    p = Problem(rng, (3, 4, 50), FLOAT32, groups=2)
    memory = np.concatenate([p.x.ravel(), [9]]).astype(np.float32)
    p.x = memory[:-1].reshape(p.x.shape)
    out = memory[1:].reshape(p.x.shape)
    before = memory.copy()
    with pytest.raises(ValueError, match=r"^out: got an array that overlaps x, wanted"):
        FORWARD[name](fastnorm, p, out=out)
    with pytest.raises(ValueError, match=r"^out: got an array that overlaps x, wanted"):
        FORWARD[name](fastnorm, p, out=p.x[::-1])
    for parameter in ("weight", "bias", "own_weight", "own_bias", "mean", "var"):
        array = getattr(p, parameter)
        room = np.zeros(p.x.shape, np.float32)
        inside = room.reshape(-1)[: array.size].reshape(array.shape)
        inside[...] = array
        of_call = {"mean", "var"} if "inference" in name else set()
        of_call |= {"own_weight", "own_bias"} if "per sample" in name else {"weight", "bias"}
        if parameter in of_call:
            with pytest.raises(ValueError, match=r"^out: got an array that overlaps \w+, wanted"):
                FORWARD[name](fastnorm, p.replaced(**{parameter: inside}), out=room)
            assert_same_bits(inside, array)
    assert_same_bits(memory, before)


def test_out_that_overlaps_running_statistics(rng):
    p = Problem(rng, (3, 4, 5), FLOAT32)
    for name, k in (("running_mean", 0), ("running_var", 1)):
        room = np.zeros(p.x.shape, np.float32)
        running = list(p.running)
        running[k] = room.reshape(-1)[:4]
        for op in ("batch_norm", "instance_norm"):
            with pytest.raises(ValueError, match=rf"^(out|{name}): got an array that overlaps"):
                updating(fastnorm, op, p.x, running, 0.1, out=room)
            assert not room.any()


@storage
@forward_calls
def test_result_types(kind, name, rng):
    """dtype= takes what was computed and rounds it, once."""
    for shape, axis in (((3, 4, 50), 1), ((3, 50, 4), -1)):
        p = Problem(rng, shape, kind, axis, groups=2)
        y, *stats = FORWARD[name](fastnorm, p, dtype=compute_type(kind))
        for result in STORAGE:
            got = FORWARD[name](fastnorm, p, dtype=result)
            assert_same_bits(got, (rounded(y, result), *stats))
            out = np.empty(shape, result)
            assert FORWARD[name](fastnorm, p, dtype=result, out=out)[0] is out
            assert_same_bits(out, got[0])


@halves
def test_half_types_are_float32_rounded_once(half, rng):
    for shape, axis in (((3, 4, 50), 1), ((3, 50, 4), -1), ((70, 4), 1)):
        p = Problem(rng, shape, half, axis, groups=2)
        names = ("x", "dy", "style", "weight", "bias", "own_weight", "own_bias")
        wide = p.replaced(**{n: cast(getattr(p, n), FLOAT32) for n in names}, dtype=FLOAT32)
        for calls in (FORWARD, BACKWARD):
            for name, call in calls.items():
                first, *others = call(fastnorm, wide)
                want = (rounded(first, half), *others)
                assert_same_bits(call(fastnorm, p), want, f"{name} {shape}")
        want = rounded(adaptive(fastnorm, wide), half)
        assert_same_bits(adaptive(fastnorm, p), want)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
@forward_calls
def test_activation(name, activation, rng):
    for shape, axis in (((3, 4, 50), 1), ((3, 50, 4), -1), ((70, 4), 1)):
        p = Problem(rng, shape, FLOAT32, axis, groups=2)
        y, *stats = FORWARD[name](fastnorm, p)
        got = FORWARD[name](fastnorm, p, activation=activation)
        assert_same_bits(got[1:], tuple(stats))
        if activation == "relu":
            np.testing.assert_array_equal(got[0], np.maximum(y, 0))
        want = FORWARD[name](reference, p, activation=activation)[0]
        np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-5)
        half = FORWARD[name](fastnorm, p, activation=activation, dtype=HALVES[0])[0]
        assert_same_bits(half, rounded(got[0], HALVES[0]))


# ---- the same bits -------------------------------------------------------------------------------

BIT_SHAPES = (
    ((150, 5), 1, 1), ((5, 6, 7), 1, 2), ((3, 4, 130), 1, 2), ((2, 3, 33, 33), 1, 3),
    ((5, 7, 6), -1, 2), ((2, 33, 33, 4), -1, 1), ((2, 5, 6, 4), 2, 3),
)  # fmt: skip


@storage
def test_partitions(kind, rng, partition):
    for shape, axis, groups in BIT_SHAPES:
        p = Problem(rng, shape, kind, axis, groups)
        partition(1)
        want = every_result(p)
        for parts in (2, 3, 4, 7):
            partition(parts)
            assert_same_bits(every_result(p), want, f"{shape}, {parts} parts")


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT64, *HALVES], ids=str)
def test_instruction_sets(isa, kind, rng):
    for shape, axis, groups in BIT_SHAPES:
        p = Problem(rng, shape, kind, axis, groups)
        _core.select_isa(isa)
        got = every_result(p)
        _core.select_isa(_core.isa_names()[-1])
        assert_same_bits(got, every_result(p), str(shape))


@by_input
def test_instruction_sets_on_special_units(isa, name, rng):
    p = Problem(rng, (4, 5, 130), FLOAT32, groups=5)
    if name == "batch_norm training":
        p = Problem(rng, (130, 20), FLOAT32)
    p = p.of_units(name, special_rows(rng, 130, FLOAT32))
    got = FORWARD[name](fastnorm, p), BACKWARD[name](fastnorm, p)
    _core.select_isa(_core.isa_names()[-1])
    assert_same_bits(got[0], FORWARD[name](fastnorm, p))
    assert_same_bits(got[1], BACKWARD[name](fastnorm, p))


@storage
@pytest.mark.parametrize("name", BY_SAMPLE)
def test_a_sample_in_any_batch(kind, name, rng):
    for shape, axis, groups in (((70, 6, 9), 1, 2), ((70, 9, 6), -1, 3), ((70, 6, 1), 1, 2)):
        p = Problem(rng, shape, kind, axis, groups)
        want = FORWARD[name](fastnorm, p)
        of_sample = [len(a) == 70 and (k == 0 or a.ndim == 2) for k, a in enumerate(want)]
        for size, first in itertools.product((1, 2, 7, 16, 65), (0, 3, 5)):
            part = slice(first, first + size)
            own = {n: getattr(p, n)[part] for n in ("x", "own_weight", "own_bias")}
            got = FORWARD[name](fastnorm, p.replaced(**own))
            for one, other, cut in zip(got, want, of_sample, strict=True):
                assert_same_bits(one, other[part] if cut else other, f"samples {part}")


@storage
def test_dx_of_a_sample_in_any_batch(kind, rng):
    p = Problem(rng, (70, 6, 9), kind, groups=2)
    for name in ("batch_norm inference", "group_norm", "instance_norm"):
        want = BACKWARD[name](fastnorm, p)[0]
        for size, first in itertools.product((1, 2, 7, 65), (0, 5)):
            part = slice(first, first + size)
            got = BACKWARD[name](fastnorm, p.replaced(x=p.x[part], dy=p.dy[part]))[0]
            assert_same_bits(got, want[part], f"{name}, samples {part}")
