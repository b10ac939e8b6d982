// Dot products of A2, A3 and A4 rows with Q8_A64 activations, and the quantizer of the activations.

#pragma once

#include "ggml-athena.h"

// For code that is written once and specialized where it is used: for a type, or for dot products and tiles.
#if defined(__GNUC__)
#define ATHENA_INLINE inline __attribute__((always_inline))
#define ATHENA_NOINLINE __attribute__((noinline))
#else
#define ATHENA_INLINE inline
#define ATHENA_NOINLINE
#endif

// Makes GCC believe that a value changes here. Otherwise it adds up in another order, computes constants anew for every row, or
// keeps what it could load again.
#if defined(__GNUC__)
#define ATHENA_PIN_VECTOR(v)  __asm__("" : "+v"(v))
#define ATHENA_PIN_POINTER(p) __asm__("" : "+r"(p))
#else
#define ATHENA_PIN_VECTOR(v)
#define ATHENA_PIN_POINTER(p)
#endif

// A tile of a matrix product: 64 columns of 16 rows.
#define ATHENA_TILE_ROWS  16
#define ATHENA_TILE_BYTES (ATHENA_TILE_ROWS*ATHENA_GROUP)

#ifdef __cplusplus
extern "C" {
#endif

// As every ggml_vec_dot: n columns of one row; nrc is 1 and the strides bs, bx and by are not used.
void ggml_vec_dot_a2_q8_a64(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_a3_q8_a64(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_a4_q8_a64(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

// out[r] = the dot product of y with row r of `rows` rows of n columns, `stride` bytes apart: the same as those of the
// functions above, which start anew for every row.
void ggml_athena_dot_rows(enum ggml_type type, int n, const void * x, size_t stride, int64_t rows, const void * y, float * out);

// Plain C, the truth for every other version: those must give the same integer sum for every 64 columns.
void ggml_vec_dot_a2_q8_a64_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_a3_q8_a64_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_a4_q8_a64_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

// The same bytes as quantize_row_q8_a64_ref.
void quantize_row_q8_a64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

#ifdef __cplusplus
}
#endif
