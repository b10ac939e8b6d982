// Fuzz target: any bytes as rows of A2, A3 and A4, and any floats as activations, in heap buffers of exactly their size,
// through the decoder, the dot products, the matrix products and the quantizers.
//
// An input starts with four bytes: what to do, columns / 64, rows, tokens. The bytes after them are the rows, then the
// activations; where they are too few they start again.

#include "../c/kinds.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

static void check(bool good, const char * what) {
    if (!good) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

static void * exactly(size_t size) {
    void * p = malloc(size);
    check(p != NULL, "out of memory");
    return p;
}

typedef struct {
    const uint8_t * data;
    size_t size;
    size_t at;
} bytes;

static void fill(void * target, size_t count, bytes * from) {
    uint8_t * out = target;
    while (count > 0) {
        const size_t left = from->size - from->at, now = left < count ? left : count;
        memcpy(out, from->data + from->at, now);
        out += now;
        count -= now;
        from->at = (from->at + now) % from->size;
    }
}

// At least the sum of the magnitudes of all that is added up for a row and a token, the zero point (64 times the largest
// scale, below 8) on its own; infinite where products with integer sums may leave the range of floats.
static double magnitude(const float * weights, const block_q8_a64 * y, int64_t columns) {
    double sum = 0;
    for (int64_t i = 0; i < columns/64; i++) {
        if (!(y[i].d < 1e30f)) {
            return INFINITY;
        }
    }
    for (int64_t i = 0; i < columns; i++) {
        sum += (fabs((double) weights[i]) + 8)*fabs((double) y[i/64].d*y[i/64].qs[i % 64]);
    }
    return sum;
}

static void test_dots(const kind * k, const uint8_t * row, const float * weights, block_q8_a64 * y, int64_t columns, int64_t group) {
    float s[2];
    k->dot((int) columns, &s[0], 0, row, 0, y, 0, 1);
    k->dot_generic((int) columns, &s[1], 0, row, 0, y, 0, 1);
    const double most = magnitude(weights, y, columns);
    if (most < 1e30) {
        check(fabs((double) s[0] - s[1]) <= 1e-6*most + 1e-30, "a dot product is not that of the plain code");
    }
    float kept[64];
    for (int64_t i = 0; i < columns/64; i++) {
        kept[i % 64] = y[i].d;
        y[i].d = i == group ? 1.0f : 0.0f; // one group alone: a float holds its integer sum times its scale exactly
    }
    k->dot((int) columns, &s[0], 0, row, 0, y, 0, 1);
    k->dot_generic((int) columns, &s[1], 0, row, 0, y, 0, 1);
    check(s[0] == s[1], "an integer sum is not that of the plain code");
    for (int64_t i = 0; i < columns/64; i++) {
        y[i].d = kept[i % 64];
    }
}

// All rows times all tokens; one token's results are compared.
static void test_product(const kind * k, const uint8_t * rows, int64_t n_rows, int64_t columns, const float * x, int64_t tokens, bool gathered) {
    float * out = exactly((size_t) (n_rows*tokens)*sizeof(float));
    if (multiply((int) k->type, rows, n_rows, columns, x, tokens, out, gathered)) {
        const size_t row_size = (size_t) (columns/64)*k->size;
        const int64_t token = rows[0] % tokens;
        float * weights = exactly((size_t) columns*sizeof(float));
        block_q8_a64 * y = exactly((size_t) (columns/64)*sizeof(block_q8_a64));
        quantize_row_q8_a64(x + token*columns, y, columns);
        for (int64_t r = 0; r < n_rows; r++) {
            float s;
            k->decode(rows + (size_t) r*row_size, weights, columns);
            k->dot((int) columns, &s, 0, rows + (size_t) r*row_size, 0, y, 0, 1);
            const double most = magnitude(weights, y, columns);
            if (most < 1e30) {
                check(fabs((double) out[token*n_rows + r] - s) <= 1e-6*most + 1e-30, "a matrix product is not the dot product");
            }
        }
        free(weights);
        free(y);
    }
    free(out);
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 5) {
        return 0;
    }
    const kind * k = &kinds[data[0] % KINDS];
    const bool product = data[0] & 0x80, gathered = data[0] & 0x40, encode = (data[0] & 0x38) == 0x38;
    const int64_t columns = 64*(1 + data[1] % (product ? 6 : 12));
    const int64_t rows = product ? 1 + data[2] % 20 : 1, tokens = product ? 1 + data[3] % 20 : 1;
    bytes from = { data + 4, size - 4, 0 };
    const size_t row_size = (size_t) (columns/64)*k->size;

    uint8_t * x = exactly((size_t) rows*row_size);
    float * y = exactly((size_t) (tokens*columns)*sizeof(float));
    fill(x, (size_t) rows*row_size, &from);
    fill(y, (size_t) (tokens*columns)*sizeof(float), &from);

    if (product) {
        test_product(k, x, rows, columns, y, tokens, gathered);
    } else {
        float * weights = exactly((size_t) columns*sizeof(float));
        block_q8_a64 * one = exactly((size_t) (columns/64)*sizeof(block_q8_a64));
        block_q8_a64 * two = exactly((size_t) (columns/64)*sizeof(block_q8_a64));
        k->decode(x, weights, columns);
        for (int64_t i = 0; i < columns; i++) {
            check(isfinite(weights[i]), "a decoded value is not finite");
        }
        quantize_row_q8_a64(y, one, columns);
        quantize_row_q8_a64_ref(y, two, columns);
        for (int64_t i = 0; i < columns/64; i++) { // of two not-a-numbers the bits may differ
            check(memcmp(one[i].qs, two[i].qs, sizeof(one[i].qs)) == 0 && one[i].offset == two[i].offset &&
                (one[i].d == two[i].d || (isnan(one[i].d) && isnan(two[i].d))), "activations differ from the plain code's");
        }
        test_dots(k, x, weights, one, columns, data[2] % (columns/64));
        if (encode && columns <= 128) {
            k->encode(y, x, columns);
            k->decode(x, weights, columns);
            for (int64_t i = 0; i < columns; i++) {
                check(isfinite(weights[i]), "a quantized value is not finite");
            }
        }
        free(weights);
        free(one);
        free(two);
    }
    free(x);
    free(y);
    return 0;
}
