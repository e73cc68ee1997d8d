"""WeightNorm and SpectralNorm: parameters, calls, gradients, state dicts, copies."""

import copy
import pickle
import threading

import numpy as np
import pytest

from fastnorm import reference_weights as reference
from fastnorm.modules_weights import SpectralNorm, WeightNorm
from fastnorm.weights import spectral_norm, weight_norm, weight_norm_backward

from .helpers.arrays import assert_same_bits
from .helpers.storage import HALVES, STORAGE, compute_type

CLASSES = [WeightNorm, SpectralNorm]
COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {p}": lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(2, 6)},
}


@pytest.fixture
def weight(dtype, rng):
    return rng.standard_normal((4, 3, 5)).astype(dtype)


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def module(request, weight):
    return request.param(weight, dim=1)


# ---- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2, -1, None])
def test_weight_norm_begins_as_the_weight(weight, dim, dtype):
    m = WeightNorm(weight, dim)
    assert (m.shape, m.dtype, m.dim) == ((4, 3, 5), dtype, 2 if dim == -1 else dim)
    assert list(m.parameters()) == ["weight_g", "weight_v"]
    assert_same_bits(m.weight_v, weight)
    assert_same_bits(m.weight_g, weight_norm(weight, 1.0, dim, return_stats=True)[1])
    np.testing.assert_allclose(m(), weight, 1e-5)
    assert_same_bits(m.bake(), m.weight)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_spectral_norm_begins_near_the_end(weight, dim, dtype):
    """Its vectors have been improved before the first call, so that eval() may be the first."""
    m = SpectralNorm(weight, dim=dim).eval()
    matrix = np.moveaxis(m(), dim, 0).reshape(weight.shape[dim], -1)
    np.testing.assert_allclose(np.linalg.norm(matrix, 2), 1, 1e-2)
    assert (m.n_power_iterations, m.eps, m.dim) == (1, 1e-12, dim % 3)
    assert list(m.parameters()) == ["weight_orig"]
    assert list(m.state_dict()) == ["weight_orig", "weight_u", "weight_v"]
    assert m.weight_u.dtype == m.weight_v.dtype == compute_type(dtype)


def test_the_generator_decides(weight):
    one, same = (SpectralNorm(weight, rng=3) for _ in range(2))
    assert one == same
    assert one != SpectralNorm(weight, rng=4)
    assert one == SpectralNorm(weight, rng=np.random.default_rng(3))
    assert SpectralNorm(weight) == SpectralNorm(weight)


def test_a_weight_of_zeros_keeps_its_vectors(dtype):
    m = SpectralNorm(np.zeros((3, 4), dtype))
    assert m.weight_u.any()
    m.weight_orig = np.eye(3, 4)
    m.train()
    assert np.isfinite(m()).all()


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_types(cls, dtype, rng):
    weight = rng.standard_normal((4, 30)).astype(np.float32)
    m = cls(weight, dtype=dtype)
    assert m.dtype == dtype
    for array in m.parameters().values():
        assert array.dtype == dtype
        assert array.ctypes.data % 64 == 0
    assert m().dtype == dtype
    assert cls(weight.astype(dtype)).dtype == dtype
    grads = m.backward(weight, m.forward()[1])
    assert list(grads) == list(m.parameters())
    for name, grad in grads.items():
        assert grad.dtype == (compute_type(dtype) if name == "weight_g" else dtype)
        assert grad.shape == m.parameters()[name].shape
    for how in COPIES.values():
        assert how(m) == m


@pytest.mark.parametrize(("cls", "arguments", "options", "exception", "message"), [
    (WeightNorm, (None,), {}, TypeError, "weight: got None"),
    (WeightNorm, (np.ma.ones((2, 2)),), {}, TypeError, "weight: got a masked array"),
    (WeightNorm, (1.0,), {}, ValueError, "v: got an array of 0 dimensions"),
    (WeightNorm, (np.ones((2, 2)), 2), {}, ValueError, "dim: axis 2 is out of bounds"),
    (WeightNorm, (np.ones((2, 2)), "0"), {}, TypeError, "dim: got '0'"),
    (WeightNorm, (np.ones((2, 2)),), {"dtype": "i4"}, TypeError, "dtype: got 'i4'"),
    (SpectralNorm, (None,), {}, TypeError, "weight: got None"),
    (SpectralNorm, (np.ones((2, 2)), 0), {}, ValueError, "n_power_iterations: got 0"),
    (SpectralNorm, (np.ones((2, 2)), 1.5), {}, TypeError, "n_power_iterations: got 1.5"),
    (SpectralNorm, (np.ones((2, 2)), 1, -1), {}, ValueError, "eps: got -1"),
    (SpectralNorm, (np.ones((2, 2)),), {"dim": None}, TypeError, "dim: got None"),
    (SpectralNorm, (np.ones((2, 2)),), {"dim": 5}, ValueError, "dim: axis 5 is out of bounds"),
], ids=str)  # fmt: skip
def test_bad_construction(cls, arguments, options, exception, message):
    with pytest.raises(exception, match=f"^{message}"):
        cls(*arguments, **options)


