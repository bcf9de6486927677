/* Antialiased resize of 8-bit RGB as Pillow computes it, bit for bit, but only the pixels of a crop.
 *
 * Pillow resizes rows first, then columns, and rounds to 8 bits in between. Its weights are integers
 * with 22 bits after the point, so the order of additions does not affect the result. The weights
 * are computed in resize.py, which loads this file as a library: it needs no headers of Python.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FRACTION_BITS 22
#define HALF (1 << (FRACTION_BITS - 1))

/* Compiled twice: the processor's vector instructions are selected when the library is loaded. */
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__)
#define EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define EACH_PROCESSOR
#endif

#define INLINE static inline __attribute__((always_inline))

typedef int32_t four_values __attribute__((vector_size(16)));

/* Weights of one side: output i is the sum of `taps` source pixels from first[i]. */
struct axis {
    const int32_t *first;
    const int32_t *weights; /* [count, taps] */
    int32_t taps;
    int32_t count;  /* output pixels */
    int32_t start;  /* first source pixel that an output needs */
    int32_t length; /* source pixels from there */
};

INLINE void round_to_bytes(const int32_t *sums, uint8_t *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        int32_t value = sums[i] >> FRACTION_BITS;
        bytes[i] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

/* `row` is the source from x->start. The fourth value of a pixel belongs to the next one: `row` and
 * `sums` have one value more than they need. */
INLINE void sum_columns(const struct axis *x, const int32_t *row, int32_t *sums, int taps) {
    const int32_t *weights = x->weights;
    for (int32_t i = 0; i < x->count; i++, weights += taps) {
        const int32_t *source = row + 3 * (size_t)(x->first[i] - x->start);
        four_values sum = {HALF, HALF, HALF, HALF};
        for (int tap = 0; tap < taps; tap++) {
            four_values values;
            memcpy(&values, source + 3 * tap, sizeof values);
            sum += values * weights[tap];
        }
        memcpy(sums + 3 * (size_t)i, &sum, sizeof sum);
    }
}

INLINE void sum_rows(const uint8_t *rows, const int32_t *weights, int32_t *sums, size_t n,
                     int taps) {
    for (size_t i = 0; i < n; i++) {
        int32_t sum = HALF;
        for (int tap = 0; tap < taps; tap++)
            sum += weights[tap] * rows[n * (size_t)tap + i];
        sums[i] = sum;
    }
}

/* The number of taps as a constant lets the compiler unroll the loops over them. */
#define WITH_CONSTANT_TAPS(function, taps, ...) \
    switch (taps) {                             \
    case 4:                                     \
        function(__VA_ARGS__, 4);               \
        break;                                  \
    case 5:                                     \
        function(__VA_ARGS__, 5);               \
        break;                                  \
    default:                                    \
        function(__VA_ARGS__, taps);            \
    }

/* Write y->count x x->count pixels to `out`. Returns 1 if there is not enough memory. */
EACH_PROCESSOR int resize_rgb(const uint8_t *image, int64_t row_bytes, const struct axis *x,
                              const struct axis *y, uint8_t *out) {
    size_t n = 3 * (size_t)x->count, source_n = 3 * (size_t)x->length;
    int32_t *row = calloc(source_n + 1 + n + 1, sizeof *row);
    uint8_t *middle = malloc(n * (size_t)y->length);
    if (!row || !middle) {
        free(row);
        free(middle);
        return 1;
    }
    int32_t *sums = row + source_n + 1;
    for (int32_t i = 0; i < y->length; i++) {
        const uint8_t *source = image + row_bytes * (y->start + i) + 3 * (size_t)x->start;
        for (size_t j = 0; j < source_n; j++) row[j] = source[j];
        WITH_CONSTANT_TAPS(sum_columns, x->taps, x, row, sums)
        round_to_bytes(sums, middle + n * (size_t)i, n);
    }
    for (int32_t i = 0; i < y->count; i++) {
        const uint8_t *rows = middle + n * (size_t)(y->first[i] - y->start);
        const int32_t *weights = y->weights + (size_t)y->taps * (size_t)i;
        WITH_CONSTANT_TAPS(sum_rows, y->taps, rows, weights, sums, n)
        round_to_bytes(sums, out + n * (size_t)i, n);
    }
    free(row);
    free(middle);
    return 0;
}
