"""The modules: parameters, calls, forward and backward, state dicts, copies."""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastnorm
from fastnorm import _core

from .helpers.arrays import assert_same_bits

CLASSES = [fastnorm.LayerNorm, fastnorm.RMSNorm, fastnorm.LayerNorm2d]
TRAILING = [fastnorm.LayerNorm, fastnorm.RMSNorm]


def storage(name):
    """A dtype by its name."""
    if name != "bfloat16":
        return np.dtype(name)
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


@pytest.fixture(params=_core.DTYPES)
def stored(request):
    """Every type that parameters may have, in turn."""
    return storage(request.param)


def filled(module, rng):
    """The module, with parameters that are no ones and zeros."""
    for name, array in module.parameters().items():
        setattr(module, name, rng.standard_normal(array.shape))
    return module


@pytest.fixture
def norm(dtype, rng):
    return filled(fastnorm.LayerNorm(9, eps=1e-3, dtype=dtype), rng)


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def any_norm(request, dtype, rng):
    """Every class's, of 9 elements or channels."""
    return filled(request.param(9, eps=1e-3, dtype=dtype), rng)


@pytest.fixture
def x(dtype, rng):
    return rng.standard_normal((4, 9)).astype(dtype)


def functional(module, x, **options):
    """What the op itself makes of the module's settings."""
    if isinstance(module, fastnorm.RMSNorm):
        return fastnorm.rms_norm(
            x, module.normalized_shape, module.weight, module.eps, offset=module.offset,
            round_before_weight=module.round_before_weight, **options,
        )  # fmt: skip
    if isinstance(module, fastnorm.LayerNorm2d):
        options |= {"axis": 1}
    else:
        options |= {"normalized_shape": module.normalized_shape}
    return fastnorm.layer_norm(x, weight=module.weight, bias=module.bias, eps=module.eps, **options)


# ---- construction and parameters -----------------------------------------------------------------


def test_defaults():
    norm = fastnorm.LayerNorm((3, 4))
    assert (norm.normalized_shape, norm.eps) == ((3, 4), 1e-5)
    assert_same_bits(norm.weight, np.ones((3, 4), np.float32))
    assert_same_bits(norm.bias, np.zeros((3, 4), np.float32))


def test_defaults_of_rms_norm():
    norm = fastnorm.RMSNorm((3, 4))
    assert (norm.normalized_shape, norm.eps, norm.offset) == ((3, 4), None, 0.0)
    assert norm.round_before_weight is False
    assert_same_bits(norm.weight, np.ones((3, 4), np.float32))
    assert list(norm.parameters()) == ["weight"]
    assert not hasattr(norm, "bias")


def test_defaults_of_layer_norm_2d():
    norm = fastnorm.LayerNorm2d(3)
    assert (norm.normalized_shape, norm.eps) == ((3,), 1e-6)
    assert_same_bits(norm.weight, np.ones(3, np.float32))
    assert_same_bits(norm.bias, np.zeros(3, np.float32))


@pytest.mark.parametrize("cls", TRAILING)
@pytest.mark.parametrize("shape", [5, (5,), [5], np.int32(5)], ids=repr)
def test_forms_of_normalized_shape(cls, shape):
    assert cls(shape).normalized_shape == (5,)
    assert type(cls(shape).normalized_shape[0]) is int


def test_gemma_begins_as_the_plain_norm(x, dtype):
    """Its checkpoints hold the factor less 1: zeros are a factor of 1."""
    norm = fastnorm.RMSNorm(9, offset=1.0, dtype=dtype)
    assert (norm.weight == 0).all()
    assert_same_bits(norm(x), fastnorm.rms_norm(x))
    norm.weight += 0.5
    assert_same_bits(norm(x), fastnorm.rms_norm(x, weight=np.full(9, 1.5)))


def test_settings_of_rms_norm_are_fixed():
    norm = fastnorm.RMSNorm(3)
    for name in ("offset", "round_before_weight", "normalized_shape", "dtype"):
        with pytest.raises(AttributeError):
            setattr(norm, name, getattr(norm, name))


def test_without_parameters(x, dtype):
    bare = fastnorm.LayerNorm(9, elementwise_affine=False, dtype=dtype)
    assert bare.weight is None
    assert bare.bias is None
    assert bare.parameters() == {}
    assert bare.state_dict() == {}
    assert_same_bits(bare(x), fastnorm.layer_norm(x))
    no_bias = fastnorm.LayerNorm(9, bias=False, dtype=dtype)
    assert list(no_bias.parameters()) == ["weight"]
    assert no_bias.bias is None


