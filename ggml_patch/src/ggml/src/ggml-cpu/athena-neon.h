// NEON decoders of A2, A3 and A4 rows, for dot products and for tiles of a matrix product. A step is two vectors of 16 lanes, which know nothing of each other: a block is
// done for the first half of the lanes, then for the second.

#pragma once

#if defined(__ARM_NEON) && defined(__aarch64__)
#define ATHENA_HAVE_NEON

#include "athena.h"
#include "ggml-athena-tables.h"

#include <arm_neon.h>

// Both tables of a type; the first with `zero` subtracted: with the zero point, sums of entries are levels, -64 .. 63.
typedef struct {
    int8x16_t t1, t2;
} athena_neon_tables;

// What 16 lanes carry from one step to the next.
typedef struct {
    uint8x16_t symbol; // the last one (A2), or its lowest bit (A3)
    int8x16_t  e1, e2; // the second table's entries for the next step, and (A2) for the one after it
} athena_neon_carry;

// What a row carries from one block to the next.
typedef struct {
    athena_neon_carry half[2];
} athena_carry;

static inline athena_neon_tables athena_neon_load(const athena_tables * tables, int zero) {
    athena_neon_tables t;
    t.t1 = vsubq_s8(vreinterpretq_s8_u8(vld1q_u8(tables->t1)), vdupq_n_s8((int8_t) zero));
    t.t2 = vreinterpretq_s8_u8(vld1q_u8(tables->t2));
    return t;
}

static inline athena_carry athena_neon_row_start(const athena_tables * tables) {
    const int8x16_t entry = vdupq_n_s8((int8_t) tables->t2[0]);
    const athena_carry carry = { { { vdupq_n_u8(0), entry, entry }, { vdupq_n_u8(0), entry, entry } } };
    return carry;
}

static inline int32x4_t athena_neon_dot_bytes(int32x4_t acc, int8x16_t levels, const int8_t * qs) {
    const int8x16_t q = vld1q_s8(qs);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, levels, q);
#else
    // two products are 64 * 127 * 2 at most: they fit into 16 bits
    return vpadalq_s16(acc, vmlal_high_s8(vmull_s8(vget_low_s8(levels), vget_low_s8(q)), levels, q));
#endif
}

// The levels of a step. Bits of the window above the fourth are ignored.
static ATHENA_INLINE int8x16_t athena_neon_step(const athena_neon_tables * t, athena_neon_carry * c, uint8x16_t window, bool two_steps_back) {
    const uint8x16_t w = vandq_u8(window, vdupq_n_u8(15));
    const int8x16_t levels = vaddq_s8(vqtbl1q_s8(t->t1, w), c->e1);
    const int8x16_t entry = vqtbl1q_s8(t->t2, w);
    c->e1 = two_steps_back ? c->e2 : entry;
    c->e2 = entry;
    return levels;
}

// A2: symbols lie side by side as in windows; before: the symbol before the first of them.
static ATHENA_INLINE void athena_neon_pairs(const athena_neon_tables * t, athena_neon_carry * c, uint8x16_t bytes, int8x16_t * levels, bool tail) {
    levels[0] = athena_neon_step(t, c, vsliq_n_u8(c->symbol, bytes, 2), true);
    levels[1] = athena_neon_step(t, c, bytes, true);
    if (tail) {
        c->symbol = vshrq_n_u8(bytes, 2);
        return;
    }
    levels[2] = athena_neon_step(t, c, vshrq_n_u8(bytes, 2), true);
    levels[3] = athena_neon_step(t, c, vshrq_n_u8(bytes, 4), true);
    c->symbol = vshrq_n_u8(bytes, 6);
}

// The upper two bits of A3's symbols above the lowest bits of the symbol and of the one before it.
#define ATHENA_NEON_WINDOW_A3(high, low) vsliq_n_u8((low), (high), 2)

