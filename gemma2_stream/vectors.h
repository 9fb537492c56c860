/* Sixteen floats at a time, and the bfloat16 that they are in memory. */

#pragma once

#include <immintrin.h>
#include <stdint.h>

enum { LANES = 16 };

#define ALWAYS static inline __attribute__((always_inline))
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); i++)

ALWAYS __m512 widened(__m256i narrow) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

ALWAYS __m512 wide(const uint16_t *from) {
    return widened(_mm256_loadu_si256((const __m256i *)from));
}

ALWAYS void narrow(uint16_t *to, __m512 x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

ALWAYS __m512bh pairs(const void *from) {
    return (__m512bh)_mm512_loadu_si512(from);
}

/* What each of them comes to. */
ALWAYS __m128 summed(__m512 a, __m512 b, __m512 c, __m512 d) {
#define HALVED(x) _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1))
    const __m256 first = _mm256_hadd_ps(HALVED(a), HALVED(b));
    const __m256 second = _mm256_hadd_ps(HALVED(c), HALVED(d)), all = _mm256_hadd_ps(first, second);
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

/* By exp(n log 2 + r) = 2^n exp(r), and six terms of Taylor's series for |r| <= log(2) / 2: to a
   part in 8 million. */
ALWAYS __m512 exp16(__m512 x) {
    static const float terms[] = {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 1 / 2.f, 1, 1};
    /* The second operand is what comes of NaN. */
    x = _mm512_min_ps(_mm512_set1_ps(89), _mm512_max_ps(_mm512_set1_ps(-104), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    /* log 2 in two parts, so that nothing of n times the first is lost. */
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(terms[0]);
    EACH(i, 6) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(terms[i + 1]));
    return _mm512_scalef_ps(sum, n);
}

/* As 1 - 2 / (exp(2x) + 1). */
ALWAYS __m512 tanh16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1), two = _mm512_set1_ps(2);
    const __m512 more = _mm512_add_ps(exp16(_mm512_mul_ps(two, x)), one);
    return _mm512_sub_ps(one, _mm512_div_ps(two, more));
}
