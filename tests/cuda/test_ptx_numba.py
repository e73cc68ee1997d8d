"""Kernels that Numba compiles, through the interpreter: every opcode that comes out is known."""

import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from .ptx import DOCUMENTED_ULPS, Kernel, Memory, launch

numba = pytest.importorskip("numba", reason="numba is not installed")
if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0":
    pytest.skip("Numba's simulator is on", allow_module_level=True)

from numba import cuda, float32, float64, int32, int64, types  # noqa: E402

CAPABILITIES = [(8, 0), (9, 0), (10, 0)]


@pytest.fixture(scope="module", autouse=True)
def toolkit():
    """Where CUDA_HOME does not say it, the toolkit of nvcc, or where CUDA puts itself."""
    nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    places = [nvcc.parents[1], nvcc.resolve().parents[1], Path("/usr/local/cuda")]
    whole = [place for place in places if (place / "nvvm" / "libdevice").is_dir()]
    with pytest.MonkeyPatch.context() as patch:
        if whole and "CUDA_HOME" not in os.environ:
            patch.setenv("CUDA_HOME", str(whole[0]))
        yield


def compiled(function, signature, capability):
    """The kernel that Numba makes of a function; skips where there is no compiler."""
    from numba.cuda import dispatcher
    from numba.cuda.cudadrv.error import NvvmError, NvvmSupportError

    device = SimpleNamespace(compute_capability=capability)
    try:
        with pytest.MonkeyPatch.context() as patch:  # Numba asks for one, though it needs none
            patch.setattr(dispatcher, "get_current_device", lambda: device)
            text, _ = cuda.compile(
                function, signature, device=False, abi="numba", cc=capability, output="ptx"
            )
    except (NvvmSupportError, RuntimeError) as error:
        if not isinstance(error, NvvmSupportError) and "libdevice" not in str(error):
            raise
        pytest.skip(f"no libnvvm: {str(error).strip().splitlines()[0]}")
    except NvvmError as error:
        if "arch" not in str(error):
            raise
        pytest.skip(f"libnvvm does not know sm_{capability[0]}{capability[1]}")
    return Kernel(text)


def array(known):
    return types.Array(known, 1, "C")


def execute(kernel, grid, block, arrays, *scalars, **options):
    """Launch on arrays by name; those named y are results."""
    memory = Memory(arrays, unwritten=[name for name in arrays if name == "y"])
    stats = launch(kernel, grid, block, [*map(memory.pointer, arrays), *scalars], memory, **options)
    memory.back()
    return stats


def elementary(x, y, n):
    i = cuda.grid(1)
    if i < n:
        v = x[i]
        y[i, 0] = math.exp(v)
        y[i, 1] = math.tanh(v)
        y[i, 2] = math.erf(v)
        y[i, 3] = v / (v + 1)
        y[i, 4] = math.sqrt(v)
        y[i, 5] = cuda.libdevice.rsqrt(v)
        y[i, 6] = math.log(v)
        y[i, 7] = math.log1p(v)
        y[i, 8] = math.expm1(-v)
        y[i, 9] = math.sin(v)
        y[i, 10] = math.pow(v, v)
        y[i, 11] = math.floor(v) + math.ceil(-v)


def expected(x):
    """What `elementary` computes, in float64."""
    x = x.astype("f8")
    columns = [np.exp(x), np.tanh(x), [math.erf(v) for v in x], x / (x + 1), np.sqrt(x)]
    columns += [1 / np.sqrt(x), np.log(x), np.log1p(x), np.expm1(-x), np.sin(x), x**x]
    return np.stack([*columns, np.floor(x) + np.ceil(-x)], 1)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("known", [float32, float64], ids=str)
def test_functions_of_libdevice(known, capability, rng):
    kernel = compiled(elementary, (array(known), types.Array(known, 2, "C"), int64), capability)
    x = rng.uniform(0.01, 4, 1000).astype(str(known))
    y = np.full((1000, 12), np.nan, x.dtype)
    for ulps in (0, 1, -1) if known is float32 else (0,):
        memory = Memory({"x": x, "y": y}, unwritten=["y"])
        matrix = (*memory["y"].words()[:5], *y.shape, *y.strides)
        launch(kernel, 8, 128, [memory["x"], *matrix, 1000], memory, ulps=ulps)
        memory.back()
        right = expected(x)
        error = abs(y - right) / np.maximum(abs(right), 0.05)
        assert error.max() < 32 * np.finfo(x.dtype).eps


def halves(x, y, n):
    i = cuda.grid(1)
    if i < n:
        y[i] = types.float16(float32(x[i]) * float32(3) + float32(0.1))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_halves(capability, rng):
    kernel = compiled(halves, (array(types.float16), array(types.float16), int64), capability)
    x = rng.standard_normal(200).astype("f2")
    y = np.zeros_like(x)
    execute(kernel, 2, 128, {"x": x, "y": y}, 200)
    exact = x.astype("f8") * 3 + float(np.float32(0.1))
    assert np.array_equal(y, exact.astype("f4").astype("f2"))


