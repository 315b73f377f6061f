/* What lies between the products of a layer: sums, layer normalisation, GELU. D numbers of a row;
   see common.h. */

#include "common.h"

#define PIECE 512 /* numbers that a thread takes at once */

typedef struct {
    int64_t next;
    const uint16_t *x, *added; /* [R, D]; `added` may be null */
    uint16_t *sum;             /* [R, D], of the two, or null */
    const float *weight, *bias; /* [D] */
    uint16_t *out;             /* [R, D] or null */
    int64_t rows, width;
} Norm;

typedef struct {
    int64_t next;
    void *x; /* numbers of 16 bits, or of 32 */
    int64_t count;
} Gelu;

/* (x - mean) / sqrt(variance + 1e-5) weight + bias. Each lane has sums in the order of the row. */
static void norm_row(const Norm *task, const uint16_t *x, uint16_t *out)
{
    floats sums = {}, squares = {};
    for (int64_t d = 0; d < task->width; d += LANES)
        sums += read(x + d);
    float mean = sum_of(sums) / (float)task->width;
    for (int64_t d = 0; d < task->width; d += LANES) {
        floats apart = read(x + d) - mean;
        squares = plus_product(squares, apart, apart);
    }
    float scale = 1.0f / sqrtf(sum_of(squares) / (float)task->width + 1e-5f);
    for (int64_t d = 0; d < task->width; d += LANES) {
        const floats *weight = (const floats *)(task->weight + d);
        const floats *bias = (const floats *)(task->bias + d);
        write(out + d, plus_product(*bias, (read(x + d) - mean) * scale, *weight));
    }
}

/* The sum of two rows, its norm, or both. */
void norm(Norm *task)
{
    int64_t row;
    while ((row = next_piece(&task->next)) < task->rows) {
        int64_t first = row * task->width;
        const uint16_t *x = task->x + first;
        if (task->added) {
            for (int64_t d = 0; d < task->width; d += LANES)
                write(task->sum + first + d, read(x + d) + read(task->added + first + d));
            x = task->sum + first;
        }
        if (task->out)
            norm_row(task, x, task->out + first);
    }
}

/* x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): the tanh form, as in GPT-2. */
static inline floats gelu_of(floats x)
{
    floats u2 = x * (1.5957691216057308f + 0.07135481282553f * (x * x));
    words negative = (words)(u2 < 0.0f);
    floats small = exponential((floats)((words)u2 | 0x80000000u)); /* of -|2u| */
    floats top = (floats)((negative & (words)small) | (~negative & (words)((floats){} + 1.0f)));
    return x * (top / (1.0f + small));
}

/* In place. */
void gelu(Gelu *task)
{
    uint16_t *x = task->x;
    int64_t piece;
    while ((piece = next_piece(&task->next)) * PIECE < task->count) {
        int64_t first = piece * PIECE, end = first + PIECE;
        end = end < task->count ? end : task->count;
        for (; first < end; first += LANES) {
            halves some = {0};
            int64_t bytes = 2 * (end - first < LANES ? end - first : LANES);
            memcpy(&some, x + first, bytes);
            some = __builtin_convertvector(rounded(gelu_of(wide_of(some))), halves);
            memcpy(x + first, &some, bytes);
        }
    }
}

/* The same in float32. */
void wide_gelu(Gelu *task)
{
    float *x = task->x;
    int64_t piece;
    while ((piece = next_piece(&task->next)) * PIECE < task->count) {
        int64_t first = piece * PIECE, end = first + PIECE;
        end = end < task->count ? end : task->count;
        for (; first < end; first += LANES) {
            floats some = {0};
            int64_t bytes = 4 * (end - first < LANES ? end - first : LANES);
            memcpy(&some, x + first, bytes);
            some = gelu_of(some);
            memcpy(x + first, &some, bytes);
        }
    }
}
