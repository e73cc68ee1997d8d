"""The arguments of ops on channels, in their order: those of the public functions."""

from __future__ import annotations

_BATCH = "weight bias {} momentum eps channel_axis dialect out dtype return_stats activation"
_LINES = {
    "batch_norm": "x running_mean running_var " + _BATCH.format("training"),
    "batch_norm_backward": "dy x running_mean running_var weight bias training eps mean rstd "
    "channel_axis output_mask",
    "group_norm": "x num_groups weight bias eps channel_axis out dtype return_stats activation",
    "group_norm_backward": "dy x num_groups mean rstd weight bias channel_axis output_mask",
    "instance_norm": "x running_mean running_var " + _BATCH.format("use_input_stats"),
    "instance_norm_backward": "dy x mean rstd weight bias channel_axis output_mask",
}
CHANNELS = {op: tuple(line.split()) for op, line in _LINES.items()}
