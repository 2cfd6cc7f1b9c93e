/* One pass over a tile of raw logits, while the tile is in the cache. It updates the state of the lens.
 *
 * _EagerPass in cpu.py defines what this code computes. compiled.py compiles and calls it. Rows are independent of each
 * other, so neither the number of threads nor the split into tiles of rows changes a bit of the result. Infinities and
 * NaN occur: do not use compiler options that assume there are none.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 256 /* an fp32 sum has at most this many terms; these sums are added in fp64 */

/* The same fields as Tile in compiled.py. Arrays are dense and row-major, with r rows and v columns. */
typedef struct {
    int64_t rows, width, start, lookups, top_k, threads;
    float scale, softcap;       /* 1: no scale; 0: no soft-cap */
    float *z;                   /* [r, v] raw logits of tokens start..start+v-1; overwritten */
    const float *bias;          /* [v], or NULL */
    const int64_t *lookup;      /* [r, a]; negative: none */
    const float *threshold;     /* [r, a] value that other logits must exceed, before the soft-cap */
    int64_t *above;             /* [r, a] number of logits that do; the pass adds to it */
    float *top_logits;          /* [r, k] largest first, before the soft-cap; filled from the first tile on */
    int64_t *top_ids;           /* [r, k] */
    double *peak, *exp, *exp_z; /* [r] running maximum m, sum of e^(z-m), sum of e^(z-m) * (z-m) */
    double *rescale;            /* [r] for final rows: factor that rescaled the sums; z becomes e^(z-m) */
    const int64_t *final_of;    /* [r] index of the final row of each row; NULL: no KL */
    const float *final_weights; /* [f, v] the z that the pass over the final rows left */
    const double *final_rescale, *final_before; /* [f] their rescale, and their sum of e^(z-m) before this tile */
    double *cross;              /* [r] sum of e^(z_final - m_final) * (z - m) */
} Tile;

static inline float from_bits(int32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }
static inline int32_t to_bits(float x) { int32_t bits; memcpy(&bits, &x, sizeof bits); return bits; }

/* e^x for x <= 0 within 1 ulp (Cephes' polynomial), without a branch; 0 below -87. NaN stays NaN. */
static inline float fast_exp(float x)
{
    const float shifter = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number, found in the low bits */
    float y = x < -87.0f ? -87.0f : x;
    float t = y * 1.44269504088896341f + shifter, n = t - shifter;
    float r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r * r + r + 1.0f) * from_bits((int32_t)((uint32_t)(to_bits(t) - 0x4B400000 + 127) << 23));
    return x < -87.0f ? 0.0f : p;
}

/* tanh within 2 ulp: Cephes' polynomial near 0, where the quotient would lose precision. */
static inline float fast_tanh(float x)
{
    float size = fabsf(x), e = fast_exp(-2.0f * size), s = x * x;
    float p = -5.70498872745e-3f;
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    float near_zero = p * s * x + x, far = copysignf((1.0f - e) / (1.0f + e), x);
    return size < 0.625f ? near_zero : far;
}

/* The largest value without NaN, or -inf. NaN shows up in the sums. */
static float largest_of(const float *z, int64_t width)
{
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < width; j++) largest = z[j] > largest ? z[j] : largest;
    return largest;
}

static int64_t count_above(const float *z, int64_t width, float threshold)
{
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t j = 0; j < width; j++) count += z[j] > threshold;
    return count;
}

/* Merges a tile into the running top k. Ids rise, and a new id goes after equal logits: the lowest id stays first. */
static void merge_top(const Tile *t, const float *z, float largest, float *top, int64_t *ids)
{
    int64_t k = t->top_k, filled = t->start < k ? t->start : k;
    if (filled == k && !(largest > top[k - 1])) return;
    for (int64_t from = 0; from < t->width; from += 64) {
        int64_t to = from + 64 < t->width ? from + 64 : t->width;
        if (filled == k && !(largest_of(z + from, to - from) > top[k - 1])) continue;
        for (int64_t j = from; j < to; j++) {
            int64_t position;
            if (filled < k) position = filled++;
            else if (z[j] > top[k - 1]) position = k - 1;
            else continue;
            for (; position > 0 && z[j] > top[position - 1]; position--) {
                top[position] = top[position - 1];
                ids[position] = ids[position - 1];
            }
            top[position] = z[j];
            ids[position] = t->start + j;
        }
    }
}