WARPS, PER_THREAD = 4, 8


def block_norm(x, y, n, eps):
    """A row a block: shared memory of both kinds, shuffles, a barrier, registers that spill."""
    sums = cuda.shared.array(WARPS, float32)
    kept = cuda.shared.array(0, float32)
    own = cuda.local.array(PER_THREAD, float32)
    row = int64(cuda.blockIdx.x) * n
    t = cuda.threadIdx.x
    total = float32(0)
    for k in range(PER_THREAD):
        own[k] = x[row + k * cuda.blockDim.x + t]
        total += own[k]
    lanes = 16
    while lanes > 0:
        total += cuda.shfl_xor_sync(0xFFFFFFFF, total, lanes)
        lanes >>= 1
    if t % 32 == 0:
        sums[t // 32] = total
    kept[t] = own[t % PER_THREAD]
    cuda.syncthreads()
    total = float32(0)
    for k in range(cuda.blockDim.x // 32):
        total += sums[k]
    mean = total / float32(n)
    for k in range(PER_THREAD):
        y[row + k * cuda.blockDim.x + t] = (own[k] - mean) * eps + kept[t ^ 1] * float32(0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_row_a_block(capability, rng):
    signature = (array(float32), array(float32), int64, float32)
    kernel = compiled(block_norm, signature, capability)
    columns = 32 * WARPS * PER_THREAD
    x = rng.standard_normal((5, columns)).astype("f4")
    y = np.zeros_like(x)
    arrays = {"x": x.reshape(-1), "y": y.reshape(-1)}
    stats = execute(kernel, 5, 32 * WARPS, arrays, columns, 2.0, shared=4 * 32 * WARPS)
    right = 2 * (x - x.mean(1, dtype="f8", keepdims=True))
    assert abs(y - right).max() < 1e-6
    assert stats["x"].loads == stats["y"].stores == {4: x.size}
    assert stats["x"].load_sectors == x.nbytes // 32
    assert stats.barriers == 5
    assert stats["local"].loaded > 0


def doubles(x, y, n, div, mod):
    """Shuffles of 64 bits, divisions of integers, a loop over the grid."""
    i = cuda.grid(1)
    v = x[i % 64]
    v += cuda.shfl_xor_sync(0xFFFFFFFF, v, 16)
    v += cuda.shfl_down_sync(0xFFFFFFFF, v, 1) + cuda.shfl_up_sync(0xFFFFFFFF, v, 2)
    v += cuda.shfl_sync(0xFFFFFFFF, v, 3)
    cuda.syncwarp()
    bits = cuda.ballot_sync(0xFFFFFFFF, i % 3 == 0)
    count = cuda.syncthreads_count(int32(i % 5 == 0))
    for j in range(i, n, cuda.gridsize(1)):
        y[j] = v + (j // div) % mod + cuda.popc(bits) * 1000 + count * 100000


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_doubles_and_integers(capability, rng):
    kernel = compiled(doubles, (array(float64), array(float64), int64, int64, int64), capability)
    x, y = rng.standard_normal(64), np.zeros(300)
    execute(kernel, 2, 64, {"x": x, "y": y}, 300, 7, 5)
    lane = np.arange(32)
    v = np.tile(x.reshape(2, 32), (2, 1))
    v = v + v[:, lane ^ 16]
    v = v + (v[:, np.minimum(lane + 1, 31) * (lane < 31) + 31 * (lane == 31)]
             + v[:, np.where(lane < 2, lane, lane - 2)])  # fmt: skip
    v = v + v[:, [3]]
    i, j = np.arange(128), np.arange(300)
    ballots = (i % 3 == 0).reshape(4, 32).sum(1).repeat(32)
    counts = (i % 5 == 0).reshape(2, 64).sum(1).repeat(64)
    right = (v.ravel() + 1000 * ballots + 100000 * counts)[j % 128] + j // 7 % 5
    assert abs(y - right).max() < 1e-9


def test_errors_of_approximations_are_seen_in_results():
    """`rsqrt` of libdevice is the instruction itself: an error of one ulp is one of the result."""

    def root(x, y, n):
        i = cuda.grid(1)
        if i < n:
            y[i] = cuda.libdevice.rsqrtf(x[i])

    kernel = compiled(root, (array(float32), array(float32), int64), (9, 0))
    x, y = np.linspace(0.1, 9, 64, dtype="f4"), np.zeros(64, "f4")
    exact = (1 / np.sqrt(x.astype("f8"))).astype("f4")
    for ulps in (0, DOCUMENTED_ULPS["rsqrt"], -1):
        execute(kernel, 1, 64, {"x": x, "y": y}, 64, ulps=ulps)
        assert np.array_equal(y, exact + ulps * np.spacing(exact))
