"""``python -m fastnorm bench --device cuda``: fastnorm next to torch, torch.compile and Triton.

Times are of the GPU, by events, with a cold second-level cache; beside them stand the share of the
speed at which the device copies memory, what a call costs the host, and the time of a call that is
replayed from a CUDA graph.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fastnorm
from fastnorm import cuda, timing

# By the kernel they exercise: narrow rows, rows in registers of a warp and of a block, wide rows,
# few rows.
SHAPES = [
    *[(262144, 128), (32768, 1024), (32768, 4096), (32768, 8192), (16384, 16384), (8192, 65536)],
    *[(1, 4096), (128, 4096), (128, 8192)],
]
QUICK_SHAPES = [(32768, 1024), (32768, 4096), (128, 4096)]
ROUNDS = 7
#: Calls in a captured graph.
REPLAYED = 16
#: Rows that are compared with float64.
COMPARED = 256
OPS: tuple[str, ...] = (
    "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "adaptive_layer_norm",
    "layer_norm_backward", "rms_norm_backward",
)  # fmt: skip
#: Rows of these are samples of so many channels, in so many groups; as far as there are such ops.
CHANNELS, GROUPS = 32, 8
OPS += tuple([op for op in ("group_norm", "batch_norm") if hasattr(fastnorm, op)])
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Result:
    """One contender at one shape; seconds are medians."""

    op: str
    dtype: str
    rows: int
    cols: int
    provider: str
    seconds: float
    host_seconds: float
    graph_seconds: float | None
    of_copy: float  # share of the copy's bytes a second
    ratio: float  # to fastnorm's time
    error: float | None
    rounds: list[float]


class Case:
    """The arrays of one op at one shape, on the device."""

    def __init__(self, op: str, shape: tuple[int, int], dtype: str, device: str = "cuda") -> None:
        torch = importlib.import_module("torch")
        self.torch, self.op, self.shape, self.dtype = torch, op, shape, dtype
        self.rms = "rms_norm" in op
        self.eps = 1e-6
        kind = getattr(torch, dtype)
        generator = torch.Generator(device=device).manual_seed(7)

        def made(*lengths: int) -> Any:
            return torch.randn(lengths, generator=generator, device=device).to(kind)

        rows, cols = shape
        self.x, self.other = made(rows, cols), made(rows, cols)
        self.weight, self.bias = made(cols), made(cols)
        if op in ("group_norm", "batch_norm"):
            planes = (rows, CHANNELS, cols // CHANNELS)
            self.x, self.other = self.x.view(planes), self.other.view(planes)
            self.weight, self.bias = made(CHANNELS), made(CHANNELS)
        self.scale, self.shift = made(1, cols), made(1, cols)
        self.y, self.total = torch.empty_like(self.x), torch.empty_like(self.x)
        if op.endswith("_backward"):
            forward = op.removesuffix("_backward")
            _, *stats = self.norm(forward, eps=self.eps, return_stats=True)
            self.mean, self.rstd = (stats[0], stats[-1])

    def norm(self, op: str, **options: Any) -> Any:
        return getattr(fastnorm, op)(self.x, self.shape[1], **options)

    @property
    def moved(self) -> int:
        """Bytes that must be moved: each row element in and out once."""
        three = self.op.endswith("_backward") or self.op == "batch_norm"  # which reads x twice
        passes = 4 if self.op.startswith("add_") else 3 if three else 2
        return passes * self.x.nbytes


def contenders(case: Case) -> dict[str, Callable[[], Any]]:
    """Each library's call, by its name; all read the same arrays."""
    found = {"fastnorm": _ours(case), "fastnorm out": _ours(case, into=True)}
    if case.op.endswith("_backward"):
        del found["fastnorm out"]
    eager = _torch(case)
    found["torch"] = eager
    compiled = case.torch.compile(_plain(case), dynamic=False)
    found["torch.compile"] = lambda: compiled(*_inputs(case))
    by_triton = _triton(case)
    if by_triton is not None:
        found["triton"] = by_triton
    found["copy"] = lambda: case.y.copy_(case.x)
    return found


def _ours(case: Case, into: bool = False) -> Callable[[], Any]:
    x, other, cols = case.x, case.other, case.shape[1]
    out: dict[str, Any] = {"out": case.y} if into else {}
    if into and case.op.startswith("add_"):
        out["sum_out"] = case.total
    w, b, eps = case.weight, case.bias, case.eps
    calls: dict[str, Callable[[], Any]] = {
        "layer_norm": lambda: fastnorm.layer_norm(x, cols, w, b, eps, **out),
        "rms_norm": lambda: fastnorm.rms_norm(x, cols, w, eps, **out),
        "add_layer_norm": lambda: fastnorm.add_layer_norm(x, other, cols, w, b, eps, **out),
        "add_rms_norm": lambda: fastnorm.add_rms_norm(x, other, cols, w, eps, **out),
        "adaptive_layer_norm": lambda: fastnorm.adaptive_layer_norm(
            x, case.scale, case.shift, cols, eps, **out
        ),
        "group_norm": lambda: _op("group_norm")(x, GROUPS, w, b, eps, **out),
        "batch_norm": lambda: _op("batch_norm")(x, None, None, w, b, True, 0.1, eps, **out),
        "layer_norm_backward": lambda: fastnorm.layer_norm_backward(
            other, x, cols, case.mean, case.rstd, w, b
        ),
        "rms_norm_backward": lambda: fastnorm.rms_norm_backward(other, x, cols, case.rstd, w),
    }
    return calls[case.op]


