// Executes the dot products and the matrix product of every tensor type once, each between two calls of count_mark():
// count_instructions ROWS COLUMNS TOKENS. tools/count_instructions.py builds it, runs it in an emulator that names every
// executed instruction, and counts. Prints one line a measurement: the type, then "dot" or "product". The rows are random
// bytes: what they hold does not change the number of instructions.

#include "ggml.h"

#include "../tests/c/cpu_memory.h"
#include "allocate.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const enum ggml_type types[] = {
    GGML_TYPE_A2, GGML_TYPE_A3, GGML_TYPE_A4, GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ3_XXS, GGML_TYPE_IQ3_S,
    GGML_TYPE_IQ4_XS, GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0,
};

__attribute__((noinline)) void count_mark(void) {
    __asm__ volatile("");
}

static void count_dots(enum ggml_type type, const uint8_t * rows, const float * x, int64_t n_rows, int64_t columns) {
    const struct ggml_type_traits_cpu * traits = ggml_get_type_traits_cpu(type);
    const size_t row_size = ggml_row_size(type, columns);
    void * activations = allocate(ggml_row_size(traits->vec_dot_type, columns));
    ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float(x, activations, columns);
    count_mark();
    for (int64_t r = 0; r < n_rows; r++) {
        float s;
        traits->vec_dot((int) columns, &s, 0, rows + (size_t) r*row_size, 0, activations, 0, 1);
    }
    count_mark();
    free(activations);
    printf("%s dot\n", ggml_type_name(type));
}

static void count_product(enum ggml_type type, const uint8_t * rows, const float * x, int64_t n_rows, int64_t columns, int64_t tokens, ggml_backend_t backend) {
    const struct ggml_init_params params = { 16*ggml_tensor_overhead() + ggml_graph_overhead(), NULL, true };
    struct ggml_context * for_weights = ggml_init(params);
    struct ggml_context * for_others  = ggml_init(params);
    struct ggml_tensor * weights = ggml_new_tensor_2d(for_weights, type, columns, n_rows);
    struct ggml_tensor * input   = ggml_new_tensor_2d(for_others, GGML_TYPE_F32, columns, tokens);
    struct ggml_tensor * product = ggml_mul_mat(for_others, weights, input);
    struct ggml_cgraph * graph = ggml_new_graph(for_others);
    ggml_build_forward_expand(graph, product);
    ggml_backend_buffer_t of_weights = ggml_backend_alloc_ctx_tensors_from_buft(for_weights, memory_for(weights, product));
    ggml_backend_buffer_t of_others  = ggml_backend_alloc_ctx_tensors_from_buft(for_others, ggml_backend_cpu_buffer_type());
    if (!of_weights || !of_others) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    ggml_backend_tensor_set(weights, rows, 0, (size_t) n_rows*ggml_row_size(type, columns));
    ggml_backend_tensor_set(input, x, 0, (size_t) (tokens*columns)*sizeof(float));
    count_mark();
    const enum ggml_status status = ggml_backend_graph_compute(backend, graph);
    count_mark();
    if (status != GGML_STATUS_SUCCESS) {
        fprintf(stderr, "a product failed\n");
        exit(1);
    }
    printf("%s product\n", ggml_type_name(type));
    ggml_backend_buffer_free(of_weights);
    ggml_backend_buffer_free(of_others);
    ggml_free(for_weights);
    ggml_free(for_others);
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s ROWS COLUMNS TOKENS\n", argv[0]);
        return 2;
    }
    const int64_t n_rows = atoll(argv[1]), columns = atoll(argv[2]), tokens = atoll(argv[3]);
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, 1);
    uint8_t * rows = allocate((size_t) (n_rows*columns)*2);
    float * x = allocate((size_t) (tokens*columns)*sizeof(float));
    for (int64_t i = 0; i < n_rows*columns*2; i++) {
        rows[i] = (uint8_t) (i*2654435761u >> 13);
    }
    for (int64_t i = 0; i < tokens*columns; i++) {
        x[i] = (float) (i*7919 % 255 - 127)/127.0f;
    }
    for (size_t t = 0; t < sizeof(types)/sizeof(types[0]); t++) {
        if (columns % ggml_blck_size(types[t]) == 0) {
            count_dots(types[t], rows, x, n_rows, columns);
            count_product(types[t], rows, x, n_rows, columns, tokens, backend);
        }
    }
    ggml_backend_free(backend);
    return 0;
}
