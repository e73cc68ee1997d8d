"""Who is timed: for each op, one line of Python for every library that can do it.

All of them read the same arrays. ``new`` is a call that returns a new array, ``out`` one that
writes into an array that exists; no library is asked to do what it has no call for.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastnorm
from fastnorm import accuracy

Array = NDArray[Any]


class Case:
    """The arrays of one measurement: rows x cols of an op and a dtype.

    Every array starts at an address that is `align` modulo 64 (align = 64: at a cache line).
    """

    def __init__(
        self, op: str, shape: tuple[int, int], dtype: str, align: int = 64, eps: float = 1e-5
    ) -> None:
        self.op, self.shape, self.dtype, self.align = op, shape, np.dtype(dtype), align
        self.eps = eps
        rng = np.random.default_rng(0)
        cols = shape[1]
        self.x, self.y = self._normal(rng, shape), self.empty(shape)
        self.weight, self.bias = self._normal(rng, (cols,)), self._normal(rng, (cols,))
        self.weight += 1
        self.dy = self._normal(rng, shape) if op == "layer_norm_backward" else self.y

    @property
    def name(self) -> str:
        return f"({self.shape[0]}, {self.shape[1]})"

    @property
    def bytes_moved(self) -> int:
        """What must be read and written at the least: x and y; x, dy and dx; x."""
        arrays = {"layer_norm": 2, "layer_norm_backward": 3, "moments": 1}[self.op]
        return arrays * self.x.nbytes

    def empty(self, shape: tuple[int, ...]) -> Array:
        size = int(np.prod(shape)) * self.dtype.itemsize
        offset = self.align % 64
        memory = fastnorm.empty(offset + size, np.uint8)
        return memory[offset:].view(self.dtype).reshape(shape)

    def largest_error(self, results: tuple[Array, ...]) -> float:
        """In the units of `fastnorm.accuracy`, the worst of what the op returns."""
        if self.op == "layer_norm":
            return accuracy.layer_norm_error(results[0], self.x, self.weight, self.bias, self.eps)
        if self.op == "moments":
            return max(accuracy.moments_errors((results[0], results[1]), self.x))
        gradients = (results[0], results[1], results[2])
        return max(
            accuracy.layer_norm_backward_errors(gradients, self.dy, self.x, self.weight, self.eps)
        )

    def _normal(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        array = self.empty(shape)
        rng.standard_normal(dtype=self.dtype.type, out=array)
        return array


@dataclass(frozen=True)
class Contender:
    """A line of Python to time, and the names it uses."""

    provider: str
    output: str  # "new" or "out"
    statement: str
    names: dict[str, Any]
    into: tuple[Any, ...] | None = None  # what an "out" statement fills

    @property
    def name(self) -> str:
        return f"{self.provider} {self.output}"

    def results(self) -> tuple[Array, ...]:
        """Runs the statement once."""
        value = eval(self.statement, self.names)
        if self.into is not None:
            value = self.into
        parts = value if isinstance(value, tuple | list) else (value,)
        return tuple(np.asarray(part) for part in parts)


# ---- one function for each provider -------------------------------------------------------------


def _fastnorm(case: Case, threads: int) -> Iterator[Contender]:
    fastnorm.set_num_threads(threads)
    names = _arrays(case) | {
        "layer_norm": fastnorm.layer_norm,
        "layer_norm_backward": fastnorm.layer_norm_backward,
        "moments": fastnorm.moments,
    }
    if case.op == "layer_norm":
        call = "layer_norm(x, cols, weight, bias, eps"
        yield Contender("fastnorm", "new", f"{call})", names)
        yield Contender("fastnorm", "out", f"{call}, out=y)", names, (case.y,))
        layer = fastnorm.LayerNorm(case.shape[1], case.eps, dtype=case.dtype)
        layer.weight, layer.bias = case.weight, case.bias
        names = names | {"layer": layer}
        yield Contender("fastnorm object", "out", "layer(x, y)", names, (case.y,))
    elif case.op == "layer_norm_backward":
        _, mean, rstd = fastnorm.layer_norm(case.x, eps=case.eps, return_stats=True)
        call = "layer_norm_backward(dy, x, cols, mean, rstd, weight, bias)"
        yield Contender("fastnorm", "new", call, names | {"mean": mean, "rstd": rstd})
    else:
        yield Contender("fastnorm", "new", "moments(x)", names)


def _numpy(case: Case, threads: int) -> Iterator[Contender]:
    names = _arrays(case) | {"np": np, "backward": _numpy_backward}
    if case.op == "layer_norm":
        yield Contender(
            "numpy",
            "new",
            "(x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)"
            " * weight + bias",
            names,
        )
    elif case.op == "layer_norm_backward":
        mean = case.x.mean(-1, keepdims=True)
        rstd = 1 / np.sqrt(case.x.var(-1, keepdims=True) + case.dtype.type(case.eps))
        call = "backward(dy, x, mean, rstd, weight)"
        yield Contender("numpy", "new", call, names | {"mean": mean, "rstd": rstd})
    else:
        yield Contender("numpy", "new", "(x.mean(-1), x.var(-1))", names)


def _numpy_backward(dy: Array, x: Array, mean: Array, rstd: Array, weight: Array) -> Any:
    xh = (x - mean) * rstd
    g = dy * weight
    towards = g - g.mean(-1, keepdims=True) - xh * (g * xh).mean(-1, keepdims=True)
    return rstd * towards, (dy * xh).sum(0), dy.sum(0)


def _torch(case: Case, threads: int) -> Iterator[Contender]:
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    # No "out": torch's generated out= variant of native_layer_norm copies a new result.
    names = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in _arrays(case).items()
    }
    names |= {"shape": (case.shape[1],), "mask": [True, True, True], "var_mean": torch.var_mean}
    _, mean, rstd = torch.native_layer_norm(
        names["x"], names["shape"], names["weight"], names["bias"], case.eps
    )
    names |= {"mean": mean, "rstd": rstd}
    if case.op == "layer_norm":
        names["layer_norm"] = torch.nn.functional.layer_norm
        yield Contender("torch", "new", "layer_norm(x, shape, weight, bias, eps)", names)
    elif case.op == "layer_norm_backward":
        names["backward"] = torch.ops.aten.native_layer_norm_backward.default
        call = "backward(dy, x, shape, mean, rstd, weight, bias, mask)"
        yield Contender("torch", "new", call, names)
    else:
        yield Contender("torch", "new", "var_mean(x, -1, correction=0)[::-1]", names)


def _onnxruntime(case: Case, threads: int) -> Iterator[Contender]:
    if case.op != "layer_norm":
        return
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        _onnx_model(case), options, providers=["CPUExecutionProvider"]
    )
    names = {"session": session, "feeds": {"x": case.x}}
    yield Contender("onnxruntime", "new", "session.run(None, feeds)", names)
    binding = session.io_binding()
    for bind, name, array in (
        (binding.bind_input, "x", case.x),
        (binding.bind_output, "y", case.y),
    ):
        bind(name, "cpu", 0, case.dtype.type, case.shape, array.ctypes.data)
    names = {"run": session.run_with_iobinding, "binding": binding, "keep": (case.x, case.y)}
    yield Contender("onnxruntime", "out", "run(binding)", names, (case.y,))


def _onnx_model(case: Case) -> bytes:
    import onnx

    element = onnx.helper.np_dtype_to_tensor_dtype(case.dtype)
    x, y = (onnx.helper.make_tensor_value_info(name, element, case.shape) for name in "xy")
    node = onnx.helper.make_node(
        "LayerNormalization", ["x", "weight", "bias"], ["y"], axis=-1, epsilon=case.eps
    )
    parameters = [
        onnx.numpy_helper.from_array(array, name)
        for name, array in (("weight", case.weight), ("bias", case.bias))
    ]
    graph = onnx.helper.make_graph([node], "layer_norm", [x], [y], parameters)
    opset = [onnx.helper.make_opsetid("", 17)]
    model: bytes = onnx.helper.make_model(
        graph, opset_imports=opset, ir_version=8
    ).SerializeToString()
    return model


def _numba(case: Case, threads: int) -> Iterator[Contender]:
    if case.op != "layer_norm":
        return
    import numba

    numba.set_num_threads(threads)
    for provider, fastmath in (("numba", False), ("numba fastmath", True)):
        compiled = _numba_layer_norm(fastmath=fastmath, parallel=threads > 1)
        names = _arrays(case) | {"layer_norm": compiled}
        call = "layer_norm(x, weight, bias, eps, y)"
        yield Contender(provider, "out", call, names, (case.y,))


@functools.cache
def _numba_layer_norm(fastmath: bool, parallel: bool) -> Any:
    import numba

    def layer_norm(x, weight, bias, eps, y):  # type: ignore[no-untyped-def]
        rows, cols = x.shape
        for r in numba.prange(rows):
            total = x.dtype.type(0)
            for i in range(cols):
                total += x[r, i]
            mean = x.dtype.type(total / cols)
            squares = x.dtype.type(0)
            for i in range(cols):
                deviation = x[r, i] - mean
                squares += deviation * deviation
            rstd = x.dtype.type(1 / np.sqrt(squares / cols + eps))
            for i in range(cols):
                y[r, i] = (x[r, i] - mean) * rstd * weight[i] + bias[i]

    return numba.njit(error_model="numpy", fastmath=fastmath, parallel=parallel)(layer_norm)


def _copy(case: Case, threads: int) -> Iterator[Contender]:
    names = {"x": case.x, "y": case.y, "copyto": np.copyto}
    yield Contender("copy", "new", "x.copy()", names)
    yield Contender("copy", "out", "copyto(y, x)", names)


def _arrays(case: Case) -> dict[str, Any]:
    arrays = {name: getattr(case, name) for name in ("x", "dy", "weight", "bias", "y")}
    return arrays | {"cols": case.shape[1], "eps": case.eps}


@dataclass(frozen=True)
class Provider:
    """A library: its contenders for a case and a number of threads, and the modules it needs."""

    contenders: Callable[[Case, int], Iterator[Contender]]
    needs: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(module) for module in self.needs)


PROVIDERS = {
    "fastnorm": Provider(_fastnorm),
    "numpy": Provider(_numpy),
    "torch": Provider(_torch, ("torch",)),
    "onnxruntime": Provider(_onnxruntime, ("onnxruntime", "onnx")),
    "numba": Provider(_numba, ("numba",)),
    "copy": Provider(_copy),
}


def contenders(
    case: Case, threads: int = 1, providers: Iterable[str] = PROVIDERS
) -> dict[str, Contender]:
    """Everyone installed who has a call for the case, by name; sets each library's threads."""
    found = [
        contender
        for name in providers
        if PROVIDERS[name].installed
        for contender in PROVIDERS[name].contenders(case, threads)
    ]
    return {contender.name: contender for contender in found}


def versions() -> dict[str, str | None]:
    """The version of every provider's packages; None for what is not installed."""
    found: dict[str, str | None] = {"fastnorm": fastnorm.__version__, "numpy": np.__version__}
    for provider in PROVIDERS.values():
        for module in provider.needs:
            installed = importlib.util.find_spec(module) is not None
            found[module] = importlib.metadata.version(module) if installed else None
    return found
