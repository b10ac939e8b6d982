// Matrix products with NEON: what athena-gemm.c is made of on 64-bit ARM. With matrix product instructions (i8mm) 16 products
// of every row with every token come from four instructions, with dot product instructions from eight, without either from
// twelve.

#pragma once

#include "athena-gemm.h"

// Where a row begins in its tile: rows lie one after the other, or (i8mm) two by two with units of 8 columns in turns.
#if ATHENA_UNIT == 8
#define ATHENA_TILE_ROW(m) ((m)/2*2*ATHENA_GROUP + (m) % 2*8)
#else
#define ATHENA_TILE_ROW(m) ((m)*ATHENA_GROUP)
#endif

// 16 columns of a group, from `column` on, to their places in a tile.
static inline void store_levels(uint8_t * row, int column, int8x16_t levels) {
#if ATHENA_UNIT == 8
    vst1_s8((int8_t *) row + 2*column,      vget_low_s8(levels));
    vst1_s8((int8_t *) row + 2*column + 16, vget_high_s8(levels));
#else
    vst1q_s8((int8_t *) row + column, levels);
#endif
}

static ATHENA_INLINE void decode_row_of_type(enum ggml_type type, const athena_tables * tables, int columns, const uint8_t * x, athena_carry * carry, uint8_t * levels, float * scales, int zero) {
    const athena_neon_tables t = athena_neon_load(tables, zero);
    athena_carry state = *carry;
    int i = 0;
    for (; i + ATHENA_SUPER <= columns; i += ATHENA_SUPER, x += 4*ggml_athena_group_size(type)) {
        for (int half = 0; half < 2; half++) {
            int8x16_t v[8];
            athena_neon_super(type, &t, &state.half[half], x, half, v);
            for (int g = 0; g < 4; g++) {
                store_levels(levels + g*ATHENA_TILE_BYTES, 16*half,      v[2*g]);
                store_levels(levels + g*ATHENA_TILE_BYTES, 16*half + 32, v[2*g + 1]);
            }
        }
        for (int g = 0; g < 4; g++) {
            scales[g*ATHENA_TILE_ROWS] = ggml_athena_scale(x[g]);
        }
        levels += 4*ATHENA_TILE_BYTES;
        scales += 4*ATHENA_TILE_ROWS;
    }
    for (; i < columns; i += ATHENA_GROUP, x += ggml_athena_group_size(type)) {
        for (int half = 0; half < 2; half++) {
            int8x16_t v[2];
            athena_neon_tail(type, &t, &state.half[half], x, half, v);
            store_levels(levels, 16*half,      v[0]);
            store_levels(levels, 16*half + 32, v[1]);
        }
        scales[0] = ggml_athena_scale(x[0]);
        levels += ATHENA_TILE_BYTES;
        scales += ATHENA_TILE_ROWS;
    }
    *carry = state;
}

// Columns of a row into its place in the tiles, row after row of them; carry is what the columns before them left.
static void decode_row(enum ggml_type type, int columns, const uint8_t * x, athena_carry * carry, uint8_t * levels, float * scales, int zero) {
    switch (type) {
        case GGML_TYPE_A2: decode_row_of_type(GGML_TYPE_A2, &athena_tables_a2, columns, x, carry, levels, scales, zero); break;
        case GGML_TYPE_A3: decode_row_of_type(GGML_TYPE_A3, &athena_tables_a3, columns, x, carry, levels, scales, zero); break;
        default:           decode_row_of_type(GGML_TYPE_A4, &athena_tables_a4, columns, x, carry, levels, scales, zero); break;
    }
}

static athena_carry row_start(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_A2: return athena_neon_row_start(&athena_tables_a2);
        case GGML_TYPE_A3: return athena_neon_row_start(&athena_tables_a3);
        default:           return athena_neon_row_start(&athena_tables_a4);
    }
}

#define ATHENA_VECTOR 4
typedef int32x4_t athena_vector;

// 4 x 4 lanes of 32 bits.
static ATHENA_INLINE void transpose(int32x4_t v[4]) {
    const int64x2_t a = vreinterpretq_s64_s32(vtrn1q_s32(v[0], v[1])), b = vreinterpretq_s64_s32(vtrn2q_s32(v[0], v[1]));
    const int64x2_t c = vreinterpretq_s64_s32(vtrn1q_s32(v[2], v[3])), d = vreinterpretq_s64_s32(vtrn2q_s32(v[2], v[3]));
    v[0] = vreinterpretq_s32_s64(vzip1q_s64(a, c));
    v[1] = vreinterpretq_s32_s64(vzip1q_s64(b, d));
    v[2] = vreinterpretq_s32_s64(vzip2q_s64(a, c));
    v[3] = vreinterpretq_s32_s64(vzip2q_s64(b, d));
}

static ATHENA_INLINE athena_vector load_vector(const void * p) {
    return vreinterpretq_s32_s8(vld1q_s8(p));
}

static ATHENA_INLINE void store_vector(void * p, athena_vector v) {
    vst1q_s8(p, vreinterpretq_s8_s32(v));
}

// Kernels: 64 columns of 8 rows times those of a panel, [row][token].

#if ATHENA_UNIT == 8

