// MUL_MAT and MUL_MAT_ID of A2, A3 and A4 matrices.

#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Work memory that the node needs beyond that for its activations in Q8_A64.
size_t ggml_athena_wdata_size(int n_tasks, const struct ggml_tensor * node);

// The whole operation, or false where it is not one for this code (other types, neither AVX2 nor NEON).
bool ggml_athena_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// One expert of MUL_MAT_ID, or false. The activations are in params->wdata, row by row; n_rows of them are this expert's:
// rows holds pairs of its place among a token's experts and the token. scratch: of ggml_athena_wdata_size() bytes.
bool ggml_athena_mul_mat_id(const struct ggml_compute_params * params, struct ggml_tensor * dst, int64_t expert, int64_t n_rows, const int32_t * rows, char * scratch);

#ifdef __cplusplus
}
#endif
