"""Which backend, instruction set, threads and regime a call gets, and what is said of it."""

import inspect
import json
import os

import numpy as np
import pytest
import threadpoolctl

import fastnorm
from fastnorm import _core, dispatch, threads

from .helpers import child
from .helpers.arguments import BACKWARD, FORWARD, SEGMENTS, arrays_of, outputs, valid
from .helpers.arrays import assert_same_bits
from .helpers.storage import STORAGE

LARGE = (4096, 768)
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
needs_openmp = pytest.mark.skipif(not _core.openmp(), reason="built without OpenMP")
needs_two_cpus = pytest.mark.skipif(
    _core.threads()["max"] < 2, reason=f"one thread at most here: {_core.threads()}"
)


# ---- instruction sets ----------------------------------------------------------------------------


def test_some_instruction_set_runs():
    """Tests on an instruction set skip where the CPU lacks it: at least one must not."""
    supported = [name for name in _core.isa_names() if _core.isa_supported(name)]
    assert "scalar" in supported
    assert _core.isa_active() in supported


def test_expected_instruction_sets_are_compiled_in():
    machine = os.uname().machine
    expected = {"x86_64": ("avx512", "avx2", "scalar"), "aarch64": ("neon", "scalar")}
    assert _core.isa_names() == expected.get(machine, ("scalar",))


def test_the_best_instruction_set_is_chosen():
    best = next(name for name in _core.isa_names() if _core.isa_supported(name))
    code = "from fastnorm import _core; print(_core.isa_active())"
    assert child.output(code, FASTNORM_ISA=None) == best
    assert child.output(code, FASTNORM_ISA="") == best


def test_select_isa(isa):
    assert _core.isa_active() == isa


def test_select_isa_with_a_wrong_name():
    before = _core.isa_active()
    with pytest.raises(ValueError, match=r"got 'sse9', wanted one of: .*scalar"):
        _core.select_isa("sse9")
    assert _core.isa_active() == before


def test_environment_chooses_the_instruction_set(isa):
    code = """
        import fastnorm
        config = fastnorm.show_config("dicts")["isa"]
        print(config["active"], "/", config["why"])
    """
    assert child.output(code, FASTNORM_ISA=isa) == f"{isa} / FASTNORM_ISA={isa}"


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "avx2 ", "neonn", "0"])
def test_unknown_instruction_set_is_an_error_at_import(name):
    message = child.error("import fastnorm", FASTNORM_ISA=name).splitlines()[-1]
    assert message.startswith("ValueError: FASTNORM_ISA")
    assert repr(name) in message
    for usable in filter(_core.isa_supported, _core.isa_names()):
        assert usable in message


def test_instruction_set_that_the_cpu_lacks_is_an_error_at_import():
    lacking = [name for name in _core.isa_names() if not _core.isa_supported(name)]
    if not lacking:
        pytest.skip("this CPU has every instruction set compiled in; test_c_core.py fakes others")
    message = child.error("import fastnorm", FASTNORM_ISA=lacking[0]).splitlines()[-1]
    assert message.startswith("RuntimeError: FASTNORM_ISA")
    assert lacking[0] in message
    assert "scalar" in message


# ---- number of threads ---------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _forget_requested_threads():
    before = _core.threads()["requested"] or 0
    yield
    _core.set_requested_threads(before)


def test_set_num_threads():
    fastnorm.set_num_threads(1)
    assert fastnorm.get_num_threads() == 1
    fastnorm.set_num_threads(1000)
    assert fastnorm.get_num_threads() <= max(1, CPUS)


def test_num_threads_restores():
    fastnorm.set_num_threads(3)
    with fastnorm.num_threads(1):
        assert fastnorm.get_num_threads() == 1
        with fastnorm.num_threads(2):
            assert _core.threads()["requested"] == 2
        assert _core.threads()["requested"] == 1
    assert _core.threads()["requested"] == 3


