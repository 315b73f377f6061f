/* Products with a weight in 8 or 4 bits. Q quads of inputs, G groups of them; see common.h.

   The processor multiplies a byte without sign by one with: the weight stands there moved into
   0..255 or 0..15, x as two bytes with signs, and how far the weight was moved is taken away times
   the sum of x. Sums within a group are of whole numbers: exact, in whatever order. */

#include "common.h"

#define MOST 3      /* rows whose sums fill the registers */
#define LARGEST 32639 /* 127 * 256 + 127: of two bytes with signs */
#define LEAST 1e-30f  /* a row of smaller numbers is one of zeros */
#define INFINITE 0x7F80 /* bits in bfloat16; above it: no number */
#define AHEAD 2048  /* bytes of a weight that are asked for before they are needed */

typedef struct {
    Rows rows;
    const words *weight;   /* 8 bits: [B, Q, WIDE], 4 bits: [B, Q / 2, WIDE]; 4 inputs of each output,
                              and 4 more in the upper halves */
    const uint16_t *scale; /* [B, G, 64] */
    const uint16_t *x;     /* [R, 4 Q] */
    uint32_t *low, *high;  /* [R, Q]: x = unit (256 high + low), 4 bytes of each */
    int32_t *sums;         /* [R, G, 2]: of low and of high */
    float *unit;           /* [R] */
    const uint16_t *bias;  /* [O] or null */
    uint16_t *out;         /* [R, O] */
    int64_t blocks, quads, group, outputs; /* group: its quads */
} FewBits;

/* Take x apart. */
void halve(FewBits *task)
{
    int64_t row, count = 4 * task->quads, group = 4 * task->group;
    while ((row = task->rows.first + next_piece(&task->rows.next)) < task->rows.end) {
        const uint16_t *x = task->x + row * count;
        int8_t *low = (int8_t *)(task->low + row * task->quads);
        int8_t *high = (int8_t *)(task->high + row * task->quads);
        int32_t *sums = task->sums + row * (count / group) * 2;
        uint16_t largest = 0; /* numbers without their signs are ordered as their bits are */
        for (int64_t i = 0; i < count; i++)
            largest = (x[i] & 0x7FFF) > largest ? x[i] & 0x7FFF : largest;
        float most = wide(largest), times = LARGEST / most;
        task->unit[row] = most / LARGEST;
        if (most < LEAST || largest >= INFINITE) { /* zeros; times `unit` none, if one is none */
            memset(low, 0, count);
            memset(high, 0, count);
            memset(sums, 0, count / group * 2 * sizeof *sums);
            continue;
        }
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
#define MOVED8 128 /* how far a weight in 8 bits is still moved when it is multiplied */

/* Add to each number the 4 products of its bytes. gcc 12 moves the sums about if it may choose. */
static inline __attribute__((always_inline)) integers plus_products(
    integers sums, words weights, words x, const int bits)
{
    (void)bits;
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(x));
    return sums;
}
#elif defined __AVX2__ && !defined __AVX512F__
#define MOVED8 0

/* The same in three steps. Sums of two products must fit into 16 bits: a weight in 8 bits gets back
   its sign, and x gives its own to it. */
static inline __attribute__((always_inline)) integers plus_products(
    integers sums, words weights, words x, const int bits)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i two = bits == 4
        ? _mm256_maddubs_epi16((__m256i)weights, (__m256i)x)
        : _mm256_maddubs_epi16(
              _mm256_abs_epi8((__m256i)x),
              _mm256_sign_epi8((__m256i)(weights ^ 0x80808080u), (__m256i)x));
    return sums + (integers)_mm256_madd_epi16(two, ones);
}
#endif

#ifdef MOVED8
/* The products of one group of inputs, scaled, added to the sums of a block for some rows. */
static inline __attribute__((always_inline)) void add_group(
    const FewBits *task, int64_t block, int64_t row, int64_t group, floats (*total)[WIDE],
    const int rows, const int bits)
{
    const int quads = 8 / bits; /* in a word */
    const int32_t moved = bits == 8 ? MOVED8 : 8;
    int64_t groups = task->quads / task->group, first = group * task->group;
    const words *weight = task->weight + (block * task->quads + first) / quads * WIDE;
    integers lows[MOST][WIDE], highs[MOST][WIDE];
    for (int r = 0; r < rows; r++) {
        const int32_t *sums = task->sums + ((row + r) * groups + group) * 2;
        for (int v = 0; v < WIDE; v++) {
            lows[r][v] = (integers){} - moved * sums[0];
            highs[r][v] = (integers){} - moved * sums[1];
        }
    }
    for (int64_t quad = first; quad < first + task->group; quad += quads, weight += WIDE)
#pragma GCC unroll 2
        for (int part = 0; part < quads; part++)
#pragma GCC unroll 8
            for (int v = 0; v < WIDE; v++) {
                words four = weight[v];
                if (!part && v * sizeof four % 64 == 0)
                    __builtin_prefetch((const char *)(weight + v) + AHEAD);
                if (bits == 4)
                    four = (part ? four >> 4 : four) & 0x0F0F0F0Fu;
#pragma GCC unroll 3
                for (int r = 0; r < rows; r++) {
                    int64_t place = (row + r) * task->quads + quad + part;
                    words low = (words){} + task->low[place];
                    words high = (words){} + task->high[place];
                    lows[r][v] = plus_products(lows[r][v], four, low, bits);
                    highs[r][v] = plus_products(highs[r][v], four, high, bits);
                }
            }
    const uint16_t *scales = task->scale + (block * groups + group) * BLOCK;
    for (int v = 0; v < WIDE; v++) {
        halves some;
        memcpy(&some, scales + v * LANES, sizeof some);
        floats scale = (floats)(__builtin_convertvector(some, words) << 16);
        for (int r = 0; r < rows; r++) {
            floats sum = __builtin_convertvector(highs[r][v], floats) * 256.0f;
            sum += __builtin_convertvector(lows[r][v], floats);
            floats *all = &total[r][v];
            *all = plus_product(*all, sum, scale);
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
    while ((block = next_piece(&task->rows.next)) < task->blocks)
        for (int64_t row = task->rows.first; row < task->rows.end; row += MOST)
            switch (task->rows.end - row) {
            case 1: block_by_rows(task, block, row, 1, bits); break;
            case 2: block_by_rows(task, block, row, 2, bits); break;
            default: block_by_rows(task, block, row, MOST, bits);
            }
}

void product8(FewBits *task) { products(task, 8); }
void product4(FewBits *task) { products(task, 4); }
#endif
