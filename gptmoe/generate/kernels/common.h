/* Decoding on the CPU in bfloat16: what the kernels share.

   Each kernel is called on every thread with the same task and takes pieces of it until none is
   left. One thread computes a piece, always in the same order: the number of threads, of rows and of
   neighbours changes no bit.

   Letters: B blocks of outputs, R rows, O outputs, C keys, H heads. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16 /* float32 numbers in a register */
#else
#define LANES 8
#endif
#define BLOCK 64 /* outputs that stand together in a weight */
#define WIDE (BLOCK / LANES)

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* The second and the first number of each pair of bfloat16 numbers. */
static inline floats odd(words pairs) { return (floats)(pairs & 0xFFFF0000u); }
static inline floats even(words pairs) { return (floats)(pairs << 16); }

/* a b + sum. Said outright: a compiler that may choose rounds once in one place and twice in another
   (gcc for AMD's processors), and then a row's bits depend on its neighbours. */
static inline floats plus_product(floats sum, floats a, floats b)
{
#if defined __AVX512F__
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined __FMA__
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

#define NO_NUMBER 0x7FC0u /* in bfloat16; rounding could carry the bits of one over to zero */

/* float32 to bfloat16 in the lower half, ties to even. */
static inline words rounded(floats number)
{
    words bits = (words)number, none = (words)(number != number);
    bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (~none & bits) | (none & NO_NUMBER);
}

static inline float wide(uint16_t number)
{
    uint32_t bits = (uint32_t)number << 16;
    float same;
    memcpy(&same, &bits, sizeof same);
    return same;
}

static inline uint16_t narrow(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return number != number ? NO_NUMBER : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

/* Over the lanes. */
static inline float sum_of(floats x)
{
    integers lane;
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
    for (int half = LANES / 2; half; half /= 2)
        x += __builtin_shuffle(x, lane ^ half);
    return x[0];
}

/* e^x for x <= 0: 2^n 2^f with f in -0.5 .. 0.5 by its series up to f^6; 0 below 2^-126. */
static inline floats exponential(floats x)
{
    floats scaled = x * 1.44269504088896341f;
    words small = (words)(scaled < -126.0f); /* what is not a number stays so */
    scaled = (floats)((~small & (words)scaled) | (small & (words)((floats){} - 126.0f)));
    integers whole = __builtin_convertvector(scaled - 0.5f, integers); /* to nearest, as x <= 0 */
    floats f = scaled - __builtin_convertvector(whole, floats);
    const float factors[] = {1.3333558146428443e-3f, 9.618129107628477e-3f, 5.550410866482158e-2f,
                             2.402265069591007e-1f,  6.931471805599453e-1f, 1.0f};
    floats series = (floats){} + 1.5403530393381608e-4f;
    for (int i = 0; i < 6; i++)
        series = plus_product((floats){} + factors[i], series, f);
    return (floats)(~small & (words)(series * (floats)((whole + 127) << 23)));
}

static inline floats wide_of(halves some)
{
    return (floats)(__builtin_convertvector(some, words) << 16);
}

static inline floats read(const uint16_t *from)
{
    halves some;
    memcpy(&some, from, sizeof some);
    return wide_of(some);
}

static inline void write(uint16_t *to, floats numbers)
{
    halves some = __builtin_convertvector(rounded(numbers), halves);
    memcpy(to, &some, sizeof some);
}

/* What the task of a product begins with: the counter, and the rows first .. end - 1 of x and out. */
typedef struct {
    int64_t next, first, end;
} Rows;

static inline int64_t next_piece(int64_t *counter)
{
    return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

/* Round and write a row's sums for the outputs of a block, the last of which may not exist. */
static inline void write_block(
    floats *sums, const uint16_t *bias, uint16_t *out, int64_t block, int64_t outputs)
{
    int64_t o = block * BLOCK;
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