def test_num_threads_restores_after_an_exception():
    before = _core.threads()["requested"]
    with pytest.raises(KeyError), fastnorm.num_threads(1):
        raise KeyError
    assert _core.threads()["requested"] == before


def test_num_threads_of_several_threads_restore():
    """Blocks that do not lie within each other end where the first of them began."""
    fastnorm.set_num_threads(3)
    first, second = fastnorm.num_threads(1), fastnorm.num_threads(2)
    first.__enter__()
    second.__enter__()
    assert _core.threads()["requested"] == 2
    first.__exit__(None, None, None)
    assert _core.threads()["requested"] == 2
    second.__exit__(None, None, None)
    assert _core.threads()["requested"] == 3


def test_set_num_threads_forgets():
    fastnorm.set_num_threads(1)
    fastnorm.set_num_threads(None)
    assert _core.threads()["requested"] is None


def enter_num_threads(count):
    with fastnorm.num_threads(count):
        pass


@pytest.mark.parametrize(("call", "count", "exception"), [
    (enter_num_threads, None, TypeError),
    *[
        (call, *wrong)
        for call in (fastnorm.set_num_threads, enter_num_threads)
        for wrong in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError))
    ],
])  # fmt: skip
def test_bad_number_of_threads(call, count, exception):
    before = _core.threads()["requested"]
    with pytest.raises(exception, match=r"^n: got .*, wanted an integer of at least 1"):
        call(count)
    assert _core.threads()["requested"] == before


PRINT_THREADS = "import fastnorm; print(fastnorm.get_num_threads())"


def test_environment_limits_threads():
    assert child.output(PRINT_THREADS, FASTNORM_NUM_THREADS="1") == "1"
    unlimited = child.output(PRINT_THREADS, FASTNORM_NUM_THREADS=None)
    assert child.output(PRINT_THREADS, FASTNORM_NUM_THREADS="") == unlimited
    assert child.output(PRINT_THREADS, FASTNORM_NUM_THREADS="999") == unlimited


@pytest.mark.parametrize("value", ["0", "-2", "two", "1.5", "nan"])
def test_garbage_in_the_environment_is_an_error_at_import(value):
    message = child.error("import fastnorm", FASTNORM_NUM_THREADS=value).splitlines()[-1]
    assert message == (
        f"ValueError: FASTNORM_NUM_THREADS: got {value!r}, wanted an integer of at least 1"
    )


@needs_openmp
def test_omp_num_threads_is_honoured():
    assert child.output(PRINT_THREADS, OMP_NUM_THREADS="1") == "1"


@needs_openmp
def test_threadpoolctl_sees_and_limits_us():
    x = np.ones(LARGE, np.float32)
    fastnorm.layer_norm(x)
    openmp = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "openmp"]
    assert openmp
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert fastnorm.get_num_threads() == 1
        assert fastnorm.explain("layer_norm", x).threads == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_affinity_is_honoured():
    code = """
        import os, fastnorm
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(fastnorm.get_num_threads(), fastnorm.show_config("dicts")["threads"]["affinity"])
    """
    assert child.output(code) == "1 1"


@needs_two_cpus
def test_quota_is_honoured():
    before = _core.threads()["cpu_quota"] or 0
    _core.set_cpu_quota(1)
    try:
        assert fastnorm.get_num_threads() == 1
    finally:
        _core.set_cpu_quota(before)


# ---- the container's CPU quota -------------------------------------------------------------------


