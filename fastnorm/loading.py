"""Modules from parameters that torch, Keras, Flax or ONNX have saved."""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from . import checks, dialects, interop
from .checks import FLOAT64
from .dialects import Dialect
from .modules import LayerNorm, LayerNorm2d, RMSNorm
from .modules_channels import BatchNorm, GroupNorm, InstanceNorm
from .modules_weights import SpectralNorm, WeightNorm
from .weights import weight_norm

AFFINE = ("weight", "bias")
#: The options that say that a norm has neither.
BARE = ("elementwise_affine", "affine")
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
#: The same for the parts that a weight is made of, which lie beside the layer's other parameters.
#: {} is the weight's own name, and * the wrapper's, which Flax puts somewhere before the layer's.
WEIGHTS: Mapping[tuple[str, str], Mapping[str, tuple[str, ...]]] = {
    ("weight_norm", "torch"): {
        "weight_g": ("{}_g", "parametrizations.{}.original0"),
        "weight_v": ("{}_v", "parametrizations.{}.original1"),
    },
    ("weight_norm", "flax"): {"weight_g": ("{}.scale", "*.{}.scale"), "weight_v": ("{}",)},
    ("spectral_norm", "torch"): {
        "weight_orig": ("{}_orig", "parametrizations.{}.original"),
        "weight_u": ("{}_u", "parametrizations.{}.0._u"),
        "weight_v": ("{}_v", "parametrizations.{}.0._v"),
    },
    ("spectral_norm", "flax"): {"weight_orig": ("{}",), "weight_u": ("{}.u", "*.{}.u")},
}
#: What a layer's weight is called where nothing is said.
WEIGHT = {"torch": "weight", "flax": "kernel"}
# Flax keeps what is trained and what is counted in trees of their own.
COLLECTIONS = {"flax": ("params", "batch_stats")}


