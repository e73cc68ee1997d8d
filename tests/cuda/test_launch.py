"""From a call to the driver and back, on a driver that runs nothing: what it is given, in which
order, on which stream and context; and what happens where it refuses."""

import ctypes
import gc
import struct
import sys
import threading
import types
import weakref

import numpy as np
import pytest

from fastnorm import _cuda

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
from . import libraries
from .capsules import Exporter as Counted
from .driver import PTX
from .libraries import Exporter, Interface, Tensor, address, memory

OPTIONS = ("shape", "eps", "dtype")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, driver):
    libraries.install(monkeypatch)


@pytest.fixture(scope="module")
def pair(loaded_driver):
    """A kernel of two arrays."""
    return _cuda.Kernel(0, PTX, "pair", "aa")


@pytest.fixture(scope="module")
def mixed(loaded_driver):
    return _cuda.Kernel(0, PTX, "mixed", "aqfd")


class Copy:
    """An op of x and out, as fastnorm's are made: how often was it built, and of what?"""

    def __init__(self, kernel, workspace=(), steps=1, names=("x", "out", *OPTIONS)):
        self.kernel, self.workspace, self.steps, self.built = kernel, workspace, steps, []
        self.op = _cuda.Op("copy", names, self.build, written=(1,))

    def build(self, x, out, *options):
        self.built.append((x, out, *options))
        item = x.itemsize
        new = [] if out is not None else [(x.shape, x.dtype)]
        y = ("arg", 1, x.size, item) if out is not None else ("new", 0, x.size, item)
        first = ("work", 0, 64, 4) if self.workspace else ("arg", 0, x.size, item)
        steps = [(self.kernel, 3, 64, 0, (first, y))] * self.steps
        return _cuda.Entry(steps, new, self.workspace, y[:2])

    def __call__(self, x, out=None, shape=None, eps=1e-5, dtype=None):
        return self.op(x, out, shape, eps, dtype)


@pytest.fixture
def copy(pair):
    return Copy(pair)


def rows(kind=Tensor, shape=(4, 8), dtype=np.float32, **options):
    return kind(memory(shape, dtype), **options)


# ---- kernels ----


def test_parameters_as_the_kernel_reads_them(driver, mixed):
    mixed.launch(7, 96, 1024, 5, [(4096, 10, 2), 2**40 + 3, 1e-5, 1e-300])
    [launch] = driver.launches()
    assert launch[:5] == ("mixed", 7, 96, 1024, 5)
    words = launch.words()
    assert words[:8] == [0, 0, 10, 2, 4096, 10, 2, 2**40 + 3]
    eps, wide = launch.parameters[64:68], launch.parameters[72:]
    assert struct.unpack("<f", eps) == (np.float32(1e-5),)
    assert struct.unpack("<d", wide) == (1e-300,)


def test_arrays_and_nothing_as_parameters(driver, pair):
    array = memory((3, 5), np.float64)
    pair.launch(1, 32, 0, 0, [_cuda.describe("x", Interface(array)), None])
    words = driver.launches()[0].words()
    assert words == [0, 0, 15, 8, address(array), 15, 8] + [0] * 7


def test_arguments_that_do_not_fit(driver, pair):
    for args in ([], [None], [None] * 3):
        with pytest.raises(ValueError, match="wanted 2: 'aa'"):
            pair.launch(1, 32, 0, 0, args)
    with pytest.raises(ValueError, match=r"^layout: got 'ax'"):
        _cuda.Kernel(0, PTX, "pair", "ax")
    with pytest.raises(ValueError, match=r"^layout: got 518 words, wanted at most 512"):
        _cuda.Kernel(0, PTX, "pair", "a" * 74)
    assert driver.launches() == []


def test_what_a_kernel_says_of_itself(pair):
    assert (pair.entry, pair.device, pair.layout) == ("pair", 0, "aa")
    assert pair.attributes == {"threads": 1024, "shared": 512, "local": 0, "registers": 64}


