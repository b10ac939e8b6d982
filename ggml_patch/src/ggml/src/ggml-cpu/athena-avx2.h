// AVX2 decoders of A2, A3 and A4 rows, for dot products and for tiles of a matrix product. 32 lanes are one vector: a step
// costs one byte shuffle a table.

#pragma once

#if defined(__AVX2__) && defined(__FMA__)
#define ATHENA_HAVE_AVX2

#include "athena.h"
#include "ggml-athena-tables.h"

#include <immintrin.h>

static inline __m256i athena_load(const void * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}

static inline __m256i athena_load_table(const uint8_t table[16]) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) table));
}

// How far ahead of the arithmetic a row is fetched, in bytes. Rows follow each other in memory, so that this serves the
// next row too; the processor's own prefetching starts anew at every page. Addresses beyond the data do no harm.
#define ATHENA_PREFETCH 2048

// Fetches the lines of a block of that size; the few bytes beyond its last full line come with the next block.
static inline void athena_prefetch(const uint8_t * x, size_t size) {
    for (size_t i = 0; i + 32 < size; i += 64) {
        _mm_prefetch((const char *) ((uintptr_t) x + ATHENA_PREFETCH + i), _MM_HINT_T0);
    }
}

// Bytes of v shifted right and masked; the mask hides what crosses from byte to byte.
#define ATHENA_SHIFT_RIGHT(v, bits, mask) _mm256_and_si256(_mm256_srli_epi16((v), (bits)), _mm256_set1_epi8(mask))
#define ATHENA_SHIFT_LEFT(v, bits, mask)  _mm256_and_si256(_mm256_slli_epi16((v), (bits)), _mm256_set1_epi8(mask))

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define ATHENA_HAVE_VNNI
#endif

// Adds products of unsigned (0 .. 127) and signed bytes, four to an int32: no version saturates.
static inline __m256i athena_dot_bytes(__m256i acc, __m256i u, __m256i q) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(acc, u, q);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, u, q);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, q), _mm256_set1_epi16(1)));
#endif
}

// The integer dot product of 64 columns with the zero point's part, spread over eight lanes.
static inline __m256i athena_dot_group(__m256i sums0, __m256i sums1, const block_q8_a64 * y) {
    const __m256i offset = _mm256_zextsi128_si256(_mm_cvtsi32_si128(y->offset)); // in one lane
    const __m256i dot = athena_dot_bytes(offset, sums0, athena_load(y->qs));
    return athena_dot_bytes(dot, sums1, athena_load(y->qs + 32));
}

// The bits of the scales: broadcasting them from memory costs the ports of the arithmetic nothing.
#define ATHENA_SCALE(code)   ((code) << 19) + (108 << 23)
#define ATHENA_SCALE4(code)  ATHENA_SCALE(code), ATHENA_SCALE((code) + 1), ATHENA_SCALE((code) + 2), ATHENA_SCALE((code) + 3)
#define ATHENA_SCALE16(code) ATHENA_SCALE4(code), ATHENA_SCALE4((code) + 4), ATHENA_SCALE4((code) + 8), ATHENA_SCALE4((code) + 12)
#define ATHENA_SCALE64(code) ATHENA_SCALE16(code), ATHENA_SCALE16((code) + 16), ATHENA_SCALE16((code) + 32), ATHENA_SCALE16((code) + 48)

static const int32_t athena_scale_bits[256] = { ATHENA_SCALE64(0), ATHENA_SCALE64(64), ATHENA_SCALE64(128), ATHENA_SCALE64(192) };

// What becomes of the groups of a row: part of a dot product, or rows of a tile. `decode` is a constant wherever a sink is
// used, so that after inlining only one of the two is left.
typedef struct {
    bool decode;
    const block_q8_a64 * y; // the activations of the next group
    __m256 even, odd;       // the dot product; used in turns: a sum waits for the one before it
    uint8_t * levels;       // where the next group's bytes go, and its scale
    float   * scales;
    __m256i   zero;         // subtracted from the sums of table entries
} athena_sink;

