"""Weight norm, unit norm, spectral norm and their gradients: numbers, range, types, layouts, bits,
errors."""

import itertools
import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastnorm
from fastnorm import _core, accuracy, interop
from fastnorm import reference_weights as reference
from fastnorm.weights import (
    handlers,
    spectral_norm,
    spectral_norm_backward,
    unit_norm,
    unit_norm_backward,
    weight_norm,
    weight_norm_backward,
)

from .helpers.arrays import assert_same_bits, guarded, placed
from .helpers.storage import HALVES, LIMITS, STORAGE, compute_type, special_rows

# Rows of one number; small ones; what is copied into rows and what is not; in runs; side by side.
SHAPES = (
    (5,), (1, 1), (7, 1), (1, 7), (4, 6), (3, 4, 5), (64, 3, 7, 7), (5, 2, 3, 4, 2), (300, 257),
    (40, 2048), (2050, 9), (3, 70, 300), (3, 1025),
)  # fmt: skip
CASES = [
    (shape, dim)
    for shape in SHAPES
    for dim in (None, *range(len(shape)), -1)
    if math.prod(shape) < 20000 or dim in (None, 0, len(shape) - 1)
]


def kept(shape, dim):
    """The shape of g."""
    if dim is None:
        return ()
    return tuple(n if d == dim % len(shape) else 1 for d, n in enumerate(shape))


def own_axes(shape, dim):
    """The axes that make a vector; of what is one number, its only one."""
    return tuple(d for d in range(len(shape)) if dim is None or d != dim % len(shape)) or (0,)


class Problem:
    """Arguments that fit together."""

    def __init__(self, rng, shape, dim, dtype, scale=1.0):
        dtype = np.dtype(dtype)
        self.shape, self.dim, self.axes = shape, dim, own_axes(shape, dim)
        limit = LIMITS[dtype.name][0]
        values = np.clip(rng.standard_normal(shape) * scale, -limit, limit)
        with np.errstate(under="ignore"):
            self.v = values.astype(dtype)
        self.dw = rng.standard_normal(shape).astype(dtype)
        self.g = rng.standard_normal(kept(shape, dim)).astype(compute_type(dtype))
        if dim is not None:
            u = rng.standard_normal(shape[dim])
            self.u = (u / np.linalg.norm(u)).astype(compute_type(dtype))


def largest(array, axes=None):
    return np.abs(array).max(axes, keepdims=True, initial=0)


def assert_near(got, want, scale, context=""):
    """Within 1e-6 of `scale` (for float64: as many ulps), or half an ulp more in a half type.

    What the type cannot hold is infinite; below its normal numbers it has fewer digits.
    """
    assert got.shape == want.shape, context
    with np.errstate(over="ignore"):
        beyond = np.isinf(want.astype(got.dtype).astype(np.float64))
    wide = got.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(wide), np.isnan(want), context)
    least = LIMITS[got.dtype.name][2]
    allowed = accuracy.bound(got.dtype) * scale + 2 * least
    if got.dtype in HALVES:
        allowed = allowed + accuracy.ulp(np.where(beyond, 0, np.nan_to_num(want)), got.dtype) / 2
    with np.errstate(invalid="ignore"):
        same = (wide == want) | (beyond & (wide == np.copysign(np.inf, want)))
        error = np.where(same | np.isnan(want), 0, np.abs(wide - want))
    assert (error <= allowed).all(), f"{context} {np.max(error / allowed)}"


def assert_forward_near(p, context=""):
    w, norm = weight_norm(p.v, p.g, p.dim, return_stats=True)
    exact, exact_norm = reference.weight_norm(p.v, p.g, p.dim, return_stats=True)
    assert (w.dtype, norm.dtype) == (p.v.dtype, compute_type(p.v.dtype))
    assert_near(w, exact, largest(exact, p.axes), f"w {context}")
    assert_near(norm, exact_norm, np.abs(exact_norm), f"norm {context}")
    y, norm = unit_norm(p.v, p.axes, 0.0, return_stats=True)
    exact, exact_norm = reference.unit_norm(p.v, p.axes, 0.0, return_stats=True)
    assert_near(y, exact, largest(exact, p.axes), f"y {context}")
    assert_near(norm, exact_norm, np.abs(exact_norm), f"norm of y {context}")


def assert_backward_near(p, context=""):
    units, norm = reference.weight_norm(p.v, 1.0, p.dim, return_stats=True)
    exact = reference.weight_norm_backward(p.dw, p.v, p.g, p.dim)
    with np.errstate(all="ignore"):
        size = 2 * np.nan_to_num(np.abs(p.g) / norm) * largest(p.dw.astype(np.float64))
        terms = np.abs(p.dw.astype(np.float64) * units).sum(own_axes(p.shape, p.dim) if len(
            p.shape) > 1 or p.dim is None else (), keepdims=True)  # fmt: skip
    for given_norm in (None, weight_norm(p.v, p.g, p.dim, return_stats=True)[1]):
        dv, dg = weight_norm_backward(p.dw, p.v, p.g, p.dim, norm=given_norm)
        assert (dv.dtype, dg.dtype) == (p.v.dtype, compute_type(p.v.dtype))
        assert_near(dv, exact[0], size, f"dv {context}")
        assert_near(dg, exact[1], terms.reshape(p.g.shape), f"dg {context}")


def assert_unit_backward_near(p, context=""):
    x_norm = reference.unit_norm(p.v, p.axes, return_stats=True)[1]
    exact = reference.unit_norm_backward(p.dw, p.v, p.axes, 0.0)
    with np.errstate(all="ignore"):
        along = 2 * np.expand_dims(np.nan_to_num(1 / x_norm), p.axes) * largest(p.dw.astype(float))
    for given_norm in (None, unit_norm(p.v, p.axes, return_stats=True)[1]):
        dx = unit_norm_backward(p.dw, p.v, p.axes, 0.0, norm=given_norm)
        assert dx.dtype == p.v.dtype
        assert_near(dx, exact, along, f"dx {context}")


