/* Attention, and the positions in its queries and keys. Tensors are bfloat16, and
   contiguous where nothing else is said; what is computed is float32, and rounded once, but for the
   weights of values. `size` is a head's, and a multiple of 32. */

#include <stdlib.h>
#include <string.h>

#include "vectors.h"

/* What a product of (rows, new, heads + 2 * groups, size) holds, as (rows, heads or groups, new,
   size), queries and keys rotated by `cos` and `sin` (rows or 1, new, size): element i and the one
   half a head further. `turns` is 1 where these have rows. */
void rotated(const uint16_t *product, const uint16_t *cos, const uint16_t *sin, uint16_t *queries,
             uint16_t *keys, uint16_t *values, long rows, long new, long heads, long groups,
             long size, long turns, int threads) {
    const long half = size / 2, all = heads + 2 * groups;
    _Pragma("omp parallel for num_threads(threads) if (rows * new > 4)")
    for (long at = 0; at < rows * new * all; at++) {
        const long head = at % all, token = at / all % new, row = at / all / new;
        const uint16_t *from = product + at * size;
        const uint16_t *c = cos + (row * turns * new + token) * size;
        const uint16_t *s = sin + (row * turns * new + token) * size;
        uint16_t *to = head < heads ? queries + (row * heads + head) * new * size
            : head < heads + groups ? keys + (row * groups + head - heads) * new * size
            : values + (row * groups + head - heads - groups) * new * size;
        to += token * size;
        if (head >= heads + groups) {
            memcpy(to, from, size * sizeof *to);
            continue;
        }
        for (long i = 0; i < half; i += LANES) {
            const __m512 first = wide(from + i), second = wide(from + half + i);
            const __m512 x = wide(c + i), y = wide(s + i);
            narrow(to + i, _mm512_fmsub_ps(first, x, _mm512_mul_ps(second, y)));
            narrow(to + half + i, _mm512_fmadd_ps(second, x, _mm512_mul_ps(first, y)));
        }
    }
}

/* Queries at once, keys at once, queries that a thread takes at a time, tokens whose values stay in
   the cache of a core, and what hides a token: the lowest number, or minus infinity. */
enum { SOME = 4, KEYS = 4, TAKEN = 16, BLOCK = 64, HIDES = 0xff7f };

#define SWITCH_SOME(call)                                                                          \
    switch (some) { case 1: call(1); break; case 2: call(2); break;                                \
                    case 3: call(3); break; case 4: call(4); break; }

/* A bit for each of 32 tokens from `start` on that is hidden from all, or not there. */
static uint32_t hidden(const uint16_t *const *masks, int some, long start, long tokens) {
    const uint32_t there = tokens - start < 32 ? (1u << (tokens - start)) - 1 : ~0u;
    uint32_t all = ~0u;
    for (int q = 0; q < some; q++) {
        const __m512i mask = _mm512_maskz_loadu_epi16(there, masks[q] + start);
        all &= _mm512_cmpge_epu16_mask(mask, _mm512_set1_epi16((short)HIDES)) | ~there;
    }
    return all;
}

/* The tokens from the first to the last that are not hidden; all, if they are, as of padding. */
static void seen(const uint16_t *const *masks, int some, long tokens, long *start, long *end) {
    uint32_t all = ~0u;
    long first = 0, last = (tokens - 1) / 32 * 32;
    *start = 0, *end = tokens;
    while (first < tokens && (all = hidden(masks, some, first, tokens)) == ~0u) first += 32;
    if (first >= tokens) return;
    *start = first + __builtin_ctz(~all);
    while ((all = hidden(masks, some, last, tokens)) == ~0u) last -= 32;
    *end = last + 32 - __builtin_clz(~all);
}

/* scores (some, stride) = queries (some, size) times keys (tokens, size). */
ALWAYS void scored(const uint16_t *queries, const uint16_t *keys, float *scores, long tokens,
                   long size, long stride, const int some) {
    for (long t = 0; t < tokens; t += KEYS) {
        __m512 sums[SOME][KEYS];
        EACH(q, some) EACH(o, KEYS) sums[q][o] = _mm512_setzero_ps();
        for (long k = 0; k < size; k += 2 * LANES) {
            __m512bh key[KEYS];
            EACH(o, KEYS) key[o] = pairs(keys + (t + o < tokens ? t + o : t) * size + k);
            EACH(q, some) {
                const __m512bh query = pairs(queries + q * size + k);
                EACH(o, KEYS) sums[q][o] = _mm512_dpbf16_ps(sums[q][o], key[o], query);
            }
        }
        EACH(q, some)
            _mm_storeu_ps(scores + q * stride + t,
                          summed(sums[q][0], sums[q][1], sums[q][2], sums[q][3]));
    }
}

/* Scores become weights in bfloat16 where they are, up to a multiple of 16; returns their sum, by
   which they are to be divided. */
static float weighed(float *scores, const uint16_t *mask, long tokens, float scale, float softcap) {
    const __m512 none = _mm512_set1_ps(-__builtin_inff());
    __m512 most = none, sum = _mm512_setzero_ps();
    for (long t = 0; t < tokens; t += LANES) {
        const __mmask16 there = tokens - t < LANES ? (1 << (tokens - t)) - 1 : 0xffff;
        __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + t), _mm512_set1_ps(scale));
        if (softcap) score = _mm512_mul_ps(tanh16(score), _mm512_set1_ps(softcap));
        if (mask)
            score = _mm512_add_ps(score, widened(_mm256_maskz_loadu_epi16(there, mask + t)));
        score = _mm512_mask_blend_ps(there, none, score);
        most = _mm512_max_ps(most, score);
        _mm512_storeu_ps(scores + t, score);
    }
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (long t = 0; t < tokens; t += LANES) {
        const __m512 weight = exp16(_mm512_sub_ps(_mm512_loadu_ps(scores + t), most));
        sum = _mm512_add_ps(sum, weight);
        narrow((uint16_t *)scores + t, weight);
    }
    return _mm512_reduce_add_ps(sum);
}

