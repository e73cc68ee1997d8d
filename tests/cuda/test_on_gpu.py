"""On a CUDA device, with torch, CuPy or Numba to hold the arrays: `make test-gpu`."""

import importlib
import math
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import fastnorm
from fastnorm import accuracy, reference

from .channel_calls import call

pytestmark = pytest.mark.gpu

TYPES = ("float32", "bfloat16", "float16", "float64")
OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "adaptive_layer_norm")
# Either side of where kernels change, odd lengths, and rows past every register.
WIDTHS = (1, 2, 7, 32, 100, 128, 129, 512, 1000, 1024, 1536, 4096, 4100, 8192, 16384, 20000, 32768,
          65536, 100003)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def device():
    """The device that there must be, once."""
    from fastnorm import cuda

    if cuda.why_not():
        pytest.skip(f"no CUDA device: {cuda.why_not()}")


@pytest.fixture(scope="session")
def torch(device):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device that torch could use")
    return torch


def as_numpy(array):
    """A device array's values: bfloat16 and float16 as float32, which holds them."""
    if array is None:
        return None
    if hasattr(array, "is_cuda"):
        array = array.detach().cpu()
        return (array if array.itemsize > 2 else array.float()).numpy()
    if hasattr(array, "copy_to_host"):
        return array.copy_to_host()
    return array.get()


class Problem:
    """The arguments of every op on the device, and the very same values on the host."""

    def __init__(self, torch, rows, cols, dtype, seed=0):
        self.torch, self.n, self.dtype = torch, cols, dtype
        kind = getattr(torch, dtype)
        generator = torch.Generator().manual_seed(seed)
        lead = (2, rows)

        def made(*shape):
            return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.25).to(kind)

        arrays = {name: made(*lead, cols) for name in ("x", "dy", "residual", "dsum")}
        arrays |= {name: made(cols) for name in ("weight", "bias", "linear_bias")}
        arrays |= {name: made(2, cols) for name in ("scale", "shift", "gate")}
        self.host = {name: as_wide(array) for name, array in arrays.items()}
        for name, array in arrays.items():
            setattr(self, name, array.cuda())
        self.compute = np.float64 if dtype == "float64" else np.float32

    def forward(self, op, module=fastnorm, a=None, **options):
        a = a or vars(self)
        call, n = getattr(module, op), self.n
        if op == "layer_norm":
            return call(a["x"], n, a["weight"], a["bias"], return_stats=True, **options)
        if op == "rms_norm":
            return call(a["x"], n, a["weight"], 1e-5, offset=1.0, return_stats=True, **options)
        if op == "add_layer_norm":
            return call(a["x"], a["residual"], n, a["weight"], a["bias"], return_stats=True,
                        linear_bias=a["linear_bias"], **options)  # fmt: skip
        if op == "add_rms_norm":
            return call(a["x"], a["residual"], n, a["weight"], 1e-5, return_stats=True, **options)
        return call(a["x"], a["scale"], a["shift"], n, gate=a["gate"], residual=a["residual"],
                    return_stats=True, **options)  # fmt: skip

    def backward(self, op, stats, module=fastnorm, a=None):
        a = a or vars(self)
        call, n = getattr(module, f"{op}_backward"), self.n
        if op == "layer_norm":
            return call(a["dy"], a["x"], n, *stats, a["weight"], a["bias"])
        if op == "rms_norm":
            return call(a["dy"], a["x"], n, *stats, a["weight"], offset=1.0)
        if op == "add_layer_norm":
            return call(a["dy"], a["dsum"], a["x"], n, *stats, a["weight"], a["bias"])
        if op == "add_rms_norm":
            return call(a["dy"], a["dsum"], a["x"], n, *stats, a["weight"])
        return call(a["dy"], a["x"], a["scale"], n, *stats)

    def statistics(self, op):
        """Of x itself, as the plain op returns them."""
        plain = fastnorm.rms_norm if "rms" in op else fastnorm.layer_norm
        return plain(self.x, self.n, eps=1e-5, return_stats=True)[1:]


def as_wide(array):
    return array.double().numpy() if array.dtype.itemsize == 8 else array.float().numpy()