static ATHENA_INLINE void athena_neon_super_a3(const athena_neon_tables * t, athena_neon_carry * c, uint8x16_t a, uint8x16_t b, uint8x16_t low, int8x16_t * levels) {
    levels[0] = athena_neon_step(t, c, ATHENA_NEON_WINDOW_A3(a,                vsliq_n_u8(c->symbol, low, 1)), false);
    levels[1] = athena_neon_step(t, c, ATHENA_NEON_WINDOW_A3(vshrq_n_u8(a, 2), low), false);
    levels[2] = athena_neon_step(t, c, ATHENA_NEON_WINDOW_A3(vshrq_n_u8(a, 4), vshrq_n_u8(low, 1)), false);
    levels[3] = athena_neon_step(t, c, ATHENA_NEON_WINDOW_A3(vshrq_n_u8(a, 6), vshrq_n_u8(low, 2)), false);
    levels[4] = athena_neon_step(t, c, ATHENA_NEON_WINDOW_A3(b,                vshrq_n_u8(low, 3)), false);
    levels[5] = athena_neon_step(t, c, ATHENA_NEON_WINDOW_A3(vshrq_n_u8(b, 2), vshrq_n_u8(low, 4)), false);
    levels[6] = athena_neon_step(t, c, ATHENA_NEON_WINDOW_A3(vshrq_n_u8(b, 4), vshrq_n_u8(low, 5)), false);
    levels[7] = athena_neon_step(t, c, ATHENA_NEON_WINDOW_A3(vshrq_n_u8(b, 6), vshrq_n_u8(low, 6)), false);
    c->symbol = vshrq_n_u8(low, 7);
}

static ATHENA_INLINE void athena_neon_nibbles(const athena_neon_tables * t, athena_neon_carry * c, uint8x16_t bytes, int8x16_t * levels) {
    levels[0] = athena_neon_step(t, c, bytes, false);
    levels[1] = athena_neon_step(t, c, vshrq_n_u8(bytes, 4), false);
}

// One half of the lanes of a superblock: the levels of eight steps.
static ATHENA_INLINE void athena_neon_super(enum ggml_type type, const athena_neon_tables * t, athena_neon_carry * c, const uint8_t * x, int half, int8x16_t * levels) {
    if (type == GGML_TYPE_A2) {
        const block_a2 * b = (const block_a2 *) x;
        athena_neon_pairs(t, c, vld1q_u8(b->pairs[0] + 16*half), levels,     false);
        athena_neon_pairs(t, c, vld1q_u8(b->pairs[1] + 16*half), levels + 4, false);
    } else if (type == GGML_TYPE_A3) {
        const block_a3 * b = (const block_a3 *) x;
        athena_neon_super_a3(t, c, vld1q_u8(b->high[0] + 16*half), vld1q_u8(b->high[1] + 16*half), vld1q_u8(b->low + 16*half), levels);
    } else {
        const block_a4 * b = (const block_a4 *) x;
        for (int i = 0; i < 4; i++) {
            athena_neon_nibbles(t, c, vld1q_u8(b->nibbles[i] + 16*half), levels + 2*i);
        }
    }
}

// One half of the lanes of a tail block: the levels of two steps.
static ATHENA_INLINE void athena_neon_tail(enum ggml_type type, const athena_neon_tables * t, athena_neon_carry * c, const uint8_t * x, int half, int8x16_t * levels) {
    if (type == GGML_TYPE_A4) {
        athena_neon_nibbles(t, c, vld1q_u8(((const block_a4_tail *) x)->nibbles + 16*half), levels);
        return;
    }
    const uint8x16_t bytes = vld1q_u8(type == GGML_TYPE_A2 ? ((const block_a2_tail *) x)->pairs : ((const block_a3_tail *) x)->high);
    const uint8x16_t pairs = half == 0 ? vandq_u8(bytes, vdupq_n_u8(15)) : vshrq_n_u8(bytes, 4);
    if (type == GGML_TYPE_A2) {
        athena_neon_pairs(t, c, pairs, levels, true);
        return;
    }
    const uint8x8_t eight = vld1_u8(((const block_a3_tail *) x)->low);
    const uint8x16_t both = half == 0 ? vcombine_u8(eight, vshr_n_u8(eight, 2)) : vcombine_u8(vshr_n_u8(eight, 4), vshr_n_u8(eight, 6));
    const uint8x16_t low = vandq_u8(both, vdupq_n_u8(3));
    levels[0] = athena_neon_step(t, c, ATHENA_NEON_WINDOW_A3(pairs,                vsliq_n_u8(c->symbol, low, 1)), false);
    levels[1] = athena_neon_step(t, c, ATHENA_NEON_WINDOW_A3(vshrq_n_u8(pairs, 2), low), false);
    c->symbol = vshrq_n_u8(low, 1);
}