def test_rms_norm_without_parameters(x, dtype):
    bare = fastnorm.RMSNorm(9, elementwise_affine=False, offset=1.0, dtype=dtype)
    assert bare.weight is None
    assert bare.state_dict() == {}
    assert_same_bits(bare(x), fastnorm.rms_norm(x))
    dx, grads = bare.backward(x, bare.forward(x)[1])
    assert dx.shape == x.shape
    assert grads == {}


def test_parameters_are_the_arrays_themselves(norm):
    parameters = norm.parameters()
    assert list(parameters) == ["weight", "bias"]
    assert parameters["weight"] is norm.weight
    assert parameters["bias"] is norm.bias


def test_parameters_are_aligned(any_norm):
    for array in any_norm.parameters().values():
        assert array.ctypes.data % 64 == 0


@pytest.mark.parametrize(("arguments", "exception", "words"), [
    (((),), ValueError, ["normalized_shape", "()"]),
    ((-3,), ValueError, ["normalized_shape", "-3"]),
    ((2.5,), TypeError, ["normalized_shape", "2.5"]),
    ((3, -1.0), ValueError, ["eps", "-1.0"]),
    ((3, np.nan), ValueError, ["eps", "nan"]),
    ((3, "x"), TypeError, ["eps", "x"]),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("cls", TRAILING)
def test_bad_construction(cls, arguments, exception, words):
    with pytest.raises(exception) as caught:
        cls(*arguments)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(("cls", "options", "exception", "message"), [
    (fastnorm.LayerNorm, {"eps": None}, TypeError, "eps: got None, wanted"),
    (fastnorm.RMSNorm, {"offset": np.inf}, ValueError, "offset: got inf, wanted"),
    (fastnorm.RMSNorm, {"offset": "1"}, TypeError, "offset: got '1', wanted"),
    (fastnorm.LayerNorm2d, {"num_channels": (3,)}, TypeError, "num_channels: got (3,), wanted"),
    (fastnorm.LayerNorm2d, {"num_channels": -1}, ValueError, "num_channels: got -1, wanted"),
], ids=str)  # fmt: skip
def test_bad_settings(cls, options, exception, message):
    first = "num_channels" if cls is fastnorm.LayerNorm2d else "normalized_shape"
    with pytest.raises(exception) as caught:
        cls(**{first: 3, **options})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [np.int8, np.int32, complex, object, ">f4", "f2,f2", "x", None])
def test_bad_dtype(cls, dtype):
    with pytest.raises(TypeError, match=r"^dtype: got .*, wanted float16, bfloat16 .*float64$"):
        cls(3, dtype=dtype)


def test_bfloat16_takes_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    interop = fastnorm.dispatch.interop
    interop.bfloat16.cache_clear()
    try:
        with pytest.raises(TypeError, match=r"^dtype: got 'bfloat16', wanted .*ml_dtypes"):
            fastnorm.LayerNorm(3, dtype="bfloat16")
    finally:
        interop.bfloat16.cache_clear()


@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_of_any_storage_type(cls, stored):
    norm = cls(9, dtype=stored)
    assert norm.dtype == stored
    assert cls(9, dtype=stored.name).dtype == stored
    for array in norm.parameters().values():
        assert array.dtype == stored
    norm.weight = np.full(9, 1 / 3)
    assert_same_bits(norm.weight, np.full(9, 1 / 3).astype(stored))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(("value", "exception"), [
    (np.ones(8), ValueError), (np.ones((1, 9)), ValueError), (1.0, ValueError),
    (np.ones(9, complex), TypeError), (np.ma.ones(9), TypeError),
], ids=str)  # fmt: skip
def test_bad_parameter_leaves_the_old_one(norm, name, value, exception):
    before = getattr(norm, name).copy()
    with pytest.raises(exception, match=rf"^{name}: got .*, wanted"):
        setattr(norm, name, value)
    assert_same_bits(getattr(norm, name), before)


def test_bad_eps_leaves_the_old_one(any_norm):
    with pytest.raises(ValueError, match=r"^eps: got -1, wanted"):
        any_norm.eps = -1
    assert any_norm.eps == 1e-3


def test_eps_of_rms_norm(x):
    """None is the machine epsilon of what is computed in, whatever the parameters' type."""
    norm = fastnorm.RMSNorm(9, dtype=x.dtype)
    small = x * 1e-6
    assert_same_bits(norm(small), fastnorm.rms_norm(small, eps=float(np.finfo(x.dtype).eps)))
    norm.eps = 0.5
    assert_same_bits(norm(small), fastnorm.rms_norm(small, eps=0.5))
    norm.eps = None
    assert norm.eps is None
    for other in (np.float64, np.float32, np.float16):
        moved = small.astype(other)
        assert_same_bits(norm(moved), fastnorm.rms_norm(moved, eps=None))


# ---- calls ---------------------------------------------------------------------------------------


def test_call(isa, any_norm, x):
    want = functional(any_norm, x)
    assert_same_bits(any_norm(x), want)
    out = np.empty_like(x)
    assert any_norm(x, out) is out
    assert_same_bits(out, want)
    assert any_norm(x, out=x) is x
    assert_same_bits(x, want)


@pytest.mark.parametrize("offset", [0.0, 1.0, -0.25])
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("name", _core.DTYPES)
def test_call_of_rms_norm(isa, stored, name, rounds, offset, rng):
    """Every type of the weight and of x, and both forms of each setting."""
    norm = fastnorm.RMSNorm(70, offset=offset, round_before_weight=rounds, dtype=stored)
    filled(norm, rng)
    for shape in ((1, 70), (5, 70), (2, 3, 70)):
        x = rng.standard_normal(shape).astype(storage(name))
        want = functional(norm, x)
        assert want.dtype == x.dtype
        assert_same_bits(norm(x), want)
        assert_same_bits(norm(x[::-1]), functional(norm, x[::-1]))
        y, saved = norm.forward(x)
        assert_same_bits((y, saved[1]), functional(norm, x, return_stats=True))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", _core.DTYPES)
def test_call_on_any_type(isa, cls, stored, name, rng):
    norm = filled(cls(9, dtype=stored), rng)
    x = rng.standard_normal((4, 9)).astype(storage(name))
    want = functional(norm, x)
    assert want.dtype == x.dtype
    assert_same_bits(norm(x), want)
    assert_same_bits(norm(x, np.empty_like(x)), want)
    assert_same_bits(norm.forward(x)[0], want)


@pytest.mark.parametrize("cls", CLASSES)
def test_call_on_what_is_no_array(cls, rng):
    norm, x = filled(cls(9), rng), rng.standard_normal((4, 9))
    assert_same_bits(norm(x.tolist()), norm(x))
    with pytest.raises(TypeError, match=r"^x: got a masked array"):
        norm(np.ma.array(x))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", _core.DTYPES)
def test_tensors(cls, name, rng):
    """Tensors in, tensors out; parameters may be assigned from tensors."""
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(rng.standard_normal((4, 9))).to(getattr(torch, name))
    norm = cls(9, dtype=torch.float64)
    assert norm.dtype == np.float64
    norm.weight = tensor[0]
    assert_same_bits(norm.weight, tensor[0].double().numpy())
    y, saved = norm.forward(tensor)
    assert torch.equal(norm(tensor), y)
    assert y.dtype == tensor.dtype
    dx, _ = norm.backward(y, saved)
    assert (type(dx), dx.dtype) == (torch.Tensor, tensor.dtype)
    with pytest.raises(TypeError, match=r"^weight: got a tensor that requires grad.*detach"):
        norm.weight = torch.ones(9, requires_grad=True)


@pytest.mark.parametrize("shape", [(2, 9), (2, 9, 5), (2, 9, 4, 3), (1, 9, 2, 3, 4), (0, 9, 2, 2)])
def test_layer_norm_2d_is_the_norm_of_the_channels_last(dtype, shape, rng):
    norm = filled(fastnorm.LayerNorm2d(9, dtype=dtype), rng)
    last = fastnorm.LayerNorm(9, eps=1e-6, dtype=dtype)
    last.load_state_dict(norm.state_dict())
    x = rng.standard_normal(shape).astype(dtype)
    moved = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    want, want_saved = last.forward(moved)
    y, saved = norm.forward(x)
    assert_same_bits(np.moveaxis(y, 1, -1), want)
    assert_same_bits(norm(x), y)
    dx, grads = norm.backward(x, saved)
    want_dx, want_grads = last.backward(moved, want_saved)
    assert_same_bits(np.moveaxis(dx, 1, -1), want_dx)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, want_grads[name], 1e-4, 1e-4)


