/* What is between products. Tensors are contiguous and bfloat16 where nothing else is said; what is
   computed with them is float32, and rounded once. */

#include "vectors.h"

/* y = x / rms(x) * (1 + weight), for `rows` of `size`, a multiple of 16; added to `residual`, if
   that is not NULL. */
void norm(const uint16_t *x, const uint16_t *weight, const uint16_t *residual, uint16_t *y,
          long rows, long size, float eps, int threads) {
    const __m512 one = _mm512_set1_ps(1);
    _Pragma("omp parallel for num_threads(threads) if (rows > 4)")
    for (long at = 0; at < rows * size; at += size) {
        __m512 squares = _mm512_setzero_ps();
        for (long i = 0; i < size; i += LANES)
            squares = _mm512_fmadd_ps(wide(x + at + i), wide(x + at + i), squares);
        const float mean = _mm512_reduce_add_ps(squares) / size;
        const __m512 factor = _mm512_set1_ps(1 / __builtin_sqrtf(mean + eps));
        for (long i = 0; i < size; i += LANES) {
            const __m512 scaled = _mm512_mul_ps(wide(x + at + i), factor);
            const __m512 more = _mm512_add_ps(one, wide(weight + i));
            narrow(y + at + i, residual ? _mm512_fmadd_ps(scaled, more, wide(residual + at + i))
                                        : _mm512_mul_ps(scaled, more));
        }
    }
}

/* y = gelu(gate) * up for `count` numbers in float32, a multiple of 16, by gelu(x) = x / (1 +
   exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))), which is that of tanh. */
void gated(const float *gate, const float *up, uint16_t *y, long count, int threads) {
    const __m512 one = _mm512_set1_ps(1), cubed = _mm512_set1_ps(0.044715f);
    const __m512 root = _mm512_set1_ps(-2 * 0.79788456f);
    _Pragma("omp parallel for num_threads(threads) if (count > 16384)")
    for (long i = 0; i < count; i += LANES) {
        const __m512 x = _mm512_loadu_ps(gate + i), square = _mm512_mul_ps(x, x);
        const __m512 inner = _mm512_fmadd_ps(cubed, _mm512_mul_ps(square, x), x);
        const __m512 under = _mm512_add_ps(one, exp16(_mm512_mul_ps(root, inner)));
        narrow(y + i, _mm512_div_ps(_mm512_mul_ps(x, _mm512_loadu_ps(up + i)), under));
    }
}

/* x = softcap * tanh(x / softcap), where it is, for `count` numbers in float32, a multiple of 16. */
void capped(float *x, long count, float softcap, int threads) {
    const __m512 cap = _mm512_set1_ps(softcap), scale = _mm512_set1_ps(1 / softcap);
    _Pragma("omp parallel for num_threads(threads)")
    for (long i = 0; i < count; i += LANES) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
        _mm512_storeu_ps(x + i, _mm512_mul_ps(cap, tanh16(scaled)));
    }
}
