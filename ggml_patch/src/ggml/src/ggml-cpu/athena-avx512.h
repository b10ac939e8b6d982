// Decoders of A2, A3 and A4 rows for AVX-512 VBMI, in vectors of 32 lanes as in athena-avx2.h.
//
// A byte permutation of 32 entries reads the low five bits of an index and ignores the others. So the 4-bit windows need
// no masks, and since they may lie at different places in those five bits (the tables are rearranged to match), most of
// them need no shift either.

#pragma once

#include "athena-avx2.h"

#if defined(ATHENA_HAVE_AVX2) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512VBMI__)
#define ATHENA_HAVE_AVX512

// A vector whose byte i is f(i).
#define ATHENA_BYTES4(f, i)  (char) f(i), (char) f((i) + 1), (char) f((i) + 2), (char) f((i) + 3)
#define ATHENA_BYTES16(f, i) ATHENA_BYTES4(f, i), ATHENA_BYTES4(f, (i) + 4), ATHENA_BYTES4(f, (i) + 8), ATHENA_BYTES4(f, (i) + 12)
#define ATHENA_BYTES32(f)    _mm256_setr_epi8(ATHENA_BYTES16(f, 0), ATHENA_BYTES16(f, 16))

// Window layouts: which window an index of five bits stands for.
#define ATHENA_LAYOUT_A(i) ((i) & 15)                            // the window in the low four bits
#define ATHENA_LAYOUT_B(i) ((i) >> 1)                            // one bit higher
#define ATHENA_LAYOUT_C(i) (((i) & 3) << 2 | (((i) >> 2) & 3))   // its halves exchanged
#define ATHENA_LAYOUT_D(i) (((i) & 3) << 2 | (i) >> 3)           // its upper half in bits 0 and 1, the lower in 3 and 4

// Both tables of a type, for one layout.
typedef struct {
    __m256i t1, t2;
} athena_pair;

static inline athena_pair athena_rearrange(const athena_tables * tables, __m256i windows) {
    athena_pair p;
    p.t1 = _mm256_permutexvar_epi8(windows, athena_load_table(tables->t1));
    p.t2 = _mm256_permutexvar_epi8(windows, athena_load_table(tables->t2));
    return p;
}

// A mask that GCC keeps in a register: as a constant it would be made anew for every row.
static inline __m256i athena_mask(int byte) {
    __m256i mask = _mm256_set1_epi8((char) byte);
    ATHENA_PIN_VECTOR(mask);
    return mask;
}

// Bits of a where the mask is set, bits of b elsewhere.
static inline __m256i athena_select(__m256i mask, __m256i a, __m256i b) {
    return _mm256_ternarylogic_epi32(mask, a, b, 0xca);
}

// The sums of one step; delayed: the second table's entries of an earlier window. Sets next to those of this one.
static inline __m256i athena_step(const athena_pair * p, __m256i window, __m256i delayed, __m256i * next) {
    *next = _mm256_permutexvar_epi8(window, p->t2);
    return _mm256_add_epi8(_mm256_permutexvar_epi8(window, p->t1), delayed);
}

