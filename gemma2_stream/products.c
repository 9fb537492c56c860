/* Products of few rows with a weight that is read once.

   x is (rows, ins) in bfloat16, the weight (outs, ins) in bfloat16 or int8; ins is a multiple of 32.
   The sums are float32, and multiplied with `scale` (outs) in bfloat16, if that is not NULL; so is
   y (rows, outs), or bfloat16 if `rounds`. */

#include <stdlib.h>

#include "vectors.h"

/* Columns at a time; outputs for which what was read of x serves, and rows of which all sums with
   them stay in registers. There, ALONE rows leave place for three outputs. Of more rows than FEW,
   BESIDE outputs come next to one another: their weights stay in the cache of a core. */
enum { STEP = 32, WIDE = 4, GROUP = 6, ALONE = 8, FEW = 24, BESIDE = 16 };

ALWAYS __m512bh read_bfloat16(const uint16_t *from) {
    return pairs(from);
}

/* Every int8 is a bfloat16, too. */
ALWAYS __m512bh read_int8(const int8_t *from) {
    const __m128i *halves = (const __m128i *)from;
    const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128(halves));
    const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128(halves + 1));
    return _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
}

/* Where sums go. */
struct output { void *y; const uint16_t *scale; int rounds; };

/* Adds up four of them, of which the first `wide` are there, for the outputs from `column` on. */
static __attribute__((noinline)) void put(const struct output *to, long at, long column, int wide,
                                          __m512 a, __m512 b, __m512 c, __m512 d) {
    const __mmask8 there = (1 << wide) - 1;
    __m128 sums = summed(a, b, c, d);
    if (to->scale) {
        const __m128i scale = _mm_cvtepu16_epi32(_mm_maskz_loadu_epi16(there, to->scale + column));
        sums = _mm_mul_ps(sums, _mm_castsi128_ps(_mm_slli_epi32(scale, 16)));
    }
    if (to->rounds)
        _mm_mask_storeu_epi16((uint16_t *)to->y + at, there, (__m128i)_mm_cvtneps_pbh(sums));
    else
        _mm_mask_storeu_ps((float *)to->y + at, there, sums);
}

/* PRODUCT(name, type) makes
   - name_tile: `wide` outputs of `rows` rows, with weights from `weight` on. Both are constants where
     it is called, so that loops over them are none. `ahead` asks for the next tile's weights: these
     are streams of a row's length each, too short for a processor to foresee.
   - name_group: the same for what is no constant.
   - name: the product. More rows than a group find the tile's weights in the cache. A lone one has
     the weights in bfloat16 one after the other, which a processor foresees: 3 to 13 % of the time.
     With int8 it would wait for what widens them. */
#define CASE(name, rows, wide)                                                                     \
    case rows: name##_tile(weight, x, to, row, column, ins, outs, rows, wide, ahead); break;

#define SWITCH(name, wide)                                                                         \
    switch (rows) {                                                                                \
        CASE(name, 1, wide) CASE(name, 2, wide) CASE(name, 3, wide)                                \
        CASE(name, 4, wide) CASE(name, 5, wide) CASE(name, 6, wide)                                \
        CASE(name, 7, wide) CASE(name, 8, wide)                                                    \
    }