static inline float32x4_t athena_neon_add_group(float32x4_t sum, int32x4_t dot, uint8_t code, const block_q8_a64 * y) {
    return vfmaq_n_f32(sum, vmulq_n_f32(vcvtq_f32_s32(dot), ggml_athena_scale(code)), y->d);
}

static ATHENA_INLINE float athena_dot_neon(enum ggml_type type, const athena_tables * tables, int n, const uint8_t * x, const block_q8_a64 * y) {
    const athena_neon_tables t = athena_neon_load(tables, ATHENA_ZERO);
    athena_carry carry = athena_neon_row_start(tables);
    float32x4_t even = vdupq_n_f32(0.0f), odd = even; // used in turns: a sum waits for the one before it
    int i = 0;
    for (; i + ATHENA_SUPER <= n; i += ATHENA_SUPER, x += 4*ggml_athena_group_size(type), y += 4) {
        int32x4_t dot[4] = { vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0) };
        for (int half = 0; half < 2; half++) {
            int8x16_t levels[8];
            athena_neon_super(type, &t, &carry.half[half], x, half, levels);
            for (int g = 0; g < 4; g++) {
                dot[g] = athena_neon_dot_bytes(dot[g], levels[2*g],     y[g].qs + 16*half);
                dot[g] = athena_neon_dot_bytes(dot[g], levels[2*g + 1], y[g].qs + 32 + 16*half);
            }
        }
        even = athena_neon_add_group(even, dot[0], x[0], &y[0]); // scale bytes come first
        odd  = athena_neon_add_group(odd,  dot[1], x[1], &y[1]);
        even = athena_neon_add_group(even, dot[2], x[2], &y[2]);
        odd  = athena_neon_add_group(odd,  dot[3], x[3], &y[3]);
    }
    for (; i < n; i += ATHENA_GROUP, x += ggml_athena_group_size(type), y++) {
        int32x4_t dot = vdupq_n_s32(0);
        for (int half = 0; half < 2; half++) {
            int8x16_t levels[2];
            athena_neon_tail(type, &t, &carry.half[half], x, half, levels);
            dot = athena_neon_dot_bytes(dot, levels[0], y->qs + 16*half);
            dot = athena_neon_dot_bytes(dot, levels[1], y->qs + 32 + 16*half);
        }
        even = athena_neon_add_group(even, dot, x[0], y);
    }
    return vaddvq_f32(vaddq_f32(even, odd));
}

// 16 floats, scaled and rounded to the nearest.
static inline int8x16_t athena_neon_round16(const float * x, float scale) {
    const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x),      scale));
    const int32x4_t b = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4),  scale));
    const int32x4_t c = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 8),  scale));
    const int32x4_t d = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 12), scale));
    const int16x8_t ab = vcombine_s16(vmovn_s32(a), vmovn_s32(b));
    const int16x8_t cd = vcombine_s16(vmovn_s32(c), vmovn_s32(d));
    return vcombine_s8(vmovn_s16(ab), vmovn_s16(cd));
}

static inline void athena_quantize_q8_a64_neon(const float * x, block_q8_a64 * y, int64_t k) {
    assert(k % ATHENA_GROUP == 0);
    for (int64_t i = 0; i < k/ATHENA_GROUP; i++, x += ATHENA_GROUP) {
        uint32x4_t most = vdupq_n_u32(0); // compared as integers, as in the reference
        for (int c = 0; c < ATHENA_GROUP; c += 4) {
            most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + c)), vdupq_n_u32(0x7fffffff)));
        }
        const uint32_t bits = vmaxvq_u32(most);
        float amax;
        memcpy(&amax, &bits, sizeof(amax));
        const float scale = ggml_athena_activation_scale(amax);
        int16x8_t sums = vdupq_n_s16(0);
        for (int c = 0; c < ATHENA_GROUP; c += 16) {
            const int8x16_t q = scale > 0.0f ? athena_neon_round16(x + c, scale) : vdupq_n_s8(0);
            vst1q_s8(y[i].qs + c, q);
            sums = vpadalq_s8(sums, q);
        }
        y[i].d      = amax/127.0f;
        y[i].offset = -ATHENA_ZERO*(int32_t) vaddlvq_s16(sums);
    }
}

#endif
