"""The network of ``python -m fastnorm demo``, and the checks of what is normalised in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import fastnorm
from fastnorm import accuracy, reference, reference_channels

Array = NDArray[Any]

WIDTHS = (64, 128, 128, 10)
# What is called, by the names of `fastnorm.cases`; batch_norm is inference.
OPS = (
    "layer_norm",
    "layer_norm_backward",
    "batch_norm_training",
    "batch_norm_training_backward",
    "batch_norm",
)
# How many numbers of calls are kept until they are checked.
KEPT = 1 << 17
LAYERS: dict[str, Any] = {"layer": fastnorm.LayerNorm, "batch": fastnorm.BatchNorm}


# ---- norms, checked -----------------------------------------------------------------------------


@dataclass
class Checks:
    """The largest error so far of each of OPS, in the units of `fastnorm.accuracy`."""

    errors: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(error <= accuracy.bound(np.float32) for error in self.errors.values())

    def add(self, op: str, error: float, count: int = 1) -> None:
        self.errors[op] = max(self.errors.get(op, 0.0), error)
        self.counts[op] = self.counts.get(op, 0) + count


class Forward(NamedTuple):
    """A call in training mode: two of shape (batch, width), two of shape (width,)."""

    x: Array
    y: Array
    weight: Array
    bias: Array


class Backward(NamedTuple):
    x: Array
    weight: Array
    dy: Array
    dx: Array
    dweight: Array
    dbias: Array


@dataclass
class CheckedNorm:
    """A module of fastnorm, each of whose calls is compared with the float64 reference.

    The calls in training mode are kept, and compared many at a time: that is much quicker. Where
    `checks` is None, nothing is compared.
    """

    layer: Any
    checks: Checks | None
    is_batch_norm: bool
    forwards: list[Forward] = field(default_factory=list)
    backwards: list[Backward] = field(default_factory=list)

    def forward(self, x: Array) -> tuple[Array, Any]:
        """In training mode; the batch must not change before it has been checked."""
        y, saved = self.layer.forward(x)
        self._keep(x, y)
        return y, (x, saved)

    def backward(self, dy: Array, saved: Any) -> tuple[Array, dict[str, Array]]:
        x, saved = saved
        dx, grads = self.layer.backward(dy, saved)
        if self.checks:
            weight = self.layer.weight.copy()
            kept = Backward(x, weight, dy, dx, grads["weight"], grads["bias"])
            self.backwards.append(kept)
            if len(self.backwards) * x.size >= KEPT:
                self.check()
        return dx, grads

    def by_batch(self, x: Array) -> Array:
        """y in training mode, of a batch that nothing is to be learned from."""
        layer = self.layer
        if not self.is_batch_norm:
            y: Array = layer(x)
        else:
            given = layer.weight, layer.bias
            y = fastnorm.batch_norm(x, None, None, *given, training=True, eps=layer.eps)
        self._keep(x, y)
        return y

    def in_inference(self, x: Array) -> Array:
        """y of any number of images."""
        layer = self.layer
        if not self.is_batch_norm:
            return self.by_batch(x)
        y: Array = layer.eval()(x)
        layer.train()
        if self.checks:
            running = layer.running_mean, layer.running_var
            xh = reference_channels.batch_norm(x, *running, eps=layer.eps)
            columns = layer.weight[:, None], layer.bias[:, None]
            self.checks.add("batch_norm", accuracy.affine_error(y.T, xh.T, *columns))
        return y

    # Many batches of one size, (count, batch, width), are normalised over one of their axes.

    def _keep(self, x: Array, y: Array) -> None:
        if self.checks:
            self.forwards.append(Forward(x, y, self.layer.weight.copy(), self.layer.bias.copy()))
            if len(self.forwards) * x.size >= KEPT:
                self.check()

    def check(self) -> None:
        """What is kept and has not been checked yet."""
        if self.checks:
            self._check_forwards(self.checks)
            self._check_backwards(self.checks)

    @property
    def _op(self) -> str:
        return "batch_norm_training" if self.is_batch_norm else "layer_norm"

    @property
    def _axis(self) -> int:
        return 1 if self.is_batch_norm else 2

    def _rows(self, a: Array) -> Array:
        """What is normalised together, last."""
        return np.moveaxis(a, self._axis, -1)

    def _check_forwards(self, checks: Checks) -> None:
        for calls in _stacked(self.forwards):
            made = Forward(*calls)
            xh = reference.layer_norm(made.x, eps=self.layer.eps, axis=self._axis)
            parameters = (np.broadcast_to(p[:, None], xh.shape) for p in (made.weight, made.bias))
            error = accuracy.affine_error(*map(self._rows, (made.y, xh, *parameters)))
            checks.add(self._op, error, len(xh))
        self.forwards.clear()

    def _check_backwards(self, checks: Checks) -> None:
        for calls in _stacked(self.backwards):
            made = Backward(*calls)
            axis = self._axis
            xh, mean, rstd = reference.layer_norm(
                made.x, eps=self.layer.eps, axis=axis, return_stats=True
            )
            dy = made.dy.astype(np.float64)
            g = dy * made.weight[:, None]
            exact, *_ = reference.layer_norm_backward(g, made.x, None, mean, rstd, axis=axis)
            dx, exact_dx, g = map(self._rows, (made.dx, exact, g))
            errors = (
                accuracy.gradient_error(dx, exact_dx, rstd, g),
                _sum_error(made.dweight, dy * xh, np.abs(dy) * np.maximum(1, np.abs(xh))),
                _sum_error(made.dbias, dy, np.abs(dy)),
            )
            checks.add(f"{self._op}_backward", max(errors), len(xh))
        self.backwards.clear()


def _stacked(calls: list[Any]) -> Iterator[list[Array]]:
    """Arrays of the calls of each size of batch, stacked."""
    for size in {len(call.x) for call in calls}:
        alike = [call for call in calls if len(call.x) == size]
        yield [np.stack(arrays) for arrays in zip(*alike, strict=True)]


def _sum_error(total: Array, terms: Array, magnitudes: Array) -> float:
    return accuracy.sum_error(total, terms.sum(1), magnitudes.sum(1))


# ---- the network --------------------------------------------------------------------------------


class Network:
    """Dense layers with ReLU between them, and before each ReLU one of LAYERS, or "none"."""

    def __init__(self, norm: str, seed: int, checks: Checks | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.weights = [
            (rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)).astype(np.float32)
            for inputs, outputs in pairwise(WIDTHS)
        ]
        self.biases = [np.zeros(outputs, np.float32) for outputs in WIDTHS[1:]]
        self.norms = []
        if norm != "none":
            layers = [LAYERS[norm](width) for width in WIDTHS[1:-1]]
            self.norms = [CheckedNorm(layer, checks, norm == "batch") for layer in layers]

    def step(self, images: Array, labels: Array, rate: np.float32) -> float:
        """One step down the gradient of the batch's mean cross-entropy, which is returned."""
        x, tape = images, []
        for i in range(len(WIDTHS) - 2):
            z, saved = x @ self.weights[i] + self.biases[i], None
            if self.norms:
                z, saved = self.norms[i].forward(z)
            h = np.maximum(z, 0)
            tape.append((x, saved, h))
            x = h
        loss, d = cross_entropy(x @ self.weights[-1] + self.biases[-1], labels)
        d = self._down(-1, x, d, rate)
        for i in reversed(range(len(tape))):
            x, saved, h = tape[i]
            d = d * (h > 0)
            if self.norms:
                d, grads = self.norms[i].backward(d, saved)
                for name, parameter in self.norms[i].layer.parameters().items():
                    parameter -= rate * grads[name]
            d = self._down(i, x, d, rate)
        return loss

    def _down(self, i: int, x: Array, d: Array, rate: np.float32) -> Array:
        """Changes a dense layer; the gradient of the loss with respect to x."""
        dx = d @ self.weights[i].T
        self.weights[i] -= rate * (x.T @ d)
        self.biases[i] -= rate * d.sum(0)
        return dx

    def logits(self, images: Array, batch_size: int | None = None) -> Array:
        """In inference mode; in training mode where the size of its batches is said."""
        if batch_size is None:
            return self._logits(images, training=False)
        batches = images.reshape(-1, batch_size, images.shape[1])
        return np.concatenate([self._logits(batch, training=True) for batch in batches])

    def _logits(self, x: Array, training: bool) -> Array:
        for i in range(len(WIDTHS) - 2):
            x = x @ self.weights[i] + self.biases[i]
            if self.norms:
                norm = self.norms[i]
                x = norm.by_batch(x) if training else norm.in_inference(x)
            x = np.maximum(x, 0)
        return x @ self.weights[-1] + self.biases[-1]

    def check(self) -> None:
        for norm in self.norms:
            norm.check()


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """The batch's mean loss, and its gradient with respect to the logits."""
    rows = np.arange(len(labels))
    d = np.exp(logits - logits.max(1, keepdims=True))
    d /= d.sum(1, keepdims=True)
    loss = -np.mean(np.log(np.maximum(d[rows, labels], np.finfo(np.float32).tiny)))
    d[rows, labels] -= 1
    return float(loss), d / np.float32(len(labels))
