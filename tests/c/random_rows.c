// Random bytes as rows of every type, in heap buffers of exactly their size, through every decoder; then random floats
// (some of them not finite) through every quantizer. For the sanitizers; also fails where a value is not finite, or where
// the integer sums of the dot products and matrix products for this processor and of the plain dot products differ.
//
//     random_rows [GOLDEN ...]    the same sums for rows of tests/golden, whose values must be those in the file
//
// Prints the numbers of golden rows, and of integer sums of products that were compared.

#include "kinds.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

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

// The dot product for this processor against the plain one, every group alone: a float holds its integer sum times its
// scale exactly.
static void test_dots(const kind * k, const uint8_t * row, int64_t columns) {
    block_q8_a64 * activations = exactly((size_t) (columns/64)*sizeof(block_q8_a64));
    for (int64_t g = 0; g < columns/64; g++) {
        for (int64_t i = 0; i < columns/64; i++) {
            activations[i].d = i == g ? 1.0f : 0.0f;
            int32_t sum = 0;
            for (int c = 0; c < 64; c++) {
                activations[i].qs[c] = (int8_t) ((int32_t) (random_bits() % 255) - 127);
                sum += activations[i].qs[c];
            }
            activations[i].offset = -ATHENA_ZERO*sum;
        }
        float s[2] = { NAN, NAN };
        k->dot((int) columns, &s[0], 0, row, 0, activations, 0, 1);
        k->dot_generic((int) columns, &s[1], 0, row, 0, activations, 0, 1);
        expect(s[0] == s[1], "a sum is not that of the plain code", columns);
    }
    free(activations);
}

static void test_row(const kind * k, int64_t columns) {
    uint8_t * row = exactly((size_t) (columns/64)*k->size);
    float * values = exactly((size_t) columns*sizeof(float));
    block_q8_a64 * activations[2];
    for (int i = 0; i < 2; i++) {
        activations[i] = exactly((size_t) (columns/64)*sizeof(block_q8_a64));
    }
    for (size_t i = 0; i < (size_t) (columns/64)*k->size; i++) {
        row[i] = (uint8_t) random_bits();
    }
    k->decode(row, values, columns);
    expect(all_finite(values, columns), "a decoded value is not finite", columns);

    float s[2] = { NAN, NAN };
    quantize_row_q8_a64(values, activations[0], columns);
    quantize_row_q8_a64_ref(values, activations[1], columns);
    expect(memcmp(activations[0], activations[1], (size_t) (columns/64)*sizeof(block_q8_a64)) == 0, "activations differ", columns);
    k->dot((int) columns, &s[0], 0, row, 0, activations[0], 0, 1);
    k->dot_generic((int) columns, &s[1], 0, row, 0, activations[0], 0, 1);
    expect(all_finite(s, 2), "a dot product is not finite", columns);
    test_dots(k, row, columns);

    for (int64_t i = 0; i < columns; i++) {
        const uint32_t bits = random_bits(); // any float, not-a-number and infinities among them
        memcpy(&values[i], &bits, sizeof(bits));
    }
    quantize_row_q8_a64(values, activations[0], columns);
    quantize_row_q8_a64_ref(values, activations[1], columns);
    for (int64_t i = 0; i < columns/64; i++) { // of two not-a-numbers the bits may differ
        const block_q8_a64 * a = &activations[0][i], * b = &activations[1][i];
        expect(memcmp(a->qs, b->qs, sizeof(a->qs)) == 0 && a->offset == b->offset && (a->d == b->d || (isnan(a->d) && isnan(b->d))),
            "activations differ", columns);
    }
    k->encode(values, row, columns);
    k->decode(row, values, columns);
    expect(all_finite(values, columns), "a quantized value is not finite", columns);
    free(row);
    free(values);
    free(activations[0]);
    free(activations[1]);
}

static int64_t compared; // integer sums of matrix products

