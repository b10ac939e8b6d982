// Matrix products with AVX2, AVX-VNNI, AVX-512 VNNI and AMX: what athena-gemm.c is made of on x86.

#pragma once

#include "athena-gemm.h"

#if defined(ATHENA_GEMM_AVX512) && defined(__AMX_INT8__) && defined(__linux__)
#define ATHENA_GEMM_AMX
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Where a row begins in its tile.
#define ATHENA_TILE_ROW(m) ((m)*ATHENA_GROUP)

// Columns of a row into its place in the tiles, row after row of them; carry is what the columns before them left.
static void decode_row(enum ggml_type type, int columns, const uint8_t * x, athena_carry * carry, uint8_t * levels, float * scales, int zero) {
    athena_carry state = *carry;
    athena_sink sink = athena_tile_sink(levels, scales, zero);
    switch (type) {
        case GGML_TYPE_A2: ATHENA_ROW(a2)(columns, x, &state, &sink); break;
        case GGML_TYPE_A3: ATHENA_ROW(a3)(columns, x, &state, &sink); break;
        default:           ATHENA_ROW(a4)(columns, x, &state, &sink); break;
    }
    *carry = state;
}

static athena_carry row_start(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_A2: return ATHENA_ROW_START(a2);
        case GGML_TYPE_A3: return ATHENA_ROW_START(a3);
        default:           return ATHENA_ROW_START(a4);
    }
}

#if defined(ATHENA_GEMM_AVX512)

#define ATHENA_VECTOR 16
typedef __m512i athena_vector;

// 16 x 16 lanes of 32 bits.
static ATHENA_INLINE void transpose(__m512i v[16]) {
    __m512i a[16];
    for (int i = 0; i < 16; i += 4) { // 4 x 4 inside the 128-bit quarters
        const __m512i l01 = _mm512_unpacklo_epi32(v[i],     v[i + 1]);
        const __m512i h01 = _mm512_unpackhi_epi32(v[i],     v[i + 1]);
        const __m512i l23 = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
        const __m512i h23 = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        a[i]     = _mm512_unpacklo_epi64(l01, l23);
        a[i + 1] = _mm512_unpackhi_epi64(l01, l23);
        a[i + 2] = _mm512_unpacklo_epi64(h01, h23);
        a[i + 3] = _mm512_unpackhi_epi64(h01, h23);
    }
    for (int i = 0; i < 4; i++) { // then the quarters themselves
        const __m512i l01 = _mm512_shuffle_i32x4(a[i],     a[i + 4],  0x44);
        const __m512i h01 = _mm512_shuffle_i32x4(a[i],     a[i + 4],  0xee);
        const __m512i l23 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x44);
        const __m512i h23 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xee);
        v[i]      = _mm512_shuffle_i32x4(l01, l23, 0x88);
        v[i + 4]  = _mm512_shuffle_i32x4(l01, l23, 0xdd);
        v[i + 8]  = _mm512_shuffle_i32x4(h01, h23, 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(h01, h23, 0xdd);
    }
}

static ATHENA_INLINE athena_vector load_vector(const void * p) {
    return _mm512_loadu_si512(p);
}

static ATHENA_INLINE void store_vector(void * p, athena_vector v) {
    _mm512_storeu_si512(p, v);
}

#else

#define ATHENA_VECTOR 8
typedef __m256i athena_vector;

// 8 x 8 lanes of 32 bits.
static ATHENA_INLINE void transpose(__m256i v[8]) {
    __m256i a[8];
    for (int i = 0; i < 8; i += 4) { // 4 x 4 inside the 128-bit halves
        const __m256i l01 = _mm256_unpacklo_epi32(v[i],     v[i + 1]);
        const __m256i h01 = _mm256_unpackhi_epi32(v[i],     v[i + 1]);
        const __m256i l23 = _mm256_unpacklo_epi32(v[i + 2], v[i + 3]);
        const __m256i h23 = _mm256_unpackhi_epi32(v[i + 2], v[i + 3]);
        a[i]     = _mm256_unpacklo_epi64(l01, l23);
        a[i + 1] = _mm256_unpackhi_epi64(l01, l23);
        a[i + 2] = _mm256_unpacklo_epi64(h01, h23);
        a[i + 3] = _mm256_unpackhi_epi64(h01, h23);
    }
    for (int i = 0; i < 4; i++) {
        v[i]     = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
    }
}

static ATHENA_INLINE athena_vector load_vector(const void * p) {
    return athena_load(p);
}

static ATHENA_INLINE void store_vector(void * p, athena_vector v) {
    _mm256_storeu_si256((__m256i *) p, v);
}

#endif

#if defined(ATHENA_GEMM_AVX512)

