"""Runs the threads of a frame: all together while they agree, the least advanced first when not.

A thread that must wait, for its block or for lanes of its warp, is parked until they have come. If
nobody is left to run then, what they wait for never happens, which is a fault.
"""

import numpy as np

from .faults import BadShuffle, DivergentBarrier, Fault
from .warp import check_masks

RUNNING, PARKED, GONE = 0, 1, 2


class Machine:
    """One frame's threads and where each is."""

    def __init__(self, steps, frame, stats):
        self.steps, self.frame, self.stats = steps, frame, stats
        self.state = np.zeros(frame.size, np.int8)
        self.position = np.zeros(frame.size, np.int64)
        self.alive = None  # the numbers of threads that have not returned; None: all

    def run(self):
        """To the end of every thread."""
        position = 0
        while position is not None:
            self._together(position)
            position = self._apart()

    def _do(self, step, action, *arguments):
        """An action on behalf of a step, which a fault then names."""
        self.stats.instructions += 1
        try:
            return action(*arguments)
        except Fault as fault:
            fault.instruction = fault.instruction or step.text
            raise

    def _together(self, position):
        """All threads that live are at `position`: run until they part or end."""
        while True:
            step = self.steps[position]
            if step.kind == "plain":
                self._do(step, step.execute, self.frame, self.alive)
                position += 1
                continue
            lanes = self.frame.each(self.alive)
            self.position[lanes] = position
            position = self._do(step, getattr(self, f"_{step.kind}"), step, lanes, self.alive)
            if position is None:
                return

    def _apart(self):
        """Threads are at different places: run until all that live are at one, and say where."""
        while True:
            running = np.flatnonzero(self.state == RUNNING)
            if not len(running):
                if (self.state == GONE).all():
                    return None
                self._deadlock()
            places = self.position[running]
            least = places.min()
            if len(running) == np.count_nonzero(self.state != GONE) and (places == least).all():
                return int(least)
            self._advance(int(least), running[places == least], places[places > least])

    def _advance(self, position, lanes, others):
        """Run the threads that are furthest behind until they reach others or something decides."""
        bound = others.min() if len(others) else len(self.steps)
        while position < bound:
            step = self.steps[position]
            if step.kind == "plain":
                self._do(step, step.execute, self.frame, lanes)
                position += 1
                continue
            self.position[lanes] = position
            self._do(step, getattr(self, f"_{step.kind}"), step, lanes, lanes)
            return
        self.position[lanes] = position

    # Each of these moves the threads `lanes` on from a step. `active` is the same, or None for all.
    # The result is where all of them are, if that is one place and they were all that live.

    def _guarded(self, step, lanes, active):
        """Those of the threads for whom a step's guard holds, and the others."""
        if step.guard is None:
            return lanes, lanes[:0]
        flags = self.frame.spread(step.guard(self.frame, active), active)
        return lanes[flags], lanes[~flags]

    def _branch(self, step, lanes, active):
        taken, others = self._guarded(step, lanes, active)
        self.position[taken] = step.target
        self.position[others] += 1
        if not len(others):
            return step.target
        return None if len(taken) else int(self.position[others[0]])

    def _exit(self, step, lanes, active):
        gone, others = self._guarded(step, lanes, active)
        self.position[others] += 1
        self.state[gone] = GONE
        self.alive = np.flatnonzero(self.state != GONE)
        self.frame.set_alive(self.alive)
        self._release_barriers()
        if len(others) and len(others) == len(self.alive):
            return int(self.position[others[0]])
        return None

    def _warp(self, step, lanes, active):
        """Lanes whose partners have come go on; the others wait for them."""
        here, others = self._guarded(step, lanes, active)
        self.position[others] += 1
        position = int(self.position[here[0]]) if len(here) else None
        parked = np.flatnonzero((self.state == PARKED) & (self.position == position))
        if len(parked):
            here = np.sort(np.append(here, parked))
        if len(here):
            active = None if len(here) == self.frame.size else here
            ready = check_masks(self.frame, active, step.masks(self.frame, active))
            ready = np.broadcast_to(ready, here.shape)
            self.state[here[~ready]] = PARKED
            self._go(step, here[ready], active if ready.all() else here[ready])
            whole = ready.all() and not len(others) and not len(parked)
            return position + 1 if whole else None
        return None

    def _go(self, step, lanes, active):
        if len(lanes):
            step.execute(self.frame, active)
            self.state[lanes] = RUNNING
            self.position[lanes] += 1

    def _barrier(self, step, lanes, active):
        """Threads wait for all of their block."""
        here, others = self._guarded(step, lanes, active)
        self.position[others] += 1
        self.state[here] = PARKED
        released = self._release_barriers()
        if len(here) and released == len(lanes) and not len(others):
            return int(self.position[here[0]])
        return None

    def _release_barriers(self):
        """Let blocks go on of which all threads wait at the same barrier; how many threads did."""
        frame = self.frame
        waits = self.state == PARKED
        if not waits.any():
            return 0
        waiting = np.flatnonzero(waits)
        alive = np.bincount(frame.block_of[self.state != GONE], minlength=frame.blocks)
        released = 0
        for position in np.unique(self.position[waiting]):
            step = self.steps[position]
            if step.kind != "barrier":
                continue
            at = waiting[self.position[waiting] == position]
            count = np.bincount(frame.block_of[at], minlength=frame.blocks)
            lanes = at[((count == alive) & (count > 0))[frame.block_of[at]]]
            if len(lanes):
                released += len(lanes)
                self._pass_barrier(step, lanes)
        return released

    def _pass_barrier(self, step, lanes):
        blocks = len(np.unique(self.frame.block_of[lanes]))
        self.stats.barriers += blocks
        self.stats.barriers_after_exit += len(lanes) != blocks * self.frame.threads
        step.execute(self.frame, lanes)
        self.frame.meet(lanes, whole_block=True)
        self.state[lanes] = RUNNING
        self.position[lanes] += 1

    def _deadlock(self):
        """Nobody can run: say who waits where, in the first block that is not done."""
        waiting = np.flatnonzero(self.state == PARKED)
        block = self.frame.block_of[waiting]
        waiting = waiting[block == block[0]]
        places = np.unique(self.position[waiting])
        steps = [self.steps[place] for place in places]
        words = "; ".join(
            f"{np.count_nonzero(self.position[waiting] == place)} threads wait at `{step.text}`"
            for place, step in zip(places, steps, strict=True)
        )
        number = int(block[0]) + self.frame.first_block
        if any(step.kind == "warp" for step in steps):
            raise BadShuffle(f"block {number}: lanes named by a mask never come: {words}")
        raise DivergentBarrier(f"block {number}: not all threads reach one barrier: {words}")
