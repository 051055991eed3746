# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=True, annotation_typing=False
# distutils: language = c++
"""Python face of the batched search trees of ``tree.hpp``: arrays in, arrays out."""

from libc.stdint cimport int32_t, int64_t
from libcpp.vector cimport vector

import numpy as np

cdef extern from "tree.hpp" namespace "ezv2" nogil:
    vector[int32_t] _considered_visits "ezv2::considered_visits"(int, int)
    bint _all_finite "ezv2::all_finite"(const float*, size_t)


def _positive(str name, value) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or not 1 <= value <= 2**30:
        raise ValueError(f"{name} must be a positive integer, not {value!r}")
    return int(value)


def considered_visits(num_considered: int, num_simulations: int) -> np.ndarray:
    """
    Sequential-halving schedule (Karnin et al. 2013, as used in Gumbel MuZero).

    :param num_considered: number of actions that enter the halving
    :param num_simulations: number of simulations
    :return: int32 [num_simulations], the visit count that the root action of each simulation must have so far
    """
    cdef vector[int32_t] schedule = _considered_visits(
        _positive("num_considered", num_considered), _positive("num_simulations", num_simulations)
    )
    return np.array(schedule, dtype=np.int32)


cdef const float[::1] _vector(str name, array, int size):
    cdef const float[::1] view = None
    if isinstance(array, np.ndarray):
        try:
            view = array
        except (ValueError, TypeError, BufferError):
            view = None
    if view is None or view.shape[0] != size:
        if isinstance(array, np.ndarray) and array.dtype == np.float32 and array.shape == (size,):
            raise ValueError(f"{name} must be C-contiguous")
        raise ValueError(f"{name} must be a float32 array of shape [{size}], not {_describe(array)}")
    if not _all_finite(&view[0], size):
        raise ValueError(f"{name} has NaN or infinite entries")
    return view


cdef const float[:, ::1] _matrix(str name, array, int rows, int columns):
    cdef const float[:, ::1] view = None
    if isinstance(array, np.ndarray):
        try:
            view = array
        except (ValueError, TypeError, BufferError):
            view = None
    if view is None or view.shape[0] != rows or view.shape[1] != columns:
        if isinstance(array, np.ndarray) and array.dtype == np.float32 and array.shape == (rows, columns):
            raise ValueError(f"{name} must be C-contiguous")
        raise ValueError(f"{name} must be a float32 array of shape [{rows}, {columns}], not {_describe(array)}")
    if not _all_finite(&view[0, 0], <size_t>rows * columns):
        raise ValueError(f"{name} has NaN or infinite entries")
    return view


def _describe(array) -> str:
    if isinstance(array, np.ndarray):
        return f"{array.dtype} {list(array.shape)}"
    return type(array).__name__