def sum_dtype(dtype):
    """What the reference rounds a sum to; NumPy has no bfloat16 of its own."""
    if dtype == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="ml_dtypes is missing").bfloat16)
    return np.dtype(dtype)


def assert_near(got, want, dtype, terms=None):
    """Within 1e-6 of the scale of `want`, or of what is summed, and a rounding to `dtype`."""
    wide, want = as_numpy(got).astype(np.float64), np.asarray(want, np.float64)
    precise = 1e-13 if dtype == "float64" else 1e-6
    scale = np.maximum(1, np.abs(want).max(initial=0)) if terms is None else max(terms, 1)
    allowed = precise * scale
    if dtype in ("float16", "bfloat16"):
        allowed = allowed + 0.5 * accuracy.ulp(want, sum_dtype(dtype))
    assert wide.shape == want.shape
    assert (np.abs(wide - want) <= allowed).all(), np.abs(wide - want).max()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cols", WIDTHS)
def test_forward(torch, op, dtype, cols):
    p = Problem(torch, 5, cols, dtype)
    got = p.forward(op)
    adds = op.startswith(("add_", "adaptive"))
    options = {"sum_dtype": sum_dtype(dtype)} if adds else {}
    want = p.forward(op, reference, p.host, **options)
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        is_stat = i > (1 if adds else 0)
        scale = np.abs(np.asarray(w)).max() if is_stat else None
        assert_near(g, w, np.dtype(p.compute).name if is_stat else dtype, scale)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cols", WIDTHS)
def test_backward(torch, op, dtype, cols):
    p = Problem(torch, 37, cols, dtype)
    stats = p.statistics(op)
    got = p.backward(op, stats)
    want = p.backward(op, [as_numpy(s) for s in stats], reference, p.host)
    rstd = as_numpy(stats[-1]).astype(np.float64)
    factor = np.abs(p.host["scale"] + 1) if op.startswith("adaptive") else np.abs(
        p.host["weight"] + (op == "rms_norm"))  # fmt: skip
    largest = np.abs(p.host["dy"]).max() * factor.max() * max(rstd.max(), 1)
    dx, wanted = as_numpy(got[0]).astype(np.float64), want[0]
    precise = 1e-13 if dtype == "float64" else 2e-6
    rounding = 0
    if dtype in ("float16", "bfloat16"):  # dx is rounded, and once more where dsum joins it
        rounding = (1.5 if op.startswith("add_") else 0.5) * accuracy.ulp(
            np.maximum(np.abs(wanted), np.abs(wanted - p.host["dsum"])), sum_dtype(dtype)
        )
    assert (np.abs(dx - wanted) <= precise * largest + rounding).all()
    dy = np.abs(p.host["dy"].astype(np.float64)).reshape(-1, cols)
    terms = float((dy.sum(0) * 6).max())
    for g, w in zip(got[1:], want[1:], strict=True):
        assert_near(g, w, np.dtype(p.compute).name, terms)


# Channels first and last; planes of odd sizes, of one element, and wide ones.
CHANNELS = [
    ((8, 12, 7, 7), 1), ((8, 64, 14, 14), 1), ((2, 6, 300, 300), 1), ((64, 96), 1),
    ((8, 7, 7, 12), -1), ((4, 56, 56, 64), -1), ((1, 8, 1), 1),
]  # fmt: skip


