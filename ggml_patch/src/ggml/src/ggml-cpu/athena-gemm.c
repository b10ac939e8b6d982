// Matrix products of A2, A3 and A4: tiles and panels, and the kernels that multiply them.

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE // syscall()
#endif

#include "athena-gemm.h"

#if defined(ATHENA_HAVE_GEMM)

// Kernels are unrolled in full: where their sums go through a loop, GCC copies them from register to register in every turn.
#if defined(__clang__)
#define ATHENA_UNROLL(n) _Pragma("unroll")
#elif defined(__GNUC__)
#define ATHENA_PRAGMA(text) _Pragma(#text)
#define ATHENA_UNROLL(n) ATHENA_PRAGMA(GCC unroll n)
#else
#define ATHENA_UNROLL(n)
#endif

#if defined(__GNUC__)
#define ATHENA_PREFETCH_WRITE(p) __builtin_prefetch((p), 1)
#else
#define ATHENA_PREFETCH_WRITE(p)
#endif

#if defined(ATHENA_HAVE_NEON)
#include "athena-gemm-neon.h"
#else
#include "athena-gemm-x86.h"
#endif

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

// Decoding

static void decode_tiles(const athena_gemm_task * task, athena_gemm_scratch * scratch, int64_t first_column, int columns, int zero) {
    const size_t at = (size_t) (first_column/ATHENA_GROUP)*ggml_athena_group_size(task->type);
    for (int64_t r = 0; r < task->rows; r++) {
        const int64_t t = r/ATHENA_TILE_ROWS, m = r % ATHENA_TILE_ROWS;
        if (first_column == 0) {
            scratch->carry[r] = row_start(task->type);
        }
        const uint8_t * x = (const uint8_t *) task->x + (size_t) r*task->row_stride + at;
        decode_row(task->type, columns, x, &scratch->carry[r], &scratch->levels[t][0][ATHENA_TILE_ROW(m)], &scratch->scales[t][0][m], zero);
    }
}

// Panels

// 64 columns of up to ATHENA_PANEL tokens.
static void pack_panel(const block_q8_a64 * const * y, int64_t tokens, athena_panel * panel) {
    static const block_q8_a64 missing;
    const block_q8_a64 * b[ATHENA_PANEL];
    for (int64_t i = 0; i < ATHENA_PANEL; i++) {
        b[i] = i < tokens ? y[i] : &missing;
        panel->d[i]      = b[i]->d;
        panel->offset[i] = b[i]->offset;
    }
#if ATHENA_UNIT == 4
    for (int first = 0; first < ATHENA_PANEL; first += ATHENA_VECTOR) {
        for (int c = 0; c < ATHENA_GROUP; c += 4*ATHENA_VECTOR) {
            athena_vector v[ATHENA_VECTOR];
            ATHENA_UNROLL(ATHENA_VECTOR)
            for (int i = 0; i < ATHENA_VECTOR; i++) {
                v[i] = load_vector(b[first + i]->qs + c);
            }
            transpose(v);
            ATHENA_UNROLL(ATHENA_VECTOR)
            for (int i = 0; i < ATHENA_VECTOR; i++) {
                store_vector(panel->q[c/4 + i][first], v[i]);
            }
        }
    }
#if defined(ATHENA_SHORT_SUMS)
    prepare_short_sums(panel);
#endif
#else
    for (int i = 0; i < ATHENA_PANEL; i++) {
        for (int u = 0; u < ATHENA_GROUP/ATHENA_UNIT; u++) {
            memcpy(panel->q[u][i], b[i]->qs + u*ATHENA_UNIT, ATHENA_UNIT);
        }
    }
#endif
}

// Panels p of a task that has none, from column c on.
static void gather_panels(const athena_gemm_task * task, int64_t p, int64_t c, int groups, athena_panel * panels) {
    const int64_t n = least(task->tokens - p*ATHENA_PANEL, ATHENA_PANEL);
    for (int g = 0; g < groups; g++) {
        const block_q8_a64 * y[ATHENA_PANEL];
        for (int64_t i = 0; i < n; i++) {
            y[i] = task->y[p*ATHENA_PANEL + i] + c/ATHENA_GROUP + g;
        }
        pack_panel(y, n, &panels[g]);
    }
}

void ggml_athena_quantize_panel(const float * x, size_t stride, int tokens, athena_panel * panel) {
    block_q8_a64 blocks[ATHENA_PANEL];
    const block_q8_a64 * y[ATHENA_PANEL];
    for (int i = 0; i < tokens; i++) {
        quantize_row_q8_a64((const float *) ((const char *) x + (size_t) i*stride), &blocks[i], ATHENA_GROUP);
        y[i] = &blocks[i];
    }
    pack_panel(y, tokens, panel);
}

