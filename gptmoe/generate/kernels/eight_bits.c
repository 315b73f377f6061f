/* Products with a weight in 8 bits. Q quads of inputs; see common.h. */

#include "common.h"

#define MOST 3 /* rows that share the reading of a block */

typedef struct {
    const integers *weight; /* [B, Q, WIDE]: 4 inputs of each output in 8 bits, for each quad of inputs */
    const float *scale;     /* [B, WIDE, LANES] */
    const int32_t *start;   /* [B, WIDE, LANES]: -128 times the sum of an output's weights */
    const uint16_t *x;      /* [R, 4 Q] */
    uint32_t *low, *high;   /* [R, Q]: x in 16 bits, 4 bytes each of it */
    float *unit;            /* [R]: what 1 of these 16 bits stands for */
    const uint16_t *bias;   /* [O] or null */
    uint16_t *out;          /* [R, O] */
    int64_t next, blocks, quads, outputs, rows;
} Product8;

/* x = unit * (256 high + low - 2^15), the largest number of a row near the end of the range. */
void halve8(Product8 *task)
{
    int64_t row, count = 4 * task->quads;
    while ((row = next_piece(&task->next)) < task->rows) {
        const uint16_t *x = task->x + row * count;
        uint8_t *low = (uint8_t *)(task->low + row * task->quads);
        uint8_t *high = (uint8_t *)(task->high + row * task->quads);
        uint16_t largest = 0; /* numbers without their signs are ordered as their bits are */
        for (int64_t i = 0; i < count; i++)
            largest = (x[i] & 0x7FFF) > largest ? x[i] & 0x7FFF : largest;
        float most = wide(largest), times = most > 0 ? 32767.0f / most : 0;
        task->unit[row] = most / 32767.0f;
        for (int64_t i = 0; i < count; i++) {
            uint32_t whole = (uint32_t)(wide(x[i]) * times + 32768.5f);
            low[i] = (uint8_t)whole;
            high[i] = (uint8_t)(whole >> 8);
        }
    }
}

#ifdef __AVX512VNNI__
#include <immintrin.h>

/* Add to each number the 4 products of its bytes. gcc 12 moves the sums about if it may choose. */
static inline __attribute__((always_inline)) __m512i plus_products(
    __m512i sums, __m512i x, __m512i weights)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(weights));
    return sums;
}

/* Sums of whole numbers: exact, in whatever order. */
static inline __attribute__((always_inline)) void block8_by_rows(
    const Product8 *task, int64_t block, int64_t row, const int rows)
{
    const __m512i *weight = (const __m512i *)task->weight + block * task->quads * WIDE;
    const uint32_t *low = task->low + row * task->quads, *high = task->high + row * task->quads;
    __m512i lows[MOST][WIDE], highs[MOST][WIDE];
    memset(lows, 0, sizeof lows);
    for (int r = 0; r < rows; r++)
        memcpy(highs[r], task->start + block * WIDE * LANES, sizeof highs[r]);
    for (int64_t quad = 0; quad < task->quads; quad++)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; v++) {
            __m512i four = _mm512_loadu_si512(weight + quad * WIDE + v);
#pragma GCC unroll 3
            for (int r = 0; r < rows; r++) {
                __m512i l = _mm512_set1_epi32((int)low[r * task->quads + quad]);
                __m512i h = _mm512_set1_epi32((int)high[r * task->quads + quad]);
                lows[r][v] = plus_products(lows[r][v], l, four);
                highs[r][v] = plus_products(highs[r][v], h, four);
            }
        }
    const floats *scale = (const floats *)task->scale + block * WIDE;
    for (int r = 0; r < rows; r++) {
        floats sum[WIDE];
        for (int v = 0; v < WIDE; v++) {
            sum[v] = __builtin_convertvector((integers)highs[r][v], floats) * 256.0f;
            sum[v] += __builtin_convertvector((integers)lows[r][v], floats);
            sum[v] *= scale[v] * task->unit[row + r];
        }
        write_block(sum, task->bias, task->out + (row + r) * task->outputs, block, task->outputs);
    }
}

void product8(Product8 *task)
{
    int64_t block;
    while ((block = next_piece(&task->next)) < task->blocks)
        for (int64_t row = 0; row < task->rows; row += MOST)
            switch (task->rows - row) {
            case 1: block8_by_rows(task, block, row, 1); break;
            case 2: block8_by_rows(task, block, row, 2); break;
            default: block8_by_rows(task, block, row, MOST);
            }
}
#endif
