"""BatchNorm, GroupNorm and InstanceNorm: parameters, running statistics, modes, calls, forward and
backward, state dicts, copies."""

import copy
import os
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastnorm

from .helpers import child
from .helpers.arrays import assert_same_bits
from .helpers.storage import FLOAT64, STORAGE, cast, compute_type

DIALECTS = ("torch", "keras", "flax", "onnx")
MAKERS = {
    "BatchNorm": lambda **o: fastnorm.BatchNorm(6, **o),
    "BatchNorm, untracked": lambda **o: fastnorm.BatchNorm(6, track_running_stats=False, **o),
    "GroupNorm": lambda **o: fastnorm.GroupNorm(3, 6, **o),
    "InstanceNorm": lambda **o: fastnorm.InstanceNorm(6, **{"affine": True, **o}),
    "InstanceNorm, tracked": lambda **o: fastnorm.InstanceNorm(
        6, **{"affine": True, "track_running_stats": True, **o}
    ),
}
TRACKING = ("BatchNorm", "InstanceNorm, tracked")
WITH_MODES = tuple(name for name in MAKERS if name != "GroupNorm")
every_kind = pytest.mark.parametrize("kind", MAKERS)
tracking = pytest.mark.parametrize("kind", TRACKING)
storage = pytest.mark.parametrize("stored", STORAGE, ids=str)


def filled(module, rng):
    """The module, with parameters and statistics that are no ones and zeros."""
    for name, array in module.parameters().items():
        setattr(module, name, rng.standard_normal(array.shape))
    if getattr(module, "track_running_stats", False):
        module.running_mean = rng.standard_normal(6)
        module.running_var = rng.random(6) + 0.5
        module.num_batches_tracked = 3
    return module


@pytest.fixture
def x(dtype, rng):
    return (rng.standard_normal((4, 6, 7)) + 0.5).astype(dtype)


def functional(module, x, **options):
    """What the op itself makes of the module's settings; running statistics are not moved."""
    options |= {"weight": module.weight, "bias": module.bias, "eps": module.eps,
                "channel_axis": module.channel_axis}  # fmt: skip
    if isinstance(module, fastnorm.GroupNorm):
        return fastnorm.group_norm(x, module.num_groups, **options)
    if module.track_running_stats and not module.training:
        return fastnorm.batch_norm(x, module.running_mean, module.running_var, **options)
    if isinstance(module, fastnorm.BatchNorm):
        return fastnorm.batch_norm(x, None, None, training=True, **options)
    return fastnorm.instance_norm(x, **options)


def modes(module):
    """The module in each of its modes."""
    if hasattr(module, "train"):
        yield module.eval()
        yield module.train()
    else:
        yield module


# ---- construction and parameters -----------------------------------------------------------------


def test_defaults():
    norm = fastnorm.BatchNorm(4)
    assert (norm.num_features, norm.eps, norm.momentum) == (4, 1e-5, 0.1)
    assert (norm.affine, norm.track_running_stats, norm.training) == (True, True, True)
    assert (norm.channel_axis, norm.dialect, norm.dtype) == (1, "torch", np.float32)
    assert_same_bits(norm.weight, np.ones(4, np.float32))
    assert_same_bits(norm.bias, np.zeros(4, np.float32))
    assert_same_bits(norm.running_mean, np.zeros(4, np.float32))
    assert_same_bits(norm.running_var, np.ones(4, np.float32))
    assert norm.num_batches_tracked == 0


def test_defaults_of_group_norm():
    norm = fastnorm.GroupNorm(2, 4)
    assert (norm.num_groups, norm.num_channels, norm.eps, norm.affine) == (2, 4, 1e-5, True)
    assert_same_bits(norm.weight, np.ones(4, np.float32))
    assert_same_bits(norm.bias, np.zeros(4, np.float32))
    for name in ("train", "eval", "training", "running_mean"):
        assert not hasattr(norm, name)


def test_defaults_of_instance_norm():
    norm = fastnorm.InstanceNorm(4)
    assert (norm.num_features, norm.eps, norm.momentum) == (4, 1e-5, 0.1)
    assert (norm.affine, norm.track_running_stats, norm.training) == (False, False, True)
    assert norm.parameters() == norm.state_dict() == {}
    assert norm.weight is norm.bias is norm.running_mean is norm.running_var is None
    assert norm.num_batches_tracked is None


@every_kind
def test_settings_are_fixed(kind):
    norm = MAKERS[kind]()
    for name in ("num_features", "num_channels", "num_groups", "channel_axis", "dialect", "dtype",
                 "affine", "track_running_stats"):  # fmt: skip
        if hasattr(norm, name):
            with pytest.raises(AttributeError):
                setattr(norm, name, getattr(norm, name))


