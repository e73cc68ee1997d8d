"""Modules from parameters that torch, Keras, Flax or ONNX have saved."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from . import checks, dialects, interop
from .dialects import Dialect
from .modules import LayerNorm, RMSNorm
from .modules_channels import BatchNorm, GroupNorm, InstanceNorm

AFFINE = ("weight", "bias")
RUNNING = ("running_mean", "running_var")
COUNTED = "num_batches_tracked"

#: What each dialect calls a parameter, what is usual first.
NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "torch": {
        "weight": ("weight", "gamma"),  # gamma, beta: layer norms of checkpoints from before 2019
        "bias": ("bias", "beta"),
        "running_mean": ("running_mean",),
        "running_var": ("running_var",),
        COUNTED: (COUNTED,),
    },
    "keras": {
        "weight": ("gamma", "scale"),
        "bias": ("beta",),
        "running_mean": ("moving_mean",),
        "running_var": ("moving_variance",),
    },
    "flax": {
        "weight": ("scale",),
        "bias": ("bias",),
        "running_mean": ("mean",),
        "running_var": ("var",),
    },
    # An operator's inputs, as each version of it calls them; exporters keep torch's names.
    "onnx": {
        "weight": ("scale", "Scale", "weight"),
        "bias": ("B", "bias"),
        "running_mean": ("input_mean", "mean", "running_mean"),
        "running_var": ("input_var", "var", "running_var"),
    },
}
# Flax keeps what is trained and what is counted in trees of their own.
COLLECTIONS = {"flax": ("params", "batch_stats")}


class _Found(NamedTuple):
    """A norm's parameters as arrays, by torch's names, and what was asked for with them."""

    arrays: dict[str, np.ndarray]
    rules: Dialect
    dialect: str
    options: dict[str, Any]

    def length(self, option: str, of: tuple[str, ...] = (*AFFINE, *RUNNING)) -> Any:
        """The number of channels: an option of this name, or what the parameters are of."""
        if option in self.options:
            return self.options.pop(option)
        for name in of:
            if name in self.arrays:
                return _length(name, self.arrays[name])
        raise TypeError(
            f"{option}: got nothing, wanted a number, as no parameter says how many there are"
        )


def load_norm(
    kind: str, parameters: Any, *, prefix: str = "", dialect: str = "torch", **options: Any
) -> Any:
    """A module with the parameters that another library has saved.

    Names become torch's: gamma, scale, beta, B, moving_mean, input_var and the rest. What is left
    out of `options` is what the dialect takes by default:

    ==================  =======  =======  =======  =======
    dialect             torch    keras    flax     onnx
    ==================  =======  =======  =======  =======
    eps                 1e-5     1e-3     1e-6     1e-5
    eps of batch_norm   1e-5     1e-3     1e-5     1e-5
    eps of rms_norm     None     1e-6     1e-6     1e-5
    momentum            0.1      0.99     0.99     0.9
    channel_axis        1        -1       -1       1
    ==================  =======  =======  =======  =======

    The module infers as the model did where it was trained: running statistics are taken as they
    are. It goes on training in the way of its `dialect` too, which has a momentum of that sense and
    a variance of that kind. :func:`fastnorm.convert_momentum` and
    :func:`fastnorm.convert_running_var` lead from one dialect to another.

    Parameters
    ----------
    kind : {"layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"}
    parameters : mapping of str to array_like, or path
        A state dict, weights by name, a tree of Flax's variables (mappings in mappings), an ONNX
        node's inputs by their names in the operator's definition. Or the path of a safetensors
        file, of which the norm's own parameters are read and nothing else.
    prefix : str
        Where in `parameters` the norm is: "encoder.layer.0.norm", with "." or "/" between names
        and, if you like, at the end. In Flax the names below "params" and "batch_stats".
    dialect : {"torch", "keras", "flax", "onnx"}
        Whose names and defaults these are.
    **options
        Of the module's constructor: eps, momentum, channel_axis, dtype, and

        - `num_groups` of a group norm, which no parameter says, and `num_channels` where ONNX's
          opset 18 has a scale for each group, which then goes to all channels of the group
        - `offset=1.0` of an RMS norm whose weight is the factor less 1, as Gemma's
        - `normalized_shape`, `num_features` or `num_channels` where there are no parameters

        `dtype`, of the parameters, is float64 where one of them is, else float32.

    Returns
    -------
    LayerNorm, RMSNorm, BatchNorm, GroupNorm or InstanceNorm
        With the weight, the bias and the running statistics that there are, and no others. A
        batch norm is in training, as all new modules are: ``eval()`` ends that.

    Raises
    ------
    KeyError
        If `parameters` has nothing, or something unknown, at `prefix`, or half of a pair.
    ImportError
        If the path of a file is given and safetensors is not installed.
    TypeError, ValueError
        If an option or the shape of a parameter does not fit.

    References
    ----------
    torch.nn, keras.layers, flax.linen, and the operators BatchNormalization, GroupNormalization,
    InstanceNormalization, LayerNormalization and RMSNormalization of ONNX.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> saved = {"stem/bn/gamma": np.ones(3), "stem/bn/beta": np.zeros(3),
    ...          "stem/bn/moving_mean": np.zeros(3), "stem/bn/moving_variance": np.ones(3)}
    >>> norm = fastnorm.load_norm("batch_norm", saved, prefix="stem/bn", dialect="keras")
    >>> norm.eps, norm.momentum, norm.channel_axis
    (0.001, 0.99, -1)
    >>> saved = {"model.norm.weight": np.zeros(4)}
    >>> fastnorm.load_norm("rms_norm", saved, prefix="model.norm", offset=1.0, eps=1e-6).offset
    1.0
    """
    rules = dialects.as_dialect(dialect)
    if not isinstance(kind, str) or kind not in KINDS:
        wanted = ", ".join(repr(known) for known in KINDS)
        raise ValueError(f"kind: got {kind!r}, wanted one of: {wanted}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: got {type(prefix).__name__}, wanted text")
    build, allowed = KINDS[kind]
    names = {role: found for role, found in NAMES[dialect].items() if role in allowed}
    read = _from_mapping if isinstance(parameters, Mapping) else _from_file
    place = tuple(re.findall(r"[^./]+", prefix))
    arrays = read(parameters, lambda keys: _chosen(keys, place, names, dialect))
    given = {"eps": rules.eps[kind], "dtype": _parameter_type(arrays), **options}
    return build(_Found(arrays, rules, dialect, given))


# ---- finding parameters --------------------------------------------------------------------------

#: From all keys to those that matter, by torch's names.
_Choice = Callable[[Iterable[str]], Mapping[str, str]]


def _chosen(
    keys: Iterable[str], place: tuple[str, ...], names: Mapping[str, tuple[str, ...]], dialect: str
) -> dict[str, str]:
    """Which keys are whose: those right below `place`, each of which must be known."""
    role_of = {name: role for role, known in names.items() for name in known}
    shown, keys = ".".join(place) or "the top", list(keys)
    chosen: dict[str, str] = {}
    for key in keys:
        parts = re.findall(r"[^./]+", key.removesuffix(":0"))  # as TensorFlow ends its names
        if parts[:1] and parts[0] in COLLECTIONS.get(dialect, ()):
            parts = parts[1:]
        if tuple(parts[:-1]) != place or not parts:
            continue
        role = role_of.get(parts[-1])
        if role is None:
            raise KeyError(
                f"parameters: got {key!r} at {shown}, wanted no other than {sorted(role_of)}"
            )
        if role in chosen:
            raise KeyError(f"parameters: got both {chosen[role]!r} and {key!r}, wanted one {role}")
        chosen[role] = key
    if (RUNNING[0] in chosen) != (RUNNING[1] in chosen):
        [missing] = [names[role][0] for role in RUNNING if role not in chosen]
        raise KeyError(f"parameters: got {sorted(chosen.values())}, wanted {missing!r} with them")
    if not chosen and (place or keys):
        few = f"; there are keys such as {keys[0]!r}: see prefix" if keys else ""
        raise KeyError(f"parameters: got nothing at {shown}, wanted some of {sorted(role_of)}{few}")
    return chosen


def _from_mapping(parameters: Mapping[str, Any], choose: _Choice) -> dict[str, np.ndarray]:
    flat = dict(_leaves(parameters, ""))
    return {role: _as_array(key, flat[key]) for role, key in choose(flat).items()}


def _leaves(tree: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    """Keys with dots between them, and values."""
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"parameters: got the key {key!r}, wanted text")
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value


def _as_array(key: str, value: Any) -> np.ndarray:
    if getattr(value, "requires_grad", False) is True:
        value = value.detach()  # of parameters nothing but the numbers is wanted
    array = checks.as_real(key, interop.convert(key, value))
    if array is None:
        raise TypeError(f"{key}: got None, wanted an array")
    return array


def _from_file(path: Any, choose: _Choice) -> dict[str, np.ndarray]:
    try:
        where = os.fspath(path)
    except TypeError:
        raise TypeError(
            f"parameters: got {type(path).__name__}, wanted a mapping or a safetensors file's path"
        ) from None
    bfloat16 = interop.bfloat16()  # safetensors reads it once ml_dtypes is imported
    try:
        safetensors = importlib.import_module("safetensors")
    except ImportError:
        raise ImportError(
            f"parameters: got the path {where!r}, which takes the safetensors package to read: "
            "pip install safetensors"
        ) from None
    with safetensors.safe_open(where, framework="numpy") as file:
        return {
            role: _bfloat16_bits(where, key)
            if bfloat16 is None and file.get_slice(key).get_dtype() == "BF16"
            else _as_array(key, file.get_tensor(key))
            for role, key in choose(file.keys()).items()
        }


def _bfloat16_bits(path: str, key: str) -> np.ndarray:
    """One tensor of a safetensors file, whose head says where it lies, as interop has bfloat16."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        about = importlib.import_module("json").loads(file.read(size))[key]
        start, end = about["data_offsets"]
        file.seek(8 + size + start)
        bits = np.frombuffer(file.read(end - start), "<u2").astype(np.uint16)
    return bits.reshape(about["shape"]).view(interop.BITS)


