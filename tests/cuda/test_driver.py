"""The driver as a whole: found or not, forked, asked by threads; which kernel is loaded when."""

import os
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastnorm import _cuda

from ..helpers import child
from .driver import PTX, compiled

ROOT = Path(__file__).parents[2]


def said(code, path, **environment):
    """What a program prints that begins with this driver."""
    return child.output(
        "import os, sys\nfrom fastnorm import _cuda\n" + code,
        FASTNORM_CUDA_DRIVER=str(path),
        **environment,
    )


LOAD = """
try:
    _cuda.load()
    print("loaded")
except RuntimeError as error:
    print(type(error).__name__, error.code, error)
"""


def test_what_a_device_is(driver):
    assert _cuda.devices() == [(0, "Fake 0", (9, 0), 132), (1, "Fake 1", (9, 0), 132)]
    assert _cuda.driver_version() == 13000
    _cuda.load("/nowhere")  # it is loaded: nothing happens
    assert _cuda.driver_path() == str(driver.path)


def test_the_import_loads_nothing(driver_library):
    code = """
before = len(os.listdir("/proc/self/task"))
assert not _cuda.is_loaded()
assert not _cuda.is_device_array(3)
maps = open("/proc/self/maps").read()
assert "libcuda" not in maps
print(_cuda.handles())
"""
    assert said(code, driver_library) == "{'contexts': 0, 'modules': 0, 'pools': 0}"


def test_no_driver(tmp_path):
    assert (
        "DriverError 0 the CUDA driver could not be loaded: /none/libcuda.so: cannot open"
        in said(LOAD, "/none/libcuda.so")
    )
    other = tmp_path / "libcuda.so"
    other.write_text("no library")
    assert "DriverError 0 the CUDA driver could not be loaded" in said(LOAD, other)


@pytest.mark.parametrize("name", ["cuLaunchKernel", "cuCtxGetCurrent", "cuModuleLoadDataEx"])
def test_a_driver_that_lacks_what_is_needed(tmp_path, name):
    path = compiled(tmp_path, without=[name])
    assert said(LOAD, path).startswith(f"DriverError 0 the CUDA driver {path} lacks {name}: it is")


def test_a_driver_from_before_memory_pools(tmp_path):
    path = compiled(tmp_path, without=["cuMemPoolCreate"])
    code = f"""
import ctypes, numpy as np
kernel = _cuda.Kernel(0, {PTX!r}, "pair", "aa")
class X:
    __cuda_array_interface__ = dict(
        version=3, shape=(4,), typestr="<f4", data=(4096, False), strides=None, stream=None)
def build(x):
    return _cuda.Entry([(kernel, 1, 32, 0, (None, None))], [], work, None)
work = []
print(_cuda.Op("op", ["x"], build)(X()))
work = [64]
try:
    _cuda.Op("op", ["x"], build)(X())
except RuntimeError as error:
    print(error)
"""
    assert said(code, path).startswith(
        "None\nworkspace: the call needs temporary memory on its str"
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FAKE_CUDA_FAIL": "cuInit:100"}, "100 the CUDA driver {} finds no CUDA device"),
        ({"FAKE_CUDA_DEVICES": "0"}, "100 the CUDA driver {} finds no CUDA device"),
        ({"FAKE_CUDA_FAIL": "cuInit:803"}, "803 the CUDA driver {} does not start: CUDA error 803"),
        ({"FAKE_CUDA_FAIL": "cuInit:3"}, "3 CUDA was used before this process was forked"),
        ({"FAKE_CUDA_FAIL": "cuDeviceGetCount:999"}, "999 the CUDA driver {} does not count"),
        ({"FAKE_CUDA_FAIL": "cuDeviceGetAttribute:999"}, "999 device 0: CUDA error 999"),
    ],
)
def test_a_driver_that_does_not_work(driver_library, environment, words):
    code = LOAD + LOAD  # it is not asked twice, and says the same
    [first, second] = said(code, driver_library, **environment).splitlines()
    assert first == second
    assert first.startswith("DriverError " + words.format(driver_library))


