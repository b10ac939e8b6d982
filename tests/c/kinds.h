// The functions of every type, for tests that go through all of them.

#pragma once

#include "athena.h"

typedef void (*dot_fn)(int, float *, size_t, const void *, size_t, const void *, size_t, int);

typedef struct {
    enum ggml_type type;
    size_t size; // of 64 columns
    void (*decode)(const void *, float *, int64_t);
    void (*encode)(const float *, void *, int64_t);
    dot_fn dot;
    dot_fn dot_generic;
} kind;

#define KINDS 3

static const kind kinds[KINDS] = {
    { GGML_TYPE_A2, 17, dequantize_row_a2, quantize_row_a2, ggml_vec_dot_a2_q8_a64, ggml_vec_dot_a2_q8_a64_generic },
    { GGML_TYPE_A3, 25, dequantize_row_a3, quantize_row_a3, ggml_vec_dot_a3_q8_a64, ggml_vec_dot_a3_q8_a64_generic },
    { GGML_TYPE_A4, 33, dequantize_row_a4, quantize_row_a4, ggml_vec_dot_a4_q8_a64, ggml_vec_dot_a4_q8_a64_generic },
};

// gemm.c
bool multiply(int type, const void * x, int64_t rows, int64_t columns, const float * y, int64_t tokens, float * out, bool gathered);