def _parameter_type(arrays: Mapping[str, np.ndarray]) -> np.dtype:
    return checks.compute_type(*[array.dtype for array in arrays.values()])


def _length(name: str, array: np.ndarray) -> int:
    if array.ndim != 1:
        raise ValueError(f"{name}: got shape {array.shape}, wanted one axis, of channels")
    return len(array)


# ---- modules -------------------------------------------------------------------------------------


def _layer_norm(found: _Found) -> LayerNorm:
    arrays, options = found.arrays, found.options
    shape = next((array.shape for array in arrays.values()), None)
    shape = options.pop("normalized_shape", shape)
    if shape is None:
        raise TypeError("normalized_shape: got nothing, wanted a shape, as no parameter has one")
    norm = LayerNorm(shape, elementwise_affine=bool(arrays), **options)
    return _filled(norm, arrays)


def _rms_norm(found: _Found) -> RMSNorm:
    arrays, options = found.arrays, found.options
    shape = arrays["weight"].shape if arrays else None
    shape = options.pop("normalized_shape", shape)
    if shape is None:
        raise TypeError("normalized_shape: got nothing, wanted a shape, as no parameter has one")
    return _filled(RMSNorm(shape, elementwise_affine=bool(arrays), **options), arrays)


def _running_norm(kind: Any) -> Callable[[_Found], Any]:
    """What makes a BatchNorm or an InstanceNorm."""

    def build(found: _Found) -> Any:
        channels = found.length("num_features")
        options = {
            "momentum": found.rules.momentum,
            "channel_axis": found.rules.channel_axis,
            "affine": any(part in found.arrays for part in AFFINE),
            "track_running_stats": RUNNING[0] in found.arrays,
            **found.options,
        }
        norm = kind(channels, dialect=found.dialect, **options)
        return _filled(norm, found.arrays)

    return build


