// Dot products of A2, A3 and A4 rows for AVX-512 VBMI, in vectors of 32 lanes as in athena-avx2.h.
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
static inline float athena_dot_a2_avx512(int n, const uint8_t * x, const block_q8_a64 * y) {
    const athena_pair plain     = athena_rearrange(&athena_tables_a2, ATHENA_BYTES32(ATHENA_LAYOUT_A));
    const athena_pair exchanged = athena_rearrange(&athena_tables_a2, ATHENA_BYTES32(ATHENA_LAYOUT_C));
    const __m256i before = _mm256_set1_epi8(12);
    __m256i last = _mm256_setzero_si256(); // the last symbol in bits 2 and 3
    __m256i e0 = _mm256_set1_epi8((char) athena_tables_a2.t2[0]); // for the next step and the one after it
    __m256i e1 = e0;
    athena_acc acc = { _mm256_setzero_ps(), _mm256_setzero_ps() };
    int i = 0;
    for (; i + ATHENA_SUPER <= n; i += ATHENA_SUPER, x += sizeof(block_a2), y += 4) {
        const block_a2 * b = (const block_a2 *) x;
        athena_prefetch(x, sizeof(*b));
        for (int v = 0; v < 2; v++) {
            const __m256i a  = athena_load(b->pairs[v]);
            const __m256i a4 = _mm256_srli_epi16(a, 4);
            const __m256i u0 = athena_step(&exchanged, athena_select(before, last, a), e0, &e0);
            const __m256i u1 = athena_step(&plain, a, e1, &e1);
            const __m256i u2 = athena_step(&plain, _mm256_srli_epi16(a, 2), e0, &e0);
            const __m256i u3 = athena_step(&plain, a4, e1, &e1);
            acc.even = athena_add_group(acc.even, athena_dot_group(u0, u1, &y[2*v]), b->scales[2*v], &y[2*v]);
            acc.odd  = athena_add_group(acc.odd, athena_dot_group(u2, u3, &y[2*v + 1]), b->scales[2*v + 1], &y[2*v + 1]);
            last = a4;
        }
    }
    for (; i < n; i += ATHENA_GROUP, x += sizeof(block_a2_tail), y++) {
        const block_a2_tail * b = (const block_a2_tail *) x;
        const __m256i a  = athena_tail_pairs(b->pairs);
        const __m256i u0 = athena_step(&exchanged, athena_select(before, last, a), e0, &e0);
        const __m256i u1 = athena_step(&plain, a, e1, &e1);
        acc.even = athena_add_group(acc.even, athena_dot_group(u0, u1, y), b->scale, y);
        last = a;
    }
    return athena_total(acc);
}

// A3. The upper half of a window comes from the bytes of the upper bits, the lower one from those of the lowest bits.
static inline float athena_dot_a3_avx512(int n, const uint8_t * x, const block_q8_a64 * y) {
    const athena_pair pa = athena_rearrange(&athena_tables_a3, ATHENA_BYTES32(ATHENA_LAYOUT_A));
    const athena_pair pb = athena_rearrange(&athena_tables_a3, ATHENA_BYTES32(ATHENA_LAYOUT_B));
    const athena_pair pc = athena_rearrange(&athena_tables_a3, ATHENA_BYTES32(ATHENA_LAYOUT_C));
    const athena_pair pd = athena_rearrange(&athena_tables_a3, ATHENA_BYTES32(ATHENA_LAYOUT_D));
    const __m256i upper_a  = _mm256_set1_epi8(0x0c); // where the upper half of a window lies, by layout
    const __m256i upper_b  = _mm256_set1_epi8(0x18);
    const __m256i upper_cd = _mm256_set1_epi8(0x03);
    const __m256i before   = _mm256_set1_epi8(0x08); // where layout D has the bit of the symbol before
    __m256i last = _mm256_setzero_si256(); // the lowest bit of the last symbol in bit 3
    __m256i e = _mm256_set1_epi8((char) athena_tables_a3.t2[0]); // for the next step
    athena_acc acc = { _mm256_setzero_ps(), _mm256_setzero_ps() };
    int i = 0;
    for (; i + ATHENA_SUPER <= n; i += ATHENA_SUPER, x += sizeof(block_a3), y += 4) {
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
        acc.even = athena_add_group(acc.even, athena_dot_group(u0, u1, &y[0]), b->scales[0], &y[0]);
        acc.odd  = athena_add_group(acc.odd, athena_dot_group(u2, u3, &y[1]), b->scales[1], &y[1]);
        acc.even = athena_add_group(acc.even, athena_dot_group(u4, u5, &y[2]), b->scales[2], &y[2]);
        acc.odd  = athena_add_group(acc.odd, athena_dot_group(u6, u7, &y[3]), b->scales[3], &y[3]);
        last = low4;
    }
    for (; i < n; i += ATHENA_GROUP, x += sizeof(block_a3_tail), y++) {
        const block_a3_tail * b = (const block_a3_tail *) x;
        const __m256i a    = athena_tail_pairs(b->high);
        const __m256i low  = athena_tail_bits(b->low);
        const __m256i bits = athena_select(before, last, _mm256_slli_epi16(low, 4));
        const __m256i u0 = athena_step(&pd, athena_select(upper_cd, a, bits), e, &e);
        const __m256i u1 = athena_step(&pa, athena_select(upper_a,  a, low),  e, &e);
        acc.even = athena_add_group(acc.even, athena_dot_group(u0, u1, y), b->scale, y);
        last = _mm256_slli_epi16(low, 2);
    }
    return athena_total(acc);
}

// A4. Advances e, the second table's entries for the next step.
static inline __m256i athena_dot_nibbles_avx512(const uint8_t nibbles[32], const athena_pair * p, __m256i * e, const block_q8_a64 * y) {
    const __m256i v  = athena_load(nibbles);
    const __m256i u0 = athena_step(p, v, *e, e);
    const __m256i u1 = athena_step(p, _mm256_srli_epi16(v, 4), *e, e);
    return athena_dot_group(u0, u1, y);
}

static inline float athena_dot_a4_avx512(int n, const uint8_t * x, const block_q8_a64 * y) {
    const athena_pair p = athena_rearrange(&athena_tables_a4, ATHENA_BYTES32(ATHENA_LAYOUT_A));
    __m256i e = _mm256_set1_epi8((char) athena_tables_a4.t2[0]);
    athena_acc acc = { _mm256_setzero_ps(), _mm256_setzero_ps() };
    int i = 0;
    for (; i + ATHENA_SUPER <= n; i += ATHENA_SUPER, x += sizeof(block_a4), y += 4) {
        const block_a4 * b = (const block_a4 *) x;
        athena_prefetch(x, sizeof(*b));
        for (int g = 0; g < 4; g += 2) {
            const __m256i d0 = athena_dot_nibbles_avx512(b->nibbles[g],     &p, &e, &y[g]);
            const __m256i d1 = athena_dot_nibbles_avx512(b->nibbles[g + 1], &p, &e, &y[g + 1]);
            acc.even = athena_add_group(acc.even, d0, b->scales[g],     &y[g]);
            acc.odd  = athena_add_group(acc.odd,  d1, b->scales[g + 1], &y[g + 1]);
        }
    }
    for (; i < n; i += ATHENA_GROUP, x += sizeof(block_a4_tail), y++) {
        const block_a4_tail * b = (const block_a4_tail *) x;
        acc.even = athena_add_group(acc.even, athena_dot_nibbles_avx512(b->nibbles, &p, &e, y), b->scale, y);
    }
    return athena_total(acc);
}

#endif
