"""Modules: parameters, forward and backward, state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from . import _core, checks
from .memory import empty


class LayerNorm(_core.BoundLayerNorm):
    """Layer normalization over a trailing shape, with its parameters.

    Calls are stateless: nothing of a call stays on the object, and any number of threads may call
    it at once. Its call is the shortest way to the kernel.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Trailing shape of the input to normalize over.
    eps : float
        Added to the variance; not negative.
    elementwise_affine : bool
        Whether there is a weight, at first of ones, and with `bias` a bias, at first of zeros.
    bias : bool
        Whether there is a bias; without a weight there is none.
    dtype : float32 or float64
        Type of the parameters. Inputs may be of either type.

    Attributes
    ----------
    weight, bias : ndarray or None
        Of shape `normalized_shape`, `dtype`, 64-byte aligned. They may be assigned to (what is
        assigned is converted) and changed in place: both take effect at the next call.

    Raises
    ------
    TypeError, ValueError
        As fastnorm.layer_norm.

    References
    ----------
    Ba, Kiros, Hinton: Layer Normalization, arXiv 1607.06450 (2016). Names and state dict follow
    torch.nn.LayerNorm.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> norm = fastnorm.LayerNorm(4)
    >>> norm(np.ones((2, 4), np.float32))
    array([[0., 0., 0., 0.],
           [0., 0., 0., 0.]], dtype=float32)
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: Any = np.float32,
    ) -> None:
        shape = checks.as_shape("normalized_shape", normalized_shape)
        if not shape:
            raise ValueError("normalized_shape: got (), wanted at least one length")
        kind = np.dtype(dtype)
        if kind not in checks.COMPUTED:
            raise TypeError(f"dtype: got {kind}, wanted float32 or float64")
        super().__init__(shape, checks.as_eps(eps), kind)
        if elementwise_affine:
            self.weight = np.ones(shape, kind)
            if bias:
                self.bias = np.zeros(shape, kind)

    # ---- parameters -----------------------------------------------------------------------------

    @property
    def eps(self) -> float:
        """Added to the variance."""
        return self._get("eps")

    @eps.setter
    def eps(self, value: float) -> None:
        self._set("eps", checks.as_eps(value))

    @property
    def weight(self) -> np.ndarray | None:
        """Gain, or None for ones."""
        return self._get("weight")

    @weight.setter
    def weight(self, value: Any) -> None:
        self._set("weight", self._parameter("weight", value))

    @property
    def bias(self) -> np.ndarray | None:
        """Offset, or None for zeros."""
        return self._get("bias")

    @bias.setter
    def bias(self, value: Any) -> None:
        self._set("bias", self._parameter("bias", value))

    def _parameter(self, name: str, value: Any) -> np.ndarray | None:
        """A copy in aligned memory of its own, so that nobody else's change reaches it."""
        checked = checks.as_parameter(name, value, self.normalized_shape, self.dtype)
        if checked is None:
            return None
        parameter = empty(checked.shape, checked.dtype)
        parameter[...] = checked
        return parameter

    def parameters(self) -> dict[str, np.ndarray]:
        """The parameters there are, by name: the arrays themselves."""
        return _present(self.weight, self.bias)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of the parameters under torch's key names."""
        return {name: array.copy() for name, array in self.parameters().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the parameters from `state_dict`, as torch.nn.LayerNorm saves them.

        Raises
        ------
        KeyError
            If keys are missing or unknown.
        TypeError, ValueError
            If a value does not fit. Nothing has been changed then.
        """
        wanted, got = set(self.parameters()), set(state_dict)
        if wanted != got:
            raise KeyError(f"state_dict: got keys {sorted(got)}, wanted {sorted(wanted)}")
        for name, array in {n: self._parameter(n, state_dict[n]) for n in wanted}.items():
            self._set(name, array)

    # ---- forward and backward -------------------------------------------------------------------

    def forward(self, x: Any) -> tuple[np.ndarray, tuple[Any, ...]]:
        """y, and what `backward` needs to go back from it.

        `saved` refers to x itself: do not change x in between.
        """
        y, mean, rstd = _core.layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps, return_stats=True
        )
        return y, (x, mean, rstd)

    def backward(self, dy: Any, saved: tuple[Any, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """dx, and the parameters' gradients by name, from the output's gradient `dy`."""
        x, mean, rstd = saved
        wanted = (True, self.weight is not None, self.bias is not None)
        dx, dweight, dbias = _core.layer_norm_backward(
            dy, x, self.normalized_shape, mean, rstd, self.weight, self.bias, output_mask=wanted
        )
        assert dx is not None  # it was asked for
        return dx, _present(dweight, dbias)

    # ---- copying and comparing ------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        settings = (self.normalized_shape, self.eps, self.dtype.str, self.weight, self.bias)
        return _rebuild, (type(self), *settings), self.__dict__ or None

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        """Give back what a subclass, or its user, has added."""
        self.__dict__.update(attributes)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, LayerNorm)
        same = (self.normalized_shape, self.eps, self.dtype) == (
            other.normalized_shape, other.eps, other.dtype,
        )  # fmt: skip
        return same and _same(self.weight, other.weight) and _same(self.bias, other.bias)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.weight is not None}, bias={self.bias is not None}, "
            f"dtype={self.dtype.name})"
        )


def _present(weight: np.ndarray | None, bias: np.ndarray | None) -> dict[str, np.ndarray]:
    """By name, what is not None."""
    named = {"weight": weight, "bias": bias}
    return {name: array for name, array in named.items() if array is not None}


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _rebuild(
    cls: type[LayerNorm], normalized_shape: tuple[int, ...], eps: float, dtype: str,
    weight: np.ndarray | None, bias: np.ndarray | None,
) -> LayerNorm:  # fmt: skip
    """Undo LayerNorm.__reduce__; a subclass's constructor may take other arguments."""
    module = cls.__new__(cls)
    LayerNorm.__init__(module, normalized_shape, eps, False, dtype=dtype)
    module.weight, module.bias = weight, bias
    return module
