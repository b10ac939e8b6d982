// The tensor types A2, A3 and A4 and their activation type Q8_A64. The format is described in docs/format.md.
//
// Unlike the other types of ggml these run through a whole row: a row decodes from its start only. Every function here
// that takes k elements takes one row (or its beginning), never several rows and never the middle of one.

#pragma once

#include "ggml.h"

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ATHENA_LANES   32  // columns of one step; column c is lane c % 32 of step c / 32
#define ATHENA_GROUP   64  // columns that share a scale: two steps
#define ATHENA_SUPER   256 // columns of a superblock: four groups, eight steps
#define ATHENA_ZERO    64  // the sum of the two table entries that stands for zero

// A row is ne0 / 256 superblocks, then (ne0 % 256) / 64 tail blocks.

typedef struct {
    uint8_t scales[4];
    uint8_t pairs[2][32]; // byte l of vector v: the 2-bit symbols of lane l at steps 4v .. 4v + 3, lowest bits first
} block_a2;

typedef struct {
    uint8_t scale;
    uint8_t pairs[16]; // byte j: steps 0 and 1 of lane j, then of lane j + 16
} block_a2_tail;

typedef struct {
    uint8_t scales[4];
    uint8_t high[2][32]; // the upper two bits of the symbols, laid out as in block_a2
    uint8_t low[32];     // bit t of byte l: the lowest bit of the symbol of lane l at step t
} block_a3;

typedef struct {
    uint8_t scale;
    uint8_t high[16]; // as in block_a2_tail
    uint8_t low[8];   // byte j: steps 0 and 1 of lane j, then of lanes j + 8, j + 16, j + 24
} block_a3_tail;

typedef struct {
    uint8_t scales[4];
    uint8_t nibbles[4][32]; // byte l of vector v: the symbols of lane l at steps 2v (low nibble) and 2v + 1
} block_a4;

typedef struct {
    uint8_t scale;
    uint8_t nibbles[32];
} block_a4_tail;

// Activations. Self-contained, since ggml cuts activation rows into pieces of one block for its threads.
typedef struct {
    float   d;      // value = d * qs
    int32_t offset; // -ATHENA_ZERO * (sum of qs): what the zero point of the weights adds to their integer dot product
    int8_t  qs[ATHENA_GROUP]; // -127 .. 127
} block_q8_a64;

static_assert(sizeof(block_a2)      == 68,  "wrong A2 superblock size");
static_assert(sizeof(block_a3)      == 100, "wrong A3 superblock size");
static_assert(sizeof(block_a4)      == 132, "wrong A4 superblock size");
static_assert(sizeof(block_a2_tail) == 17,  "wrong A2 tail block size");
static_assert(sizeof(block_a3_tail) == 25,  "wrong A3 tail block size");
static_assert(sizeof(block_a4_tail) == 33,  "wrong A4 tail block size");
static_assert(sizeof(block_q8_a64)  == 72,  "wrong Q8_A64 block size");

// Whether rows of the type decode from their start only.
static inline bool ggml_athena_is_row_type(enum ggml_type type) {
    return type == GGML_TYPE_A2 || type == GGML_TYPE_A3 || type == GGML_TYPE_A4;
}

// Bytes of 64 columns, wherever they are in a row.
static inline size_t ggml_athena_group_size(enum ggml_type type) {
    return type == GGML_TYPE_A2 ? sizeof(block_a2_tail) : type == GGML_TYPE_A3 ? sizeof(block_a3_tail) : sizeof(block_a4_tail);
}

// Scale byte to scale: 2^-19 .. 0.12109375.
static inline float ggml_athena_scale(uint8_t code) {
    const uint32_t bits = ((uint32_t) code << 19) + (108u << 23);
    float scale;
    memcpy(&scale, &bits, sizeof(scale));
    return scale;
}