def test_images_that_do_not_load(driver):
    modules = driver.live("modules")
    with pytest.raises(_cuda.DriverError, match=r"^kernel pair: ptxas fatal.*INVALID_IMAGE") as bad:
        _cuda.Kernel(0, b"nonsense\0", "pair", "aa")
    assert bad.value.code == 200
    with pytest.raises(_cuda.DriverError, match=r"^kernel other: .*CUDA error 500"):
        _cuda.Kernel(0, PTX, "other", "aa")
    with pytest.raises(_cuda.DriverError, match=r"^device 2: the driver has 2"):
        _cuda.Kernel(2, PTX, "pair", "aa")
    driver.fail("cuModuleLoadDataEx", 2)
    with pytest.raises(MemoryError, match=r"^kernel pair: .*CUDA_ERROR_OUT_OF_MEMORY"):
        _cuda.Kernel(0, PTX, "pair", "aa")
    gc.collect()
    assert driver.live("modules") == modules


def test_kernels_are_unloaded_with_their_last_reference(driver):
    modules, held = driver.live("modules"), _cuda.handles()["modules"]
    kernels = [_cuda.Kernel(device, PTX, "pair", "aa") for device in (0, 1, 0)]
    assert driver.live("modules") == modules + 3
    assert _cuda.handles()["modules"] == held + 3
    copy = Copy(kernels[0])
    copy(rows())
    del kernels
    assert driver.live("modules") == modules + 1  # the kept call has it
    copy.op.clear()
    del copy
    gc.collect()
    assert driver.live("modules") == modules
    assert _cuda.handles()["modules"] == held
    assert driver.live("contexts") <= 2  # one a device, however often it was wanted


@pytest.mark.parametrize(
    ("wanted", "asked"),
    [([0, 1 << 10, 47 << 10], []), ([100 << 10, 64 << 10, 100 << 10, 120 << 10], [100, 120])],
)
def test_shared_memory_beyond_48_kb_is_asked_for_once(driver, wanted, asked):
    kernel = _cuda.Kernel(0, PTX, "nothing", "")
    for shared in wanted:
        kernel.launch(1, 32, shared, 0, [])
    assert [launch.shared for launch in driver.launches()] == wanted
    lines = driver.calls("cuFuncSetAttribute")
    assert lines == [f"cuFuncSetAttribute nothing 8 {kb << 10}" for kb in asked]
    with pytest.raises(_cuda.DriverError, match="kernel nothing: 300000 bytes of shared memory"):
        kernel.launch(1, 32, 300000, 0, [])


def test_an_entry_asks_for_its_shared_memory(driver):
    kernel = _cuda.Kernel(0, PTX, "nothing", "")
    op = _cuda.Op("op", ["x"], lambda x: _cuda.Entry([(kernel, 1, 32, 65536, ())], [], [], None))
    assert op(rows()) is None
    assert op(rows()) is None
    assert len(driver.calls("cuFuncSetAttribute")) == 1
    assert [launch.shared for launch in driver.launches()] == [65536] * 2


# ---- kept calls ----


@pytest.mark.parametrize("kind", [Tensor, libraries.ndarray])
def test_a_call_with_a_new_result(driver, copy, kind):
    for _ in range(3):
        x = rows(kind)
        y = copy(x)
        assert isinstance(y, kind)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert not np.shares_memory(y.memory, x.memory)
        words = driver.launches()[-1].words()
        assert (words[4], words[11]) == (address(x.memory), address(y.memory))
        assert words[2:4] == words[5:7] == [32, 4]
    assert len(copy.built) == len(copy.op) == 1


def test_results_in_numbas_kind(driver, copy, monkeypatch):
    made = []

    def device_array(shape, dtype, stream):
        made.append((shape, dtype, stream))
        return libraries.DeviceNDArray(memory(shape, dtype))

    numba = types.ModuleType("numba.cuda")
    numba.device_array, numba.external_stream = device_array, lambda handle: ("stream", handle)
    numba.gpus = [threading.Lock(), None]  # anything that `with` takes
    monkeypatch.setitem(sys.modules, "numba.cuda", numba)
    x = rows(libraries.DeviceNDArray)
    assert isinstance(copy(x), libraries.DeviceNDArray)
    x.stream = 99
    copy(x)
    assert [each[2] for each in made] == [0, ("stream", 99)]
    assert [launch.stream for launch in driver.launches()] == [0, 99]


