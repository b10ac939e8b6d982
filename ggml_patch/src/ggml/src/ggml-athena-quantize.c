// The quantizer of A2, A3 and A4: for every lane of a row the best path through the trellis (Viterbi) under given
// scales, then the best scales under given symbols, by turns. Errors are squared and weighted by the importance of their
// column; there is no error feedback between columns.

#include "ggml-athena.h"
#include "ggml-athena-tables.h"

#include <math.h>
#include <stdlib.h>

#define MAX_STATES 64
#define ROUNDS     6
#define LIMIT      1e4f // inputs are clamped to this; the largest weight that the types can hold is 7.75

// state: what later values can still see of earlier symbols. Predecessor x of state n is base[n] + x_offset[x], and its
// step adds t1[n] (a term of the new state) and t2[predecessor] (a term of the old one).
typedef struct {
    int bits;   // of a symbol
    int states;
    int choices; // predecessors of a state
    int base[MAX_STATES];
    int x_offset[16];
    uint8_t symbol[MAX_STATES]; // of the step that ends in the state
    float t1[MAX_STATES];
    float t2[MAX_STATES];
    float rms; // of the values for a Gaussian source that is encoded at its best scale
} trellis;

// The window, and so the state, before a row is 0. A2 keeps three symbols (newest highest), A3 the window, A4 one symbol.
static void make_trellis(enum ggml_type type, trellis * t) {
    const athena_tables * tables =
        type == GGML_TYPE_A2 ? &athena_tables_a2 : type == GGML_TYPE_A3 ? &athena_tables_a3 : &athena_tables_a4;
    t->bits    = type == GGML_TYPE_A2 ? 2 : type == GGML_TYPE_A3 ? 3 : 4;
    t->states  = type == GGML_TYPE_A2 ? 64 : 16;
    t->choices = 1 << t->bits;
    t->rms     = type == GGML_TYPE_A2 ? 24.0f : type == GGML_TYPE_A3 ? 21.0f : 20.0f;
    for (int x = 0; x < t->choices; x++) {
        t->x_offset[x] = type == GGML_TYPE_A3 ? (x >> 1) << 2 | (x & 1) : x;
    }
    for (int n = 0; n < t->states; n++) {
        t->base[n]   = type == GGML_TYPE_A2 ? (n & 15) << 2 : type == GGML_TYPE_A3 ? (n & 1) << 1 : 0;
        t->symbol[n] = type == GGML_TYPE_A2 ? n >> 4 : type == GGML_TYPE_A3 ? n >> 1 : n;
        t->t1[n] = (float) tables->t1[type == GGML_TYPE_A2 ? n >> 2 : n] - ATHENA_ZERO/2;
        t->t2[n] = (float) tables->t2[type == GGML_TYPE_A2 ? n & 15 : n] - ATHENA_ZERO/2;
    }
}

// Working memory of one row of k columns.
typedef struct {
    float   * x;       // [k] clamped inputs
    float   * w;       // [k] importance, of mean 1
    float   * levels;  // [k] values of the path before scaling
    uint8_t * from;    // [k/32][states][32] which predecessor the best path into a state comes from
    uint8_t * symbols; // [k] symbols of the path
    uint8_t * best;    // [k] those of the best round
    uint8_t * codes;      // [k/64] scale bytes
    uint8_t * best_codes; // [k/64]
} workspace;

static void * cut(uint8_t ** p, size_t size) {
    void * piece = *p;
    *p += size;
    return piece;
}

static uint8_t * make_workspace(workspace * ws, int64_t k, int states) {
    const size_t n = (size_t) k;
    uint8_t * memory = malloc(3*n*sizeof(float) + n*(size_t) states + 2*n + 2*(n/ATHENA_GROUP));
    GGML_ASSERT(memory != NULL && "out of memory");
    uint8_t * p = memory;
    ws->x          = cut(&p, n*sizeof(float));
    ws->w          = cut(&p, n*sizeof(float));
    ws->levels     = cut(&p, n*sizeof(float));
    ws->from       = cut(&p, n*(size_t) states);
    ws->symbols    = cut(&p, n);
    ws->best       = cut(&p, n);
    ws->codes      = cut(&p, n/ATHENA_GROUP);
    ws->best_codes = cut(&p, n/ATHENA_GROUP);
    return memory;
}