// What activations with the largest magnitude amax are multiplied by. 0 (all qs are 0) where that is no ordinary number:
// infinities and not-a-number then reach the dot product through d.
static inline float ggml_athena_activation_scale(float amax) {
    return amax >= 1e-30f && amax <= 3e38f ? 127.0f/amax : 0.0f;
}

// One row of k columns (a multiple of 64) to floats.
GGML_API void dequantize_row_a2(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_a3(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_a4(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

// One row of k floats, every column of equal importance. Not a number is taken as 0, infinities as large numbers.
GGML_API void quantize_row_a2(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_a3(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_a4(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

// nrows rows; imatrix: the importance of every column (n_per_row numbers), or NULL. Returns the bytes written.
GGML_API size_t quantize_a2(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_a3(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_a4(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

// k activations (a multiple of 64), block by block.
GGML_API void quantize_row_q8_a64_ref(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

// What a row carries from one block to the next; all zero before a row.
typedef struct {
    uint8_t symbol[ATHENA_LANES];     // the last symbol of every lane
    uint8_t windows[2][ATHENA_LANES]; // the last window and the one before it
} ggml_athena_state;

// The block at x, a superblock (columns = 256) or a tail block (columns = 64): the sums of its table entries (0 .. 127,
// in column order) and its scales, one per 64 columns. Returns the size of the block in bytes.
GGML_API size_t ggml_athena_decode_block(enum ggml_type type, ggml_athena_state * state, const void * x, int columns, uint8_t * sums, float * scales);

// Entries of the type tables for the ids 43 .. 118, which no type uses: as harmless as those of removed types.
#define GGML_ATHENA_UNUSED_TYPE(id) [id] = { .type_name = "UNUSED", .blck_size = 0, .type_size = 0, .is_quantized = false }
#define GGML_ATHENA_UNUSED_TYPES_4(id) \
    GGML_ATHENA_UNUSED_TYPE((id)), GGML_ATHENA_UNUSED_TYPE((id) + 1), \
    GGML_ATHENA_UNUSED_TYPE((id) + 2), GGML_ATHENA_UNUSED_TYPE((id) + 3)
#define GGML_ATHENA_UNUSED_TYPES_76(id) \
    GGML_ATHENA_UNUSED_TYPES_4((id)),      GGML_ATHENA_UNUSED_TYPES_4((id) + 4),  GGML_ATHENA_UNUSED_TYPES_4((id) + 8), \
    GGML_ATHENA_UNUSED_TYPES_4((id) + 12), GGML_ATHENA_UNUSED_TYPES_4((id) + 16), GGML_ATHENA_UNUSED_TYPES_4((id) + 20), \
    GGML_ATHENA_UNUSED_TYPES_4((id) + 24), GGML_ATHENA_UNUSED_TYPES_4((id) + 28), GGML_ATHENA_UNUSED_TYPES_4((id) + 32), \
    GGML_ATHENA_UNUSED_TYPES_4((id) + 36), GGML_ATHENA_UNUSED_TYPES_4((id) + 40), GGML_ATHENA_UNUSED_TYPES_4((id) + 44), \
    GGML_ATHENA_UNUSED_TYPES_4((id) + 48), GGML_ATHENA_UNUSED_TYPES_4((id) + 52), GGML_ATHENA_UNUSED_TYPES_4((id) + 56), \
    GGML_ATHENA_UNUSED_TYPES_4((id) + 60), GGML_ATHENA_UNUSED_TYPES_4((id) + 64), GGML_ATHENA_UNUSED_TYPES_4((id) + 68), \
    GGML_ATHENA_UNUSED_TYPES_4((id) + 72)
#define GGML_ATHENA_FIRST_UNUSED_TYPE 43
static_assert(GGML_TYPE_Q8_A64 == GGML_ATHENA_FIRST_UNUSED_TYPE + 76, "the unused types end below GGML_TYPE_Q8_A64");

#ifdef __cplusplus
}
#endif
