"""What the documentation shows is what happens."""

import doctest
import re
from pathlib import Path

import pytest

import fastnorm

README = Path(__file__).parents[1] / "README.md"


def examples():
    finder = doctest.DocTestFinder(recurse=False)
    for name in fastnorm.__all__:
        if name != "reference":
            yield from finder.find(getattr(fastnorm, name), name, module=False)


@pytest.mark.parametrize("example", [e for e in examples() if e.examples], ids=lambda e: e.name)
def test_docstrings(example):
    assert doctest.DocTestRunner().run(example).failed == 0


def test_readme():
    """Its Python runs, from top to bottom."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize("name", sorted(set(fastnorm.__all__) - {"__version__", "reference"}))
def test_public_names_are_documented(name):
    assert len(getattr(fastnorm, name).__doc__) > 40