// Groups of columns alone (all of them, or some of a wide row), with whole numbers as activations: floats hold the integer
// sums times their scales exactly.
static void test_sums(const kind * k, const uint8_t * x, int64_t rows, int64_t columns, int64_t tokens) {
    const size_t row_size = (size_t) (columns/64)*k->size;
    float * y = exactly((size_t) (tokens*columns)*sizeof(float));
    float * out = exactly((size_t) (2*tokens*rows)*sizeof(float)); // through panels, and gathered
    block_q8_a64 * blocks = exactly((size_t) (columns/64)*sizeof(block_q8_a64));
    memset(y, 0, (size_t) (tokens*columns)*sizeof(float));
    const int64_t step = 1 + columns/300;
    for (int64_t group = random_bits() % step; group < columns/64; group += step) {
        for (int64_t t = 0; t < tokens; t++) {
            for (int c = 0; c < 64; c++) { // the extremes only for every other token, all of one sign for some
                const int32_t any = (int32_t) (random_bits() % 255) - 127;
                const int32_t extreme = t % 4 == 1 || any < 0 ? -127 : 127;
                y[t*columns + 64*group + c] = (float) (c == 0 ? 127 : t % 2 == 0 ? any : extreme);
            }
        }
        if (!multiply((int) k->type, x, rows, columns, y, tokens, out, false) ||
            !multiply((int) k->type, x, rows, columns, y, tokens, out + tokens*rows, true)) {
            break;
        }
        for (int64_t t = 0; t < tokens; t++) {
            quantize_row_q8_a64(y + t*columns, blocks, columns);
            for (int64_t r = 0; r < rows; r++) {
                float s;
                k->dot_generic((int) columns, &s, 0, x + (size_t) r*row_size, 0, blocks, 0, 1);
                expect(out[t*rows + r] == s && out[(tokens + t)*rows + r] == s, "a sum of a matrix product is not that of the plain code", columns);
                compared++;
            }
        }
        for (int64_t t = 0; t < tokens; t++) {
            memset(y + t*columns + 64*group, 0, 64*sizeof(float));
        }
    }
    free(y);
    free(out);
    free(blocks);
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
    test_sums(k, x, rows < 19 ? rows : 19, columns, tokens < 11 ? tokens : 11);
    free(x);
    free(y);
    free(out);
}

static void read_exactly(FILE * file, void * p, size_t size, const char * path) {
    if (fread(p, 1, size, file) != size) {
        fprintf(stderr, "%s is no file of golden vectors\n", path);
        exit(2);
    }
}

// A file of tools/make_golden.py. Returns the number of rows.
static int test_golden(const char * path) {
    FILE * file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        exit(2);
    }
    char magic[4];
    uint32_t type, rows;
    read_exactly(file, magic, sizeof(magic), path);
    read_exactly(file, &type, sizeof(type), path);
    read_exactly(file, &rows, sizeof(rows), path);
    const kind * k = NULL;
    for (size_t i = 0; i < sizeof(kinds)/sizeof(kinds[0]); i++) {
        k = kinds[i].type == (enum ggml_type) type ? &kinds[i] : k;
    }
    expect(k != NULL && memcmp(magic, "ATHG", 4) == 0, path, 0);
    for (uint32_t r = 0; r < rows; r++) {
        uint32_t columns;
        read_exactly(file, &columns, sizeof(columns), path);
        uint8_t * row = exactly((size_t) (columns/64)*k->size);
        float * values = exactly((size_t) columns*sizeof(float));
        float * decoded = exactly((size_t) columns*sizeof(float));
        read_exactly(file, row, (size_t) (columns/64)*k->size, path);
        read_exactly(file, values, (size_t) columns*sizeof(float), path);
        k->decode(row, decoded, columns);
        expect(memcmp(values, decoded, (size_t) columns*sizeof(float)) == 0, "a golden row has other values", columns);
        test_dots(k, row, columns);
        test_sums(k, row, 1, columns, 5);
        free(row);
        free(values);
        free(decoded);
    }
    fclose(file);
    return (int) rows;
}

int main(int argc, char ** argv) {
    int golden = 0;
    for (int i = 1; i < argc; i++) {
        golden += test_golden(argv[i]);
    }
    for (size_t i = 0; i < KINDS; i++) {
        for (int64_t columns = 64; columns <= 1408; columns += 64) {
            test_row(&kinds[i], columns);
        }
        for (int64_t tokens = 1; tokens <= 40; tokens += 13) {
            test_product(&kinds[i], 3*tokens + 2, 64*tokens, tokens);
        }
    }
    printf("%d golden rows, %lld sums of products\n", golden, (long long) compared);
    return 0;
}
