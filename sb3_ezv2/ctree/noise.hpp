// Standard normal noise of a counter: number i of a key is a function of the two alone. Philox4x32-10 (Salmon et al. 2011,
// "Parallel random numbers: as easy as 1, 2, 3") makes the bits, the inverse of the error function (Giles 2012,
// "Approximating the erfinv function") the numbers. The same from every instruction set: nothing is summed, products are not
// fused with sums (see setup.py), and division and square root are rounded correctly everywhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "simd.hpp"

namespace ezv2 {

constexpr int kCounters = 16;             // of a tile, computed side by side
constexpr int kNumbers = 4 * kCounters;  // of a tile: four from each counter

// out: [4, kCounters], the words of the counters tile * kCounters and following.
EZV2_INLINE void philox_tile(uint64_t key, uint64_t tile, uint32_t* out) {
    const uint64_t first = tile * kCounters;
    for (int j = 0; j < kCounters; ++j) {
        uint32_t a = uint32_t(first) + uint32_t(j), b = uint32_t(first >> 32), c = 0, d = 0;
        uint32_t key_a = uint32_t(key), key_b = uint32_t(key >> 32);
#if defined(__GNUC__)
#pragma GCC unroll 10
#endif
        for (int round = 0; round < 10; ++round) {
            const uint64_t from_a = uint64_t(0xD2511F53u) * a, from_c = uint64_t(0xCD9E8D57u) * c;
            a = uint32_t(from_c >> 32) ^ b ^ key_a;
            c = uint32_t(from_a >> 32) ^ d ^ key_b;
            b = uint32_t(from_c);
            d = uint32_t(from_a);
            key_a += 0x9E3779B9u;
            key_b += 0xBB67AE85u;
        }
        out[j] = a;
        out[kCounters + j] = b;
        out[2 * kCounters + j] = c;
        out[3 * kCounters + j] = d;
    }
}

// -log(y) to 1e-7, for 2^-32 <= y <= 1.
EZV2_INLINE float minus_log(float y) {
    uint32_t bits;
    std::memcpy(&bits, &y, sizeof bits);
    bits -= 0x3F3504F3u;  // sqrt(1/2): the rest is a power of two times a number from sqrt(1/2) to sqrt(2)
    const int32_t exponent = int32_t(bits) >> 23;
    bits = (bits & 0x7FFFFFu) + 0x3F3504F3u;
    float m;
    std::memcpy(&m, &bits, sizeof m);
    const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;  // log(m) = 2 atanh(s), |s| < 0.172
    float p = 1.0f / 9;
    p = p * s2 + 1.0f / 7;
    p = p * s2 + 1.0f / 5;
    p = p * s2 + 1.0f / 3;
    p = p * s2 + 1.0f;
    return -2.0f * s * p - float(exponent) * 0.69314718f;
}

// The sign is the first bit's; the others are t = P(|Z| > |z|), a multiple of 2^-31 plus 2^-32, so that |z| < 6.35. Relative to
// the exact number 2e-7 to |z| = 5.4, then the polynomial is continued beyond its range: 1e-5 to 5.7, 4e-4 to 6.34. A selection
// of each coefficient is cheaper than both polynomials, and no branch.
EZV2_INLINE float normal_of_bits(uint32_t word) {
    const float t = float(int32_t(word & 0x7FFFFFFFu)) * 4.65661287e-10f + 2.32830644e-10f;
    const float w = minus_log(t * (2.0f - t)), root = std::sqrt(w < 0.0f ? 0.0f : w);
    const bool near = w < 5.0f;
    const float v = near ? w - 2.5f : root - 3.0f;
    float p = near ? 2.81022636e-08f : -2.00214257e-04f;
    p = p * v + (near ? 3.43273939e-07f : 1.00950558e-04f);
    p = p * v + (near ? -3.5233877e-06f : 1.34934322e-03f);
    p = p * v + (near ? -4.39150654e-06f : -3.67342844e-03f);
    p = p * v + (near ? 2.1858087e-04f : 5.73950773e-03f);
    p = p * v + (near ? -1.25372503e-03f : -7.6224613e-03f);
    p = p * v + (near ? -4.17768164e-03f : 9.43887047e-03f);
    p = p * v + (near ? 2.46640727e-01f : 1.00167406f);
    p = p * v + (near ? 1.50140941f : 2.83297682f);
    return std::copysign(1.41421356f * p * (1.0f - t), (word >> 31) != 0 ? -1.0f : 1.0f);
}

EZV2_INLINE void normal_blocks(uint64_t key, size_t count, float* out) {
    uint32_t words[kNumbers];
    float rest[kNumbers];
    const size_t whole = count / kNumbers;
    for (size_t tile = 0; tile < whole; ++tile) {
        philox_tile(key, tile, words);
        for (int i = 0; i < kNumbers; ++i) out[tile * kNumbers + i] = normal_of_bits(words[i]);
    }
    if (whole * kNumbers == count) return;
    philox_tile(key, whole, words);
    for (int i = 0; i < kNumbers; ++i) rest[i] = normal_of_bits(words[i]);
    std::copy(rest, rest + (count - whole * kNumbers), out + whole * kNumbers);
}

using NormalFunction = void (*)(uint64_t, size_t, float*);

inline void normal_plain(uint64_t key, size_t count, float* out) { normal_blocks(key, count, out); }

#if EZV2_X86
EZV2_AVX2 inline void normal_avx2(uint64_t key, size_t count, float* out) { normal_blocks(key, count, out); }

EZV2_AVX512 inline void normal_avx512(uint64_t key, size_t count, float* out) { normal_blocks(key, count, out); }
#endif

// level: 2 all that the processor has, 1 up to AVX2, 0 plain.
inline NormalFunction normal_function(int level) {
#if EZV2_X86
    if (level >= 2 && has_avx512()) return normal_avx512;
    if (level >= 1 && has_avx2()) return normal_avx2;
#endif
    (void)level;
    return normal_plain;
}

}  // namespace ezv2