def channels_of(torch, shape, axis, dtype, seed=0):
    """Arrays on the device, and in float64 with channels on the second axis."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    x, dy = ((torch.randn(shape, generator=generator) + 3).to(kind) for _ in range(2))
    w, b = (torch.randn(shape[axis], generator=generator) for _ in range(2))
    given = [array.cuda() for array in (x, dy, w, b)]
    wide = [array.cuda().double() for array in (x, dy, w, b)]
    wide[:2] = [array.movedim(axis, 1).detach() for array in wide[:2]]
    return given, wide


def assert_as_torch(torch, op, y, gradients, wanted, wide, axis, dtype, scale):
    """y, dx, dweight and dbias within rounding of torch's in float64."""
    inputs = [array.requires_grad_() for array in (wide[0], wide[2], wide[3])]
    exact = wanted(*inputs)
    dx, dw, db = torch.autograd.grad(exact, inputs, wide[1])
    precise = {"float64": 1e-12, "float32": 4e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    for got, want in ((y, exact.movedim(1, axis)), (gradients[0], dx.movedim(1, axis))):
        bound = precise * want.abs().max().clamp(min=1)
        assert ((got.double() - want).abs() <= bound).all(), op
    for got, want in ((gradients[1], dw), (gradients[2], db)):
        bound = max(precise, 4e-6 if dtype != "float64" else 0) * scale
        assert ((got.double() - want).abs() <= bound).all(), op


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("shape", "axis"), CHANNELS, ids=str)
def test_channels(torch, shape, axis, dtype):
    """Group, instance and batch norm against torch's in float64, and ten times the same bits."""
    functional = torch.nn.functional
    (x, dy, w, b), wide = channels_of(torch, shape, axis, dtype)
    scale = 10 * math.sqrt(x.numel() / shape[axis]) + 10
    cases = {"batch_norm": {"training": True}, "group_norm": {"num_groups": 2}}
    if x[0].numel() > shape[axis]:
        cases["instance_norm"] = {}
    for op, options in cases.items():
        wanted = {
            "batch_norm": lambda x, w, b: functional.batch_norm(x, None, None, w, b, True),
            "group_norm": lambda x, w, b: functional.group_norm(x, 2, w, b),
            "instance_norm": lambda x, w, b: functional.instance_norm(x, None, None, w, b),
        }[op]
        if op == "batch_norm" and x.numel() == shape[axis]:
            continue  # torch refuses one element a channel
        y, mean, rstd = call(op, x=x, weight=w, bias=b, channel_axis=axis, return_stats=True,
                             **options)  # fmt: skip
        given = {"dy": dy, "x": x, "weight": w, "bias": b, "mean": mean, "rstd": rstd,
                 "channel_axis": axis, **options}  # fmt: skip
        gradients = call(f"{op}_backward", **given)
        assert_as_torch(torch, op, y, gradients, wanted, wide, axis, dtype, scale)
        for _ in range(10):
            again = call(f"{op}_backward", **given)
            assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize(("shape", "axis"), CHANNELS[:5], ids=str)