def assert_spectral_near(p, context="", eps=0.0):
    got = spectral_norm(p.v, p.u, None, 2, eps, p.dim)
    exact = reference.spectral_norm(p.v, p.u, None, 2, eps, p.dim)
    assert [a.dtype for a in got[1:]] == [np.float64, *[compute_type(p.v.dtype)] * 2]
    compute = compute_type(p.v.dtype)
    for name, array, want in zip(("y", "sigma", "u", "v"), got, exact, strict=True):
        # Sigma is float64 by type, and of the digits of what was computed in.
        scale = float(np.finfo(compute).eps / np.finfo(array.dtype).eps) if name == "sigma" else 1
        assert_near(array, want, 3 * scale * largest(want).item(), f"{name} {context}")
    dweight = spectral_norm_backward(p.dw, p.v, *got[2:], got[1], p.dim)
    assert_same_bits(dweight, spectral_norm_backward(p.dw, p.v, *got[2:], dim=p.dim))
    want = reference.spectral_norm_backward(p.dw, p.v, *got[2:], dim=p.dim)
    with np.errstate(over="ignore"):
        size = np.abs(want).max() + largest(p.dw.astype(np.float64)).item() / np.abs(exact[1])
    assert_near(dweight, want, 3 * size, f"dweight {context}")


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), CASES, ids=str)
def test_against_the_definition(shape, dim, rng):
    for dtype in STORAGE if math.prod(shape) < 20000 else STORAGE[:2]:
        p = Problem(rng, shape, dim, dtype)
        assert_forward_near(p, dtype)
        assert_backward_near(p, dtype)
        assert_unit_backward_near(p, dtype)
        if dim is not None and math.prod(shape) < 20000:
            assert_spectral_near(p, dtype)


@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-30, 1e-19, 1e19, 1e30, 1e37])
def test_range_of_float32(scale, rng):
    for shape, dim in ((4, 6), 0), ((4, 6), 1), ((4, 6), None), ((3, 4, 5), 1), ((200, 512), 0):
        p = Problem(rng, shape, dim, np.float32, scale)
        assert_forward_near(p, scale)
        assert_backward_near(p, scale)
        assert_unit_backward_near(p, scale)
        if dim is not None:
            assert_spectral_near(p, scale)


@pytest.mark.parametrize("scale", [5e-323, 1e-310, 1e-300, 1e300, 1e307])
def test_range_of_float64(scale, rng):
    for shape, dim in ((4, 6), 0), ((4, 6), 1), ((4, 6), None), ((3, 4, 5), 1), ((200, 512), 0):
        p = Problem(rng, shape, dim, np.float64, scale)
        assert_forward_near(p, scale)
        assert_backward_near(p, scale)
        assert_unit_backward_near(p, scale)
        if dim is not None:
            assert_spectral_near(p, scale)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_range_of_half_types(dtype, rng):
    for scale in (1e-7, 1e-5, 1e4) if dtype.name == "float16" else (1e-40, 1e-37, 1e37):
        p = Problem(rng, (6, 40), 0, dtype, scale)
        assert_forward_near(p, scale)
        assert_backward_near(p, scale)
        assert_unit_backward_near(p, scale)


def test_lengths_of_any_size(dtype, rng):
    """g may be what its quotient by sqrt(n) is not: a normal number."""
    tiny, high = float(np.finfo(dtype).tiny), float(np.finfo(dtype).max)
    for n in (9, 900, 70000):
        v = rng.standard_normal((5, n)).astype(dtype)
        g = np.array([[tiny], [3 * tiny], [0], [high / 2], [1]], dtype)
        w = weight_norm(v, g)
        exact = reference.weight_norm(v, g)
        assert_near(w, exact, largest(exact, (1,)))
        assert not w[2].any()
        assert_same_bits(weight_norm(v[3:], g[3:]), w[3:])


def test_zeros(dtype):
    """No direction: NaN from weight norm, as in torch, and 0 from unit norm."""
    v, ones = np.ones((3, 4), dtype), np.ones((3, 1), dtype)
    v[1] = 0
    w, norm = weight_norm(v, ones, return_stats=True)
    assert np.isnan(w[1]).all()
    np.testing.assert_allclose(w[[0, 2]], 0.5)
    np.testing.assert_array_equal(norm.ravel(), [2, 0, 2])
    for given_norm in (None, norm):
        dv, dg = weight_norm_backward(v, v, ones, norm=given_norm)
        np.testing.assert_array_equal(np.isnan(dv).all(1), [False, True, False])
        np.testing.assert_allclose(dg.ravel(), [2, np.nan, 2])
        np.testing.assert_allclose(dv[[0, 2]], 0, atol=1e-6)
    assert np.isnan(weight_norm(np.ascontiguousarray(v.T), ones.T, 1)[:, 1]).all()
    for eps in (0.0, 1e-12):
        y, norm = unit_norm(v, eps=eps, return_stats=True)
        assert not y[1].any()
        np.testing.assert_array_equal(norm, [2, 0, 2])
        want = 0 if eps == 0 else np.full(4, 1 / eps, dtype)
        for given_norm in (None, norm):
            dx = unit_norm_backward(np.ones_like(v), v, eps=eps, norm=given_norm)
            np.testing.assert_allclose(dx[1], want)
            np.testing.assert_allclose(dx[0], 0, atol=1e-6)
    assert np.isnan(spectral_norm(np.zeros((2, 3), dtype), np.float32([1, 0]))[0]).all()