/* sums (some, size) += weights times values (tokens, size), for the tokens up to `end`, two at a
   time. Of 32 columns, `sums` have first those that unpacking gives first: see `order`. */
ALWAYS void added(const float *scores, const uint16_t *values, float *sums, long start, long end,
                  long size, long stride, const int some) {
    for (long k = 0; k < size; k += 2 * LANES) {
        __m512 low[SOME], high[SOME];
        EACH(q, some) low[q] = _mm512_loadu_ps(sums + q * size + k);
        EACH(q, some) high[q] = _mm512_loadu_ps(sums + q * size + k + LANES);
        for (long t = start; t < end; t += 2) {
            const __m512i one = _mm512_loadu_si512(values + t * size + k);
            const __m512i two = t + 1 < end ? _mm512_loadu_si512(values + (t + 1) * size + k) : one;
            const __m512bh first = (__m512bh)_mm512_unpacklo_epi16(one, two);
            const __m512bh second = (__m512bh)_mm512_unpackhi_epi16(one, two);
            EACH(q, some) {
                int weights;
                memcpy(&weights, (const uint16_t *)(scores + q * stride) + t, sizeof weights);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(weights);
                low[q] = _mm512_dpbf16_ps(low[q], first, both);
                high[q] = _mm512_dpbf16_ps(high[q], second, both);
            }
        }
        EACH(q, some) _mm512_storeu_ps(sums + q * size + k, low[q]);
        EACH(q, some) _mm512_storeu_ps(sums + q * size + k + LANES, high[q]);
    }
}

/* `output` (size) = sums / total, in the order of values. */
static void divided(const float *sums, float total, uint16_t *output, long size) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512 factor = _mm512_set1_ps(1 / total);
    for (long k = 0; k < size; k += 2 * LANES) {
        const __m512 low = _mm512_mul_ps(factor, _mm512_loadu_ps(sums + k));
        const __m512 high = _mm512_mul_ps(factor, _mm512_loadu_ps(sums + k + LANES));
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(output + k, _mm512_permutexvar_epi64(order, both));
    }
}

/* softmax(softcap * tanh(scale * queries @ keys) + mask) @ values; without tanh if `softcap` is 0.

   `queries` are (rows, groups, count, size), of which query i is of the new token i % new. Keys and
   values are (tokens, size) for each of (rows, groups), `row_step` and `group_step` elements apart.
   `mask` (rows or 1, new, tokens) is added, if it is not NULL; `masks` is 1 where it has rows.
   `output` is (rows, new, groups, count / new, size). Returns 0 if there is no memory. */
int attend(const uint16_t *queries, const uint16_t *keys, const uint16_t *values,
           const uint16_t *mask, uint16_t *output, long rows, long groups, long count, long new,
           long tokens, long size, long row_step, long group_step, long masks, float scale,
           float softcap, int threads) {
    const long stride = (tokens + LANES - 1) / LANES * LANES, parts = (count + TAKEN - 1) / TAKEN;
    int failed = 0;
    _Pragma("omp parallel num_threads(threads) reduction(|: failed)") {
        /* Scores and then sums of SOME queries. */
        float *scores = malloc(SOME * (stride + size) * sizeof *scores);
        float *sums = scores + SOME * stride, totals[SOME];
        failed = !scores;
        _Pragma("omp for schedule(dynamic)")
        for (long at = 0; at < rows * groups * parts; at++) {
            const long part = at % parts, group = at / parts % groups, row = at / parts / groups;
            const long end = part * TAKEN + TAKEN < count ? part * TAKEN + TAKEN : count;
            for (long i = part * TAKEN; i < end && scores; i += SOME) {
                const uint16_t *query = queries + ((row * groups + group) * count + i) * size;
                const uint16_t *own[SOME] = {NULL};
                const int some = end - i < SOME ? end - i : SOME;
                long from = 0, to = tokens;
                if (mask) {
                    for (int q = 0; q < some; q++)
                        own[q] = mask + (row * masks * new + (i + q) % new) * tokens;
                    seen(own, some, tokens, &from, &to);
                }
                const long first = row * row_step + group * group_step + from * size;
                const long left = to - from;
#define SCORED(some) scored(query, keys + first, scores, left, size, stride, some)
                SWITCH_SOME(SCORED)
                for (int q = 0; q < some; q++)
                    totals[q] = weighed(scores + q * stride, own[q] ? own[q] + from : NULL, left,
                                        scale, softcap);
                memset(sums, 0, some * size * sizeof *sums);
                for (long t = 0; t < left; t += BLOCK) {
                    const long until = t + BLOCK < left ? t + BLOCK : left;
#define ADDED(some) added(scores, values + first, sums, t, until, size, stride, some)
                    SWITCH_SOME(ADDED)
                }
                for (int q = 0; q < some; q++) {
                    const long token = (i + q) % new, head = (i + q) / new;
                    const long to = ((row * new + token) * groups + group) * (count / new) + head;
                    divided(sums + q * size, totals[q], output + to * size, size);
                }
            }
        }
        free(scores);
    }
    return !failed;
}
