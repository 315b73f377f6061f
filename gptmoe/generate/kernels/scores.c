/* What routers decide by: products of float32 rows with few outputs. E outputs, D inputs; see
   common.h. */

#include "common.h"

#define ROWS 4 /* rows that share the reading of a weight */
#define SOME 4 /* outputs that share the reading of a row */

typedef struct {
    int64_t next;
    const float *weight; /* [E, D] */
    const float *x;      /* [R, D] */
    float *out;          /* [R, E] */
    int64_t rows, outputs, inputs;
} Scores;

/* A sum for each lane in order of the inputs, then over the lanes: alike for each row and output. */
static inline __attribute__((always_inline)) void some_scores(
    const Scores *task, int64_t row, const int rows, int64_t output, const int outputs)
{
    int64_t vectors = task->inputs / LANES;
    const floats *x = (const floats *)task->x + row * vectors;
    const floats *weight = (const floats *)task->weight + output * vectors;
    floats sum[ROWS][SOME] = {0};
    for (int64_t v = 0; v < vectors; v++)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int o = 0; o < outputs; o++)
                sum[r][o] = plus_product(
                    sum[r][o], x[r * vectors + v], weight[o * vectors + v]);
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++)
            task->out[(row + r) * task->outputs + output + o] = sum_of(sum[r][o]);
}

static inline __attribute__((always_inline)) void all_scores(
    const Scores *task, int64_t row, const int rows)
{
    int64_t output = 0;
    for (; output + SOME <= task->outputs; output += SOME)
        some_scores(task, row, rows, output, SOME);
    for (; output < task->outputs; output++)
        some_scores(task, row, rows, output, 1);
}

void scores(Scores *task)
{
    int64_t piece;
    while ((piece = next_piece(&task->next)) < (task->rows + ROWS - 1) / ROWS) {
        int64_t row = piece * ROWS;
        if (row + ROWS <= task->rows)
            all_scores(task, row, ROWS);
        else
            for (; row < task->rows; row++)
                all_scores(task, row, 1);
    }
}