def test_short_vectors_are_divided_by_eps(dtype, rng):
    x, dy = rng.standard_normal((2, 6, 5)).astype(dtype)
    x[::2] *= dtype.type(1e-3)
    for eps in (0.1, 50.0, 1e300, np.inf):
        y, dx = unit_norm(x, eps=eps), unit_norm_backward(dy, x, eps=eps)
        exact = reference.unit_norm(x, eps=eps)
        assert_near(y, exact, largest(exact))
        want = reference.unit_norm_backward(dy, x, eps=eps)
        for rows in (slice(0, None, 2), slice(1, None, 2)):
            assert_near(dx[rows], want[rows], 9 * largest(want[rows]))
        assert_same_bits(unit_norm(x[:, np.newaxis], (1, 2), eps), y[:, np.newaxis])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_vector(bad, dtype, rng):
    for dim in (0, 1):
        p = Problem(rng, (5, 6), dim, dtype)
        p.v[2, 3] = bad
        hit = (2, slice(None)) if dim == 0 else (slice(None), 3)
        others = np.ones(p.shape, bool)
        others[hit] = False
        dv, dg = weight_norm_backward(p.dw, p.v, p.g, dim)
        assert np.isfinite(dg).sum() == dg.size - 1
        results = (
            weight_norm(p.v, p.g, dim), dv, unit_norm(p.v, p.axes),
            unit_norm_backward(p.dw, p.v, p.axes),
        )  # fmt: skip
        for array in results:
            assert np.isnan(array[hit]).all()
            assert np.isfinite(array[others]).all()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 0)])
def test_empty(shape, dtype):
    v = np.empty(shape, dtype)
    for dim in (None, *range(len(shape))):
        w, norm = weight_norm(v, 1.0, dim, return_stats=True)
        assert_same_bits((w, norm), (v, np.zeros(kept(shape, dim), dtype)))
        assert_same_bits(weight_norm(v, 1.0, dim), v)
        dv, dg = weight_norm_backward(v, v, norm, dim, norm=norm)
        assert_same_bits((dv, dg), (v, norm))
        axes = own_axes(shape, dim)
        y, norm = unit_norm(v, axes, return_stats=True)
        lead = tuple(n for d, n in enumerate(shape) if d not in axes)
        assert_same_bits((y, norm), (v, np.zeros(lead, dtype)))
        assert_same_bits(unit_norm(v, axes), v)
        assert_same_bits(unit_norm_backward(v, v, axes, norm=norm), v)
        if dim is not None and len(shape) == 2:
            u = np.zeros(shape[dim], dtype)
            y, sigma, u, _ = spectral_norm(v, u, dim=dim)
            assert (y.shape, sigma.shape, u.shape) == (shape, (), (shape[dim],))
            assert spectral_norm_backward(v, v, u, _, sigma, dim).shape == shape


def test_one_number_is_its_sign(dtype):
    v = np.array([3, -2, 0.5], dtype)
    np.testing.assert_array_equal(weight_norm(v, 2.0), [2, -2, 2])
    np.testing.assert_array_equal(unit_norm(v[:, np.newaxis]).ravel(), [1, -1, 1])
    np.testing.assert_array_equal(weight_norm_backward(v, v, 2.0)[0], 0)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4, 1), (1, 6)])
def test_g_broadcasts(shape, rng):
    p = Problem(rng, (4, 6), 0 if shape != (1, 6) else 1, np.float64)
    g = rng.standard_normal(shape)
    full = np.broadcast_to(g, kept(p.shape, p.dim))
    assert_same_bits(weight_norm(p.v, g, p.dim), weight_norm(p.v, full, p.dim))
    dv, dg = weight_norm_backward(p.dw, p.v, g, p.dim)
    want_dv, want_dg = weight_norm_backward(p.dw, p.v, full, p.dim)
    assert_same_bits(dv, want_dv)
    assert dg.shape == shape
    np.testing.assert_allclose(dg.sum(), want_dg.sum())


@given(st.data())
@settings(deadline=None, max_examples=60, derandomize=True, database=None)
def test_gradients_by_differences(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    dim = data.draw(st.sampled_from([None, *range(len(shape))]))
    p = Problem(np.random.default_rng(data.draw(st.integers(0, 1000))), shape, dim, np.float64)
    along = np.random.default_rng(1).standard_normal(shape)
    step = 1e-6

    def slope(f):
        """Of the result times dw, by the argument's direction."""
        return (p.dw * (f(step) - f(-step))).sum() / (2 * step)

    dv, dg = weight_norm_backward(p.dw, p.v, p.g, dim)
    size = 1e-6 * (1 + np.abs(dv).max())
    assert abs(slope(lambda h: weight_norm(p.v + h * along, p.g, dim)) - (dv * along).sum()) < size
    assert abs(slope(lambda h: weight_norm(p.v, p.g + h, dim)) - dg.sum()) < size
    dx = unit_norm_backward(p.dw, p.v, p.axes)
    size = 1e-6 * (1 + np.abs(dx).max())
    assert abs(slope(lambda h: unit_norm(p.v + h * along, p.axes)) - (dx * along).sum()) < size
    if dim is not None:
        _, sigma, u, v = spectral_norm(p.v, p.u, None, 1, dim=dim)
        dweight = spectral_norm_backward(p.dw, p.v, u, v, sigma, dim)
        got = slope(lambda h: spectral_norm(p.v + h * along, u, v, 0, dim=dim)[0])
        assert abs(got - (dweight * along).sum()) < 1e-6 * (1 + np.abs(dweight).max())


# ---- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 3, None])
def test_weight_norm_of_torch(dim, rng):
    torch = pytest.importorskip("torch")
    p = Problem(rng, (6, 3, 4, 5), dim, np.float32)
    theirs = -1 if dim is None else dim
    v, g = (torch.from_numpy(a.copy()).requires_grad_() for a in (p.v, p.g))
    w = torch._weight_norm(v, g, theirs)
    np.testing.assert_allclose(weight_norm(p.v, p.g, dim), w.detach(), 1e-5, 1e-6)
    assert kept(p.shape, dim) == tuple(torch.norm_except_dim(v, 2, theirs).shape)
    want = torch.autograd.grad(w, (v, g), torch.from_numpy(p.dw))
    for got, gradient in zip(weight_norm_backward(p.dw, p.v, p.g, dim), want, strict=True):
        np.testing.assert_allclose(got, gradient, 1e-4, 1e-5)


@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2)])
def test_normalize_of_torch(axis, rng):
    torch = pytest.importorskip("torch")
    x, dy = rng.standard_normal((2, 4, 3, 5)).astype(np.float32)
    x[1] *= 1e-3
    for eps in (1e-12, 0.1):
        tensor = torch.from_numpy(x.copy()).requires_grad_()
        y = torch.nn.functional.normalize(tensor, dim=axis, eps=eps)
        np.testing.assert_allclose(unit_norm(x, axis, eps), y.detach(), 1e-5, 1e-6)
        (want,) = torch.autograd.grad(y, tensor, torch.from_numpy(dy))
        got = unit_norm_backward(dy, x, axis, eps)
        np.testing.assert_allclose(got, want, 1e-4, 1e-5 * float(want.abs().max()))


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:DeprecationWarning")
def test_spectral_norm_of_torch(rng):
    torch = pytest.importorskip("torch")
    for layer, dim in (torch.nn.Linear(7, 5), 0), (torch.nn.ConvTranspose2d(4, 6, 3), 1):
        module = torch.nn.utils.spectral_norm(layer, n_power_iterations=3, dim=dim)
        weight, u, v = (
            getattr(module, f"weight_{name}").detach().numpy().copy() for name in ("orig", "u", "v")
        )
        module.train()
        x = torch.ones((1, 7) if dim == 0 else (1, 4, 8, 8))
        module(x)
        y, sigma, now_u, now_v = spectral_norm(weight, u, v, 3, dim=dim)
        np.testing.assert_allclose(y, module.weight.detach(), 1e-4, 1e-5)
        np.testing.assert_allclose(now_u, module.weight_u, 1e-4, 1e-4)
        np.testing.assert_allclose(now_v, module.weight_v, 1e-4, 1e-4)
        dy = rng.standard_normal(weight.shape).astype(np.float32)
        (want,) = torch.autograd.grad(module.weight, module.weight_orig, torch.from_numpy(dy))
        got = spectral_norm_backward(dy, weight, now_u, now_v, sigma, dim)
        np.testing.assert_allclose(got, want, 1e-4, 1e-4)


