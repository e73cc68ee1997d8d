"""Calls of batch, group and instance norm by the names of their arguments."""

from fastnorm import cuda
from fastnorm.cuda.signatures import CHANNELS

DEFAULTS = {
    "training": False, "use_input_stats": True, "momentum": 0.1, "eps": 1e-5, "channel_axis": 1,
    "dialect": "torch", "return_stats": False, "output_mask": (True, True, True),
}  # fmt: skip


def call(op, **given):
    """The op on device arrays."""
    values = DEFAULTS | given
    return cuda.op(op)(*[values.get(name) for name in CHANNELS[op]])