// One step of all lanes: costs of the states after it from those before, and where they come from.
// target, root: the input in units of the scale and the square root of its importance in those units, per lane.
static void viterbi_step(const trellis * t, const float * target, const float * root,
                         float (* before)[ATHENA_LANES], float (* after)[ATHENA_LANES], uint8_t * from) {
    float u2[MAX_STATES][ATHENA_LANES]; // weighted second-table terms, and their squares on top of the costs before
    float c2[MAX_STATES][ATHENA_LANES];
    for (int p = 0; p < t->states; p++) {
        for (int l = 0; l < ATHENA_LANES; l++) {
            u2[p][l] = root[l]*t->t2[p];
            c2[p][l] = before[p][l] + u2[p][l]*u2[p][l];
        }
    }
    for (int n = 0; n < t->states; n++) {
        float   a[ATHENA_LANES];
        float   b[ATHENA_LANES];
        float   least[ATHENA_LANES];
        int32_t choice[ATHENA_LANES];
        for (int l = 0; l < ATHENA_LANES; l++) {
            a[l] = root[l]*(target[l] - t->t1[n]);
            b[l] = -2.0f*a[l];
            least[l]  = c2[t->base[n]][l] + b[l]*u2[t->base[n]][l];
            choice[l] = 0;
        }
        for (int x = 1; x < t->choices; x++) {
            const float * cp = c2[t->base[n] + t->x_offset[x]];
            const float * up = u2[t->base[n] + t->x_offset[x]];
            for (int l = 0; l < ATHENA_LANES; l++) {
                const float   cost   = cp[l] + b[l]*up[l];
                const int32_t better = -(int32_t) (cost < least[l]); // a mask: compilers turn this into vector code
                choice[l] ^= (choice[l] ^ x) & better;
                least[l]   = cost < least[l] ? cost : least[l];
            }
        }
        for (int l = 0; l < ATHENA_LANES; l++) {
            after[n][l] = least[l] + a[l]*a[l];
            from[n*ATHENA_LANES + l] = (uint8_t) choice[l];
        }
    }
}

// The best path of every lane under the scales ws->codes: fills ws->symbols and ws->levels.
static void viterbi_row(const trellis * t, workspace * ws, int64_t k) {
    float costs[2][MAX_STATES][ATHENA_LANES];
    const int64_t steps = k/ATHENA_LANES;
    for (int n = 0; n < t->states; n++) {
        for (int l = 0; l < ATHENA_LANES; l++) {
            costs[0][n][l] = n == 0 ? 0.0f : 1e30f;
        }
    }
    for (int64_t s = 0; s < steps; s++) {
        const float * x = ws->x + s*ATHENA_LANES;
        const float * w = ws->w + s*ATHENA_LANES;
        const float scale = ggml_athena_scale(ws->codes[s/2]);
        float target[ATHENA_LANES];
        float root[ATHENA_LANES];
        for (int l = 0; l < ATHENA_LANES; l++) {
            target[l] = x[l]/scale;
            root[l]   = sqrtf(w[l])*scale;
        }
        viterbi_step(t, target, root, costs[s % 2], costs[(s + 1) % 2], ws->from + s*t->states*ATHENA_LANES);
    }
    for (int l = 0; l < ATHENA_LANES; l++) {
        int state = 0;
        for (int n = 1; n < t->states; n++) {
            state = costs[steps % 2][n][l] < costs[steps % 2][state][l] ? n : state;
        }
        for (int64_t s = steps; s-- > 0;) {
            const int choice   = ws->from[(s*t->states + state)*ATHENA_LANES + l];
            const int previous = t->base[state] + t->x_offset[choice];
            ws->symbols[s*ATHENA_LANES + l] = t->symbol[state];
            ws->levels[s*ATHENA_LANES + l]  = t->t1[state] + t->t2[previous];
            state = previous;
        }
    }
}

