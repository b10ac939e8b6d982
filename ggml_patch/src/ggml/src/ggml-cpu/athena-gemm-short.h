// Matrix products for AVX2 without VNNI, where a product of bytes gives 16 bits and widening it to 32 takes two more
// instructions: products of eight columns are added up in 16 bits first.
//
// A lane of 16 bits takes two columns of every unit. The levels' table sums, 0 .. 127, would overflow it, but what counts is
// the sum after the zero point's part is added, modulo 2^16: the sum of eight products of a level, -64 .. 63, and an
// activation. By Cauchy and Schwarz its square is at most the product of the two sums of eight squares. Where the largest
// of those of a tile and a panel do not promise that it fits, 64 columns are multiplied in the general way; with Gaussian
// activations that is less than one time in 100.

#pragma once

#define ATHENA_SHORT_UNITS 4 // units that are added up in 16 bits

static inline uint32_t largest_of_16(__m256i v) {
    const __m128i m = _mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return 0xffff - (uint32_t) _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(m, _mm_set1_epi8(-1))), 0);
}

// Squares of signed bytes, two to a lane of 16 bits. None is -128: activations are rounded to 127 steps of their scale.
static inline __m256i add_squares(__m256i v) {
    const __m256i magnitude = _mm256_abs_epi8(v);
    return _mm256_maddubs_epi16(magnitude, magnitude);
}

static void prepare_short_sums(athena_panel * panel) {
    __m256i largest = _mm256_setzero_si256();
    for (int s = 0; s < ATHENA_GROUP/4/ATHENA_SHORT_UNITS; s++) {
        __m256i start = _mm256_setzero_si256(), halves = _mm256_setzero_si256();
        for (int c = s*ATHENA_SHORT_UNITS; c < (s + 1)*ATHENA_SHORT_UNITS; c++) {
            const __m256i q = athena_load(panel->q[c]);
            start  = _mm256_sub_epi16(start, _mm256_maddubs_epi16(_mm256_set1_epi8(ATHENA_ZERO), q));
            halves = _mm256_add_epi16(halves, _mm256_avg_epu16(add_squares(q), _mm256_setzero_si256())); // rounded up
        }
        store_vector(panel->start[s], start);
        largest = _mm256_max_epu16(largest, halves);
    }
    panel->squares = 2*largest_of_16(largest);
}

// The largest sums of eight squares in the groups of a tile. With few panels they would cost more than they save.
static void measure_tile(athena_gemm_scratch * scratch, int64_t tile, int groups, int64_t panels) {
    for (int g = 0; g < groups; g++) {
        __m256i largest = _mm256_set1_epi16(panels < 4 ? -1 : 0);
        for (int i = 0; i < ATHENA_TILE_BYTES && panels >= 4; i += 32) {
            const __m256i v = athena_load(&scratch->levels[tile][g][i]);
            __m256i sum = add_squares(_mm256_sub_epi8(v, _mm256_set1_epi8(ATHENA_ZERO)));
            sum = _mm256_add_epi16(sum, _mm256_shuffle_epi32(sum, 0x4e)); // 16 columns are half a vector
            sum = _mm256_add_epi16(sum, _mm256_shuffle_epi32(sum, 0xb1));
            largest = _mm256_max_epu16(largest, sum);
        }
        scratch->squares[tile][g] = largest_of_16(largest);
    }
}

static inline bool short_sums_fit(uint32_t squares, const athena_panel * panel, size_t stride) {
    uint32_t largest = 0;
    for (int p = 0; p < ATHENA_KERNEL_PANELS; p++) {
        const uint32_t of_panel = panel[p*stride].squares;
        largest = of_panel > largest ? of_panel : largest;
    }
    return (uint64_t) squares*largest <= INT16_MAX*INT16_MAX;
}

// What multiply_block gives.
static ATHENA_INLINE void multiply_block_short(athena_block dot, const uint8_t * levels, const athena_panel * panel, size_t stride) {
    const athena_panel * at[ATHENA_KERNEL_PANELS];
    for (int p = 0; p < ATHENA_KERNEL_PANELS; p++) {
        at[p] = panel + p*stride;
    }
    ATHENA_UNROLL(16)
    for (int s = 0; s < ATHENA_GROUP/4/ATHENA_SHORT_UNITS; s++) {
        ATHENA_UNROLL(16)
        for (int m = 0; m < ATHENA_BLOCK_ROWS; m++) {
            __m256i u[ATHENA_SHORT_UNITS];
            ATHENA_UNROLL(4)
            for (int i = 0; i < ATHENA_SHORT_UNITS; i++) {
                u[i] = _mm256_set1_epi32(load_unit(levels + m*ATHENA_GROUP + 4*(s*ATHENA_SHORT_UNITS + i)));
            }
            ATHENA_UNROLL(4)
            for (int p = 0; p < ATHENA_KERNEL_PANELS; p++) {
                ATHENA_PIN_POINTER(at[p]); // activations are to be operands in memory
                __m256i sum = athena_load(at[p]->start[s]);
                ATHENA_UNROLL(4)
                for (int i = 0; i < ATHENA_SHORT_UNITS; i++) {
                    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(u[i], athena_load(at[p]->q[s*ATHENA_SHORT_UNITS + i])));
                    ATHENA_PIN_VECTOR(sum);
                }
                const __m256i wide = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
                dot[m][p] = s == 0 ? wide : _mm256_add_epi32(dot[m][p], wide);
                ATHENA_PIN_VECTOR(dot[m][p]);
            }
        }
    }
}

static ATHENA_NOINLINE void add_products_short(const uint8_t * levels, const float * scales, const athena_panel * panel, size_t stride, float * sums, bool first) {
    for (int r = 0; r < ATHENA_TILE_ROWS; r += ATHENA_BLOCK_ROWS) {
        athena_block dot;
        multiply_block_short(dot, levels + r*ATHENA_GROUP, panel, stride);
        add_block(dot, ATHENA_BLOCK_ROWS, ATHENA_KERNEL_PANELS, scales + r, panel, stride, sums + r*ATHENA_PANEL, first);
    }
}
