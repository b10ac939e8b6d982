#include "athena-mul-mat.h"

#include "athena-gemm.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"

#if defined(ATHENA_HAVE_GEMM)

#define ATHENA_MIN_TOKENS 4 // with fewer, a dot product for every token is as fast

static int64_t div_up(int64_t a, int64_t b) {
    return (a + b - 1)/b;
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Whether chunks of the same size leave the threads idle for more than 15 % of the time.
static bool idle(int64_t chunks, int64_t threads) {
    return 100*chunks < 85*threads*div_up(chunks, threads);
}

static char * align64(char * p) {
    return (char *) (((uintptr_t) p + 63) & ~(uintptr_t) 63);
}

// What both operations ask of their tensors.
static bool takes(const struct ggml_tensor * dst) {
    return ggml_athena_is_row_type(dst->src[0]->type) && dst->src[1]->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32;
}

// Panels of one matrix of activations, and of all of them.
static int64_t panels_of_matrix(const struct ggml_tensor * src1) {
    return div_up(src1->ne[1], ATHENA_PANEL)*(src1->ne[0]/ATHENA_GROUP);
}

static size_t size_of_panels(const struct ggml_tensor * src1) {
    return (size_t) (panels_of_matrix(src1)*src1->ne[2]*src1->ne[3])*sizeof(athena_panel);
}

size_t ggml_athena_wdata_size(int n_tasks, const struct ggml_tensor * node) {
    if (!takes(node)) {
        return 0;
    }
    const size_t scratch = 64 + (size_t) n_tasks*sizeof(athena_gemm_scratch);
    if (node->op == GGML_OP_MUL_MAT_ID) {
        return scratch;
    }
    if (node->src[1]->ne[1] < ATHENA_MIN_TOKENS) {
        return 0;
    }
    return scratch + size_of_panels(node->src[1]) - ggml_row_size(GGML_TYPE_Q8_A64, ggml_nelements(node->src[1]));
}

// The activations of one token of matrix number i.
static const char * first_activation(const struct ggml_tensor * src1, int64_t i, int64_t token) {
    return (const char *) src1->data + token*src1->nb[1] + i % src1->ne[2]*src1->nb[2] + i/src1->ne[2]*src1->nb[3];
}

// The share of one thread in making panels of the activations.
static void quantize(const struct ggml_compute_params * params, const struct ggml_tensor * src1, athena_panel * panels) {
    const int64_t groups = src1->ne[0]/ATHENA_GROUP;
    const int64_t all = panels_of_matrix(src1)*src1->ne[2]*src1->ne[3];
    const int64_t end = all*(params->ith + 1)/params->nth;
    for (int64_t i = all*params->ith/params->nth; i < end; i++) {
        const int64_t group  = i % groups;
        const int64_t matrix = i/panels_of_matrix(src1);
        const int64_t token  = i % panels_of_matrix(src1)/groups*ATHENA_PANEL;
        const float * x = (const float *) first_activation(src1, matrix, token) + group*ATHENA_GROUP;
        ggml_athena_quantize_panel(x, src1->nb[1], (int) least(src1->ne[1] - token, ATHENA_PANEL), &panels[i]);
    }
}

// The first row of the matrix that belongs to matrix number i of the activations, and the place of row 0, token t in dst.
static const char * first_row(const struct ggml_tensor * dst, int64_t i) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];
    const int64_t i2 = i % src1->ne[2], i3 = i/src1->ne[2];
    return (const char *) src0->data + i2*src0->ne[2]/src1->ne[2]*src0->nb[2] + i3*src0->ne[3]/src1->ne[3]*src0->nb[3];
}

static float * first_result(const struct ggml_tensor * dst, int64_t i, int64_t token) {
    return (float *) ((char *) dst->data + token*dst->nb[1] + i % dst->ne[2]*dst->nb[2] + i/dst->ne[2]*dst->nb[3]);
}