// The nearest scale byte.
static uint8_t scale_code(double scale) {
    if (!(scale > (double) ggml_athena_scale(0))) {
        return 0;
    }
    if (scale >= (double) ggml_athena_scale(255)) {
        return 255;
    }
    const float f = (float) scale;
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    bits -= 108u << 23; // within an octave the bits are linear in the value, so rounding them rounds the value
    bits = (bits + (1u << 18)) >> 19;
    return bits > 255 ? 255 : (uint8_t) bits;
}

static double row_error(const workspace * ws, int64_t k) {
    double error = 0.0;
    for (int64_t g = 0; g < k/ATHENA_GROUP; g++) {
        const float scale = ggml_athena_scale(ws->codes[g]);
        double sum = 0.0;
        for (int64_t c = g*ATHENA_GROUP; c < (g + 1)*ATHENA_GROUP; c++) {
            const float e = ws->x[c] - scale*ws->levels[c];
            sum += (double) (ws->w[c]*e*e);
        }
        error += sum;
    }
    return error;
}

// Scales that suit the spread of each group.
static void first_scales(const trellis * t, workspace * ws, int64_t k) {
    for (int64_t g = 0; g < k/ATHENA_GROUP; g++) {
        double sum = 0.0, weight = 0.0;
        for (int64_t c = g*ATHENA_GROUP; c < (g + 1)*ATHENA_GROUP; c++) {
            sum    += (double) (ws->w[c]*ws->x[c]*ws->x[c]);
            weight += (double) ws->w[c];
        }
        ws->codes[g] = scale_code(weight > 0.0 ? sqrt(sum/weight)/(double) t->rms : 0.0);
    }
}

// The scales of least error under the symbols that were found. Returns whether any byte changed.
static bool refit_scales(workspace * ws, int64_t k) {
    bool changed = false;
    for (int64_t g = 0; g < k/ATHENA_GROUP; g++) {
        double xv = 0.0, vv = 0.0;
        for (int64_t c = g*ATHENA_GROUP; c < (g + 1)*ATHENA_GROUP; c++) {
            xv += (double) (ws->w[c]*ws->x[c]*ws->levels[c]);
            vv += (double) (ws->w[c]*ws->levels[c]*ws->levels[c]);
        }
        const uint8_t code = vv > 0.0 ? scale_code(xv/vv) : ws->codes[g];
        changed |= code != ws->codes[g];
        ws->codes[g] = code;
    }
    return changed;
}

static void pack_super(enum ggml_type type, const uint8_t * symbols, uint8_t * planes) {
    for (int c = 0; c < ATHENA_SUPER; c++) {
        const int step = c/ATHENA_LANES, lane = c%ATHENA_LANES;
        if (type == GGML_TYPE_A4) {
            planes[step/2*32 + lane] |= symbols[c] << 4*(step % 2);
        } else {
            const uint8_t pair = type == GGML_TYPE_A3 ? symbols[c] >> 1 : symbols[c];
            planes[step/4*32 + lane] |= pair << 2*(step % 4);
        }
        if (type == GGML_TYPE_A3) {
            planes[64 + lane] |= (symbols[c] & 1) << step;
        }
    }
}

static void pack_tail(enum ggml_type type, const uint8_t * symbols, uint8_t * planes) {
    for (int c = 0; c < ATHENA_GROUP; c++) {
        const int step = c/ATHENA_LANES, lane = c%ATHENA_LANES;
        if (type == GGML_TYPE_A4) {
            planes[lane] |= symbols[c] << 4*step;
        } else {
            const uint8_t pair = type == GGML_TYPE_A3 ? symbols[c] >> 1 : symbols[c];
            planes[lane % 16] |= pair << (4*(lane/16) + 2*step);
        }
        if (type == GGML_TYPE_A3) {
            planes[16 + lane % 8] |= (symbols[c] & 1) << (2*(lane/8) + step);
        }
    }
}

