// Fuzz target: any bytes as a GGUF file for the patched ggml. What is accepted is used as llama.cpp uses it: bounds, row
// validation, decoding, row look-up and products with one and with five tokens of every small A-type tensor.

#include "ggml-cpu.h"
#include "ggml.h"
#include "gguf.h"

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_ELEMENTS 8192
#define WORK          (8 << 20)

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

static void check(bool good, const char * what) {
    if (!good) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

static void quiet(enum ggml_log_level level, const char * text, void * user) {
    (void) level, (void) text, (void) user;
}

static void * exactly(size_t size) {
    void * p = malloc(size ? size : 1);
    check(p != NULL, "out of memory");
    return p;
}

static void decode(const struct ggml_tensor * tensor, const uint8_t * bytes) {
    float * values = exactly((size_t) tensor->ne[0]*sizeof(float));
    for (int64_t row = 0; row < ggml_nrows(tensor); row++) {
        ggml_get_type_traits(tensor->type)->to_float(bytes + (size_t) row*tensor->nb[1], values, tensor->ne[0]);
        for (int64_t i = 0; i < tensor->ne[0]; i++) {
            check(isfinite(values[i]), "a decoded value is not finite");
        }
    }
    free(values);
}

static void multiply(const struct ggml_tensor * tensor, const uint8_t * bytes, int64_t tokens) {
    static uint8_t * work = NULL;
    work = work ? work : exactly(WORK);
    const struct ggml_init_params params = { WORK, work, false };
    struct ggml_context * context = ggml_init(params);
    struct ggml_tensor * matrix = ggml_new_tensor(context, tensor->type, GGML_MAX_DIMS, tensor->ne);
    struct ggml_tensor * input = ggml_new_tensor_4d(context, GGML_TYPE_F32, tensor->ne[0], tokens, tensor->ne[2], tensor->ne[3]);
    struct ggml_tensor * places = ggml_new_tensor_1d(context, GGML_TYPE_I32, 1);
    memcpy(matrix->data, bytes, ggml_nbytes(matrix));
    for (int64_t i = 0; i < ggml_nelements(input); i++) {
        ((float *) input->data)[i] = (float) ((i*7919 + 13) % 255 - 127);
    }
    ((int32_t *) places->data)[0] = (int32_t) (tensor->ne[1] - 1);
    struct ggml_cgraph * graph = ggml_new_graph_custom(context, 8, false);
    struct ggml_tensor * product = ggml_mul_mat(context, matrix, input);
    ggml_build_forward_expand(graph, product);
    if (tensor->ne[2] == 1 && tensor->ne[3] == 1) {
        ggml_build_forward_expand(graph, ggml_get_rows(context, matrix, places));
    }
    check(ggml_graph_compute_with_ctx(context, graph, 1) == GGML_STATUS_SUCCESS, "the product failed");
    for (int64_t i = 0; i < ggml_nelements(product); i++) {
        check(isfinite(((float *) product->data)[i]), "a product is not finite");
    }
    ggml_free(context);
}

// ggml ends the program for a tensor whose number of elements just fits (its reader takes it, its constructor does not).
// That is known, and no read or write out of bounds: such an input is left where it is.
static jmp_buf out;

static void ended(const char * message) {
    if (strstr(message, "INT64_MAX / ne[i] > current_nelements")) {
        longjmp(out, 1);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    ggml_log_set(quiet, NULL);
    ggml_set_abort_callback(ended);
    if (setjmp(out)) {
        return 0;
    }
    struct ggml_context * context = NULL;
    const struct gguf_init_params params = { true, &context };
    struct gguf_context * file = gguf_init_from_buffer(data, size, params);
    if (file == NULL) {
        return 0;
    }
    const size_t start = gguf_get_data_offset(file);
    for (int64_t i = 0; i < gguf_get_n_tensors(file); i++) {
        const struct ggml_tensor * tensor = ggml_get_tensor(context, gguf_get_tensor_name(file, i));
        check(tensor != NULL, "a tensor has no description");
        const size_t offset = start + gguf_get_tensor_offset(file, i), bytes = ggml_nbytes(tensor);
        // llama.cpp's own condition for taking a tensor (llama-model-loader.h)
        if (offset + bytes < offset || offset + bytes > size || ggml_nelements(tensor) == 0) {
            continue;
        }
        check(tensor->type != GGML_TYPE_Q8_A64, "a file holds a type for activations");
        uint8_t * copy = exactly(bytes);
        memcpy(copy, data + offset, bytes);
        const bool valid = ggml_validate_row_data(tensor->type, copy, bytes);
        if (tensor->type >= GGML_TYPE_A2 && tensor->type <= GGML_TYPE_A4) {
            check(valid, "bytes of an A type are refused");
            if (ggml_nelements(tensor) <= MOST_ELEMENTS) {
                decode(tensor, copy);
                if (data[size - 1] % 8 == 0) { // it takes most of the time
                    multiply(tensor, copy, 1 + 4*(i % 2));
                }
            }
        }
        free(copy);
    }
    gguf_free(file);
    ggml_free(context);
    return 0;
}
