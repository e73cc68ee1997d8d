# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
"""The CUDA driver, found at run time, and what a call on device arrays costs the host.

Nothing of CUDA is needed to build this file, and nothing is loaded before the first array on a
device comes. Arrays are described where they lie, by whichever of their library's interfaces costs
least; an Op finds what it has to do by the bytes of that description, and launches without a Python
frame. No function here waits for the device.
"""

import os
import sys
import threading

import numpy as np

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_Check
from cpython.list cimport PyList_CheckExact
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_Check
from cpython.object cimport PyObject
from cpython.pycapsule cimport (
    PyCapsule_CheckExact, PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_SetName,
)
from cpython.tuple cimport PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset


cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *) except NULL


cdef extern from *:
    """
    /* A reference of its own: another thread may drop the dict's. */
    static CYTHON_INLINE PyObject *found_or(PyObject *dict, PyObject *key, PyObject *otherwise)
    {
        PyObject *found;
    #if PY_VERSION_HEX >= 0x030D0000
        if (PyDict_GetItemRef(dict, key, &found) < 0)
            return NULL;
    #else
        found = PyDict_GetItemWithError(dict, key);
        if (found == NULL && PyErr_Occurred())
            return NULL;
        Py_XINCREF(found);
    #endif
        return found ? found : Py_NewRef(otherwise);
    }
    """
    object found_or(dict, object, object)


cdef extern from "dlfcn.h" nogil:
    void *dlopen(const char *, int)
    void *dlsym(void *, const char *)
    const char *dlerror()
    int RTLD_NOW, RTLD_LOCAL


cdef extern from "pthread.h" nogil:
    int pthread_atfork(void (*)() noexcept nogil, void (*)() noexcept nogil,
                       void (*)() noexcept nogil)


include "_cuda_driver.pxi"
include "_cuda_arrays.pxi"
include "_cuda_libraries.pxi"
include "_cuda_dlpack.pxi"
include "_cuda_described.pxi"
include "_cuda_kernels.pxi"
include "_cuda_calls.pxi"
