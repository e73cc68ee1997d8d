"""What the documentation shows is what happens."""

import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import fastnorm
from fastnorm import _core, channels, dispatch

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
OPTIONAL = ("torch", "ml_dtypes")
CALLS = {**dispatch.CALLS, **channels.CALLS}


def examples():
    """Of everything public, with the methods of classes and the reference's functions."""
    finder = doctest.DocTestFinder()
    for name in fastnorm.__all__:
        if name != "__version__":
            yield from finder.find(getattr(fastnorm, name), name, module=False)


@pytest.mark.parametrize("example", [e for e in examples() if e.examples], ids=lambda e: e.name)
def test_docstrings(example):
    assert doctest.DocTestRunner().run(example).failed == 0


def lacks(block):
    """Whether a block imports an optional package that is not installed."""
    imported = re.findall(r"^import (\w+)", block, re.MULTILINE)
    return any(name in OPTIONAL and not importlib.util.find_spec(name) for name in imported)


def test_readme():
    """Its Python runs, from top to bottom."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        if not lacks(block):
            exec(block, names)


def test_readme_leads_somewhere():
    """Links within it point to its headings."""
    text = README.read_text()
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\(#([^)]*)\)", text)) <= headings


@pytest.mark.parametrize("op", [*CALLS, "weight_norm", "spectral_norm", "unit_norm"])
def test_readme_names_every_op(op):
    assert f"`{op.removesuffix('_backward')}(" in README.read_text()


def test_the_map_of_files_is_complete():
    [listed] = re.findall(r"## Files\n.*?```text\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    named = set(re.findall(r"[\w/]+\.\w+", listed))
    kinds_in = {"src_c": ("*.c", "*.h"), "fastnorm": ("*.py", "*.py[xi]", "*.px[di]")}
    for folder, kinds in kinds_in.items():
        files = {path.name for kind in kinds for path in (ROOT / folder).glob(kind)}
        assert files - {"__init__.py", "_version.py"} <= named


@pytest.mark.parametrize("name", sorted(set(fastnorm.__all__) - {"__version__", "reference"}))
def test_public_names_are_documented(name):
    assert len(getattr(fastnorm, name).__doc__) > 40


@pytest.mark.parametrize("op", CALLS)
def test_every_argument_of_every_op_is_documented(op):
    """In its own docstring, or in one of those that it says hold for it. Examples are its own."""
    function = getattr(fastnorm, op)
    text = function.__doc__
    assert "Examples\n" in text
    if op in _core.STRAIGHT:  # what help() shows of compiled functions
        head, _, text = text.partition("\n\n")
        assert head.replace("1e-5", "1e-05") == f"{op}{inspect.signature(function)}"
    for other in re.findall(r":func:`(?:fastnorm\.)?(\w+)`", text):
        text += getattr(fastnorm, other).__doc__.partition("\n\n")[2]
    names = list(inspect.signature(CALLS[op]).parameters)
    names.remove("explained")
    assert list(inspect.signature(function).parameters) == names
    parameters = set(re.findall(r"\w+", "\n".join(re.findall(r"(?m)^ {4}\w.*", text))))
    assert set(names) <= parameters
    for section in ("Parameters", "Returns", "Raises"):
        assert section in text