def test_a_failure_can_be_forgotten(driver_library):
    code = f"""
for path in ("/none", {str(driver_library)!r}):
    {LOAD.strip().replace(chr(10), chr(10) + "    ").replace("load()", "load(path)")}
_cuda.forget_failure()
_cuda.load({str(driver_library)!r})
print(_cuda.is_loaded())
"""
    lines = said(code, "/none").splitlines()
    assert lines[0].startswith("DriverError 0")
    assert lines[1:] == [lines[0], "True"]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_how_many_devices(driver_library, count):
    code = "print([each[0] for each in _cuda.devices()])"
    assert said(code, driver_library, FAKE_CUDA_DEVICES=str(count)) == str(list(range(count)))


def test_errors_can_be_pickled():
    import pickle

    error = pickle.loads(pickle.dumps(_cuda.DriverError("words", 7)))
    assert (type(error), str(error), error.code) == (_cuda.DriverError, "words", 7)


# ---- fork ----

FORK = """
import ctypes, numpy as np, fastnorm
class X:
    __cuda_array_interface__ = dict(
        version=3, shape=(4,), typestr="<f4", data=(4096, False), strides=None, stream=None)
def build(x):
    return _cuda.Entry([(kernel, 1, 32, 0, (None, None))], [], [], None)
op = _cuda.Op("op", ["x"], build)
def load_kernel():
    return _cuda.Kernel(0, PTX, "pair", "aa")
def refused(call):
    try:
        call()
    except _cuda.DriverError as error:
        return "forked" in str(error) and error.code == 3
    return False
def in_child(work):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if work() else 3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
x = np.ones((3, 4), np.float32)
def on_cpu():
    return not fastnorm.layer_norm(x).any()
""".replace("PTX", repr(PTX))


def test_a_child_of_a_process_that_used_cuda(driver_library):
    code = (
        FORK
        + """
kernel = load_kernel()
op(X())
library = ctypes.CDLL(os.environ["FASTNORM_CUDA_DRIVER"])
library.fake_launches.restype = ctypes.c_long
def work():
    global kernel
    # On the CPU all goes on; what is refused did not reach the driver, and neither does a module
    # that ends here.
    library.fake_reset()
    library.fake_log.restype = ctypes.c_char_p
    calls = (_cuda.load, _cuda.devices, load_kernel, lambda: op(X()),
             lambda: kernel.launch(1, 32, 0, 0, [None, None]))
    good = on_cpu() and all(refused(call) for call in calls)
    kernel = None
    op.clear()
    return good and on_cpu() and library.fake_log() == b""
def deeper():
    return in_child(work) == 0 and work()
print(in_child(work), in_child(deeper))
op(X())
print(library.fake_launches())
"""
    )
    assert said(code, driver_library) == "0 0\n2"


def test_a_child_of_a_process_that_did_not(driver_library):
    code = FORK + (
        "print(in_child(lambda: op is not None and load_kernel() is not None)); load_kernel()"
    )
    assert said(code, driver_library) == "0"
    code = (
        FORK
        + """
try:
    _cuda.load("/none")
except RuntimeError:
    _cuda.forget_failure()
print(in_child(lambda: load_kernel() is not None))
"""
    )
    assert said(code, driver_library) == "0"


# ---- which kernel is loaded when ----


class Compiler:
    """In place of the compiler: how often was it asked for what?"""

    def __init__(self):
        self.asked, self.sources, self.code = [], "sources", PTX
        self.wait = threading.Event()
        self.wait.set()

    def compile(self, spec, capability):
        self.asked.append((spec, capability))
        assert self.wait.wait(10)
        return types.SimpleNamespace(code=self.code, entry="pair", kind="ptx", info={})

    def source_hash(self):
        return self.sources

    def versions(self):
        return {"numba": "1"}