// A2. A byte and its shifts by 2 and 4 hold three windows; the halves of the first one are in two bytes.
static ATHENA_INLINE void athena_row_a2_avx512(int columns, const uint8_t * x, athena_carry * carry, athena_sink * sink) {
    const athena_pair plain     = athena_rearrange(&athena_tables_a2, ATHENA_BYTES32(ATHENA_LAYOUT_A));
    const athena_pair exchanged = athena_rearrange(&athena_tables_a2, ATHENA_BYTES32(ATHENA_LAYOUT_C));
    const __m256i before = athena_mask(12);
    __m256i last = carry->v[0]; // the last symbol in bits 2 and 3
    __m256i e0   = carry->v[1]; // for the next step and the one after it
    __m256i e1   = carry->v[2];
    for (int i = 0; i < columns/ATHENA_SUPER; i++, x += sizeof(block_a2)) {
        const block_a2 * b = (const block_a2 *) x;
        athena_prefetch(x, sizeof(*b));
        for (int v = 0; v < 2; v++) {
            const __m256i a  = athena_load(b->pairs[v]);
            const __m256i a4 = _mm256_srli_epi16(a, 4);
            const __m256i u0 = athena_step(&exchanged, athena_select(before, last, a), e0, &e0);
            const __m256i u1 = athena_step(&plain, a, e1, &e1);
            const __m256i u2 = athena_step(&plain, _mm256_srli_epi16(a, 2), e0, &e0);
            const __m256i u3 = athena_step(&plain, a4, e1, &e1);
            athena_group(sink, 0, u0, u1, b->scales[2*v]);
            athena_group(sink, 1, u2, u3, b->scales[2*v + 1]);
            athena_advance(sink, 2);
            last = a4;
        }
    }
    carry->v[0] = last; // a tail ends its row: nothing is carried from there
    carry->v[1] = e0;
    carry->v[2] = e1;
    for (int i = 0; i < columns % ATHENA_SUPER/ATHENA_GROUP; i++, x += sizeof(block_a2_tail)) {
        const block_a2_tail * b = (const block_a2_tail *) x;
        const __m256i a  = athena_tail_pairs(b->pairs);
        const __m256i u0 = athena_step(&exchanged, athena_select(before, last, a), e0, &e0);
        const __m256i u1 = athena_step(&plain, a, e1, &e1);
        athena_group(sink, 0, u0, u1, b->scale);
        athena_advance(sink, 1);
        last = a;
    }
}

// A3. The upper half of a window comes from the bytes of the upper bits, the lower one from those of the lowest bits.
static ATHENA_INLINE void athena_row_a3_avx512(int columns, const uint8_t * x, athena_carry * carry, athena_sink * sink) {
    const athena_pair pa = athena_rearrange(&athena_tables_a3, ATHENA_BYTES32(ATHENA_LAYOUT_A));
    const athena_pair pb = athena_rearrange(&athena_tables_a3, ATHENA_BYTES32(ATHENA_LAYOUT_B));
    const athena_pair pc = athena_rearrange(&athena_tables_a3, ATHENA_BYTES32(ATHENA_LAYOUT_C));
    const athena_pair pd = athena_rearrange(&athena_tables_a3, ATHENA_BYTES32(ATHENA_LAYOUT_D));
    const __m256i upper_a  = athena_mask(0x0c); // where the upper half of a window lies, by layout
    const __m256i upper_b  = athena_mask(0x18);
    const __m256i upper_cd = athena_mask(0x03);
    const __m256i before   = athena_mask(0x08); // where layout D has the bit of the symbol before
    __m256i last = carry->v[0]; // the lowest bit of the last symbol in bit 3
    __m256i e    = carry->v[1]; // for the next step
    for (int i = 0; i < columns/ATHENA_SUPER; i++, x += sizeof(block_a3)) {
        const block_a3 * b = (const block_a3 *) x;
        athena_prefetch(x, sizeof(*b));
        const __m256i a    = athena_load(b->high[0]);
        const __m256i c    = athena_load(b->high[1]);
        const __m256i low  = athena_load(b->low);
        const __m256i low4 = _mm256_srli_epi16(low, 4);
        const __m256i bits = athena_select(before, last, _mm256_slli_epi16(low, 4));
        const __m256i u0 = athena_step(&pd, athena_select(upper_cd, a, bits), e, &e);
        const __m256i u1 = athena_step(&pa, athena_select(upper_a,  a, low),  e, &e);
        const __m256i u2 = athena_step(&pb, athena_select(upper_b,  _mm256_srli_epi16(a, 1), low), e, &e);
        const __m256i u3 = athena_step(&pc, athena_select(upper_cd, _mm256_srli_epi16(a, 6), low), e, &e);
        const __m256i u4 = athena_step(&pd, athena_select(upper_cd, c, low),  e, &e);
        const __m256i u5 = athena_step(&pa, athena_select(upper_a,  c, low4), e, &e);
        const __m256i u6 = athena_step(&pb, athena_select(upper_b,  _mm256_srli_epi16(c, 1), low4), e, &e);
        const __m256i u7 = athena_step(&pc, athena_select(upper_cd, _mm256_srli_epi16(c, 6), low4), e, &e);
        athena_group(sink, 0, u0, u1, b->scales[0]);
        athena_group(sink, 1, u2, u3, b->scales[1]);
        athena_group(sink, 2, u4, u5, b->scales[2]);
        athena_group(sink, 3, u6, u7, b->scales[3]);
        athena_advance(sink, 4);
        last = low4;
    }
    carry->v[0] = last;
    carry->v[1] = e;
    for (int i = 0; i < columns % ATHENA_SUPER/ATHENA_GROUP; i++, x += sizeof(block_a3_tail)) {
        const block_a3_tail * b = (const block_a3_tail *) x;
        const __m256i a    = athena_tail_pairs(b->high);
        const __m256i low  = athena_tail_bits(b->low);
        const __m256i bits = athena_select(before, last, _mm256_slli_epi16(low, 4));
        const __m256i u0 = athena_step(&pd, athena_select(upper_cd, a, bits), e, &e);
        const __m256i u1 = athena_step(&pa, athena_select(upper_a,  a, low),  e, &e);
        athena_group(sink, 0, u0, u1, b->scale);
        athena_advance(sink, 1);
        last = _mm256_slli_epi16(low, 2);
    }
}

