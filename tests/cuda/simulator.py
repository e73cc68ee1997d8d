"""Warp shuffles and votes for Numba's CUDA simulator, which has none.

Numba decides when it is imported, so tests of the simulator run in a process of their own, with
NUMBA_ENABLE_CUDASIM=1 set, and call `install` before the first kernel.

The simulator runs a thread of the operating system for each thread of a block. Here those of a warp
wait for one another: for all lanes of the mask that have not returned.
"""

import threading

WARP = 32
FULL = 0xFFFFFFFF
PATIENCE = 10.0  # seconds until lanes that have not come are thought never to come


class Round:
    """One exchange among the lanes of a mask."""

    def __init__(self):
        self.values = {}
        self.complete = threading.Event()


class Warp:
    """The lanes of a warp and the exchanges that they wait in."""

    def __init__(self, lanes):
        self.lock = threading.Lock()
        self.alive = set(range(lanes))
        self.rounds = {}

    def exchange(self, lane, mask, value):
        """The values of all lanes of the mask, once all of them have come."""
        mask &= FULL
        if not mask >> lane & 1:
            raise ValueError(f"lane {lane} is not in its mask {mask:#x}")
        with self.lock:
            current = self.rounds.setdefault(mask, Round())
            current.values[lane] = value
            self._complete(mask)
        if not current.complete.wait(PATIENCE):
            missing = sorted(self._named(mask) - set(current.values))
            raise RuntimeError(f"mask {mask:#x}: lanes {missing} do not come")
        return current.values

    def _named(self, mask):
        """The lanes of a mask that have not returned."""
        return {lane for lane in self.alive if mask >> lane & 1}

    def _complete(self, mask):
        """End the exchange if everybody is there; the next one begins anew."""
        current = self.rounds[mask]
        if self._named(mask) <= set(current.values):
            del self.rounds[mask]
            current.complete.set()

    def leave(self, lane):
        """A lane returns: nobody waits for it any more."""
        with self.lock:
            self.alive.discard(lane)
            for mask in list(self.rounds):
                self._complete(mask)


GUARD = threading.Lock()


def place(thread):
    """The warp of a simulated thread, and its lane."""
    number, lane = divmod(thread.thread_id, WARP)
    manager = thread._manager
    with GUARD:
        warps = manager.__dict__.setdefault("warps", {})
        if number not in warps:
            threads = 1
            for size in manager._block_dim:
                threads *= size
            warps[number] = Warp(min(WARP, threads - WARP * number))
        return warps[number], lane


def exchange(mask, value):
    """The values of the lanes of the mask, and the lane that asks."""
    warp, lane = place(threading.current_thread())
    return warp.exchange(lane, int(mask), value), lane


def shuffle(mask, value, choose):
    """The value of the lane that `choose` makes of one's own, or one's own if there is no such."""
    values, lane = exchange(mask, value)
    source = choose(lane)
    if not 0 <= source < WARP:
        source = lane
    if source not in values:
        raise ValueError(f"lane {lane} reads lane {source}, which is not there")
    return values[source]


def shfl_sync(self, mask, value, source):
    return shuffle(mask, value, lambda lane: int(source) % WARP)


def shfl_up_sync(self, mask, value, delta):
    return shuffle(mask, value, lambda lane: lane - int(delta))


def shfl_down_sync(self, mask, value, delta):
    return shuffle(mask, value, lambda lane: lane + int(delta))


def shfl_xor_sync(self, mask, value, bits):
    return shuffle(mask, value, lambda lane: lane ^ int(bits))


def syncwarp(self, mask=FULL):
    exchange(mask, None)


def ballot_sync(self, mask, flag):
    values, _ = exchange(mask, flag)
    return sum(1 << lane for lane, value in values.items() if value)


def all_sync(self, mask, flag):
    return all(exchange(mask, flag)[0].values())


def any_sync(self, mask, flag):
    return any(exchange(mask, flag)[0].values())


def eq_sync(self, mask, flag):
    return len({bool(value) for value in exchange(mask, flag)[0].values()}) == 1


FUNCTIONS = (
    shfl_sync,
    shfl_up_sync,
    shfl_down_sync,
    shfl_xor_sync,
    syncwarp,
    ballot_sync,
    all_sync,
    any_sync,
    eq_sync,
)


def install():
    """Give the simulator what it lacks. What it has by itself stays."""
    from numba.cuda.simulator import kernel, kernelapi

    for function in FUNCTIONS:
        if not hasattr(kernelapi.FakeCUDAModule, function.__name__):
            setattr(kernelapi.FakeCUDAModule, function.__name__, function)
    if not hasattr(kernel.BlockThread, "run_to_its_end"):
        kernel.BlockThread.run_to_its_end = kernel.BlockThread.run
        kernel.BlockThread.run = _run_and_leave


def _run_and_leave(thread):
    try:
        thread.run_to_its_end()
    finally:
        warp, lane = place(thread)
        warp.leave(lane)