// What a row carries from one block to the next; how a decoder uses it is its own business.
typedef struct {
    __m256i v[3];
} athena_carry;

static ATHENA_INLINE athena_sink athena_dot_sink(const block_q8_a64 * y) {
    const athena_sink sink = { false, y, _mm256_setzero_ps(), _mm256_setzero_ps(), NULL, NULL, _mm256_setzero_si256() };
    return sink;
}

static ATHENA_INLINE athena_sink athena_tile_sink(uint8_t * levels, float * scales, int zero) {
    const athena_sink sink = { true, NULL, _mm256_setzero_ps(), _mm256_setzero_ps(), levels, scales, _mm256_set1_epi8((char) zero) };
    return sink;
}

// sum += dot * scale * d
static inline __m256 athena_add_group(__m256 sum, __m256i dot, uint8_t code, const block_q8_a64 * y) {
    const __m256 scale = _mm256_castsi256_ps(_mm256_set1_epi32(athena_scale_bits[code]));
    return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(dot), scale), _mm256_set1_ps(y->d), sum);
}

// Group g of a block: the sums of its two steps and its scale byte.
static ATHENA_INLINE void athena_group(athena_sink * sink, int g, __m256i sums0, __m256i sums1, uint8_t code) {
    if (sink->decode) {
        uint8_t * levels = sink->levels + g*ATHENA_TILE_BYTES;
        _mm256_store_si256((__m256i *) levels,        _mm256_sub_epi8(sums0, sink->zero));
        _mm256_store_si256((__m256i *) (levels + 32), _mm256_sub_epi8(sums1, sink->zero));
        memcpy(sink->scales + g*ATHENA_TILE_ROWS, &athena_scale_bits[code], sizeof(float));
        return;
    }
    const __m256i dot = athena_dot_group(sums0, sums1, &sink->y[g]);
    if (g % 2 == 0) {
        sink->even = athena_add_group(sink->even, dot, code, &sink->y[g]);
    } else {
        sink->odd = athena_add_group(sink->odd, dot, code, &sink->y[g]);
    }
}

// After a block of that many groups.
static ATHENA_INLINE void athena_advance(athena_sink * sink, int groups) {
    if (sink->decode) {
        sink->levels += groups*ATHENA_TILE_BYTES;
        sink->scales += groups*ATHENA_TILE_ROWS;
    } else {
        sink->y += groups;
    }
}

static inline float athena_total(const athena_sink * sink) {
    const __m256 both = _mm256_add_ps(sink->even, sink->odd);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

// The 16 bytes of a tail plane of bit pairs to 32 lanes of two pairs each, in the low nibble. What is above is of no meaning.
static inline __m256i athena_tail_pairs(const uint8_t pairs[16]) {
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) pairs));
    return _mm256_srlv_epi64(bytes, _mm256_set_epi64x(4, 4, 0, 0));
}

// The 8 bytes of a tail plane of bits to 32 lanes of two bits each. What is above is of no meaning.
static inline __m256i athena_tail_bits(const uint8_t low[8]) {
    int64_t bytes;
    memcpy(&bytes, low, sizeof(bytes));
    return _mm256_srlv_epi64(_mm256_set1_epi64x(bytes), _mm256_set_epi64x(6, 4, 2, 0));
}

static inline __m256i athena_sums(__m256i t1, __m256i t2, __m256i window, __m256i delayed) {
    return _mm256_add_epi8(_mm256_shuffle_epi8(t1, window), _mm256_shuffle_epi8(t2, delayed));
}

// The table for windows whose upper and lower two bits are exchanged. Using such windows too saves shifts, since the bits
// of a window can then come from either half of a nibble.
static inline __m256i athena_exchange_halves(__m256i table) {
    const __m256i windows = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm256_shuffle_epi8(table, windows);
}

