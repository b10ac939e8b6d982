// Fuzz target: any bytes as a model for the patched llama.cpp. What loads reads a prompt of six tokens, then one more.

#define _GNU_SOURCE

#include "llama.h"

#include <setjmp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

static void quiet(enum ggml_log_level level, const char * text, void * user) {
    (void) level, (void) text, (void) user;
}

static void use(struct llama_model * model) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = 32;
    params.n_batch = params.n_ubatch = 8;
    params.n_threads = params.n_threads_batch = 1;
    struct llama_context * context = llama_init_from_model(model, params);
    const int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    if (context != NULL && vocabulary > 0) {
        llama_token tokens[6];
        for (int i = 0; i < 6; i++) {
            tokens[i] = (7*i + 1) % vocabulary;
        }
        if (llama_decode(context, llama_batch_get_one(tokens, 6)) == 0) {
            llama_decode(context, llama_batch_get_one(tokens, 1));
        }
    }
    llama_free(context);
}

static jmp_buf out;

// Known, and no read or write out of bounds: llama.cpp ends the program itself where the numbers of a header cannot be,
// and ggml for a tensor whose number of elements just fits (tests/fuzz/gguf.c). ggml's other assertions are findings.
static void ended(const char * message) {
    const bool header = strstr(message, "/src/llama") != NULL && strstr(message, "GGML_ASSERT") != NULL;
    if (header || strstr(message, "INT64_MAX / ne[i] > current_nelements") != NULL) {
        longjmp(out, 1);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static int ready = 0;
    if (!ready) {
        ggml_set_abort_callback(ended);
        llama_log_set(quiet, NULL);
        llama_backend_init();
        ready = 1;
    }
    const int file = memfd_create("model", 0);
    if (file < 0 || write(file, data, size) != (ssize_t) size) {
        perror("memfd");
        exit(2);
    }
    if (setjmp(out)) {
        close(file);
        return 0;
    }
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
    struct llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    params.check_tensors = size % 2;
    struct llama_model * model = llama_model_load_from_file(path, params);
    if (model != NULL) {
        use(model);
        llama_model_free(model);
    }
    close(file);
    return 0;
}