@pytest.mark.parametrize("kind", [Interface, Exporter])
def test_kinds_that_no_result_can_be_made_in(driver, copy, kind):
    x, out = rows(kind), rows(kind)
    with pytest.raises(TypeError, match=r"^out: got None for a \w+, .*wanted an array to write to"):
        copy(x)
    assert driver.launches() == []
    assert copy(x, out) is out
    assert driver.launches()[0].words()[11] == address(out.memory)


def test_results_are_what_the_entry_says(driver, pair):
    new = [((4,), "float32"), ((2, 3), "float64"), ((5,), "bfloat16")]

    def build(x, out):
        return _cuda.Entry([], new, [], [("new", 1), None, ("arg", 1), ("new", 0), ("new", 2)])

    op = _cuda.Op("op", ["x", "out"], build, written=[1])
    x, out = rows(), rows()
    wide, nothing, same, narrow, half = op(x, out)
    assert nothing is None
    assert same is out
    assert (wide.shape, wide.dtype.name) == ((2, 3), "float64")
    assert (narrow.shape, narrow.dtype.name) == ((4,), "float32")
    assert (half.shape, half.dtype.name) == ((5,), "bfloat16")
    assert driver.launches() == []


def builds(copy, *calls):
    """How often the op was built for these calls."""
    before = len(copy.built)
    for args in calls:
        copy(*args)
    return len(copy.built) - before


def test_what_calls_share_an_entry(copy):
    shared = rows()
    assert builds(copy, (rows(),), (rows(),), (shared,), (shared,)) == 1
    assert builds(copy, (rows(), rows()), (shared, rows())) == 1
    assert builds(copy, (shared, shared), (shared, shared)) == 1  # in place
    assert builds(copy, (shared, None, 8), (shared, None, 8)) == 1
    assert builds(copy, (shared, None, (8,)), (shared, None, [8])) == 1
    assert builds(copy, (shared, None, "8"), (shared, None, "8")) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (rows(shape=(8, 4)),),
        lambda x: (rows(shape=(32,)),),
        lambda x: (rows(dtype=np.float16),),
        lambda x: (rows(dtype=libraries.BFLOAT16),),
        lambda x: (Tensor(memory((4, 8), np.float32, offset=1)),),
        lambda x: (Tensor(memory((4, 16), np.float32)[:, :8]),),
        lambda x: (rows(libraries.ndarray),),
        lambda x: (rows(), rows()),
        lambda x: (x, x),
        lambda x: (x, None, 8),
        lambda x: (x, None, True),
        lambda x: (x, None, ((8,),)),
        lambda x: (x, None, (8, 8)),
        lambda x: (x, None, "8"),
        lambda x: (x, None, None, 1e-6),
        lambda x: (x, None, None, 1),
        lambda x: (x, None, None, 1e-5, np.float32),
        lambda x: (x, None, None, 1e-5, np.dtype(np.float16)),
        lambda x: (x, None, None, 1e-5, libraries.TYPES["float32"]),
    ],
)
def test_what_calls_do_not(copy, other):
    x = rows()
    copy(x)
    assert builds(copy, other(x)) == 1
    assert builds(copy, other(x), (x,)) == 0


def test_the_device_is_part_of_the_key(driver, pair):
    far = _cuda.Kernel(1, PTX, "pair", "aa")
    copy = Copy(pair)
    copy(rows())
    copy.kernel = far
    copy(rows(device=1))
    assert len(copy.op) == 2
    assert [launch.context for launch in driver.launches()] == [
        driver.context(0), driver.context(1),
    ]  # fmt: skip


