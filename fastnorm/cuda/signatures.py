"""The arguments of ops on channels, in their order: those of the public functions."""

from __future__ import annotations

import inspect

from ..channels import CALLS

OPS = ("batch_norm", "group_norm", "instance_norm")
CHANNELS = {
    name: tuple(inspect.signature(CALLS[name]).parameters)[:-1]  # but `explained`
    for op in OPS
    for name in (op, f"{op}_backward")
}