class _Sought(NamedTuple):
    """What a norm's parameters may be called below its place, and which belong together."""

    names: Mapping[str, tuple[str, ...]]
    #: A pattern: what is called so must be known.
    own: str
    #: All of these are there or none, and all if there can be no others.
    together: tuple[str, ...]
    #: Whether there may be nothing at its place, though there is elsewhere.
    is_bare: bool = False
    #: Whether the first names of each belong together, and the second.
    is_of_one_form: bool = False


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

    ====================  =======  =======  =======  =======
    dialect               torch    keras    flax     onnx
    ====================  =======  =======  =======  =======
    eps                   1e-5     1e-3     1e-6     1e-5
    eps of layer_norm_2d  1e-6     1e-3     1e-6     1e-5
    eps of batch_norm     1e-5     1e-3     1e-5     1e-5
    eps of rms_norm       None     1e-6     1e-6     1e-5
    eps of weight_norm    None     -        1e-12    -
    eps of spectral_norm  1e-12    -        1e-12    -
    momentum              0.1      0.99     0.99     0.9
    channel_axis          1        -1       -1       1
    ====================  =======  =======  =======  =======

    No state dict of torch holds eps or num_groups: where a model sets another eps (BERT 1e-12,
    Llama 1e-5 or 1e-6), give it.

    The module infers as the model did where it was trained: running statistics are taken as they
    are. It goes on training in the way of its `dialect` too, which has a momentum of that sense and
    a variance of that kind. :func:`fastnorm.convert_momentum` and
    :func:`fastnorm.convert_running_var` lead from one dialect to another.

    Of a weight norm or spectral norm, ``bake()`` gives the weight that the layer infers with; the
    layer's other parameters are passed over. They are read from torch, by the older functions and
    by parametrizations, and from flax.linen. Keras and ONNX have nothing to read: of these norms
    there is but Keras' SpectralNormalization, which infers with the kernel as it is saved.

    Parameters
    ----------
    kind : str
        "layer_norm", "layer_norm_2d", "rms_norm", "batch_norm", "group_norm", "instance_norm",
        "weight_norm" or "spectral_norm".
    parameters : mapping of str to array_like, or path
        A state dict, weights by name, a tree of Flax's variables (mappings in mappings), an ONNX
        node's inputs by their names in the operator's definition. Or the path of a safetensors
        file, of which the norm's own parameters are read and nothing else.
    prefix : str
        Where in `parameters` the norm is: "encoder.layer.0.norm", with "." or "/" between names
        and, if you like, at the end. In Flax the names below "params" and "batch_stats". Of a
        weight norm or spectral norm, where the layer is: in Flax "Dense_1", not "WeightNorm_0".
    dialect : {"torch", "keras", "flax", "onnx"}
        Whose names and defaults these are.
    **options
        Of the module's constructor: eps, momentum, channel_axis, dtype, and

        - `num_groups` of a group norm, which no parameter says, and `num_channels` where ONNX's
          opset 18 has a scale for each group, which then goes to all channels of the group
        - `offset=1.0` of an RMS norm whose weight is the factor less 1, as Gemma's
        - ``elementwise_affine=False`` (of layer and RMS norms) or ``affine=False`` of a norm that
          has no parameters at `prefix`, with its `normalized_shape`, `num_features` or
          `num_channels`
        - ``track_running_stats=False`` of a batch norm that has no running statistics
        - `name` of the weight in its layer: "weight" in torch, "kernel" in Flax, if left out
        - `dim` of a weight norm, which torch's shapes say; in Flax -1, or its feature axis
        - `dim` of a torch spectral norm: 1 of transposed convolutions, else 0, as the vectors'
          lengths say where these two are not the same
        - `n_power_iterations` of a spectral norm, Flax's n_steps, which it takes in inference too

        `dtype`, of the parameters, is float64 where one of them is, else float32.

    Returns
    -------
    LayerNorm, LayerNorm2d, RMSNorm, BatchNorm, GroupNorm, InstanceNorm, WeightNorm or SpectralNorm
        With the weight, the bias and the running statistics that there are, and no others. A
        batch norm or spectral norm is in training, as all new modules are: ``eval()`` ends that.
        Flax's weight_g has its eps in it, and its vectors have had the iterations that it takes
        in inference.

    Raises
    ------
    KeyError
        If `parameters` has nothing, or something unknown, at `prefix`, or not all of what belongs
        together: a batch norm's running statistics too (torch's are in ``state_dict()``, not in
        ``named_parameters()``, Flax's in "batch_stats", not in "params").
    ImportError
        If the path of a file is given and safetensors is not installed.
    TypeError, ValueError
        If an option or the shape of a parameter does not fit, a file is not of safetensors, the
        dialect has no such norm, or the module could not do the same: Flax makes zeros of vectors
        and weights of zeros.

    References
    ----------
    torch.nn, keras.layers, flax.linen, and the operators BatchNormalization, GroupNormalization,
    InstanceNormalization, LayerNormalization and RMSNormalization of ONNX; weight_norm and
    spectral_norm of torch.nn.utils and torch.nn.utils.parametrizations.

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
    >>> saved = {"conv.weight_g": np.ones((8, 1, 1)), "conv.weight_v": np.ones((8, 4, 4))}
    >>> float(fastnorm.load_norm("weight_norm", saved, prefix="conv").bake()[0, 0, 0])
    0.25
    """
    rules = dialects.as_dialect(dialect)
    if not isinstance(kind, str) or kind not in KINDS:
        wanted = ", ".join(repr(known) for known in KINDS)
        raise ValueError(f"kind: got {kind!r}, wanted one of: {wanted}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: got {type(prefix).__name__}, wanted text")
    sought = _sought(kind, dialect, options)
    read = _from_mapping if isinstance(parameters, Mapping) else _from_file
    place = tuple(re.findall(r"[^./]+", prefix))
    arrays = read(parameters, lambda keys: _chosen(keys, place, sought, dialect))
    given = {"eps": rules.eps[kind], "dtype": _parameter_type(arrays), **options}
    return KINDS[kind][0](_Found(arrays, rules, dialect, given))


# ---- finding parameters --------------------------------------------------------------------------

#: From all keys to those that matter, by torch's names.
_Choice = Callable[[Iterable[str]], Mapping[str, str]]


def _sought(kind: str, dialect: str, options: dict[str, Any]) -> _Sought:
    """What to look for; a weight's name is taken out of the options."""
    allowed = KINDS[kind][1]
    if kind not in {weights for weights, _ in WEIGHTS}:
        names = {role: known for role, known in NAMES[dialect].items() if role in allowed}
        bare = any(options.get(flag) is False for flag in BARE)
        return _Sought(names, r"[^.]+", tuple(role for role in RUNNING if role in names), bare)
    if (kind, dialect) not in WEIGHTS:
        infers = (kind, dialect) == ("spectral_norm", "keras")
        why = "Keras infers with the kernel as it is saved" if infers else "it has none"
        raise ValueError(f"dialect: got {dialect!r} for {kind!r}, wanted 'torch' or 'flax': {why}")
    name = options.pop("name", WEIGHT[dialect])
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, wanted text")
    parts = WEIGHTS[kind, dialect]
    names = {role: tuple(form.format(name) for form in parts[role]) for role in parts}
    # What else makes the weight, such as a second parametrization, must not be passed over.
    own = rf"parametrizations\.{re.escape(name)}\..+"
    return _Sought(names, own, tuple(names), is_of_one_form=dialect == "torch")


