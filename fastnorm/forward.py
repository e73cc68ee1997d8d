"""Forward calls: a norm with all that may be fused with it, and moments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import _core, checks, interop
from .call import Call, as_output, eps_of


class Pair(NamedTuple):
    """A weight and a bias, the array that their result goes to, and what errors call them."""

    weight: Any
    bias: Any
    out: Any
    names: tuple[str, str, str] = ("weight", "bias", "out")

    def as_bits(self) -> Pair:
        """The parameters as bfloat16, where they are uint16."""
        weight, bias = interop.as_bits(self.weight), interop.as_bits(self.bias)
        return self._replace(weight=weight, bias=bias)


class Output(NamedTuple):
    """One result and its checked parameters; `given` is y as the caller knows it."""

    weight: np.ndarray | None
    bias: np.ndarray | None
    y: np.ndarray
    scale: np.ndarray | None
    given: np.ndarray


class NormCall(Call):
    """One forward call of a norm, with all that may be fused with it.

    The result is y, or a tuple of what was asked for: y, its scale, the sum, mean, rstd.
    """

    def __init__(
        self,
        x: Any,
        normalized_shape: Any,
        axis: Any,
        pairs: Sequence[Pair],
        eps: Any,
        *,
        rms: bool = False,
        dtype: Any = None,
        return_stats: Any = False,
        activation: Any = None,
        lengths: Any = None,
        mask: Any = None,
        offset: Any = 0.0,
        round_before_weight: Any = False,
        addends: dict[str, Any] | None = None,
        sum_out: Any = None,
        round_sum: Any = True,
        several: bool = False,
        per_sample: bool = False,
        explained: bool = False,
    ) -> None:
        adds = addends or {}
        if interop.asks_for_bits(x, dtype):
            x, dtype = interop.as_bits(x), None
            adds = {name: interop.as_bits(value) for name, value in adds.items()}
            pairs = [pair.as_bits() for pair in pairs]
        residual, given_sum = adds.get("residual"), sum_out
        others = [] if residual is None else [checks.as_floating("residual", residual)]
        super().__init__(x, normalized_shape, axis, explained, others, per_sample=per_sample)
        self.y_type = self.dtype if dtype is None else checks.as_result_type(dtype)
        self.options = {
            "rms": rms,
            "offset": checks.as_offset(offset),
            "round_before_weight": bool(round_before_weight),
            "activation": checks.as_activation(activation),
            **self.valid(lengths, mask),
        }
        self.options["eps"] = eps_of(eps, rms, self.compute)
        params = [
            (self.parameter(p.names[0], p.weight), self.parameter(p.names[1], p.bias))
            for p in pairs
        ]
        params = [(self.with_offset(w), b) for w, b in params]
        self.warm = True
        if residual is not None:
            sum_out = self.add_addends(adds, residual, sum_out, round_sum)
        outputs = [self.output(pair, w, b) for pair, (w, b) in zip(pairs, params, strict=True)]
        if given_sum is not None or any(pair.out is not None for pair in pairs):
            inputs = {"x": x, **adds, "mask": mask, "lengths": lengths}
            self.check_apart(inputs, pairs, outputs, None if given_sum is None else sum_out)
        mean, rstd = self.statistics() if return_stats else (None, None)
        x_rows = self.rows("x", self.source)
        self.kernel = partial(
            _core.norm_rows, len(self.lead), self.compute, x_rows, self.kernel_outputs(outputs),
            mean=None if rms else mean, rstd=rstd, warm=self.warm, **self.options,
        )  # fmt: skip
        self.result = self.gather(outputs, several, mean, rstd, rms)

    def add_addends(
        self, adds: dict[str, Any], residual: Any, sum_out: Any, round_sum: Any
    ) -> np.ndarray:
        """linear_bias, gate and residual, and where the sum goes, which is returned."""
        array = self.like_x("residual", residual)
        for name in ("linear_bias", "gate"):
            self.options[name] = self.parameter(name, adds.get(name))
        kind = checks.wider(self.dtype, array.dtype)
        self.total: np.ndarray = self.new_output(kind) if sum_out is None else sum_out
        total = self.total
        if sum_out is not None:
            total = as_output(sum_out, kind)
            checks.check_out("sum_out", total, self.source.shape, kind)
        self.options |= {
            "residual": self.rows("residual", array),
            "total": self.rows("sum_out", total, is_output=True),
            "round_sum": bool(round_sum),
        }
        return total

    def new_output(self, dtype: np.dtype) -> np.ndarray:
        """An array for one of the results; the call is warm where all of them are."""
        array, warm = self.new_result(dtype)
        self.warm = self.warm and warm
        return array

    def output(self, pair: Pair, weight: np.ndarray | None, bias: np.ndarray | None) -> Output:
        given = self.new_output(self.y_type) if pair.out is None else pair.out
        y = given
        if pair.out is not None:
            y = as_output(y, self.y_type)
            checks.check_out(pair.names[2], y, self.source.shape, self.y_type)
        return Output(weight, bias, y, self.scales(self.y_type), given)

    def check_apart(
        self,
        inputs: dict[str, Any],
        pairs: Sequence[Pair],
        outputs: Sequence[Output],
        sum_out: Any,
    ) -> None:
        """Results that were given places must not share memory with inputs or each other."""
        for pair in pairs:
            inputs |= {pair.names[0]: pair.weight, pair.names[1]: pair.bias}
        seen: dict[str, Any] = {}
        if sum_out is not None:
            checks.check_apart("sum_out", sum_out, inputs, ("x", "residual"))
            seen["sum_out"] = sum_out
        # With several results, one row of x is read for all of them.
        allowed = ("x",) if len(pairs) == 1 else ()
        for pair, output in zip(pairs, outputs, strict=True):
            if pair.out is not None:
                checks.check_apart(pair.names[2], output.y, inputs, allowed)
                checks.check_apart(pair.names[2], output.y, seen, ())
                seen[pair.names[2]] = output.y

    def kernel_outputs(self, outputs: Sequence[Output]) -> list[Any]:
        made = []
        for weight, bias, y, scale, _ in outputs:
            rows = self.rows("out", y, is_output=True)
            self.warm = self.warm and not self.outputs[-1].copied
            made.append((weight, bias, rows, scale))
        return made

    def gather(
        self, outputs: Sequence[Output], several: bool, mean: Any, rstd: Any, rms: bool
    ) -> Any:
        """What the caller gets."""
        first = outputs[0]
        parts: list[Any] = [tuple([o.given for o in outputs]) if several else first.given]
        if first.scale is not None:
            parts.append(tuple([o.scale for o in outputs]) if several else first.scale)
        if "total" in self.options:
            parts.append(self.total)
        if rstd is not None:
            parts += [rstd] if rms else [mean, rstd]
        return parts[0] if len(parts) == 1 else tuple(parts)


class MomentsCall(Call):
    """One call of moments."""

    def __init__(self, x: Any, axis: Any = None, explained: bool = False) -> None:
        super().__init__(x, None, axis, explained)
        self.result = self.statistics()
        self.kernel = partial(
            _core.moments_rows, len(self.lead), self.compute, self.rows("x", self.source),
            *self.result,
        )  # fmt: skip