def test_numbers_of_numpy_are_numbers(copy):
    x = rows()
    assert builds(copy, (x, None, 8, 0.5), (x, None, np.int64(8), np.float32(0.5))) == 1


def test_options_that_can_change_are_not_kept(copy):
    class Name(str):
        """Not quite a str."""

    for option in ({"a": 1}, Name("x"), object(), np.ones(3), 10**30, (1, {})):
        before = len(copy.op)
        assert builds(copy, (rows(), None, option), (rows(), None, option)) == 2
        assert len(copy.op) == before


def test_options_known_by_their_address_live_as_long_as_the_entry(copy):
    kind = type("Kind", (), {})
    gone = weakref.ref(kind)
    copy(rows(), None, None, 1e-5, kind)
    copy.built.clear()
    del kind
    gc.collect()
    assert gone() is not None
    copy.op.clear()
    gc.collect()
    assert gone() is None


def test_arrays_that_overlap_are_built_each_time(copy):
    array = memory((8, 8), np.float32)
    x, out = Tensor(array[:5]), Tensor(array[3:])
    assert builds(copy, (x, out), (x, out)) == 2
    assert len(copy.op) == 0
    assert _cuda.overlap(*copy.built[0][:2]) == "overlap"


def test_what_a_build_raises_is_raised_each_time(driver, pair):
    def refuse(*args):
        raise ValueError("x: no")

    op = _cuda.Op("op", ["x"], refuse)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^x: no$"):
            op(rows())
    assert len(op) == 0
    assert driver.launches() == []


def test_the_table_is_bounded(copy):
    x = rows()
    for i in range(5000):
        copy(x, None, None, float(i))
    assert 0 < len(copy.op) <= 4096


def test_long_options_are_not_cut_off(copy):
    x = rows()
    long = "a" * 5000
    assert builds(copy, (x, None, long), (x, None, long + "b"), (x, None, tuple(range(1000)))) == 3
    assert len(copy.op) == 0


def test_wrong_numbers_of_arguments(copy):
    with pytest.raises(TypeError, match=r"^copy: got 1 arguments, wanted 5"):
        copy.op(rows())
    with pytest.raises(TypeError, match=r"^names: got|^x: got|got no array"):
        _cuda.Op("op", ["x"], lambda x: _cuda.Entry([], [], [], None))(None)


def test_entries_that_make_no_sense(pair):
    good = ("arg", 0, 4, 4)
    for source in (("new", 0, 4, 4), ("work", 0, 4, 4), ("arg", 30, 4, 4), ("new", -1, 4, 4)):
        with pytest.raises(ValueError, match="wanted one that the call has"):
            _cuda.Entry([(pair, 1, 32, 0, (good, source))], [], [], None)
    with pytest.raises(KeyError):
        _cuda.Entry([], [], [], ("other", 0))
    with pytest.raises(ValueError, match="wanted 2: 'aa'"):
        _cuda.Entry([(pair, 1, 32, 0, (good,))], [], [], None)


@pytest.mark.parametrize("kind", [Tensor, libraries.ndarray, Interface, Exporter])
def test_no_call_keeps_its_arrays(copy, kind):
    x, out = rows(kind), rows(kind)
    copy(x, out)
    copy.built.clear()
    before = [sys.getrefcount(value) for value in (x, out, x.memory, out.memory, None)]
    for _ in range(1000):
        copy(x, out)
    after = [sys.getrefcount(value) for value in (x, out, x.memory, out.memory, None)]
    assert after[:4] == before[:4]
    assert abs(after[4] - before[4]) < 100


def test_torch_is_told_of_writes(monkeypatch, copy):
    noted = []
    torch = libraries.MODULES["torch"]
    monkeypatch.setattr(
        torch, "autograd", types.SimpleNamespace(
            graph=types.SimpleNamespace(increment_version=noted.append)
        )
    )  # fmt: skip
    x, out = rows(), rows()
    copy(x)
    assert noted == []
    copy(x, out)
    assert noted == [out]
    monkeypatch.setattr(Tensor, "is_inference", lambda self: True)
    copy(x, out)
    assert noted == [out]


