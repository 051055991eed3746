# cython: language_level=3, boundscheck=False, wraparound=False, embedsignature=True, annotation_typing=False
# distutils: language = c++
"""Python face of the state model of ``mlp.hpp``, and whole searches with it."""

from libc.stdint cimport int64_t
from libc.string cimport memcmp
from libcpp.vector cimport vector

from sb3_ezv2.ctree._driver cimport sample, sample_scratch
from sb3_ezv2.ctree._tree cimport Tree

import numpy as np

cdef extern from "tree.hpp" namespace "ezv2" nogil:
    bint _all_finite "ezv2::all_finite"(const float*, size_t)

cdef extern from "mlp.hpp" namespace "ezv2" nogil:
    cdef cppclass Linear:
        int inputs "in"
        int out
        void pack(const float*, const float*, int, int) except +

    cdef cppclass Norm:
        void pack(const float*, const float*, int) except +

    cdef cppclass Block:
        Norm norm
        Linear first
        Linear second

    cdef cppclass Head:
        Block block
        Norm norm
        vector[Linear] layers

    cdef cppclass Support:
        vector[float] bins
        float scale
        bint inverse_h

    cdef cppclass CMlp "ezv2::Mlp":
        bint discrete
        int features, state_dim, action_dim
        vector[float] feature_mean, feature_std_inverse
        Linear represent, embedding, joint_first, joint_second
        Norm represent_norm, embedding_norm, joint_norm
        vector[Block] represent_blocks, dynamics_blocks
        Head reward_head, value_head, policy_head
        Support reward_support, value_support
        void allocate(int) except +
        void initial(int, const float*, float*, float*, float*)
        void step(int, const float*, const int64_t*, const float*, const int64_t*, float*, float*, float*, float*)


cdef int _pack_linear(Linear* layer, arrays, int inputs) except -1:
    """:param arrays: weight [out, in], bias [out] :param inputs: in :return: out"""
    cdef const float[:, ::1] weight = arrays[0]
    cdef const float[::1] bias = arrays[1]
    if weight.shape[0] < 1 or weight.shape[1] != inputs or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"a layer has the shapes {np.shape(arrays[0])} and {np.shape(arrays[1])} after {inputs} inputs")
    layer.pack(&weight[0, 0], &bias[0], <int>weight.shape[0], inputs)
    return <int>weight.shape[0]


cdef int _pack_norm(Norm* norm, arrays, int width) except -1:
    """:param arrays: weight and bias [width]"""
    cdef const float[::1] scale = arrays[0], shift = arrays[1]
    if scale.shape[0] != width or shift.shape[0] != width:
        raise ValueError(f"a normalisation has the shapes {np.shape(arrays[0])} and {np.shape(arrays[1])} for {width} inputs")
    norm.pack(&scale[0], &shift[0], width)
    return 0


cdef int _pack_block(Block* block, arrays, int width) except -1:
    """:param arrays: norm, first, second"""
    _pack_norm(&block.norm, arrays[0], width)
    if _pack_linear(&block.second, arrays[2], _pack_linear(&block.first, arrays[1], width)) != width:
        raise ValueError("a residual block must have as many outputs as inputs")
    return 0


cdef int _pack_head(Head* head, arrays, int width, int outputs) except -1:
    """:param arrays: block, norm, list of layers"""
    cdef Py_ssize_t i, count = len(arrays[2])
    _pack_block(&head.block, arrays[0], width)
    _pack_norm(&head.norm, arrays[1], width)
    head.layers.resize(count)
    for i in range(count):
        width = _pack_linear(&head.layers[i], arrays[2][i], width)
    if count == 0 or width != outputs:
        raise ValueError(f"a head has {width} outputs instead of {outputs}")
    return 0


cdef int _pack_support(Support* support, arrays) except -1:
    """:param arrays: bins, scale, whether the inverse of h is to be taken"""
    cdef const float[::1] bins = arrays[0]
    cdef Py_ssize_t i
    if bins.shape[0] % 2 == 0:
        raise ValueError("a support needs an odd number of bins")
    support.bins.resize(bins.shape[0])
    for i in range(bins.shape[0]):
        support.bins[i] = bins[i]
    support.scale = arrays[1]
    support.inverse_h = arrays[2]
    return <int>bins.shape[0]