def control_groups(root, lines, files):
    """A made-up /proc and /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("\n".join(lines) + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return threads.cpu_quota(root)


PERIOD = {"cpu/docker/a/cpu.cfs_period_us": "100000"}
V1 = ["3:cpu,cpuacct:/docker/a", "1:name=systemd:/docker/a"]


@pytest.mark.parametrize(("lines", "files", "quota"), [
    (["0::/"], {"cpu.max": "150000 100000\n"}, 1.5),
    (["0::/"], {"cpu.max": "max 100000\n"}, None),
    (["0::/a/b"], {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
    (["0::/a/b"], {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "200000 100000\n"}, 0.5),
    (["0::/a/b"], {"cpu.max": "300000 100000\n"}, 3),
    (["0::/"], {"cpu.max": "lots\n"}, None),
    (["0::/"], {"cpu.max": ""}, None),
    (["0::/"], {"cpu.max": "100000 0\n"}, None),
    (["0::/gone"], {}, None),
    (["0::/../../escaped"], {"cpu.max": "100000 100000\n"}, 1),
    (V1, {"cpu/docker/a/cpu.cfs_quota_us": "50000", **PERIOD}, 0.5),
    (V1, {"cpu/docker/a/cpu.cfs_quota_us": "-1", **PERIOD}, None),
    (V1, {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "75000", "cpu,cpuacct/cpu.cfs_period_us": "50000"}, 1.5),
    (V1, {"cpu/cpu.cfs_quota_us": "what", "cpu/cpu.cfs_period_us": "100000"}, None),
    (V1, {"cpu/cpu.cfs_quota_us": "50000"}, None),
    (["nonsense"], {}, None),
    ([""], {}, None),
    ([*V1, "0::/x"], {"unified/x/cpu.max": "100000 100000",
                      "cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
])  # fmt: skip
def test_cpu_quota(tmp_path, lines, files, quota):
    assert control_groups(tmp_path, lines, files) == quota


def test_cpu_quota_without_control_groups(tmp_path):
    assert threads.cpu_quota(tmp_path) is None


# ---- explain -------------------------------------------------------------------------------------


def test_explain_names_what_runs(isa):
    plan = fastnorm.explain(fastnorm.layer_norm, np.ones((3, 768), np.float32), 768)
    assert (plan.op, plan.backend, plan.isa) == ("layer_norm", "cpu", isa)
    assert (plan.dtype, plan.rows, plan.cols) == ("float32", 3, 768)
    assert (plan.threads, plan.stream, plan.copies) == (1, False, ())
    assert plan.reasons
    assert all(isinstance(reason, str) for reason in plan.reasons)
    for word in ("layer_norm", "cpu", isa, "float32", "768"):
        assert word in str(plan)


@pytest.mark.parametrize("op", _core.OPS)
def test_explain_takes_functions_and_names(op, dtype):
    arguments = valid(op, dtype, (40, 5, 50))
    by_name = fastnorm.explain(op, **arguments)
    assert by_name == fastnorm.explain(getattr(fastnorm, op), **arguments)
    rows, cols = (2, 39 * 250) if op in SEGMENTS else (200, 50)
    assert (by_name.op, by_name.rows, by_name.cols) == (op, rows, cols)
    assert by_name.dtype == dtype.name
    assert by_name.copies == ()


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("op", _core.OPS)
def test_explain_names_the_type_of_x(op, storage):
    plan = fastnorm.explain(op, **valid(op, storage))
    assert (plan.dtype, plan.copies) == (storage.name, ())


def test_explain_names_bfloat16_bits():
    x = np.zeros((3, 4), np.uint16)
    assert fastnorm.explain("layer_norm", x, dtype="bfloat16").dtype == "bfloat16"


def test_explain_knows_every_op():
    assert set(dispatch.CALLS) == set(_core.OPS)
    for op in ("softmax", "layernorm", "_layer_norm", "LayerNorm", len, fastnorm.LayerNorm, None):
        with pytest.raises(ValueError, match=r"^op: got .*, wanted one of: ") as caught:
            fastnorm.explain(op, np.ones(3))
        for name in _core.OPS:
            assert name in str(caught.value)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_explain_takes_modules(storage):
    x = np.ones((2, 6, 8, 8), np.float32).astype(storage)
    out = np.empty_like(x)
    layer, rms = fastnorm.LayerNorm((6, 8, 8)), fastnorm.RMSNorm(8, offset=1.0)
    channels = fastnorm.LayerNorm2d(6, dtype="float64")
    op = fastnorm.explain
    w, b = layer.weight, layer.bias
    assert op(layer, x) == op("layer_norm", x, (6, 8, 8), w, b)
    assert op(layer, x, out=x) == op(layer, x, x) == op("layer_norm", x, (6, 8, 8), w, b, out=x)
    assert op(rms, x, out) == op("rms_norm", x, 8, rms.weight, offset=1.0, out=out)
    assert op(channels, x) == op("layer_norm", x, None, channels.weight, channels.bias, axis=1)
    assert op(channels, x).regime == "columns"


def test_explain_of_modules_raises_what_the_call_would():
    norm, x = fastnorm.LayerNorm2d(3), np.ones((2, 4, 5), np.float32)
    with pytest.raises(ValueError, match=r"^x: got shape \(2, 4, 5\), wanted \(N, 3, "):
        fastnorm.explain(norm, x)
    with pytest.raises(ValueError, match=r"^normalized_shape"):
        fastnorm.explain(fastnorm.RMSNorm(3), x)
    for wrong, why in ((), "missing a required argument: 'x'"), ((x, None, None), "too many"):
        with pytest.raises(TypeError, match=f"^{why}"):
            fastnorm.explain(norm, *wrong)


@pytest.mark.parametrize("kind", [fastnorm.WeightNorm, fastnorm.SpectralNorm])
def test_explain_takes_no_modules_of_weights(kind):
    with pytest.raises(ValueError, match=rf"^op: got {kind.__name__}\(.*, wanted one of: "):
        fastnorm.explain(kind(np.ones((3, 4))), np.ones((3, 4)))


def test_explain_raises_what_the_call_would():
    x = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"^eps"):
        fastnorm.explain("layer_norm", x, eps=-1.0)
    with pytest.raises(ValueError, match=r"^out"):
        fastnorm.explain("layer_norm", x, out=np.ones((3, 5), np.float32))


@pytest.mark.parametrize("op", _core.OPS)
def test_explain_computes_nothing(op, dtype):
    given = outputs(op, dtype) if op in FORWARD else {}
    arguments = valid(op, dtype) | given
    before = [a.tobytes() for a in arrays_of(arguments)]
    fastnorm.explain(op, **arguments)
    assert [a.tobytes() for a in arrays_of(arguments)] == before


def unaligned(a):
    """A copy whose elements begin between the places where they should."""
    copy = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    copy[...] = a
    assert not copy.flags.aligned
    return copy


@pytest.mark.parametrize("op", _core.OPS)
def test_explain_says_what_is_copied(op, dtype):
    """Swapped bytes, elements that are not aligned, integers; nothing else that has x's shape."""
    arguments = valid(op, dtype)
    if op in FORWARD and op != "parallel_layer_norm":
        arguments |= outputs(op, dtype)
    large = {name: a for name, a in arguments.items()
             if isinstance(a, np.ndarray) and a.shape == (2, 3, 4)}  # fmt: skip
    assert large
    for name, a in large.items():
        for made, why in (
            (a.astype(dtype.newbyteorder("S")), "swapped"),
            (unaligned(a), "not aligned"),
            (a.astype(np.int16), "integers"),
        ):
            if why == "integers" and "out" in name:
                continue
            if why == "integers":  # which are float64, and the outputs with them
                rest = valid(op, np.float64) | {k: None for k in arguments if "out" in k}
            else:
                rest = arguments
            copies = fastnorm.explain(op, **rest | {name: made}).copies
            assert [c.partition(" ")[0] for c in copies] == [name]
            assert why in copies[0]