static size_t row_size(enum ggml_type type, int64_t k) {
    return (size_t) (k/ATHENA_GROUP)*ggml_athena_group_size(type);
}

static void pack_row(enum ggml_type type, const uint8_t * symbols, const uint8_t * codes, uint8_t * y, int64_t k) {
    const size_t group = ggml_athena_group_size(type);
    memset(y, 0, row_size(type, k));
    int64_t c = 0;
    for (; k - c >= ATHENA_SUPER; c += ATHENA_SUPER, y += 4*group) {
        memcpy(y, codes + c/ATHENA_GROUP, 4);
        pack_super(type, symbols + c, y + 4);
    }
    for (; c < k; c += ATHENA_GROUP, y += group) {
        *y = codes[c/ATHENA_GROUP];
        pack_tail(type, symbols + c, y + 1);
    }
}

// Inputs and importances that the search can work with: finite, not huge, importances of mean 1.
static void load_row(workspace * ws, const float * x, const float * importance, int64_t k) {
    double sum = 0.0;
    for (int64_t c = 0; c < k; c++) {
        ws->x[c] = x[c] > LIMIT ? LIMIT : x[c] < -LIMIT ? -LIMIT : x[c] == x[c] ? x[c] : 0.0f;
        ws->w[c] = importance == NULL ? 1.0f : importance[c] > 0.0f && importance[c] < 1e30f ? importance[c] : 0.0f;
        sum += (double) ws->w[c];
    }
    const double mean = sum/(double) k;
    for (int64_t c = 0; c < k; c++) {
        ws->w[c] = mean > 1e-30 ? (float) ((double) ws->w[c]/mean) : 1.0f;
    }
}

static void quantize_row(enum ggml_type type, const trellis * t, workspace * ws, const float * x,
                         const float * importance, uint8_t * y, int64_t k) {
    load_row(ws, x, importance, k);
    first_scales(t, ws, k);
    double least = INFINITY;
    for (int round = 0; round < ROUNDS; round++) {
        viterbi_row(t, ws, k);
        const bool changed = refit_scales(ws, k);
        const double error = row_error(ws, k);
        if (round == 0 || error < least) {
            least = error;
            memcpy(ws->best, ws->symbols, (size_t) k);
            memcpy(ws->best_codes, ws->codes, (size_t) (k/ATHENA_GROUP));
        }
        if (!changed) {
            break;
        }
    }
    pack_row(type, ws->best, ws->best_codes, y, k);
}

static size_t quantize_rows(enum ggml_type type, const float * src, void * dst, int64_t nrows, int64_t k, const float * imatrix) {
    GGML_ASSERT(k > 0 && k % ATHENA_GROUP == 0);
    const size_t size = row_size(type, k);
    trellis t;
    workspace ws;
    make_trellis(type, &t);
    uint8_t * memory = make_workspace(&ws, k, t.states);
    for (int64_t r = 0; r < nrows; r++) {
        quantize_row(type, &t, &ws, src + r*k, imatrix, (uint8_t *) dst + r*size, k);
    }
    free(memory);
    return nrows*size;
}

size_t quantize_a2(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    return quantize_rows(GGML_TYPE_A2, src, dst, nrows, n_per_row, imatrix);
}

size_t quantize_a3(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    return quantize_rows(GGML_TYPE_A3, src, dst, nrows, n_per_row, imatrix);
}

size_t quantize_a4(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    return quantize_rows(GGML_TYPE_A4, src, dst, nrows, n_per_row, imatrix);
}

void quantize_row_a2(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_rows(GGML_TYPE_A2, x, y, 1, k, NULL);
}

void quantize_row_a3(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_rows(GGML_TYPE_A3, x, y, 1, k, NULL);
}

void quantize_row_a4(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_rows(GGML_TYPE_A4, x, y, 1, k, NULL);
}
