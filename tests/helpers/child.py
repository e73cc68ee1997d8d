"""Programs in a fresh Python: for what happens at import, at fork and at the end of memory."""

import os
import subprocess
import sys
import textwrap


def run(code, *, timeout=120, **environment):
    """Run `code`; environment variables are set, or removed where they are None."""
    env = os.environ | {name: value for name, value in environment.items() if value is not None}
    for name in environment:
        if environment[name] is None:
            env.pop(name, None)
    # -I keeps the source tree off the path: what is tested is what was installed.
    return subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(code)],
        env=env, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def output(code, **options):
    """What `code` prints; it must end well."""
    done = run(code, **options)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def error(code, **options):
    """What `code` says on stderr; it must fail by an exception."""
    done = run(code, **options)
    assert done.returncode == 1, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stderr.strip()
