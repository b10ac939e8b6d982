// ggml_athena_gemm for the tests: rows times activations, through panels made beforehand or from the activations of every
// token by themselves (`gathered`). The rows and results are of exactly their size; returns false where there is no such code.

#include "athena-gemm.h"

#include <stdlib.h>

bool multiply(int type, const void * x, int64_t rows, int64_t columns, const float * y, int64_t tokens, float * out, bool gathered);

#if defined(ATHENA_HAVE_GEMM)

static void * aligned(size_t size) {
    void * p = aligned_alloc(64, (size + 63)/64*64);
    if (p == NULL) {
        exit(2);
    }
#if !defined(LEAVE_UNINITIALIZED) // valgrind finds out by itself
    memset(p, 0xff, size); // nothing may depend on what was there
#endif
    return p;
}

bool multiply(int type, const void * x, int64_t rows, int64_t columns, const float * y, int64_t tokens, float * out, bool gathered) {
    const int64_t groups = columns/ATHENA_GROUP, panels = (tokens + ATHENA_PANEL - 1)/ATHENA_PANEL;
    const size_t row_stride = (size_t) groups*ggml_athena_group_size((enum ggml_type) type);
    athena_panel * panel = aligned((size_t) (panels*groups)*sizeof(athena_panel));
    block_q8_a64 * blocks = aligned((size_t) (tokens*groups)*sizeof(block_q8_a64));
    const block_q8_a64 * rows_of_blocks[ATHENA_GEMM_TOKENS];
    float * outs[ATHENA_GEMM_TOKENS];
    athena_gemm_scratch * scratch = aligned(sizeof(*scratch));
    for (int64_t p = 0; p < panels; p++) {
        const int64_t left = tokens - p*ATHENA_PANEL;
        for (int64_t g = 0; g < groups; g++) {
            ggml_athena_quantize_panel(y + p*ATHENA_PANEL*columns + g*ATHENA_GROUP, (size_t) columns*sizeof(float),
                (int) (left < ATHENA_PANEL ? left : ATHENA_PANEL), &panel[p*groups + g]);
        }
    }
    quantize_row_q8_a64(y, blocks, tokens*columns);
    for (int64_t first = 0; first < tokens; first += ATHENA_GEMM_TOKENS) {
        const int64_t now = tokens - first < ATHENA_GEMM_TOKENS ? tokens - first : ATHENA_GEMM_TOKENS;
        for (int64_t row = 0; row < rows; row += ATHENA_GEMM_ROWS) {
            for (int64_t i = 0; i < now; i++) {
                rows_of_blocks[i] = blocks + (first + i)*groups;
                outs[i] = out + (first + i)*rows + row;
            }
            const athena_gemm_task task = {
                .type       = (enum ggml_type) type,
                .x          = (const char *) x + (size_t) row*row_stride,
                .row_stride = row_stride,
                .rows       = rows - row < ATHENA_GEMM_ROWS ? rows - row : ATHENA_GEMM_ROWS,
                .columns    = columns,
                .tokens     = now,
                .panels     = gathered ? NULL : panel + first/ATHENA_PANEL*groups,
                .y          = gathered ? rows_of_blocks : NULL,
                .out        = outs,
            };
            ggml_athena_gemm(&task, scratch);
        }
    }
    free(panel);
    free(blocks);
    free(scratch);
    return true;
}

#else

bool multiply(int type, const void * x, int64_t rows, int64_t columns, const float * y, int64_t tokens, float * out, bool gathered) {
    (void) type, (void) x, (void) rows, (void) columns, (void) y, (void) tokens, (void) out, (void) gathered;
    return false;
}

#endif
