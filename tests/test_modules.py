"""LayerNorm: parameters, calls, forward and backward, state dicts, copies."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastnorm

from .helpers.arrays import assert_same_bits


@pytest.fixture
def norm(dtype, rng):
    """A LayerNorm whose parameters are no ones and zeros."""
    module = fastnorm.LayerNorm(9, eps=1e-3, dtype=dtype)
    module.weight, module.bias = rng.standard_normal((2, 9))
    return module


@pytest.fixture
def x(dtype, rng):
    return rng.standard_normal((4, 9)).astype(dtype)


# ---- construction and parameters -----------------------------------------------------------------


def test_defaults():
    norm = fastnorm.LayerNorm((3, 4))
    assert (norm.normalized_shape, norm.eps) == ((3, 4), 1e-5)
    assert_same_bits(norm.weight, np.ones((3, 4), np.float32))
    assert_same_bits(norm.bias, np.zeros((3, 4), np.float32))


@pytest.mark.parametrize("shape", [5, (5,), [5], np.int32(5)], ids=repr)
def test_forms_of_normalized_shape(shape):
    assert fastnorm.LayerNorm(shape).normalized_shape == (5,)


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


def test_parameters_are_the_arrays_themselves(norm):
    parameters = norm.parameters()
    assert list(parameters) == ["weight", "bias"]
    assert parameters["weight"] is norm.weight
    assert parameters["bias"] is norm.bias


def test_parameters_are_aligned(norm):
    assert norm.weight.ctypes.data % 64 == 0
    assert norm.bias.ctypes.data % 64 == 0


@pytest.mark.parametrize(("arguments", "exception", "words"), [
    (((),), ValueError, ["normalized_shape", "()"]),
    ((-3,), ValueError, ["normalized_shape", "-3"]),
    ((2.5,), TypeError, ["normalized_shape", "2.5"]),
    ((3, -1.0), ValueError, ["eps", "-1.0"]),
    ((3, np.nan), ValueError, ["eps", "nan"]),
    ((3, "x"), TypeError, ["eps", "x"]),
], ids=str)  # fmt: skip
def test_bad_construction(arguments, exception, words):
    with pytest.raises(exception) as caught:
        fastnorm.LayerNorm(*arguments)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("dtype", [np.float16, np.int32, complex, object])
def test_bad_dtype(dtype):
    with pytest.raises(TypeError, match=r"^dtype: got .*, wanted float32 or float64"):
        fastnorm.LayerNorm(3, dtype=dtype)


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


def test_bad_eps_leaves_the_old_one(norm):
    with pytest.raises(ValueError, match=r"^eps: got -1, wanted"):
        norm.eps = -1
    assert norm.eps == 1e-3


# ---- calls ---------------------------------------------------------------------------------------


def test_call(isa, norm, x):
    want = fastnorm.layer_norm(x, 9, norm.weight, norm.bias, 1e-3)
    assert_same_bits(norm(x), want)
    out = np.empty_like(x)
    assert norm(x, out) is out
    assert_same_bits(out, want)
    assert norm(x, out=x) is x
    assert_same_bits(x, want)


def test_call_on_another_type(norm, x, rng):
    other = x.astype(np.float64 if x.dtype == np.float32 else np.float32)
    want = fastnorm.layer_norm(other, 9, norm.weight, norm.bias, 1e-3)
    assert norm(other).dtype == other.dtype
    assert_same_bits(norm(other), want)
    assert_same_bits(norm(x.tolist()), norm(np.array(x.tolist())))


def test_call_with_a_wrong_shape(norm):
    out = np.full((4, 8), 7, np.float32)
    with pytest.raises(ValueError, match=r"^normalized_shape: got \(9,\) for x of shape \(4, 8\)"):
        norm(np.ones((4, 8), np.float32), out)
    assert (out == 7).all()


def test_changes_in_place_take_effect(norm, x):
    norm(x)
    norm.weight *= 2
    norm.bias[3] = 5
    assert_same_bits(norm(x), fastnorm.layer_norm(x, 9, norm.weight, norm.bias, 1e-3))
    assert norm.bias[3] == 5


def test_assignments_take_effect_and_copy(norm, x, dtype, rng):
    weight = rng.standard_normal(9)
    norm.weight = weight
    weight[:] = 0
    assert (norm.weight != 0).all()
    assert norm.weight.dtype == dtype
    norm.bias, norm.eps = None, 0.5
    assert_same_bits(norm(x), fastnorm.layer_norm(x, 9, norm.weight, None, 0.5))
    assert list(norm.parameters()) == ["weight"]


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


def test_many_threads_may_call_one_module(norm, dtype, rng):
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


def test_load_state_dict(norm, dtype, x):
    other = fastnorm.LayerNorm(9, eps=1e-3, dtype=dtype)
    other.load_state_dict(norm.state_dict())
    assert other == norm
    assert_same_bits(other(x), norm(x))


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
def test_copies(how, norm, x):
    other = COPIES[how](norm)
    assert other == norm
    assert (other.eps, other.normalized_shape, other.dtype) == (1e-3, (9,), norm.dtype)
    assert_same_bits(other(x), norm(x))
    other.weight = np.zeros(9)
    assert other != norm
    assert (norm.weight != 0).any()


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}], ids=str)
def test_copies_without_parameters(how, options):
    norm = fastnorm.LayerNorm(4, **options)
    other = COPIES[how](norm)
    assert other == norm
    assert other.state_dict().keys() == norm.state_dict().keys()


def test_a_deep_copy_shares_nothing(norm):
    other = copy.deepcopy(norm)
    other.weight[:] = 0
    assert (norm.weight != 0).any()


class Named(fastnorm.LayerNorm):
    """A subclass with something of its own."""

    def __init__(self, name):
        super().__init__(9)
        self.name = name


def test_subclasses_keep_their_attributes():
    for how in COPIES.values():
        other = how(Named("first"))
        assert type(other) is Named
        assert other.name == "first"


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


def test_repr():
    text = repr(fastnorm.LayerNorm((3, 4), 1e-6, bias=False))
    for word in ("LayerNorm", "(3, 4)", "1e-06", "float32"):
        assert word in text


def test_assigning_a_parameter_while_another_thread_calls():
    """A call holds the parameters it began with, also while it has let go of the GIL."""
    norm = fastnorm.LayerNorm(1 << 18)
    x = np.ones((4, 1 << 18), np.float32)
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
