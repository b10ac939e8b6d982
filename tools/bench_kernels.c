// Dot-product speed of ggml tensor types on one core, through libggml's own traits. tools/bench_kernels.py builds and runs
// this: bench_kernels ROWS COLUMNS REPEATS prints "type columns repeat seconds" lines, the types in alternation. The seconds
// are those that the thread spent on the CPU.

#include "ggml.h"
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
} candidate;

static const enum ggml_type types[] = {
    GGML_TYPE_A2, GGML_TYPE_A3, GGML_TYPE_A4, GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ2_S, GGML_TYPE_IQ3_XXS, GGML_TYPE_IQ3_S,
    GGML_TYPE_IQ4_XS, GGML_TYPE_IQ4_NL, GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0,
};
#define N_TYPES (sizeof(types)/sizeof(types[0]))

static void * allocate(size_t size) {
    void * p = aligned_alloc(64, (size + 63)/64*64);
    if (p == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return p;
}

// Roughly Gaussian.
static float random_float(void) {
    float sum = 0.0f;
    for (int i = 0; i < 6; i++) {
        sum += (float) rand()/(float) RAND_MAX - 0.5f;
    }
    return sum;
}

static candidate prepare(enum ggml_type type, const float * weights, const float * x, int64_t rows, int64_t columns) {
    candidate c = { type, ggml_row_size(type, columns), NULL, NULL, ggml_get_type_traits_cpu(type) };
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

static double seconds_of_all_rows(const candidate * c, int64_t rows, int64_t columns) {
    struct timespec a, b;
    volatile float sink = 0.0f;
    float sum = 0.0f;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
    for (int64_t r = 0; r < rows; r++) {
        float s;
        c->traits->vec_dot((int) columns, &s, 0, c->rows + (size_t) r*c->row_size, 0, c->activations, 0, 1);
        sum += s;
    }
    sink = sum;
    (void) sink;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
    return (double) (b.tv_sec - a.tv_sec) + 1e-9*(double) (b.tv_nsec - a.tv_nsec);
}

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s ROWS COLUMNS REPEATS\n", argv[0]);
        return 2;
    }
    const int64_t rows = atoll(argv[1]), columns = atoll(argv[2]);
    const int repeats = atoi(argv[3]);
    if (rows < DISTINCT_ROWS || columns < 64 || columns % 64 != 0 || repeats < 1) {
        fprintf(stderr, "ROWS is at least %d, COLUMNS a multiple of 64, REPEATS positive\n", DISTINCT_ROWS);
        return 2;
    }
    ggml_cpu_init();
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
            candidates[n++] = prepare(types[t], weights, x, rows, columns);
        }
    }
    for (int repeat = -1; repeat < repeats; repeat++) { // the first one warms up
        for (size_t t = 0; t < n; t++) {
            const double seconds = seconds_of_all_rows(&candidates[t], rows, columns);
            if (repeat >= 0) {
                printf("%s %d %d %.9f\n", ggml_type_name(candidates[t].type), (int) columns, repeat, seconds);
            }
        }
    }
    return 0;
}
