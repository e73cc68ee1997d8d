"""The ops on arrays with channels: calls that fit together, what is exact, and how far off a result
may be. What is normalised together (a channel, a group, a plane) is a unit, as a row of n."""

import numpy as np

import fastnorm
from fastnorm import accuracy, reference
from fastnorm.reference_channels import groups_of, instances, planes_of, whole_channels

from .storage import cast, compute_type

# x's shape, the axis of its channels, the number of groups.
SHAPES = (
    ((1, 3), 1, 3),
    ((5, 7), 1, 1),
    ((70, 6), 1, 2),
    ((200, 3), -1, 1),
    ((4, 1, 9), 1, 1),
    ((2, 6, 1), 1, 3),
    ((2, 6, 2), 1, 6),
    ((3, 6, 7), 1, 2),
    ((2, 3, 7, 7), 1, 1),
    ((2, 4, 8, 8), 1, 2),
    ((1, 6, 28, 28), 1, 3),
    ((2, 2, 1025), 1, 2),
    ((1, 2, 56, 56), 1, 1),
    ((2, 4, 2, 3, 4), 1, 2),
    ((2, 130, 9), 1, 2),
    ((3, 300), 1, 4),
    ((2, 33, 130), -1, 2),
    ((3, 7, 6), -1, 2),
    ((4, 9, 1), 2, 1),
    ((2, 7, 7, 3), -1, 1),
    ((1, 28, 28, 6), 3, 3),
    ((2, 1025, 2), -1, 2),
    ((1, 56, 56, 4), -1, 2),
    ((2, 2, 3, 4, 6), -1, 3),
    ((2, 5, 6, 4), 2, 3),
    ((2, 3, 4, 5, 2), -2, 5),
)