def test_a_kept_call_runs_no_python_of_ours_and_three_calls_of_the_driver(driver, copy):
    """What it costs the host is timed by bench/cuda_host.py; this is why it costs little."""
    x, out = rows(), rows()
    copy(x, out)
    driver.reset()
    seen = []
    sys.setprofile(lambda frame, event, arg: seen.append(frame.f_code) if event == "call" else 0)
    try:
        copy.op(x, out, None, 1e-5, None)
    finally:
        sys.setprofile(None)
    assert seen
    assert {code.co_filename for code in seen} == {libraries.__file__}
    names = [line.partition(" ")[0] for line in driver.log()]
    # Nothing was current here: a caller whose context is current pays for two calls, not four.
    assert names == ["cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuLaunchKernel",
                     "cuCtxPopCurrent_v2"]  # fmt: skip


# ---- contexts ----


def test_the_current_context_is_kept(driver, copy):
    for current in (driver.context(0), driver.context(1), 0x9999):
        driver.library.cuCtxPushCurrent_v2(current)
        try:
            driver.reset()
            copy(rows())
            copy.kernel.launch(1, 32, 0, 0, [None, None])
            pushed = len(driver.calls("cuCtxPushCurrent_v2"))
            assert pushed == len(driver.calls("cuCtxPopCurrent_v2"))
            assert pushed == (0 if current == driver.context(0) else 2)
            assert {launch.context for launch in driver.launches()} == {driver.context(0)}
        finally:
            driver.library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


@pytest.mark.parametrize("code", [1, 700, 999])
def test_a_launch_that_fails(driver, copy, code):
    copy(rows())
    driver.fail("cuLaunchKernel", code)
    with pytest.raises(_cuda.DriverError, match=rf"^launching pair: CUDA error {code}") as raised:
        copy(rows())
    assert raised.value.code == code
    driver.reset()
    copy(rows())
    assert len(driver.launches()) == 1


def test_errors_say_what_the_driver_says(driver, copy):
    driver.fail("cuLaunchKernel", 700)
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access"):
        copy(rows())


@pytest.mark.parametrize("name", ["cuCtxGetCurrent", "cuCtxPushCurrent_v2"])
def test_contexts_that_fail(driver, copy, name):
    copy(rows())
    driver.fail(name, 201)
    with pytest.raises(_cuda.DriverError, match="CUDA error 201"):
        copy(rows())


# ---- streams ----


def ordered(driver):
    """The calls that order streams, and the launches, with their streams."""
    found = []
    for line in driver.calls("cuEventRecord", "cuStreamWaitEvent", "cuLaunchKernel"):
        name, _, rest = line.partition(" ")
        stream = rest.partition("stream=")[2].partition(" ")[0] or rest
        found.append((name, int(stream, 16) if stream != "(nil)" else 0))
    return found


def test_the_callers_stream(driver, copy):
    for stream in (0, 7, 2):
        driver.reset()
        libraries.STREAMS[0] = stream
        copy(rows(), rows())
        assert ordered(driver) == [("cuLaunchKernel", stream)]
    assert len(copy.op) == 1  # the stream is no part of the key


def test_an_array_of_another_stream_is_waited_for_by_the_device(driver, copy):
    libraries.STREAMS[0] = 7
    out = rows(Interface)
    out.stream = 9
    for _ in range(2):
        driver.reset()
        copy(rows(), out)
        assert ordered(driver) == [
            ("cuEventRecord", 9), ("cuStreamWaitEvent", 7),
            ("cuLaunchKernel", 7),
            ("cuEventRecord", 7), ("cuStreamWaitEvent", 9),
        ]  # fmt: skip
        assert driver.calls("cuEventCreate") == ["cuEventCreate 2"] * 2  # which count no time
        assert driver.live("events") == 0
    assert not [line for line in driver.log() if "Synchronize" in line]


