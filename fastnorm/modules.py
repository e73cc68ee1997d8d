"""Modules: parameters, forward and backward, state dicts."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import numpy as np

from . import _core, checks
from .module_state import (
    COPIES,
    State,
    as_dtype,
    gradients,
    own_copy,
    present,
    shape_of,
    unpacked,
)


class _Norm(State, _core.BoundNorm):
    """What these modules share: a shape, eps and parameters, which BoundNorm holds, and their
    copies. The call is BoundNorm's too, where a module has none of its own."""

    #: The op that a call is.
    _op: ClassVar[str]
    #: The parameters there may be; _core holds them.
    _names: ClassVar[tuple[str, ...]] = ("weight",)
    #: What else a constructor sets, by the name that _core has for it.
    _flags: ClassVar[tuple[str, ...]] = ()

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
        self._set("weight", self._checked("weight", value))

    def parameters(self) -> dict[str, np.ndarray]:
        """The parameters there are, by name: the arrays themselves."""
        return present({name: self._get(name) for name in self._names})

    def _checked(self, name: str, value: Any) -> np.ndarray | None:
        return own_copy(name, value, self.normalized_shape, self.dtype)

    def _keep(self, checked: dict[str, Any]) -> None:
        for name, array in checked.items():
            self._set(name, array)

    # ---- calls ----------------------------------------------------------------------------------

    def _as_op(self, x: Any, out: Any = None) -> tuple[str, dict[str, Any]]:
        self._check_input(x)
        shape, axis = self._where()
        named = {name: self._get(name) for name in ("eps", *self._flags)}
        named |= {name: self._beside(name, x) for name in self._names}
        return self._op, {"x": x, "normalized_shape": shape, "axis": axis, **named, "out": out}

    def _check_input(self, x: Any) -> None:
        """Raise where x does not fit and the op would not see that."""

    def _where(self) -> tuple[Any, int | None]:
        """The axes to normalize over, as the ops are told: normalized_shape and axis."""
        return self.normalized_shape, None

    def _beside(self, name: str, x: Any) -> Any:
        """A parameter where x is; BoundNorm asks as well."""
        array = self._get(name)
        return array if type(x) is np.ndarray else self._brought(name, array, x)

    # ---- copying --------------------------------------------------------------------------------

    def _settings(self) -> tuple[Any, ...]:
        flags = {name: self._get(name) for name in self._flags}
        return self.normalized_shape, self.eps, self.dtype, flags

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (type(self), *self._settings(), self.parameters())
        own = {name: value for name, value in self.__dict__.items() if name != COPIES}
        return _rebuild, arguments, own or None

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        """Give back what a subclass, or its user, has added."""
        self.__dict__.update(attributes)

    def __repr__(self) -> str:
        shown = {"eps": self.eps, "elementwise_affine": self.weight is not None}
        if "bias" in self._names:
            shown["bias"] = self._get("bias") is not None
        shown |= {name: self._get(name) for name in self._flags}
        words = "".join(f", {name}={value}" for name, value in shown.items())
        return f"{type(self).__name__}({self._repr_shape()}{words}, dtype={self.dtype.name})"

    def _repr_shape(self) -> Any:
        return self.normalized_shape


