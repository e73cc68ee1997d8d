"""Layer norm and RMS norm as one would write them in Triton: what `bench --device cuda` compares
fastnorm with. One row a program, the row in registers; imported only where Triton is installed."""

# mypy: ignore-errors
# Triton's decorators turn a function into what has other arguments than it says.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _forward(x, y, weight, bias, cols, eps, RMS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < cols
    v = tl.load(x + row * cols + at, mask=inside, other=0.0).to(tl.float32)
    if not RMS:
        v = tl.where(inside, v - tl.sum(v, axis=0) / cols, 0.0)
    rstd = tl.rsqrt(tl.sum(v * v, axis=0) / cols + eps)
    v = v * rstd * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if not RMS:
        v += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * cols + at, v, mask=inside)


@triton.jit
def _backward(
    dy, x, dx, weight, mean, rstd, dweight, dbias, rows, cols, RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    inside = at < cols
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    sum_w = tl.zeros([BLOCK], tl.float32)
    sum_b = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, programs):
        start = tl.cast(row, tl.int64) * cols
        r = tl.load(rstd + row)
        v = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy + start + at, mask=inside, other=0.0).to(tl.float32)
        if RMS:
            xh = v * r
        else:
            xh = tl.where(inside, (v - tl.load(mean + row)) * r, 0.0)
            sum_b += g
        sum_w += g * xh
        g = g * w
        out = g - xh * (tl.sum(g * xh, axis=0) / cols)
        if not RMS:
            out -= tl.sum(g, axis=0) / cols
        tl.store(dx + start + at, out * r, mask=inside)
    tl.store(dweight + program * cols + at, sum_w, mask=inside)
    if not RMS:
        tl.store(dbias + program * cols + at, sum_b, mask=inside)


#: Wider rows would not stay in registers.
WIDEST = 65536


def _shape(cols: int) -> dict[str, int]:
    block = triton.next_power_of_2(cols)
    return {"BLOCK": block, "num_warps": min(max(block // 1024, 1), 16)}


def forward(x: Any, weight: Any, bias: Any, eps: float, rms: bool, out: Any = None) -> Any:
    rows, cols = x.shape
    y = torch.empty_like(x) if out is None else out
    _forward[(rows,)](x, y, weight, bias, cols, eps, RMS=rms, **_shape(cols))
    return y


def backward(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, rms: bool) -> tuple[Any, ...]:
    rows, cols = x.shape
    programs = min(rows, 2 * torch.cuda.get_device_properties(x.device).multi_processor_count)
    dx = torch.empty_like(x)
    parts = torch.empty((2, programs, cols), dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        dy, x, dx, weight, mean, rstd, parts[0], parts[1], rows, cols, RMS=rms, **_shape(cols)
    )
    return (dx, parts[0].sum(0)) if rms else (dx, *parts.sum(1))
