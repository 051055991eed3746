// Instruction sets: loops are compiled for several of them and one is chosen at run time, so that a binary runs on every
// machine of its architecture. On compilers without these extensions plain loops serve.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define EZV2_INLINE inline __attribute__((always_inline))
#else
#define EZV2_INLINE inline
#endif

#if defined(__GNUC__) && defined(__x86_64__)
#define EZV2_X86 1
#define EZV2_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define EZV2_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace ezv2 {

#if EZV2_X86
inline bool has_avx512() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

inline bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

// Asks for the cache line of an address.
EZV2_INLINE void fetch(const void* address) {
#if defined(__GNUC__)
    __builtin_prefetch(address);
#else
    (void)address;
#endif
}

// e^x to 1e-7, for -87 <= x <= 0: a polynomial, as exp_negative in tree.hpp.
EZV2_INLINE float exp_float(float x) {
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits, exponent;
    std::memcpy(&exponent, &shifted, sizeof bits);
    std::memcpy(&bits, &p, sizeof bits);
    bits += exponent << 23;
    std::memcpy(&p, &bits, sizeof bits);
    return p;
}

}  // namespace ezv2