class LayerNorm(_Norm):
    """Layer normalization over a trailing shape, with its parameters.

    Calls are stateless: nothing of a call stays on the object, and any number of threads may call
    it at once. ``norm(x, out=None)`` is the shortest way to the kernel; `out` is an array for the
    result, as fastnorm.layer_norm has it.

    Where x is in CUDA memory (torch, CuPy, Numba), the parameters are copied to its device at the
    first call there, and the copies kept. What is assigned, or changed in place, takes effect at
    the next call all the same: each call compares the parameters with what was copied, and copies
    them again where they differ. Gradients come back on the device; `saved` holds what is there.

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
    dtype : float16, bfloat16, float32 or float64
        Type of the parameters (bfloat16 where ml_dtypes is installed). Inputs may be of any of
        them, and results are of the input's type. Parameters of a half type are converted at each
        call; float32 ones spare a call on a single row that, whatever the input's type.

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

    _op = "layer_norm"
    _names = ("weight", "bias")

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(_as_shape(normalized_shape), checks.as_eps(eps), as_dtype(dtype))
        if elementwise_affine:
            self.weight = np.ones(self.normalized_shape)
            if bias:
                self.bias = np.zeros(self.normalized_shape)

    @property
    def bias(self) -> np.ndarray | None:
        """Offset, or None for zeros."""
        return self._get("bias")

    @bias.setter
    def bias(self, value: Any) -> None:
        self._set("bias", self._checked("bias", value))

    def forward(self, x: Any) -> tuple[np.ndarray, tuple[Any, ...]]:
        """y, and what `backward` needs to go back from it.

        `saved` refers to x itself: do not change x in between.
        """
        self._check_input(x)
        shape, axis = self._where()
        y, mean, rstd = _core.layer_norm(
            x, shape, self._beside("weight", x), self._beside("bias", x), self.eps, axis=axis,
            return_stats=True,
        )  # fmt: skip
        return y, (x, mean, rstd)

    def backward(self, dy: Any, saved: tuple[Any, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """dx, and the parameters' gradients by name, from the output's gradient `dy`.

        dx is of the input's type, the parameters' gradients are float32 (float64 for float64
        input).
        """
        x, mean, rstd = unpacked(saved, 3)
        weight, bias = self._beside("weight", x), self._beside("bias", x)
        shape, axis = self._where()
        return gradients(
            *_core.layer_norm_backward(
                dy, x, shape, mean, rstd, weight, bias, axis=axis,
                output_mask=(True, weight is not None, bias is not None),
            )
        )  # fmt: skip


class LayerNorm2d(LayerNorm):
    """Layer normalization over the channels of (N, C, H, W), at each pixel by itself.

    The array is read in place. Axes after the channels may be any number, so (N, C), (N, C, L) and
    (N, C, D, H, W) are taken too. ``norm(x, out=None)`` and all else is as :class:`LayerNorm` has
    it.

    Parameters
    ----------
    num_channels : int
        C, the length of the input's axis 1.
    eps, elementwise_affine, bias, dtype
        As for :class:`LayerNorm`; eps is 1e-6 where it is left out, as in ConvNeXt.

    Attributes
    ----------
    weight, bias : ndarray or None
        Of shape (C,), else as :class:`LayerNorm` has them.

    Raises
    ------
    TypeError, ValueError
        As fastnorm.layer_norm.

    References
    ----------
    Liu et al.: A ConvNet for the 2020s, arXiv 2201.03545 (2022), channels first.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> norm = fastnorm.LayerNorm2d(3)
    >>> norm(np.ones((1, 3, 2, 2), np.float32)).shape
    (1, 3, 2, 2)
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: Any = np.float32,
    ) -> None:
        channels = checks.as_count("num_channels", num_channels, 0, "an integer")
        super().__init__(
            _as_shape(channels, "num_channels"), eps, elementwise_affine, bias, dtype=dtype
        )

    def __call__(self, x: Any, out: np.ndarray | None = None) -> np.ndarray:
        """Normalize x over its axis 1; see fastnorm.layer_norm."""
        self._check_input(x)
        return _core.layer_norm(
            x, None, self._beside("weight", x), self._beside("bias", x), self.eps, axis=1, out=out
        )

    def _where(self) -> tuple[Any, int | None]:
        return None, 1

    def _check_input(self, x: Any) -> None:
        shape = shape_of(x)
        if shape[1:2] != self.normalized_shape:
            channels = self.normalized_shape[0]
            raise ValueError(f"x: got shape {shape}, wanted (N, {channels}, ...)")

    def _repr_shape(self) -> int:
        return self.normalized_shape[0]


