"""The shuffles that simulator.py adds to Numba's simulator, against what they are defined to do."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="numba is not installed")

BEGIN = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("simulator", sys.argv[1])
simulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simulator)
simulator.PATIENCE = float(sys.argv[2])
from numba import cuda
simulator.install()
simulator.install()  # once more changes nothing
"""


def simulate(text, patience=20.0):
    """Run a script under the simulator."""
    path = Path(__file__).with_name("simulator.py")
    return subprocess.run(
        [sys.executable, "-I", "-c", BEGIN + textwrap.dedent(text), str(path), str(patience)],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def succeeds(text):
    done = simulate(text)
    assert done.returncode == 0, done.stderr[-3000:]


def test_shuffles_of_whole_warps():
    succeeds("""
        @cuda.jit
        def kernel(x, up, down, flipped, first):
            t = cuda.threadIdx.x
            up[t] = cuda.shfl_up_sync(0xffffffff, x[t], 3)
            down[t] = cuda.shfl_down_sync(0xffffffff, x[t], 5)
            flipped[t] = cuda.shfl_xor_sync(0xffffffff, x[t], 9)
            first[t] = cuda.shfl_sync(0xffffffff, x[t], 34)

        x = np.arange(96, dtype=np.float32) + 100
        out = [np.zeros_like(x) for _ in range(4)]
        kernel[1, 96](x, *out)
        rows, lane = x.reshape(3, 32), np.arange(32)
        wanted = [
            rows[:, np.where(lane >= 3, lane - 3, lane)],
            rows[:, np.where(lane + 5 < 32, lane + 5, lane)],
            rows[:, lane ^ 9],
            rows[:, lane * 0 + 2],
        ]
        for found, right in zip(out, wanted):
            assert (found == right.ravel()).all(), (found, right)
    """)


def test_many_reductions_in_a_row_and_blocks():
    succeeds("""
        @cuda.jit
        def kernel(x, y):
            t = cuda.threadIdx.x
            s = x[cuda.blockIdx.x, t]
            for _ in range(4):
                for o in (16, 8, 4, 2, 1):
                    s += cuda.shfl_xor_sync(0xffffffff, s, o)
                cuda.syncwarp()
                cuda.syncthreads()
            y[cuda.blockIdx.x, t] = s

        x = np.arange(128, dtype=np.float64).reshape(2, 64)
        y = np.zeros_like(x)
        kernel[2, 64](x, y)
        sums = x.reshape(2, 2, 32).sum(2, keepdims=True) * 32**3
        assert (y.reshape(2, 2, 32) == sums).all(), y
    """)


def test_votes():
    succeeds("""
        @cuda.jit
        def kernel(y):
            t = cuda.threadIdx.x
            y[t, 0] = cuda.ballot_sync(0xffffffff, t % 3 == 0)
            y[t, 1] = cuda.all_sync(0xffffffff, t < 32)
            y[t, 2] = cuda.any_sync(0xffffffff, t == 33)
            y[t, 3] = cuda.eq_sync(0xffffffff, t == 33)

        y = np.zeros((64, 4), np.int64)
        kernel[1, 64](y)
        for warp in range(2):
            lanes = np.arange(32) + 32 * warp
            word = sum(1 << lane for lane in range(32) if lanes[lane] % 3 == 0)
            assert (y[lanes] == [word, warp == 0, warp == 1, warp == 0]).all(), y[lanes]
    """)


def test_masks_of_half_a_warp_and_short_warps():
    succeeds("""
        @cuda.jit
        def kernel(y):
            t = cuda.threadIdx.x
            mask = 0xff if t < 8 else 0xff00
            if t < 16:
                y[t] = cuda.shfl_xor_sync(mask, t, 7)
            else:
                y[t] = cuda.shfl_xor_sync(0xffff0000, t, 1)  # of which lanes 16 to 19 are there

        y = np.full(20, -1)
        kernel[1, 20](y)
        t = np.arange(20)
        assert (y == np.where(t < 16, t ^ 7, t ^ 1)).all(), y
    """)


def test_lanes_that_have_returned_are_not_waited_for():
    succeeds("""
        @cuda.jit
        def kernel(y):
            t = cuda.threadIdx.x
            if t >= 4:
                return
            y[t] = cuda.shfl_xor_sync(0xffffffff, t, 1)

        y = np.full(32, -1)
        kernel[1, 32](y)
        assert (y[:4] == [1, 0, 3, 2]).all() and (y[4:] == -1).all()
    """)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("cuda.syncwarp(0xfffffffe)", "not in its mask"),
        (
            "cuda.shfl_sync(0xffff, t, 16) if t < 16 else cuda.shfl_sync(0xffff0000, t, 16)",
            "which is not there",
        ),
        ("cuda.syncthreads() if t == 3 else cuda.shfl_sync(0xffffffff, t, 0)", "do not come"),
    ],
)
def test_faults_are_errors(body, said):
    done = simulate(
        f"""
        @cuda.jit
        def kernel():
            t = cuda.threadIdx.x
            {body}

        kernel[1, 32]()
        """,
        patience=1.0,
    )
    assert done.returncode != 0
    assert said in done.stderr
