"""What a launch did: instructions, and the traffic of each array."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32


@dataclass
class Traffic:
    """Accesses of threads to one array or space.

    `loads` and `stores` count accesses of threads by width in bytes; `requests` those of warps;
    `sectors` the 32-byte pieces of memory that each warp's access touches.
    """

    loads: Counter = field(default_factory=Counter)
    stores: Counter = field(default_factory=Counter)
    load_requests: int = 0
    store_requests: int = 0
    load_sectors: int = 0
    store_sectors: int = 0

    @property
    def loaded(self):
        """Bytes that threads have loaded."""
        return sum(width * count for width, count in self.loads.items())

    @property
    def stored(self):
        """Bytes that threads have stored."""
        return sum(width * count for width, count in self.stores.items())

    @property
    def load_efficiency(self):
        """Bytes loaded for each byte of the sectors touched; above 1 where threads share them."""
        return self.loaded / (SECTOR * self.load_sectors) if self.load_sectors else 1.0

    @property
    def store_efficiency(self):
        """Bytes stored for each byte of the sectors touched."""
        return self.stored / (SECTOR * self.store_sectors) if self.store_sectors else 1.0

    def note(self, access, addresses, warps):
        """Count one instruction's accesses."""
        requests, sectors = _pieces(addresses, warps)
        if access.writes:
            self.stores[access.width] += len(addresses)
            self.store_requests += requests
            self.store_sectors += sectors
        else:
            self.loads[access.width] += len(addresses)
            self.load_requests += requests
            self.load_sectors += sectors


def _pieces(addresses, warps):
    """How many warps take part, and the sectors that each touches, added up."""
    sectors = addresses // SECTOR
    new_warp = np.append(True, warps[1:] != warps[:-1])
    step = np.append(0, np.diff(sectors))
    if (step[~new_warp] < 0).any():
        order = np.lexsort((sectors, warps))
        sectors, warps = sectors[order], warps[order]
        step = np.append(0, np.diff(sectors))
    requests = np.count_nonzero(new_warp)
    return int(requests), int(np.count_nonzero(new_warp | (step != 0)))


class Stats:
    """`stats["x"]` is the Traffic of the array named x; "shared" and "local" are spaces."""

    def __init__(self, names=()):
        self.traffic = {name: Traffic() for name in names}
        self.instructions = 0
        self.barriers = 0
        self.barriers_after_exit = 0

    def __getitem__(self, name):
        return self.traffic.setdefault(name, Traffic())

    @property
    def loaded(self):
        """Bytes loaded from arrays."""
        return sum(t.loaded for name, t in self.traffic.items() if name not in ("shared", "local"))

    @property
    def stored(self):
        """Bytes stored to arrays."""
        return sum(t.stored for name, t in self.traffic.items() if name not in ("shared", "local"))
