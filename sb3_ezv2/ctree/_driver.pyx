# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=True, annotation_typing=False
# distutils: language = c++
"""Python face of ``driver.hpp`` and ``sampling.hpp``: the simulations of a search around a model that is called from Python."""

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t
from libcpp.vector cimport vector

from sb3_ezv2.ctree._tree cimport CTree, Tree

import numpy as np

cdef extern from "tree.hpp" namespace "ezv2" nogil:
    bint _all_finite "ezv2::all_finite"(const float*, size_t)

cdef extern from "driver.hpp" namespace "ezv2" nogil:
    int kSampleRows
    ctypedef void (*SampleFunction)(const float*, int, int, int, const float*, bint, float, float*, float*)
    SampleFunction sample_function(int)

    cdef cppclass Pools:
        float* states
        size_t width
        float* leaf_states
        float* actions
        float* leaf_actions
        const float* noise
        bint shared_noise
        int dims
        float limit

    cdef cppclass CDriver "ezv2::Driver":
        CDriver(CTree&, const Pools&, int64_t*, int64_t*, int64_t*, int) except +
        void step(const float*, const float*, const float*, const float*, bint) except +

cdef SampleFunction _sample = sample_function(2)


cdef int sample(
    const float* params, int rows, int dims, int count, const float* noise, bint shared, float limit, float* scratch, float* out
) except -1 nogil:
    """:func:`sample_actions` for compiled callers, who have checked the arrays. :param scratch: [sample_scratch(dims)]"""
    _sample(params, rows, dims, count, noise, shared, limit, scratch, out)
    return 0


cdef size_t sample_scratch(int dims) noexcept nogil:
    return <size_t>kSampleRows * 2 * dims


def sample_actions(
    const float[:, ::1] params not None,
    const float[:, :, ::1] noise not None,
    float limit,
    float[:, ::1] out not None,
    int level=2,
) -> None:
    """
    Actions of squashed Gaussians, tanh(mu + sigma * noise), clipped; see :class:`sb3_ezv2.distributions.SquashedGaussian`.

    :param params: float32 [B, 2A], output of the policy head
    :param noise: float32 [B or 1, M, A], standard normal
    :param limit: actions are clipped to +-limit
    :param out: float32 [B * M, A]
    :param level: 2: the best instructions that the processor has, 1: at most AVX2, 0: plain; the same results from all
    :raises ValueError: shapes that do not belong together
    """
    cdef Py_ssize_t rows = params.shape[0], count = noise.shape[1], dims = noise.shape[2]
    cdef vector[float] scratch
    if (
        rows < 1 or count < 1 or dims < 1 or params.shape[1] != 2 * dims or (noise.shape[0] != rows and noise.shape[0] != 1)
        or out.shape[0] != rows * count or out.shape[1] != dims
    ):
        raise ValueError(
            "sample_actions needs params [B, 2A], noise [B or 1, M, A] and out [B * M, A], not "
            f"{params.shape[0], params.shape[1]}, {noise.shape[0], noise.shape[1], noise.shape[2]} "
            f"and {out.shape[0], out.shape[1]}"
        )
    scratch.resize(sample_scratch(<int>dims))
    with nogil:
        sample_function(level)(
            &params[0, 0], <int>rows, <int>dims, <int>count, &noise[0, 0, 0], noise.shape[0] == 1, limit,
            scratch.data(), &out[0, 0],
        )


cdef const float* _floats(str name, array, Py_ssize_t rows, Py_ssize_t width) except NULL:
    """
    Faster than a typed memoryview, of which a small search would need too many.

    :param array: is to be float32, C-contiguous and of ``rows`` rows of ``width`` numbers; 0: of ``rows`` numbers
    :return: its memory, which is valid as long as the caller holds the array
    """
    cdef Py_buffer buffer
    cdef const float* data = NULL
    if isinstance(array, np.ndarray):
        try:
            PyObject_GetBuffer(array, &buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
        except (ValueError, BufferError):
            raise ValueError(f"{name} must be C-contiguous, of shape {[rows, width] if width else [rows]}") from None
        if (
            buffer.format[0] == b"f" and buffer.format[1] == 0 and buffer.ndim >= 1 and (width > 0 or buffer.ndim == 1)
            and buffer.shape[0] == rows and buffer.len == rows * max(width, 1) * <Py_ssize_t>sizeof(float)
        ):
            data = <const float*>buffer.buf
        PyBuffer_Release(&buffer)
    if data == NULL:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} must be a float32 array of shape {[rows, width] if width else [rows]}, not {found}")
    return data


