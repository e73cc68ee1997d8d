"""What importing and calling fastnorm does to the process: as little as there is."""

import json
import platform
import shutil
import sys
from pathlib import Path

import pytest

import fastnorm

from .helpers import child


def test_nothing_but_numpy_is_imported():
    foreign = child.output("""
        import json, sys, numpy
        before = set(sys.modules)
        import fastnorm
        roots = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(json.dumps(sorted(roots - {"fastnorm", "numpy"} - set(sys.stdlib_module_names))))
    """)
    # Cython registers modules of its own for shared types.
    names = [n for n in json.loads(foreign) if not n.startswith(("_cython", "cython_runtime"))]
    assert names == []


def test_calls_import_nothing_that_the_caller_has_not():
    """Types, errors and half types of NumPy's own are known without a look at other libraries."""
    child.output("""
        import sys, numpy as np, fastnorm
        foreign = ("ml_dtypes", "torch", "pyarrow")
        x = np.ones((3, 4), np.float16)
        fastnorm.layer_norm(x, dtype="float32")
        fastnorm.layer_norm(x.astype(">f2"), dtype=np.int8)
        fastnorm.add_rms_norm(x, x.astype(np.float64), 4, x[0])
        fastnorm.explain("layer_norm", x.T)
        for a, dtype in ((x + 0j, None), (x, int)):
            try:
                fastnorm.layer_norm(a, dtype=dtype)
            except TypeError:
                continue
            raise AssertionError("no TypeError")
        assert not set(foreign) & set(sys.modules)
    """)


def test_import_starts_no_thread_and_no_process():
    if not sys.platform.startswith("linux"):
        pytest.skip("threads are counted in /proc")
    count = """
        import os, numpy
        before = len(os.listdir("/proc/self/task"))
        import fastnorm
        print(len(os.listdir("/proc/self/task")) - before)
    """
    assert child.output(count) == "0"


def test_reference_and_extras_are_imported_on_demand():
    done = child.output("""
        import sys, fastnorm
        assert "fastnorm.reference" not in sys.modules
        fastnorm.reference.layer_norm([1.0, 2.0])
        assert "fastnorm.reference" in sys.modules
        from fastnorm import reference
        import fastnorm.reference
        print("done")
    """)
    assert done == "done"