/* Sum of e^(z-m) and of e^(z-m) * (z-m). Where a weight is 0 its product is 0 too, even if z is -inf. */
static void sum_weights(float *z, int64_t width, float m, int keep, double *sum, double *weighted)
{
    for (int64_t from = 0; from < width; from += BLOCK) {
        int64_t to = from + BLOCK < width ? from + BLOCK : width;
        float s = 0, w = 0;
#pragma omp simd reduction(+ : s, w)
        for (int64_t j = from; j < to; j++) {
            float x = z[j] - m, e = fast_exp(x);
            s += e;
            w += e * (x < -87.0f ? -87.0f : x);
        }
        *sum += s;
        *weighted += w;
    }
    if (!keep) return;
#pragma omp simd
    for (int64_t j = 0; j < width; j++) z[j] = fast_exp(z[j] - m);
}

/* Sum of weight * (z-m) where the weight is positive: tokens with probability 0 in the final row count as 0. */
static double sum_cross(const float *z, int64_t width, float m, const float *weights)
{
    double total = 0;
    for (int64_t from = 0; from < width; from += BLOCK) {
        int64_t to = from + BLOCK < width ? from + BLOCK : width;
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t j = from; j < to; j++) {
            float product = weights[j] * (z[j] - m);
            s += weights[j] > 0.0f ? product : 0.0f;
        }
        total += s;
    }
    return total;
}

static void read_row(const Tile *t, int64_t i)
{
    int64_t width = t->width;
    float *z = t->z + i * width;
    if (t->bias) {
        const float *bias = t->bias;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) z[j] += bias[j];
    }
    if (t->scale != 1.0f) {
        float scale = t->scale;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) z[j] *= scale;
    }
    for (int64_t a = i * t->lookups; a < (i + 1) * t->lookups; a++) {
        int64_t itself = t->lookup[a] - t->start;
        if (t->lookup[a] < 0) continue;
        t->above[a] += count_above(z, width, t->threshold[a]);
        if (itself >= 0 && itself < width && z[itself] > t->threshold[a]) t->above[a]--;
    }
    float largest = largest_of(z, width);
    if (t->top_k) merge_top(t, z, largest, t->top_logits + i * t->top_k, t->top_ids + i * t->top_k);
    if (t->softcap > 0.0f) {
        float cap = t->softcap;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) z[j] = cap * fast_tanh(z[j] / cap);
        largest = largest_of(z, width);
    }

    double old = t->peak[i], peak = largest > old ? largest : old;
    if (peak == INFINITY) { /* fp32 overflowed: there are no probabilities */
        t->peak[i] = INFINITY;
        t->exp[i] = t->exp_z[i] = NAN;
        return;
    }
    float m = isfinite(peak) ? (float)peak : 0.0f; /* all logits of the row are -inf so far: its sums stay 0 */
    double move = isfinite(old) ? old - m : 0.0, rescale = isfinite(old) ? exp(move) : 0.0;
    double sum = 0, weighted = 0;
    if (t->final_of) { /* must come before z becomes weights */
        int64_t f = t->final_of[i];
        double carried = t->cross[i] + move * t->final_before[f];
        t->cross[i] = t->final_rescale[f] * carried + sum_cross(z, width, m, t->final_weights + f * width);
    }
    sum_weights(z, width, m, t->rescale != NULL, &sum, &weighted);
    t->exp_z[i] = rescale * (t->exp_z[i] + move * t->exp[i]) + weighted;
    t->exp[i] = rescale * t->exp[i] + sum;
    t->peak[i] = peak;
    if (t->rescale) t->rescale[i] = rescale;
}

void xprobe_row_pass(const Tile *t)
{
    int threads = t->rows * t->width < 16384 ? 1 : (int)t->threads; /* too little work for threads */
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < t->rows; i++) read_row(t, i);
}