def _group_norm(found: _Found) -> Any:
    arrays, options = dict(found.arrays), found.options
    if "num_groups" not in options:
        raise TypeError("num_groups: got nothing, wanted a number, as no parameter says it")
    groups = checks.as_count("num_groups", options.pop("num_groups"), 1, "an integer")
    if found.dialect == "onnx" and arrays:
        arrays = _of_channels(arrays, groups, options)
    channels = found._replace(arrays=arrays).length("num_channels")
    options = {"channel_axis": found.rules.channel_axis, "affine": bool(arrays), **options}
    return _filled(GroupNorm(groups, channels, **options), arrays)


def _of_channels(
    arrays: Mapping[str, np.ndarray], groups: int, options: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """ONNX's scale and bias for each channel, as opset 21 has them; opset 18's are of groups."""
    channels = options.get("num_channels")
    for name, array in arrays.items():
        if _length(name, array) == groups and channels is None:
            raise TypeError(
                f"num_channels: got nothing for a {name} of {groups}, the number of groups, "
                "wanted a number: opset 18 has one for each group, opset 21 one for each channel"
            )
    if channels is None:
        return dict(arrays)
    count = checks.as_count("num_channels", channels, 1, "an integer")
    return {
        name: array if len(array) != groups else np.repeat(array, max(count // groups, 1))
        for name, array in arrays.items()
    }


def _filled(norm: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The module with these parameters, and with no others."""
    norm.load_state_dict({**norm.state_dict(), **arrays})
    for name in AFFINE:
        if name not in arrays and getattr(norm, name, None) is not None:
            setattr(norm, name, None)
    return norm


#: What makes each kind of module, and the parameters it may have.
KINDS: Mapping[str, tuple[Callable[[_Found], Any], tuple[str, ...]]] = {
    "layer_norm": (_layer_norm, AFFINE),
    "rms_norm": (_rms_norm, ("weight",)),
    "batch_norm": (_running_norm(BatchNorm), (*AFFINE, *RUNNING, COUNTED)),
    "group_norm": (_group_norm, AFFINE),
    "instance_norm": (_running_norm(InstanceNorm), (*AFFINE, *RUNNING, COUNTED)),
}
