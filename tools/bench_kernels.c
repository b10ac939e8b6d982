// Speed of ggml tensor types on one core: dot products through libggml's own traits, and products of a matrix with several
// tokens through its graphs, the weights in the memory type that llama.cpp would choose (repacked, AMX). tools/bench_kernels.py
// builds and runs this: bench_kernels ROWS COLUMNS TOKENS REPEATS prints "type repeat seconds" lines, the types in alternation;
// TOKENS is 0 for dot products. The seconds are those that the thread spent on the CPU.

#include "ggml.h"

#include "../tests/c/cpu_memory.h"
#include "allocate.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DISTINCT_ROWS 32 // that many are quantized, then repeated: quantizing is slow

typedef struct {
    enum ggml_type type;
    size_t row_size;
    uint8_t * rows;
    void * activations;
    const struct ggml_type_traits_cpu * traits;
    struct ggml_cgraph * graph; // of the product with several tokens
} candidate;

static const enum ggml_type types[] = {
    GGML_TYPE_A2, GGML_TYPE_A3, GGML_TYPE_A4, GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ2_S, GGML_TYPE_IQ3_XXS, GGML_TYPE_IQ3_S,
    GGML_TYPE_IQ4_XS, GGML_TYPE_IQ4_NL, GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0,
};
#define N_TYPES (sizeof(types)/sizeof(types[0]))

// Roughly Gaussian.
static float random_float(void) {
    float sum = 0.0f;
    for (int i = 0; i < 6; i++) {
        sum += (float) rand()/(float) RAND_MAX - 0.5f;
    }
    return sum;
}

static candidate prepare(enum ggml_type type, const float * weights, const float * x, int64_t rows, int64_t columns) {
    candidate c = { type, ggml_row_size(type, columns), NULL, NULL, ggml_get_type_traits_cpu(type), NULL };
    float * importance = allocate((size_t) columns*sizeof(float));
    for (int64_t i = 0; i < columns; i++) {
        importance[i] = 1.0f;
    }
    c.rows = allocate((size_t) rows*c.row_size);
    ggml_quantize_chunk(type, weights, c.rows, 0, DISTINCT_ROWS, columns, importance);
    for (int64_t r = DISTINCT_ROWS; r < rows; r++) {
        memcpy(c.rows + (size_t) r*c.row_size, c.rows + (size_t) (r % DISTINCT_ROWS)*c.row_size, c.row_size);
    }
    c.activations = allocate(ggml_row_size(c.traits->vec_dot_type, columns));
    ggml_get_type_traits_cpu(c.traits->vec_dot_type)->from_float(x, c.activations, columns);
    free(importance);
    return c;
}

// The graph of one product with `tokens` columns of activations.
static void prepare_product(candidate * c, const float * x, int64_t rows, int64_t columns, int64_t tokens) {
    const struct ggml_init_params params = { 16*ggml_tensor_overhead() + ggml_graph_overhead(), NULL, true };
    struct ggml_context * for_weights = ggml_init(params);
    struct ggml_context * for_others  = ggml_init(params);
    struct ggml_tensor * weights = ggml_new_tensor_2d(for_weights, c->type, columns, rows);
    struct ggml_tensor * input   = ggml_new_tensor_2d(for_others, GGML_TYPE_F32, columns, tokens);
    struct ggml_tensor * product = ggml_mul_mat(for_others, weights, input);
    c->graph = ggml_new_graph(for_others);
    ggml_build_forward_expand(c->graph, product);
    ggml_backend_buffer_type_t memory = memory_for(weights, product);
    fprintf(stderr, "%s: %s\n", ggml_type_name(c->type), ggml_backend_buft_name(memory));
    if (!ggml_backend_alloc_ctx_tensors_from_buft(for_weights, memory) ||
        !ggml_backend_alloc_ctx_tensors_from_buft(for_others, ggml_backend_cpu_buffer_type())) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    ggml_backend_tensor_set(weights, c->rows, 0, (size_t) rows*c->row_size);
    for (int64_t t = 0; t < tokens; t++) {
        ggml_backend_tensor_set(input, x, (size_t) (t*columns)*sizeof(float), (size_t) columns*sizeof(float));
    }
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double) t.tv_sec + 1e-9*(double) t.tv_nsec;
}

static double seconds_of_dots(const candidate * c, int64_t rows, int64_t columns) {
    volatile float sink = 0.0f;
    float sum = 0.0f;
    const double start = now();
    for (int64_t r = 0; r < rows; r++) {
        float s;
        c->traits->vec_dot((int) columns, &s, 0, c->rows + (size_t) r*c->row_size, 0, c->activations, 0, 1);
        sum += s;
    }
    sink = sum;
    (void) sink;
    return now() - start;
}

static double seconds_of_product(const candidate * c, ggml_backend_t backend) {
    const double start = now();
    if (ggml_backend_graph_compute(backend, c->graph) != GGML_STATUS_SUCCESS) {
        fprintf(stderr, "a product failed\n");
        exit(1);
    }
    return now() - start;
}

int main(int argc, char ** argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: %s ROWS COLUMNS TOKENS REPEATS\n", argv[0]);
        return 2;
    }
    const int64_t rows = atoll(argv[1]), columns = atoll(argv[2]), tokens = atoll(argv[3]);
    const int repeats = atoi(argv[4]);
    if (rows < DISTINCT_ROWS || columns < 64 || columns % 64 != 0 || tokens < 0 || repeats < 1) {
        fprintf(stderr, "ROWS is at least %d, COLUMNS a multiple of 64, TOKENS not negative, REPEATS positive\n", DISTINCT_ROWS);
        return 2;
    }
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, 1);
    float * weights = allocate((size_t) (DISTINCT_ROWS*columns)*sizeof(float));
    float * x       = allocate((size_t) columns*sizeof(float));
    for (int64_t i = 0; i < DISTINCT_ROWS*columns; i++) {
        weights[i] = 0.02f*random_float();
    }
    for (int64_t i = 0; i < columns; i++) {
        x[i] = random_float();
    }
    candidate candidates[N_TYPES];
    size_t n = 0;
    for (size_t t = 0; t < N_TYPES; t++) {
        if (columns % ggml_blck_size(types[t]) == 0) {
            candidates[n] = prepare(types[t], weights, x, rows, columns);
            if (tokens > 0) {
                prepare_product(&candidates[n], x, rows, columns, tokens);
            }
            n++;
        }
    }
    for (int repeat = -1; repeat < repeats; repeat++) { // the first one warms up
        for (size_t t = 0; t < n; t++) {
            const candidate * c = &candidates[t];
            const double seconds = tokens > 0 ? seconds_of_product(c, backend) : seconds_of_dots(c, rows, columns);
            if (repeat >= 0) {
                printf("%s %d %.9f\n", ggml_type_name(c->type), repeat, seconds);
            }
        }
    }
    return 0;
}
