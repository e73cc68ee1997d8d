"""Numba's own launcher in the place of ours: the real one, on the fake driver."""

import pytest

from ..helpers import child
from ..helpers.c_build import output, tool
from .driver import SOURCE

pytest.importorskip("numba", reason="numba is not installed")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

CODE = """
import ctypes, os, sys, warnings
warnings.simplefilter("error")
import numpy as np
from fastnorm import _cuda
from fastnorm.cuda import by_numba, launch

def function(spec):
    from numba import types
    def copy(x, y, rows, eps, wide):
        if rows > 0:
            y[0] = x[0] * eps + wide
    arrays = types.Array(types.float32, 1, "C"), types.Array(types.uint16, 1, "C")
    return copy, (*arrays, types.int64, types.float32, types.float64), 64

by_numba_source = by_numba.source_of
by_numba.source_of = function

class Interface:
    def __init__(self, array, stream):
        self.__cuda_array_interface__ = dict(
            version=3, shape=array.shape, typestr=array.dtype.str, strides=None, stream=stream,
            data=(array.ctypes.data, False))

x, out = np.ones(8, np.float32), np.ones(8, np.uint16)

def calls(*names):
    return [l for l in library.fake_log().decode().splitlines() if l.partition(" ")[0] in names]
"""

PROBE = """
try:
    from numba.cuda.cudadrv.nvvm import NVVM
    NVVM()
except Exception as error:
    print("skip", type(error).__name__)
    sys.exit()
"""

CALL = """
library = ctypes.CDLL(os.environ["NUMBA_CUDA_DRIVER"])
library.fake_log.restype = ctypes.c_char_p

launch.start()
launch.start()
assert not _cuda.is_loaded()
assert launch.devices() == [(0, "Fake 0", (9, 0), 132), (1, "Fake 1", (9, 0), 132)]

def build(x, out):
    kernel = launch.kernel("spec", 0)
    assert launch.kernel("spec", 0) is kernel
    first = (("arg", 0, 8, 4), ("arg", 1, 8, 2), 5, 0.5, 0.25)
    second = (("work", 1, 4, 4), None, 6, 0.5, 0.25)
    return _cuda.Entry([(kernel, 3, 64, 128, first), (kernel, 2, 32, 0, second)], [], [40, 64],
                       ("arg", 1))

op = _cuda.Op("op", ["x", "out"], build, written=[1])
a, b = Interface(x, 7), Interface(out, 9)
for _ in range(2):
    assert op(a, b) is b
assert len(op) == 1

class Launch(ctypes.Structure):
    _fields_ = [("entry", ctypes.c_char * 1024), ("grid", ctypes.c_uint), ("block", ctypes.c_uint),
                ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
                ("context", ctypes.c_void_p), ("words", ctypes.c_int64 * 512)]

library.fake_launch.restype = ctypes.POINTER(Launch)
library.fake_launch.argtypes = [ctypes.c_long]
first, second = library.fake_launch(2).contents, library.fake_launch(3).contents
assert (first.grid, first.block, first.shared, first.stream) == (3, 64, 128, 7)
assert (second.grid, second.block, second.shared, second.stream) == (2, 32, 0, 7)
words = first.words[:15]
assert words == [0, 0, 8, 4, x.ctypes.data, 8, 4, 0, 0, 8, 2, out.ctypes.data, 8, 2, 5], words
words = second.words[:15]
assert words[2:4] == [4, 4] and words[4] % 256 == 0 and words[4]
assert words[7:] == [0, 0, 0, 2, 0, 0, 2, 6], words
assert [l.rpartition(" ")[2] for l in calls("cuEventRecord", "cuStreamWaitEvent")] == [
    "0x9", "0x7", "0x7", "0x9"] * 2
assert not calls("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize")
print("done")
"""

LAYER_NORM = """
import fastnorm
by_numba.source_of = by_numba_source
library = ctypes.CDLL(os.environ["NUMBA_CUDA_DRIVER"])
library.fake_launches.restype = ctypes.c_long
x, out = np.ones((4, 256), np.float32), np.ones((4, 256), np.float32)
w = np.ones(256, np.float16)
a, b, c = Interface(x, 7), Interface(out, None), Interface(w, 7)
for _ in range(2):
    assert fastnorm.layer_norm(a, 256, c, out=b) is b
assert library.fake_launches() == 2
print("done")
"""

NONE = """
try:
    launch.start()
except RuntimeError as error:
    assert "could not be loaded" in str(error), error
else:
    assert os.environ.get("NUMBA_CUDA_DRIVER") is None  # this machine has a driver, for Numba too
print("done")
"""


@pytest.fixture(scope="module")
def numbas_driver(tmp_path_factory):
    path = tmp_path_factory.mktemp("numba") / "libcuda.so"
    source = SOURCE.with_name("fake_driver_numba.c")
    output(tool("gcc", "cc", "clang"), "-O2", "-shared", "-fPIC", source, "-o", path, "-lpthread")
    return path


def run(code, driver):
    said = child.output(
        CODE + code,
        FASTNORM_CUDA_DRIVER="/none/libcuda.so",
        NUMBA_CUDA_DRIVER=driver,
        NUMBA_ENABLE_CUDASIM=None,
        FAKE_CUDA_DEVICES="2",
    )
    if said.startswith("skip"):
        pytest.skip(f"numba finds no libnvvm ({said.partition(' ')[2]})")
    assert said == "done"


def test_calls_go_through_numba(numbas_driver):
    run(PROBE + CALL, str(numbas_driver))


def test_an_op_goes_through_numba(numbas_driver):
    run(PROBE + LAYER_NORM, str(numbas_driver))


@pytest.mark.parametrize("driver", [None, "/none/libcuda.so"])
def test_where_numba_has_no_driver_either(driver):
    run(NONE, driver)