#define ATHENA_BLOCK_ROWS  8
#define ATHENA_SINGLE_ROWS 16

static ATHENA_INLINE athena_vector dot_units(athena_vector dot, int32_t unit, const void * q) {
    return _mm512_dpbusd_epi32(dot, _mm512_set1_epi32(unit), load_vector(q));
}

static ATHENA_INLINE __m512 add_scaled(__m512 sum, __m512i dot, float scale, __m512 d) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(_mm512_set1_ps(scale), d), sum);
}

static ATHENA_INLINE void add_to_sums(float * sums, athena_vector dot, float scale, const float * d, bool first) {
    const __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums);
    _mm512_storeu_ps(sums, add_scaled(before, dot, scale, _mm512_loadu_ps(d)));
}

#else

#define ATHENA_BLOCK_ROWS  4
#define ATHENA_SINGLE_ROWS 8

static ATHENA_INLINE athena_vector dot_units(athena_vector dot, int32_t unit, const void * q) {
    dot = athena_dot_bytes(dot, _mm256_set1_epi32(unit), load_vector(q));
    ATHENA_PIN_VECTOR(dot);
    return dot;
}

static ATHENA_INLINE void add_to_sums(float * sums, athena_vector dot, float scale, const float * d, bool first) {
    const __m256 before = first ? _mm256_setzero_ps() : _mm256_loadu_ps(sums);
    const __m256 factor = _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_loadu_ps(d));
    _mm256_storeu_ps(sums, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, before));
}

#endif

// Four columns of a row.
static ATHENA_INLINE int32_t load_unit(const uint8_t * levels) {
    int32_t unit;
    memcpy(&unit, levels, sizeof(unit));
    return unit;
}

// Kernels multiply the 16 rows of a tile with one panel or several by blocks of some rows, whose sums stay in registers.
typedef athena_vector athena_block[ATHENA_SINGLE_ROWS][ATHENA_KERNEL_PANELS];

// Integer products of 64 columns.
static ATHENA_INLINE void multiply_block(athena_block dot, int rows, int panels, const uint8_t * levels, const athena_panel * panel, size_t stride) {
    ATHENA_UNROLL(16)
    for (int m = 0; m < rows; m++) {
        ATHENA_UNROLL(4)
        for (int p = 0; p < panels; p++) {
            dot[m][p] = load_vector(panel[p*stride].offset);
        }
    }
    ATHENA_UNROLL(16)
    for (int c = 0; c < ATHENA_GROUP/4; c++) {
        ATHENA_UNROLL(16)
        for (int m = 0; m < rows; m++) {
            const int32_t unit = load_unit(levels + m*ATHENA_GROUP + 4*c);
            ATHENA_UNROLL(4)
            for (int p = 0; p < panels; p++) {
                dot[m][p] = dot_units(dot[m][p], unit, panel[p*stride].q[c]);
            }
        }
    }
}

static ATHENA_INLINE void add_block(athena_block dot, int rows, int panels, const float * scales, const athena_panel * panel, size_t stride, float * sums, bool first) {
    ATHENA_UNROLL(16)
    for (int m = 0; m < rows; m++) {
        const float scale = scales[m];
        ATHENA_UNROLL(4)
        for (int p = 0; p < panels; p++) {
            add_to_sums(sums + (p*ATHENA_GEMM_ROWS + m)*ATHENA_PANEL, dot[m][p], scale, panel[p*stride].d, first);
        }
    }
}

// 64 columns of 16 rows times ATHENA_KERNEL_PANELS that lie `stride` panels apart, added to sums (or, if `first`, in their
// place). A function of its own: GCC mixes what is inlined side by side, and registers run out.
static ATHENA_NOINLINE void add_products(const uint8_t * levels, const float * scales, const athena_panel * panel, size_t stride, float * sums, bool first) {
    for (int r = 0; r < ATHENA_TILE_ROWS; r += ATHENA_BLOCK_ROWS) {
        athena_block dot;
        multiply_block(dot, ATHENA_BLOCK_ROWS, ATHENA_KERNEL_PANELS, levels + r*ATHENA_GROUP, panel, stride);
        add_block(dot, ATHENA_BLOCK_ROWS, ATHENA_KERNEL_PANELS, scales + r, panel, stride, sums + r*ATHENA_PANEL, first);
    }
}

#if defined(ATHENA_SHORT_SUMS)
#include "athena-gemm-short.h"
#endif

