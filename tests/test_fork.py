"""A forked child works after a parallel call in the parent, and so does the parent.

libgomp's idle threads do not survive a fork; a child that waits for them hangs for ever. Every case
is a program of its own with a time limit. Calls are forced into four parts, so that there is a team
of threads on one CPU too.
"""

import sys

import pytest

from fastnorm import _core

from .helpers import child

pytestmark = [
    pytest.mark.skipif(not _core.openmp(), reason="built without OpenMP: there are no threads"),
    pytest.mark.skipif(sys.platform == "win32", reason="no fork on this system"),
]

PRELUDE = """
import multiprocessing, os, signal, sys, threading, warnings
import numpy as np
import fastnorm
from fastnorm import _core

warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: that is the point
signal.alarm(40)
x = np.random.default_rng(1).standard_normal((512, 96)).astype(np.float32)
want = fastnorm.layer_norm(x).tobytes()
_core.force_partition(4)

def parallel_call():
    y, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
    fastnorm.layer_norm_backward(x, x, 96, mean, rstd)
    return y.tobytes() == want

def in_child(work=parallel_call):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        os._exit(0 if work() else 3)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"child ended with {status}"

def in_thread(work):
    failed = []
    def run():
        try:
            work()
        except BaseException as error:
            failed.append(error)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed, failed

def tasks():
    return len(os.listdir("/proc/self/task"))
"""


def run(code):
    assert child.output(PRELUDE + code + "\nprint('done')", timeout=60) == "done"


def test_child_of_a_parent_that_computed():
    run("assert parallel_call(); in_child(); assert parallel_call()")


def test_child_is_parallel_too():
    if not sys.platform.startswith("linux"):
        pytest.skip("threads are counted in /proc")
    run("""
def work():
    before = tasks()
    return parallel_call() and (before, tasks()) == (1, 4)
assert parallel_call()
in_child(work)
""")


def test_many_children():
    run("for _ in range(20): assert parallel_call(); in_child()")


def test_child_of_a_parent_that_did_not_compute():
    run("in_child(); assert parallel_call(); in_child()")


def test_multiprocessing():
    run("""
assert parallel_call()
with multiprocessing.get_context("fork").Pool(2) as pool:
    for size in (1, 2, 4):
        assert all(pool.apply(parallel_call) for _ in range(size))
assert parallel_call()
""")


def test_nested_forks():
    run("""
def work():
    assert parallel_call()
    in_child(lambda: parallel_call() and (in_child() or True))
    return parallel_call()
assert parallel_call()
in_child(work)
assert parallel_call()
""")


def test_fork_from_another_thread_that_computed():
    run("""
assert parallel_call()
def work():
    assert parallel_call()
    in_child()
    assert parallel_call()
in_thread(work)
in_child()
assert parallel_call()
""")


def test_fork_from_another_thread_that_did_not_compute():
    run("assert parallel_call(); in_thread(in_child); assert parallel_call()")


def test_fork_while_another_thread_computes():
    run("""
stop = threading.Event()
def compute():
    while not stop.is_set():
        assert parallel_call()
thread = threading.Thread(target=compute, daemon=True)
thread.start()
for _ in range(20):
    assert parallel_call()
    in_child()
stop.set()
thread.join()
assert parallel_call()
""")


def test_child_takes_all_threads_though_others_were_at_work():
    """What other threads had at work when the parent forked does not count in the child."""
    if not sys.platform.startswith("linux"):
        pytest.skip("threads are counted in /proc")
    run("""
_core.force_partition(0)
if _core.threads()["max"] > 1:
    big = np.ones((20000, 768), np.float32)
    out = np.empty_like(big)
    def work():
        fastnorm.layer_norm(big, out=out)
        return tasks() == _core.threads()["max"]
    stop = threading.Event()
    def compute():
        while not stop.is_set():
            fastnorm.layer_norm(big, out=out)
    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    for _ in range(5):
        in_child(work)
    stop.set()
    thread.join()
""")