@pytest.mark.parametrize("shape", [(), (9,), (2, 8), (9, 2), (2, 8, 9, 9)])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_2d_wants_its_channels(shape, affine):
    norm, x = fastnorm.LayerNorm2d(9, elementwise_affine=affine), np.ones(shape, np.float32)
    for call in (norm, norm.forward):
        for given in (x, x.tolist()):
            with pytest.raises(ValueError, match=r"^x: got shape .*, wanted \(N, 9, \.\.\.\)"):
                call(given)


def test_call_with_a_wrong_shape(norm):
    out = np.full((4, 8), 7, np.float32)
    with pytest.raises(ValueError, match=r"^normalized_shape: got \(9,\) for x of shape \(4, 8\)"):
        norm(np.ones((4, 8), np.float32), out)
    assert (out == 7).all()


def test_changes_in_place_take_effect(any_norm, x):
    any_norm(x)
    for array in any_norm.parameters().values():
        array *= 2
        array[3] = 5
    assert_same_bits(any_norm(x), functional(any_norm, x))
    assert any_norm.weight[3] == 5


@pytest.mark.parametrize("cls", CLASSES)
def test_changes_in_place_take_effect_in_half_types(cls, stored, rng):
    """Nothing that was converted for one call may be left for the next."""
    norm, x = filled(cls(9, dtype=stored), rng), rng.standard_normal((4, 9)).astype(stored)
    before = norm(x)
    norm.weight[:] *= 2
    after = norm(x)
    assert_same_bits(after, functional(norm, x))
    assert (after != before).any()


