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
from fastnorm import contenders_channels as on_channels
from fastnorm.cases import CHANNELS
from fastnorm.cases import Case as Case

Array = NDArray[Any]


@dataclass(frozen=True)
class Contender:
    """A line of Python to time, and the names it uses."""

    provider: str
    output: str  # "new" or "out"
    statement: str
    names: dict[str, Any]
    into: tuple[Any, ...] | None = None  # what an "out" statement fills
    # What else a call changes, and a copy of what was there before the first.
    changed: tuple[tuple[Array, Array], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.provider} {self.output}"

    def results(self) -> tuple[Array, ...]:
        """Runs the statement once: what it returns or fills, and what it changes.

        As if it were the first time: what had been changed is put back before.
        """
        for memory, before in self.changed:
            memory[...] = before
        value = eval(self.statement, dict(self.names))
        if self.into is not None:
            value = self.into
        parts = value if isinstance(value, tuple | list) else (value,)
        return (*(_ndarray(part) for part in parts), *(memory.copy() for memory, _ in self.changed))


# ---- fastnorm -----------------------------------------------------------------------------------

FASTNORM = {
    "layer_norm": "layer_norm(x, cols, weight, bias, eps)",
    "layer_norm_backward": "layer_norm_backward(dy, x, cols, mean, rstd, weight, bias)",
    "rms_norm": "rms_norm(x, cols, weight, eps)",
    "rms_norm_backward": "rms_norm_backward(dy, x, cols, rstd, weight)",
    "add_layer_norm": "add_layer_norm(x, residual, cols, weight, bias, eps)",
    "add_layer_norm_backward": (
        "add_layer_norm_backward(dy, dsum, x, cols, mean, rstd, weight, bias)"
    ),
    "add_rms_norm": "add_rms_norm(x, residual, cols, weight, eps)",
    "add_rms_norm_backward": "add_rms_norm_backward(dy, dsum, x, cols, rstd, weight)",
    "adaptive_layer_norm": "adaptive_layer_norm(x, scale, shift, cols, eps)",
    "adaptive_layer_norm_backward": (
        "adaptive_layer_norm_backward(dy, x, scale, cols, mean, rstd)"
    ),
    "parallel_layer_norm": "parallel_layer_norm(x, cols, (weight, weight2), (bias, bias2), eps)",
    "segment_layer_norm": "segment_layer_norm(x, offsets, weight, bias, eps)",
    "segment_layer_norm_backward": (
        "segment_layer_norm_backward(dy, x, offsets, mean, rstd, weight, bias)"
    ),
    "segment_rms_norm": "segment_rms_norm(x, offsets, weight, eps)",
    "segment_rms_norm_backward": "segment_rms_norm_backward(dy, x, offsets, rstd, weight)",
    "moments": "moments(x)",
    "batch_norm": "batch_norm(x, running_mean, running_var, weight, bias, False, 0.1, eps)",
    "batch_norm_backward": (
        "batch_norm_backward(dy, x, running_mean, running_var, weight, bias, False, eps)"
    ),
    "batch_norm_training": "batch_norm(x, running_mean, running_var, weight, bias, True, 0.1, eps)",
    "batch_norm_training_backward": (
        "batch_norm_backward(dy, x, None, None, weight, bias, True, eps, mean=mean, rstd=rstd)"
    ),
    "group_norm": "group_norm(x, groups, weight, bias, eps)",
    "group_norm_backward": "group_norm_backward(dy, x, groups, mean, rstd, weight, bias)",
    "instance_norm": "instance_norm(x, None, None, weight, bias, True, 0.1, eps)",
    "instance_norm_backward": "instance_norm_backward(dy, x, mean, rstd, weight, bias)",
    "adaptive_instance_norm": "adaptive_instance_norm(x, style, eps)",
}
# What has no such keyword returns new arrays only.
OUT = {
    "layer_norm": "out=y",
    "rms_norm": "out=y",
    "add_layer_norm": "out=y, sum_out=total",
    "add_rms_norm": "out=y, sum_out=total",
    "adaptive_layer_norm": "out=y",
    "parallel_layer_norm": "out=(y, y2)",
    "segment_layer_norm": "out=y",
    "segment_rms_norm": "out=y",
    "batch_norm": "out=y",
    "batch_norm_training": "out=y",
    "group_norm": "out=y",
    "instance_norm": "out=y",
    "adaptive_instance_norm": "out=y",
}