@pytest.mark.parametrize("op", [op for op in _core.OPS if op not in SEGMENTS])
def test_explain_of_views_tells_of_no_copies(op, dtype):
    """The kernels take every layout."""
    arguments = valid(op, dtype, (6, 6, 6))
    cubes = {name: a for name, a in arguments.items() if getattr(a, "ndim", 0) == 3}
    views = {
        "transposed": lambda a: a.T,
        "every other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        "backwards": lambda a: a[::-1, :, ::-1],
        "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
        "columns": lambda a: np.repeat(a, 2, axis=-1)[..., 3:9],
    }
    for make in views.values():
        made = {name: make(a) for name, a in cubes.items()}
        assert fastnorm.explain(op, **arguments | made).copies == ()
    if "axis" not in inspect.signature(dispatch.CALLS[op]).parameters:
        return
    if op in BACKWARD:
        cubes["normalized_shape"] = None
    lead = {"mean", "rstd"} & arguments.keys()
    for axis in (0, 1, (0, 2), (0, 1, 2)):
        mean = np.mean(cubes.get("x", cubes.get("sum")), axis)
        statistics = dict.fromkeys(lead, mean)
        assert fastnorm.explain(op, **cubes, **statistics, axis=axis).copies == ()


@pytest.mark.parametrize("op", SEGMENTS)
def test_packed_rows_are_one_run_of_memory(op, dtype):
    """What is not contiguous is copied, out too."""
    arguments = valid(op, dtype)
    wide = {name: np.repeat(a, 2, axis=-1)[..., ::2] for name, a in arguments.items()
            if name in ("x", "dy")}  # fmt: skip
    if op in FORWARD:
        wide["out"] = np.empty((2, 3, 8), dtype)[..., ::2]
    copies = fastnorm.explain(op, **arguments | wide).copies
    assert sorted(copies) == sorted(f"{name} is copied: it is not contiguous" for name in wide)


