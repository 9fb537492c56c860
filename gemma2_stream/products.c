/* Products of few rows with a weight that is read once, in the order in which it lies in memory.

   x is (rows, ins) in bfloat16, the weight (outs, ins) in bfloat16 or int8, y (rows, outs) in
   float32, like the sums; 1 to 8 rows, and ins a multiple of 32. Compiled by compiled.py for the
   processor that runs it, and without an OpenMP of its own. */

#include <immintrin.h>
#include <stdint.h>

#define ALWAYS static inline __attribute__((always_inline))
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); i++)

ALWAYS __m512bh read_bfloat16(const uint16_t *from) {
    return (__m512bh)_mm512_loadu_si512(from);
}

/* Every int8 is a bfloat16, too. */
ALWAYS __m512bh read_int8(const int8_t *from) {
    const __m128i *halves = (const __m128i *)from;
    const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128(halves));
    const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128(halves + 1));
    return _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
}

/* PRODUCT(name, type) makes
   - name_tile: `wide` outputs of `rows` rows. Both are constants where it is called, so that the
     sums stay in registers.
   - name_of: all outputs. Up to three rows keep up with a weight that comes in one stream, which
     is how memory gives it soonest; more do when what is loaded of them serves four outputs.
   - name: for a number of rows that is not known before. */
#define PRODUCT(name, type)                                                                        \
    ALWAYS void name##_tile(const type *weight, const uint16_t *x, float *y, long ins, long outs,  \
                            const int rows, const int wide) {                                      \
        __m512 sums[8][4];                                                                         \
        EACH(r, rows) EACH(o, wide) sums[r][o] = _mm512_setzero_ps();                              \
        for (long k = 0; k < ins; k += 32) {                                                       \
            __m512bh weights[4];                                                                   \
            EACH(o, wide) weights[o] = read_##name(weight + o * ins + k);                          \
            EACH(r, rows) {                                                                        \
                const __m512bh row = read_bfloat16(x + r * ins + k);                               \
                EACH(o, wide) sums[r][o] = _mm512_dpbf16_ps(sums[r][o], weights[o], row);          \
            }                                                                                      \
        }                                                                                          \
        EACH(r, rows) EACH(o, wide) y[r * outs + o] = _mm512_reduce_add_ps(sums[r][o]);            \
    }                                                                                              \
    ALWAYS void name##_of(const type *weight, const uint16_t *x, float *y, long ins, long outs,    \
                          int threads, const int rows) {                                           \
        const int wide = rows < 4 ? 1 : 4;                                                         \
        _Pragma("omp parallel for num_threads(threads)") for (long o = 0; o < outs / wide; o++)    \
            name##_tile(weight + o * wide * ins, x, y + o * wide, ins, outs, rows, wide);          \
        for (long o = outs - outs % wide; o < outs; o++)                                           \
            name##_tile(weight + o * ins, x, y + o, ins, outs, rows, 1);                           \
    }                                                                                              \
    void name(const type *weight, const uint16_t *x, float *y, long rows, long ins, long outs,     \
              int threads) {                                                                       \
        switch (rows) {                                                                            \
        case 1: name##_of(weight, x, y, ins, outs, threads, 1); break;                             \
        case 2: name##_of(weight, x, y, ins, outs, threads, 2); break;                             \
        case 3: name##_of(weight, x, y, ins, outs, threads, 3); break;                             \
        case 4: name##_of(weight, x, y, ins, outs, threads, 4); break;                             \
        case 5: name##_of(weight, x, y, ins, outs, threads, 5); break;                             \
        case 6: name##_of(weight, x, y, ins, outs, threads, 6); break;                             \
        case 7: name##_of(weight, x, y, ins, outs, threads, 7); break;                             \
        case 8: name##_of(weight, x, y, ins, outs, threads, 8); break;                             \
        }                                                                                          \
    }

PRODUCT(bfloat16, uint16_t)
PRODUCT(int8, int8_t)
