#pragma once

#include "ggml-backend.h"
#include "ggml-cpu.h"

// The first of the CPU's memory types that multiplies such weights: llama.cpp tries them in the same order.
static ggml_backend_buffer_type_t memory_for(struct ggml_tensor * weights, const struct ggml_tensor * product) {
    ggml_backend_reg_t reg = ggml_backend_cpu_reg();
    ggml_backend_dev_t dev = ggml_backend_reg_dev_get(reg, 0);
    ggml_backend_dev_get_extra_bufts_t extra = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * type = extra ? extra(dev) : NULL; type && *type; type++) {
        weights->buffer = ggml_backend_buft_alloc_buffer(*type, 0);
        const bool good = ggml_backend_dev_supports_op(dev, product);
        ggml_backend_buffer_free(weights->buffer);
        weights->buffer = NULL;
        if (good) {
            return *type;
        }
    }
    return ggml_backend_cpu_buffer_type();
}
