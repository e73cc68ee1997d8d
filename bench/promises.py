"""What must_show.py has to show, by topic: which call of fastnorm, next to which peer, by how much.

The ops are those of `fastnorm.contenders` and of variants.py; where no type is named it is float32.
``new`` returns a new array, ``out`` writes into one that exists.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import nt_copy

from fastnorm import timing

NEW, OUT, OBJECT = "fastnorm new", "fastnorm out", "fastnorm object out"
TORCH, NUMPY, NT_COPY = "torch new", "numpy new", nt_copy.NAME
ONNX_NEW, ONNX_OUT = "onnxruntime new", "onnxruntime out"
COPY_NEW, COPY_OUT = "copy new", "copy out"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Promise:
    """One of three: ours is `faster` times faster than the peer, takes at most `within` times as
    long, or at most `seconds`."""

    shape: Shape
    ours: str
    peer: str = ""
    faster: float = 0.0
    within: float = 0.0
    seconds: float = 0.0
    op: str = "layer_norm"
    dtype: str = "float32"
    any_alignment: bool = False

    @property
    def wanted(self) -> str:
        if self.seconds:
            return f"≤ {timing.duration(self.seconds)}"
        return f"≥ {self.faster:g}×" if self.faster else f"≤ {self.within:g}×"

    def figure(self, times: dict[str, list[float]]) -> float:
        """What is compared with the number in `wanted`."""
        ours = times[self.ours]
        if self.seconds:
            return statistics.median(ours)
        if self.faster:
            return timing.median_ratio(times[self.peer], ours)
        return timing.median_ratio(ours, times[self.peer])

    def kept(self, figure: float) -> bool:
        return figure >= self.faster if self.faster else figure <= (self.within or self.seconds)

    def text(self, figure: float) -> str:
        return timing.duration(figure) if self.seconds else f"{figure:.2f}×"


@dataclass(frozen=True)
class OneDnn:
    """Ours, from Python with out, is `faster` times faster than oneDNN's primitive from C++."""

    shape: Shape
    faster: float
    op: str = "layer_norm"
    dtype: str = "float32"


def _layer_norm() -> list[Promise]:
    op = "layer_norm_backward"
    promises = [
        Promise((1, 128), NEW, TORCH, faster=5),
        Promise((1, 128), NEW, NUMPY, faster=20),
        Promise((1, 768), NEW, TORCH, faster=5),
        Promise((1, 768), NEW, NUMPY, faster=20),
        Promise((1, 768), OUT, TORCH, faster=12),
        Promise((1, 768), OUT, seconds=200e-9),
        Promise((1, 768), OBJECT, OUT, faster=1),
        Promise((1, 4096), NEW, TORCH, faster=3.5),
        Promise((1, 4096), NEW, NUMPY, faster=10),
        Promise((32, 768), NEW, TORCH, faster=1.6),
        Promise((512, 768), NEW, TORCH, faster=1.15),
        Promise((512, 768), OUT, COPY_OUT, within=1.15),
        Promise((4096, 768), NEW, TORCH, faster=1.08),
        Promise((4096, 768), OUT, COPY_OUT, within=1.15),
        Promise((65536, 8), NEW, TORCH, faster=6),
        Promise((65536, 32), NEW, TORCH, faster=2.5),
        Promise((8192, 128), NEW, TORCH, faster=1.5),
    ]
    for shape, torch, copy in (((32768, 768), 4.5, 1.25), ((16384, 4096), 3.3, 1.35)):
        promises += [
            Promise(shape, OUT, TORCH, faster=torch, any_alignment=True),
            Promise(shape, OUT, NT_COPY, within=copy, any_alignment=True),
            Promise(shape, OUT, ONNX_OUT, faster=1.8, any_alignment=True),
            Promise(shape, OUT, "numba out", faster=1.8, any_alignment=True),
            Promise(shape, OUT, "numba fastmath out", faster=1.8, any_alignment=True),
            Promise(shape, NEW, COPY_NEW, within=1.1),
        ]
    return [
        *promises,
        Promise((32768, 768), NEW, TORCH, faster=1.8),
        Promise((1, 768), NEW, TORCH, faster=8, op=op),
        Promise((32, 768), NEW, TORCH, faster=1.25, op=op),
        Promise((4096, 768), NEW, TORCH, faster=1.25, op=op),
        Promise((32768, 768), NEW, TORCH, faster=3.5, op=op),
    ]


def _types() -> list[Promise]:
    shapes = (512, 768), (4096, 768)
    return [
        *[
            Promise(shape, NEW, TORCH, faster=1.8, dtype=dtype)
            for dtype in ("float16", "bfloat16")
            for shape in shapes
        ],
        *[Promise(shape, NEW, TORCH, faster=1.05, dtype="float64") for shape in shapes],
        *[Promise(shape, NEW, COPY_NEW, within=1.1, dtype="float64") for shape in shapes],
    ]