def test_explain_takes_no_memory_for_results():
    """Nor for statistics, scales and copies: x here is 8 TiB of one number."""
    x = np.broadcast_to(np.float32(1), (2**30, 2**11))
    swapped = np.broadcast_to(np.array(1, np.dtype(np.float32).newbyteorder("S")), x.shape)
    assert fastnorm.explain("layer_norm", x, return_stats=True).rows == 2**30
    assert fastnorm.explain("layer_norm", x, dtype=np.int8).rows == 2**30
    assert fastnorm.explain("add_rms_norm", x, swapped).copies == (
        "residual is copied: its bytes are swapped",
    )
    assert fastnorm.explain("segment_layer_norm", x, [0, 2**30]).rows == 1
    assert fastnorm.explain("moments", x).rows == 2**30


def test_explain_says_when_rows_lie_side_by_side(dtype):
    x = np.ones((2, 30, 40), dtype)
    assert fastnorm.explain("layer_norm", x, axis=1).regime == "columns"
    assert fastnorm.explain("rms_norm", x, axis=0, dtype="float16").regime == "columns"
    assert fastnorm.explain("layer_norm", x, axis=2).regime != "columns"
    assert fastnorm.explain("layer_norm", x[:, :, :7], axis=1).regime == "group"


def test_explain_says_when_it_streams():
    x = np.ones((9000, 768), np.float32)
    limit = _core.pool()["limit"]
    fastnorm.set_pool_limit(0)  # nothing is kept, so a new result has no pages yet
    warm = fastnorm.explain("layer_norm", x, out=x)
    fresh = fastnorm.explain("layer_norm", x)
    fastnorm.set_pool_limit(limit)
    assert warm.stream
    assert warm.regime == "stream"
    assert not fresh.stream
    assert not fastnorm.explain("layer_norm", x[:100], out=x[:100]).stream


@needs_two_cpus
def test_explain_says_how_many_threads():
    x = np.ones(LARGE, np.float32)
    most = fastnorm.get_num_threads()
    assert fastnorm.explain("layer_norm", x).threads == most
    assert fastnorm.explain("layer_norm", x[:8]).threads == 1
    assert fastnorm.explain("layer_norm", x[:1]).threads == 1
    with fastnorm.num_threads(1):
        assert fastnorm.explain("layer_norm", x).threads == 1


