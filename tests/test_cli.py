"""The command line: python -m fastnorm."""

import json
import subprocess
import sys

import numpy as np
import pytest

import fastnorm
from fastnorm import _core, cli


def fastnorm_command(*arguments):
    return subprocess.run(
        [sys.executable, "-I", "-m", "fastnorm", *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_info():
    done = fastnorm_command("info")
    assert done.returncode == 0, done.stderr
    for word in (fastnorm.__version__, np.__version__, *_core.isa_names(), "threads"):
        assert word in done.stdout


def test_info_as_json():
    done = fastnorm_command("info", "--json")
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    assert config["version"] == fastnorm.__version__
    assert config["isa"]["compiled"] == list(_core.isa_names())


def test_version():
    done = fastnorm_command("--version")
    assert (done.returncode, done.stdout) == (0, f"fastnorm {fastnorm.__version__}\n")


WRONG = [
    *[[], ["dance"], ["info", "--loud"], ["bench", "--shapes", "3"]],
    ["bench", "--op", "layer_norm", "--shapes", "2x3x4"],
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_usage(arguments):
    done = fastnorm_command(*arguments)
    assert done.returncode == 2
    assert "usage: python -m fastnorm" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_option_has_help():
    parser = cli._parser()
    [commands] = [action for action in parser._actions if action.dest == "command"]
    for command in commands.choices.values():
        assert all(action.help for action in command._actions)


def test_help_names_every_command():
    done = fastnorm_command("--help")
    assert done.returncode == 0
    for command in ("info", "demo", "bench"):
        assert command in done.stdout


def test_bench():
    pytest.importorskip("rich", reason="the extra [bench] is not installed")
    done = fastnorm_command("bench", "--shapes", "4x32", "--seconds", "0.05", "--json", "-")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert {tuple(result["shape"]) for result in results} == {(4, 32)}


@pytest.mark.parametrize("op", ["group_norm", "batch_norm_training"])
def test_bench_of_channels(op):
    pytest.importorskip("rich", reason="the extra [bench] is not installed")
    arguments = "--op", op, "--shapes", "2x6x3x3", "--seconds", "0.05", "--json", "-"
    done = fastnorm_command("bench", *arguments)
    assert done.returncode == 0, done.stderr
    ours = [r for r in json.loads(done.stdout)["results"] if r["provider"] == "fastnorm"]
    assert ours
    assert all(r["shape"] == [2, 6, 3, 3] and r["error"] <= 1e-6 for r in ours)
