"""What the compiled modules of this package share."""

from libc.stdint cimport int32_t, int64_t

cdef extern from "tree.hpp" namespace "ezv2" nogil:
    cdef cppclass CTree "ezv2::Tree":
        CTree(int, int, int, int, int, double, double, double, double, int) except +
        int B
        int simulation
        size_t memory()
        void reset(int, const float*, const float*, const float*) except +
        void select(int64_t*, int64_t*, int64_t*) except +
        void backup(const float*, const float*, const float*) except +
        void step(const float*, const float*, const float*, int64_t*, int64_t*, int64_t*) except +
        void best_action(int64_t*)
        void policy(float*) except +
        void root_value(float*)
        void root_visits(int32_t*)
        void q_values(float*) except +
        void mean_depth(float*)
        void nodes(int32_t*, float*)


cdef class Tree:
    cdef CTree* tree
    cdef readonly int num_roots, num_simulations, num_root_actions, num_inner_actions
    cdef readonly object parent, action, edge
    cdef object _parent, _action, _edge
    cdef int64_t* _parent_data
    cdef int64_t* _action_data
    cdef int64_t* _edge_data
    cdef bint _selected

    cdef object _backup(self, str name, reward, value, logits, bint and_select)
    cdef int _size(self) except -1
    cdef int advance(self, const float* reward, const float* value, const float* logits) except -1 nogil
