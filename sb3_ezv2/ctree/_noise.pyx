# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=True, annotation_typing=False
# distutils: language = c++
"""Python face of ``noise.hpp``: standard normal noise for whole searches at once."""

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint64_t

import operator

import numpy as np

cdef extern from "noise.hpp" namespace "ezv2" nogil:
    ctypedef void (*NormalFunction)(uint64_t, size_t, float*)
    NormalFunction normal_function(int)


def fill_normal(key, out, int level=2) -> None:
    """
    Standard normal numbers, of which the first n of a key are always the same, whatever the shape of the array, the machine
    and the thread.

    Number i (of the flat array) is made of word ``i // 16 % 4`` of the counter ``i // 64 * 16 + i % 16`` of Philox4x32-10 and
    the inverse of the normal distribution, to float32's precision up to 5.4 and 4e-4 beyond; none is larger than 6.35.

    :param key: from 0 to 2**64 - 1; other keys give independent numbers
    :param out: float32, C-contiguous, of any shape; is filled
    :param level: 2: the best instructions that the processor has, 1: at most AVX2, 0: plain; the same numbers from all
    :raises TypeError: the key is no integer
    :raises ValueError: the key is out of range, or the array of another type or layout
    """
    cdef Py_buffer buffer
    cdef uint64_t number
    cdef size_t count
    cdef NormalFunction fill = normal_function(level)
    key = operator.index(key)
    if not 0 <= key < 2**64:
        raise ValueError(f"key must be from 0 to 2**64 - 1, not {key}")
    number = key
    if not isinstance(out, np.ndarray) or out.dtype != np.float32 or not out.flags.carray:
        found = type(out).__name__
        if isinstance(out, np.ndarray):
            found = f"{out.dtype}, strides {out.strides}, {'writeable' if out.flags.writeable else 'read-only'}"
        raise ValueError(f"out must be a writeable C-contiguous float32 array, not {found}")
    PyObject_GetBuffer(out, &buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | PyBUF_WRITABLE)
    count = buffer.len // sizeof(float)
    with nogil:
        fill(number, count, <float*>buffer.buf)
    PyBuffer_Release(&buffer)