# ---- calls ---------------------------------------------------------------------------------------


def test_call_of_weight_norm(weight, rng):
    m = WeightNorm(weight, 1)
    m.weight_g = rng.standard_normal((1, 3, 1))
    want = weight_norm(m.weight_v, m.weight_g, 1)
    out = np.empty_like(weight)
    assert m(out) is out
    assert_same_bits(out, want)
    w, saved = m.forward()
    assert_same_bits(w, want)
    grads = m.backward(weight, saved)
    want_v, want_g = weight_norm_backward(weight, m.weight_v, m.weight_g, 1)
    np.testing.assert_allclose(grads["weight_v"], want_v, 1e-5, 1e-6)
    np.testing.assert_allclose(grads["weight_g"], want_g, 1e-5, 1e-6)
    m.weight_g *= 2
    assert_same_bits(m(), 2 * want)
    m.weight = weight
    np.testing.assert_allclose(m(), weight, 1e-5)


def test_call_of_spectral_norm(weight):
    m = SpectralNorm(weight, 2, dim=1)
    before = m.state_dict()
    want = spectral_norm(weight, before["weight_u"], before["weight_v"], 2, dim=1)
    y, saved = m.forward()
    assert_same_bits(y, want[0])
    assert_same_bits((m.weight_u, m.weight_v), want[2:])
    exact = reference.spectral_norm_backward(weight, weight, *want[2:], dim=1)
    got = m.backward(weight, saved)["weight_orig"]
    np.testing.assert_allclose(got, exact, 1e-4, 1e-5)
    assert m.training
    assert m.eval() is m
    assert not m.training
    kept, out = m.state_dict(), np.empty_like(weight)
    assert m(out) is out
    assert_same_bits(m.bake(), out)
    assert_same_bits(tuple(m.state_dict().values()), tuple(kept.values()))
    assert m.train().training
    m.bake()
    assert_same_bits(m.weight_u, kept["weight_u"])
    m()
    assert (m.weight_u != kept["weight_u"]).any()


