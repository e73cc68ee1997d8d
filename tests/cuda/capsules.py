"""DLPack's structs, made by hand, and an owner that counts what it is given back."""

import ctypes

from .libraries import address

new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("ordinal", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", Deleter))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    )


class Exporter:
    """DLPack alone; `deleted` counts what its consumers gave back."""

    def __init__(self, array, *, versioned=True, major=1, flags=0, device=(2, 0), **changed):
        self.memory, self.versioned = array, versioned
        self.device = device
        self.exported = self.deleted = 0
        self.streams = []
        self.shape = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
        self.strides = (ctypes.c_int64 * max(array.ndim, 1))(
            *[step // array.itemsize for step in array.strides]
        )
        tensor = {
            "data": address(array), "device": device[0], "ordinal": device[1], "ndim": array.ndim,
            "code": 2, "bits": 8 * array.itemsize, "lanes": 1,
            "shape": ctypes.cast(self.shape, ctypes.POINTER(ctypes.c_int64)),
            "strides": ctypes.cast(self.strides, ctypes.POINTER(ctypes.c_int64)), **changed,
        }  # fmt: skip
        self.deleter = Deleter(self._count)
        if versioned:
            self.struct = _Versioned(major, 0, None, self.deleter, flags, DLTensor(**tensor))
        else:
            self.struct = _Managed(DLTensor(**tensor), None, self.deleter)
        self.name = b"dltensor_versioned" if versioned else b"dltensor"

    def _count(self, pointer):
        assert pointer == ctypes.addressof(self.struct)
        self.deleted += 1

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None, max_version=None):
        assert max_version is not None
        self.streams.append(stream)
        self.exported += 1
        return new_capsule(ctypes.addressof(self.struct), self.name, None)

    def settled(self):
        return self.exported == self.deleted
