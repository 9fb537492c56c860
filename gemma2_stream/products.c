/* Products of few rows with a weight that is read once.

   x is (rows, ins) in bfloat16, the weight (outs, ins) in bfloat16 or int8, y (rows, outs) in
   float32, like the sums; ins is a multiple of 32. Compiled by compiled.py for the processor that
   runs it, and without an OpenMP of its own. */

#include <immintrin.h>
#include <stdint.h>

/* Columns at a time; outputs for which what was read of x serves, and rows of which all sums with
   them stay in registers. There, ALONE rows leave place for three outputs. */
enum { STEP = 32, WIDE = 4, GROUP = 6, ALONE = 8 };

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
   - name_tile: `wide` outputs of `rows` rows. Both are constants where it is called, so that loops
     over them are none. `ahead` asks for the next tile's weights: these are streams of a row's
     length each, too short for a processor to foresee.
   - name_group: the same for what is no constant.
   - name: the product. More rows than a group find the tile's weights in the cache. */
#define CASE(name, rows, wide)                                                                     \
    case rows: name##_tile(weight, x, y, ins, outs, rows, wide, ahead); break;

#define SWITCH(name, wide)                                                                         \
    switch (rows) {                                                                                \
        CASE(name, 1, wide) CASE(name, 2, wide) CASE(name, 3, wide)                                \
        CASE(name, 4, wide) CASE(name, 5, wide) CASE(name, 6, wide)                                \
        CASE(name, 7, wide) CASE(name, 8, wide)                                                    \
    }

#define PRODUCT(name, type)                                                                        \
    ALWAYS void name##_tile(const type *weight, const uint16_t *x, float *y, long ins, long outs,  \
                            const int rows, const int wide, int ahead) {                           \
        const int line = 64 / sizeof(type);                                                        \
        __m512 sums[ALONE][WIDE];                                                                  \
        EACH(r, rows) EACH(o, wide) sums[r][o] = _mm512_setzero_ps();                              \
        for (long k = 0; k < ins; k += STEP) {                                                     \
            const type *here = weight + k, *next = here + wide * ins;                              \
            __m512bh weights[WIDE];                                                                \
            if (ahead && k % line == 0)                                                            \
                EACH(o, wide) _mm_prefetch((const char *)(next + o * ins), _MM_HINT_T1);           \
            EACH(o, wide) weights[o] = read_##name(here + o * ins);                                \
            EACH(r, rows) {                                                                        \
                const __m512bh row = read_bfloat16(x + r * ins + k);                               \
                EACH(o, wide) sums[r][o] = _mm512_dpbf16_ps(sums[r][o], weights[o], row);          \
            }                                                                                      \
        }                                                                                          \
        EACH(r, rows) EACH(o, wide) y[r * outs + o] = _mm512_reduce_add_ps(sums[r][o]);            \
    }                                                                                              \
    static void name##_group(const type *weight, const uint16_t *x, float *y, long ins, long outs, \
                             int rows, int wide, int ahead) {                                      \
        if (wide == WIDE) SWITCH(name, WIDE)                                                       \
        else if (wide == WIDE - 1) SWITCH(name, WIDE - 1)                                          \
        else SWITCH(name, 1)                                                                       \
    }                                                                                              \
    void name(const type *weight, const uint16_t *x, float *y, long rows, long ins, long outs,     \
              int threads) {                                                                       \
        const long groups = rows <= ALONE ? 1 : (rows + GROUP - 1) / GROUP;                        \
        const int most = groups == 1 && rows > GROUP ? WIDE - 1 : WIDE;                            \
        _Pragma("omp parallel for num_threads(threads)") for (long o = 0; o < outs; o += most) {   \
            const int wide = o + most <= outs ? most : 1;                                          \
            const long end = o + most <= outs ? o + most : outs;                                   \
            for (long g = 0; g < groups; g++) {                                                    \
                const long from = rows * g / groups, count = rows * (g + 1) / groups - from;       \
                for (long at = o; at < end; at += wide)                                            \
                    name##_group(weight + at * ins, x + from * ins, y + from * outs + at, ins,     \
                                 outs, count, wide, g == 0);                                       \
            }                                                                                      \
        }                                                                                          \
    }

PRODUCT(bfloat16, uint16_t)
PRODUCT(int8, int8_t)