def _rms_norm() -> list[Promise]:
    op, large = "rms_norm", (16384, 4096)
    small = (1, 768), (512, 768), (4096, 768)
    return [
        *[
            Promise(shape, NEW, TORCH, faster=torch, op=op)
            for shape, torch in zip(small, (15, 4, 4), strict=True)
        ],
        Promise(large, OUT, TORCH, faster=10, op=op),
        *[Promise(shape, NEW, ONNX_NEW, faster=1.1, op=op) for shape in small],
        Promise(large, OUT, ONNX_OUT, faster=1.1, op=op),
        Promise((4096, 768), NEW, TORCH, faster=3, op="rms_norm_backward"),
    ]


def _fused() -> list[Promise]:
    shapes = (1, 768), (512, 768), (4096, 768)
    int8 = "layer_norm int8"
    return [
        *[
            Promise(shape, NEW, TORCH, faster=torch, op="add_layer_norm")
            for shape, torch in zip(shapes, (6, 2.5, 2.5), strict=True)
        ],
        *[Promise(shape, NEW, ONNX_NEW, faster=5, op="add_layer_norm") for shape in shapes],
        # 16 samples of 256 tokens: fastnorm.cases cuts the rows into samples of that size.
        Promise((16 * 256, 1152), NEW, TORCH, faster=3, op="adaptive_layer_norm"),
        Promise((4096, 768), NEW, TORCH, faster=4, op=int8),
        Promise((4096, 768), NEW, "float32 new", within=1.15, op=int8),
    ]


def _channels_first() -> list[Promise]:
    return [
        promise
        for shape in ((8, 256, 28, 28), (32, 96, 56, 56))
        for promise in (
            Promise(shape, NEW, "torch permuted new", faster=2.5, op="layer_norm 2d"),
            Promise(shape, NEW, "torch ConvNeXt new", faster=4, op="layer_norm 2d"),
            Promise(shape, NEW, COPY_NEW, within=1.3, op="layer_norm 2d"),
        )
    ]


def _ragged() -> list[Promise]:
    return [
        Promise((4096, 1024), NEW, "dense new", within=1.2, op="layer_norm lengths"),
        Promise((4096, 1024), NEW, "dense new", within=1.2, op="segment_layer_norm lengths"),
        *[
            Promise((4096, 768), NEW, "dense new", within=2, op=f"layer_norm mask {percent}%")
            for percent in (50, 70, 90)
        ],
    ]


# One image, a batch that fits in the cache, and one that does not.
IMAGES, LARGE = ((1, 64, 56, 56), (8, 256, 28, 28)), (32, 64, 112, 112)


def _channels() -> list[Promise]:
    # Times torch, which has no out: with a new output, and with out for the large batch.
    forward = {
        "group_norm": (1.1, 4),
        "instance_norm": (4, 6),
        "batch_norm": (0.95, 4),  # inference
        "batch_norm_training": (3, 5),
    }
    return [
        *[
            Promise(shape, NEW, TORCH, faster=small, op=op)
            for op, (small, _) in forward.items()
            for shape in IMAGES
        ],
        *[Promise(LARGE, OUT, TORCH, faster=large, op=op) for op, (_, large) in forward.items()],
        *[Promise(shape, NEW, COPY_NEW, within=1.2, op="batch_norm") for shape in IMAGES],
        Promise(LARGE, OUT, COPY_OUT, within=1.2, op="batch_norm"),
        *[
            Promise(shape, NEW, TORCH, faster=1.5, op=f"{op}_backward")
            for op in forward
            for shape in (*IMAGES, LARGE)
        ],
    ]


PROMISES: dict[str, list[Promise]] = {
    "layer_norm": _layer_norm(),
    "types": _types(),
    "rms_norm": _rms_norm(),
    "fused": _fused(),
    "channels_first": _channels_first(),
    "ragged": _ragged(),
    "channels": _channels(),
}

ONEDNN: dict[str, list[OneDnn]] = {
    "layer_norm": [
        OneDnn((1, 128), 3),
        OneDnn((1, 768), 3),
        OneDnn((1, 4096), 1.3),
        OneDnn((32, 768), 0.93),
        OneDnn((512, 768), 0.93),
        OneDnn((4096, 768), 0.93),
        OneDnn((65536, 8), 3.5),
        OneDnn((65536, 32), 1.4),
        OneDnn((8192, 128), 0.93),
        OneDnn((32768, 768), 1.5),
        OneDnn((16384, 4096), 1.5),
    ],
    "types": [
        OneDnn(shape, 1.0, dtype=dtype)
        for dtype in ("float16", "bfloat16")
        for shape in ((512, 768), (4096, 768))
    ],
    "rms_norm": [
        OneDnn((1, 768), 2.5, op="rms_norm"),
        OneDnn((512, 768), 0.93, op="rms_norm"),
        OneDnn((4096, 768), 0.93, op="rms_norm"),
        OneDnn((16384, 4096), 1.4, op="rms_norm"),
    ],
    "channels": [OneDnn(shape, 3, op="group_norm") for shape in (*IMAGES, LARGE)],
}