// A2: a window is a symbol and the one before it, which lie side by side in the bytes. Where a byte begins, the window with
// its halves exchanged: the symbol in bits 0 and 1, the one before it in bits 2 and 3 of the last window.
static inline __m256i athena_first_window_a2(__m256i bytes, __m256i last) {
    return _mm256_or_si256(_mm256_and_si256(bytes, _mm256_set1_epi8(3)), _mm256_and_si256(last, _mm256_set1_epi8(12)));
}

static ATHENA_INLINE void athena_row_a2_avx2(int columns, const uint8_t * x, athena_carry * carry, athena_sink * sink) {
    const __m256i t1 = athena_load_table(athena_tables_a2.t1);
    const __m256i t2 = athena_load_table(athena_tables_a2.t2);
    const __m256i x1 = athena_exchange_halves(t1);
    const __m256i x2 = athena_exchange_halves(t2);
    __m256i w0 = carry->v[0]; // the last window and the one before it
    __m256i w1 = carry->v[1];
    for (int i = 0; i < columns/ATHENA_SUPER; i++, x += sizeof(block_a2)) {
        const block_a2 * b = (const block_a2 *) x;
        athena_prefetch(x, sizeof(*b));
        for (int v = 0; v < 2; v++) {
            const __m256i a  = athena_load(b->pairs[v]);
            const __m256i s0 = athena_first_window_a2(a, w0);
            const __m256i s1 = ATHENA_SHIFT_RIGHT(a, 0, 15);
            const __m256i s2 = ATHENA_SHIFT_RIGHT(a, 2, 15);
            const __m256i s3 = ATHENA_SHIFT_RIGHT(a, 4, 15);
            athena_group(sink, 0, athena_sums(x1, t2, s0, w1), athena_sums(t1, t2, s1, w0), b->scales[2*v]);
            athena_group(sink, 1, athena_sums(t1, x2, s2, s0), athena_sums(t1, t2, s3, s1), b->scales[2*v + 1]);
            athena_advance(sink, 2);
            w1 = s2;
            w0 = s3;
        }
    }
    carry->v[0] = w0; // a tail ends its row: nothing is carried from there
    carry->v[1] = w1;
    // a tail block ends with a window whose predecessor has its halves exchanged: its entries are kept instead
    __m256i e1 = _mm256_shuffle_epi8(t2, w1);
    for (int i = 0; i < columns % ATHENA_SUPER/ATHENA_GROUP; i++, x += sizeof(block_a2_tail)) {
        const block_a2_tail * b = (const block_a2_tail *) x;
        const __m256i a  = _mm256_and_si256(athena_tail_pairs(b->pairs), _mm256_set1_epi8(15));
        const __m256i s0 = athena_first_window_a2(a, w0);
        const __m256i u0 = _mm256_add_epi8(_mm256_shuffle_epi8(x1, s0), e1);
        athena_group(sink, 0, u0, athena_sums(t1, t2, a, w0), b->scale);
        athena_advance(sink, 1);
        e1 = _mm256_shuffle_epi8(x2, s0);
        w0 = a;
    }
}

// A3: a window is the symbol's upper two bits, its lowest bit, and the lowest bit of the symbol before it. The upper bits of
// even steps are taken from where they lie in the low half of a nibble, with the window's halves exchanged. A byte shuffle
// ignores bits 4 to 6 of a window; bit 7 must be 0. low: has no other bits in the low nibble and none in bit 7.
static inline __m256i athena_even_window_a3(__m256i high, __m256i low) {
    return _mm256_or_si256(_mm256_and_si256(high, _mm256_set1_epi8(3)), low);
}

static inline __m256i athena_odd_window_a3(__m256i high, __m256i low) {
    return _mm256_or_si256(_mm256_and_si256(high, _mm256_set1_epi8(12)), low);
}

// The lower half of a block's first window: the bit of its first symbol in bit 3, of the last symbol before it in bit 2.
static inline __m256i athena_first_bits_a3(__m256i low, __m256i last) {
    return _mm256_or_si256(ATHENA_SHIFT_LEFT(low, 3, 8), last);
}

