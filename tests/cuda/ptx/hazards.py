"""Who read and wrote each piece of memory last, and which accesses nothing orders."""

import numpy as np

from .faults import BlockDependence, Race, ReadOnlyWrite, SharedWrite, Uninitialised
from .frame import BLOCK_SHIFT, WARP_SHIFT, thread_name

NOBODY = -1
MANY = np.iinfo(np.int64).min  # readers of several warps; of one warp: -2 - its number
BACKLOG = 1 << 20


class Shadow:
    """The accesses to one stretch of memory, by pieces as small as the narrowest access so far.

    `between_blocks` is set for global memory, which no barrier orders between blocks, and where a
    second writer is a fault even if a barrier stands between the two. `known` says which bytes of
    the 16-byte pieces may be read although no thread has written them: None for all.
    """

    def __init__(self, start, end, between_blocks, known=None):
        self.start, self.piece = start // 16 * 16, 16
        self.between_blocks = between_blocks
        self.known, self.known_pieces = known, None
        pieces = -(-(end - self.start) // 16)
        self.writer = np.full(pieces, NOBODY)
        self.written_at = np.zeros(pieces, np.int64)
        self.reader = np.full(pieces, NOBODY)
        self.read_at = np.zeros(pieces, np.int64)
        self.reading_block = np.full(pieces, NOBODY)
        self.constant = np.zeros(pieces, bool)
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
        self.known_pieces = None
        for name in ("writer", "written_at", "reader", "read_at", "reading_block", "constant"):
            setattr(self, name, np.repeat(getattr(self, name), 2))

    def _ordered(self, then, now, same_warp):
        """Whether a barrier stands between: of the warp (lower half), or of the block."""
        return np.where(same_warp, then < now, (then >> 32) < (now >> 32))

    def read(self, addresses, width, thread, met, heard, constant=False):
        """Threads read; `met` and `heard` say when each last passed a barrier.

        `constant` is for reads of what nobody may write.
        """
        if self.is_written or self.known is not None:
            self._check_read(addresses, width, thread, met, constant)
        if self.is_written:
            self._note_read(addresses, width, thread, heard, constant)
            return
        self.pending.append((addresses, width, thread, heard, constant))
        self.pending_reads += len(addresses)
        if self.pending_reads > BACKLOG:
            self._flush()

    def _flush(self):
        """Note the reads that have waited for a first write to matter."""
        for access in self.pending:
            self._note_read(*access)
        self.pending, self.pending_reads = [], 0

    def _check_read(self, addresses, width, thread, met, constant):
        piece, thread, met = self._pieces(addresses, width, thread, met)
        writer = self.writer[piece]
        if self.known is not None:
            self._check_known(piece, thread, writer)
        if constant and (writer != NOBODY).any():
            raise ReadOnlyWrite(f"{_who(writer, writer != NOBODY)} has written what is read here")
        other = np.flatnonzero((writer != NOBODY) & (writer != thread))
        if not len(other):
            return
        piece, thread, writer, met = piece[other], thread[other], writer[other], met[other]
        elsewhere = writer >> BLOCK_SHIFT != thread >> BLOCK_SHIFT
        if elsewhere.any():
            raise BlockDependence(
                f"{_who(thread, elsewhere)} reads what {_who(writer, elsewhere)} wrote"
            )
        same_warp = (writer >> WARP_SHIFT) == (thread >> WARP_SHIFT)
        loose = ~self._ordered(self.written_at[piece], met, same_warp)
        if loose.any():
            raise Race(f"{_who(thread, loose)} reads what {_who(writer, loose)} wrote")

    def _check_known(self, piece, thread, writer):
        if self.known_pieces is None:
            self.known_pieces = self.known.reshape(-1, self.piece).all(1)
        unknown = (writer == NOBODY) & ~self.known_pieces[piece]
        if unknown.any():
            raise Uninitialised(f"{_who(thread, unknown)} reads what nobody wrote")

    def known_after(self):
        """Which bytes may be read after this launch."""
        return self.known | np.repeat(self.writer != NOBODY, self.piece)

    def _note_read(self, addresses, width, thread, heard, constant):
        piece, thread, heard = self._pieces(addresses, width, thread, heard)
        self.constant[piece] |= constant
        reader, warp = self.reader[piece], (thread >> WARP_SHIFT)
        alone = (reader == NOBODY) | (reader == thread)
        alone |= (self.read_at[piece] >> 32) < (heard >> 32)
        group = -2 - warp
        same_warp = np.where(reader >= 0, (reader >> WARP_SHIFT) == warp, reader == group)
        code = np.where(alone, thread, np.where(same_warp, group, MANY))
        self._mark_readers(piece, thread, code, group)
        self.read_at[piece] = np.maximum(self.read_at[piece], heard)
        if self.between_blocks:
            self._mark_blocks(piece, thread >> BLOCK_SHIFT)

    def _mark_readers(self, piece, thread, code, group):
        """Write the codes; threads that read the same piece at once become a group, or many."""
        self.reader[piece] = code
        winner = self.reader[piece]
        lost = winner != code
        if lost.any():
            same_warp = np.where(
                winner >= 0, (winner >> WARP_SHIFT) == (thread >> WARP_SHIFT), winner == group
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
            raise fault(f"{_who(thread, twice)} and another thread write the same place")

    def _check_writers(self, piece, thread, met):
        constant = self.constant[piece]
        if constant.any():
            raise ReadOnlyWrite(f"{_who(thread, constant)} writes what ld.global.nc has read")
        writer = self.writer[piece]
        other = (writer != NOBODY) & (writer != thread)
        if not other.any():
            return
        if self.between_blocks:
            raise SharedWrite(f"{_who(thread, other)} writes where {_who(writer, other)} did")
        same_warp = (writer >> WARP_SHIFT) == (thread >> WARP_SHIFT)
        loose = other & ~self._ordered(self.written_at[piece], met, same_warp)
        if loose.any():
            raise Race(f"{_who(thread, loose)} writes where {_who(writer, loose)} did")

    def _check_readers(self, piece, thread, heard):
        reader = self.reader[piece]
        block = thread >> BLOCK_SHIFT
        if self.between_blocks:
            reading = self.reading_block[piece]
            elsewhere = (reading != NOBODY) & (reading != block)
            if elsewhere.any():
                raise BlockDependence(f"{_who(thread, elsewhere)} writes what another block reads")
        other = (reader != NOBODY) & (reader != thread)
        warp = thread >> WARP_SHIFT
        same_warp = np.where(reader >= 0, (reader >> WARP_SHIFT) == warp, reader == -2 - warp)
        loose = other & ~self._ordered(self.read_at[piece], heard, same_warp)
        if loose.any():
            raise Race(f"{_who(thread, loose)} writes what another thread has just read")


def _who(thread, flags):
    """The first thread flagged, in words."""
    return thread_name(thread[np.flatnonzero(flags)[0]])