#define PRODUCT(name, type)                                                                        \
    ALWAYS void name##_tile(const type *weight, const uint16_t *x, const struct output *to,        \
                            long row, long column, long ins, long outs, const int rows,            \
                            const int wide, int ahead) {                                           \
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
                const __m512bh part = pairs(x + (row + r) * ins + k);                              \
                EACH(o, wide) sums[r][o] = _mm512_dpbf16_ps(sums[r][o], weights[o], part);         \
            }                                                                                      \
        }                                                                                          \
        const __m512 none = _mm512_setzero_ps();                                                   \
        EACH(r, rows)                                                                              \
            put(to, (row + r) * outs + column, column, wide, sums[r][0],                           \
                wide > 1 ? sums[r][1] : none, wide > 2 ? sums[r][2] : none,                        \
                wide > 3 ? sums[r][3] : none);                                                     \
    }                                                                                              \
    static void name##_group(const type *weight, const uint16_t *x, const struct output *to,       \
                             long row, long column, long ins, long outs, int rows, int wide,       \
                             int ahead) {                                                          \
        if (wide == WIDE) SWITCH(name, WIDE)                                                       \
        else if (wide == WIDE - 1) SWITCH(name, WIDE - 1)                                          \
        else SWITCH(name, 1)                                                                       \
    }                                                                                              \
    void name(const type *weight, const uint16_t *x, void *y, const uint16_t *scale, int rounds,   \
              long rows, long ins, long outs, int threads) {                                       \
        const struct output to = {y, scale, rounds};                                               \
        const long groups = rows <= ALONE ? 1 : (rows + GROUP - 1) / GROUP;                        \
        const int alone = rows == 1 && sizeof(type) > 1;                                           \
        const int most = alone ? 1 : groups == 1 && rows > GROUP ? WIDE - 1 : WIDE;                \
        if (rows > FEW) {                                                                          \
            many(weight, x, &to, sizeof(type) == 1, groups, rows, ins, outs, threads);             \
            return;                                                                                \
        }                                                                                          \
        _Pragma("omp parallel for num_threads(threads)") for (long o = 0; o < outs; o += most) {   \
            const int wide = o + most <= outs ? most : 1;                                          \
            const long end = o + most <= outs ? o + most : outs;                                   \
            for (long g = 0; g < groups; g++) {                                                    \
                const long row = rows * g / groups, count = rows * (g + 1) / groups - row;         \
                for (long at = o; at < end; at += wide)                                            \
                    name##_group(weight + at * ins, x, &to, row, at, ins, outs, count, wide,       \
                                 g == 0 && !alone);                                                \
            }                                                                                      \
        }                                                                                          \
    }

/* A product of more than FEW rows. Weights that are `narrow`, int8, are widened once for all rows,
   if there is memory for it. Before each tile it asks for a part of the next outputs' weights. */
static void many(const void *weight, const uint16_t *x, const struct output *to, int narrow,
                 long groups, long rows, long ins, long outs, int threads);

PRODUCT(bfloat16, uint16_t)
PRODUCT(int8, int8_t)

static void many(const void *weight, const uint16_t *x, const struct output *to, int narrow,
                 long groups, long rows, long ins, long outs, int threads) {
    const long length = ins * (narrow ? sizeof(int8_t) : sizeof(uint16_t)); /* of a weight's row */
    const long part = length * WIDE / groups + 1;
    _Pragma("omp parallel num_threads(threads)") {
        uint16_t *wide = narrow ? malloc(BESIDE * ins * sizeof *wide) : NULL;
        _Pragma("omp for") for (long o = 0; o < outs; o += BESIDE) {
            const long end = o + BESIDE < outs ? o + BESIDE : outs;
            const char *here = (const char *)weight + o * length, *next = here + BESIDE * length;
            for (long i = 0; wide && i < (end - o) * ins; i += STEP)
                _mm512_storeu_si512(wide + i, (__m512i)read_int8((const int8_t *)here + i));
            for (long g = 0; g < groups; g++) {
                const long row = rows * g / groups, count = rows * (g + 1) / groups - row;
                for (long at = o, outputs; at < end; at += outputs, next += part) {
                    outputs = at + WIDE <= end ? WIDE : 1;
                    for (long i = 0; i < part; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
                    if (narrow && !wide)
                        int8_group((const int8_t *)here + (at - o) * ins, x, to, row, at, ins, outs,
                                   count, outputs, 0);
                    else
                        bfloat16_group((wide ? wide : (const uint16_t *)here) + (at - o) * ins, x,
                                       to, row, at, ins, outs, count, outputs, 0);
                }
            }
        }
        free(wide);
    }
}