def test_running_statistics(torch, shape, axis):
    (x, _, w, b), wide = channels_of(torch, shape, axis, "float32")
    running = [torch.zeros(shape[axis], device="cuda"), torch.ones(shape[axis], device="cuda")]
    exact = [array.double() for array in running]
    call("batch_norm", x=x, running_mean=running[0], running_var=running[1], weight=w, bias=b,
         training=True, channel_axis=axis)  # fmt: skip
    torch.nn.functional.batch_norm(wide[0], *exact, training=True)
    for got, want in zip(running, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    y = call("batch_norm", x=x, running_mean=running[0], running_var=running[1], channel_axis=axis)
    want = torch.nn.functional.batch_norm(wide[0], *exact).movedim(1, axis)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cols", [96, 1024, 4096, 16384])
def test_many_rows(torch, cols):
    """Sums over more rows than there are blocks, against torch in float64."""
    rows = 20_000_000 // cols
    x, dy = (torch.randn(rows, cols, device="cuda") for _ in range(2))
    w, b = torch.randn(cols, device="cuda"), torch.randn(cols, device="cuda")
    y, mean, rstd = fastnorm.layer_norm(x, cols, w, b, return_stats=True)
    dx, dw, db = fastnorm.layer_norm_backward(dy, x, cols, mean, rstd, w, b)
    wide = x.double()
    xh = (wide - wide.mean(-1, keepdim=True)) * (
        wide.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()  # fmt: skip
    torch.testing.assert_close(y.double(), xh * w + b, rtol=0, atol=1e-5)
    terms = (dy.double() * xh).abs().sum(0).clamp(min=1)
    assert ((dw - (dy.double() * xh).sum(0)).abs() <= 1e-6 * terms).all()
    assert ((db - dy.double().sum(0)).abs() <= 1e-6 * dy.double().abs().sum(0)).all()
    g = dy.double() * w
    exact = g - g.mean(-1, keepdim=True) - xh * (g * xh).mean(-1, keepdim=True)
    torch.testing.assert_close(dx.double(), exact * rstd.double()[:, None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cols", [128, 1024, 4096, 65536])
@pytest.mark.parametrize("op", OPS)
def test_ten_runs_have_the_same_bits(torch, op, cols):
    p = Problem(torch, 300, cols, "bfloat16")
    first = [*p.forward(op), *p.backward(op, p.statistics(op))]
    for _ in range(10):
        again = [*p.forward(op), *p.backward(op, p.statistics(op))]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("cols", [16, 128, 1000, 4096, 32768])
def test_a_row_is_itself_in_any_batch(torch, cols):
    x = torch.randn(1024, cols, device="cuda")
    whole = fastnorm.layer_norm(x)
    for rows in (1, 2, 7, 64, 500):
        assert torch.equal(fastnorm.layer_norm(x[:rows]), whole[:rows])


@pytest.mark.parametrize("cols", [100, 4096])
def test_hard_rows(torch, cols):
    """Large means, huge and tiny rows, and what is not finite."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, cols)).astype(np.float32)
    x[1] += 1e6
    x[2] *= 1e30
    x[3] *= 1e-30
    x[4, 3], x[5, 4], x[6] = np.nan, np.inf, 7
    for eps in (0.0, 1e-5):
        y = as_numpy(fastnorm.layer_norm(torch.from_numpy(x).cuda(), eps=eps))
        want = reference.layer_norm(x, eps=eps)
        rows = [0, 1, 2, 3, 6, 7]
        assert np.abs(y[rows] - want[rows]).max() <= 1e-6 * max(1, np.abs(want[rows]).max())
        assert np.isnan(y[[4, 5]]).all()


@pytest.mark.parametrize("kind", ["cupy", "numba"])
def test_other_libraries(device, kind):
    x = np.random.default_rng(2).standard_normal((40, 512)).astype(np.float32)
    if kind == "cupy":
        library = pytest.importorskip("cupy", reason="CuPy is not installed")
        on = library.asarray(x)
    else:
        library = pytest.importorskip("numba.cuda", reason="numba is not installed")
        on = library.to_device(x)
    y, mean, rstd = fastnorm.layer_norm(on, return_stats=True)
    assert type(y) is type(on)
    assert_near(y, reference.layer_norm(x), "float32")
    dx, dw, db = fastnorm.layer_norm_backward(y, on, 512, mean, rstd)
    want = fastnorm.layer_norm_backward(
        as_numpy(y), x, 512, as_numpy(mean), as_numpy(rstd))  # fmt: skip
    for got, wanted in zip((dx, dw, db), want, strict=True):
        assert_near(got, wanted, "float32", 40)
    norm = fastnorm.LayerNorm(512)
    assert_near(norm(on), norm(x), "float32")


def test_arrays_known_by_dlpack_alone(torch):
    class Exporter:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    x = torch.randn(64, 1024, device="cuda")
    y = torch.empty_like(x)
    fastnorm.layer_norm(Exporter(x), out=Exporter(y))
    assert torch.equal(y, fastnorm.layer_norm(x))


def test_streams(torch):
    """Work is queued on the current stream, in the order of that stream."""
    x = torch.randn(4096, 4096, device="cuda")
    want = fastnorm.layer_norm(x * 3)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x * 3
        y = fastnorm.layer_norm(late)
        assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert torch.equal(y, want)


def test_graphs(torch):
    """Calls are captured, and replayed on other values."""
    p = Problem(torch, 64, 1024, "bfloat16")
    for _ in range(2):
        p.backward("layer_norm", p.statistics("layer_norm"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, mean, rstd = p.forward("layer_norm")
        grads = p.backward("layer_norm", (mean, rstd))
    p.x.mul_(2).add_(1)
    p.dy.neg_()
    graph.replay()
    torch.cuda.synchronize()
    wanted, mean, rstd = p.forward("layer_norm")
    assert torch.equal(y, wanted)
    for got, want in zip(grads, p.backward("layer_norm", (mean, rstd)), strict=True):
        assert torch.equal(got, want)


def test_threads(torch):
    """Calls from many threads, each with a stream of its own."""
    from concurrent.futures import ThreadPoolExecutor

    xs = [torch.randn(256, 128 * (i + 1), device="cuda") for i in range(16)]
    want = [fastnorm.layer_norm(x) for x in xs]
    torch.cuda.synchronize()

    def work(x):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            y = fastnorm.layer_norm(x)
        stream.synchronize()
        return y

    with ThreadPoolExecutor(16) as pool:
        for y, wanted in zip(pool.map(work, xs), want, strict=True):
            assert torch.equal(y, wanted)


@pytest.mark.parametrize("cols", [128, 4096])
def test_more_than_2_to_the_32_elements(torch, cols):
    rows = (1 << 32) // cols + 3
    needed = 4 * rows * cols * 2 + (2 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"the device has less than {needed / 2**30:.0f} GiB free")
    x = torch.empty(rows, cols, dtype=torch.float16, device="cuda")
    for part in x.split(1 << 20 if cols == 128 else 1 << 15):
        part.normal_()
    y, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device="cuda")
    assert torch.equal(y[some], fastnorm.layer_norm(x[some]))
    dx, dw, db = fastnorm.layer_norm_backward(y, x, cols, mean, rstd)
    part, _, _ = fastnorm.layer_norm_backward(y[some], x[some], cols, mean[some], rstd[some])
    assert torch.equal(dx[some], part)
    terms = math.sqrt(rows)
    assert ((dw - rows).abs() <= 20 * terms).all()
    assert (db.abs() <= 20 * terms).all()


def test_several_devices(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    x = torch.randn(64, 1024, device="cuda:1")
    y = fastnorm.layer_norm(x)
    assert y.device == x.device
    assert torch.equal(y.cpu(), fastnorm.layer_norm(x.to("cuda:0")).cpu())
    with pytest.raises(ValueError, match=r"^weight: got an array on CUDA device 0"):
        fastnorm.layer_norm(x, 1024, torch.ones(1024, device="cuda:0"))


def test_modules(torch):
    norm = fastnorm.LayerNorm(256)
    theirs = torch.nn.LayerNorm(256)
    with torch.no_grad():
        theirs.weight.normal_()
        theirs.bias.normal_()
    norm.load_state_dict(theirs.state_dict())
    x = torch.randn(32, 256, device="cuda")
    wanted = theirs.cuda()(x.clone().requires_grad_())
    torch.testing.assert_close(norm(x), wanted.detach(), rtol=0, atol=1e-5)


SANITIZED = """
    import torch, fastnorm
    for dtype in (torch.float32, torch.bfloat16):
        for cols in (1, 7, 100, 128, 1024, 4096, 8192, 32768, 65536):
            x = torch.randn(33, cols, device="cuda").to(dtype)
            w, b = torch.ones(cols, device="cuda"), torch.ones(cols, device="cuda")
            y, mean, rstd = fastnorm.layer_norm(x, cols, w, b, return_stats=True)
            fastnorm.layer_norm_backward(y, x, cols, mean, rstd, w, b)
            y, total, rstd = fastnorm.add_rms_norm(x, x, cols, w, return_stats=True)
            fastnorm.add_rms_norm_backward(y, y, total, cols, rstd, w)
    torch.cuda.synchronize()
    print("done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(torch, tool, tmp_path):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    # torch's own memory is not what is tested: each array gets an allocation.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code = tmp_path / "sanitized.py"
    code.write_text(textwrap.dedent(SANITIZED))
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-I", str(code)],
        env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert "done" in done.stdout


def test_explain_and_show_config(torch):
    x = torch.randn(32, 256, device="cuda")
    assert str(fastnorm.explain("layer_norm", x)).startswith(
        "layer_norm: 32 rows of 256 float32 on"
    )
    found = fastnorm.show_config("dicts")["cuda"]
    assert found["available"]
    assert torch.cuda.get_device_name(0) in found["devices"][0]


def test_the_bench_runs(torch, capsys):
    pytest.importorskip("rich", reason="rich is not installed")
    cli = importlib.import_module("fastnorm.cli")
    for op in ("layer_norm", "rms_norm_backward"):
        words = ["bench", "--device", "cuda", "--op", op, "--shapes", "128x1024", "--quick"]
        assert cli.main(words) == 0
    assert "fastnorm" in capsys.readouterr().out
