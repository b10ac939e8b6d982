// Random bytes as rows of every type, in heap buffers of exactly their size, through every decoder; then random floats
// (some of them not finite) through every quantizer. For the sanitizers; also fails where a value is not finite, or where
// the integer sums of the dot products for this processor and of the plain ones differ.

#include "athena.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

// gemm.c
bool multiply(int type, const void * x, int64_t rows, int64_t columns, const float * y, int64_t tokens, float * out, bool gathered);

typedef void (*dot_fn)(int, float *, size_t, const void *, size_t, const void *, size_t, int);

typedef struct {
    enum ggml_type type;
    size_t size; // of 64 columns
    void (*decode)(const void *, float *, int64_t);
    void (*encode)(const float *, void *, int64_t);
    dot_fn dot;
    dot_fn dot_generic;
} kind;

static const kind kinds[] = {
    { GGML_TYPE_A2, 17, dequantize_row_a2, quantize_row_a2, ggml_vec_dot_a2_q8_a64, ggml_vec_dot_a2_q8_a64_generic },
    { GGML_TYPE_A3, 25, dequantize_row_a3, quantize_row_a3, ggml_vec_dot_a3_q8_a64, ggml_vec_dot_a3_q8_a64_generic },
    { GGML_TYPE_A4, 33, dequantize_row_a4, quantize_row_a4, ggml_vec_dot_a4_q8_a64, ggml_vec_dot_a4_q8_a64_generic },
};

static uint64_t seed = 1;

static uint32_t random_bits(void) {
    seed = seed*6364136223846793005u + 1442695040888963407u;
    return (uint32_t) (seed >> 32);
}

static void * exactly(size_t size) {
    void * p = malloc(size);
    if (p == NULL) {
        exit(2);
    }
    return p;
}

static void expect(bool good, const char * what, int64_t columns) {
    if (!good) {
        fprintf(stderr, "%s, %d columns\n", what, (int) columns);
        exit(1);
    }
}

static bool all_finite(const float * x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            return false;
        }
    }
    return true;
}

static void test_row(const kind * k, int64_t columns) {
    uint8_t * row = exactly((size_t) (columns/64)*k->size);
    float * values = exactly((size_t) columns*sizeof(float));
    block_q8_a64 * activations = exactly((size_t) (columns/64)*sizeof(block_q8_a64));
    for (size_t i = 0; i < (size_t) (columns/64)*k->size; i++) {
        row[i] = (uint8_t) random_bits();
    }
    k->decode(row, values, columns);
    expect(all_finite(values, columns), "a decoded value is not finite", columns);

    float s[2] = { NAN, NAN };
    quantize_row_q8_a64(values, activations, columns);
    quantize_row_q8_a64_ref(values, activations, columns);
    k->dot((int) columns, &s[0], 0, row, 0, activations, 0, 1);
    k->dot_generic((int) columns, &s[1], 0, row, 0, activations, 0, 1);
    expect(all_finite(s, 2), "a dot product is not finite", columns);

    // one group alone: a float holds its integer sum times its scale exactly
    for (int64_t g = 0; g < columns/64; g++) {
        for (int64_t i = 0; i < columns/64; i++) {
            activations[i].d = i == g ? 1.0f : 0.0f;
        }
        k->dot((int) columns, &s[0], 0, row, 0, activations, 0, 1);
        k->dot_generic((int) columns, &s[1], 0, row, 0, activations, 0, 1);
        expect(s[0] == s[1], "a sum is not that of the plain code", columns);
    }

    for (int64_t i = 0; i < columns; i++) {
        const uint32_t bits = random_bits(); // any float, not-a-number and infinities among them
        memcpy(&values[i], &bits, sizeof(bits));
    }
    quantize_row_q8_a64(values, activations, columns);
    quantize_row_q8_a64_ref(values, activations, columns);
    k->encode(values, row, columns);
    k->decode(row, values, columns);
    expect(all_finite(values, columns), "a quantized value is not finite", columns);
    free(row);
    free(values);
    free(activations);
}

// Several rows and tokens, some of them without a full tile or panel.
static void test_product(const kind * k, int64_t rows, int64_t columns, int64_t tokens) {
    const size_t size = (size_t) (rows*columns/64)*k->size;
    uint8_t * x = exactly(size);
    float * y = exactly((size_t) (tokens*columns)*sizeof(float));
    float * out = exactly((size_t) (tokens*rows)*sizeof(float));
    for (size_t i = 0; i < size; i++) {
        x[i] = (uint8_t) random_bits();
    }
    for (int64_t i = 0; i < tokens*columns; i++) {
        y[i] = (float) (int32_t) random_bits();
    }
    for (int gathered = 0; gathered < 2; gathered++) {
        if (multiply((int) k->type, x, rows, columns, y, tokens, out, gathered)) {
            expect(all_finite(out, tokens*rows), "a product is not finite", columns);
        }
    }
    free(x);
    free(y);
    free(out);
}

int main(void) {
    for (size_t i = 0; i < sizeof(kinds)/sizeof(kinds[0]); i++) {
        for (int64_t columns = 64; columns <= 1408; columns += 64) {
            test_row(&kinds[i], columns);
        }
        for (int64_t tokens = 1; tokens <= 40; tokens += 13) {
            test_product(&kinds[i], 3*tokens + 2, 64*tokens, tokens);
        }
    }
    return 0;
}
