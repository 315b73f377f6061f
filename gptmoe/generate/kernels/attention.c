/* Attention of each row through the cache; see common.h. */

#include "common.h"

typedef struct {
    uint16_t *keys, *values; /* [layers, slots, H, size, head width] */
    int64_t first, size;     /* positions */
} Segment;

typedef struct {
    int64_t slot, position;
} Place;

typedef struct {
    int64_t next, threads, stored;
    const uint16_t *q, *keys, *values; /* of the rows; `stride` numbers from row to row */
    uint16_t *out;                     /* [R, H, width] */
    const Place *places;               /* [R] */
    const Segment *segments;
    float *scratch; /* for each thread `most_keys` numbers */
    int64_t layer, rows, heads, width, stride, num_segments, slots, most_keys;
} Attention;

/* Where the keys or values of a head of a slot begin. */
static inline uint16_t *head_of(
    const Attention *task, uint16_t *memory, const Segment *segment, int64_t slot, int64_t head)
{
    int64_t piece = (task->layer * task->slots + slot) * task->heads + head;
    return memory + piece * segment->size * task->width;
}

/* Put the new keys and values of the rows into the cache. */
void store(Attention *task)
{
    int64_t row, bytes = task->width * 2;
    while ((row = next_piece(&task->stored)) < task->rows) {
        Place place = task->places[row];
        for (int64_t s = 0; s < task->num_segments; s++) {
            const Segment *segment = task->segments + s;
            int64_t offset = place.position - segment->first;
            if (offset < 0 || offset >= segment->size)
                continue;
            for (int64_t head = 0; head < task->heads; head++) {
                int64_t from = row * task->stride + head * task->width;
                int64_t to = offset * task->width;
                memcpy(head_of(task, segment->keys, segment, place.slot, head) + to,
                       task->keys + from, bytes);
                memcpy(head_of(task, segment->values, segment, place.slot, head) + to,
                       task->values + from, bytes);
            }
        }
    }
}

/* softmax(q k^T / sqrt(width)) v over the keys up to the row's position, for one head. */
static void attend_row(const Attention *task, int64_t row, int64_t head, float *score)
{
    int64_t vectors = task->width / 2 / LANES, keys = task->places[row].position + 1;
    int64_t slot = task->places[row].slot;
    const words *q = (const words *)(task->q + row * task->stride + head * task->width);
    float scale = 1.0f / sqrtf((float)task->width), largest = -INFINITY, total = 0;
    for (int64_t s = 0; s < task->num_segments; s++) {
        const Segment *segment = task->segments + s;
        const words *key = (const words *)head_of(task, segment->keys, segment, slot, head);
        for (int64_t c = segment->first; c < keys && c < segment->first + segment->size; c++) {
            floats sum = {};
            for (int64_t v = 0; v < vectors; v++, key++) {
                sum = plus_product(sum, odd(q[v]), odd(*key));
                sum = plus_product(sum, even(q[v]), even(*key));
            }
            score[c] = sum_of(sum) * scale;
            largest = score[c] > largest ? score[c] : largest;
        }
    }
    for (int64_t c = keys; c % LANES; c++)
        score[c] = -INFINITY;
    floats sums = {};
    for (int64_t c = 0; c < keys; c += LANES) {
        floats *at = (floats *)(score + c);
        *at = exponential(*at - largest);
        sums += *at;
    }
    total = sum_of(sums);
    uint16_t *out = task->out + (row * task->heads + head) * task->width;
    for (int64_t v = 0; v < vectors; v++) {
        floats odds = {}, evens = {};
        for (int64_t s = 0; s < task->num_segments; s++) {
            const Segment *segment = task->segments + s;
            const words *value = (const words *)head_of(task, segment->values, segment, slot, head);
            value += v;
            for (int64_t c = segment->first; c < keys && c < segment->first + segment->size; c++) {
                floats weight = (floats){} + score[c];
                odds = plus_product(odds, weight, odd(*value));
                evens = plus_product(evens, weight, even(*value));
                value += vectors;
            }
        }
        *(words *)(out + v * 2 * LANES) = rounded(odds / total) << 16 | rounded(evens / total);
    }
}

void attend(Attention *task)
{
    int64_t piece, mine = next_piece(&task->threads);
    float *score = task->scratch + mine * task->most_keys;
    while ((piece = next_piece(&task->next)) < task->rows * task->heads)
        /* the rows of one head follow each other: they share its keys in the processor's caches */
        attend_row(task, piece % task->rows, piece / task->rows, score);
}