def test_sources_alone_say_what_they_are(tmp_path):
    """Python finds them first in their folder. What else may go wrong is told as it is."""
    installed = Path(fastnorm.__file__).parent
    shutil.copytree(installed, tmp_path / "fastnorm", ignore=shutil.ignore_patterns("*.so"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fastnorm"
    wanted = f"ImportError: fastnorm: got its sources ({tmp_path}/fastnorm), in which nothing is c"
    assert wanted in child.error(code)
    [compiled] = installed.glob("_core.*.so")
    (tmp_path / "fastnorm" / compiled.name).write_bytes(b"no library")
    assert "got its sources" not in child.error(code)


CALLS = """
import ctypes, sys, threading
import numpy as np
import fastnorm
from fastnorm import _core

def call_everything():
    x = np.random.default_rng(0).standard_normal((600, 96)).astype(np.float32)
    x[5] = 1e38
    _core.force_partition(3)
    for isa in filter(_core.isa_supported, _core.isa_names()):
        _core.select_isa(isa)
        for kind in (np.float32, np.float64, np.float16):
            with np.errstate(over="ignore"):
                a = x.astype(kind)
            every_op(a)
            every_op(np.repeat(a, 2, axis=1)[:, ::2])
            fastnorm.layer_norm(a, axis=0)

def every_op(a):
    w, n = a[0], a.shape[1]
    y, mean, rstd = fastnorm.layer_norm(a, return_stats=True)
    fastnorm.layer_norm_backward(y, a, n, mean, rstd)
    fastnorm.moments(a)
    fastnorm.rms_norm(a, n, w, dtype=np.int8)
    fastnorm.rms_norm(a, n, w, offset=1.0, activation="gelu", dtype=np.float16)
    fastnorm.rms_norm_backward(y, a, n, rstd, w, lengths=5)
    fastnorm.layer_norm(a, n, w, w, mask=w > 0, activation="silu")
    fastnorm.add_layer_norm(a, y, n, w, linear_bias=w, activation="gelu_tanh")
    fastnorm.add_rms_norm(a, y, n, w)
    fastnorm.add_rms_norm_backward(y, y, a, n, rstd, w)
    fastnorm.adaptive_layer_norm(a, a, y, n, gate=y, residual=a)
    fastnorm.adaptive_layer_norm_backward(y, a, a[:1], n, mean, rstd)
    fastnorm.parallel_layer_norm(a, n, [w, None])
    fastnorm.segment_layer_norm(a, [0, 7, len(a)], w, w)
    fastnorm.segment_rms_norm_backward(y, a, [0, 7, len(a)], rstd[:2], w)

def denormals_are_kept():
    half = np.array([sys.float_info.min], np.float64) / 2
    return sys.float_info.min / 2 != 0 and half[0] != 0 and (half * 1.0)[0] != 0
"""


def test_denormals_are_kept():
    """-ffast-math at link time would flush them to 0 for the whole process."""
    code = """
assert denormals_are_kept()
call_everything()
assert denormals_are_kept()
seen = []
def run():
    call_everything()
    seen.append(denormals_are_kept())
thread = threading.Thread(target=run)
thread.start()
thread.join()
assert seen == [True]
tiny = np.float32([1e-40, 3e-40, 2e-40, 4e-40])
assert (fastnorm.layer_norm(tiny, eps=0.0) != 0).all()
"""
    child.output(CALLS + code)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64") or not sys.platform.startswith("linux"),
    reason="the control word's place is known for x86-64 and aarch64 Linux",
)
def test_floating_point_control_is_as_it_was():
    """Rounding mode, denormals and traps, in MXCSR or FPCR."""
    code = """
import platform
def control():
    state = (ctypes.c_uint32 * 16)()
    assert ctypes.CDLL(None).fegetenv(ctypes.byref(state)) == 0
    return state[0] if platform.machine() == "aarch64" else state[7] & 0xFFC0
before = control()
call_everything()
assert control() == before, (hex(before), hex(control()))
"""
    child.output(CALLS + code)


def test_numpy_warns_of_nothing_and_error_state_is_kept():
    """Invalid and overflowing rows are answered by their values, not by warnings."""
    child.output("""
        import warnings
        warnings.simplefilter("error")
        import numpy as np, fastnorm
        np.seterr(all="raise")
        x = np.array([[np.nan, 1], [np.inf, 1], [3e38, -3e38], [1, 1]], np.float32)
        y, mean, rstd = fastnorm.layer_norm(x, eps=0.0, return_stats=True)
        fastnorm.layer_norm_backward(x, x, 2, mean, rstd)
        fastnorm.moments(x)
        fastnorm.layer_norm(x, 2, np.array([1e300, 1]))
        fastnorm.layer_norm(x, 2, np.array([[1e300, 1]]))
        fastnorm.rms_norm(x, 2, np.float32([3e38, 1]), offset=3e38)
        fastnorm.rms_norm(x, 2, x[0], dtype=np.float16, activation="gelu")
        fastnorm.rms_norm(x, 2, x[0], dtype=np.int8)
        fastnorm.add_layer_norm(x, x, 2, np.array([1e300, 1]), linear_bias=np.array([1e300, 1]))
        fastnorm.adaptive_layer_norm(x, x[:, :2], x, 2, gate=np.full((4, 2), 1e300), residual=x)
        fastnorm.parallel_layer_norm(x, 2, [x[2], x[1]])
        fastnorm.segment_layer_norm(x, [0, 1, 1, 4], np.array([1e300, 1]), dtype=np.float16)
        fastnorm.layer_norm(x, lengths=[0, 1, 2, 0], dtype=np.int8)
        for kind in (np.float32, np.float16):
            with np.errstate(over="ignore"):
                dy = x.astype(kind)
            fastnorm.add_layer_norm_backward(dy, dy, dy, 2, mean, rstd, np.array([1e300, 1]))
            fastnorm.add_rms_norm_backward(dy[2:], dy[2:], dy[2:], 2, np.float32([1, 1]))
            fastnorm.layer_norm_backward(dy, dy, 2, mean, rstd, x[2], from_output=True)
        assert np.geterr() == dict.fromkeys(("divide", "over", "under", "invalid"), "raise")
    """)


def test_numpy_warns_of_no_conversion_and_no_sum():
    """What is converted, or added, for the kernels follows the same rule."""
    child.output("""
        import numpy as np, fastnorm
        np.seterr(all="raise")
        x = np.float32([[1e-3, 2e-3], [3, 4]])
        big, ones = np.full((2, 2), 3e38, np.float32), np.ones(2, np.float32)
        wide = np.float64([1e300, 1e-300])
        swapped = wide.astype(wide.dtype.newbyteorder("S"))
        calls = {
            "offset": lambda: fastnorm.rms_norm(x, 2, big[0], offset=3e38, activation="relu"),
            "weight": lambda: fastnorm.layer_norm(x, 2, wide),
            "own weight": lambda: fastnorm.layer_norm(x, 2, wide[None]),
            "swapped weight": lambda: fastnorm.layer_norm(x, 2, swapped),
            "own swapped weight": lambda: fastnorm.layer_norm(x, 2, swapped[None]),
            "linear_bias": lambda: fastnorm.add_layer_norm(x, x, linear_bias=wide),
            "scale": lambda: fastnorm.adaptive_layer_norm(x, np.array([wide, wide]), None),
            "statistics": lambda: fastnorm.layer_norm_backward(x, x, 2, wide, wide),
            "statistics of segments": lambda: fastnorm.segment_layer_norm_backward(
                x, x, [0, 1, 2], wide, wide),
            "dsum": lambda: fastnorm.add_rms_norm_backward(
                big * np.float32([1, -1]), big, x, 2, ones),
            "half dsum": lambda: fastnorm.add_layer_norm_backward(
                *np.float16([[[6e4, -6e4]], [[6e4, 6e4]], [[1e-3, 3e-3]]]), 2, ones[:1], ones[:1]),
        }
        failed = {}
        for name, call in calls.items():
            try:
                call()
            except FloatingPointError as error:
                failed[name] = str(error)
        assert not failed, failed
    """)