@pytest.mark.parametrize("stream", [None, 7])
def test_arrays_that_are_ready_are_not_waited_for(driver, copy, stream):
    libraries.STREAMS[0] = 7
    out = rows(Interface)
    out.stream = stream
    copy(rows(), out)
    assert ordered(driver) == [("cuLaunchKernel", 7)]


def test_the_default_stream_has_two_names(driver, copy):
    libraries.STREAMS[0] = 0
    out = rows(Interface)
    out.stream = 1
    copy(rows(), out)
    assert ordered(driver) == [("cuLaunchKernel", 0)]


def test_a_stream_is_waited_for_once(driver, pair):
    def build(*args):
        return _cuda.Entry([(pair, 1, 32, 0, (None, None))], [], [], None)

    op = _cuda.Op("op", ["x", "a", "b", "c"], build)
    arrays = [rows(Interface) for _ in range(4)]
    for array, stream in zip(arrays, (5, 9, 9, 11), strict=True):
        array.stream = stream
    op(*arrays)
    assert [line for line in ordered(driver) if line[0] == "cuEventRecord"][:2] == [
        ("cuEventRecord", 9), ("cuEventRecord", 11),
    ]  # fmt: skip
    assert len(driver.calls("cuStreamWaitEvent")) == 4


def test_an_empty_array_is_not_waited_for_but_the_next_one_is(driver, pair):
    def build(*args):
        return _cuda.Entry([(pair, 1, 32, 0, (None, None))], [], [], None)

    op = _cuda.Op("op", ["x", "a", "b"], build)
    arrays = [rows(Interface), rows(Interface, shape=(0, 8)), rows(Interface)]
    for array, stream in zip(arrays, (5, 9, 9), strict=True):
        array.stream = stream
    op(*arrays[:2], None)
    assert ordered(driver) == [("cuLaunchKernel", 5)]
    op(*arrays)
    assert ordered(driver)[1:3] == [("cuEventRecord", 9), ("cuStreamWaitEvent", 5)]


def test_dlpack_owners_are_told_of_the_stream(driver, copy):
    libraries.STREAMS[0] = 7
    out = rows(Exporter)
    copy(rows(), out)
    libraries.STREAMS[0] = 0
    copy(rows(), out)
    copy(out, rows())
    assert out.asked == [7, 1, 1]  # 0 is no stream's name there


@pytest.mark.parametrize("name", ["cuEventCreate", "cuEventRecord", "cuStreamWaitEvent"])
@pytest.mark.parametrize("after", [0, 1])
def test_ordering_that_fails(driver, copy, name, after):
    out = rows(Interface)
    out.stream = 9
    driver.fail(name, 999, after)
    with pytest.raises(_cuda.DriverError, match="CUDA error 999"):
        copy(rows(), out)
    assert len(driver.launches()) == after
    assert driver.live("events") == 0


def test_a_capture_is_not_spoilt(driver, copy):
    """A wait for what is outside of the graph would end the capture: it is refused before."""
    libraries.STREAMS[0] = 7
    out = rows(Interface)
    copy(rows(), rows())
    for stream in (9, 1):  # the legacy stream can not even be asked
        driver.reset()
        driver.capture(7)
        out.stream = stream
        with pytest.raises(_cuda.DriverError, match="a graph is being captured on the call's str"):
            copy(rows(), out)
        assert ordered(driver) == []
    driver.reset()
    driver.capture(7)
    driver.capture(9)
    out.stream = 9
    copy(rows(), out)
    copy(rows())
    assert [line[0] for line in ordered(driver)].count("cuLaunchKernel") == 2


def test_kernels_can_be_loaded_during_a_capture(driver):
    driver.capture(7)
    _cuda.Kernel(0, PTX, "pair", "aa")
    assert driver.calls("cuModuleLoadDataEx") == ["cuModuleLoadDataEx mode=2"]
    driver.fail("cuModuleLoadDataEx", 999)
    with pytest.raises(_cuda.DriverError):
        _cuda.Kernel(0, PTX, "pair", "aa")  # and the mode is what it was: see the fixture