@pytest.mark.parametrize("name", _core.DTYPES)
def test_tensors(name, rng):
    torch = pytest.importorskip("torch")
    v, dw = torch.from_numpy(rng.standard_normal((2, 4, 6))).to(getattr(torch, name))
    g = torch.ones(4, 1)
    out = torch.empty_like(v)
    w, norm = weight_norm(v, g, return_stats=True)
    assert weight_norm(v, g, out=out) is out
    assert torch.equal(w, out)
    assert w.dtype == v.dtype
    assert norm.shape == (4, 1)
    for gradient, like in zip(weight_norm_backward(dw, v, g), (v, g), strict=True):
        assert gradient.shape == like.shape
    assert torch.equal(unit_norm(v, out=out), out)
    assert unit_norm_backward(dw, v).dtype == v.dtype
    y, sigma, u, right = spectral_norm(v, torch.ones(4), out=out)
    assert y is out
    assert (sigma.dtype, sigma.shape) == (torch.float64, ())
    assert spectral_norm_backward(dw, v, u, right, sigma).dtype == v.dtype


# ---- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_are_rounded_once(dtype, rng):
    """The bits of the float32 result, rounded."""
    v = special_rows(rng, 96, dtype)
    g = rng.standard_normal((len(v), 1)).astype(np.float32)
    for axes in (0, 1), (1, 0):
        a, b = np.ascontiguousarray(v.transpose(axes)), g.transpose(axes)
        with np.errstate(all="ignore"):
            want = weight_norm(a.astype(np.float32), b, axes[0])
            assert_same_bits(weight_norm(a, b, axes[0]), want.astype(dtype))
            assert_same_bits(weight_norm(a.astype(np.float32), b, axes[0], dtype=dtype),
                             want.astype(dtype))  # fmt: skip
            want = unit_norm(a.astype(np.float32), axes[1])
            assert_same_bits(unit_norm(a, axes[1]), want.astype(dtype))


@pytest.mark.parametrize("result", STORAGE, ids=str)
def test_type_of_the_result(result, rng):
    for dtype, shape in itertools.product(STORAGE, [(5, 30), (200, 512), (30, 5)]):
        dim = int(shape == (30, 5))
        p = Problem(rng, shape, dim, dtype)
        out = np.empty(shape, result)
        exact = reference.weight_norm(p.v, p.g, dim)
        w = weight_norm(p.v, p.g, dim, dtype=result, out=out)
        assert w is out
        assert_same_bits(weight_norm(p.v, p.g, dim, dtype=result), w)
        narrow = result if result != np.float64 or dtype == np.float64 else np.float32
        assert_near(w.astype(narrow), exact, largest(exact, p.axes))
        assert unit_norm(p.v, dtype=result).dtype == result


def test_float64_to_bfloat16_is_rounded_once():
    """What lies a little beyond the middle of two bfloat16 must not become the middle first."""
    bfloat16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    g = np.array([[1 + 2.0**-8 + 2.0**-40], [1 + 2.0**-8 - 2.0**-40], [-1 - 3 * 2.0**-8]])
    w = weight_norm(np.ones((3, 1)), g, dtype=bfloat16)
    np.testing.assert_array_equal(w.astype(float).ravel(), [1 + 2.0**-7, 1, -1 - 2.0**-6])


def test_bfloat16_as_bits(rng):
    """uint16 and a name, where ml_dtypes may be missing: all that is uint16 is bits."""
    plain = (rng.standard_normal((4, 30)) * 3).astype(np.float32)
    bits = interop.to_bits(plain).view(np.uint16)
    wide = interop.widened(bits.view(interop.BITS))
    g = np.ones((4, 1), np.float32)
    for w, want in (
        (weight_norm(bits, g, dtype="bfloat16"), weight_norm(wide, g)),
        (weight_norm(bits, interop.to_bits(g).view(np.uint16), dtype="bfloat16"),
         weight_norm(wide, g)),
        (weight_norm(bits, np.ones((1, 30)), 1, dtype="bfloat16"),
         weight_norm(wide, np.ones((1, 30)), 1)),
        (unit_norm(bits, dtype="bfloat16"), unit_norm(wide)),
    ):  # fmt: skip
        assert_same_bits(w, interop.to_bits(want).view(np.uint16))
    out = np.empty_like(bits)
    assert weight_norm(bits, g, dtype="bfloat16", out=out) is out
    assert_same_bits(out, interop.to_bits(weight_norm(wide, g)).view(np.uint16))


