// Plain C dot products of A2, A3 and A4 rows, and the choice between them and the versions for instruction sets.

#include "athena.h"
#include "athena-avx512.h"
#include "athena-neon.h"

static float vec_dot_generic(enum ggml_type type, int n, const uint8_t * x, const block_q8_a64 * y) {
    assert(n % ATHENA_GROUP == 0);
    ggml_athena_state state;
    uint8_t sums[ATHENA_SUPER];
    float   scales[ATHENA_SUPER/ATHENA_GROUP];
    float   result = 0.0f;
    memset(&state, 0, sizeof(state));
    for (int i = 0; i < n;) {
        const int columns = n - i >= ATHENA_SUPER ? ATHENA_SUPER : ATHENA_GROUP;
        x += ggml_athena_decode_block(type, &state, x, columns, sums, scales);
        for (int g = 0; g < columns/ATHENA_GROUP; g++, y++) {
            int32_t dot = y->offset;
            for (int c = 0; c < ATHENA_GROUP; c++) {
                dot += sums[g*ATHENA_GROUP + c]*y->qs[c];
            }
            result += y->d*scales[g]*(float) dot;
        }
        i += columns;
    }
    return result;
}

#define ATHENA_UNUSED_STRIDES assert(nrc == 1); GGML_UNUSED(nrc); GGML_UNUSED(bs); GGML_UNUSED(bx); GGML_UNUSED(by)

void ggml_vec_dot_a2_q8_a64_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    ATHENA_UNUSED_STRIDES;
    *s = vec_dot_generic(GGML_TYPE_A2, n, vx, vy);
}

void ggml_vec_dot_a3_q8_a64_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    ATHENA_UNUSED_STRIDES;
    *s = vec_dot_generic(GGML_TYPE_A3, n, vx, vy);
}

void ggml_vec_dot_a4_q8_a64_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    ATHENA_UNUSED_STRIDES;
    *s = vec_dot_generic(GGML_TYPE_A4, n, vx, vy);
}

#if defined(ATHENA_HAVE_AVX2)

#define ATHENA_DEFINE_DOT(type) \
    static void dot_rows_##type(int n, const uint8_t * x, size_t stride, int64_t rows, const block_q8_a64 * y, float * out) { \
        for (int64_t r = 0; r < rows; r++, x += stride) { \
            athena_carry carry = ATHENA_ROW_START(type); \
            athena_sink  sink  = athena_dot_sink(y); \
            ATHENA_ROW(type)(n, x, &carry, &sink); \
            out[r] = athena_total(&sink); \
        } \
    } \
    void ggml_vec_dot_##type##_q8_a64(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) { \
        ATHENA_UNUSED_STRIDES; \
        dot_rows_##type(n, vx, 0, 1, vy, s); \
    }

ATHENA_DEFINE_DOT(a2)
ATHENA_DEFINE_DOT(a3)
ATHENA_DEFINE_DOT(a4)

void quantize_row_q8_a64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    athena_quantize_q8_a64_avx2(x, y, k);
}

#elif defined(ATHENA_HAVE_NEON)

#define ATHENA_DEFINE_DOT(type, TYPE) \
    static void dot_rows_##type(int n, const uint8_t * x, size_t stride, int64_t rows, const block_q8_a64 * y, float * out) { \
        for (int64_t r = 0; r < rows; r++, x += stride) { \
            out[r] = athena_dot_neon(TYPE, &athena_tables_##type, n, x, y); \
        } \
    } \
    void ggml_vec_dot_##type##_q8_a64(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) { \
        ATHENA_UNUSED_STRIDES; \
        dot_rows_##type(n, vx, 0, 1, vy, s); \
    }

ATHENA_DEFINE_DOT(a2, GGML_TYPE_A2)
ATHENA_DEFINE_DOT(a3, GGML_TYPE_A3)
ATHENA_DEFINE_DOT(a4, GGML_TYPE_A4)

void quantize_row_q8_a64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    athena_quantize_q8_a64_neon(x, y, k);
}

#else

static void dot_rows(enum ggml_type type, int n, const uint8_t * x, size_t stride, int64_t rows, const block_q8_a64 * y, float * out) {
    for (int64_t r = 0; r < rows; r++, x += stride) {
        out[r] = vec_dot_generic(type, n, x, y);
    }
}

#define dot_rows_a2(...) dot_rows(GGML_TYPE_A2, __VA_ARGS__)
#define dot_rows_a3(...) dot_rows(GGML_TYPE_A3, __VA_ARGS__)
#define dot_rows_a4(...) dot_rows(GGML_TYPE_A4, __VA_ARGS__)

void ggml_vec_dot_a2_q8_a64(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    ggml_vec_dot_a2_q8_a64_generic(n, s, bs, vx, bx, vy, by, nrc);
}

void ggml_vec_dot_a3_q8_a64(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    ggml_vec_dot_a3_q8_a64_generic(n, s, bs, vx, bx, vy, by, nrc);
}

void ggml_vec_dot_a4_q8_a64(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    ggml_vec_dot_a4_q8_a64_generic(n, s, bs, vx, bx, vy, by, nrc);
}

void quantize_row_q8_a64(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_q8_a64_ref(x, y, k);
}

#endif

void ggml_athena_dot_rows(enum ggml_type type, int n, const void * x, size_t stride, int64_t rows, const void * y, float * out) {
    switch (type) {
        case GGML_TYPE_A2: dot_rows_a2(n, x, stride, rows, y, out); break;
        case GGML_TYPE_A3: dot_rows_a3(n, x, stride, rows, y, out); break;
        case GGML_TYPE_A4: dot_rows_a4(n, x, stride, rows, y, out); break;
        default: GGML_ABORT("not an Athena type");
    }
}