def _chosen(
    keys: Iterable[str], place: tuple[str, ...], sought: _Sought, dialect: str
) -> dict[str, str]:
    """Which keys are whose: those below `place`, of which the norm's own must be known."""
    role_of = {name: role for role, known in sought.names.items() for name in known}
    shown, keys = ".".join(place) or "the top", list(keys)
    chosen: dict[str, str] = {}
    form: dict[str, int] = {}
    paths = {key: _path(key, dialect) for key in keys}
    everything = set(paths.values())
    for key, path in paths.items():
        name = _name_below(place, path, everything)
        role = role_of.get(name)
        if role is None:
            if re.fullmatch(sought.own, name):
                raise KeyError(
                    f"parameters: got {key!r} at {shown}, wanted no other than {sorted(role_of)}"
                )
            continue
        if role in chosen:
            raise KeyError(f"parameters: got both {chosen[role]!r} and {key!r}, wanted one {role}")
        chosen[role] = key
        form[role] = sought.names[role].index(name)
    missing = [sought.names[role][0] for role in sought.together if role not in chosen]
    got = sorted(chosen.values())
    if chosen and 0 < len(missing) < len(sought.together):
        raise KeyError(f"parameters: got {got}, wanted {missing[0]!r} with them")
    if sought.is_of_one_form and len(set(form.values())) > 1:
        forms = list(zip(*sought.names.values(), strict=True))
        raise KeyError(f"parameters: got {got} at {shown}, wanted all of one of {forms}")
    if not (chosen or sought.is_bare) and (place or keys or len(missing) == len(sought.names)):
        few = f"; there are keys such as {keys[0]!r}: see prefix" if keys else ""
        raise KeyError(f"parameters: got nothing at {shown}, wanted some of {sorted(role_of)}{few}")
    return chosen


def _path(key: str, dialect: str) -> tuple[str, ...]:
    """A key's names from the top on, without what is not the model's."""
    path = tuple(re.findall(r"[^./]+", key.removesuffix(":0")))  # as TensorFlow ends its names
    return path[1:] if path[:1] and path[0] in COLLECTIONS.get(dialect, ()) else path


def _name_below(
    place: tuple[str, ...], path: tuple[str, ...], everything: Collection[tuple[str, ...]]
) -> str:
    """What a key is called below `place`, with * for a wrapper's name; "" is elsewhere."""
    depth = len(place)
    if path[:depth] == place:
        return ".".join(path[depth:])
    for wrapper in range(depth):
        if path[:wrapper] + path[wrapper + 1 : depth + 1] == place:
            # Where a weight lies right there, what is kept is that one's.
            return "" if path[:-1] in everything else "*." + ".".join(path[depth + 1 :])
    return ""


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
    try:
        opened = safetensors.safe_open(where, framework="numpy")
    except safetensors.SafetensorError:
        raise ValueError(
            f"parameters: got {where!r}, which is no safetensors file, wanted one: load it "
            "(torch.load, np.load, ...) and pass the mapping"
        ) from None
    with opened as file:
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
    return _filled(LayerNorm(shape, **{BARE[0]: bool(arrays), **options}), arrays)


def _layer_norm_2d(found: _Found) -> LayerNorm2d:
    channels = found.length("num_channels")
    options = {BARE[0]: bool(found.arrays), **found.options}
    return _filled(LayerNorm2d(channels, **options), found.arrays)


def _rms_norm(found: _Found) -> RMSNorm:
    arrays, options = found.arrays, found.options
    shape = arrays["weight"].shape if arrays else None
    shape = options.pop("normalized_shape", shape)
    if shape is None:
        raise TypeError("normalized_shape: got nothing, wanted a shape, as no parameter has one")
    return _filled(RMSNorm(shape, **{BARE[0]: bool(arrays), **options}), arrays)


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
        lacks = kind is BatchNorm and RUNNING[0] not in found.arrays
        if lacks and found.options.get("track_running_stats", True):
            raise _no_statistics(found.dialect)
        return _filled(norm, found.arrays)

    return build


def _no_statistics(dialect: str) -> KeyError:
    names = " and ".join(repr(NAMES[dialect][role][0]) for role in RUNNING)
    return KeyError(
        f"parameters: got no running statistics, wanted {names} too, or track_running_stats=False"
    )


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


# ---- modules of weights --------------------------------------------------------------------------


