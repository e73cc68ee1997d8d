"""Every op once, on arrays that belong together: what is true of all of them is tested of all."""

import numpy as np

import fastnorm

from .storage import cast, special_rows


class Problem:
    """The arguments that the ops below take, for `tokens` x `heads` rows of n in each of 2 samples.

    One in four rows is a special one. A parameter named in `kinds` has the type given there.
    """

    def __init__(self, rng, n, dtype, tokens=3, heads=3, special=True, **kinds):
        shape = (2, tokens, heads, n)
        x = rng.standard_normal(shape) + 0.5
        rows = cast(x, dtype).reshape(-1, n)
        if special:
            places = rng.permutation(len(rows))[: len(rows) // 4]
            picked = rng.integers(0, 20, len(places))
            rows[places] = special_rows(rng, n, dtype)[picked]
        self.n, self.dtype = n, dtype
        self.x = rows.reshape(shape)
        made = {
            "dy": shape,
            "residual": shape,
            "dsum": shape,
            "weight": (n,),
            "bias": (n,),
            "linear_bias": (n,),
            "head_weight": (heads, n),
            "head_bias": (heads, n),
            "scale": (2, n),
            "shift": (2, n),
            "gate": (2, n),
            "feature_weight": (heads, n),
            "feature_bias": (heads, n),
        }
        for name, its_shape in made.items():
            values = rng.standard_normal(its_shape)
            # Gradients from the output divide by the weight.
            values += np.copysign(0.25, values) if "weight" in name else 0
            setattr(self, name, cast(values, kinds.get(name, dtype)))
        self.lengths = rng.integers(0, n + 1, shape[:-1])
        self.mask = rng.random(shape) < 0.7
        self.packed = self.x.reshape(2 * tokens, heads, n)
        self.packed_dy = self.dy.reshape(self.packed.shape)
        self.offsets = np.array([0, 1, 1, 2 * tokens - 2, 2 * tokens])

    def replaced(self, **arrays):
        """The same with other arrays."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__, **arrays)
        return other

    ARRAYS = ("x", "dy", "residual", "dsum", "weight", "bias", "linear_bias", "head_weight",
              "head_bias", "scale", "shift", "gate", "feature_weight", "feature_bias", "packed",
              "packed_dy")  # fmt: skip

    def converted(self, dtype):
        """The same numbers in a wider type."""
        arrays = {name: cast(getattr(self, name), dtype) for name in self.ARRAYS}
        return self.replaced(dtype=dtype, **arrays)


# Each takes a Problem and options of the call; all return a tuple, y first.
FORWARD = {
    "layer_norm": lambda p, **o: fastnorm.layer_norm(
        p.x, p.n, p.weight, p.bias, return_stats=True, **o
    ),
    "layer_norm eps=0, plain": lambda p, **o: fastnorm.layer_norm(
        p.x, eps=0.0, return_stats=True, **o
    ),
    "layer_norm two axes": lambda p, **o: fastnorm.layer_norm(
        p.x, p.head_weight.shape, p.head_weight, p.head_bias, return_stats=True, **o
    ),
    "layer_norm axis=1": lambda p, **o: fastnorm.layer_norm(p.x, axis=1, return_stats=True, **o),
    "layer_norm per head": lambda p, **o: fastnorm.layer_norm(
        p.x, p.n, p.head_weight, p.head_bias, return_stats=True, **o
    ),
    "layer_norm lengths": lambda p, **o: fastnorm.layer_norm(
        p.x, p.n, p.weight, p.bias, return_stats=True, lengths=p.lengths, **o
    ),
    "layer_norm mask": lambda p, **o: fastnorm.layer_norm(
        p.x, p.n, p.weight, p.bias, return_stats=True, mask=p.mask, **o
    ),
    "rms_norm": lambda p, **o: fastnorm.rms_norm(p.x, p.n, p.weight, return_stats=True, **o),
    "rms_norm offset": lambda p, **o: fastnorm.rms_norm(
        p.x, p.n, p.weight, 1e-6, offset=1.0, return_stats=True, **o
    ),
    "rms_norm axis=(0, 2)": lambda p, **o: fastnorm.rms_norm(
        p.x, axis=(0, 2), eps=0.0, return_stats=True, **o
    ),
    "rms_norm mask": lambda p, **o: fastnorm.rms_norm(
        p.x, p.n, p.weight, return_stats=True, mask=p.mask, **o
    ),
    "add_layer_norm": lambda p, **o: fastnorm.add_layer_norm(
        p.x, p.residual, p.n, p.weight, p.bias, linear_bias=p.linear_bias, return_stats=True, **o
    ),
    "add_rms_norm": lambda p, **o: fastnorm.add_rms_norm(
        p.x, p.residual, p.n, p.weight, linear_bias=p.linear_bias, offset=1.0, return_stats=True,
        **o,
    ),
    "adaptive_layer_norm": lambda p, **o: fastnorm.adaptive_layer_norm(
        p.x, p.scale, p.shift, p.n, return_stats=True, **o
    ),
    "adaptive_layer_norm gate": lambda p, **o: fastnorm.adaptive_layer_norm(
        p.x, p.scale, p.shift, p.n, gate=p.gate, residual=p.residual, return_stats=True, **o
    ),
    "segment_layer_norm": lambda p, **o: fastnorm.segment_layer_norm(
        p.packed, p.offsets, p.feature_weight, p.feature_bias, return_stats=True, **o
    ),
    "segment_rms_norm": lambda p, **o: fastnorm.segment_rms_norm(
        p.packed, p.offsets, p.feature_weight, offset=1.0, return_stats=True, **o
    ),
}  # fmt: skip


def parallel(p, **options):
    """parallel_layer_norm with its results in one row, not in a tuple of their own."""
    ys, *stats = fastnorm.parallel_layer_norm(
        p.x, p.n, [p.weight, None, p.bias], [p.bias, p.weight, None], return_stats=True, **options
    )
    return (*ys, *stats)


def _stats(name, p, **options):
    return FORWARD[name](p, **options)[1:]


def _layer_norm_backward(p, **options):
    mean, rstd = _stats("layer_norm", p)
    return fastnorm.layer_norm_backward(p.dy, p.x, p.n, mean, rstd, p.weight, p.bias, **options)


def _per_head_backward(p, **options):
    mean, rstd = _stats("layer_norm", p)
    return fastnorm.layer_norm_backward(
        p.dy, p.x, p.n, mean, rstd, p.head_weight, p.head_bias, **options
    )


def _axis_backward(p, **options):
    mean, rstd = _stats("layer_norm axis=1", p)
    return fastnorm.layer_norm_backward(p.dy, p.x, None, mean, rstd, axis=1, **options)


def _lengths_backward(p, **options):
    mean, rstd = _stats("layer_norm lengths", p)
    return fastnorm.layer_norm_backward(
        p.dy, p.x, p.n, mean, rstd, p.weight, p.bias, lengths=p.lengths, **options
    )


def _mask_backward(p, **options):
    mean, rstd = _stats("layer_norm mask", p)
    return fastnorm.layer_norm_backward(
        p.dy, p.x, p.n, mean, rstd, p.weight, p.bias, mask=p.mask, **options
    )


def _from_output(p, **options):
    y, _, rstd = FORWARD["layer_norm"](p)
    return fastnorm.layer_norm_backward(
        p.dy, y, p.n, None, rstd, p.weight, p.bias, from_output=True, **options
    )


def _rms_norm_backward(p, **options):
    (rstd,) = _stats("rms_norm", p)
    return fastnorm.rms_norm_backward(p.dy, p.x, p.n, rstd, p.weight, **options)


def _rms_norm_offset_backward(p, **options):
    (rstd,) = _stats("rms_norm offset", p)
    return fastnorm.rms_norm_backward(p.dy, p.x, p.n, rstd, p.weight, offset=1.0, **options)


def _add_layer_norm_backward(p, **options):
    _, total, mean, rstd = FORWARD["add_layer_norm"](p)
    return fastnorm.add_layer_norm_backward(
        p.dy, None, total, p.n, mean, rstd, p.weight, p.bias, **options
    )


def _add_rms_norm_backward(p, **options):
    _, total, rstd = FORWARD["add_rms_norm"](p)
    return fastnorm.add_rms_norm_backward(
        p.dy, None, total, p.n, rstd, p.weight, offset=1.0, **options
    )


def _adaptive_backward(p, **options):
    mean, rstd = _stats("adaptive_layer_norm", p)
    return fastnorm.adaptive_layer_norm_backward(p.dy, p.x, p.scale, p.n, mean, rstd, **options)


def _segment_layer_norm_backward(p, **options):
    mean, rstd = _stats("segment_layer_norm", p)
    return fastnorm.segment_layer_norm_backward(
        p.packed_dy, p.packed, p.offsets, mean, rstd, p.feature_weight, p.feature_bias, **options
    )


def _segment_rms_norm_backward(p, **options):
    (rstd,) = _stats("segment_rms_norm", p)
    return fastnorm.segment_rms_norm_backward(
        p.packed_dy, p.packed, p.offsets, rstd, p.feature_weight, offset=1.0, **options
    )


# Each forms the statistics itself and returns dx and the gradients of the parameters.
BACKWARD = {
    "layer_norm_backward": _layer_norm_backward,
    "layer_norm_backward per head": _per_head_backward,
    "layer_norm_backward axis=1": _axis_backward,
    "layer_norm_backward lengths": _lengths_backward,
    "layer_norm_backward mask": _mask_backward,
    "layer_norm_backward from output": _from_output,
    "rms_norm_backward": _rms_norm_backward,
    "rms_norm_backward offset": _rms_norm_offset_backward,
    "add_layer_norm_backward": _add_layer_norm_backward,
    "add_rms_norm_backward": _add_rms_norm_backward,
    "adaptive_layer_norm_backward": _adaptive_backward,
    "segment_layer_norm_backward": _segment_layer_norm_backward,
    "segment_rms_norm_backward": _segment_rms_norm_backward,
}

OTHERS = {
    "parallel_layer_norm": parallel,
    "moments": lambda p: fastnorm.moments(p.x),
    "moments axis=1": lambda p: fastnorm.moments(p.x, 1),
}

CALLS = FORWARD | BACKWARD | OTHERS


def ops_called():
    """The names of the ops that are above."""
    return {name.split()[0] for name in CALLS}
