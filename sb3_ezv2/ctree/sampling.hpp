// Actions of squashed Gaussians: tanh(mu + sigma * noise), clipped; see SquashedGaussian in sb3_ezv2/distributions.py. The
// same numbers from every instruction set: nothing here is summed, and products are not fused with sums (see setup.py).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "simd.hpp"

namespace ezv2 {

// Rows whose parameters and actions stay in the nearest cache while they are computed.
constexpr int kSampleRows = 32;

// Written so that NaN stays NaN. A loop by itself, or compilers make branches of it, which they do not vectorise.
EZV2_INLINE void clip(float* x, size_t count, float limit) {
    for (size_t i = 0; i < count; ++i) x[i] = x[i] < -limit ? -limit : x[i] > limit ? limit : x[i];
}

// tanh to 1e-7 for |x| <= 40, and log(1 + e^x) to 1e-6 for -87 <= x <= 0, without calls and branches: loops over them are vectorised.
EZV2_INLINE float fast_tanh(float x) {
    const float e = exp_float(-2.0f * std::abs(x));
    return std::copysign((1.0f - e) / (1.0f + e), x);
}

EZV2_INLINE float fast_log1p_exp(float x) {
    const float e = exp_float(x);
    const float s = e / (2.0f + e), s2 = s * s;  // log(1 + e) = 2 atanh(s), s <= 1/3
    float p = 1.0f / 13;
    p = p * s2 + 1.0f / 11;
    p = p * s2 + 1.0f / 9;
    p = p * s2 + 1.0f / 7;
    p = p * s2 + 1.0f / 5;
    p = p * s2 + 1.0f / 3;
    p = p * s2 + 1.0f;
    return 2.0f * s * p;
}

// params: [rows, 2 * dims] of the policy head; noise: [rows, count, dims], or [count, dims] for all rows; out: [rows, count,
// dims]; scratch: [kSampleRows, 2 * dims].
EZV2_INLINE void sample_blocks(const float* params, int rows, int dims, int count, const float* noise, bool shared, float limit,
                               float* scratch, float* out) {
    const size_t width = size_t(2) * dims, each = size_t(count) * dims;
    for (int first = 0; first < rows; first += kSampleRows) {
        const int n = std::min(kSampleRows, rows - first);
        const size_t half = size_t(n) * dims;
        float *mean = scratch, *std = scratch + half;  // [n, dims]
        float* block = out + first * each;
        for (int r = 0; r < n; ++r) {
            const float* row = params + (first + r) * width;
            for (int d = 0; d < dims; ++d) mean[size_t(r) * dims + d] = row[d];
            for (int d = 0; d < dims; ++d) std[size_t(r) * dims + d] = row[dims + d];
        }
        for (size_t i = 0; i < half; ++i) mean[i] /= 5.0f;
        for (size_t i = 0; i < half; ++i) std[i] += 1.0f;
        clip(mean, half, 40.0f);
        // softplus(y) = max(y, 0) + log(1 + e^-|y|)
        for (size_t i = 0; i < half; ++i) block[i] = std[i];
        clip(block, half, 80.0f);
        for (size_t i = 0; i < half; ++i) mean[i] = 5.0f * fast_tanh(mean[i]);
        for (size_t i = 0; i < half; ++i) block[i] = fast_log1p_exp(-std::abs(block[i]));
        for (size_t i = 0; i < half; ++i) std[i] = (std[i] < 0.0f ? 0.0f : std[i]) + block[i] + 0.1f;
        for (int r = 0; r < n; ++r) {
            const float* z = noise + (shared ? 0 : (first + r) * each);
            for (int c = 0; c < count; ++c) {
                const size_t at = size_t(c) * dims;
                for (int d = 0; d < dims; ++d) {
                    block[r * each + at + d] = mean[size_t(r) * dims + d] + std[size_t(r) * dims + d] * z[at + d];
                }
            }
        }
        clip(block, n * each, 40.0f);
        for (size_t i = 0; i < n * each; ++i) block[i] = fast_tanh(block[i]);
        clip(block, n * each, limit);
    }
}

using SampleFunction = void (*)(const float*, int, int, int, const float*, bool, float, float*, float*);

inline void sample_plain(const float* params, int rows, int dims, int count, const float* noise, bool shared, float limit,
                         float* scratch, float* out) {
    sample_blocks(params, rows, dims, count, noise, shared, limit, scratch, out);
}

#if EZV2_X86
EZV2_AVX2 inline void sample_avx2(const float* params, int rows, int dims, int count, const float* noise, bool shared,
                                  float limit, float* scratch, float* out) {
    sample_blocks(params, rows, dims, count, noise, shared, limit, scratch, out);
}

EZV2_AVX512 inline void sample_avx512(const float* params, int rows, int dims, int count, const float* noise, bool shared,
                                      float limit, float* scratch, float* out) {
    sample_blocks(params, rows, dims, count, noise, shared, limit, scratch, out);
}
#endif

// level: 2 all that the processor has, 1 up to AVX2, 0 plain.
inline SampleFunction sample_function(int level) {
#if EZV2_X86
    if (level >= 2 && has_avx512()) return sample_avx512;
    if (level >= 1 && has_avx2()) return sample_avx2;
#endif
    (void)level;
    return sample_plain;
}

}  // namespace ezv2