def _fastnorm(case: Case, threads: int) -> Iterator[Contender]:
    fastnorm.set_num_threads(threads)
    function = CHANNELS.get(case.op, case.op)
    names = case.arrays | {function: getattr(fastnorm, function)}
    if case.op.endswith("_backward"):
        names |= _statistics(case)
    call = FASTNORM[case.op]
    own, changed = on_channels.own_running(case)
    names |= own
    yield Contender("fastnorm", "new", call, names, changed=changed)
    if case.op in OUT:
        into = tuple(names[name] for name in ("y", "total", "y2") if name in names)
        call = f"{call.removesuffix(')')}, {OUT[case.op]})"
        yield Contender("fastnorm", "out", call, names, into, changed)
    if case.op == "layer_norm":
        layer = fastnorm.LayerNorm(case.shape[1], case.eps, dtype=case.dtype)
        layer.weight, layer.bias = case.weight, case.bias
        yield Contender("fastnorm object", "out", "layer(x, y)", names | {"layer": layer}, into)


def _statistics(case: Case) -> dict[str, Any]:
    """mean and rstd as the forward call saves them; RMS norm has no mean."""
    if case.op in CHANNELS:
        return on_channels.statistics(case)
    name = "rms_norm" if "rms_norm" in case.op else "layer_norm"
    names = case.arrays
    if case.op.startswith("segment_"):
        forward = getattr(fastnorm, f"segment_{name}")
        _, *found = forward(names["x"], names["offsets"], eps=case.eps, return_stats=True)
    else:
        _, *found = getattr(fastnorm, name)(names["x"], eps=case.eps, return_stats=True)
    return dict(zip(("mean", "rstd")[-len(found) :], found, strict=True))


# ---- NumPy --------------------------------------------------------------------------------------

NUMPY = {
    "layer_norm": (
        "(x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias"
    ),
    "layer_norm_backward": "layer_norm_backward(dy, x, mean, rstd, weight)",
    "rms_norm": "x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight",
    "rms_norm_backward": "rms_norm_backward(dy, x, rstd, weight)",
    "add_layer_norm": (
        "(((s := x + residual) - s.mean(-1, keepdims=True))"
        " / np.sqrt(s.var(-1, keepdims=True) + eps) * weight + bias, s)"
    ),
    "add_rms_norm": (
        "((s := x + residual) / np.sqrt((s * s).mean(-1, keepdims=True) + eps) * weight, s)"
    ),
    "adaptive_layer_norm": (
        "(x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)"
        " * (1 + scale[:, None]) + shift[:, None]"
    ),
    "parallel_layer_norm": (
        "((xh := (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps))"
        " * weight + bias, xh * weight2 + bias2)"
    ),
    "moments": "(x.mean(-1), x.var(-1))",
    "batch_norm": "(x - mean) / np.sqrt(var + eps) * weight + bias",
    "batch_norm_backward": "batch_norm_backward(dy, x, mean, rstd, weight)",
    "batch_norm_training": (
        "batch_norm_training(x, running_mean, running_var, weight, bias, 0.1, eps)"
    ),
    "batch_norm_training_backward": "units_backward(dy, x, mean, rstd, weight, axes)",
    "group_norm": (
        "((x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)"
        " * weight + bias).reshape(shape)"
    ),
    "group_norm_backward": "units_backward(dy, x, mean, rstd, weight, axes)",
    "instance_norm": (
        "(x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)"
        " * weight + bias"
    ),
    "instance_norm_backward": "units_backward(dy, x, mean, rstd, weight, axes)",
    "adaptive_instance_norm": (
        "(x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)"
        " * np.sqrt(style.var(axes, keepdims=True) + eps) + style.mean(axes, keepdims=True)"
    ),
}


