"""The fake driver as tests see it: what it was asked for, what it holds, what it is to refuse."""

import ctypes
import struct
from pathlib import Path
from typing import NamedTuple

from ..helpers.c_build import output, tool

SOURCE = Path(__file__).with_name("fake_driver.c")

#: Kernels whose parameters are an array and a number of each kind, and two arrays.
PTX = (
    """
.version 8.0
.target sm_80
.address_size 64
.visible .entry mixed(
{array},
    .param .u64 rows, .param .f32 eps, .param .f64 wide
) {{ ret; }}
.visible .entry pair({array}, {array}) {{ ret; }}
.visible .entry nothing() {{ ret; }}
""".format(array=", ".join([".param .u64 p"] * 7)).encode()
    + b"\0"
)


def compiled(folder, without=()):
    """The driver as a shared library that lacks some symbols."""
    path = folder / f"libcuda{''.join(without)}.so"
    hidden = [f"-D{name}=absent_{name}" for name in without]
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    output(tool("gcc", "cc", "clang"), *flags, *hidden, SOURCE, "-o", path, "-lpthread")
    return path


class _Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_char * 1024),
        ("grid", ctypes.c_uint),
        ("block", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("bytes", ctypes.c_ubyte * 4096),
        ("size", ctypes.c_int),
    )


class Launch(NamedTuple):
    entry: str
    grid: int
    block: int
    shared: int
    stream: int
    context: int
    parameters: bytes

    def words(self):
        """The parameters, 8 bytes each."""
        return list(struct.unpack(f"<{len(self.parameters) // 8}q", self.parameters))


CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_ubyte), ctypes.c_int,
)  # fmt: skip


class Driver:
    """The loaded library; what is said to it holds until `reset`."""

    def __init__(self, path):
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.library.fake_log.restype = ctypes.c_char_p
        self.library.fake_launches.restype = ctypes.c_long
        self.library.fake_launch.restype = ctypes.POINTER(_Launch)
        self.library.fake_launch.argtypes = [ctypes.c_long]
        self.library.fake_context.restype = ctypes.c_void_p
        self.library.fake_capture.argtypes = [ctypes.c_void_p]
        self.library.fake_place.argtypes = [ctypes.c_size_t, ctypes.c_int]
        self.library.cuCtxPushCurrent_v2.argtypes = [ctypes.c_void_p]
        self.callback = None

    def reset(self):
        self.library.fake_reset()
        self.callback = None

    def fail(self, name, code, after=0):
        """Let a function return `code`, from its call number `after` on."""
        self.library.fake_fail(name.encode(), code, after)

    def log(self):
        """Every call with its arguments, in order."""
        return self.library.fake_log().decode().splitlines()

    def calls(self, *names):
        """Those of some functions."""
        return [line for line in self.log() if line.partition(" ")[0] in names]

    def launches(self):
        found = []
        for i in range(self.library.fake_launches()):
            each = self.library.fake_launch(i).contents
            parameters = bytes(each.bytes[: each.size])
            found.append(
                Launch(
                    each.entry.decode(), each.grid, each.block, each.shared, each.stream or 0,
                    each.context, parameters,
                )
            )  # fmt: skip
        return found

    def on_launch(self, act):
        """Call ``act(entry, grid, block, shared, stream, parameters)`` at each launch."""

        def called(entry, grid, block, shared, stream, data, size):
            act(entry.decode(), grid, block, shared, stream or 0, bytes(data[:size]))

        self.callback = CALLBACK(called)
        self.library.fake_on_launch(self.callback)

    def live(self, what):
        """How many contexts, modules, events, pools or allocations are held."""
        return self.library.fake_live(what.encode())

    def context(self, device):
        return self.library.fake_context(device)

    def place(self, address, device):
        """Say which device memory lies on; -1: on none."""
        self.library.fake_place(address, device)

    def capture(self, stream):
        """Let a stream be one that a graph is captured from."""
        self.library.fake_capture(stream)

    def trace(self, on):
        self.library.fake_trace(int(on))
