/* The experts of a layer: which of them a row chooses, rows side by side by expert, their products,
   and the weighted sum of the answers. E experts, K choices of a row (1 or 2), D numbers of a row; a row
   has a copy for each choice, those of all first choices come first; see common.h. */

#include "common.h"

typedef struct {
    int64_t next;
    const float *logits; /* [R, E] */
    const float *bias;   /* [E]: sigmoid + bias decides, the sigmoid weighs, K = 1. Null: the softmax
                            does both */
    int64_t *expert;     /* [K, R]: the largest first; of equal ones the one with the lower number */
    float *weight;       /* [K, R]: for K > 1 they add up to 1 */
    int64_t rows, experts, choices;
} Choose;

typedef struct {
    int64_t next;
    void (*kernel)(void *task);
    char *tasks;           /* of products, one for each expert, */
    int64_t size;          /* of so many bytes */
    const int64_t *chosen; /* [1 + K R]: how many experts have rows, then these */
} Each;

typedef struct {
    int64_t next;
    const int64_t *expert; /* [K, R] */
    const uint16_t *x;     /* [R, D] */
    uint16_t *out;         /* [K R, D]: x of each copy, by expert */
    int64_t *place;        /* [K, R]: where there a copy is */
    int64_t *chosen;       /* as above */
    int64_t *ends;         /* [E]: of the rows so far; for nobody else */
    Each *up, *down;       /* whose tasks are told their rows */
    int64_t rows, experts, choices, width;
} Group;

typedef struct {
    int64_t next;
    const uint16_t *x;    /* [K R, D] */
    const int64_t *place; /* [K, R] */
    const float *weight;  /* [K, R] */
    uint16_t *out;        /* [R, D] */
    int64_t rows, choices, width;
} Weigh;

/* 1 / (1 + e^-x) */
static inline floats sigmoid(floats x)
{
    words negative = (words)(x < 0.0f);
    floats small = exponential((floats)((words)x | 0x80000000u)); /* of -|x| */
    floats top = (floats)((negative & (words)small) | (~negative & (words)((floats){} + 1.0f)));
    return top / (1.0f + small);
}

/* Those from `first` on; where there are none, what weighs nothing. */
static inline floats logits_of(const Choose *task, int64_t row, int64_t first)
{
    floats some = (floats){} - 1e30f;
    int64_t left = task->experts - first;
    memcpy(&some, task->logits + row * task->experts + first,
           sizeof(float) * (left < LANES ? left : LANES));
    return some;
}

/* The number of the largest, `without` one (-1: with all). Not a number is larger than any. */
static inline int64_t largest(const Choose *task, int64_t row, int64_t without)
{
    int64_t found = -1;
    float most = 0;
    for (int64_t first = 0; first < task->experts; first += LANES) {
        floats some = logits_of(task, row, first);
        if (task->bias)
            some = sigmoid(some);
        for (int64_t i = 0; i < LANES && first + i < task->experts; i++) {
            int64_t e = first + i;
            float score = task->bias ? some[i] + task->bias[e] : some[i];
            if (e != without && (found < 0 || score > most || score != score)) {
                found = e;
                most = score;
            }
        }
    }
    return found;
}

/* The softmax at the chosen experts; several share it. */
static inline void weigh_choices(const Choose *task, int64_t row)
{
    const float *logits = task->logits + row * task->experts;
    const int64_t *expert = task->expert + row;
    float *weight = task->weight + row, most = logits[*expert], total = 0;
    floats sums = {};
    for (int64_t first = 0; first < task->experts; first += LANES)
        sums += exponential(logits_of(task, row, first) - most);
    for (int64_t k = 0; k < task->choices; k++) {
        floats apart = (floats){} + (logits[expert[k * task->rows]] - most);
        total += weight[k * task->rows] = exponential(apart)[0] / sum_of(sums);
    }
    for (int64_t k = 0; k < task->choices && task->choices > 1; k++)
        weight[k * task->rows] /= total;
}

/* Each row by itself. */
void choose(Choose *task)
{
    int64_t row;
    while ((row = next_piece(&task->next)) < task->rows) {
        int64_t *expert = task->expert + row, last = -1;
        for (int64_t k = 0; k < task->choices; k++)
            expert[k * task->rows] = last = largest(task, row, last);
        if (task->bias)
            task->weight[row] = sigmoid((floats){} + task->logits[row * task->experts + *expert])[0];
        else
            weigh_choices(task, row);
    }
}

/* One thread's work: few rows. */
void group(Group *task)
{
    if (next_piece(&task->next))
        return;
    int64_t copies = task->rows * task->choices, end = 0, *found = task->chosen;
    memset(task->ends, 0, sizeof(int64_t) * task->experts);
    for (int64_t c = 0; c < copies; c++)
        task->ends[task->expert[c]]++;
    for (int64_t e = 0; e < task->experts; e++) {
        int64_t first = end;
        end += task->ends[e];
        task->ends[e] = first;
        if (end == first)
            continue;
        *++found = e;
        Rows rows = {0, first, end};
        memcpy(task->up->tasks + e * task->up->size, &rows, sizeof rows);
        memcpy(task->down->tasks + e * task->down->size, &rows, sizeof rows);
    }
    *task->chosen = found - task->chosen;
    for (int64_t c = 0; c < copies; c++) {
        int64_t place = task->place[c] = task->ends[task->expert[c]]++;
        memcpy(task->out + place * task->width, task->x + c % task->rows * task->width,
               sizeof(uint16_t) * task->width);
    }
}

/* The products of the experts that have rows. Threads go from one to the next without a meeting. */
void each(Each *task)
{
    for (int64_t c = 1; c <= *task->chosen; c++)
        task->kernel(task->tasks + task->chosen[c] * task->size);
}

/* Each answer is rounded, and each sum. */
void weigh(Weigh *task)
{
    int64_t row;
    while ((row = next_piece(&task->next)) < task->rows)
        for (int64_t d = 0; d < task->width; d += LANES) {
            floats sum = {};
            for (int64_t k = 0; k < task->choices; k++) {
                int64_t copy = k * task->rows + row;
                floats x = read(task->x + task->place[copy] * task->width + d);
                floats one = (floats)(rounded(x * task->weight[copy]) << 16);
                sum = (floats)(rounded(sum + one) << 16);
            }
            write(task->out + row * task->width + d, sum);
        }
}