def _numpy(case: Case, threads: int) -> Iterator[Contender]:
    if case.op not in NUMPY or case.dtype.itemsize == 2:
        return  # its sums of half types are either rounded at each step or very slow
    if case.op in CHANNELS:
        own, changed = on_channels.own_running(case)
        names = on_channels.numpy_names(case) | own
        yield Contender("numpy", "new", NUMPY[case.op], names, changed=changed)
        return
    names = case.arrays | {"np": np}
    if case.op.endswith("_backward"):
        names |= {"layer_norm_backward": _numpy_backward, "rms_norm_backward": _numpy_rms_backward}
        names["mean"] = case.x.mean(-1, keepdims=True)
        square = (case.x * case.x).mean(-1, keepdims=True)
        spread = square if "rms" in case.op else case.x.var(-1, keepdims=True)
        names["rstd"] = 1 / np.sqrt(spread + case.dtype.type(case.eps))
    yield Contender("numpy", "new", NUMPY[case.op], names)


def _numpy_backward(dy: Array, x: Array, mean: Array, rstd: Array, weight: Array) -> Any:
    xh = (x - mean) * rstd
    g = dy * weight
    towards = g - g.mean(-1, keepdims=True) - xh * (g * xh).mean(-1, keepdims=True)
    return rstd * towards, (dy * xh).sum(0), dy.sum(0)


def _numpy_rms_backward(dy: Array, x: Array, rstd: Array, weight: Array) -> Any:
    xh = x * rstd
    g = dy * weight
    return rstd * (g - xh * (g * xh).mean(-1, keepdims=True)), (dy * xh).sum(0)


# ---- torch --------------------------------------------------------------------------------------

# The layer norm that it has by itself; a composite of its calls for the rest, as models write it.
TORCH = {
    "layer_norm": "layer_norm(x, shape, weight, bias, eps)",
    "layer_norm_backward": "backward(dy, x, shape, mean, rstd, weight, bias, mask)",
    "rms_norm": "rms_norm(x, shape, weight, eps)",
    "add_layer_norm": "(layer_norm(s := x + residual, shape, weight, bias, eps), s)",
    "add_layer_norm_backward": (
        "((g := backward(dy, x, shape, mean, rstd, weight, bias, mask))[0] + dsum, g[1], g[2])"
    ),
    "add_rms_norm": "(rms_norm(s := x + residual, shape, weight, eps), s)",
    "adaptive_layer_norm": (
        "layer_norm(x, shape, None, None, eps) * (1 + scale[:, None]) + shift[:, None]"
    ),
    "parallel_layer_norm": (
        "(layer_norm(x, shape, weight, bias, eps), layer_norm(x, shape, weight2, bias2, eps))"
    ),
    "segment_layer_norm": "segment_layer_norm(x, batch, sizes, weight, bias, eps)",
    "segment_rms_norm": "segment_rms_norm(x, batch, sizes, weight, eps)",
    "moments": "var_mean(x, -1, correction=0)[::-1]",
    "batch_norm": "batch_norm(x, running_mean, running_var, weight, bias, False, 0.1, eps)",
    "batch_norm_backward": (
        "backward(dy, x, weight, running_mean, running_var, None, None, False, eps, mask)"
    ),
    "batch_norm_training": "batch_norm(x, running_mean, running_var, weight, bias, True, 0.1, eps)",
    "batch_norm_training_backward": (
        "backward(dy, x, weight, running_mean, running_var, mean, rstd, True, eps, mask)"
    ),
    "group_norm": "group_norm(x, groups, weight, bias, eps)",
    "group_norm_backward": "backward(dy, x, mean, rstd, weight, *counts, groups, mask)",
    "instance_norm": "instance_norm(x, None, None, weight, bias, True, 0.1, eps)",
    "adaptive_instance_norm": "adaptive_instance_norm(x, style, eps)",
}
# Without a call of their own: autograd, of the graph of the forward line above, which is kept.
TORCH_AUTOGRAD = {
    "rms_norm_backward": ("rms_norm", "x", "weight"),
    "add_rms_norm_backward": ("rms_norm", "x", "weight"),
    "adaptive_layer_norm_backward": ("adaptive_layer_norm", "x", "scale", "shift"),
    "segment_layer_norm_backward": ("segment_layer_norm", "x", "weight", "bias"),
    "segment_rms_norm_backward": ("segment_rms_norm", "x", "weight"),
    "instance_norm_backward": ("instance_norm", "x", "weight", "bias"),
}