// A4. Advances e, the second table's entries for the next step.
static ATHENA_INLINE void athena_nibbles_avx512(athena_sink * sink, int g, const uint8_t nibbles[32], uint8_t code, const athena_pair * p, __m256i * e) {
    const __m256i v  = athena_load(nibbles);
    const __m256i u0 = athena_step(p, v, *e, e);
    const __m256i u1 = athena_step(p, _mm256_srli_epi16(v, 4), *e, e);
    athena_group(sink, g, u0, u1, code);
}

static ATHENA_INLINE void athena_row_a4_avx512(int columns, const uint8_t * x, athena_carry * carry, athena_sink * sink) {
    const athena_pair p = athena_rearrange(&athena_tables_a4, ATHENA_BYTES32(ATHENA_LAYOUT_A));
    __m256i e = carry->v[1];
    for (int i = 0; i < columns/ATHENA_SUPER; i++, x += sizeof(block_a4)) {
        const block_a4 * b = (const block_a4 *) x;
        athena_prefetch(x, sizeof(*b));
        athena_nibbles_avx512(sink, 0, b->nibbles[0], b->scales[0], &p, &e);
        athena_nibbles_avx512(sink, 1, b->nibbles[1], b->scales[1], &p, &e);
        athena_nibbles_avx512(sink, 2, b->nibbles[2], b->scales[2], &p, &e);
        athena_nibbles_avx512(sink, 3, b->nibbles[3], b->scales[3], &p, &e);
        athena_advance(sink, 4);
    }
    carry->v[1] = e;
    for (int i = 0; i < columns % ATHENA_SUPER/ATHENA_GROUP; i++, x += sizeof(block_a4_tail)) {
        const block_a4_tail * b = (const block_a4_tail *) x;
        athena_nibbles_avx512(sink, 0, b->nibbles, b->scale, &p, &e);
        athena_advance(sink, 1);
    }
}

// What is carried into the beginning of a row: the last symbols are 0, the delayed entries those of window 0.
static ATHENA_INLINE athena_carry athena_row_start_avx512(const athena_tables * tables) {
    const __m256i e = _mm256_set1_epi8((char) tables->t2[0]);
    const athena_carry carry = { { _mm256_setzero_si256(), e, e } };
    return carry;
}

#endif

// The decoder of a type for this build, and what it starts a row with.
#if defined(ATHENA_HAVE_AVX512)
#define ATHENA_ROW(type)       athena_row_##type##_avx512
#define ATHENA_ROW_START(type) athena_row_start_avx512(&athena_tables_##type)
#else
#define ATHENA_ROW(type)       athena_row_##type##_avx2
#define ATHENA_ROW_START(type) athena_row_start_avx2()
#endif
