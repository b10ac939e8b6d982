// One matrix product through ggml's graphs: mul_mat TYPE ROWS COLUMNS TOKENS THREADS WEIGHTS ACTIVATIONS OUT. The files hold
// the bytes of the rows, and floats; OUT becomes [tokens][rows]. Before and after it in the same graph the activations are
// multiplied with a Q8_0 matrix, in the memory type that llama.cpp would choose (AMX where there is one): our product must
// leave the threads as it found them, so that both give the same.

#include "cpu_memory.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NEIGHBOUR_ROWS 64

static void check(bool good, const char * what) {
    if (!good) {
        fprintf(stderr, "%s\n", what);
        exit(1);
    }
}

static void load(struct ggml_tensor * tensor, const char * path) {
    const size_t size = ggml_nbytes(tensor);
    void * data = malloc(size);
    FILE * file = fopen(path, "rb");
    check(data && file && fread(data, 1, size, file) == size && fgetc(file) == EOF, path);
    fclose(file);
    ggml_backend_tensor_set(tensor, data, 0, size);
    free(data);
}

static void fill_neighbour(struct ggml_tensor * weights) {
    const int64_t count = ggml_nelements(weights);
    float * x = malloc((size_t) count*sizeof(float));
    void * bytes = malloc(ggml_nbytes(weights));
    check(x && bytes, "out of memory");
    for (int64_t i = 0; i < count; i++) {
        x[i] = (float) (i*7919 % 255 - 127)/127.0f;
    }
    ggml_quantize_chunk(GGML_TYPE_Q8_0, x, bytes, 0, NEIGHBOUR_ROWS, weights->ne[0], NULL);
    ggml_backend_tensor_set(weights, bytes, 0, ggml_nbytes(weights));
    free(x);
    free(bytes);
}

int main(int argc, char ** argv) {
    check(argc == 9, "usage: mul_mat TYPE ROWS COLUMNS TOKENS THREADS WEIGHTS ACTIVATIONS OUT");
    const int64_t rows = atoll(argv[2]), columns = atoll(argv[3]), tokens = atoll(argv[4]);
    const struct ggml_init_params params = { 16*ggml_tensor_overhead() + ggml_graph_overhead(), NULL, true };
    struct ggml_context * context = ggml_init(params);
    struct ggml_context * beside  = ggml_init(params);
    struct ggml_tensor * neighbour = ggml_new_tensor_2d(beside, GGML_TYPE_Q8_0, columns, NEIGHBOUR_ROWS);
    struct ggml_tensor * weights = ggml_new_tensor_2d(context, (enum ggml_type) atoi(argv[1]), columns, rows);
    struct ggml_tensor * input   = ggml_new_tensor_2d(context, GGML_TYPE_F32, columns, tokens);
    struct ggml_tensor * product = ggml_mul_mat(context, weights, input);
    struct ggml_tensor * before = ggml_mul_mat(context, neighbour, input);
    struct ggml_tensor * after  = ggml_mul_mat(context, neighbour, input);
    struct ggml_cgraph * graph = ggml_new_graph(context);
    ggml_build_forward_expand(graph, before);
    ggml_build_forward_expand(graph, product);
    ggml_build_forward_expand(graph, after);
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, atoi(argv[5]));
    check(ggml_backend_alloc_ctx_tensors(context, backend) != NULL, "out of memory");
    check(ggml_backend_alloc_ctx_tensors_from_buft(beside, memory_for(neighbour, before)) != NULL, "out of memory");
    fill_neighbour(neighbour);
    load(weights, argv[6]);
    load(input, argv[7]);
    check(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS, "the product failed");
    check(memcmp(before->data, after->data, ggml_nbytes(before)) == 0, "the product changed those after it");
    const size_t size = ggml_nbytes(product);
    void * out = malloc(size);
    check(out != NULL, "out of memory");
    ggml_backend_tensor_get(product, out, 0, size);
    FILE * file = fopen(argv[8], "wb");
    check(file && fwrite(out, 1, size, file) == size && fclose(file) == 0, argv[8]);
    free(out);
    ggml_free(context);
    ggml_free(beside);
    ggml_backend_free(backend);
    return 0;
}