def test_what_is_no_array():
    rows = [[2, 2, 2, 2], [0, -2, 0, 0]]
    w = weight_norm(rows, [[4], [1]])
    assert_same_bits(w, np.array([[2, 2, 2, 2], [0, -1, 0, 0.0]]))
    assert_same_bits(unit_norm(rows), np.array([[0.5] * 4, [0, -1, 0, 0]]))
    assert_same_bits(weight_norm(np.array(rows, np.int8), 1.0), unit_norm(rows))
    swapped = np.array(rows, ">f4")
    assert_same_bits(weight_norm(swapped, [[4], [1]]), w.astype(np.float32))
    dv, dg = weight_norm_backward(rows, swapped, [[4], [1]])
    assert (dv.dtype, dg.dtype) == (np.float32, np.float32)
    y, *_ = spectral_norm([[4, 0], [0, 2]], [1, 0])
    assert_same_bits(y, np.array([[1, 0], [0, 0.5]]))


# ---- places --------------------------------------------------------------------------------------


def views(array):
    yield "backwards", array[::-1].copy()[::-1]
    yield "every second column", np.repeat(array, 2, axis=-1)[..., ::2]
    yield "columns first", np.asfortranarray(array)
    yield (
        "not aligned",
        placed(np.zeros(array.nbytes + 1, np.uint8), 0)[1:]
        .view(array.dtype)[: array.size]
        .reshape(array.shape),
    )


@pytest.mark.parametrize(("shape", "dim"), [
    ((5, 30), 0), ((5, 30), 1), ((5, 30), None), ((4, 3, 5), 1), ((200, 512), 0), ((300, 300), 1),
], ids=str)  # fmt: skip
def test_layouts_and_outputs(shape, dim, dtype, rng):
    p = Problem(rng, shape, dim, dtype)
    want, want_y = weight_norm(p.v, p.g, dim), unit_norm(p.v, p.axes)
    want_back = weight_norm_backward(p.dw, p.v, p.g, dim)
    for name, v in views(p.v):
        v[...] = p.v
        out = np.empty_like(v) if name != "backwards" else v[::-1].copy()[::-1]
        assert_same_bits(weight_norm(v, p.g, dim), want, name)
        assert weight_norm(v, p.g, dim, out=out) is out
        assert_same_bits(out, want, name)
        assert_same_bits(weight_norm_backward(p.dw, v, p.g, dim), want_back, name)
        assert_same_bits(unit_norm(v, p.axes), want_y, name)
        # In place, which leaves nothing to read twice.
        assert weight_norm(v, p.g, dim, out=v) is v
        assert_same_bits(v, want, name)
    with guarded(shape, dtype, 4 * dtype.itemsize) as out:
        weight_norm(p.v, p.g, dim, out=out)
        assert_same_bits(out, want)
        unit_norm(p.v, p.axes, out=out)
        assert_same_bits(out, want_y)
        out[...] = p.v
        unit_norm(out, p.axes, out=out)
        assert_same_bits(out, want_y)


def test_in_place_where_care_is_taken(dtype):
    v = np.ones((3, 4), dtype)
    v[1], v[2] = 0, np.finfo(dtype).smallest_subnormal
    for call in (lambda a, **o: weight_norm(a, 2.0, **o), unit_norm):
        want = call(v)
        mine = v.copy()
        call(mine, out=mine)
        assert_same_bits(mine, want)


def test_spectral_norm_leaves_its_vectors(rng):
    weight, out = rng.standard_normal((2, 5, 4, 3)).astype(np.float32)
    u, v = np.ones(4, np.float32), np.ones(15, np.float32)
    want = spectral_norm(weight, u, v, dim=1)
    assert (u == 1).all()
    assert (v == 1).all()
    got = spectral_norm(np.asfortranarray(weight), u, v, dim=1, out=out)
    assert got[0] is out
    np.testing.assert_allclose(out, want[0], 1e-5, 1e-6)
    zeroth = spectral_norm(weight, u, v, 0, dim=1)
    assert_same_bits(zeroth[2:], (u, v))
    y = spectral_norm(weight, u, None, 100, dim=1)[0]
    matrix = np.moveaxis(y, 1, 0).reshape(4, -1)
    np.testing.assert_allclose(np.linalg.norm(matrix, 2), 1, 1e-5)
    assert spectral_norm(weight, u, dim=1, out=weight)[0] is weight
    assert_same_bits(weight, want[0])


# ---- bits ----------------------------------------------------------------------------------------


def hard(rng, n, dtype):
    rows = special_rows(rng, n, dtype)
    return np.ascontiguousarray(rows[~np.isinf(rows.astype(np.float64)).any(1)])