@pytest.fixture
def launch(monkeypatch, tmp_path, driver):
    module = pytest.importorskip("fastnorm.cuda.launch")
    monkeypatch.setenv("FASTNORM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "compiler", Compiler())
    monkeypatch.setattr(module.plan, "layout", lambda spec: "aa")
    module.clear()
    yield module
    module.clear()


def test_memory_then_disk_then_the_compiler(launch, driver):
    asked = launch.compiler.asked
    first = launch.kernel("spec", 0)
    assert launch.kernel("spec", 0) is first
    assert asked == [("spec", (9, 0))]
    assert launch.kernel("spec", 1) is not first  # another device: from disk
    assert launch.kernel("spec", 1).device == 1
    launch.clear()
    launch.kernel("spec", 0)
    assert len(asked) == 1
    launch.kernel("other", 0)
    launch.compiler.sources = "changed"
    launch.clear()
    launch.kernel("spec", 0)
    assert [spec for spec, _ in asked] == ["spec", "other", "spec"]


def test_a_kept_image_that_the_driver_refuses_is_compiled_again(launch, driver):
    launch.kernel("spec", 0)
    [file] = os.listdir(os.environ["FASTNORM_CACHE_DIR"])
    launch.clear()
    what = launch.cache.describe("spec", (9, 0), "sources", {"numba": "1"})
    launch.cache.write(what, launch.cache.Image(b"of another driver\0", "pair", "ptx", {}))
    assert launch.kernel("spec", 0).entry == "pair"
    assert len(launch.compiler.asked) == 2
    launch.clear()
    launch.kernel("spec", 0)
    assert len(launch.compiler.asked) == 2  # what was compiled took its place
    assert os.listdir(os.environ["FASTNORM_CACHE_DIR"]) == [file]


def test_what_cannot_be_loaded_is_not_kept(launch, driver):
    launch.compiler.code = b"nonsense\0"
    for _ in range(2):
        with pytest.raises(_cuda.DriverError, match=r"^kernel pair: "):
            launch.kernel("spec", 0)
    assert os.listdir(os.environ["FASTNORM_CACHE_DIR"]) == []
    launch.compiler.code = PTX
    assert launch.kernel("spec", 0).entry == "pair"


def test_threads_that_want_the_same_kernel_compile_it_once(launch):
    launch.compiler.wait.clear()
    with ThreadPoolExecutor(8) as pool:
        wanted = [pool.submit(launch.kernel, "spec", 0) for _ in range(8)]
        other = pool.submit(lambda: None)
        threading.Timer(0.1, launch.compiler.wait.set).start()
        found = {id(each.result()) for each in wanted}
        other.result()
    assert len(found) == 1
    assert len(launch.compiler.asked) == 1


def test_threads_call_one_op(driver):
    """Calls from many threads at once, the first of which build: every launch is whole."""
    import numpy as np

    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    from .libraries import Interface, address, memory

    kernel = _cuda.Kernel(0, PTX, "pair", "aa")

    def build(x, out, n):
        places = (("arg", 0, x.size, 4), ("arg", 1, x.size, 4))
        return _cuda.Entry([(kernel, n, 32, 0, places)], [], [], ("arg", 1))

    op = _cuda.Op("op", ["x", "out", "n"], build, written=[1])
    seen, lock = [], threading.Lock()

    def act(entry, grid, block, shared, stream, parameters):
        with lock:
            seen.append((grid, np.frombuffer(parameters, np.int64).tolist()))

    driver.on_launch(act)
    pairs = [(Interface(memory((8,), np.float32)), Interface(memory((8,), np.float32)))
             for _ in range(8)]  # fmt: skip
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        for k in range(200):
            assert op(*pairs[i], 1 + k % 5) is pairs[i][1]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(seen) == 1600
    assert len(op) == 5
    places = {(address(x.memory), address(out.memory)) for x, out in pairs}
    assert {(words[4], words[11]) for _, words in seen} == places
