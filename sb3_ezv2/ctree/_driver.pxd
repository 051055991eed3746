"""What the compiled modules of this package share."""

cdef int sample(
    const float* params, int rows, int dims, int count, const float* noise, bint shared, float limit, float* scratch, float* out
) except -1 nogil
cdef size_t sample_scratch(int dims) noexcept nogil