@pytest.mark.parametrize("n", [1, 9, 64, 257, 4096])
def test_a_vector_depends_on_itself_alone(n, dtype, rng):
    """In an array that goes another way, too: few and many, in rows and side by side."""
    v = hard(rng, n, dtype)
    g = rng.standard_normal((len(v), 1)).astype(dtype)
    w, norm = weight_norm(v, g, return_stats=True)
    y, dx = unit_norm(v), unit_norm_backward(v[::-1], v)
    dv, dg = weight_norm_backward(v[::-1], v, g)
    for r in range(len(v)):
        row = slice(r, r + 1)
        got = weight_norm(v[row], g[row], return_stats=True)
        assert_same_bits(got, (w[row], norm[row]), f"row {r}")
        one = weight_norm(v[r], g[r], None, return_stats=True)
        assert_same_bits(one, (w[r], norm[r, 0]), f"row {r}")
        assert_same_bits(unit_norm(v[r]), y[r], f"row {r}")
        assert_same_bits(unit_norm_backward(v[len(v) - 1 - r], v[r]), dx[r], f"row {r}")
        mine = weight_norm_backward(v[::-1][row], v[row], g[row])
        assert_same_bits(mine, (dv[row], dg[row]), f"row {r}")
    many = 1 + (1 << 17) // v.size
    assert_same_bits(weight_norm(np.tile(v, (many, 1)), np.tile(g, (many, 1)))[-len(v) :], w)
    for columns in (v.T, np.ascontiguousarray(v.T), np.ascontiguousarray(np.tile(v, (many, 1)).T)):
        lengths = np.resize(g, (1, columns.shape[1]))
        assert_same_bits(weight_norm(columns, lengths, 1)[:, : len(v)].T, w)
        assert_same_bits(unit_norm(columns, 0)[:, : len(v)].T, y)


@pytest.mark.parametrize("shape", [(9, 7), (70, 3, 5), (65, 33), (1100, 6), (5, 1500), (3, 2, 70)])
def test_gradients_of_columns_have_the_bits_of_rows(shape, dtype, rng):
    """And vectors whose axes are around the others those of their copies."""
    for dim in range(1, len(shape)):
        p = Problem(rng, shape, dim, dtype, 10.0)
        v, dw, g = (np.ascontiguousarray(np.moveaxis(a, dim, 0)) for a in (p.v, p.dw, p.g))
        want, want_g = weight_norm_backward(dw, v, g)
        dv, dg = weight_norm_backward(p.dw, p.v, p.g, dim)
        assert_same_bits(np.ascontiguousarray(np.moveaxis(dv, dim, 0)), want)
        assert_same_bits(dg.ravel(), want_g.ravel())
        w = np.ascontiguousarray(np.moveaxis(weight_norm(p.v, p.g, dim), dim, 0))
        assert_same_bits(w, weight_norm(v, g))


@pytest.mark.parametrize("axes", [(0,), (0, 2), (1, 3), (-1, -2), (1, 2), (0, 1, 3), (0, 2, 4)])
def test_axes_anywhere(axes, dtype, rng):
    """Vectors of any axes have the bits of their copies as rows."""
    x, dy = rng.standard_normal((2, 3, 4, 5, 2, 6)).astype(dtype)
    order = sorted(d % 5 for d in axes)
    order = [*(d for d in range(5) if d not in order), *order]
    rows, grads = (np.ascontiguousarray(a.transpose(order)) for a in (x, dy))
    last = tuple(range(5 - len(axes), 5))
    y, norm = unit_norm(x, axes, return_stats=True)
    want, want_norm = unit_norm(rows, last, return_stats=True)
    assert_same_bits(np.ascontiguousarray(y.transpose(order)), want)
    assert_same_bits(norm, want_norm)
    dx = unit_norm_backward(dy, x, axes)
    assert_same_bits(
        np.ascontiguousarray(dx.transpose(order)), unit_norm_backward(grads, rows, last)
    )
    out = np.empty_like(x)
    assert unit_norm(x, axes, out=out) is out
    assert_same_bits(out, y)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, None])
def test_straight_calls_are_the_others(dim, dtype, rng):
    """Plain arrays go straight down, with the bits of the checked calls."""
    p = Problem(rng, (70, 3, 9), dim, dtype)
    p.v[0], p.v[:, 1], p.v[3] = 0, p.v[:, 1] * 1e-30, p.v[3] * 1e25
    for stats in (False, True):
        got = _core.straight_weight_norm(p.v, p.g, dim, None, stats)
        assert got is not None
        assert_same_bits(got, handlers["weight_norm"](p.v, p.g, dim, None, None, stats))
        got = _core.straight_unit_norm(p.v, p.axes, 1e-12, None, stats)
        if got is not None:
            assert_same_bits(got, handlers["unit_norm"](p.v, p.axes, 1e-12, None, None, stats))
    norm = weight_norm(p.v, p.g, dim, return_stats=True)[1]
    for given_norm, mask in itertools.product((None, norm), [(True, True), (False, True)]):
        got = _core.straight_weight_norm_backward(p.dw, p.v, p.g, dim, given_norm, mask)
        want = handlers["weight_norm_backward"](p.dw, p.v, p.g, dim, given_norm, mask)
        assert_same_bits(got[1], want[1])
        assert (got[0] is want[0] is None) or mask[0]
        if mask[0]:
            assert_same_bits(*(a[0] for a in (got, want)))


def test_what_is_not_plain_does_not_go_straight(rng):
    p = Problem(rng, (6, 5), 0, np.float32)
    read_only = np.empty_like(p.v)
    read_only.flags.writeable = False
    for v, g, dim, out in (
        (p.v.T, p.g, 0, None), (p.v[::2], p.g[::2], 0, None), (p.v.astype(">f4"), p.g, 0, None),
        (p.v, p.g.astype("f8"), 0, None), (p.v, p.g.ravel(), 0, None), (p.v, p.g, 0, read_only),
        (p.v, p.g, True, None), (p.v, p.g, 7, None), (p.v, p.g, 0, p.v[::-1]),
        (p.v.astype("f2"), p.g, 0, None), (p.v[:0], p.g[:0], 0, None), (p.v.tolist(), p.g, 0, None),
    ):  # fmt: skip
        assert _core.straight_weight_norm(v, g, dim, out, False) is None
    for axis, eps in ((2, 1e-12), ((0, 0), 1e-12), ((1, 0), 1e-12), ((), 1e-12), (0, 1), (0, -1.0),
                      (0, math.nan), ([0], 1e-12)):  # fmt: skip
        assert _core.straight_unit_norm(p.v, axis, eps, None, False) is None
    dims = [1] * 40 + [4]
    many = rng.standard_normal(dims).astype(np.float32)
    assert_same_bits(unit_norm(many).ravel(), unit_norm(many.ravel()))