// 16 rows times one panel, `groups` times 64 columns, added to sums (or, if `first`, in their place).
static void kernel(const uint8_t * levels, const float * scales, const athena_panel * panel, int groups, float * sums, bool first) {
    for (int g = 0; g < groups; g++, levels += ATHENA_TILE_BYTES, scales += ATHENA_TILE_ROWS, panel++) {
        for (int r = 0; r < ATHENA_TILE_ROWS; r += ATHENA_SINGLE_ROWS) {
            athena_block dot;
            multiply_block(dot, ATHENA_SINGLE_ROWS, 1, levels + r*ATHENA_GROUP, panel, 0);
            add_block(dot, ATHENA_SINGLE_ROWS, 1, scales + r, panel, 0, sums + r*ATHENA_PANEL, first && g == 0);
        }
    }
}

// The same with ATHENA_KERNEL_PANELS, `stride` panels apart.
static void kernel_of_several(const athena_gemm_scratch * scratch, int64_t tile, const athena_panel * panel, size_t stride, int groups, float * sums, bool first) {
    for (int g = 0; g < groups; g++, panel++) {
        const uint8_t * levels = scratch->levels[tile][g];
        const float   * scales = scratch->scales[tile][g];
#if defined(ATHENA_SHORT_SUMS)
        if (short_sums_fit(scratch->squares[tile][g], panel, stride)) {
            add_products_short(levels, scales, panel, stride, sums, first && g == 0);
            continue;
        }
#endif
        add_products(levels, scales, panel, stride, sums, first && g == 0);
    }
}

#if defined(ATHENA_GEMM_AMX)

typedef struct {
    uint8_t  palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t  rows[16];
} tile_config;

static_assert(sizeof(tile_config) == 64, "wrong size of the AMX tile configuration");

// Linux lets a process use the tiles after it has asked to; the answer holds for all of its threads.
static bool amx_ready(void) {
    enum { unknown, yes, no };
    static atomic_int state = unknown;
    int known = atomic_load_explicit(&state, memory_order_relaxed);
    if (known == unknown) {
        const long request_permission = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        known = syscall(SYS_arch_prctl, request_permission, tile_data) == 0 ? yes : no;
        atomic_store_explicit(&state, known, memory_order_relaxed);
    }
    return known == yes;
}

// Makes all tiles 16 rows of 64 bytes. Returns what was there before: llama.cpp's own AMX code keeps its configuration.
static tile_config configure_tiles(void) {
    tile_config before, ours = { .palette = 1 };
    for (int i = 0; i < 8; i++) {
        ours.rows[i]  = 16;
        ours.bytes[i] = 64;
    }
    __asm__ volatile("sttilecfg %0" : "=m"(before));
    __asm__ volatile("ldtilecfg %0" : : "m"(ours));
    return before;
}

static void restore_tiles(const tile_config * before) {
    __asm__ volatile("ldtilecfg %0" : : "m"(*before));
}

// The integer products of 64 columns, through three tiles.
#define ATHENA_AMX_PRODUCTS(g, c, a, b) do { \
        _tile_zero(c); \
        _tile_loadd(a, levels + (g)*ATHENA_TILE_BYTES, 64); \
        _tile_loadd(b, panel[g].q, 64); \
        _tile_dpbssd(c, a, b); \
        _tile_stored(c, products[(g) % 2], 64); \
    } while (0)

// Levels are signed here: the zero point is subtracted already.
static void kernel_amx(const uint8_t * levels, const float * scales, const athena_panel * panel, int groups, float * sums, bool first, int32_t products[2][ATHENA_TILE_ROWS][ATHENA_PANEL]) {
    __m512 sum[ATHENA_TILE_ROWS];
    ATHENA_UNROLL(16)
    for (int m = 0; m < ATHENA_TILE_ROWS; m++) {
        sum[m] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + m*ATHENA_PANEL);
    }
    __asm__ volatile("" : : : "memory"); // tile loads do not say which memory they read
    ATHENA_AMX_PRODUCTS(0, 0, 1, 2);
    for (int g = 0; g < groups; g++, scales += ATHENA_TILE_ROWS) {
        if (g + 1 < groups) { // one group ahead of the vectors
            if (g % 2 == 0) {
                ATHENA_AMX_PRODUCTS(g + 1, 3, 4, 5);
            } else {
                ATHENA_AMX_PRODUCTS(g + 1, 0, 1, 2);
            }
        }
        const __m512 d = _mm512_loadu_ps(panel[g].d);
        ATHENA_UNROLL(16)
        for (int m = 0; m < ATHENA_TILE_ROWS; m++) {
            sum[m] = add_scaled(sum[m], _mm512_loadu_si512(products[g % 2][m]), scales[m], d);
        }
    }
    ATHENA_UNROLL(16)
    for (int m = 0; m < ATHENA_TILE_ROWS; m++) {
        _mm512_storeu_ps(sums + m*ATHENA_PANEL, sum[m]);
    }
}

#endif