// Too few tokens to decode tiles for: a dot product for each, the rows one after the other.
static void mul_mat_by_rows(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];
    const int64_t rows = src0->ne[1], columns = src0->ne[0], groups = columns/ATHENA_GROUP;
    const int64_t tokens = src1->ne[1], matrices = src1->ne[2]*src1->ne[3];

    block_q8_a64 * y = (block_q8_a64 *) params->wdata;
    const int64_t all = groups*tokens*matrices;
    GGML_ASSERT((size_t) all*sizeof(*y) <= params->wsize);
    const int64_t end = all*(params->ith + 1)/params->nth;
    for (int64_t i = all*params->ith/params->nth; i < end;) {
        const int64_t row = i/groups, group = i % groups, n = least(end - i, groups - group);
        const float * x = (const float *) first_activation(src1, row/tokens, row % tokens) + group*ATHENA_GROUP;
        quantize_row_q8_a64(x, y + i, n*ATHENA_GROUP);
        i += n;
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth); // every thread starts with the chunk of its number
    }
    ggml_barrier(params->threadpool);

    // Threads that would take few chunks each take one, for less to agree on. On several sockets they take the same rows
    // every time, which lie in their own memory.
    int64_t chunk_rows = 64, row_chunks = div_up(rows, chunk_rows);
    if (row_chunks*matrices < 4*params->nth || ggml_is_numa()) {
        chunk_rows = div_up(rows, params->nth);
        row_chunks = div_up(rows, chunk_rows);
    }
    const int64_t chunks = row_chunks*matrices;
    for (int64_t chunk = params->ith; chunk < chunks; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t row = chunk % row_chunks*chunk_rows, matrix = chunk/row_chunks;
        const char * x = first_row(dst, matrix) + row*src0->nb[1];
        for (int64_t t = 0; t < tokens; t++) {
            const block_q8_a64 * activations = y + (matrix*tokens + t)*groups;
            ggml_athena_dot_rows(src0->type, (int) columns, x, src0->nb[1], least(rows - row, chunk_rows), activations, first_result(dst, matrix, t) + row);
        }
    }
}

bool ggml_athena_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];
    const int64_t rows = src0->ne[1], tokens = src1->ne[1], matrices = src1->ne[2]*src1->ne[3];
    if (!takes(dst) || params->use_ref) {
        return false;
    }
    GGML_ASSERT(src0->nb[0] == ggml_type_size(src0->type) && src1->nb[0] == sizeof(float) && dst->nb[0] == sizeof(float));
    if (tokens < ATHENA_MIN_TOKENS) {
        mul_mat_by_rows(params, dst);
        return true;
    }

    char * work = align64(params->wdata);
    athena_panel        * panels  = (athena_panel *) work;
    athena_gemm_scratch * scratch = (athena_gemm_scratch *) (work + size_of_panels(src1)) + params->ith;
    GGML_ASSERT((char *) (scratch + params->nth - params->ith) <= (char *) params->wdata + params->wsize);

    quantize(params, src1, panels);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth); // every thread starts with the chunk of its number
    }
    ggml_barrier(params->threadpool);

    // chunks of rows; of tokens only where threads would have to wait, since each of those decodes the rows again
    int64_t chunk_rows = ATHENA_GEMM_ROWS, chunk_tokens = ATHENA_GEMM_TOKENS;
    int64_t row_chunks = div_up(rows, chunk_rows), token_chunks = div_up(tokens, chunk_tokens);
    while (params->nth > 1 && row_chunks*token_chunks*matrices < 4*params->nth && chunk_rows > ATHENA_TILE_ROWS) {
        chunk_rows /= 2;
        row_chunks = div_up(rows, chunk_rows);
    }
    while (idle(row_chunks*token_chunks*matrices, params->nth) && chunk_tokens > 2*ATHENA_PANEL) {
        chunk_tokens /= 2;
        token_chunks = div_up(tokens, chunk_tokens);
    }

    float * out[ATHENA_GEMM_TOKENS];
    const int64_t chunks = row_chunks*token_chunks*matrices;
    for (int64_t chunk = params->ith; chunk < chunks; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t row    = chunk % row_chunks*chunk_rows;
        const int64_t token  = chunk/row_chunks % token_chunks*chunk_tokens;
        const int64_t matrix = chunk/(row_chunks*token_chunks);
        const athena_gemm_task task = {
            .type       = src0->type,
            .x          = first_row(dst, matrix) + row*src0->nb[1],
            .row_stride = src0->nb[1],
            .rows       = least(rows - row, chunk_rows),
            .columns    = src0->ne[0],
            .tokens     = least(tokens - token, chunk_tokens),
            .panels     = panels + matrix*panels_of_matrix(src1) + token/ATHENA_PANEL*(src0->ne[0]/ATHENA_GROUP),
            .out        = out,
        };
        for (int64_t i = 0; i < task.tokens; i++) {
            out[i] = first_result(dst, matrix, token + i) + row;
        }
        ggml_athena_gemm(&task, scratch);
    }
    return true;
}

