# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
"""What touches the C kernels: one extension module, as calls between modules would cost; its rooms
are the files included below, its C declarations _core.pxd.

A call whose arguments are exact, native, aligned, C-contiguous ndarrays of one type goes straight
down: at 100 ns a row one Python frame would cost half as much again, and a typed memoryview more
than the row. Every other call goes to the handler that fastnorm.dispatch registers here at import;
it checks, converts, and comes back through the ``*_rows`` functions. So all error messages live
there, and this module knows nothing of devices.
"""

import os

import numpy as np

cimport cython
cimport numpy as cnp
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.list cimport PyList_AsTuple, PyList_CheckExact
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.pycapsule cimport PyCapsule_New
from cpython.tuple cimport PyTuple_CheckExact, PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.float cimport DBL_MAX, DBL_MIN, FLT_MAX, FLT_MIN
from libc.math cimport NAN, fabs, isfinite
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcpy, memset, strcpy
from numpy cimport ndarray, npy_intp

cnp.import_array()

#: What arrays may hold, as the C core lists it; tests and benchmarks iterate over these.
DTYPES = ("float32", "float64", "float16", "bfloat16")
#: What is computed in: the half types are loaded and stored only.
COMPUTE_DTYPES = ("float32", "float64")
OPS = (
    "layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward", "add_layer_norm",
    "add_layer_norm_backward", "add_rms_norm", "add_rms_norm_backward", "adaptive_layer_norm",
    "adaptive_layer_norm_backward", "parallel_layer_norm", "segment_layer_norm",
    "segment_layer_norm_backward", "segment_rms_norm", "segment_rms_norm_backward", "moments",
)
#: Those that are defined here, and have a straight path.
STRAIGHT = (
    "layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward", "add_layer_norm",
    "add_rms_norm", "moments",
)

#: Who takes the calls of an op that cannot go straight down.
cdef dict handlers = {}


def register(name, handler):
    """Let `handler` take the calls of op `name` that cannot go straight down."""
    handlers[name] = handler


include "_core_memory.pxi"
include "_core_arrays.pxi"
include "_core_call.pxi"
include "_core_straight.pxi"
include "_core_norms.pxi"
include "_core_gradients.pxi"
include "_core_rows.pxi"
include "_core_framed.pxi"
include "_core_segments.pxi"
include "_core_channels.pxi"
include "_core_weights.pxi"
include "_core_bound.pxi"
include "_core_machine.pxi"