static ATHENA_INLINE void athena_row_a3_avx2(int columns, const uint8_t * x, athena_carry * carry, athena_sink * sink) {
    const __m256i t1 = athena_load_table(athena_tables_a3.t1);
    const __m256i t2 = athena_load_table(athena_tables_a3.t2);
    const __m256i x1 = athena_exchange_halves(t1);
    const __m256i x2 = athena_exchange_halves(t2);
    __m256i last = carry->v[0]; // the lowest bit of the last symbol in bit 2, and the last window
    __m256i w    = carry->v[1];
    for (int i = 0; i < columns/ATHENA_SUPER; i++, x += sizeof(block_a3)) {
        const block_a3 * b = (const block_a3 *) x;
        athena_prefetch(x, sizeof(*b));
        const __m256i a   = athena_load(b->high[0]);
        const __m256i c   = athena_load(b->high[1]);
        const __m256i a4  = _mm256_srli_epi16(a, 4);
        const __m256i c4  = _mm256_srli_epi16(c, 4);
        const __m256i low = athena_load(b->low);
        // bits for two steps each, so far apart that after the shift for one step nothing else is in its way
        const __m256i low25 = _mm256_and_si256(low, _mm256_set1_epi8(0x36));
        const __m256i low16 = _mm256_and_si256(low, _mm256_set1_epi8(0x63));
        const __m256i low37 = _mm256_and_si256(low, _mm256_set1_epi8((char) 0xcc));
        const __m256i s0 = athena_even_window_a3(a,  athena_first_bits_a3(low, last));
        const __m256i s1 = athena_odd_window_a3 (a,  low16);
        const __m256i s2 = athena_even_window_a3(a4, _mm256_slli_epi16(low25, 1));
        const __m256i s3 = athena_odd_window_a3 (a4, _mm256_srli_epi16(low37, 2));
        const __m256i s4 = athena_even_window_a3(c,  ATHENA_SHIFT_RIGHT(low, 1, 12));
        const __m256i s5 = athena_odd_window_a3 (c,  _mm256_srli_epi16(low25, 4));
        const __m256i s6 = athena_even_window_a3(c4, _mm256_srli_epi16(low16, 3));
        const __m256i s7 = athena_odd_window_a3 (c4, _mm256_srli_epi16(low37, 6));
        athena_group(sink, 0, athena_sums(x1, t2, s0, w),  athena_sums(t1, x2, s1, s0), b->scales[0]);
        athena_group(sink, 1, athena_sums(x1, t2, s2, s1), athena_sums(t1, x2, s3, s2), b->scales[1]);
        athena_group(sink, 2, athena_sums(x1, t2, s4, s3), athena_sums(t1, x2, s5, s4), b->scales[2]);
        athena_group(sink, 3, athena_sums(x1, t2, s6, s5), athena_sums(t1, x2, s7, s6), b->scales[3]);
        athena_advance(sink, 4);
        w    = s7;
        last = ATHENA_SHIFT_RIGHT(low, 5, 4);
    }
    carry->v[0] = last;
    carry->v[1] = w;
    for (int i = 0; i < columns % ATHENA_SUPER/ATHENA_GROUP; i++, x += sizeof(block_a3_tail)) {
        const block_a3_tail * b = (const block_a3_tail *) x;
        const __m256i a   = _mm256_and_si256(athena_tail_pairs(b->high), _mm256_set1_epi8(15));
        const __m256i low = _mm256_and_si256(athena_tail_bits(b->low), _mm256_set1_epi8(3));
        const __m256i s0  = athena_even_window_a3(a, athena_first_bits_a3(low, last));
        const __m256i s1  = athena_odd_window_a3(a, low);
        athena_group(sink, 0, athena_sums(x1, t2, s0, w), athena_sums(t1, x2, s1, s0), b->scale);
        athena_advance(sink, 1);
        w    = s1;
        last = ATHENA_SHIFT_LEFT(low, 1, 4);
    }
}