def test_products_that_are_next_to_nothing(dtype, rng):
    """Gradients along which nothing lies, and products that the type has no digits for."""
    tiny = float(np.finfo(dtype).tiny)
    v = np.array([[1, -1, 0, 0], [1, 2, 0, 0], [1, 1, 1, 1], [3, 0, 4, 0]], dtype)
    v[3] *= dtype.type(math.sqrt(tiny))
    dw = np.array([[1, 1, 5, 0], [0, 0, 3, -1], [0, 0, 0, 0], [1, 2, 3, 4]], dtype)
    dw[3] *= dtype.type(tiny)
    for dim in (0, 1):
        a, b, g = (x if dim == 0 else np.ascontiguousarray(x.T)
                   for x in (v, dw, np.ones((4, 1), dtype)))  # fmt: skip
        dv, dg = weight_norm_backward(b, a, g, dim)
        exact, exact_dg = reference.weight_norm_backward(b, a, g, dim)
        np.testing.assert_allclose(dv, exact, 1e-5, 4 * np.finfo(dtype).smallest_subnormal)
        np.testing.assert_allclose(dg, exact_dg, 1e-5, 4 * np.finfo(dtype).smallest_subnormal)


def test_many_threads_at_once(dtype, rng):
    p = Problem(rng, (300, 70), 1, dtype)
    want = weight_norm(p.v, p.g, 1), *weight_norm_backward(p.dw, p.v, p.g, 1), unit_norm(p.v)
    failed = []

    def work():
        for _ in range(30):
            got = weight_norm(p.v, p.g, 1), *weight_norm_backward(p.dw, p.v, p.g, 1), unit_norm(p.v)
            if any(a.tobytes() != b.tobytes() for a, b in zip(got, want, strict=True)):
                failed.append(got)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_explain(isa, dtype):
    v, g = np.ones((30, 4, 50), dtype), np.ones((1, 1, 50), dtype)
    plan = fastnorm.explain("weight_norm", v, g, 2)
    assert (plan.op, plan.isa, plan.rows, plan.cols) == ("weight_norm", isa, 50, 120)
    assert (plan.regime, plan.copies, plan.dtype) == ("columns", (), dtype.name)
    assert plan == fastnorm.explain(fastnorm.weight_norm, v, g, 2)
    plan = fastnorm.explain("weight_norm_backward", v, v, g, 2)
    assert (plan.regime, plan.rows) == ("columns", 50)
    plan = fastnorm.explain("unit_norm", np.asfortranarray(v))
    assert (plan.regime, plan.rows, plan.cols) == ("row", 120, 50)
    assert plan.copies == ("x is copied: it is not contiguous",)
    plan = fastnorm.explain("unit_norm_backward", v[None, :, :, None], v[None, :, :, None], (1, 4))
    assert (plan.rows, plan.cols) == (4, 1500)
    with pytest.raises(ValueError, match=r"^g: got shape"):
        fastnorm.explain("weight_norm", v, g, 0)
    many = np.zeros((2, 3, 2, 3, 2), dtype)
    assert "lie apart" in fastnorm.explain("unit_norm", many, (0, 2, 4)).copies[0]


def all_results(p):
    if p.v.size > 1 << 15:
        return (
            weight_norm(p.v, p.g, p.dim), unit_norm(p.v, p.axes),
            *weight_norm_backward(p.dw, p.v, p.g, p.dim),
        )  # fmt: skip
    return (
        *weight_norm(p.v, p.g, p.dim, return_stats=True),
        *weight_norm_backward(p.dw, p.v, p.g, p.dim),
        *unit_norm(p.v, p.axes, return_stats=True),
        unit_norm_backward(p.dw, p.v, p.axes),
    )


@pytest.mark.parametrize(("shape", "dim"), [
    ((37, 65), 0), ((37, 65), 1), ((37, 65), None), ((200, 512), 0), ((300, 300), 1),
    ((4, 5, 6), 1),
], ids=str)  # fmt: skip
def test_instruction_sets_and_threads(isa, partition, shape, dim, dtype, rng):
    p = Problem(rng, shape, dim, dtype)
    got = all_results(p)
    _core.select_isa(_core.isa_names()[-1])
    partition(1)
    want = all_results(p)
    assert_same_bits(got, want)
    for parts in (2, 5):
        partition(parts)
        assert_same_bits(all_results(p), want, f"{parts} parts")


# ---- errors --------------------------------------------------------------------------------------

V, G = np.ones((3, 4), np.float32), np.ones((3, 1), np.float32)
U, RIGHT = np.ones(3, np.float32), np.ones(4, np.float32)
READ_ONLY = np.ones((3, 4), np.float32)
READ_ONLY.flags.writeable = False
SHARED = np.ones((4, 4), np.float32)

