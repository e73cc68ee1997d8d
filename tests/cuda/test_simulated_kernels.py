"""The kernels' Python, run by Numba's simulator: its arithmetic is NumPy's and its threads are the
system's, so it errs in other ways than the interpreter of PTX."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="numba is not installed")

SCRIPT = """
import contextlib, importlib.util, sys, warnings
import numpy as np
warnings.simplefilter("ignore")
spec = importlib.util.spec_from_file_location("simulator", sys.argv[1])
simulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simulator)
from numba import cuda as real
simulator.install()
import numba.cuda.simulator.kernel
from numba.cuda.simulator.kernelapi import FakeCUDAModule

@contextlib.contextmanager
def swapped(function, fake):
    # Globals of device functions stay swapped: threads share them, and none waits for another.
    names = function.__globals__
    for name, value in list(names.items()):
        if value is real or isinstance(value, FakeCUDAModule):
            names[name] = fake
    yield

numba.cuda.simulator.kernel.swapped_cuda_module = swapped
from fastnorm.cuda import kernels, plan

def bits(array):
    flat = array.reshape(-1)
    return flat.view(np.uint16) if flat.itemsize == 2 else flat

def run(planned, arrays, **numbers):
    for name, count, kind in planned.workspace:
        arrays[name] = np.zeros(count, kind)
    values = {name: bits(array) for name, array in arrays.items()} | numbers
    for step in planned.steps:
        function = real.jit(kernels.kernel(step.spec))
        function[step.grid, step.block](*[values[name] for name in step.arguments])

kind, rows, cols = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = np.random.default_rng(0)
x, dy, w, b = (rng.standard_normal(shape).astype(kind)
               for shape in ((rows, cols), (rows, cols), cols, cols))
x[0] *= 100
stats = {"mean": np.zeros(rows, "f4"), "rstd": np.zeros(rows, "f4")}
forward = {"x": x, "weight": w, "bias": b, "y": np.zeros_like(x), **stats}
types = {name: array.dtype.name for name, array in forward.items()}
numbers = {"rows": rows, "cols": cols, "eps": np.float32(1e-5)}
strides = {name + "_stride": cols for name in ("x", "y", "dy", "dx")}
run(plan.forward(rows, cols, types, alignment=16, rms=False, return_stats=True), forward,
    **numbers, **strides)
wide = x.astype(float)
rstd = 1 / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
xh = (wide - wide.mean(1, keepdims=True)) * rstd
allowed = 2e-6 if kind == "float32" else 4e-3
assert np.abs(forward["y"] - (xh * w + b)).max() < allowed * 4
backward = {"x": x, "dy": dy, "weight": w, "dx": np.zeros_like(x), **stats,
            "dweight": np.zeros(cols, "f4"), "dbias": np.zeros(cols, "f4")}
types = {name: array.dtype.name for name, array in backward.items()}
run(plan.backward(rows, cols, types, alignment=16, rms=False), backward, **numbers, **strides)
g = dy.astype(float) * w
dx = rstd * (g - g.mean(1, keepdims=True) - xh * (g * xh).mean(1, keepdims=True))
assert np.abs(backward["dx"] - dx).max() < allowed
assert np.abs(backward["dweight"] - (dy * xh).sum(0)).max() < 1e-5
assert np.abs(backward["dbias"] - dy.astype(float).sum(0)).max() < 1e-5
"""


@pytest.mark.parametrize(
    ("kind", "rows", "cols"),
    [("float32", 5, 96), ("float32", 3, 320), ("float16", 2, 1056), ("float32", 2, 33)],
)
def test_layer_norm(kind, rows, cols):
    """Lanes of a warp, a warp and a block a row; chunks of one element."""
    simulator = Path(__file__).with_name("simulator.py")
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(simulator), kind, str(rows), str(cols)],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