@every_kind
def test_parameters_are_the_arrays_themselves(kind, dtype):
    norm = MAKERS[kind](dtype=dtype)
    assert list(norm.parameters()) == ["weight", "bias"]
    assert norm.parameters()["weight"] is norm.weight
    assert norm.parameters()["bias"] is norm.bias
    for name, array in norm.state_dict().items():
        assert array.dtype == (np.int64 if name == "num_batches_tracked" else dtype)
    for array in norm.parameters().values():
        assert array.ctypes.data % 64 == 0


@every_kind
@storage
def test_arrays_of_any_storage_type(kind, stored):
    """Running statistics are of the type that is computed in: half of one loses small steps."""
    norm = MAKERS[kind](dtype=stored.name)
    assert (norm.dtype, norm.weight.dtype, norm.bias.dtype) == (stored,) * 3
    norm.weight = np.full(6, 1 / 3)
    assert_same_bits(norm.weight, np.full(6, 1 / 3).astype(stored))
    if kind in TRACKING:
        computed = compute_type(stored)
        assert (norm.running_mean.dtype, norm.running_var.dtype) == (computed, computed)


BAD_SETTINGS = [
    ("BatchNorm", (-1,), {}, ValueError, "num_features: got -1, wanted"),
    ("BatchNorm", (2.5,), {}, TypeError, "num_features: got 2.5, wanted"),
    ("InstanceNorm", ((3,),), {}, TypeError, "num_features: got (3,), wanted"),
    ("BatchNorm", (2**70,), {}, ValueError, f"num_features: got {2**70}, wanted"),
    ("GroupNorm", (2, "4"), {}, TypeError, "num_channels: got '4', wanted"),
    ("GroupNorm", (0, 4), {}, ValueError, "num_groups: got 0, wanted"),
    ("GroupNorm", (3, 4), {}, ValueError, "num_groups: got 3, wanted a divisor of 4"),
    ("GroupNorm", (2.0, 4), {}, TypeError, "num_groups: got 2.0, wanted"),
    ("BatchNorm", (3,), {"eps": -1.0}, ValueError, "eps: got -1.0, wanted"),
    ("GroupNorm", (1, 3), {"eps": None}, TypeError, "eps: got None, wanted"),
    ("BatchNorm", (3,), {"momentum": np.nan}, ValueError, "momentum: got nan, wanted"),
    ("BatchNorm", (3,), {"momentum": "0.1"}, TypeError, "momentum: got '0.1', wanted"),
    ("InstanceNorm", (3,), {"momentum": None}, TypeError, "momentum: got None, wanted"),
    ("BatchNorm", (3,), {"dialect": "tf"}, ValueError, "dialect: got 'tf', wanted"),
    ("InstanceNorm", (3,), {"dialect": None}, TypeError, "dialect: got NoneType, wanted"),
    ("BatchNorm", (3,), {"channel_axis": 0}, ValueError, "channel_axis: got 0, wanted"),
    ("GroupNorm", (1, 3), {"channel_axis": 1.0}, TypeError, "channel_axis: got 1.0, wanted"),
    ("BatchNorm", (3,), {"dtype": np.int8}, TypeError, "dtype: got <class 'numpy.int8'>, wanted"),
    ("InstanceNorm", (3,), {"dtype": None}, TypeError, "dtype: got None, wanted"),
]


@pytest.mark.parametrize(("cls", "arguments", "options", "exception", "message"), BAD_SETTINGS)
def test_bad_settings(cls, arguments, options, exception, message):
    with pytest.raises(exception) as caught:
        getattr(fastnorm, cls)(*arguments, **options)
    assert str(caught.value).startswith(message)


@every_kind
@pytest.mark.parametrize(("value", "exception"), [
    (np.ones(5), ValueError), (np.ones((1, 6)), ValueError), (1.0, ValueError),
    (np.ones(6, complex), TypeError), (np.ma.ones(6), TypeError),
], ids=str)  # fmt: skip
def test_bad_array_leaves_the_old_one(kind, value, exception, rng):
    norm = filled(MAKERS[kind](), rng)
    before = copy.deepcopy(norm)
    for name in norm.state_dict().keys() - {"num_batches_tracked"}:
        with pytest.raises(exception, match=rf"^{name}: got .*, wanted"):
            setattr(norm, name, value)
        assert norm == before