def test_explanations_are_plain_values():
    plan = fastnorm.explain("moments", np.ones((3, 4)))
    fields = plan.asdict()
    assert json.loads(json.dumps(fields))["op"] == "moments"
    assert {"backend", "isa", "threads", "regime", "stream", "copies", "reasons"} <= fields.keys()
    with pytest.raises(AttributeError):
        plan.isa = "other"


# ---- show_config ---------------------------------------------------------------------------------


def test_show_config_as_dicts(isa):
    config = fastnorm.show_config(mode="dicts")
    json.dumps(config)
    assert config["version"] == fastnorm.__version__
    assert config["numpy"] == np.__version__
    assert config["isa"]["compiled"] == list(_core.isa_names())
    assert config["isa"]["active"] == isa
    assert isa in config["isa"]["supported"]
    assert config["isa"]["why"]
    ops = {name.removesuffix("_backward") for name in config["ops"]}
    assert ops == {name for name in fastnorm.__all__ if f"{name}_backward" in fastnorm.__all__} | {
        "parallel_layer_norm", "moments", "adaptive_instance_norm",
    }  # fmt: skip
    assert config["openmp"] is _core.openmp()
    assert config["threads"]["max"] == fastnorm.get_num_threads()
    assert config["threads"].keys() >= {"requested", "openmp", "affinity", "cpu_quota"}
    fastnorm.set_num_threads(1)
    assert fastnorm.show_config("dicts")["threads"]["requested"] == 1


def test_show_config_prints(capsys):
    assert fastnorm.show_config() is None
    text = capsys.readouterr().out
    for word in (fastnorm.__version__, np.__version__, *_core.isa_names(), "threads", "openmp"):
        assert word in text


def test_show_config_with_another_mode():
    with pytest.raises(ValueError, match=r"^mode: got 'json', wanted 'stdout' or 'dicts'"):
        fastnorm.show_config("json")


# ---- the lists that everything iterates over -----------------------------------------------------


def test_every_op_is_public_and_has_a_reference():
    assert set(_core.STRAIGHT) <= set(_core.OPS)
    assert set(_core.COMPUTE_DTYPES) <= set(_core.DTYPES)
    for op in _core.OPS:
        assert callable(getattr(fastnorm, op))
        assert callable(getattr(fastnorm.reference, op))
        assert op in fastnorm.__all__


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("op", _core.OPS)
def test_every_op_takes_every_type(op, storage):
    """Results have x's type; statistics and sums over rows have the type that is computed in."""
    arguments = valid(op, storage)
    result = getattr(fastnorm, op)(**arguments)
    first = result[0] if isinstance(result, tuple) else result
    for y in first if isinstance(first, tuple) else [first]:
        compute = np.dtype("f8" if storage == np.float64 else "f4")
        assert y.dtype == (compute if op == "moments" else storage)
        assert y.shape == ((2, 3) if op == "moments" else (2, 3, 4))
    for gradient in result[1:] if op in BACKWARD else ():
        assert gradient.dtype == compute


def test_moments_are_those_of_layer_norm(dtype, rng):
    x = rng.standard_normal((3, 4)).astype(dtype)
    assert_same_bits(fastnorm.moments(x)[0], fastnorm.layer_norm(x, return_stats=True)[1])


def test_public_names_exist():
    for name in fastnorm.__all__:
        assert getattr(fastnorm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'batch_norm2'"):
        _ = fastnorm.batch_norm2


def test_empty_is_aligned(dtype):
    for shape in (0, 1, 7, (3, 5), (100, 768), ()):
        a = fastnorm.empty(shape, dtype)
        assert a.ctypes.data % 64 == 0
        assert a.shape == np.empty(shape).shape
        assert a.dtype == dtype
        assert a.flags.c_contiguous
        assert a.flags.writeable
    assert fastnorm.empty(3).dtype == np.float32