def _torch(case: Case, threads: int) -> Iterator[Contender]:
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    if on_channels.is_refused(case):
        return
    # No "out": torch's generated out= variant of native_layer_norm copies a new result.
    own, changed = on_channels.own_running(case)
    names = _torch_names(case)
    names |= {name: tensor(array) for name, array in own.items()}
    if case.op not in TORCH_AUTOGRAD:
        yield Contender("torch", "new", TORCH[case.op], names, changed=changed)
        return
    forward, *inputs = TORCH_AUTOGRAD[case.op]
    names |= {name: names[name].requires_grad_() for name in inputs}
    with torch.enable_grad():
        names |= {"y": eval(TORCH[forward], dict(names)), "grad": torch.autograd.grad}
    call = f"grad(y, ({', '.join(inputs)}), dy, retain_graph=True)"
    if "dsum" in names:
        call = f"((g := {call})[0] + dsum, g[1])"
    yield Contender("torch", "new", call, names)


def _torch_names(case: Case) -> dict[str, Any]:
    import torch

    names = {
        name: tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in case.arrays.items()
    }
    names |= {
        "shape": (case.shape[1],),
        "mask": [True, True, True],
        "var_mean": torch.var_mean,
        "layer_norm": torch.nn.functional.layer_norm,
        "rms_norm": torch.nn.functional.rms_norm,
        "backward": torch.ops.aten.native_layer_norm_backward.default,
        "segment_layer_norm": _torch_segment_layer_norm,
        "segment_rms_norm": _torch_segment_rms_norm,
    }
    if case.op in CHANNELS:
        names |= on_channels.torch_names(case, names["x"])
    elif "offsets" in names:
        lengths = names["offsets"].diff()
        names["batch"] = torch.repeat_interleave(lengths)
        names["sizes"] = (lengths * case.shape[1]).to(names["x"].dtype)[:, None]
    elif case.op in ("layer_norm_backward", "add_layer_norm_backward"):
        arguments = names["x"], names["shape"], names["weight"], names["bias"], case.eps
        _, names["mean"], names["rstd"] = torch.native_layer_norm(*arguments)
    return names


# PyTorch Geometric's LayerNorm(mode="graph"), its scatter being index_add.


def _torch_segment_layer_norm(
    x: Any, batch: Any, sizes: Any, weight: Any, bias: Any, eps: float
) -> Any:
    x = x - _torch_segment_means(x, batch, sizes)[batch]
    return x / (_torch_segment_means(x * x, batch, sizes) + eps).sqrt()[batch] * weight + bias


def _torch_segment_rms_norm(x: Any, batch: Any, sizes: Any, weight: Any, eps: float) -> Any:
    return x / (_torch_segment_means(x * x, batch, sizes) + eps).sqrt()[batch] * weight


def _torch_segment_means(values: Any, batch: Any, sizes: Any) -> Any:
    sums = values.new_zeros(len(sizes), values.shape[1]).index_add_(0, batch, values)
    return sums.sum(-1, keepdim=True) / sizes