cdef class Mlp:
    """
    The state model in C++, for batches so small that calling a tensor library takes longer than the arithmetic.

    :param weights: by their names, float32 arrays and nestings of them as
        :func:`sb3_ezv2.inference.export_weights` makes them
    :param discrete: the actions are indices
    :param sources: the float32 arrays that the weights were made from, one-dimensional; :meth:`is_current` compares
        them with what they were
    :param level: 2: the best instructions that the processor has, 1: at most AVX2, 0: plain
    :raises ValueError: shapes that do not belong together
    """

    cdef CMlp mlp
    cdef readonly int features, state_dim, action_dim, outputs
    cdef readonly bint discrete
    cdef list _sources
    cdef vector[const float*] _live
    cdef vector[vector[float]] _copies
    cdef vector[float] _reward, _value, _policy, _scratch

    def __init__(self, dict weights, bint discrete, list sources, int level=2):
        cdef CMlp* mlp = &self.mlp
        cdef const float[::1] mean = weights["feature_mean"], inverse = weights["feature_std_inverse"]
        cdef int features = <int>mean.shape[0], state_dim, embedded, joint, i
        cdef int action_dim = np.shape(weights["embedding"][0])[1]
        if inverse.shape[0] != features:
            raise ValueError("the statistics of the features differ in width")
        mlp.feature_mean.resize(features)
        mlp.feature_std_inverse.resize(features)
        for i in range(features):
            mlp.feature_mean[i] = mean[i]
            mlp.feature_std_inverse[i] = inverse[i]
        state_dim = _pack_linear(&mlp.represent, weights["represent"], features)
        _pack_norm(&mlp.represent_norm, weights["represent_norm"], state_dim)
        _pack_blocks(&mlp.represent_blocks, weights["represent_blocks"], state_dim)
        embedded = _pack_linear(&mlp.embedding, weights["embedding"], action_dim)
        _pack_norm(&mlp.embedding_norm, weights["embedding_norm"], embedded)
        _pack_norm(&mlp.joint_norm, weights["joint_norm"], state_dim + embedded)
        joint = _pack_linear(&mlp.joint_first, weights["joint_first"], state_dim + embedded)
        if _pack_linear(&mlp.joint_second, weights["joint_second"], joint) != state_dim:
            raise ValueError("the dynamics must give a state")
        _pack_blocks(&mlp.dynamics_blocks, weights["dynamics_blocks"], state_dim)
        _pack_head(&mlp.reward_head, weights["reward_head"], state_dim, _pack_support(&mlp.reward_support, weights["reward_support"]))
        _pack_head(&mlp.value_head, weights["value_head"], state_dim, _pack_support(&mlp.value_support, weights["value_support"]))
        self.outputs = action_dim if discrete else 2 * action_dim
        _pack_head(&mlp.policy_head, weights["policy_head"], state_dim, self.outputs)
        mlp.discrete = self.discrete = discrete
        mlp.features = self.features = features
        mlp.state_dim = self.state_dim = state_dim
        mlp.action_dim = self.action_dim = action_dim
        mlp.allocate(level)
        self._sources = sources
        self._remember()

    cdef int _remember(self) except -1:
        cdef const float[::1] view
        cdef Py_ssize_t i
        self._live.clear()
        self._copies.resize(len(self._sources))
        for i, array in enumerate(self._sources):
            view = array
            self._live.push_back(&view[0])
            self._copies[i].assign(&view[0], &view[0] + view.shape[0])
        return 0

    def is_current(self) -> bool:
        """:return: whether the sources still hold, bit for bit, what they held when this was made"""
        cdef size_t i
        cdef bint same = True
        with nogil:
            for i in range(self._live.size()):
                if memcmp(self._live[i], self._copies[i].data(), self._copies[i].size() * sizeof(float)) != 0:
                    same = False
                    break
        return same

    def initial(self, const float[:, ::1] features not None) -> tuple:
        """
        :param features: float32 [B, F], before normalisation
        :return: float32 state [B, D], value [B], output of the policy head [B, n] or [B, 2A]
        """
        cdef int rows = <int>features.shape[0]
        if rows < 1 or features.shape[1] != self.features:
            raise ValueError(f"features must have the shape [B, {self.features}]")
        cdef float[:, ::1] state = np.empty((rows, self.state_dim), np.float32)
        cdef float[::1] value = np.empty(rows, np.float32)
        cdef float[:, ::1] policy = np.empty((rows, self.outputs), np.float32)
        with nogil:
            self.mlp.initial(rows, &features[0, 0], &state[0, 0], &value[0], &policy[0, 0])
        return np.asarray(state), np.asarray(value), np.asarray(policy)

    def search(
        self, Tree tree not None, float[:, ::1] states, float[:, ::1] actions, const float[:, :, :, ::1] noise, float limit
    ) -> None:
        """
        All simulations of B searches.

        :param tree: after ``reset`` and ``select``
        :param states: float32 [(S + 1) * B, D], the first B of them filled; gets the others
        :param actions: float32 [B * K + S * B * M, A], the first B * K of them filled; gets the others. None if the
            actions are discrete
        :param noise: float32 [S, B or 1, M, A], standard normal. None if the actions are discrete
        :param limit: actions are clipped to +-limit
        :raises ValueError: arrays of the wrong shape; the model gave NaN or infinite values
        """
        cdef int rows, S = tree.num_simulations, K = tree.num_root_actions, M = tree.num_inner_actions
        cdef int simulation, D = self.state_dim, A = self.action_dim
        cdef const float* logits = NULL
        cdef const int64_t* chosen = tree._action_data
        cdef bint shared_noise = False, finite = True
        if tree.tree.B == 0 or not tree._selected or tree.tree.simulation != 0:
            raise RuntimeError("search() needs a tree after reset() and select()")
        rows = tree.tree.B
        if states is None or states.shape[0] != (S + 1) * rows or states.shape[1] != D:
            raise ValueError(f"states must have the shape [{(S + 1) * rows}, {D}]")
        if self.discrete:
            if M != A or K != A:
                raise ValueError(f"a tree of {A} actions is needed")
        else:
            if actions is None or actions.shape[0] != rows * (K + S * M) or actions.shape[1] != A:
                raise ValueError(f"actions must have the shape [{rows * (K + S * M)}, {A}]")
            shared_noise = noise is not None and noise.shape[1] == 1
            if (
                noise is None or noise.shape[0] != S or not (shared_noise or noise.shape[1] == rows)
                or noise.shape[2] != M or noise.shape[3] != A
            ):
                raise ValueError(f"noise must have the shape [{S}, {rows}, {M}, {A}]")
            chosen = tree._edge_data
        self._reward.resize(rows)
        self._value.resize(rows)
        self._policy.resize(<size_t>rows * self.outputs)
        self._scratch.resize(0 if self.discrete else sample_scratch(A))
        cdef float* reward = self._reward.data()
        cdef float* value = self._value.data()
        cdef float* policy = self._policy.data()
        cdef float* scratch = self._scratch.data()
        cdef float* state = &states[0, 0]
        cdef float* action = NULL
        if not self.discrete:
            action = &actions[0, 0]
        if self.discrete:
            logits = policy
        with nogil:
            for simulation in range(S):
                self.mlp.step(
                    rows, state, tree._parent_data, action, chosen, state + <size_t>(simulation + 1) * rows * D, reward, value, policy
                )
                finite = (
                    _all_finite(reward, rows) and _all_finite(value, rows) and _all_finite(policy, <size_t>rows * self.outputs)
                )
                if not finite:
                    break
                if not self.discrete:
                    sample(
                        policy, rows, A, M, &noise[simulation, 0, 0, 0], shared_noise, limit, scratch,
                        action + (<size_t>rows * K + <size_t>simulation * rows * M) * A,
                    )
                tree.advance(reward, value, logits)
        if not finite:
            raise ValueError(f"the model's outputs in simulation {simulation} cannot be searched: they have NaN or infinite entries")


cdef int _pack_blocks(vector[Block]* blocks, arrays, int width) except -1:
    cdef Py_ssize_t i
    blocks.resize(len(arrays))
    for i in range(len(arrays)):
        _pack_block(&blocks[0][i], arrays[i], width)
    return 0