// A4: a window is a symbol, a byte holds two of them. Advances w, the last window.
static ATHENA_INLINE void athena_nibbles_a4(athena_sink * sink, int g, const uint8_t nibbles[32], uint8_t code, __m256i t1, __m256i t2, __m256i * w) {
    const __m256i v  = athena_load(nibbles);
    const __m256i s0 = ATHENA_SHIFT_RIGHT(v, 0, 15);
    const __m256i s1 = ATHENA_SHIFT_RIGHT(v, 4, 15);
    athena_group(sink, g, athena_sums(t1, t2, s0, *w), athena_sums(t1, t2, s1, s0), code);
    *w = s1;
}

static ATHENA_INLINE void athena_row_a4_avx2(int columns, const uint8_t * x, athena_carry * carry, athena_sink * sink) {
    const __m256i t1 = athena_load_table(athena_tables_a4.t1);
    const __m256i t2 = athena_load_table(athena_tables_a4.t2);
    __m256i w = carry->v[0];
    for (int i = 0; i < columns/ATHENA_SUPER; i++, x += sizeof(block_a4)) {
        const block_a4 * b = (const block_a4 *) x;
        athena_prefetch(x, sizeof(*b));
        athena_nibbles_a4(sink, 0, b->nibbles[0], b->scales[0], t1, t2, &w);
        athena_nibbles_a4(sink, 1, b->nibbles[1], b->scales[1], t1, t2, &w);
        athena_nibbles_a4(sink, 2, b->nibbles[2], b->scales[2], t1, t2, &w);
        athena_nibbles_a4(sink, 3, b->nibbles[3], b->scales[3], t1, t2, &w);
        athena_advance(sink, 4);
    }
    carry->v[0] = w;
    for (int i = 0; i < columns % ATHENA_SUPER/ATHENA_GROUP; i++, x += sizeof(block_a4_tail)) {
        const block_a4_tail * b = (const block_a4_tail *) x;
        athena_nibbles_a4(sink, 0, b->nibbles, b->scale, t1, t2, &w);
        athena_advance(sink, 1);
    }
}

// What is carried into the beginning of a row.
static inline athena_carry athena_row_start_avx2(void) {
    const athena_carry carry = { { _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256() } };
    return carry;
}

// The largest of eight integers.
static inline int32_t athena_max8(__m256i v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtsi128_si32(m);
}

static inline int32_t athena_sum8_epi32(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return _mm_cvtsi128_si32(s);
}

// 32 floats, scaled and rounded to the nearest, to bytes in their order.
static inline __m256i athena_round32(const float * x, __m256 scale) {
    const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x),      scale));
    const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8),  scale));
    const __m256i c = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 16), scale));
    const __m256i d = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 24), scale));
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); // packing works by halves
}

static inline void athena_quantize_q8_a64_avx2(const float * x, block_q8_a64 * y, int64_t k) {
    assert(k % ATHENA_GROUP == 0);
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    const __m256i ones = _mm256_set1_epi8(1);
    for (int64_t i = 0; i < k/ATHENA_GROUP; i++, x += ATHENA_GROUP) {
        __m256i most = _mm256_setzero_si256(); // compared as integers, as in the reference
        for (int c = 0; c < ATHENA_GROUP; c += 8) {
            most = _mm256_max_epi32(most, _mm256_and_si256(athena_load(x + c), magnitude));
        }
        const int32_t bits = athena_max8(most);
        float amax;
        memcpy(&amax, &bits, sizeof(amax));
        const float scale = ggml_athena_activation_scale(amax);
        __m256i q0 = _mm256_setzero_si256();
        __m256i q1 = _mm256_setzero_si256();
        if (scale > 0.0f) {
            q0 = athena_round32(x,      _mm256_set1_ps(scale));
            q1 = athena_round32(x + 32, _mm256_set1_ps(scale));
        }
        _mm256_storeu_si256((__m256i *) y[i].qs,        q0);
        _mm256_storeu_si256((__m256i *) (y[i].qs + 32), q1);
        const __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(ones, q0), _mm256_maddubs_epi16(ones, q1));
        y[i].d      = amax/127.0f;
        y[i].offset = -ATHENA_ZERO*athena_sum8_epi32(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
    }
}

#endif