def _weight_norm(found: _Found) -> WeightNorm:
    g, v, options = found.arrays["weight_g"], found.arrays["weight_v"], found.options
    eps, is_flax = options.pop("eps"), found.dialect == "flax"
    dim = options.pop("dim", _dim_of_flax(g) if is_flax else _dim_of_torch(g, v))
    norm = WeightNorm(np.zeros(v.shape), dim, **options)
    if is_flax and g.shape == (norm.weight_g.size,):
        g = g.reshape(norm.weight_g.shape)  # Flax leaves out the axes of length 1
    norm.load_state_dict({"weight_g": g, "weight_v": v})
    if eps is not None:
        norm.weight_g = _over_eps(g, v, norm.dim, checks.as_eps(eps))
    return norm


def _dim_of_flax(g: np.ndarray) -> int | None:
    return -1 if g.ndim else None


def _dim_of_torch(g: np.ndarray, v: np.ndarray) -> int | None:
    """The axis that g has of v, the others being 1 long. If nothing fits, the module says so."""
    if not g.ndim:
        return None
    lengths = list(zip(g.shape, v.shape, strict=False))
    return lengths.index((g.size, g.size)) if (g.size, g.size) in lengths else 0


def _over_eps(g: np.ndarray, v: np.ndarray, dim: int | None, eps: float) -> np.ndarray:
    """Lengths by which ``g v / ||v||`` is Flax's ``g v / sqrt(||v||^2 + eps)``."""
    length = weight_norm(checks.as_plain(v, FLOAT64), 1.0, dim, return_stats=True)[1]
    if eps and not length.all():
        raise ValueError("weight_v: got a vector of zeros, wanted none: it would become NaN, not 0")
    with np.errstate(all="ignore"):
        return checks.as_plain(g, FLOAT64) * (length / np.hypot(length, math.sqrt(eps)))


def _spectral_norm(found: _Found) -> SpectralNorm:
    arrays, options = found.arrays, found.options
    weight, u = arrays["weight_orig"], arrays["weight_u"]
    if found.dialect == "flax":
        if "dim" in options:
            raise TypeError(
                f"dim: got {options['dim']!r}, wanted nothing: Flax takes the kernel's last axis"
            )
        norm = SpectralNorm(np.zeros(weight.shape), dim=-1, **options)
        arrays = {**arrays, **_improved(weight, u, norm)}
    else:
        if "dim" not in options:
            options["dim"] = _dim_of_rows(weight, u)
        norm = SpectralNorm(np.zeros(weight.shape), **options)
    norm.load_state_dict(arrays)
    return norm


def _dim_of_rows(weight: np.ndarray, u: np.ndarray) -> int:
    """0 or 1, whichever has u's length; of a matrix 0, as transposed layers have more axes."""
    fits = [dim for dim in (0, 1) if weight.shape[dim : dim + 1] == (u.size,)]
    if len(fits) == 2 and weight.ndim > 2:
        raise TypeError(
            "dim: got nothing, wanted 1 for a transposed convolution, else 0, as a weight of shape "
            f"{weight.shape} may be of either"
        )
    return fits[0] if fits else 0


def _improved(weight: np.ndarray, u: np.ndarray, norm: SpectralNorm) -> dict[str, np.ndarray]:
    """The vectors that Flax, which keeps none but u, forms from it at each call."""
    if u.size != weight.shape[-1]:
        raise ValueError(f"weight_u: got shape {u.shape}, wanted (1, {weight.shape[-1]})")
    matrix = checks.as_plain(weight, FLOAT64).reshape(-1, u.size)
    u = checks.as_plain(u, FLOAT64).reshape(-1)
    with np.errstate(all="ignore"):
        for _ in range(norm.n_power_iterations):
            v = matrix @ u
            v /= np.sqrt(v @ v + norm.eps)
            u = v @ matrix
            u /= np.sqrt(u @ u + norm.eps)
        if v @ matrix @ u == 0:
            raise ValueError("weight_orig: got a singular value of 0, wanted another: the weight "
                             "would become NaN, where Flax leaves it as it is")  # fmt: skip
    return {"weight_u": u, "weight_v": v}


#: What makes each kind of module, and the parameters it may have.
KINDS: Mapping[str, tuple[Callable[[_Found], Any], tuple[str, ...]]] = {
    "layer_norm": (_layer_norm, AFFINE),
    "layer_norm_2d": (_layer_norm_2d, AFFINE),
    "rms_norm": (_rms_norm, ("weight",)),
    "batch_norm": (_running_norm(BatchNorm), (*AFFINE, *RUNNING, COUNTED)),
    "group_norm": (_group_norm, AFFINE),
    "instance_norm": (_running_norm(InstanceNorm), (*AFFINE, *RUNNING, COUNTED)),
    "weight_norm": (_weight_norm, ("weight_g", "weight_v")),
    "spectral_norm": (_spectral_norm, ("weight_orig", "weight_u", "weight_v")),
}