ERRORS = {
    "v masked": (lambda: weight_norm(np.ma.ones((3, 4)), G), TypeError, "v: got a masked array"),
    "v complex": (lambda: weight_norm(V * 1j, G), TypeError, "v: got dtype complex"),
    "v None": (lambda: weight_norm(None, G), TypeError, "v: got None"),
    "v 0-d": (lambda: weight_norm(1.0, G), ValueError, "v: got an array of 0 dimensions"),
    "g None": (lambda: weight_norm(V, None), TypeError, "g: got None"),
    "g complex": (lambda: weight_norm(V, G * 1j), TypeError, "g: got dtype complex64"),
    "g shape": (lambda: weight_norm(V, G[:2]), ValueError, r"g: got shape \(2, 1\), .*\(3, 1\)"),
    "g axes": (lambda: weight_norm(V, G[None]), ValueError, r"g: got shape \(1, 3, 1\)"),
    "g side": (lambda: weight_norm(V, G, 1), ValueError, r"g: got shape \(3, 1\), .*\(1, 4\)"),
    "dim": (lambda: weight_norm(V, G, 2), ValueError, "dim: axis 2 is out of bounds"),
    "dim far": (lambda: weight_norm(V, G, -3), ValueError, "dim: axis -3 is out of bounds"),
    "dim text": (lambda: weight_norm(V, G, "0"), TypeError, "dim: got '0', wanted an integer or"),
    "dtype": (lambda: weight_norm(V, G, dtype="i4"), TypeError, "dtype: got 'i4', wanted float16"),
    "int8": (lambda: weight_norm(V, G, dtype="i1"), TypeError, "dtype: got 'i1', wanted float16"),
    "out list": (lambda: weight_norm(V, G, out=[1]), TypeError, "out: got list"),
    "out type": (lambda: weight_norm(V, G, out=V * 1.0j), TypeError, "out: got dtype complex"),
    "out shape": (lambda: weight_norm(V, G, out=V.T), ValueError, r"out: got shape \(4, 3\)"),
    "out read-only": (lambda: weight_norm(V, G, out=READ_ONLY), ValueError, "out: got a read-only"),
    "out over v": (
        lambda: weight_norm(SHARED[:3], G, out=SHARED[1:]), ValueError, "out: got .* overlaps v",
    ),
    "out over g": (
        lambda: weight_norm(V, SHARED[:3, :1], out=SHARED[:3]), ValueError,
        "out: got .* overlaps g",
    ),
    "dw shape": (
        lambda: weight_norm_backward(V.T, V, G), ValueError, r"dw: got shape \(4, 3\).* shape of v",
    ),
    "dw None": (lambda: weight_norm_backward(None, V, G), TypeError, "dw: got None"),
    "norm shape": (
        lambda: weight_norm_backward(V, V, G, norm=np.ones(4)), ValueError,
        r"norm: got shape \(4,\), wanted \(3,\) \(or \(3, 1\)\)",
    ),
    "mask": (
        lambda: weight_norm_backward(V, V, G, output_mask=(True,)), ValueError,
        "output_mask: got .*two truth values: dv, dg",
    ),
    "x None": (lambda: unit_norm(None), TypeError, "x: got None"),
    "axis": (lambda: unit_norm(V, 2), ValueError, "axis 2 is out of bounds"),
    "axis None": (lambda: unit_norm(V, None), TypeError, "axis: got None"),
    "axis twice": (lambda: unit_norm(V, (0, 0)), ValueError, "axis: got .*each axis once"),
    "eps": (lambda: unit_norm(V, eps=-1), ValueError, "eps: got -1"),
    "eps float": (lambda: unit_norm(V, eps=-1.0), ValueError, "eps: got -1"),
    "eps NaN": (lambda: unit_norm(V, eps=math.nan), ValueError, "eps: got nan"),
    "eps text": (lambda: unit_norm(V, eps="1"), TypeError, "eps: got '1'"),
    "unit out": (lambda: unit_norm(V, out=V.T), ValueError, r"out: got shape \(4, 3\)"),
    "dy": (lambda: unit_norm_backward(V.T, V), ValueError, r"dy: got shape \(4, 3\).*shape of x"),
    "unit norm": (
        lambda: unit_norm_backward(V, V, norm=np.ones((3, 2))), ValueError,
        r"norm: got shape \(3, 2\)",
    ),
    "weight": (lambda: spectral_norm("x", U), TypeError, "weight: got dtype"),
    "weight 0-d": (lambda: spectral_norm(1.0, U), ValueError, "weight: got an array of 0 dim"),
    "u": (lambda: spectral_norm(V, RIGHT), ValueError, r"u: got shape \(4,\), wanted \(3,\)"),
    "u None": (lambda: spectral_norm(V, None), TypeError, "u: got None"),
    "v": (lambda: spectral_norm(V, U, U), ValueError, r"v: got shape \(3,\), wanted \(4,\)"),
    "no v": (lambda: spectral_norm(V, U, None, 0), TypeError, "v: got None, wanted a vector"),
    "iterations": (lambda: spectral_norm(V, U, None, -1), ValueError, "n_power_iterations: got -1"),
    "iterations 1.5": (lambda: spectral_norm(V, U, RIGHT, 1.5), TypeError, "n_power_iterations"),
    "spectral eps": (lambda: spectral_norm(V, U, eps=-1), ValueError, "eps: got -1"),
    "spectral dim": (lambda: spectral_norm(V, U, dim=None), TypeError, "dim: got None"),
    "spectral out": (
        lambda: spectral_norm(SHARED[:3], U, out=SHARED[1:]), ValueError, "overlaps weight",
    ),
    "sigma": (
        lambda: spectral_norm_backward(V, V, U, RIGHT, np.ones(2)), ValueError,
        r"sigma: got shape \(2,\), wanted \(\)",
    ),
    "spectral dy": (
        lambda: spectral_norm_backward(V.T, V, U, RIGHT), ValueError, r"dy: got shape \(4, 3\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, exception, message = ERRORS[name]
    with pytest.raises(exception, match=f"^{message}" if ":" in message else message):
        call()


def test_nothing_is_written_before_an_error():
    for call in (
        lambda out: weight_norm(V, G[:2], out=out),
        lambda out: weight_norm(V, G, dtype="i1", out=out),
        lambda out: unit_norm(V, eps=-1, out=out),
        lambda out: spectral_norm(V, U, RIGHT[:2], out=out),
        lambda out: spectral_norm(V, U, RIGHT, -1, out=out),
    ):
        out = np.full((3, 4), 7, np.float32)
        with pytest.raises((TypeError, ValueError)):
            call(out)
        assert (out == 7).all()


def test_masks(rng):
    p = Problem(rng, (4, 6), 0, np.float32)
    dv, dg = weight_norm_backward(p.dw, p.v, p.g)
    for wants in itertools.product((True, False), repeat=2):
        got = weight_norm_backward(p.dw, p.v, p.g, output_mask=wants)
        for array, want, wanted in zip(got, (dv, dg), wants, strict=True):
            if wanted:
                assert_same_bits(array, want)
            else:
                assert array is None
    empty = np.empty((0, 3), np.float32)
    assert weight_norm_backward(empty, empty, 1.0, output_mask=(False, False)) == (None, None)
