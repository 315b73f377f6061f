/* The product of a few rows with a packed weight. P pairs of inputs; see common.h. */

#include "common.h"

#define MOST 4 /* rows that share the reading of a block */

typedef struct {
    Rows rows;
    const words *weight;  /* [B, P, WIDE]: for each pair of inputs, two numbers of each output, 64
                             outputs together: as oneDNN packs */
    const uint32_t *x;    /* [R, P] */
    const uint16_t *bias; /* [O] or null */
    uint16_t *out;        /* [R, O] */
    int64_t blocks, pairs, chunk, outputs;
} Product;

#ifdef __AVX512BF16__
/* The order of additions is oneDNN's: the instruction adds the odd product of a pair, then the even
   one; every `chunk` of pairs has a sum of its own; the bias comes last. */
static inline __attribute__((always_inline)) void block_by_rows(
    const Product *task, int64_t block, int64_t row, const int rows)
{
    const words *weight = task->weight + block * task->pairs * WIDE;
    const uint32_t *x = task->x + row * task->pairs;
    floats total[MOST][WIDE] = {0};
    for (int64_t first = 0; first < task->pairs; first += task->chunk) {
        int64_t end = first + task->chunk < task->pairs ? first + task->chunk : task->pairs;
        __m512 sum[MOST][WIDE];
        memset(sum, 0, sizeof sum);
        for (int64_t pair = first; pair < end; pair++)
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; v++) {
                __m512bh two = (__m512bh)weight[pair * WIDE + v];
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    __m512i same = _mm512_set1_epi32((int)x[r * task->pairs + pair]);
                    sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)same, two);
                }
            }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < WIDE; v++)
                total[r][v] += (floats)sum[r][v];
    }
    for (int r = 0; r < rows; r++)
        write_block(total[r], task->bias, task->out + (row + r) * task->outputs, block, task->outputs);
}

void product(Product *task)
{
    int64_t block;
    while ((block = next_piece(&task->rows.next)) < task->blocks)
        for (int64_t row = task->rows.first; row < task->rows.end; row += MOST)
            switch (task->rows.end - row) {
            case 1: block_by_rows(task, block, row, 1); break;
            case 2: block_by_rows(task, block, row, 2); break;
            case 3: block_by_rows(task, block, row, 3); break;
            default: block_by_rows(task, block, row, MOST);
            }
}
#endif