static ATHENA_INLINE void multiply(const int8_t * levels, const athena_panel * panel, int32x4_t dot[8][2]) {
    int32x4_t square[4][4]; // 2 rows times 2 tokens
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            square[i][j] = vdupq_n_s32(0);
        }
    }
    ATHENA_UNROLL(8)
    for (int u = 0; u < ATHENA_GROUP/8; u++) {
        int8x16_t q[4];
        ATHENA_UNROLL(4)
        for (int j = 0; j < 4; j++) {
            q[j] = vld1q_s8(panel->q[u][2*j]);
        }
        ATHENA_UNROLL(4)
        for (int i = 0; i < 4; i++) {
            const int8x16_t l = vld1q_s8(levels + i*2*ATHENA_GROUP + 16*u);
            ATHENA_UNROLL(4)
            for (int j = 0; j < 4; j++) {
                square[i][j] = vmmlaq_s32(square[i][j], l, q[j]);
            }
        }
    }
    ATHENA_UNROLL(4)
    for (int i = 0; i < 4; i++) {
        ATHENA_UNROLL(2)
        for (int j = 0; j < 2; j++) {
            const int64x2_t a = vreinterpretq_s64_s32(square[i][2*j]), b = vreinterpretq_s64_s32(square[i][2*j + 1]);
            dot[2*i][j]     = vreinterpretq_s32_s64(vzip1q_s64(a, b));
            dot[2*i + 1][j] = vreinterpretq_s32_s64(vzip2q_s64(a, b));
        }
    }
}

#elif ATHENA_UNIT == 4

// Four columns of every row; `lane` must be a constant.
#define ATHENA_NEON_COLUMNS(lane) do { \
        const int8x16_t q0 = vld1q_s8(panel->q[c/4 + (lane)][0]); \
        const int8x16_t q1 = vld1q_s8(panel->q[c/4 + (lane)][4]); \
        ATHENA_UNROLL(8) \
        for (int m = 0; m < 8; m++) { \
            dot[m][0] = vdotq_laneq_s32(dot[m][0], q0, l[m], (lane)); \
            dot[m][1] = vdotq_laneq_s32(dot[m][1], q1, l[m], (lane)); \
        } \
    } while (0)

static ATHENA_INLINE void multiply(const int8_t * levels, const athena_panel * panel, int32x4_t dot[8][2]) {
    for (int m = 0; m < 8; m++) {
        dot[m][0] = dot[m][1] = vdupq_n_s32(0);
    }
    ATHENA_UNROLL(4)
    for (int c = 0; c < ATHENA_GROUP; c += 16) {
        int8x16_t l[8];
        ATHENA_UNROLL(8)
        for (int m = 0; m < 8; m++) {
            l[m] = vld1q_s8(levels + m*ATHENA_GROUP + c);
        }
        ATHENA_NEON_COLUMNS(0);
        ATHENA_NEON_COLUMNS(1);
        ATHENA_NEON_COLUMNS(2);
        ATHENA_NEON_COLUMNS(3);
    }
}

#else

// The products of 64 columns of a row and a token in four lanes: four of them are 64 * 127 * 4 at most and fit into 16 bits.
static ATHENA_INLINE int32x4_t multiply_row(const int8x16_t l[4], const athena_panel * panel, int token) {
    int32x4_t sum = vdupq_n_s32(0);
    ATHENA_UNROLL(2)
    for (int u = 0; u < 4; u += 2) {
        const int8x16_t q0 = vld1q_s8(panel->q[u][token]), q1 = vld1q_s8(panel->q[u + 1][token]);
        int16x8_t products = vmull_s8(vget_low_s8(l[u]), vget_low_s8(q0));
        products = vmlal_high_s8(products, l[u], q0);
        products = vmlal_s8(products, vget_low_s8(l[u + 1]), vget_low_s8(q1));
        products = vmlal_high_s8(products, l[u + 1], q1);
        sum = vpadalq_s16(sum, products);
    }
    return sum;
}

static ATHENA_INLINE void multiply(const int8_t * levels, const athena_panel * panel, int32x4_t dot[8][2]) {
    for (int m = 0; m < 8; m++) {
        int8x16_t l[4];
        ATHENA_UNROLL(4)
        for (int u = 0; u < 4; u++) {
            l[u] = vld1q_s8(levels + m*ATHENA_GROUP + 16*u);
        }
        ATHENA_UNROLL(2)
        for (int j = 0; j < 2; j++) {
            int32x4_t s[4];
            ATHENA_UNROLL(4)
            for (int i = 0; i < 4; i++) {
                s[i] = multiply_row(l, panel, 4*j + i);
            }
            dot[m][j] = vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3]));
        }
    }
}

#endif

// 16 rows times one panel, `groups` times 64 columns, added to sums (or, if `first`, in their place).
static void kernel(const uint8_t * levels, const float * scales, const athena_panel * panel, int groups, float * sums, bool first) {
    for (int g = 0; g < groups; g++, levels += ATHENA_TILE_BYTES, scales += ATHENA_TILE_ROWS, panel++) {
        const float32x4_t d[2] = { vld1q_f32(panel->d), vld1q_f32(panel->d + 4) };
        for (int half = 0; half < ATHENA_TILE_ROWS; half += 8) {
            int32x4_t dot[8][2];
            multiply((const int8_t *) levels + half*ATHENA_GROUP, panel, dot);
            ATHENA_UNROLL(8)
            for (int m = 0; m < 8; m++) {
                ATHENA_UNROLL(2)
                for (int j = 0; j < 2; j++) {
                    float * sum = sums + (half + m)*ATHENA_PANEL + 4*j;
                    const float32x4_t before = first && g == 0 ? vdupq_n_f32(0.0f) : vld1q_f32(sum);
                    vst1q_f32(sum, vfmaq_f32(before, vcvtq_f32_s32(dot[m][j]), vmulq_n_f32(d[j], scales[half + m])));
                }
            }
        }
    }
}