def test_assignments_take_effect_and_copy(norm, x, dtype, rng):
    weight = rng.standard_normal(9)
    norm.weight = weight
    weight[:] = 0
    assert (norm.weight != 0).all()
    assert norm.weight.dtype == dtype
    norm.bias, norm.eps = None, 0.5
    assert_same_bits(norm(x), fastnorm.layer_norm(x, 9, norm.weight, None, 0.5))
    assert list(norm.parameters()) == ["weight"]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_forward_and_backward_of_rms_norm(isa, x, offset, rng):
    norm = filled(fastnorm.RMSNorm(9, offset=offset, dtype=x.dtype), rng)
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    y, saved = norm.forward(x)
    assert_same_bits(y, norm(x))
    dx, grads = norm.backward(dy, saved)
    _, rstd = fastnorm.rms_norm(x, return_stats=True)
    want = fastnorm.rms_norm_backward(dy, x, 9, rstd, norm.weight, offset=offset)
    assert_same_bits((dx, grads["weight"]), want)
    assert list(grads) == ["weight"]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_gradients_of_half_types(cls, name, rng):
    """dx is of x's type; the parameters' gradients are float32, whatever their own type."""
    dtype = storage(name)
    norm, x = filled(cls(9, dtype=dtype), rng), rng.standard_normal((4, 9)).astype(dtype)
    dx, grads = norm.backward(x, norm.forward(x)[1])
    assert dx.dtype == dtype
    assert list(grads) == list(norm.parameters())
    for grad in grads.values():
        assert grad.dtype == np.float32
        assert grad.any()


def test_forward_and_backward(isa, norm, x, rng):
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    y, saved = norm.forward(x)
    assert_same_bits(y, norm(x))
    dx, grads = norm.backward(dy, saved)
    _, mean, rstd = fastnorm.layer_norm(x, eps=1e-3, return_stats=True)
    want = fastnorm.layer_norm_backward(dy, x, 9, mean, rstd, norm.weight)
    assert list(grads) == ["weight", "bias"]
    assert_same_bits((dx, grads["weight"], grads["bias"]), want)


def test_backward_without_parameters(x, dtype):
    bare = fastnorm.LayerNorm(9, elementwise_affine=False, dtype=dtype)
    dx, grads = bare.backward(x, bare.forward(x)[1])
    assert dx.shape == x.shape
    assert grads == {}
    no_bias = fastnorm.LayerNorm(9, bias=False, dtype=dtype)
    assert list(no_bias.backward(x, no_bias.forward(x)[1])[1]) == ["weight"]


def test_calls_leave_nothing_on_the_object(norm, x):
    """Two forwards may be open at once."""
    other = x[::-1] * 3
    _, saved = norm.forward(x)
    _, other_saved = norm.forward(other)
    want = norm.backward(x, norm.forward(x)[1])[0]
    norm.backward(other, other_saved)
    assert_same_bits(norm.backward(x, saved)[0], want)


