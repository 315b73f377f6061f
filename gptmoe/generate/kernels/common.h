/* Decoding on the CPU in bfloat16: what the kernels share.

   Each kernel is called on every thread with the same task and takes pieces of it until none is
   left. One thread computes a piece, always in the same order: the number of threads, of rows and of
   neighbours changes no bit.

   Letters: B blocks of outputs, R rows, O outputs, C keys, H heads. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16 /* float32 numbers in a vector */

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(64), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(32)));

/* The second and the first number of each pair of bfloat16 numbers. */
static inline floats odd(words pairs) { return (floats)(pairs & 0xFFFF0000u); }
static inline floats even(words pairs) { return (floats)(pairs << 16); }

/* float32 to bfloat16 in the lower half, ties to even. */
static inline words rounded(floats number)
{
    words bits = (words)number;
    return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

static inline float wide(uint16_t number)
{
    uint32_t bits = (uint32_t)number << 16;
    float same;
    memcpy(&same, &bits, sizeof same);
    return same;
}

/* Over the lanes. */
static inline float sum_of(floats x)
{
    const integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int half = LANES / 2; half; half /= 2)
        x += __builtin_shuffle(x, lane ^ half);
    return x[0];
}

static inline int64_t next_piece(int64_t *counter)
{
    return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

#define WIDE 4 /* vectors of a block of outputs */

/* Round and write a row's sums for the outputs of a block, the last of which may not exist. */
static inline void write_block(
    floats *sums, const uint16_t *bias, uint16_t *out, int64_t block, int64_t outputs)
{
    int64_t o = block * WIDE * LANES;
    for (int64_t v = 0; v < WIDE && o < outputs; v++, o += LANES) {
        halves some = {0};
        int64_t bytes = 2 * (outputs - o < LANES ? outputs - o : LANES);
        if (bias) {
            memcpy(&some, bias + o, bytes);
            sums[v] += (floats)(__builtin_convertvector(some, words) << 16);
        }
        some = __builtin_convertvector(rounded(sums[v]), halves);
        memcpy(out + o, &some, bytes);
    }
}