cdef class Driver:
    """
    All of a search but the model: one call per simulation, whose inputs are the model's outputs::

        tree.reset(root_value, root_logits, gumbel)
        tree.select()
        driver = Driver(tree, states, leaf_states, actions, leaf_actions, noise, limit)   # fills the leaves
        for _ in range(num_simulations):
            driver.step(*model(leaf_states, leaf_actions))                                # and again

    Where the actions are discrete, the model's step takes ``tree.action``. Arrays are written in place and must not be
    resized while the driver is in use.

    :param tree: after ``reset`` of B roots and ``select``
    :param states: float32 [(S + 1) * B, ...], the first B filled; gets those of the new nodes
    :param leaf_states: float32 [B, ...], gets the states that the model's next step begins with
    :param actions: float32 [B * K + S * B * M, A], the first B * K filled; gets the candidates of the new nodes. None: the
        actions are discrete
    :param leaf_actions: float32 [B, A], gets the actions of the model's next step; None as ``actions``
    :param noise: float32 [S, B or 1, M, A], standard normal; None as ``actions``
    :param limit: actions are clipped to +-limit
    :param level: 2: the best instructions that the processor has, 1: at most AVX2, 0: plain; the same results from all
    :raises ValueError: arrays of the wrong type or shape
    :raises RuntimeError: the tree is not at the beginning of a search
    """

    cdef CDriver* driver
    cdef Tree tree
    cdef object _arrays
    cdef int _rows, _outputs
    cdef Py_ssize_t _width

    def __cinit__(
        self,
        Tree tree not None,
        float[:, ::1] states not None,
        float[:, ::1] leaf_states not None,
        float[:, ::1] actions=None,
        float[:, ::1] leaf_actions=None,
        const float[:, :, :, ::1] noise=None,
        float limit=1.0,
        int level=2,
    ):
        cdef Pools pools
        cdef int S = tree.num_simulations, K = tree.num_root_actions, M = tree.num_inner_actions
        self.driver = NULL
        if tree.tree.B == 0 or not tree._selected or tree.tree.simulation != 0:
            raise RuntimeError("a Driver needs a tree after reset() and select()")
        cdef Py_ssize_t rows = tree.tree.B, width = states.shape[1], dims = 0
        if width < 1 or states.shape[0] != (S + 1) * rows:
            raise ValueError(f"states must have the shape [{(S + 1) * rows}, D], not {[states.shape[0], width]}")
        if leaf_states.shape[0] != rows or leaf_states.shape[1] != width:
            raise ValueError(
                f"leaf_states must have the shape [{rows}, {width}], not {[leaf_states.shape[0], leaf_states.shape[1]]}"
            )
        pools.states, pools.width, pools.leaf_states = &states[0, 0], width, &leaf_states[0, 0]
        pools.actions = pools.leaf_actions = NULL
        pools.noise = NULL
        pools.shared_noise = False
        if actions is not None or leaf_actions is not None or noise is not None:
            if actions is None or leaf_actions is None or noise is None:
                raise ValueError("actions, leaf_actions and noise go together: all of them or, for discrete actions, none")
            dims = actions.shape[1]
            if dims < 1 or actions.shape[0] != rows * (K + <Py_ssize_t>S * M):
                raise ValueError(
                    f"actions must have the shape [{rows * (K + <Py_ssize_t>S * M)}, A], not {[actions.shape[0], dims]}"
                )
            if leaf_actions.shape[0] != rows or leaf_actions.shape[1] != dims:
                raise ValueError(
                    f"leaf_actions must have the shape [{rows}, {dims}], not {[leaf_actions.shape[0], leaf_actions.shape[1]]}"
                )
            if (
                noise.shape[0] != S or (noise.shape[1] != rows and noise.shape[1] != 1)
                or noise.shape[2] != M or noise.shape[3] != dims
            ):
                raise ValueError(
                    f"noise must have the shape [{S}, {rows} or 1, {M}, {dims}], "
                    f"not {[noise.shape[i] for i in range(4)]}"
                )
            pools.actions, pools.leaf_actions, pools.noise = &actions[0, 0], &leaf_actions[0, 0], &noise[0, 0, 0, 0]
            pools.shared_noise = noise.shape[1] == 1
        pools.dims, pools.limit = <int>dims, limit
        self.tree, self._rows, self._width = tree, <int>rows, width
        self._outputs = M if actions is None else 2 * <int>dims
        self._arrays = states, leaf_states, actions, leaf_actions, noise  # keeps them alive
        self.driver = new CDriver(tree.tree[0], pools, tree._parent_data, tree._action_data, tree._edge_data, level)

    def __dealloc__(self):
        del self.driver

    def step(self, new_states, reward, value, policy) -> None:
        """
        Everything between two steps of the model: states and candidates into their pools, backup, the next selection, and
        ``leaf_states`` and ``leaf_actions`` (or ``tree.action``) for the next step. After the last simulation the backup alone.

        :param new_states: float32 [B, ...], the model's next states
        :param reward: float32 [B]
        :param value: float32 [B], of the new states
        :param policy: float32, of the new states: [B, 2A] output of the policy head, or [B, M] logits of discrete actions
        :raises ValueError: arrays of the wrong type, shape or layout, NaN or infinite entries
        :raises RuntimeError: the simulations are done, or the tree was used otherwise since
        """
        cdef Tree tree = self.tree
        cdef int rows = self._rows
        cdef Py_ssize_t width = self._width, outputs = self._outputs
        if not tree._selected or tree.tree.B != rows:
            raise RuntimeError("step() after the last simulation, or the tree was used otherwise since the Driver was made")
        cdef const float* new_states_ = _floats("new_states", new_states, rows, width)
        cdef const float* reward_ = _floats("reward", reward, rows, 0)
        cdef const float* value_ = _floats("value", value, rows, 0)
        cdef const float* policy_ = _floats("policy", policy, rows, outputs)
        if not _all_finite(reward_, rows):
            raise ValueError("reward has NaN or infinite entries")
        if not _all_finite(value_, rows):
            raise ValueError("value has NaN or infinite entries")
        if not _all_finite(policy_, rows * outputs):
            raise ValueError("policy has NaN or infinite entries")
        cdef bint last = tree.tree.simulation + 1 >= tree.num_simulations
        with nogil:
            self.driver.step(new_states_, reward_, value_, policy_, last)
        if last:
            tree._selected = False