def test_many_threads_may_call_one_module(any_norm, dtype, rng):
    norm = any_norm
    inputs = [rng.standard_normal((rows, 9)).astype(dtype) for rows in range(1, 65)]
    want = [norm(x) for x in inputs]

    def work(k):
        y, saved = norm.forward(inputs[k])
        return y, norm(inputs[k]), norm.backward(y, saved)[0]

    with ThreadPoolExecutor(8) as pool:
        for k, (y, again, dx) in enumerate(pool.map(work, [*range(64)] * 20)):
            assert_same_bits((y, again), (want[k % 64],) * 2)
            assert dx.shape == y.shape


# ---- state dicts ---------------------------------------------------------------------------------


def test_state_dict_is_a_copy_under_torch_names(norm):
    state = norm.state_dict()
    assert list(state) == ["weight", "bias"]
    state["weight"][:] = 0
    assert (norm.weight != 0).any()


def test_load_state_dict(any_norm, dtype, x):
    other = type(any_norm)(9, eps=1e-3, dtype=dtype)
    assert other.load_state_dict(any_norm.state_dict()) == ([], [])
    assert other == any_norm
    assert_same_bits(other(x), any_norm(x))


def test_load_state_dict_of_torch(x):
    torch = pytest.importorskip("torch")
    for cls, theirs in (
        (fastnorm.LayerNorm, torch.nn.LayerNorm(9)),
        (fastnorm.LayerNorm2d, torch.nn.LayerNorm(9)),
        (fastnorm.RMSNorm, torch.nn.RMSNorm(9)),
        (fastnorm.RMSNorm, torch.nn.RMSNorm(9, dtype=torch.bfloat16)),
    ):
        torch.nn.init.normal_(theirs.weight)
        norm = cls(9)
        norm.load_state_dict(theirs.state_dict())
        assert_same_bits(norm.weight, theirs.weight.detach().float().numpy())


def test_load_state_dict_that_is_not_strict(norm):
    """As torch: what is missing stays, what is unknown is passed over, and both are told."""
    before = copy.deepcopy(norm)
    state = {"weight": np.arange(9), "running_mean": np.ones(3)}
    keys = norm.load_state_dict(state, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["bias"], ["running_mean"])
    assert (norm.weight == np.arange(9)).all()
    assert_same_bits(norm.bias, before.bias)
    assert norm.load_state_dict({}, False) == (["weight", "bias"], [])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_load_state_dict_takes_no_none(norm, name, strict):
    """It would take the parameter away."""
    before = copy.deepcopy(norm)
    with pytest.raises(TypeError, match=rf"^{name}: got None, wanted an array of shape \(9,\)"):
        norm.load_state_dict({**norm.state_dict(), name: None}, strict=strict)
    assert norm == before


@pytest.mark.parametrize("state", [None, [], np.ones(9), "weight"], ids=str)
def test_load_state_dict_of_no_mapping(norm, state):
    with pytest.raises(TypeError, match=r"^state_dict: got \w+, wanted a mapping"):
        norm.load_state_dict(state)


@pytest.mark.parametrize("change", [
    lambda state: state.pop("bias"),
    lambda state: state.update(running_mean=np.ones(9)),
    lambda state: state.clear(),
], ids=["missing", "unknown", "empty"])  # fmt: skip
def test_load_state_dict_with_wrong_keys(norm, change):
    state, before = norm.state_dict(), copy.deepcopy(norm)
    change(state)
    with pytest.raises(KeyError, match=r"state_dict: got keys .*, wanted .*'bias', 'weight'"):
        norm.load_state_dict(state)
    assert norm == before


def test_load_state_dict_is_all_or_nothing(norm):
    before = copy.deepcopy(norm)
    for name in ("weight", "bias"):
        state = {key: value * 2 for key, value in norm.state_dict().items()}
        state[name] = np.ones(8)
        with pytest.raises(ValueError, match=rf"^{name}: got shape \(8,\), wanted \(9,\)"):
            norm.load_state_dict(state)
        assert norm == before


# ---- copies and comparison -----------------------------------------------------------------------

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {p}": lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(2, 6)},
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(how, any_norm, x):
    norm, other = any_norm, COPIES[how](any_norm)
    assert other == norm
    assert (other.eps, other.normalized_shape, other.dtype) == (1e-3, (9,), norm.dtype)
    assert_same_bits(other(x), norm(x))
    other.weight = np.zeros(9)
    assert other != norm
    assert (norm.weight != 0).any()


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("cls", [fastnorm.LayerNorm, fastnorm.LayerNorm2d])
def test_copies_without_parameters(cls, how, options):
    norm = cls(4, **options)
    other = COPIES[how](norm)
    assert other == norm
    assert other.state_dict().keys() == norm.state_dict().keys()


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("cls", CLASSES)
def test_copies_of_every_type(cls, how, stored, rng):
    norm = filled(cls(4, dtype=stored), rng)
    other = COPIES[how](norm)
    assert other == norm
    assert (other.dtype, other.weight.dtype) == (stored, stored)


