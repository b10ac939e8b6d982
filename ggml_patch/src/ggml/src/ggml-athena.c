// Decoding of A2, A3 and A4 rows, and the reference quantizer of their activations (docs/format.md).

#include "ggml-athena.h"
#include "ggml-athena-tables.h"

#include <math.h>

static const athena_tables * tables_of(enum ggml_type type) {
    return type == GGML_TYPE_A2 ? &athena_tables_a2 : type == GGML_TYPE_A3 ? &athena_tables_a3 : &athena_tables_a4;
}

// Symbols of a block, in column order. Each reader returns the size of the block and leaves its scale bytes in scales.

static uint8_t super_pair(const uint8_t pairs[2][32], int step, int lane) {
    return pairs[step / 4][lane] >> 2*(step % 4) & 3;
}

static uint8_t tail_pair(const uint8_t pairs[16], int step, int lane) {
    return pairs[lane % 16] >> (4*(lane / 16) + 2*step) & 3;
}

static uint8_t tail_low(const uint8_t low[8], int step, int lane) {
    return low[lane % 8] >> (2*(lane / 8) + step) & 1;
}

static uint8_t symbol_a2(const void * x, bool super, int step, int lane) {
    return super ? super_pair(((const block_a2 *) x)->pairs, step, lane)
                 : tail_pair(((const block_a2_tail *) x)->pairs, step, lane);
}

static uint8_t symbol_a3(const void * x, bool super, int step, int lane) {
    if (super) {
        const block_a3 * b = x;
        return super_pair(b->high, step, lane) << 1 | (b->low[lane] >> step & 1);
    }
    const block_a3_tail * b = x;
    return tail_pair(b->high, step, lane) << 1 | tail_low(b->low, step, lane);
}

static uint8_t symbol_a4(const void * x, bool super, int step, int lane) {
    const uint8_t * nibbles = super ? ((const block_a4 *) x)->nibbles[step / 2] : ((const block_a4_tail *) x)->nibbles;
    return nibbles[lane] >> 4*(step % 2) & 15;
}

static uint8_t symbol_at(enum ggml_type type, const void * x, bool super, int step, int lane) {
    return type == GGML_TYPE_A2 ? symbol_a2(x, super, step, lane) :
           type == GGML_TYPE_A3 ? symbol_a3(x, super, step, lane) : symbol_a4(x, super, step, lane);
}

static uint8_t window_of(enum ggml_type type, uint8_t symbol, uint8_t before) {
    return type == GGML_TYPE_A2 ? symbol << 2 | before :
           type == GGML_TYPE_A3 ? symbol >> 1 << 2 | (symbol & 1) << 1 | (before & 1) : symbol;
}

size_t ggml_athena_decode_block(enum ggml_type type, ggml_athena_state * state, const void * x, int columns, uint8_t * sums, float * scales) {
    assert(columns == ATHENA_SUPER || columns == ATHENA_GROUP);
    const athena_tables * tables = tables_of(type);
    const bool super = columns == ATHENA_SUPER;
    const int  delay = type == GGML_TYPE_A2 ? 1 : 0; // which of the earlier windows picks from the second table

    for (int g = 0; g < columns/ATHENA_GROUP; g++) {
        scales[g] = ggml_athena_scale(((const uint8_t *) x)[g]); // scale bytes come first in every block
    }
    for (int c = 0; c < columns; c++) {
        const int step = c / ATHENA_LANES;
        const int lane = c % ATHENA_LANES;
        const uint8_t symbol = symbol_at(type, x, super, step, lane);
        const uint8_t window = window_of(type, symbol, state->symbol[lane]);
        sums[c] = tables->t1[window] + tables->t2[state->windows[delay][lane]];
        state->symbol[lane] = symbol;
        state->windows[1][lane] = state->windows[0][lane];
        state->windows[0][lane] = window;
    }
    return (columns/ATHENA_GROUP) * ggml_athena_group_size(type);
}

static void dequantize_row(enum ggml_type type, const void * x, float * y, int64_t k) {
    assert(k % ATHENA_GROUP == 0);
    const uint8_t * p = x;
    ggml_athena_state state;
    uint8_t sums[ATHENA_SUPER];
    float   scales[ATHENA_SUPER/ATHENA_GROUP];
    memset(&state, 0, sizeof(state));
    for (int64_t i = 0; i < k;) {
        const int columns = k - i >= ATHENA_SUPER ? ATHENA_SUPER : ATHENA_GROUP;
        p += ggml_athena_decode_block(type, &state, p, columns, sums, scales);
        for (int c = 0; c < columns; c++) {
            y[i + c] = scales[c/ATHENA_GROUP] * (float) (sums[c] - ATHENA_ZERO);
        }
        i += columns;
    }
}

void dequantize_row_a2(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    dequantize_row(GGML_TYPE_A2, x, y, k);
}

void dequantize_row_a3(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    dequantize_row(GGML_TYPE_A3, x, y, k);
}

void dequantize_row_a4(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    dequantize_row(GGML_TYPE_A4, x, y, k);
}

void quantize_row_q8_a64_ref(const float * GGML_RESTRICT x, void * GGML_RESTRICT vy, int64_t k) {
    assert(k % ATHENA_GROUP == 0);
    block_q8_a64 * y = vy;
    for (int64_t i = 0; i < k/ATHENA_GROUP; i++, x += ATHENA_GROUP) {
        uint32_t bits = 0; // of the largest magnitude; compared as integers so that not-a-number is the largest
        for (int c = 0; c < ATHENA_GROUP; c++) {
            uint32_t b;
            memcpy(&b, &x[c], sizeof(b));
            b &= 0x7fffffff;
            bits = b > bits ? b : bits;
        }
        float amax;
        memcpy(&amax, &bits, sizeof(amax));
        const float scale = ggml_athena_activation_scale(amax);
        int32_t sum = 0;
        for (int c = 0; c < ATHENA_GROUP; c++) {
            y[i].qs[c] = scale > 0.0f ? (int8_t) lrintf(x[c]*scale) : 0;
            sum += y[i].qs[c];
        }
        y[i].d      = amax/127.0f;
        y[i].offset = -ATHENA_ZERO*sum;
    }
}