def test_calls_in_many_threads(weight):
    """None of the improvements is lost, and nobody sees u and v of different calls."""
    m, one = SpectralNorm(weight), SpectralNorm(weight)
    threads = [
        threading.Thread(target=lambda: [m() for _ in range(50)]) for _ in range(4)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(200):
        one()
    assert m == one


@pytest.mark.parametrize("name", ["weight_g", "weight_v", "weight_orig", "weight_u", "weight"])
def test_bad_assignments_change_nothing(module, name):
    if not hasattr(type(module), name):
        return
    before = copy.deepcopy(module)
    said = "weight_orig" if name == "weight" and isinstance(module, SpectralNorm) else name
    for value, exception in (
        (np.ones(8), ValueError), (None, TypeError), (np.ones(module.shape, complex), TypeError),
    ):  # fmt: skip
        with pytest.raises(exception, match=rf"^{said}: got .*, wanted"):
            setattr(module, name, value)
    assert module == before


def test_settings():
    m = SpectralNorm(np.eye(3))
    m.n_power_iterations, m.eps = 3, 0.5
    assert (m.n_power_iterations, m.eps) == (3, 0.5)
    for name, value in ("n_power_iterations", 0), ("eps", -1):
        with pytest.raises(ValueError, match=rf"^{name}: got"):
            setattr(m, name, value)
    for name in ("training", "dim", "dtype", "shape"):
        with pytest.raises(AttributeError):
            setattr(m, name, getattr(m, name))


def test_bad_saved(module, weight):
    with pytest.raises(TypeError, match=r"^saved: got None, wanted what forward returned"):
        module.backward(weight, None)


# ---- state dicts ---------------------------------------------------------------------------------

ALIASES = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
SPECTRAL_ALIASES = {
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
}


def test_state_dict_is_a_copy(module):
    before = copy.deepcopy(module)
    for array in module.state_dict().values():
        array[...] = 7
    assert module == before


def test_load_state_dict(module, weight):
    other = type(module)(weight[::-1] * 2, dim=1)
    names = ALIASES if isinstance(module, WeightNorm) else SPECTRAL_ALIASES
    state = module.state_dict()
    assert other != module
    assert other.load_state_dict(state) == ([], [])
    assert other == module
    other = type(module)(weight[::-1] * 2, dim=1)
    assert other.load_state_dict({names[name]: a for name, a in state.items()}) == ([], [])
    assert other == module


def test_load_state_dict_is_all_or_nothing(module):
    before = copy.deepcopy(module)
    for name in module.state_dict():
        for value, exception in ((np.ones(8), ValueError), (None, TypeError)):
            state = {key: 2 * array for key, array in module.state_dict().items()}
            state[name] = value
            with pytest.raises(exception, match=rf"^{name}: got"):
                module.load_state_dict(state)
            assert module == before


def test_keys_must_fit(module):
    before, state = copy.deepcopy(module), module.state_dict()
    extra = "parametrizations.weight.original1" if isinstance(module, WeightNorm) else "bias"
    with pytest.raises(KeyError, match="state_dict: got keys"):
        module.load_state_dict({**state, extra: state["weight_v"]})
    with pytest.raises(KeyError, match="state_dict: got keys"):
        module.load_state_dict({"weight_v": state["weight_v"]})
    with pytest.raises(TypeError, match="state_dict: got list"):
        module.load_state_dict([])
    assert module == before
    keys = module.load_state_dict({**state, "bias": 1}, strict=False)
    assert keys.unexpected_keys == ["bias"]
    assert module == before


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("today", [False, True], ids=["hooks", "parametrizations"])
def test_load_state_dict_of_torch(today, rng):
    torch = pytest.importorskip("torch")
    utils = torch.nn.utils.parametrizations if today else torch.nn.utils
    for dim in (0, None):
        layer = utils.weight_norm(torch.nn.Conv2d(3, 4, 2, bias=False), dim=dim)
        weight = layer.weight.detach().numpy()
        m = WeightNorm(np.ones_like(weight), dim)
        m.load_state_dict(layer.state_dict())
        np.testing.assert_allclose(m(), weight, 1e-5, 1e-6)
    state = {key: torch.from_numpy(array) for key, array in m.state_dict().items()}
    if not today:
        layer.load_state_dict(state)
    layer = utils.spectral_norm(torch.nn.Conv2d(3, 4, 2, bias=False)).eval()
    layer(torch.ones(1, 3, 2, 2))
    weight = layer.weight.detach().numpy()
    m = SpectralNorm(np.ones_like(weight)).eval()
    m.load_state_dict(layer.state_dict())
    np.testing.assert_allclose(m(), weight, 1e-5, 1e-6)


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
def test_copies(how, module):
    if isinstance(module, SpectralNorm):
        module.eval()
        module.n_power_iterations, module.eps = 4, 0.5
    other = COPIES[how](module)
    assert other == module
    assert repr(other) == repr(module)
    assert_same_bits(other(), module())
    before = module.state_dict()
    for array in other.state_dict().values():
        array[...] = 0
    other.weight_v[...] = 0
    assert other != module
    assert_same_bits(tuple(module.state_dict().values()), tuple(before.values()))


class Named(WeightNorm):
    """A subclass with something of its own."""

    def __init__(self, name):
        super().__init__(np.eye(3))
        self.name = name


class NamedSpectral(SpectralNorm):
    """As Named."""

    def __init__(self, name):
        super().__init__(np.eye(3))
        self.name = name


@pytest.mark.parametrize("cls", [Named, NamedSpectral])
def test_subclasses_keep_their_attributes(cls):
    for how in COPIES.values():
        other = how(cls("first"))
        assert (type(other), other.name) == (cls, "first")
        assert other == cls("second")


def test_equality(weight):
    modules = [
        WeightNorm(weight), WeightNorm(weight, 1), WeightNorm(weight, None), WeightNorm(2 * weight),
        WeightNorm(weight, dtype="f2"), SpectralNorm(weight), SpectralNorm(weight).eval(),
        SpectralNorm(weight, eps=0.5), SpectralNorm(weight, 2), SpectralNorm(weight, dim=1), None,
    ]  # fmt: skip
    for i, one in enumerate(modules):
        for j, other in enumerate(modules):
            assert (one == copy.deepcopy(other)) == (i == j)
    with pytest.raises(TypeError, match="unhashable"):
        hash(modules[0])


def test_repr():
    assert repr(WeightNorm(np.ones((2, 3), np.float32), None)) == (
        "WeightNorm((2, 3), dim=None, dtype=float32)"
    )
    assert repr(SpectralNorm(np.ones((2, 3)))) == (
        "SpectralNorm((2, 3), n_power_iterations=1, eps=1e-12, dim=0, dtype=float64)"
    )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_keep_their_lengths(dtype, rng):
    """g is rounded to the type as any parameter is; the weight comes back to its digits."""
    weight = rng.standard_normal((6, 50)).astype(dtype)
    got = WeightNorm(weight)().astype(np.float32)
    np.testing.assert_allclose(got, weight.astype(np.float32), 2e-2)
