/* Products with a weight in 8 or 4 bits. Q quads of inputs, G groups of them; see common.h.

   The processor multiplies a byte without sign by one with: the weight stands there moved into
   0..255 or 0..15, x as two bytes with signs, and how far the weight was moved is taken away times
   the sum of x. Sums within a group are of whole numbers: exact, in whatever order. */

#include "common.h"

#define MOST 3      /* rows whose sums fill the registers */
#define LARGEST 32639 /* 127 * 256 + 127: of two bytes with signs */

typedef struct {
    const words *weight;   /* 8 bits: [B, Q, WIDE], 4 bits: [B, Q / 2, WIDE]; 4 inputs of each output,
                              and 4 more in the upper halves */
    const uint16_t *scale; /* [B, G, WIDE, LANES] */
    const uint16_t *x;     /* [R, 4 Q] */
    uint32_t *low, *high;  /* [R, Q]: x = unit (256 high + low), 4 bytes of each */
    int32_t *sums;         /* [R, G, 2]: of low and of high */
    float *unit;           /* [R] */
    const uint16_t *bias;  /* [O] or null */
    uint16_t *out;         /* [R, O] */
    int64_t next, blocks, quads, group, outputs, rows; /* group: its quads */
} FewBits;

/* Take x apart. */
void halve(FewBits *task)
{
    int64_t row, count = 4 * task->quads, group = 4 * task->group;
    while ((row = next_piece(&task->next)) < task->rows) {
        const uint16_t *x = task->x + row * count;
        int8_t *low = (int8_t *)(task->low + row * task->quads);
        int8_t *high = (int8_t *)(task->high + row * task->quads);
        int32_t *sums = task->sums + row * (count / group) * 2;
        uint16_t largest = 0; /* numbers without their signs are ordered as their bits are */
        for (int64_t i = 0; i < count; i++)
            largest = (x[i] & 0x7FFF) > largest ? x[i] & 0x7FFF : largest;
        float most = wide(largest), times = most > 0 ? LARGEST / most : 0;
        task->unit[row] = most / LARGEST;
        for (int64_t first = 0; first < count; first += group, sums += 2) {
            int32_t of_low = 0, of_high = 0;
            for (int64_t i = first; i < first + group; i++) {
                int32_t whole = (int32_t)(wide(x[i]) * times + (LARGEST + 0.5f)) - LARGEST;
                low[i] = (int8_t)whole;
                high[i] = (int8_t)((whole - low[i]) >> 8);
                of_low += low[i];
                of_high += high[i];
            }
            sums[0] = of_low;
            sums[1] = of_high;
        }
    }
}

#ifdef __AVX512VNNI__
#include <immintrin.h>

/* Add to each number the 4 products of its bytes. gcc 12 moves the sums about if it may choose. */
static inline __attribute__((always_inline)) __m512i plus_products(
    __m512i sums, __m512i weights, __m512i x)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(x));
    return sums;
}

/* The products of one group of inputs, scaled, added to the sums of a block for some rows. */
static inline __attribute__((always_inline)) void add_group(
    const FewBits *task, int64_t block, int64_t row, int64_t group, floats (*total)[WIDE],
    const int rows, const int bits)
{
    const int quads = 8 / bits; /* in a word */
    const int32_t moved = bits == 8 ? 128 : 8;
    const __m512i nibbles = _mm512_set1_epi8(15);
    int64_t groups = task->quads / task->group, first = group * task->group;
    const __m512i *weight =
        (const __m512i *)task->weight + (block * task->quads + first) / quads * WIDE;
    __m512i lows[MOST][WIDE], highs[MOST][WIDE];
    for (int r = 0; r < rows; r++) {
        const int32_t *sums = task->sums + ((row + r) * groups + group) * 2;
        for (int v = 0; v < WIDE; v++) {
            lows[r][v] = _mm512_set1_epi32(-moved * sums[0]);
            highs[r][v] = _mm512_set1_epi32(-moved * sums[1]);
        }
    }
    for (int64_t quad = first; quad < first + task->group; quad += quads, weight += WIDE)
#pragma GCC unroll 2
        for (int part = 0; part < quads; part++)
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; v++) {
                __m512i four = _mm512_loadu_si512(weight + v);
                if (bits == 4)
                    four = _mm512_and_si512(part ? _mm512_srli_epi32(four, 4) : four, nibbles);
#pragma GCC unroll 3
                for (int r = 0; r < rows; r++) {
                    int64_t place = (row + r) * task->quads + quad + part;
                    __m512i low = _mm512_set1_epi32((int)task->low[place]);
                    __m512i high = _mm512_set1_epi32((int)task->high[place]);
                    lows[r][v] = plus_products(lows[r][v], four, low);
                    highs[r][v] = plus_products(highs[r][v], four, high);
                }
            }
    const uint16_t *scales = task->scale + (block * groups + group) * WIDE * LANES;
    for (int v = 0; v < WIDE; v++) {
        halves narrow;
        memcpy(&narrow, scales + v * LANES, sizeof narrow);
        floats scale = (floats)(__builtin_convertvector(narrow, words) << 16);
        for (int r = 0; r < rows; r++) {
            floats sum = __builtin_convertvector((integers)highs[r][v], floats) * 256.0f;
            sum += __builtin_convertvector((integers)lows[r][v], floats);
            total[r][v] += sum * scale;
        }
    }
}

static inline __attribute__((always_inline)) void block_by_rows(
    const FewBits *task, int64_t block, int64_t row, const int rows, const int bits)
{
    floats total[MOST][WIDE] = {0};
    for (int64_t group = 0; group < task->quads / task->group; group++)
        add_group(task, block, row, group, total, rows, bits);
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < WIDE; v++)
            total[r][v] *= task->unit[row + r];
        write_block(total[r], task->bias, task->out + (row + r) * task->outputs, block, task->outputs);
    }
}

static inline __attribute__((always_inline)) void products(FewBits *task, const int bits)
{
    int64_t block;
    while ((block = next_piece(&task->next)) < task->blocks)
        for (int64_t row = 0; row < task->rows; row += MOST)
            switch (task->rows - row) {
            case 1: block_by_rows(task, block, row, 1, bits); break;
            case 2: block_by_rows(task, block, row, 2, bits); break;
            default: block_by_rows(task, block, row, MOST, bits);
            }
}

void product8(FewBits *task) { products(task, 8); }
void product4(FewBits *task) { products(task, 4); }
#endif
