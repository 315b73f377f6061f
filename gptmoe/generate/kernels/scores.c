/* What routers decide by: products of rows with few outputs, in float32. E outputs, D inputs; see
   common.h. */

#include "common.h"

#define ROWS 4 /* rows that share the reading of a weight */
#define SOME 4 /* outputs that share the reading of a row */

typedef struct {
    int64_t next;
    const float *weight;  /* [E, D] */
    const float *x;       /* [R, D], or null: */
    const uint16_t *half; /* the same in bfloat16 */
    float *out;           /* [R, E] */
    int64_t rows, outputs, inputs;
} Scores;

/* A sum for each lane in order of the inputs, then over the lanes: alike for each row and output. */
static inline __attribute__((always_inline)) void some_scores(
    const Scores *task, int64_t row, const int rows, int64_t output, const int outputs,
    const int is_half)
{
    int64_t inputs = task->inputs;
    const float *weight = task->weight + output * inputs;
    floats sum[ROWS][SOME] = {0};
    for (int64_t i = 0; i < inputs; i += LANES)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            int64_t place = (row + r) * inputs + i;
            floats x = is_half ? read(task->half + place) : *(const floats *)(task->x + place);
#pragma GCC unroll 4
            for (int o = 0; o < outputs; o++)
                sum[r][o] = plus_product(
                    sum[r][o], x, *(const floats *)(weight + o * inputs + i));
        }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++)
            task->out[(row + r) * task->outputs + output + o] = sum_of(sum[r][o]);
}

static inline __attribute__((always_inline)) void all_of_rows(
    const Scores *task, int64_t row, const int rows, int64_t output, const int is_half)
{
    if (output + SOME <= task->outputs)
        some_scores(task, row, rows, output, SOME, is_half);
    else
        for (; output < task->outputs; output++)
            some_scores(task, row, rows, output, 1, is_half);
}

static inline __attribute__((always_inline)) void piece_of(
    const Scores *task, int64_t row, int64_t output, const int is_half)
{
    if (row + ROWS <= task->rows)
        all_of_rows(task, row, ROWS, output, is_half);
    else
        for (; row < task->rows; row++)
            all_of_rows(task, row, 1, output, is_half);
}

/* Pieces of ROWS and SOME: one row asks all threads, too. */
void scores(Scores *task)
{
    int64_t piece, across = (task->outputs + SOME - 1) / SOME;
    int64_t pieces = (task->rows + ROWS - 1) / ROWS * across;
    while ((piece = next_piece(&task->next)) < pieces) {
        int64_t row = piece / across * ROWS, output = piece % across * SOME;
        if (task->half)
            piece_of(task, row, output, 1);
        else
            piece_of(task, row, output, 0);
    }
}