@tracking
def test_running_statistics_are_no_parameters(kind):
    norm = MAKERS[kind]()
    assert list(norm.parameters()) == ["weight", "bias"]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        with pytest.raises(TypeError, match=rf"^{name}: got None, wanted"):
            setattr(norm, name, None)
        with pytest.raises(AttributeError, match=rf"^{name}: .*track_running_stats=False"):
            setattr(MAKERS["BatchNorm, untracked"](), name, np.ones(6))


def test_num_batches_tracked_is_a_count():
    norm = fastnorm.BatchNorm(3)
    for value in (5, np.int32(5), np.array(5), np.array([5])):
        norm.num_batches_tracked = value
        assert norm.num_batches_tracked == 5
        assert type(norm.num_batches_tracked) is int
    for value, exception in (
        (-1, ValueError), (2**70, (TypeError, ValueError)), (1.0, TypeError), ("1", TypeError),
        ([1, 2], ValueError), (True, TypeError),
    ):  # fmt: skip
        with pytest.raises(exception, match=r"^num_batches_tracked: got .*, wanted"):
            norm.num_batches_tracked = value
        assert norm.num_batches_tracked == 5


def test_bad_eps_and_momentum_leave_the_old_ones():
    norm = fastnorm.BatchNorm(3)
    with pytest.raises(ValueError, match=r"^eps: got -1, wanted"):
        norm.eps = -1
    with pytest.raises(ValueError, match=r"^momentum: got inf, wanted"):
        norm.momentum = np.inf
    assert (norm.eps, norm.momentum) == (1e-5, 0.1)
    norm.eps, norm.momentum = 0.5, None
    assert (norm.eps, norm.momentum) == (0.5, None)


# ---- calls ---------------------------------------------------------------------------------------


@every_kind
def test_call(isa, kind, x, rng):
    for norm in modes(filled(MAKERS[kind](eps=1e-3, dtype=x.dtype), rng)):
        want = functional(norm, x)
        assert_same_bits(norm(x), want)
        norm = copy.deepcopy(norm)  # whose running statistics may have moved
        want = functional(norm, x)
        out = np.empty_like(x)
        assert norm(x, out) is out
        assert_same_bits(out, want)
        in_place = x.copy()
        want = functional(norm, x)
        assert norm(in_place, out=in_place) is in_place
        assert_same_bits(in_place, want)


@every_kind
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 2, 3), (2, 6, 2, 1, 3), (1, 6, 1), (0, 6, 2)])
def test_shapes(kind, shape, rng):
    for axis in (1, -1, 2):
        if axis < len(shape):
            x = np.moveaxis(rng.standard_normal(shape).astype(np.float32), 1, axis)
            for norm in modes(filled(MAKERS[kind](channel_axis=axis), rng)):
                assert_same_bits(norm(x), functional(norm, x))
                y, saved = norm.forward(x)
                dx, grads = norm.backward(y, saved)
                assert (y.shape, dx.shape) == (x.shape, x.shape)
                assert [grad.shape for grad in grads.values()] == [(6,), (6,)]


@every_kind
@storage
@pytest.mark.parametrize("kind_of_x", STORAGE, ids=str)
def test_call_on_any_type(kind, stored, kind_of_x, rng):
    x = cast(rng.standard_normal((4, 6, 7)), kind_of_x)
    for norm in modes(filled(MAKERS[kind](dtype=stored), rng)):
        want = functional(norm, x)
        assert want.dtype == x.dtype
        assert_same_bits(norm(x), want)
        y, saved = norm.forward(x)
        dx, grads = norm.backward(y, saved)
        assert dx.dtype == x.dtype
        assert [g.dtype for g in grads.values()] == [compute_type(kind_of_x)] * 2


@every_kind
def test_call_on_what_is_no_array(kind, rng):
    x = rng.standard_normal((4, 6, 7))
    for norm in modes(filled(MAKERS[kind](), rng)):
        assert_same_bits(norm(x.tolist()), norm(x))
        with pytest.raises(TypeError, match=r"^x: got a masked array"):
            norm(np.ma.array(x))


@every_kind
@pytest.mark.parametrize("shape", [(), (6,), (2, 5), (6, 2), (2, 5, 6, 6)])
def test_x_has_the_channels(kind, shape):
    for affine in (True, False):
        norm = MAKERS[kind](affine=affine)
        before = copy.deepcopy(norm)
        x = np.ones(shape, np.float32)
        for call in (norm, norm.forward):
            for given in (x, x.tolist()):
                with pytest.raises(ValueError, match=r"^x: got shape .*, wanted 6 channels on ax"):
                    call(given)
        assert norm == before


