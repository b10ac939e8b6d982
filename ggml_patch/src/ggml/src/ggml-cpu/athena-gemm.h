// Products of A2, A3 and A4 matrices with many columns of activations ("tokens"): a tile of rows is decoded once and serves
// all of them. Versions for AVX2, AVX-VNNI, AVX-512 (VBMI and VNNI) and AMX, and for NEON with or without its dot product and
// matrix product instructions; athena-mul-mat.c puts them into ggml.

#pragma once

#include "athena.h"
#include "athena-avx512.h"
#include "athena-neon.h"

#if defined(ATHENA_HAVE_AVX2) || defined(ATHENA_HAVE_NEON)
#define ATHENA_HAVE_GEMM

#ifdef __cplusplus
extern "C" {
#endif

// Tokens side by side in a panel.
#if defined(ATHENA_HAVE_AVX512) && defined(__AVX512VNNI__)
#define ATHENA_GEMM_AVX512
#define ATHENA_PANEL 16
#else
#define ATHENA_PANEL 8
#endif

// Neighbouring columns of a token that lie together in a panel: what the instructions add up.
#if !defined(ATHENA_HAVE_NEON)
#define ATHENA_UNIT 4
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define ATHENA_UNIT 8
#elif defined(__ARM_FEATURE_DOTPROD)
#define ATHENA_UNIT 4
#else
#define ATHENA_UNIT 16
#endif

// Panels that a kernel multiplies with a tile at once: as many sums as registers hold, so that few loads serve many products.
#if defined(ATHENA_HAVE_NEON)
#define ATHENA_KERNEL_PANELS 1
#elif defined(ATHENA_HAVE_VNNI)
#define ATHENA_KERNEL_PANELS 3
#else
#define ATHENA_KERNEL_PANELS 2
#define ATHENA_SHORT_SUMS // athena-gemm-short.h
#endif

#define ATHENA_GEMM_ROWS    64  // most rows of a task: four tiles
#define ATHENA_GEMM_TOKENS  512 // most tokens of a task
#define ATHENA_GEMM_COLUMNS 512 // columns that are decoded at a time (the last time up to a superblock more), so that tiles
                                // and a panel stay in the first-level cache
#define ATHENA_GEMM_GROUPS  ((ATHENA_GEMM_COLUMNS + ATHENA_SUPER)/ATHENA_GROUP)

// 64 columns of activations of several tokens: a unit of columns of one token, then that of the next one.
typedef struct {
    int8_t  q[ATHENA_GROUP/ATHENA_UNIT][ATHENA_PANEL][ATHENA_UNIT];
    float   d[ATHENA_PANEL];
    int32_t offset[ATHENA_PANEL];
#if defined(ATHENA_SHORT_SUMS)
    int16_t  start[4][ATHENA_PANEL][2]; // the zero point's part of sums of 16 columns, modulo 2^16
    uint32_t squares; // the largest sum of eight squares that are added up in 16 bits, or a little more
    uint32_t unused[15];
#endif
} athena_panel;

static_assert(sizeof(athena_panel) >= ATHENA_PANEL*sizeof(block_q8_a64), "panels take the place of the blocks they are made of");
static_assert(sizeof(athena_panel) % 64 == 0, "panels follow each other aligned");

// What one thread needs to work on a task. Aligned to 64 bytes.
typedef struct {
    uint8_t      levels[ATHENA_GEMM_ROWS/ATHENA_TILE_ROWS][ATHENA_GEMM_GROUPS][ATHENA_TILE_BYTES];
    float        scales[ATHENA_GEMM_ROWS/ATHENA_TILE_ROWS][ATHENA_GEMM_GROUPS][ATHENA_TILE_ROWS];
    int32_t      products[2][ATHENA_TILE_ROWS][ATHENA_PANEL]; // AMX's way from tiles to vectors
    float        sums[ATHENA_GEMM_TOKENS/ATHENA_PANEL][ATHENA_GEMM_ROWS/ATHENA_TILE_ROWS][ATHENA_TILE_ROWS][ATHENA_PANEL];
    athena_panel panels[ATHENA_KERNEL_PANELS][ATHENA_GEMM_GROUPS]; // where a task has no panels of its own
#if defined(ATHENA_SHORT_SUMS)
    uint32_t     squares[ATHENA_GEMM_ROWS/ATHENA_TILE_ROWS][ATHENA_GEMM_GROUPS]; // of levels, as those of panels
#endif
    athena_carry carry[ATHENA_GEMM_ROWS];
} athena_gemm_scratch;

typedef struct {
    enum ggml_type type;
    const void * x;      // the first row; rows lie row_stride bytes apart
    size_t row_stride;
    int64_t rows;        // 1 .. ATHENA_GEMM_ROWS
    int64_t columns;     // a multiple of 64
    int64_t tokens;      // 1 .. ATHENA_GEMM_TOKENS
    const athena_panel * panels;    // [tokens / ATHENA_PANEL, rounded up][columns / 64], aligned to 64 bytes; or NULL,
    const block_q8_a64 * const * y; // and then the activations of every token
    float * const * out; // where the results of every token go, one float a row
} athena_gemm_task;

// 64 columns of up to ATHENA_PANEL tokens to a panel; missing tokens become 0. Rows of x lie stride bytes apart.
void ggml_athena_quantize_panel(const float * x, size_t stride, int tokens, athena_panel * panel);

void ggml_athena_gemm(const athena_gemm_task * task, athena_gemm_scratch * scratch);

#ifdef __cplusplus
}
#endif

#endif
