"""What importing and calling fastnorm does to the process: as little as there is."""

import json
import platform
import sys

import pytest

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
        for a in (x, x.astype(np.float64)):
            y, mean, rstd = fastnorm.layer_norm(a, return_stats=True)
            fastnorm.layer_norm_backward(y, a, 96, mean, rstd)
            fastnorm.moments(a)

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
        assert np.geterr() == dict.fromkeys(("divide", "over", "under", "invalid"), "raise")
    """)
