/* Decoder layers of few tokens: called one by one, what is computed here waits as long as it takes.
   A layer has two halves, between which its keys and values are kept: by who calls them, or here for
   all layers in one call. The fields and arguments are those of kernels.py. */

#include "attention.c"
#include "norms.c"
#include "products.c"

struct product { const void *weight; const uint16_t *scale; long outs; int narrow; };

struct layer {
    struct product inputs, output, gate, up, down;
    const uint16_t *before_attention, *after_attention, *before_mlp, *after_mlp;
    long size, heads, groups, head_size;
    float eps, scale, softcap;
    int threads;
};

static void multiply(const struct layer *layer, const struct product *product, const uint16_t *x,
                     void *y, int rounds, long rows, long ins) {
    if (product->narrow)
        int8(product->weight, x, y, product->scale, rounds, rows, ins, product->outs,
             layer->threads);
    else
        bfloat16(product->weight, x, y, NULL, rounds, rows, ins, product->outs, layer->threads);
}

static void normalize(const struct layer *layer, const uint16_t *weight, const uint16_t *x,
                      const uint16_t *residual, uint16_t *y, long rows) {
    norm(x, weight, residual, y, rows, layer->size, layer->eps, layer->threads);
}

/* Queries, keys and values of `states` (rows, new, size), as `rotated` has them. Returns 0 if there
   is no memory. */
int before(const struct layer *layer, const uint16_t *states, const uint16_t *cos,
           const uint16_t *sin, uint16_t *queries, uint16_t *keys, uint16_t *values, long rows,
           long new, long turns) {
    const long count = rows * new;
    uint16_t *normed = malloc(count * (layer->size + layer->inputs.outs) * sizeof *normed);
    if (!normed) return 0;
    uint16_t *product = normed + count * layer->size;
    normalize(layer, layer->before_attention, states, NULL, normed, count);
    multiply(layer, &layer->inputs, normed, product, 1, count, layer->size);
    rotated(product, cos, sin, queries, keys, values, rows, new, layer->heads, layer->groups,
            layer->head_size, turns, layer->threads);
    free(normed);
    return 1;
}

/* What the layer makes of `states`, of the same shape as `result`: the rest of it, with keys, values
   and `mask` as `attend` has them. */
int after(const struct layer *layer, const uint16_t *states, const uint16_t *queries,
          const uint16_t *keys, const uint16_t *values, const uint16_t *mask, uint16_t *result,
          long rows, long new, long tokens, long row_step, long group_step, long masks) {
    const long count = rows * new, size = layer->size, inner = layer->gate.outs;
    const long width = layer->heads * layer->head_size, each = layer->heads / layer->groups;
    const long floats = 2 * count * inner, others = count * (width + 3 * size + inner);
    float *gate = malloc(floats * sizeof(float) + others * sizeof(uint16_t));
    if (!gate) return 0;
    float *up = gate + count * inner;
    uint16_t *attended = (uint16_t *)(gate + floats), *both = attended + count * width;
    uint16_t *projected = both + count * inner, *normed = projected + count * size;
    uint16_t *residual = normed + count * size;

    if (!attend(queries, keys, values, mask, attended, rows, layer->groups, each * new, new, tokens,
                layer->head_size, row_step, group_step, masks, layer->scale, layer->softcap,
                layer->threads)) {
        free(gate);
        return 0;
    }
    multiply(layer, &layer->output, attended, projected, 1, count, width);
    normalize(layer, layer->after_attention, projected, states, residual, count);

    normalize(layer, layer->before_mlp, residual, NULL, normed, count);
    multiply(layer, &layer->gate, normed, gate, 0, count, size);
    multiply(layer, &layer->up, normed, up, 0, count, size);
    gated(gate, up, both, count * inner, layer->threads);
    multiply(layer, &layer->down, both, projected, 1, count, inner);
    normalize(layer, layer->after_mlp, projected, residual, result, count);
    free(gate);
    return 1;
}

/* Where a layer keeps keys and values, each (rows, groups, tokens and more, head size), `row_step`
   and `group_step` elements apart; and what is added to its scores, or NULL. */
struct kept { uint16_t *keys, *values; const uint16_t *mask; long row_step, group_step; };

/* What `count` layers make of `states` (rows, new, size), in their place. Of `past` tokens keys and
   values are `kept`, and theirs come behind; `masks` is 1 where masks have rows. Returns 0 if there
   is no memory. */
int decoded(const struct layer *layers, const struct kept *kept, long count, uint16_t *states,
            const uint16_t *cos, const uint16_t *sin, long rows, long new, long past, long turns,
            long masks) {
    for (; count > 0; count--, layers++, kept++) {
        const long each = rows * new * layers->head_size, length = new * layers->head_size;
        const long result = rows * new * layers->size, heads = layers->heads;
        uint16_t *queries = malloc((each * (heads + 2 * layers->groups) + result) * sizeof *queries);
        if (!queries) return 0;
        uint16_t *keys = queries + each * heads, *values = keys + each * layers->groups;
        uint16_t *next = values + each * layers->groups;
        int done = before(layers, states, cos, sin, queries, keys, values, rows, new, turns);
        for (long at = 0; done && at < rows * layers->groups; at++) {
            const long to = at / layers->groups * kept->row_step
                + at % layers->groups * kept->group_step + past * layers->head_size;
            memcpy(kept->keys + to, keys + at * length, length * sizeof *keys);
            memcpy(kept->values + to, values + at * length, length * sizeof *values);
        }
        done = done && after(layers, states, queries, kept->keys, kept->values, kept->mask, next,
                             rows, new, past + new, kept->row_step, kept->group_step, masks);
        if (done) memcpy(states, next, result * sizeof *states);
        free(queries);
        if (!done) return 0;
    }
    return 1;
}
