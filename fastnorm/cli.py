"""The command line: ``python -m fastnorm info``, ``demo`` and ``bench``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastnorm
from fastnorm import cases

# What an extra brings, by the name it is imported under.
PACKAGES = {
    "matplotlib": "matplotlib",
    "ml_dtypes": "ml_dtypes",
    "rich": "rich",
    "sklearn": "scikit-learn",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    0: done. 1: a check failed. 2: it could not run. 130: stopped by Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ModuleNotFoundError as missing:
        package = PACKAGES.get((missing.name or "").partition(".")[0])
        if package is None:
            raise
        print(
            f"fastnorm {options.command} needs {package}: "
            f"pip install 'fastnorm-kernels[{options.command}]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastnorm", description="Normalization layers on NumPy arrays."
    )
    parser.add_argument("--version", action="version", version=f"fastnorm {fastnorm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_info(commands)
    _add_demo(commands)
    _add_bench(commands)
    return parser


def _add_info(commands: Any) -> None:
    info = commands.add_parser("info", help="what was built and what this machine has")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small network on handwritten digits, with layer norm, batch norm and neither",
        description="Trains a small network on scikit-learn's handwritten digits at batch sizes "
        "1, 4 and 64, with layer norm, batch norm and no norm, tests it in training and in "
        "inference mode, and checks what was normalised, forward and backward, against the float64 "
        "reference.",
    )
    demo.add_argument(
        "--plot",
        metavar="FILE",
        type=_plot_file,
        default="fastnorm-demo.png",
        help="where the plot goes (default: %(default)s)",
    )
    demo.add_argument(
        "--quick",
        action="store_true",
        help="three epochs in place of ten, two seeds in place of five",
    )
    demo.set_defaults(run=_demo)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="time the ops on this machine, next to the libraries that are installed",
        description="Times an op next to NumPy, torch, ONNX Runtime and Numba, as far as they are "
        "installed, and a memory copy. All run in one process, in turns; medians are shown.",
    )
    bench.add_argument(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="cuda: on a GPU, next to torch, torch.compile, Triton and its copy speed",
    )
    ops = dict.fromkeys((*fastnorm._core.OPS, *cases.CHANNELS))
    bench.add_argument(
        "--op",
        default="layer_norm",
        choices=tuple(ops),
        help="what is timed (default: %(default)s)",
    )
    bench.add_argument(
        "--dtype",
        default="float32",
        choices=fastnorm._core.DTYPES,
        help="type of x (default: %(default)s)",
    )
    bench.add_argument(
        "--shapes",
        metavar="ROWSxCOLS",
        type=_shape,
        nargs="+",
        help="for example 1x768 32x768; of ops on channels NxC, NxCxS, NxCxHxW or NxCxDxHxW",
    )
    bench.add_argument(
        "--threads", type=_positive(int), default=1, help="for every library (default: 1)"
    )
    bench.add_argument(
        "--align",
        type=int,
        default=64,
        choices=(64, 48, 32, 16, 8),
        help="addresses of all arrays, modulo 64 (default: 64, a cache line)",
    )
    bench.add_argument(
        "--seconds", type=_positive(float), metavar="S", help="for each shape (default: 3)"
    )
    bench.add_argument("--quick", action="store_true", help="a few shapes, half a second each")
    bench.add_argument(
        "--json", metavar="FILE", type=_new_file, help="write the results there; - for stdout"
    )
    bench.add_argument(
        "--plot", metavar="FILE", type=_plot_file, help="draw the results (.png, .svg or .pdf)"
    )
    bench.set_defaults(run=_bench, error=bench.error)


def _shape(text: str) -> tuple[int, ...]:
    numbers = text.split("x")
    if not (2 <= len(numbers) <= 5 and all(n.isdecimal() and int(n) for n in numbers)):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted ROWSxCOLS, for example 32x768")
    return tuple(map(int, numbers))


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted a positive {kind.__name__}")
        return value

    return parse


# A measurement takes its time: what would fail after it is refused before it.


def _new_file(text: str) -> str:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a file in a folder that exists")
    return text


def _plot_file(text: str) -> str:
    if Path(text).suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a name in .png, .svg or .pdf")
    return _new_file(text)


def _info(options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps(fastnorm.show_config(mode="dicts"), indent=2))
    else:
        fastnorm.show_config()
    return 0


# The commands' own modules need packages that fastnorm itself does not: imported when called.


def _demo(options: argparse.Namespace) -> int:
    from fastnorm import demo

    return demo.run(options.plot, quick=options.quick)


def _bench(options: argparse.Namespace) -> int:
    if options.op not in cases.CHANNELS and any(len(shape) != 2 for shape in options.shapes or ()):
        options.error(f"argument --shapes: {options.op} wants ROWSxCOLS, for example 32x768")
    if options.device == "cuda":
        from fastnorm.cuda import bench as on_cuda

        return on_cuda.run(options)
    from fastnorm import bench

    return bench.run(options)