bool ggml_athena_mul_mat_id(const struct ggml_compute_params * params, struct ggml_tensor * dst, int64_t expert, int64_t n_rows, const int32_t * rows, char * scratch) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];
    if (!takes(dst) || params->use_ref) {
        return false;
    }
    athena_gemm_scratch * own = (athena_gemm_scratch *) align64(scratch) + params->ith;
    const size_t row_size = ggml_row_size(GGML_TYPE_Q8_A64, src1->ne[0]);

    // rows of the matrix are shared out one by one, or by tiles
    const int64_t unit  = n_rows < ATHENA_MIN_TOKENS ? 1 : ATHENA_TILE_ROWS;
    const int64_t units = div_up(src0->ne[1], unit);
    const int64_t begin = units*params->ith/params->nth*unit;
    const int64_t end   = least(units*(params->ith + 1)/params->nth*unit, src0->ne[1]);

    const block_q8_a64 * y[ATHENA_GEMM_TOKENS];
    float * out[ATHENA_GEMM_TOKENS];
    for (int64_t first = 0; first < n_rows; first += ATHENA_GEMM_TOKENS) {
        const int64_t tokens = least(n_rows - first, ATHENA_GEMM_TOKENS);
        for (int64_t row = begin; row < end; row += ATHENA_GEMM_ROWS) {
            for (int64_t i = 0; i < tokens; i++) {
                const int64_t place = rows[2*(first + i)], token = rows[2*(first + i) + 1];
                y[i]   = (const block_q8_a64 *) ((const char *) params->wdata + (place % src1->ne[1] + token*src1->ne[1])*row_size);
                out[i] = (float *) ((char *) dst->data + place*dst->nb[1] + token*dst->nb[2]) + row;
            }
            const athena_gemm_task task = {
                .type       = src0->type,
                .x          = (const char *) src0->data + expert*src0->nb[2] + row*src0->nb[1],
                .row_stride = src0->nb[1],
                .rows       = least(end - row, ATHENA_GEMM_ROWS),
                .columns    = src0->ne[0],
                .tokens     = tokens,
                .y          = y,
                .out        = out,
            };
            if (tokens < ATHENA_MIN_TOKENS) {
                for (int64_t i = 0; i < tokens; i++) {
                    ggml_athena_dot_rows(task.type, (int) task.columns, task.x, task.row_stride, task.rows, y[i], out[i]);
                }
            } else {
                ggml_athena_gemm(&task, own);
            }
        }
    }
    return true;
}

#else

size_t ggml_athena_wdata_size(int n_tasks, const struct ggml_tensor * node) {
    GGML_UNUSED(n_tasks);
    GGML_UNUSED(node);
    return 0;
}

bool ggml_athena_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    GGML_UNUSED(params);
    GGML_UNUSED(dst);
    return false;
}

bool ggml_athena_mul_mat_id(const struct ggml_compute_params * params, struct ggml_tensor * dst, int64_t expert, int64_t n_rows, const int32_t * rows, char * scratch) {
    GGML_UNUSED(params);
    GGML_UNUSED(dst);
    GGML_UNUSED(expert);
    GGML_UNUSED(n_rows);
    GGML_UNUSED(rows);
    GGML_UNUSED(scratch);
    return false;
}

#endif
