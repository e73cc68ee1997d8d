"""A non-temporal copy as a contender, built from nt_copy.c where there is a compiler for it."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fastnorm.contenders import Case, Contender

NAME = "nt copy out"


class Unavailable(Exception):
    """Why there is no non-temporal copy here."""


def add_to(found: dict[str, Contender], case: Case) -> None:
    """Adds the copy for `case` to the contenders, or says why there is none."""
    try:
        found[NAME] = _contender(case)
    except Unavailable as reason:
        print(f"{case.name}: no non-temporal copy: {reason}", file=sys.stderr)


def _contender(case: Case) -> Contender:
    """Copies case.x to case.y."""
    names = {
        "nt_copy": _library().nt_copy,
        "to": case.y.ctypes.data_as(ctypes.c_void_p),
        "origin": case.x.ctypes.data_as(ctypes.c_void_p),
        "size": ctypes.c_size_t(case.x.nbytes),
    }
    return Contender("nt copy", "out", "nt_copy(to, origin, size)", names, (case.y,))


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CC", "gcc")
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"nt_copy.c is for x86-64, this is {platform.machine()}")
    if shutil.which(compiler) is None:
        raise Unavailable(f"no C compiler: {compiler} is not installed")
    source = Path(__file__).with_name("nt_copy.c")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "nt_copy.so")
        command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(built)]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(built))
    library.nt_copy_isa.restype = ctypes.c_char_p
    if library.nt_copy_isa() is None:
        raise Unavailable("this CPU has neither AVX-512 nor AVX2")
    return library