def tensor(array: Array) -> Any:
    """The same memory as a torch.Tensor; torch takes NumPy's bfloat16 for an unknown type."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _ndarray(value: Any) -> Array:
    """What `tensor` took, or anything else that is an array."""
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        value = value.float()
    return np.asarray(value)


# ---- ONNX Runtime -------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnnxNode:
    """A node of one op, with what goes in and out of it: x, y and names of arrays of the case."""

    op: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    outputs: tuple[str, ...] = ("y",)
    domain: str = ""
    dtypes: tuple[str, ...] = ("float32", "float64")
    attributes: tuple[str, ...] = ("epsilon",)


# The second and third outputs of the Skip nodes are for training, and empty.
ONNX = {
    "layer_norm": OnnxNode(
        "LayerNormalization", ("x",), ("weight", "bias"), attributes=("epsilon", "axis")
    ),
    "rms_norm": OnnxNode(
        "SimplifiedLayerNormalization", ("x",), ("weight",), attributes=("epsilon", "axis")
    ),
    "add_layer_norm": OnnxNode(
        "SkipLayerNormalization",
        ("x", "residual"),
        ("weight", "bias"),
        ("y", "", "", "total"),
        "com.microsoft",
        ("float32",),
    ),
    "add_rms_norm": OnnxNode(
        "SkipSimplifiedLayerNormalization",
        ("x", "residual"),
        ("weight",),
        ("y", "", "", "total"),
        "com.microsoft",
        ("float32",),
    ),
    "batch_norm": OnnxNode(
        "BatchNormalization", ("x",), ("weight", "bias", "running_mean", "running_var")
    ),
    "group_norm": OnnxNode(
        "GroupNormalization",
        ("x",),
        ("weight", "bias"),
        attributes=("epsilon", "num_groups"),
    ),
    "instance_norm": OnnxNode(
        "InstanceNormalization", ("x",), ("weight", "bias"), dtypes=("float32",)
    ),
}


def _onnxruntime(case: Case, threads: int) -> Iterator[Contender]:
    node = ONNX.get(case.op)
    if node is None or case.dtype.name not in node.dtypes:
        return
    if case.op == "instance_norm" and len(case.shape) < 3:
        return  # it wants a plane
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        _onnx_model(case), options, providers=["CPUExecutionProvider"]
    )
    arrays = case.arrays
    feeds = {name: arrays[name] for name in node.inputs}
    names = {"session": session, "feeds": feeds}
    yield Contender("onnxruntime", "new", "session.run(None, feeds)", names)
    binding = session.io_binding()
    into = {name: arrays[name] for name in node.outputs if name}
    for bind, bound in ((binding.bind_input, feeds), (binding.bind_output, into)):
        for name, array in bound.items():
            bind(name, "cpu", 0, case.dtype.type, case.shape, array.ctypes.data)
    names = {"run": session.run_with_iobinding, "binding": binding, "keep": (feeds, into)}
    yield Contender("onnxruntime", "out", "run(binding)", names, tuple(into.values()))


def _onnx_model(case: Case) -> bytes:
    import onnx

    arrays, node = case.arrays, ONNX[case.op]
    values = {"epsilon": case.eps, "axis": -1, "num_groups": arrays.get("groups")}
    attributes = {name: values[name] for name in node.attributes}
    element = onnx.helper.np_dtype_to_tensor_dtype(case.dtype)
    ins, outs = (
        [onnx.helper.make_tensor_value_info(name, element, case.shape) for name in which if name]
        for which in (node.inputs, node.outputs)
    )
    made = onnx.helper.make_node(
        node.op,
        [*node.inputs, *node.parameters],
        [*node.outputs],
        domain=node.domain,
        **attributes,
    )
    parameters = [onnx.numpy_helper.from_array(arrays[name], name) for name in node.parameters]
    graph = onnx.helper.make_graph([made], case.op, ins, outs, parameters)
    # GroupNormalization has had a pair of parameters a channel since 21.
    version = 21 if case.op == "group_norm" else 17
    opsets = [onnx.helper.make_opsetid("", version), onnx.helper.make_opsetid("com.microsoft", 1)]
    model: bytes = onnx.helper.make_model(
        graph, opset_imports=opsets, ir_version=10 if version == 21 else 8
    ).SerializeToString()
    return model


# ---- Numba, a copy ------------------------------------------------------------------------------


def _numba(case: Case, threads: int) -> Iterator[Contender]:
    if case.op != "layer_norm" or case.dtype.itemsize == 2:
        return
    import numba

    numba.set_num_threads(threads)
    for provider, fastmath in (("numba", False), ("numba fastmath", True)):
        compiled = _numba_layer_norm(fastmath=fastmath, parallel=threads > 1)
        names = case.arrays | {"layer_norm": compiled}
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


# ---- all of them --------------------------------------------------------------------------------


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