def _op(name: str) -> Callable[..., Any]:
    return getattr(fastnorm, name)


def _torch(case: Case) -> Callable[[], Any]:
    """torch's own kernels, one after another where no single one does it."""
    aten, functional = case.torch.ops.aten, case.torch.nn.functional
    if case.op == "layer_norm_backward":
        n, mask = [case.shape[1]], [True, True, True]
        _, mean, rstd = aten.native_layer_norm(case.x, n, case.weight, case.bias, case.eps)
        return lambda: aten.native_layer_norm_backward(
            case.other, case.x, n, mean, rstd, case.weight, case.bias, mask
        )
    if case.op == "rms_norm_backward":
        leaves = [array.detach().requires_grad_() for array in (case.x, case.weight)]
        y = functional.rms_norm(leaves[0], case.shape[1:], leaves[1], case.eps)
        return lambda: case.torch.autograd.grad(y, leaves, case.other, retain_graph=True)
    plain = _plain(case)
    return lambda: plain(*_inputs(case))


def _inputs(case: Case) -> tuple[Any, ...]:
    if case.op.endswith("_backward"):
        return case.other, case.x, case.mean, case.rstd, case.weight
    if case.op.startswith("adaptive"):
        return case.x, case.other, case.scale, case.shift
    return case.x, case.other, case.weight, case.bias