class Problem:
    """The arguments that the calls below take. A parameter named in `kinds` has the type there."""

    def __init__(self, rng, shape, dtype, axis=1, groups=1, eps=1e-5, **kinds):
        self.axis, self.groups, self.eps = axis, groups, eps
        self.dtype = np.dtype(dtype)
        samples, channels = shape[0], shape[axis]
        self.along = [1] * len(shape)
        self.along[axis] = channels
        stats = compute_type(self.dtype)
        made = {
            "weight": (channels,),
            "bias": (channels,),
            "own_weight": (samples, channels),
            "own_bias": (samples, channels),
            "mean": (channels,),
            "var": (channels,),
        }
        for name, its_shape in made.items():
            values = rng.standard_normal(its_shape)
            kind = kinds.get(name, stats if name in ("mean", "var") else self.dtype)
            setattr(self, name, cast(np.abs(values) + 0.1 if name == "var" else values, kind))
        spread, middle = rng.uniform(0.2, 5, channels), rng.standard_normal(channels)
        x = rng.standard_normal(shape) * spread.reshape(self.along) + middle.reshape(self.along)
        self.x = cast(x, self.dtype)
        self.dy = cast(rng.standard_normal(shape), kinds.get("dy", self.dtype))
        self.style = cast(rng.standard_normal(shape) * 2 + 1, kinds.get("style", self.dtype))

    def replaced(self, **arrays):
        """The same with other arrays."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__, **arrays)
        return other

    def of_units(self, name, rows):
        """The same with an x whose units are `rows`."""
        x = units_of(name, self).restore(cast(rows, np.float64))
        return self.replaced(x=cast(x, self.dtype))

    @property
    def running(self):
        """Running statistics to be written to."""
        return self.mean.copy(), self.var.copy()


# Each takes a module of functions, a Problem and options; all return y, mean and rstd.
FORWARD = {
    "batch_norm training": lambda f, p, **o: f.batch_norm(
        p.x, None, None, p.weight, p.bias, True, eps=p.eps, channel_axis=p.axis, return_stats=True,
        **o,
    ),
    "batch_norm inference": lambda f, p, **o: f.batch_norm(
        p.x, p.mean, p.var, p.weight, p.bias, eps=p.eps, channel_axis=p.axis, return_stats=True,
        **o,
    ),
    "group_norm": lambda f, p, **o: f.group_norm(
        p.x, p.groups, p.weight, p.bias, p.eps, channel_axis=p.axis, return_stats=True, **o
    ),
    "instance_norm": lambda f, p, **o: f.instance_norm(
        p.x, None, None, p.weight, p.bias, eps=p.eps, channel_axis=p.axis, return_stats=True, **o
    ),
    "instance_norm per sample": lambda f, p, **o: f.instance_norm(
        p.x, None, None, p.own_weight, p.own_bias, eps=p.eps, channel_axis=p.axis,
        return_stats=True, **o,
    ),
    "instance_norm inference": lambda f, p, **o: f.instance_norm(
        p.x, p.mean, p.var, p.weight, p.bias, False, eps=p.eps, channel_axis=p.axis,
        return_stats=True, **o,
    ),
}  # fmt: skip

BY_INPUT = tuple(name for name in FORWARD if "inference" not in name)
# Where a sample's result depends on the sample alone.
BY_SAMPLE = tuple(name for name in FORWARD if name != "batch_norm training")


def adaptive(f, p, **options):
    return f.adaptive_instance_norm(p.x, p.style, p.eps, channel_axis=p.axis, **options)


def _batch_backward(f, p, **options):
    _, mean, rstd = FORWARD["batch_norm training"](f, p)
    return f.batch_norm_backward(
        p.dy, p.x, None, None, p.weight, p.bias, True, mean=mean, rstd=rstd, channel_axis=p.axis,
        **options,
    )  # fmt: skip


def _batch_backward_inference(f, p, **options):
    return f.batch_norm_backward(
        p.dy, p.x, p.mean, p.var, p.weight, p.bias, False, p.eps, channel_axis=p.axis, **options
    )


def _group_backward(f, p, **options):
    _, mean, rstd = FORWARD["group_norm"](f, p)
    return f.group_norm_backward(
        p.dy, p.x, p.groups, mean, rstd, p.weight, p.bias, channel_axis=p.axis, **options
    )


def _instance_backward(f, p, **options):
    _, mean, rstd = FORWARD["instance_norm"](f, p)
    return f.instance_norm_backward(
        p.dy, p.x, mean, rstd, p.weight, p.bias, channel_axis=p.axis, **options
    )


def _instance_backward_per_sample(f, p, **options):
    _, mean, rstd = FORWARD["instance_norm"](f, p)
    return f.instance_norm_backward(
        p.dy, p.x, mean, rstd, p.own_weight, p.own_bias, channel_axis=p.axis, **options
    )


# Each forms the statistics itself and returns dx, dweight and dbias.
BACKWARD = {
    "batch_norm training": _batch_backward,
    "batch_norm inference": _batch_backward_inference,
    "group_norm": _group_backward,
    "instance_norm": _instance_backward,
    "instance_norm per sample": _instance_backward_per_sample,
}


def every_result(p):
    """All results of all calls, in one tuple."""
    results = [adaptive(fastnorm, p)]
    if p.x.size > p.x.shape[0] * p.weight.size:
        results.append(adaptive(fastnorm, p, ddof=1))
    for call in (*FORWARD.values(), *BACKWARD.values()):
        results += call(fastnorm, p)
    running = p.running
    fastnorm.batch_norm(p.x, *running, training=True, channel_axis=p.axis)
    fastnorm.instance_norm(p.x, *running, channel_axis=p.axis)
    return (*results, *running)


def updating(f, op, x, running, momentum, dialect="torch", **options):
    """batch_norm or instance_norm, moving these running statistics."""
    if op == "batch_norm":
        options["training"] = True
    return getattr(f, op)(x, *running, momentum=momentum, dialect=dialect, **options)


# ---- units ---------------------------------------------------------------------------------------


def units_of(name, p):
    """Which elements a call normalises together, as `fastnorm.reference_channels` has it."""
    planes = planes_of(p.x, p.axis)
    if name.startswith("batch_norm"):
        return whole_channels(planes)
    return groups_of(planes, p.groups) if name == "group_norm" else instances(planes)


def largest(name, p, values):
    """max|values| over each element's unit, of x's shape; given statistics make no units."""
    if "inference" in name:
        return np.abs(values)
    units = units_of(name, p)
    rows = np.abs(units.rows(values))
    return units.restore(np.broadcast_to(rows.max(-1, keepdims=True, initial=0), rows.shape))


def at_elements(p, parameter):
    """A parameter, (C,) or (N, C), to broadcast against x."""
    parameter = np.asarray(parameter, np.float64)
    shape = list(p.along)
    if parameter.ndim == 2:
        shape[0] = len(parameter)
    return parameter.reshape(shape)


def parameters(name, p):
    """The weight and bias of a call, to broadcast against x."""
    own = name == "instance_norm per sample"
    pair = (p.own_weight, p.own_bias) if own else (p.weight, p.bias)
    return [at_elements(p, a) for a in pair]


# ---- errors --------------------------------------------------------------------------------------


def over_allowed(got, exact, terms, dtype):
    """The largest error over what x of `dtype` allows, 1e-6 terms and half an ulp of half types;
    NaN must be NaN, and inf where exact is beyond the type."""
    assert got.shape == exact.shape
    assert (np.isnan(got.astype(np.float64)) == np.isnan(exact)).all(), "NaN in other places"
    with np.errstate(over="ignore"):
        beyond = np.isinf(exact.astype(got.dtype)) & (got == np.copysign(np.inf, exact))
    known = ~np.isnan(exact) & ~beyond
    got, exact = got[known], exact[known]
    terms = np.broadcast_to(terms, known.shape)[known]
    if got.dtype.itemsize == 2:
        return accuracy.stored_error(got, exact, terms)
    return accuracy.sum_error(got, exact, terms) / accuracy.bound(compute_type(dtype))


def forward_error(name, p, y):
    """That of y."""
    exact = FORWARD[name](reference, p)[0]
    bare = p.replaced(weight=None, bias=None, own_weight=None, own_bias=None)
    xh = FORWARD[name](reference, bare)[0]
    w, b = parameters(name, p)
    with np.errstate(invalid="ignore"):
        terms = np.abs(w) * np.maximum(1, largest(name, p, xh)) + np.abs(b)
    return over_allowed(y, exact, terms, p.dtype)


def adaptive_error(p, y, ddof=0):
    exact = adaptive(reference, p, ddof=ddof)
    xh = reference.instance_norm(p.x, eps=p.eps, channel_axis=p.axis)
    style = p.style.astype(np.float64)
    axes = tuple(i for i in range(1, style.ndim) if i != p.axis % style.ndim)
    std = np.sqrt(style.var(axes, keepdims=True) * 2 + p.eps)
    largest_xh = np.maximum(1, largest("instance_norm", p, xh))
    terms = std * largest_xh + np.abs(style).max(axes, keepdims=True)
    return over_allowed(y, exact, terms, p.dtype)


def backward_errors(name, p, gradients):
    """Those of dx, dweight and dbias."""
    dx, dweight, dbias = gradients
    exact = BACKWARD[name](reference, p)
    bare = p.replaced(weight=None, bias=None, own_weight=None, own_bias=None)
    xh, _, rstd = FORWARD[name](reference, bare)
    dy = p.dy.astype(np.float64)
    g = dy * parameters(name, p)[0]
    terms = _at_units(name, p, rstd) * largest(name, p, g)
    of_weight = _summed(np.abs(dy) * np.maximum(1, np.abs(xh)), p, dweight.shape)
    of_bias = _summed(np.abs(dy), p, dbias.shape)
    return (
        over_allowed(dx, exact[0], terms, p.dtype),
        over_allowed(dweight, exact[1], of_weight, p.dtype),
        over_allowed(dbias, exact[2], of_bias, p.dtype),
    )


def _at_units(name, p, statistic):
    """A statistic of each unit, of x's shape."""
    units = units_of(name, p)
    return units.restore(np.broadcast_to(statistic.reshape(-1, 1), units.valid.shape))


def _summed(terms, p, shape):
    """`terms` over all that share an element of a parameter of this shape."""
    axis = p.axis % terms.ndim
    kept = (axis,) if len(shape) == 1 else (0, axis)
    return terms.sum(tuple(i for i in range(terms.ndim) if i not in kept)).reshape(shape)