@every_kind
def test_forward_and_backward(isa, kind, x, rng):
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    for norm in modes(filled(MAKERS[kind](eps=1e-3, dtype=x.dtype), rng)):
        want_y, mean, rstd = functional(norm, x, return_stats=True)
        y, saved = norm.forward(x)
        assert_same_bits(y, want_y)
        dx, grads = norm.backward(dy, saved)
        assert list(grads) == ["weight", "bias"]
        common = {"weight": norm.weight, "bias": norm.bias}
        if kind == "GroupNorm":
            want = fastnorm.group_norm_backward(dy, x, 3, mean, rstd, **common)
        elif kind.startswith("InstanceNorm") and saved[-1]:
            want = fastnorm.instance_norm_backward(dy, x, mean, rstd, **common)
        else:
            running = (norm.running_mean, norm.running_var) if not saved[-1] else (None, None)
            want = fastnorm.batch_norm_backward(
                dy, x, *running, training=saved[-1], eps=1e-3, mean=mean, rstd=rstd, **common
            )
        assert_same_bits((dx, grads["weight"], grads["bias"]), want)


@every_kind
def test_backward_is_the_gradient(kind, rng):
    """By differences, in both modes."""
    x, dy = rng.standard_normal((2, 2, 6, 3))
    for norm in modes(filled(MAKERS[kind](eps=0.1, dtype=np.float64), rng)):
        still = copy.deepcopy(norm)
        dx, grads = norm.backward(dy, norm.forward(x)[1])
        for place in np.ndindex(x.shape):
            moved = [x.copy() for _ in range(2)]
            moved[0][place] += 1e-5
            moved[1][place] -= 1e-5
            up, down = (functional(still, a) for a in moved)
            difference = (dy * (up - down)).sum() / 2e-5
            np.testing.assert_allclose(dx[place], difference, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(grads["bias"], dy.sum((0, 2)), rtol=1e-12)


@every_kind
def test_backward_without_parameters(kind, x, dtype):
    for norm in modes(MAKERS[kind](affine=False, dtype=dtype)):
        dx, grads = norm.backward(x, norm.forward(x)[1])
        assert dx.shape == x.shape
        assert grads == {}
    norm = MAKERS[kind](dtype=dtype)
    norm.bias = None
    assert list(norm.backward(x, norm.forward(x)[1])[1]) == ["weight"]
    norm.weight = None
    assert not norm.affine


@every_kind
@pytest.mark.parametrize("saved", [None, (), 3, [1, 2]], ids=str)
def test_backward_wants_what_forward_saved(kind, saved, x):
    with pytest.raises(TypeError, match=r"^saved: got \w+, wanted what forward returned"):
        MAKERS[kind]().backward(x, saved)


@every_kind
def test_calls_leave_nothing_on_the_object(kind, x, rng):
    """Two forwards may be open at once, and a mode is that of the forward call."""
    norm = filled(MAKERS[kind](dtype=x.dtype), rng)
    for _ in modes(norm):
        want = norm.backward(x, norm.forward(x)[1])[0]
        _, saved = norm.forward(x)
        _, other = norm.forward(x[::-1] * 3)
        for again in modes(norm):
            again.backward(x, other)
            if kind not in TRACKING or saved[-1]:
                assert_same_bits(again.backward(x, saved)[0], want)
            break


@every_kind
def test_changes_in_place_take_effect(kind, x, rng):
    for norm in modes(filled(MAKERS[kind](dtype=x.dtype), rng)):
        norm(x)
        for array in norm.parameters().values():
            array *= 2
            array[3] = 5
        if kind in TRACKING:
            norm.running_mean[:] += 1
        assert_same_bits(norm(x), functional(norm, x))
        assert norm.weight[3] == 5


@every_kind
def test_assignments_take_effect_and_copy(kind, x, rng):
    norm, weight = filled(MAKERS[kind](), rng), rng.standard_normal(6)
    norm.weight = weight
    weight[:] = 0
    assert (norm.weight != 0).all()
    assert norm.weight.dtype == np.float32
    norm.bias, norm.eps = None, 0.5
    assert_same_bits(norm(x), functional(norm, x))
    assert list(norm.parameters()) == ["weight"]


# ---- running statistics --------------------------------------------------------------------------


def expected(norm, x):
    """The running statistics that the op would leave, from where the module's are."""
    running = norm.running_mean.copy(), norm.running_var.copy()
    options = {"momentum": norm.momentum, "dialect": norm.dialect}
    if isinstance(norm, fastnorm.BatchNorm):
        fastnorm.batch_norm(x, *running, training=True, **options)
    else:
        fastnorm.instance_norm(x, *running, **options)
    return running


@tracking
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("momentum", [0.1, 0.99, 0.0, 1.0, -0.5, 1.75])
def test_training_moves_the_running_statistics(kind, dialect, momentum, x, rng):
    norm = filled(MAKERS[kind](momentum=momentum, dialect=dialect, dtype=x.dtype), rng)
    for call in (norm, norm.forward, lambda x: norm(x, np.empty_like(x))):
        want, count = expected(norm, x), norm.num_batches_tracked
        call(x)
        np.testing.assert_allclose(norm.running_mean, want[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(norm.running_var, want[1], rtol=1e-6, atol=1e-6)
        assert norm.num_batches_tracked == count + 1


@tracking
@pytest.mark.parametrize("dialect", DIALECTS)
def test_float32_statistics_are_the_ops_to_the_bit(kind, dialect, rng):
    norm = filled(MAKERS[kind](momentum=0.3, dialect=dialect), rng)
    for _ in range(20):
        x = rng.standard_normal((4, 6, 7)).astype(np.float32)
        want = expected(norm, x)
        norm(x)
        assert_same_bits((norm.running_mean, norm.running_var), want)


@tracking
def test_inference_moves_nothing(kind, x, rng):
    norm = filled(MAKERS[kind](dtype=x.dtype), rng).eval()
    before = norm.state_dict()
    norm(x)
    norm.backward(x, norm.forward(x)[1])
    for name, array in norm.state_dict().items():
        assert_same_bits(array, before[name])


@tracking
def test_no_elements_move_nothing(kind, rng):
    norm = filled(MAKERS[kind](), rng)
    before = copy.deepcopy(norm)
    for shape in ((0, 6, 7), (4, 6, 0)):
        assert norm(np.ones(shape, np.float32)).shape == shape
    assert norm == before


@tracking
def test_one_element_a_unit_is_legal(kind, rng):
    norm = MAKERS[kind](momentum=0.5)
    x = rng.standard_normal((1, 6)).astype(np.float32)
    assert_same_bits(norm(x), np.zeros((1, 6), np.float32))
    np.testing.assert_allclose(norm.running_mean, x[0] / 2, rtol=1e-6)
    np.testing.assert_array_equal(norm.running_var, np.full(6, 0.5))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_momentum_is_the_mean_of_all_batches(dialect, rng):
    norm = fastnorm.BatchNorm(6, momentum=None, dialect=dialect, dtype=np.float64)
    batches = rng.standard_normal((5, 4, 6, 7)) + 3
    for k, x in enumerate(batches, 1):
        norm(x)
        ddof = 1 if dialect == "torch" else 0
        seen = batches[:k]
        np.testing.assert_allclose(norm.running_mean, seen.mean((0, 1, 3)), rtol=1e-12)
        variances = seen.var((1, 3), ddof=ddof).mean(0)
        np.testing.assert_allclose(norm.running_var, variances, rtol=1e-12)
        assert norm.num_batches_tracked == k


@pytest.mark.parametrize("kind", WITH_MODES)
def test_modes(kind, x, rng):
    norm = filled(MAKERS[kind](dtype=x.dtype), rng)
    assert norm.eval() is norm
    assert not norm.training
    assert norm.train() is norm
    assert norm.training
    assert norm.train(False) is norm
    assert not norm.training
    norm.training = 1
    assert norm.training is True


@pytest.mark.parametrize("kind", ["BatchNorm, untracked", "InstanceNorm"])
def test_without_running_statistics_both_modes_are_the_same(kind, x, rng):
    norm = filled(MAKERS[kind](dtype=x.dtype), rng)
    assert not norm.track_running_stats
    want = norm.train()(x)
    assert_same_bits(norm.eval()(x), want)
    assert list(norm.state_dict()) == ["weight", "bias"]


@tracking
def test_a_call_that_fails_moves_nothing(kind, x, rng):
    norm = filled(MAKERS[kind](dtype=x.dtype), rng)
    before = copy.deepcopy(norm)
    for bad in (np.zeros((4, 6, 6), x.dtype), np.zeros(x.shape, int)):
        with pytest.raises((TypeError, ValueError), match=r"^out: got"):
            norm(x, bad)
    assert norm == before


def test_statistics_move_as_a_whole(rng):
    """Many threads at once: every batch counts once, and nobody sees half of a step."""
    norm = fastnorm.BatchNorm(6, momentum=None, dialect="keras", dtype=np.float64)
    # Batches of k times the same numbers, whose mean is 1 and whose variance is 1.
    base = rng.standard_normal((2, 6, 50))
    base -= base.mean((0, 2), keepdims=True)
    base = base / base.std((0, 2), keepdims=True) + 1
    batches = [base * k for k in range(1, 33)]
    norm.load_state_dict({**norm.state_dict(), "running_mean": np.ones(6)})
    torn = []
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            state = norm.state_dict()
            mean, var = state["running_mean"], state["running_var"]
            # Of weighted means of k and of k**2, the second is at least the first one's square.
            if (var < mean**2 * (1 - 1e-9)).any() or np.ptp(mean) > 1e-9:
                torn.append(state)

    watcher = threading.Thread(target=watch)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    watcher.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(norm, batches * 4))
    finally:
        stop.set()
        watcher.join()
        sys.setswitchinterval(before)
    assert norm.num_batches_tracked == 128
    np.testing.assert_allclose(norm.running_mean, 16.5, rtol=1e-9)
    assert not torn


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_of_a_process_that_trains():
    """Forked while another thread moves running statistics, it can move them too."""
    code = """
        import os, signal, threading, warnings
        import numpy as np
        import fastnorm

        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
        signal.alarm(50)
        norm, x = fastnorm.BatchNorm(6), np.ones((1, 6), np.float32)
        stop = threading.Event()

        def train():
            while not stop.is_set():
                norm(x)

        threads = [threading.Thread(target=train) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(60):
            pid = os.fork()
            if pid == 0:
                signal.alarm(10)
                before = norm.num_batches_tracked
                norm(x)
                os._exit(0 if norm.num_batches_tracked == before + 1 else 3)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status:
                break
        stop.set()
        for thread in threads:
            thread.join()
        print(status)
    """
    assert child.output(code, timeout=60) == "0"


@every_kind
def test_many_threads_may_call_one_module(kind, dtype, rng):
    norm = filled(MAKERS[kind](dtype=dtype), rng)
    inputs = [rng.standard_normal((n, 6, 5)).astype(dtype) for n in range(1, 33)]
    still = copy.deepcopy(norm)
    want = [functional(still, x) for x in inputs]

    def work(k):
        y, saved = norm.forward(inputs[k])
        return y, norm.backward(y, saved)[0]

    with ThreadPoolExecutor(8) as pool:
        for k, (y, dx) in enumerate(pool.map(work, [*range(32)] * 5)):
            assert_same_bits(y, want[k % 32])
            assert dx.shape == y.shape


# ---- state dicts ---------------------------------------------------------------------------------

KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def test_state_dict_is_a_copy_under_torch_names():
    norm = fastnorm.BatchNorm(6)
    state = norm.state_dict()
    assert list(state) == KEYS
    assert (state["num_batches_tracked"].dtype, state["num_batches_tracked"].shape) == (int, ())
    for array in state.values():
        array[...] = 7
    assert norm == fastnorm.BatchNorm(6)
    assert list(fastnorm.GroupNorm(2, 6).state_dict()) == KEYS[:2]
    assert list(fastnorm.BatchNorm(6, affine=False).state_dict()) == KEYS[2:]


@every_kind
def test_load_state_dict(kind, x, rng):
    norm = filled(MAKERS[kind](dtype=x.dtype), rng)
    other = MAKERS[kind](dtype=x.dtype)
    assert other.load_state_dict(norm.state_dict()) == ([], [])
    assert other == norm
    for one, same in zip(modes(norm), modes(other), strict=True):
        assert_same_bits(same(x), one(x))


@tracking
def test_load_state_dict_without_a_count(kind, rng):
    """Torch began to write it later than the statistics."""
    norm, other = filled(MAKERS[kind](), rng), MAKERS[kind]()
    state = norm.state_dict()
    del state["num_batches_tracked"]
    assert other.load_state_dict(state) == ([], [])
    assert other.num_batches_tracked == 0
    assert_same_bits(other.running_var, norm.running_var)
    assert other.load_state_dict(state, strict=False) == (["num_batches_tracked"], [])


@every_kind
def test_load_state_dict_that_is_not_strict(kind, rng):
    norm = filled(MAKERS[kind](), rng)
    before = copy.deepcopy(norm)
    state = {"weight": np.arange(6), "other": np.ones(3)}
    keys = norm.load_state_dict(state, strict=False)
    missing = [name for name in before.state_dict() if name != "weight"]
    assert (keys.missing_keys, keys.unexpected_keys) == (missing, ["other"])
    assert (norm.weight == np.arange(6)).all()
    assert_same_bits(norm.bias, before.bias)


@every_kind
@pytest.mark.parametrize("change", [
    lambda state: state.pop("bias"),
    lambda state: state.update(gain=np.ones(6)),
    lambda state: state.clear(),
], ids=["missing", "unknown", "empty"])  # fmt: skip
def test_load_state_dict_with_wrong_keys(kind, change, rng):
    norm = filled(MAKERS[kind](), rng)
    state, before = norm.state_dict(), copy.deepcopy(norm)
    change(state)
    with pytest.raises(KeyError, match=r"state_dict: got keys .*, wanted .*'bias'"):
        norm.load_state_dict(state)
    assert norm == before


@every_kind
def test_load_state_dict_is_all_or_nothing(kind, rng):
    norm = filled(MAKERS[kind](), rng)
    before = copy.deepcopy(norm)
    for name in norm.state_dict():
        for value, exception in ((np.ones(5), ValueError), (None, TypeError)):
            state = {key: value * 2 for key, value in norm.state_dict().items()}
            state[name] = value
            with pytest.raises(exception, match=rf"^{name}: got .*, wanted"):
                norm.load_state_dict(state)
            assert norm == before
    with pytest.raises(TypeError, match=r"^state_dict: got list, wanted a mapping"):
        norm.load_state_dict([])


# ---- copies and comparison -----------------------------------------------------------------------

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {p}": lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in range(2, 6)},
}


@pytest.mark.parametrize("how", COPIES)
@every_kind
def test_copies(how, kind, x, rng):
    for norm in modes(filled(MAKERS[kind](eps=1e-3, dtype=x.dtype), rng)):
        other = COPIES[how](norm)
        assert other == norm
        assert repr(other) == repr(norm)
        for name, array in other.state_dict().items():
            assert_same_bits(array, norm.state_dict()[name])
        for array in other.parameters().values():
            assert array.ctypes.data % 64 == 0
        assert_same_bits(other(x), norm(x))
        assert other == norm
        other.weight[:] = 0
        assert other != norm
        assert (norm.weight != 0).all()
        other.weight = norm.weight
        assert other == norm


@tracking
def test_copies_share_no_statistics(kind, x, rng):
    for how in COPIES.values():
        norm = filled(MAKERS[kind](dtype=x.dtype), rng)
        other = how(norm)
        other(x)
        assert other != norm
        assert norm.num_batches_tracked == 3
        other.running_mean[:] = 7
        assert (norm.running_mean != 7).all()


class Named(fastnorm.BatchNorm):
    """A subclass with something of its own."""

    def __init__(self, name):
        super().__init__(6)
        self.name = name


def test_subclasses_keep_their_attributes():
    for how in COPIES.values():
        other = how(Named("first"))
        assert type(other) is Named
        assert other.name == "first"
        assert other == Named("second")
        assert other != fastnorm.BatchNorm(6)


def test_equality():
    norms = [
        fastnorm.BatchNorm(4), fastnorm.BatchNorm(5), fastnorm.BatchNorm(4, 1e-3),
        fastnorm.BatchNorm(4, momentum=None), fastnorm.BatchNorm(4, affine=False),
        fastnorm.BatchNorm(4, track_running_stats=False), fastnorm.BatchNorm(4, channel_axis=-1),
        fastnorm.BatchNorm(4, dialect="keras"), fastnorm.BatchNorm(4, dtype=np.float64),
        fastnorm.BatchNorm(4).eval(), fastnorm.GroupNorm(2, 4), fastnorm.GroupNorm(4, 4),
        fastnorm.GroupNorm(2, 4, channel_axis=-1), fastnorm.GroupNorm(2, 4, affine=False),
        fastnorm.InstanceNorm(4), fastnorm.InstanceNorm(4, affine=True),
        fastnorm.InstanceNorm(4, track_running_stats=True), fastnorm.LayerNorm(4), None,
    ]  # fmt: skip
    for i, one in enumerate(norms):
        for j, other in enumerate(norms):
            assert (one == copy.deepcopy(other)) == (i == j), (one, other)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        other = fastnorm.BatchNorm(4)
        setattr(other, name, 5 if name == "num_batches_tracked" else np.full(4, 5.0))
        assert other != norms[0]
    with pytest.raises(TypeError, match="unhashable"):
        hash(norms[0])


def test_repr():
    assert repr(fastnorm.BatchNorm(3, 1e-3, 0.99, channel_axis=-1, dialect="keras")) == (
        "BatchNorm(3, eps=0.001, momentum=0.99, affine=True, track_running_stats=True, "
        "channel_axis=-1, dialect='keras', dtype=float32)"
    )
    assert repr(fastnorm.GroupNorm(2, 4, affine=False, dtype="float16")) == (
        "GroupNorm(2, 4, eps=1e-05, affine=False, channel_axis=1, dtype=float16)"
    )
    assert repr(fastnorm.InstanceNorm(3)) == (
        "InstanceNorm(3, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False, "
        "channel_axis=1, dialect='torch', dtype=float32)"
    )


# ---- torch ---------------------------------------------------------------------------------------


def twins(torch, track, affine=True):
    """Our module, torch's, and an input's shape."""
    double = {"dtype": torch.float64}
    options = {"affine": affine, "track_running_stats": track, **double}
    for axes, shape in enumerate(((5, 6), (4, 6, 7), (4, 6, 5, 3), (2, 6, 2, 3, 4))):
        flavour = f"{max(axes, 1)}d"
        theirs = getattr(torch.nn, f"BatchNorm{flavour}")(6, momentum=0.3, **options)
        yield fastnorm.BatchNorm(6, momentum=0.3, **options), theirs, shape
        if axes:
            theirs = getattr(torch.nn, f"InstanceNorm{flavour}")(6, momentum=0.3, **options)
            yield fastnorm.InstanceNorm(6, momentum=0.3, **options), theirs, shape
        if not track:
            theirs = torch.nn.GroupNorm(3, 6, affine=affine, **double)
            yield fastnorm.GroupNorm(3, 6, affine=affine, **double), theirs, shape


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_torch_does_the_same(track, affine, rng):
    """Three steps of training, then inference; outputs, gradients and state dicts."""
    torch = pytest.importorskip("torch")
    for ours, theirs, shape in twins(torch, track, affine):
        if affine:
            torch.nn.init.normal_(theirs.weight)
            torch.nn.init.normal_(theirs.bias)
        assert ours.load_state_dict(theirs.state_dict()) == ([], [])
        for step in range(4):
            if step == 3 and hasattr(ours, "eval"):
                ours.eval()
                theirs.eval()
            x, dy = rng.standard_normal((2, *shape)) * 2 + 1
            tensor = torch.from_numpy(x.copy()).requires_grad_()
            want = theirs(tensor)
            theirs.zero_grad()
            want.backward(torch.from_numpy(dy))
            y, saved = ours.forward(x)
            dx, grads = ours.backward(dy, saved)
            gradients = {name: p.grad for name, p in theirs.named_parameters()}
            assert grads.keys() == gradients.keys()
            for got, other in ((y, want.detach()), (dx, tensor.grad),
                               *((grads[name], gradients[name]) for name in grads)):  # fmt: skip
                np.testing.assert_allclose(got, other, rtol=1e-9, atol=1e-9)
            mine = ours.state_dict()
            assert list(mine) == list(theirs.state_dict())
            for name, value in theirs.state_dict().items():
                if not (name == "num_batches_tracked" and isinstance(ours, fastnorm.InstanceNorm)):
                    np.testing.assert_allclose(mine[name], value, rtol=1e-12)


def test_torch_loads_what_we_save(rng):
    torch = pytest.importorskip("torch")
    for ours, theirs, _ in twins(torch, True):
        filled(ours, rng)
        state = {name: torch.from_numpy(array) for name, array in ours.state_dict().items()}
        theirs.load_state_dict(state)
        for name, value in theirs.state_dict().items():
            np.testing.assert_array_equal(value, ours.state_dict()[name])


@every_kind
def test_tensors(kind, rng):
    """Tensors in, tensors out; parameters may be assigned from tensors."""
    torch = pytest.importorskip("torch")
    x = rng.standard_normal((4, 6, 7)).astype(np.float32)
    tensor = torch.from_numpy(x)
    for norm in modes(filled(MAKERS[kind](), rng)):
        same = copy.deepcopy(norm)
        y, saved = norm.forward(tensor)
        assert type(y) is torch.Tensor
        want, want_saved = same.forward(x)
        assert_same_bits(y.numpy(), want)
        dx, grads = norm.backward(tensor, saved)
        want_dx, want_grads = same.backward(x, want_saved)
        assert_same_bits(np.asarray(dx), want_dx)
        for name, grad in grads.items():
            assert_same_bits(np.asarray(grad), want_grads[name])
        assert norm == same
        assert torch.equal(norm(tensor), y) or kind in TRACKING
        norm.weight = tensor[0, :, 0]
        assert_same_bits(norm.weight, x[0, :, 0].copy())
    norm = fastnorm.BatchNorm(6, dtype=torch.float64)
    norm.num_batches_tracked = torch.tensor(4)
    assert (norm.num_batches_tracked, norm.dtype) == (4, FLOAT64)


@pytest.mark.parametrize(
    ("known", "message"), [({}, "mean: got None"), (np.ones(4), "saved: got a ndarray in it")]
)
def test_what_forward_did_not_return(known, message, rng):
    x = rng.standard_normal((3, 4)).astype("f4")
    with pytest.raises(TypeError, match=message):
        fastnorm.BatchNorm(4).backward(x, (x, known, True))
