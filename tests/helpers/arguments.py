"""Arguments of every op, by name, that go together: tests of errors replace some of them."""

import numpy as np

from fastnorm import _core

FORWARD = tuple(op for op in _core.OPS if not op.endswith("_backward") and op != "moments")
BACKWARD = tuple(op for op in _core.OPS if op.endswith("_backward"))
SEGMENTS = tuple(op for op in _core.OPS if op.startswith("segment_"))
WITH_RESIDUAL = ("add_layer_norm", "add_rms_norm", "adaptive_layer_norm")
NORMS = ("layer_norm", "rms_norm")


def valid(op, dtype=np.float32, shape=(2, 3, 4)):
    """A dict of arguments for a call that works, x being of this shape."""
    rng = np.random.default_rng(5)
    arrays = {
        name: rng.standard_normal(its_shape).astype(dtype)
        for name, its_shape in {
            "x": shape,
            "dy": shape,
            "dsum": shape,
            "residual": shape,
            "weight": shape[-1:],
            "bias": shape[-1:],
            "linear_bias": shape[-1:],
            "scale": (shape[0], shape[-1]),
            "shift": (shape[0], shape[-1]),
            "gate": (shape[0], shape[-1]),
        }.items()
    }
    kind = op.removesuffix("_backward")
    names = {
        "layer_norm": "x weight bias",
        "rms_norm": "x weight",
        "add_layer_norm": "x residual weight bias linear_bias",
        "add_rms_norm": "x residual weight linear_bias",
        "adaptive_layer_norm": "x scale shift gate residual",
        "parallel_layer_norm": "x",
        "segment_layer_norm": "x weight bias",
        "segment_rms_norm": "x weight",
        "moments": "x",
    }[kind].split()
    if op in BACKWARD:
        names = [n for n in names if n in ("x", "weight", "bias", "scale")] + ["dy"]
    made = {name: arrays[name] for name in names}
    if op.startswith("segment_"):
        made["offsets"] = np.array([0, 1, shape[0]])
        made |= {n: arrays["x"][0] + 1 for n in ("weight", "bias") if n in made}
    elif op != "moments":
        made["normalized_shape"] = shape[-1]
    if op == "parallel_layer_norm":
        made |= {"weights": [arrays["weight"], None], "biases": [None, arrays["bias"]]}
    if op in BACKWARD:
        made |= _statistics(op, arrays["x"])
    if op.startswith("add_") and op in BACKWARD:
        made |= {"sum": made.pop("x"), "dsum": arrays["dsum"]}
    return made


def _statistics(op, x):
    lead = (2,) if op in SEGMENTS else x.shape[:-1]
    kind = np.float64 if x.dtype == np.float64 else np.float32
    statistics = {"mean": np.zeros(lead, kind), "rstd": np.ones(lead, kind)}
    return {"rstd": statistics["rstd"]} if "rms" in op else statistics


def outputs(op, dtype=np.float32, shape=(2, 3, 4), fill=7):
    """Arrays for all that a forward op writes to, by name."""
    made = {"out": np.full(shape, fill, dtype)}
    if op == "parallel_layer_norm":
        made["out"] = [made["out"], np.full(shape, fill, dtype)]
    if op in WITH_RESIDUAL:
        made["sum_out"] = np.full(shape, fill, dtype)
    return made


def arrays_of(arguments):
    """All ndarrays among the arguments, those in lists too."""
    for value in arguments.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, np.ndarray):
                yield item
