"""Builds the C core by itself, with the flags that setup.py gives it."""

import ast
import functools
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src_c"
PROGRAMS = ROOT / "tests" / "c"
NATIVE = platform.machine()


@functools.cache
def flags_of_setup():
    """The constants of setup.py that hold compiler flags, without running a build."""
    wanted = ("SCALAR", "LOGIC", "ISA_FLAGS", "ARITHMETIC", "COMPACT", "BASELINE")
    constants = [
        node
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id in wanted
    ]
    found = {}
    exec(compile(ast.Module(constants, []), "setup.py", "exec"), found)
    return {name: found[name] for name in wanted}


def tool(*names):
    """The first of these programs that is installed; the test skips where none is."""
    for name in names:
        if shutil.which(name):
            return name
    return pytest.skip(f"{' or '.join(names)} is not installed")


def command(*words, **options):
    """Run a program to its end."""
    return subprocess.run(
        [*map(str, words)], capture_output=True, text=True, check=False, timeout=600, **options
    )


def output(*words, **options):
    """What a program prints; it must end well."""
    done = command(*words, **options)
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr}"
    return done.stdout


class Core:
    """The C core compiled for one machine, in a folder of its own."""

    def __init__(self, folder, compiler, machine, extra=()):
        known = flags_of_setup()
        self.folder, self.compiler = folder, compiler
        self.flags = [
            *["-O2", "-std=gnu11", "-fvisibility=hidden", f"-I{SOURCES}"],
            *[*known["ARITHMETIC"], *known["COMPACT"]],
            *known["BASELINE"].get(machine, []),
            *extra,
        ]
        self.isas = known["ISA_FLAGS"].get(machine, {"scalar": known["SCALAR"]})
        names = [p.stem for p in SOURCES.glob("*.c") if not p.stem.startswith("isa_")]
        files = {name: known["LOGIC"].get(name, []) for name in names}
        files |= {f"isa_{name}": flags for name, flags in self.isas.items()}
        with ThreadPoolExecutor() as pool:
            self.objects = dict(zip(files, pool.map(self._object, files.items()), strict=True))

    def _object(self, named_flags):
        name, flags = named_flags
        path = self.folder / f"{name}.o"
        output(self.compiler, *self.flags, *flags, "-c", SOURCES / f"{name}.c", "-o", path)
        return path

    def program(self, name, *link_flags):
        """tests/c/<name>.c, linked with the core."""
        path = self.folder / name
        source, objects = PROGRAMS / f"{name}.c", self.objects.values()
        output(self.compiler, *self.flags, source, *objects, *link_flags, "-lm", "-o", path)
        return path
