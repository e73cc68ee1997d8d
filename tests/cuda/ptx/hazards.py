"""Who read and wrote each piece of memory last, and which accesses nothing orders."""

import numpy as np

from .faults import BlockDependence, Race, SharedWrite, Uninitialised
from .frame import WARP

NOBODY = -1
MANY = np.iinfo(np.int64).min  # readers of several warps; of one warp: -2 - its number
BACKLOG = 1 << 20


class Shadow:
    """The accesses to one stretch of memory, by pieces as small as the narrowest access so far.

    `between_blocks` is set for global memory, which no barrier orders between blocks, and where a
    second writer is a fault even if a barrier stands between the two.
    """

    def __init__(self, start, end, threads, between_blocks, written):
        self.start, self.piece = start // 16 * 16, 16
        self.threads = threads
        self.between_blocks = between_blocks
        self.needs_writing = not written
        pieces = -(-(end - self.start) // 16)
        self.writer = np.full(pieces, NOBODY)
        self.written_at = np.zeros(pieces, np.int64)
        self.reader = np.full(pieces, NOBODY)
        self.read_at = np.zeros(pieces, np.int64)
        self.reading_block = np.full(pieces, NOBODY)
        self.pending = []
        self.pending_reads = 0
        self.is_written = False

    def _pieces(self, addresses, width, *others):
        """The pieces of each access, and other arrays repeated to match."""
        while self.piece > width:
            self._halve()
        first = (addresses - self.start) // self.piece
        count = width // self.piece
        if count == 1:
            return first, *others
        pieces = (first[:, None] + np.arange(count)).ravel()
        return pieces, *(np.repeat(other, count) for other in others)

    def _halve(self):
        self.piece //= 2
        for name in ("writer", "written_at", "reader", "read_at", "reading_block"):
            setattr(self, name, np.repeat(getattr(self, name), 2))

    def warp(self, thread):
        """A number for the warp of a thread."""
        return thread // self.threads * WARP + thread % self.threads // WARP

    def _ordered(self, then, now, same_warp):
        """Whether a barrier stands between: of the warp (lower half), or of the block."""
        return np.where(same_warp, then < now, (then >> 32) < (now >> 32))

    def read(self, addresses, width, thread, met, heard):
        """Threads read; `met` and `heard` say when each last passed a barrier."""
        if self.is_written or self.needs_writing:
            self._check_read(addresses, width, thread, met)
        if self.is_written:
            self._note_read(addresses, width, thread, heard)
            return
        self.pending.append((addresses, width, thread, heard))
        self.pending_reads += len(addresses)
        if self.pending_reads > BACKLOG:
            self._flush()

    def _flush(self):
        """Note the reads that have waited for a first write to matter."""
        for access in self.pending:
            self._note_read(*access)
        self.pending, self.pending_reads = [], 0

    def _check_read(self, addresses, width, thread, met):
        piece, thread, met = self._pieces(addresses, width, thread, met)
        writer = self.writer[piece]
        if self.needs_writing and (writer == NOBODY).any():
            raise Uninitialised(f"{_who(thread, writer == NOBODY, self)} reads what nobody wrote")
        other = np.flatnonzero((writer != NOBODY) & (writer != thread))
        if not len(other):
            return
        piece, thread, writer, met = piece[other], thread[other], writer[other], met[other]
        elsewhere = writer // self.threads != thread // self.threads
        if elsewhere.any():
            raise BlockDependence(
                f"{_who(thread, elsewhere, self)} reads what {_who(writer, elsewhere, self)} wrote"
            )
        same_warp = self.warp(writer) == self.warp(thread)
        loose = ~self._ordered(self.written_at[piece], met, same_warp)
        if loose.any():
            raise Race(f"{_who(thread, loose, self)} reads what {_who(writer, loose, self)} wrote")

    def _note_read(self, addresses, width, thread, heard):
        piece, thread, heard = self._pieces(addresses, width, thread, heard)
        reader, warp = self.reader[piece], self.warp(thread)
        alone = (reader == NOBODY) | (reader == thread)
        alone |= (self.read_at[piece] >> 32) < (heard >> 32)
        group = -2 - warp
        same_warp = np.where(reader >= 0, self.warp(reader) == warp, reader == group)
        code = np.where(alone, thread, np.where(same_warp, group, MANY))
        self._mark_readers(piece, thread, code, group)
        self.read_at[piece] = np.maximum(self.read_at[piece], heard)
        if self.between_blocks:
            self._mark_blocks(piece, thread // self.threads)

    def _mark_readers(self, piece, thread, code, group):
        """Write the codes; threads that read the same piece at once become a group, or many."""
        self.reader[piece] = code
        winner = self.reader[piece]
        lost = winner != code
        if lost.any():
            same_warp = np.where(
                winner >= 0, self.warp(winner) == self.warp(thread), winner == group
            )
            self.reader[piece[lost]] = group[lost]
            self.reader[piece[lost & ~same_warp]] = MANY

    def _mark_blocks(self, piece, block):
        before = self.reading_block[piece]
        self.reading_block[piece] = np.where((before == NOBODY) | (before == block), block, MANY)
        after = self.reading_block[piece]
        self.reading_block[piece[after != block]] = MANY

    def write(self, addresses, width, thread, met, heard):
        """Threads write."""
        self._flush()
        self.is_written = True
        piece, thread, met, heard = self._pieces(addresses, width, thread, met, heard)
        self._check_writers(piece, thread, met)
        self._check_readers(piece, thread, heard)
        self.writer[piece] = thread
        self.written_at[piece] = met
        twice = self.writer[piece] != thread
        if twice.any():
            fault = SharedWrite if self.between_blocks else Race
            raise fault(f"{_who(thread, twice, self)} and another thread write the same place")

    def _check_writers(self, piece, thread, met):
        writer = self.writer[piece]
        other = (writer != NOBODY) & (writer != thread)
        if not other.any():
            return
        if self.between_blocks:
            raise SharedWrite(
                f"{_who(thread, other, self)} writes where {_who(writer, other, self)} did"
            )
        same_warp = self.warp(writer) == self.warp(thread)
        loose = other & ~self._ordered(self.written_at[piece], met, same_warp)
        if loose.any():
            raise Race(f"{_who(thread, loose, self)} writes where {_who(writer, loose, self)} did")

    def _check_readers(self, piece, thread, heard):
        reader = self.reader[piece]
        block = thread // self.threads
        if self.between_blocks:
            reading = self.reading_block[piece]
            elsewhere = (reading != NOBODY) & (reading != block)
            if elsewhere.any():
                raise BlockDependence(
                    f"{_who(thread, elsewhere, self)} writes what another block reads"
                )
        other = (reader != NOBODY) & (reader != thread)
        warp = self.warp(thread)
        same_warp = np.where(reader >= 0, self.warp(reader) == warp, reader == -2 - warp)
        loose = other & ~self._ordered(self.read_at[piece], heard, same_warp)
        if loose.any():
            raise Race(f"{_who(thread, loose, self)} writes what another thread has just read")


def _who(thread, flags, shadow):
    """The first thread flagged, in words."""
    first = int(thread[np.flatnonzero(flags)[0]])
    return f"thread {first % shadow.threads} of block {first // shadow.threads}"