def _plain(case: Case) -> Callable[..., Any]:
    """The op in torch's words, for torch.compile to fuse."""
    torch, functional = case.torch, case.torch.nn.functional
    n, eps, rms = case.shape[1:], case.eps, case.rms

    def backward(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> Any:
        compute = torch.promote_types(x.dtype, torch.float32)
        dy, r = dy.to(compute), rstd[:, None]
        xh = x.to(compute) * r if rms else (x.to(compute) - mean[:, None]) * r
        g = dy * weight.to(compute)
        dx = g - xh * (g * xh).mean(-1, keepdim=True)
        if rms:
            return (dx * r).to(x.dtype), (dy * xh).sum(0)
        dx = (dx - g.mean(-1, keepdim=True)) * r
        return dx.to(x.dtype), (dy * xh).sum(0), dy.sum(0)

    def norm(x: Any, weight: Any, bias: Any) -> Any:
        if rms:
            return functional.rms_norm(x, n, weight, eps)
        return functional.layer_norm(x, n, weight, bias, eps)

    def add(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
        total = x + residual
        return norm(total, weight, bias), total

    if case.op.endswith("_backward"):
        return backward
    if case.op.startswith("add_"):
        return add
    if case.op == "group_norm":
        return lambda x, _, weight, bias: functional.group_norm(x, GROUPS, weight, bias, eps)
    if case.op == "batch_norm":
        return lambda x, _, weight, bias: functional.batch_norm(
            x, None, None, weight, bias, True, 0.1, eps
        )
    if case.op.startswith("adaptive"):
        return lambda x, _, scale, shift: norm(x, None, None) * (1 + scale) + shift
    return lambda x, _, weight, bias: norm(x, weight, bias)


def _triton(case: Case) -> Callable[[], Any] | None:
    if importlib.util.find_spec("triton") is None or case.dtype == "float64":
        return None
    kernels = importlib.import_module("fastnorm.cuda.triton_norm")
    others = ("add_", "adaptive", "group", "batch")
    if case.shape[1] > kernels.WIDEST or case.op.startswith(others):
        return None
    if case.op.endswith("_backward"):
        return lambda: kernels.backward(
            case.other, case.x, case.mean, case.rstd, case.weight, case.rms
        )
    return lambda: kernels.forward(case.x, case.weight, case.bias, case.eps, case.rms)


# ---- measuring ----------------------------------------------------------------------------------


class Clock:
    """The GPU's time, by events, each call after the second-level cache was written over."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.spoil = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def seconds(self, call: Callable[[], Any], count: int) -> float:
        """The median of `count` calls."""
        pairs = []
        for _ in range(count):
            self.spoil.zero_()
            pair = [self.torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        self.wait()
        return statistics.median(first.elapsed_time(last) for first, last in pairs) * 1e-3

    def wait(self) -> None:
        self.torch.cuda.synchronize()

    def replayed(self, call: Callable[[], Any]) -> float | None:
        """Seconds a call in a CUDA graph, its inputs as warm as they are; None if it has none."""
        graph = self.torch.cuda.CUDAGraph()
        try:
            with self.torch.cuda.graph(graph):
                for _ in range(REPLAYED):
                    call()
        except RuntimeError:
            self.wait()
            return None
        graph.replay()
        return self.seconds(graph.replay, 5) / REPLAYED


def host_seconds(call: Callable[[], Any], wait: Callable[[], None], count: int = 100) -> float:
    """What a call costs the host, the device's queue never being full."""
    times = []
    for _ in range(5):
        wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count)
    wait()
    return min(times)


def measure(case: Case, clock: Any, count: int = 20) -> list[Result]:
    """Times every contender of the case, in turns."""
    found = contenders(case)
    errors = {name: None if name == "copy" else error(case, call) for name, call in found.items()}
    rounds: dict[str, list[float]] = {name: [] for name in found}
    order = list(found)
    for _ in range(ROUNDS):
        for name in order:
            rounds[name].append(clock.seconds(found[name], count))
        order.append(order.pop(0))
    median = {name: statistics.median(times) for name, times in rounds.items()}
    copied = 2 * case.x.nbytes / median["copy"]
    return [
        Result(
            op=case.op,
            dtype=case.dtype,
            rows=case.shape[0],
            cols=case.shape[1],
            provider=name,
            seconds=median[name],
            host_seconds=host_seconds(call, clock.wait),
            graph_seconds=clock.replayed(call),
            of_copy=(2 * case.x.nbytes if name == "copy" else case.moved) / median[name] / copied,
            ratio=timing.median_ratio(rounds[name], rounds["fastnorm"]),
            error=errors[name],
            rounds=rounds[name],
        )
        for name, call in found.items()
    ]


def error(case: Case, call: Callable[[], Any]) -> float:
    """The largest error of the first result's first rows against torch in float64, of its scale."""
    torch, rows = case.torch, len(case.x) if case.op == "batch_norm" else COMPARED
    got = call()
    got = (got[0] if isinstance(got, (tuple, list)) else got)[:rows].double()
    few = [
        array[:rows].double() if array.shape == case.x.shape else array.double()
        for array in _inputs(case)
    ]
    if case.op.endswith("_backward"):
        x = few[1]
        centre = 0 if case.rms else x.mean(-1)
        variance = (x**2).mean(-1) if case.rms else x.var(-1, unbiased=False)
        few[2:4] = [centre, (variance + case.eps).rsqrt()]
    wanted = _plain(case)(*few)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    return float((got - wanted).abs().max() / torch.clamp(wanted.abs().max(), min=1.0))


# ---- the command --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    why = "" if importlib.util.find_spec("torch") else "torch, which times and compares, is missing"
    why = why or cuda.why_not()
    if not why and not importlib.import_module("torch").cuda.is_available():
        why = "torch finds no CUDA device"
    for name, value, known in (("--op", options.op, OPS), ("--dtype", options.dtype, DTYPES)):
        if value not in known:
            why = f"{name}: got {value}, wanted one of {', '.join(known)}"
    if options.plot:
        why = "--plot: there is none for --device cuda; --json has the numbers"
    if why:
        print(f"bench --device cuda: {why}", file=sys.stderr)
        return 2
    results = list(_measure_all(options))
    if options.json != "-":
        show(results)
    if options.json:
        timing.write_json(machine(), results, options.json)
    return 0


def _measure_all(options: argparse.Namespace) -> Iterator[Result]:
    torch = importlib.import_module("torch")
    clock = Clock(torch)
    for shape in options.shapes or (QUICK_SHAPES if options.quick else SHAPES):
        print(f"{options.op} {options.dtype} {shape} ...", file=sys.stderr, flush=True)
        yield from measure(
            Case(options.op, shape, options.dtype), clock, 5 if options.quick else 20
        )
        torch.cuda.empty_cache()


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    torch = importlib.import_module("torch")
    versions = {
        name: importlib.import_module(name).__version__
        for name in ("numba", "torch", "triton")
        if importlib.util.find_spec(name)
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"device": device, "fastnorm": fastnorm.__version__, **versions}


def show(results: list[Result]) -> None:
    """The table, a line for each contender."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    first = results[0]
    table = Table(title=f"{first.op}, {first.dtype}", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("shape", "library"):
        table.add_column(heading, no_wrap=True)
    for heading in ("time", "ratio", "of copy", "host", "in a graph", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for result in results:
        shape = f"({result.rows}, {result.cols})"
        graph = result.graph_seconds
        table.add_row(
            "" if shape == before else shape,
            result.provider,
            timing.duration(result.seconds),
            f"{result.ratio:.2f}",
            f"{result.of_copy:.0%}",
            timing.duration(result.host_seconds),
            "" if graph is None else timing.duration(graph),
            "" if result.error is None else f"{result.error:.1e}",
            style="bold" if result.provider.startswith("fastnorm") else None,
        )
        before = shape
    console = Console()
    console.width = max(console.width, 100)  # what the table takes
    console.print(table)
    here = ", ".join(f"{name} {value}" for name, value in machine().items() if value)
    console.print(
        f"Medians of {ROUNDS} rounds, in turns, the cache written over before each call. ratio: "
        "the time over fastnorm's. of copy: bytes that must be moved a second, over a copy's. "
        f"error: the largest, against float64. {here}.",
        highlight=False, soft_wrap=True, style="dim",
    )  # fmt: skip