// Sums of 16 rows and a panel to their places.
static void store_sums(float * sums, int64_t rows, int64_t tokens, float * const * out) {
    for (int64_t r = 0; r < ATHENA_TILE_ROWS && r < rows; r += ATHENA_VECTOR) {
        for (int64_t first = 0; first < tokens; first += ATHENA_VECTOR) {
            athena_vector v[ATHENA_VECTOR];
            ATHENA_UNROLL(ATHENA_VECTOR)
            for (int i = 0; i < ATHENA_VECTOR; i++) {
                v[i] = load_vector(sums + (r + i)*ATHENA_PANEL + first);
            }
            transpose(v);
            const bool full = rows - r >= ATHENA_VECTOR && tokens - first >= ATHENA_VECTOR;
            float part[ATHENA_VECTOR][ATHENA_VECTOR];
            ATHENA_UNROLL(ATHENA_VECTOR)
            for (int i = 0; i < ATHENA_VECTOR; i++) {
                store_vector(full ? out[first + i] + r : part[i], v[i]);
            }
            for (int64_t i = 0; i < tokens - first && i < ATHENA_VECTOR && !full; i++) {
                memcpy(out[first + i] + r, part[i], (size_t) least(rows - r, ATHENA_VECTOR)*sizeof(float));
            }
        }
    }
}

// Results lie in one line of the cache for every tile and token, and each of them would be waited for.
static void fetch_results(const athena_gemm_task * task, int64_t first_token) {
    for (int64_t i = first_token; i < least(first_token + ATHENA_PANEL, task->tokens); i++) {
        for (int64_t r = 0; r < task->rows; r += ATHENA_TILE_ROWS) {
            ATHENA_PREFETCH_WRITE(task->out[i] + r);
        }
    }
}

void ggml_athena_gemm(const athena_gemm_task * task, athena_gemm_scratch * scratch) {
    const int64_t tiles  = (task->rows   + ATHENA_TILE_ROWS - 1)/ATHENA_TILE_ROWS;
    const int64_t panels = (task->tokens + ATHENA_PANEL - 1)/ATHENA_PANEL;
    int64_t at_once = ATHENA_KERNEL_PANELS;
#if defined(ATHENA_GEMM_AMX)
    const bool amx = amx_ready();
    const int zero = amx ? ATHENA_ZERO : 0;
    tile_config before;
    if (amx) {
        before = configure_tiles();
        at_once = 1;
    }
#elif defined(ATHENA_HAVE_NEON)
    const int zero = ATHENA_ZERO; // NEON multiplies signed bytes
#else
    const int zero = 0;
#endif
    if (task->rows % ATHENA_TILE_ROWS != 0) { // rows that the last tile has not: nobody reads their results
        memset(scratch->levels[tiles - 1], ATHENA_ZERO - zero, sizeof(scratch->levels[0]));
        memset(scratch->scales[tiles - 1], 0, sizeof(scratch->scales[0]));
    }
    int columns; // of this time
    for (int64_t c = 0; c < task->columns; c += columns) {
        const int64_t left = task->columns - c;
        columns = left <= ATHENA_GEMM_COLUMNS + ATHENA_SUPER ? (int) left : ATHENA_GEMM_COLUMNS;
        const int groups = columns/ATHENA_GROUP;
        decode_tiles(task, scratch, c, columns, zero);
#if defined(ATHENA_SHORT_SUMS)
        for (int64_t t = 0; t < tiles; t++) {
            measure_tile(scratch, t, groups, panels);
        }
#endif
        for (int64_t p = 0, n; p < panels; p += n) {
            n = panels - p >= at_once ? at_once : 1;
            const athena_panel * panel = scratch->panels[0];
            if (task->panels != NULL) {
                panel = task->panels + (p*task->columns + c)/ATHENA_GROUP;
            } else {
                for (int64_t i = 0; i < n; i++) {
                    gather_panels(task, p + i, c, groups, scratch->panels[i]);
                }
            }
            for (int64_t t = 0; t < tiles; t++) {
                float * sums = scratch->sums[p][t][0];
#if ATHENA_KERNEL_PANELS > 1
                if (n > 1) {
                    const size_t stride = task->panels != NULL ? (size_t) task->columns/ATHENA_GROUP : ATHENA_GEMM_GROUPS;
                    kernel_of_several(scratch, t, panel, stride, groups, sums, c == 0);
                    continue;
                }
#endif
                const uint8_t * levels = scratch->levels[t][0];
                const float   * scales = scratch->scales[t][0];
#if defined(ATHENA_GEMM_AMX)
                if (amx) {
                    kernel_amx(levels, scales, panel, groups, sums, c == 0, scratch->products);
                    continue;
                }
#endif
                kernel(levels, scales, panel, groups, sums, c == 0);
            }
        }
    }
#if defined(ATHENA_GEMM_AMX)
    if (amx) {
        restore_tiles(&before);
    }
#endif
    for (int64_t p = 0; p < panels; p++) {
        fetch_results(task, (p + 1)*ATHENA_PANEL);
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t tokens = least(task->tokens - p*ATHENA_PANEL, ATHENA_PANEL);
            float * out[ATHENA_PANEL];
            for (int64_t i = 0; i < tokens; i++) {
                out[i] = task->out[p*ATHENA_PANEL + i] + t*ATHENA_TILE_ROWS;
            }
            store_sums(scratch->sums[p][t][0], task->rows - t*ATHENA_TILE_ROWS, tokens, out);
        }
    }
}

#endif