cdef class Tree:
    """
    A batch of Gumbel search trees in flat arrays, one simulation of all roots at a time::

        tree.reset(root_value, root_logits, gumbel)
        tree.select()                              # fills tree.parent, tree.action, tree.edge
        for _ in range(num_simulations):
            ...                                    # the model's step from these parents with these actions
            tree.step(reward, value, logits)       # backup, and the next select but after the last simulation
        tree.best_action(), tree.policy(), tree.root_value()

    The storage is allocated once for ``num_roots`` and reused by every batch of at most so many roots. A root's
    result depends neither on the other roots of its batch nor on the number of threads.

    :param num_roots: largest number of roots of a batch
    :param num_simulations: simulations per root (S)
    :param num_root_actions: candidate actions at the root (K)
    :param num_inner_actions: candidate actions at every other node (M)
    :param num_considered: root actions that enter sequential halving (at most K)
    :param discount: discount of one step
    :param c_visit: of sigma, EfficientZero V2 Eq. 19
    :param c_scale: of sigma, EfficientZero V2 Eq. 19
    :param min_q_range: least range of the q's when they are normalised, in the units of the rewards
        (EfficientZero Eq. 10)
    :param num_threads: threads over the roots
    :raises ValueError: a setting out of its range, or an array of the wrong type, shape or content
    :raises RuntimeError: calls out of order
    """

    def __cinit__(
        self,
        num_roots: int,
        num_simulations: int,
        num_root_actions: int,
        num_inner_actions: int,
        *,
        num_considered: int,
        discount: float,
        c_visit: float = 50.0,
        c_scale: float = 0.1,
        min_q_range: float = 0.01,
        num_threads: int = 1,
    ):
        self.tree = NULL
        self.num_roots = _positive("num_roots", num_roots)
        self.num_simulations = _positive("num_simulations", num_simulations)
        self.num_root_actions = _positive("num_root_actions", num_root_actions)
        self.num_inner_actions = _positive("num_inner_actions", num_inner_actions)
        if not 0.0 <= discount <= 1.0:
            raise ValueError(f"discount must be in [0, 1], not {discount!r}")
        if not 0.0 <= c_visit < np.inf or not 0.0 <= c_scale < np.inf:
            raise ValueError(f"c_visit and c_scale must be finite and not negative, not {c_visit!r} and {c_scale!r}")
        if not 0.0 < min_q_range < np.inf:
            raise ValueError(f"min_q_range must be finite and positive, not {min_q_range!r}")
        self.tree = new CTree(
            self.num_roots, self.num_simulations, self.num_root_actions, self.num_inner_actions,
            _positive("num_considered", num_considered), discount, c_visit, c_scale, min_q_range,
            _positive("num_threads", num_threads),
        )
        self._parent = np.zeros(self.num_roots, dtype=np.int64)
        self._action = np.zeros(self.num_roots, dtype=np.int64)
        self._edge = np.zeros(self.num_roots, dtype=np.int64)
        cdef int64_t[::1] parent_ = self._parent, action_ = self._action, edge_ = self._edge
        self._parent_data, self._action_data, self._edge_data = &parent_[0], &action_[0], &edge_[0]

    def __dealloc__(self):
        del self.tree

    @property
    def nbytes(self) -> int:
        """Bytes held by the trees' storage."""
        return self.tree.memory()

    def reset(self, root_value, root_logits, gumbel) -> None:
        """
        Start a new batch of B searches.

        :param root_value: float32 [B], the network's values of the roots
        :param root_logits: float32 [B, K], prior logits
        :param gumbel: float32 [B, K], Gumbel noise (zeros for none)
        """
        cdef int B
        if not isinstance(root_logits, np.ndarray) or root_logits.ndim != 2:
            raise ValueError(f"root_logits must be a float32 array of shape [B, K], not {_describe(root_logits)}")
        if not 1 <= root_logits.shape[0] <= self.num_roots:
            raise ValueError(f"a batch has 1 to {self.num_roots} roots here, not {root_logits.shape[0]}")
        B = root_logits.shape[0]
        cdef const float[:, ::1] logits_ = _matrix("root_logits", root_logits, B, self.num_root_actions)
        cdef const float[:, ::1] gumbel_ = _matrix("gumbel", gumbel, B, self.num_root_actions)
        cdef const float[::1] value_ = _vector("root_value", root_value, B)
        with nogil:
            self.tree.reset(B, &value_[0], &logits_[0, 0], &gumbel_[0, 0])
        self.parent, self.action, self.edge = self._parent[:B], self._action[:B], self._edge[:B]
        self._selected = False

    def select(self) -> None:
        """
        Walk every tree to an edge that has no child yet and write, for each root, where it is:

        ``parent`` int64 [B], row ``slot * B + root`` of a state pool [(S + 1) * B, ...] (slot 0: the roots,
        simulation s adds slot s + 1); ``action`` int64 [B], index among the parent's candidates; ``edge`` int64 [B],
        row of a pool of candidate actions: ``root * K + action`` at the root, and
        ``B * K + ((slot - 1) * B + root) * M + action`` elsewhere.
        """
        if self.tree.B == 0:
            raise RuntimeError("select() before reset(): there is no batch of roots yet")
        if self._selected:
            raise RuntimeError("select() twice without the backup() between")
        if self.tree.simulation >= self.num_simulations:
            raise RuntimeError(f"all {self.num_simulations} simulations of this batch are done: call reset()")
        with nogil:
            self.tree.select(self._parent_data, self._action_data, self._edge_data)
        self._selected = True

    def backup(self, reward, value, logits=None) -> None:
        """
        Add the selected children and back their values up to the roots.

        :param reward: float32 [B], reward of the selected edges
        :param value: float32 [B], the network's values of the new states
        :param logits: float32 [B, M], prior logits of the new states' actions; None: equal priors
        """
        self._backup("backup", reward, value, logits, False)

    def step(self, reward, value, logits=None) -> None:
        """
        :meth:`backup`, and the :meth:`select` of the next simulation unless this was the last one: one walk over the roots.

        :param reward: float32 [B], reward of the selected edges
        :param value: float32 [B], the network's values of the new states
        :param logits: float32 [B, M], prior logits of the new states' actions; None: equal priors
        """
        self._backup("step", reward, value, logits, True)

    cdef object _backup(self, str name, reward, value, logits, bint and_select):
        if not self._selected:
            raise RuntimeError(f"{name}() before select()")
        cdef int B = self.tree.B
        cdef const float[::1] reward_ = _vector("reward", reward, B), value_ = _vector("value", value, B)
        cdef const float[:, ::1] logits_
        cdef const float* priors = NULL
        if logits is not None:
            logits_ = _matrix("logits", logits, B, self.num_inner_actions)
            priors = &logits_[0, 0]
        with nogil:
            if and_select:
                self.advance(&reward_[0], &value_[0], priors)
            else:
                self.tree.backup(&reward_[0], &value_[0], priors)
                self._selected = False

    cdef int advance(self, const float* reward, const float* value, const float* logits) except -1 nogil:
        """:meth:`step` for compiled callers, who have checked the arrays."""
        if self.tree.simulation + 1 < self.num_simulations:
            self.tree.step(reward, value, logits, self._parent_data, self._action_data, self._edge_data)
        else:
            self.tree.backup(reward, value, logits)
            self._selected = False
        return 0

    cdef int _size(self) except -1:
        if self.tree.B == 0:
            raise RuntimeError("there is no batch of roots yet: call reset()")
        return self.tree.B

    def best_action(self) -> np.ndarray:
        """
        :return: int64 [B], index of the root action with the highest g + logits + sigma(q) among those left at the
            end of sequential halving (a*_S of EfficientZero V2 Eq. 9); ties go to the lowest index
        """
        cdef int64_t[::1] out = np.empty(self._size(), dtype=np.int64)
        self.tree.best_action(&out[0])
        return np.asarray(out)

    def policy(self) -> np.ndarray:
        """:return: float32 [B, K], improved policy softmax(logits + sigma(completed q)) (EfficientZero V2 Eq. 18)"""
        cdef float[:, ::1] out = np.empty((self._size(), self.num_root_actions), dtype=np.float32)
        self.tree.policy(&out[0, 0])
        return np.asarray(out)

    def root_value(self) -> np.ndarray:
        """
        :return: float32 [B], search-based value (EfficientZero V2 Eq. 10-11): mean of the network's root value and
            of the returns of all simulations
        """
        cdef float[::1] out = np.empty(self._size(), dtype=np.float32)
        self.tree.root_value(&out[0])
        return np.asarray(out)

    def visits(self) -> np.ndarray:
        """:return: int32 [B, K], visits of the root actions"""
        cdef int32_t[:, ::1] out = np.empty((self._size(), self.num_root_actions), dtype=np.int32)
        self.tree.root_visits(&out[0, 0])
        return np.asarray(out)

    def q_values(self) -> np.ndarray:
        """:return: float32 [B, K], completed q of the root actions, in the units of the rewards"""
        cdef float[:, ::1] out = np.empty((self._size(), self.num_root_actions), dtype=np.float32)
        self.tree.q_values(&out[0, 0])
        return np.asarray(out)

    def depth(self) -> np.ndarray:
        """:return: float32 [B], mean depth of the simulations so far"""
        cdef float[::1] out = np.empty(self._size(), dtype=np.float32)
        self.tree.mean_depth(&out[0])
        return np.asarray(out)

    def nodes(self) -> dict[str, np.ndarray]:
        """
        The trees themselves, to look at: copies, with a column for each node in the order in which they were made, so that
        column 0 is the root and a parent always comes before its children.

        :return: of N = simulations so far + 1 nodes, int32 [B, N]: ``parent``, the column of a node's parent (-1: the root);
            ``action``, index of the action that leads to it among its parent's candidates (-1: the root); ``visits``, simulations
            that went through it, of the root all. float32 [B, N]: ``prior`` of that action; ``reward``, predicted for it; ``q``,
            reward + discount * value; ``network_value``, the network's value of the node; ``value``, mean of that and of the
            returns of the simulations beyond it. The root has prior 1, reward 0, and its value as ``q``
        """
        cdef int B = self._size(), N = self.tree.simulation + 1
        cdef int32_t[:, :, ::1] integers = np.empty((B, N, 3), dtype=np.int32)
        cdef float[:, :, ::1] numbers = np.empty((B, N, 5), dtype=np.float32)
        self.tree.nodes(&integers[0, 0, 0], &numbers[0, 0, 0])
        names = ("parent", "action", "visits"), ("prior", "reward", "q", "network_value", "value")
        parts = zip(names, (np.asarray(integers), np.asarray(numbers)))
        return {name: part[:, :, i].copy() for group, part in parts for i, name in enumerate(group)}