class RMSNorm(_Norm):
    """Root mean square normalization over a trailing shape, with its weight.

    Calls, ``norm(x, out=None)``, are stateless, as those of :class:`LayerNorm` are, and as direct.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Trailing shape of the input to normalize over.
    eps : float, optional
        As for :func:`fastnorm.rms_norm`: None is the machine epsilon.
    elementwise_affine : bool
        Whether there is a weight. It begins as ``1 - offset``, so that the factor is 1.
    offset : float
        Added to the weight where it is used. 1 takes Gemma's checkpoints, which hold the factor
        less 1; the weight then begins as zeros.
    round_before_weight : bool
        As for :func:`fastnorm.rms_norm`.
    dtype : float16, bfloat16, float32 or float64
        Type of the weight, as for :class:`LayerNorm`.

    Attributes
    ----------
    weight : ndarray or None
        As :class:`LayerNorm` has it.

    Raises
    ------
    TypeError, ValueError
        As fastnorm.rms_norm.

    References
    ----------
    Zhang, Sennrich: Root Mean Square Layer Normalization, arXiv 1910.07467 (2019). Names and state
    dict follow torch.nn.RMSNorm.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> norm = fastnorm.RMSNorm(2)
    >>> norm(np.float32([[1, 7]]))
    array([[0.2, 1.4]], dtype=float32)
    """

    _op = "rms_norm"
    _flags = ("offset", "round_before_weight")

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        offset: float = 0.0,
        round_before_weight: bool = False,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(
            _as_shape(normalized_shape), None if eps is None else checks.as_eps(eps),
            as_dtype(dtype), rms=True, offset=checks.as_offset(offset),
            round_before_weight=bool(round_before_weight),
        )  # fmt: skip
        if elementwise_affine:
            self.weight = np.full(self.normalized_shape, 1 - self.offset)

    @property
    def eps(self) -> Any:
        """Added to the mean square, or None for the machine epsilon."""
        return self._get("eps")

    @eps.setter
    def eps(self, value: float | None) -> None:
        self._set("eps", None if value is None else checks.as_eps(value))

    @property
    def offset(self) -> float:
        """Added to the weight where it is used."""
        return self._get("offset")

    @property
    def round_before_weight(self) -> bool:
        """Whether the normalised value is rounded before it meets the weight."""
        return self._get("round_before_weight")

    def forward(self, x: Any) -> tuple[np.ndarray, tuple[Any, ...]]:
        """y, and what `backward` needs to go back from it.

        `saved` refers to x itself: do not change x in between.
        """
        y, rstd = _core.rms_norm(
            x, self.normalized_shape, self._beside("weight", x), self.eps, offset=self.offset,
            round_before_weight=self.round_before_weight, return_stats=True,
        )  # fmt: skip
        return y, (x, rstd)

    def backward(self, dy: Any, saved: tuple[Any, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """dx, and the weight's gradient by name, from the output's gradient `dy`.

        dx is of the input's type, the weight's gradient is float32 (float64 for float64 input).
        """
        x, rstd = unpacked(saved, 2)
        weight = self._beside("weight", x)
        return gradients(
            *_core.rms_norm_backward(
                dy, x, self.normalized_shape, rstd, weight, offset=self.offset,
                output_mask=(True, weight is not None),
            )
        )  # fmt: skip


def _as_shape(value: Any, name: str = "normalized_shape") -> tuple[int, ...]:
    shape = checks.as_shape(name, value)
    if not shape:
        raise ValueError(f"{name}: got (), wanted at least one length")
    if max(shape) > sys.maxsize:
        raise ValueError(f"{name}: got {value!r}, wanted lengths of at most {sys.maxsize}")
    return shape


def _rebuild(
    cls: type[_Norm], normalized_shape: tuple[int, ...], eps: float | None, dtype: np.dtype,
    flags: dict[str, Any], parameters: dict[str, np.ndarray],
) -> _Norm:  # fmt: skip
    """Undo __reduce__; a subclass's constructor may take other arguments."""
    module = cls.__new__(cls)
    rms = {"rms": True} if issubclass(cls, RMSNorm) else {}
    _core.BoundNorm.__init__(module, normalized_shape, eps, dtype, **rms, **flags)
    for name, array in parameters.items():
        module._set(name, module._checked(name, array))
    return module