# ---- temporaries ----


def test_temporaries_on_the_callers_stream(driver, pair):
    libraries.STREAMS[0] = 7
    copy = Copy(pair, workspace=(1000, 24))
    driver.capture(7)
    for _ in range(2):
        copy(rows(libraries.ndarray), rows(libraries.ndarray))
    lines = driver.calls("cuMemAllocFromPoolAsync", "cuLaunchKernel", "cuMemFreeAsync")
    assert [line.partition(" ")[0] for line in lines] == [
        "cuMemAllocFromPoolAsync", "cuLaunchKernel", "cuMemFreeAsync",
    ] * 2  # fmt: skip
    assert lines[0].startswith("cuMemAllocFromPoolAsync 1280 ")
    assert lines[0].endswith(" 0x7")
    assert lines[2] == "cuMemFreeAsync 0x7"
    assert driver.live("allocations") == 0
    assert driver.live("pools") == 1
    assert driver.launches()[0].words()[4] % 256 == 0


def test_temporaries_lie_apart(driver, pair):
    def build(x):
        steps = [(pair, 1, 32, 0, (("work", 0, 10, 4), ("work", 1, 6, 4)))]
        return _cuda.Entry(steps, [], (40, 24), None)

    _cuda.Op("op", ["x"], build)(rows(libraries.ndarray))
    words = driver.launches()[0].words()
    assert words[11] - words[4] == 256


def test_temporaries_of_torch_are_torchs(driver, pair):
    copy = Copy(pair, workspace=(1000,))
    copy(rows())
    assert not driver.calls("cuMemAllocFromPoolAsync")
    assert driver.launches()[0].words()[4] != 0


def test_temporaries_that_cannot_be_had(driver, pair):
    copy = Copy(pair, workspace=(1000,))
    copy(rows(libraries.ndarray))
    driver.reset()
    driver.fail("cuMemAllocFromPoolAsync", 2)
    with pytest.raises(MemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        copy(rows(libraries.ndarray))
    assert driver.launches() == []
    driver.reset()
    driver.fail("cuLaunchKernel", 700)
    with pytest.raises(_cuda.DriverError, match="700"):
        copy(rows(libraries.ndarray))
    assert len(driver.calls("cuMemFreeAsync")) == 1
    assert driver.live("allocations") == 0


# ---- capsules ----


def test_capsules_of_calls_that_fail(driver, copy):
    """However a call ends, what was exported is given back: NumPy's own exporter counts it."""
    x, out = rows(Exporter), rows(Exporter)
    before = sys.getrefcount(x.memory), sys.getrefcount(out.memory)
    copy(x, out)
    driver.fail("cuLaunchKernel", 700)
    with pytest.raises(_cuda.DriverError):
        copy(x, out)
    driver.reset()
    with pytest.raises(TypeError, match=r"^out: got"):
        copy(x, libraries.CPUTensor(memory((4, 8), np.float32)))
    with pytest.raises(TypeError, match=r"^out: got None"):
        copy(x)
    copy.built.clear()
    gc.collect()
    assert (sys.getrefcount(x.memory), sys.getrefcount(out.memory)) == before


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("change", [{}, {"bits": 8}, {"lanes": 2}, {"ndim": 17}, {"data": 0}])
def test_every_export_is_given_back_once(driver, copy, versioned, change):
    x = Counted(memory((4, 8), np.float32), versioned=versioned)
    out = Counted(memory((4, 8), np.float32), versioned=versioned)
    copy(x, out)
    driver.fail("cuLaunchKernel", 700)
    with pytest.raises(_cuda.DriverError):
        copy(x, out)
    assert x.exported == x.deleted == out.exported == out.deleted == 2
    for name, value in change.items():
        setattr(out.struct.tensor, name, value)
    with pytest.raises((TypeError, ValueError, _cuda.DriverError)):
        copy(x, out)
    assert x.exported == x.deleted == out.exported == out.deleted == 3
