"""How many threads a call may use.

The least of: ``set_num_threads`` or ``FASTNORM_NUM_THREADS`` where given, OpenMP's own limit in the
calling thread (``OMP_NUM_THREADS``, threadpoolctl), the CPUs this process may run on, and the
container's CPU quota rounded up. Inside a parallel region it is one. Calls that run at the same
time share these threads.

Under a quota OpenMP and Python still count every core of the machine, so the quota is read from the
control group here.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from . import _core
from .checks import as_count

#: Larger numbers mean no more than this one does.
MOST_THREADS = 1 << 20


def lock_across_forks() -> threading.Lock:
    """A lock that forks wait for: a child must not find it held by a thread that it has not."""
    lock = threading.Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
        )
    return lock


#: What each ``with num_threads`` asks for, in the order they began; at None what was there before.
_ASKED: dict[object, int] = {}
_ASKING = lock_across_forks()


def set_num_threads(n: int | None) -> None:
    """Let calls use at most `n` threads, in the whole process.

    Parameters
    ----------
    n : int or None
        At least 1. More than there are CPUs has no effect. None: no limit but the others, whatever
        FASTNORM_NUM_THREADS says.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is less than 1.
    """
    _core.set_requested_threads(0 if n is None else _checked("n", n))


def get_num_threads() -> int:
    """The number of threads that a large call made now, from this thread, may use."""
    most = _core.threads()["max"]
    assert most is not None  # only the limits it comes from may be absent
    return most


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Within the ``with`` block, let calls of the whole process use at most `n` threads.

    Of blocks that overlap, in one thread or several, the last to begin counts. What was there
    before the first is there after the last, whatever ``set_num_threads`` was given in between.
    """
    count, block = _checked("n", n), object()
    with _ASKING:
        _ASKED.setdefault(None, _core.threads()["requested"] or 0)
        _ASKED[block] = count
        _core.set_requested_threads(count)
    try:
        yield
    finally:
        with _ASKING:
            del _ASKED[block]
            _core.set_requested_threads(list(_ASKED.values())[-1])
            if len(_ASKED) == 1:
                _ASKED.clear()


def _checked(name: str, n: int) -> int:
    return min(as_count(name, n, 1, "an integer"), MOST_THREADS)


# ---- the container's CPU quota ------------------------------------------------------------------


def cpu_quota(root: str | os.PathLike[str] = "/") -> float | None:
    """CPUs' worth of time this process's control groups allow; None where there is no limit.

    Reads version 1 (``cpu.cfs_quota_us``) and version 2 (``cpu.max``) below `root`, of the group
    and of all groups above it: the tightest counts. What is missing or garbled is no limit.
    """
    try:
        lines = _read(os.path.join(root, "proc/self/cgroup")).splitlines()
    except OSError:
        return None
    mount = os.path.join(root, "sys/fs/cgroup")
    return min((quota for line in lines for quota in _quotas_of(mount, line)), default=None)


def _quotas_of(mount: str, line: str) -> Iterator[float]:
    """The quotas along one line of /proc/self/cgroup: ``number:controllers:path``."""
    _, _, rest = line.partition(":")
    controllers, _, path = rest.partition(":")
    if controllers == "":
        hierarchies, quota_of = ("", "unified"), _quota_v2
    elif "cpu" in controllers.split(","):
        hierarchies, quota_of = ("cpu", controllers), _quota_v1
    else:
        return
    steps = [part for part in path.split("/") if part not in ("", "..")]
    for hierarchy in dict.fromkeys(hierarchies):
        for depth in range(len(steps) + 1):
            quota = quota_of(os.path.join(mount, hierarchy, *steps[:depth]))
            if quota is not None:
                yield quota


def _quota_v2(group: str) -> float | None:
    try:
        quota, period = _read(os.path.join(group, "cpu.max")).split()
        return _ratio(quota, period)
    except (OSError, ValueError):
        return None


def _quota_v1(group: str) -> float | None:
    try:
        quota = _read(os.path.join(group, "cpu.cfs_quota_us"))
        return _ratio(quota, _read(os.path.join(group, "cpu.cfs_period_us")))
    except (OSError, ValueError):
        return None


def _ratio(quota: str, period: str) -> float | None:
    if quota.strip() == "max" or int(quota) <= 0 or int(period) <= 0:
        return None
    return int(quota) / int(period)


# pathlib would be half of what importing fastnorm takes. Names of groups may be any bytes.
def _read(path: str) -> str:
    with open(path, "rb") as file:
        return os.fsdecode(file.read())


def configure() -> None:
    """Take over the quota and FASTNORM_NUM_THREADS; called once, at import."""
    quota = cpu_quota()
    if quota is not None:
        _core.set_cpu_quota(min(max(1, math.ceil(quota)), MOST_THREADS))
    wanted = os.environ.get("FASTNORM_NUM_THREADS")
    if wanted:
        try:
            count = int(wanted)
        except ValueError:
            count = 0
        if count < 1:
            raise ValueError(
                f"FASTNORM_NUM_THREADS: got {wanted!r}, wanted an integer of at least 1"
            )
        set_num_threads(count)