@pytest.mark.parametrize("how", COPIES)
def test_copies_keep_the_settings_of_rms_norm(how, rng):
    x = rng.standard_normal((2, 4)).astype(np.float16)
    for options in ({}, {"offset": 1.0}, {"round_before_weight": True}, {"eps": 0.5}):
        norm = filled(fastnorm.RMSNorm(4, **options), rng)
        other = COPIES[how](norm)
        assert repr(other) == repr(norm)
        assert_same_bits(other(x), norm(x))


def test_a_deep_copy_shares_nothing(norm):
    other = copy.deepcopy(norm)
    other.weight[:] = 0
    assert (norm.weight != 0).any()


class Named(fastnorm.LayerNorm):
    """A subclass with something of its own."""

    def __init__(self, name):
        super().__init__(9)
        self.name = name


class NamedRMS(fastnorm.RMSNorm):
    """As Named."""

    def __init__(self, name):
        super().__init__(9, offset=1.0)
        self.name = name


@pytest.mark.parametrize("cls", [Named, NamedRMS])
def test_subclasses_keep_their_attributes(cls):
    for how in COPIES.values():
        other = how(cls("first"))
        assert type(other) is cls
        assert other.name == "first"
        assert other == cls("second")


def test_equality(dtype):
    norm = fastnorm.LayerNorm(4, dtype=dtype)
    assert norm == fastnorm.LayerNorm((4,), dtype=dtype)
    for other in (
        fastnorm.LayerNorm(5, dtype=dtype),
        fastnorm.LayerNorm((1, 4), dtype=dtype),
        fastnorm.LayerNorm(4, eps=1e-6, dtype=dtype),
        fastnorm.LayerNorm(4, bias=False, dtype=dtype),
        fastnorm.LayerNorm(4, dtype=np.float64 if dtype == np.float32 else np.float32),
        "LayerNorm",
        None,
    ):
        assert norm != other
    other = fastnorm.LayerNorm(4, dtype=dtype)
    other.bias[2] = 1
    assert norm != other


def test_equality_is_of_one_class_and_its_settings():
    norms = [
        fastnorm.LayerNorm(4, 1e-6), fastnorm.LayerNorm2d(4), fastnorm.RMSNorm(4),
        fastnorm.RMSNorm(4, 1e-6), fastnorm.RMSNorm(4, offset=1.0),
        fastnorm.RMSNorm(4, round_before_weight=True), fastnorm.RMSNorm(4, dtype="float16"),
        fastnorm.RMSNorm(4, elementwise_affine=False),
    ]  # fmt: skip
    for i, one in enumerate(norms):
        for j, other in enumerate(norms):
            assert (one == copy.deepcopy(other)) == (i == j)
    with pytest.raises(TypeError, match="unhashable"):
        hash(norms[0])


def test_repr():
    assert repr(fastnorm.LayerNorm((3, 4), 1e-6, bias=False)) == (
        "LayerNorm((3, 4), eps=1e-06, elementwise_affine=True, bias=False, dtype=float32)"
    )
    assert repr(fastnorm.LayerNorm2d(3, dtype="float16")) == (
        "LayerNorm2d(3, eps=1e-06, elementwise_affine=True, bias=True, dtype=float16)"
    )
    assert repr(fastnorm.RMSNorm(3, elementwise_affine=False, offset=1)) == (
        "RMSNorm((3,), eps=None, elementwise_affine=False, offset=1.0, round_before_weight=False, "
        "dtype=float32)"
    )


@pytest.mark.parametrize("cls", TRAILING)
@pytest.mark.parametrize("name", ["float32", "float16"])
def test_assigning_a_parameter_while_another_thread_calls(cls, name):
    """A call holds the parameters it began with, also while it has let go of the GIL."""
    norm = cls(1 << 18)
    x = np.zeros((4, 1 << 18), name)
    stop = threading.Event()

    def assign():
        while not stop.is_set():
            norm.weight = np.ones(1 << 18, np.float32)

    thread = threading.Thread(target=assign)
    thread.start()
    try:
        for _ in range(100):
            assert not norm(x).any()
    finally:
        stop.set()
        thread.join()
