/* Products over tokens at some positions only: out[e] = sum over t of left[t, row(e)] * right[t, column(e)].

   Tokens are cut into tiles of TILE. Of the right operand a whole tile, of the left one BLOCK features of it, are
   transposed, GROUP features by GROUP tokens, into a buffer that stays in the second-level cache (groups without a
   position are left out). Then a position costs TILE multiply-adds of contiguous vectors. Each thread has its own tokens
   and its own sums; these are added up last, in the order of the threads. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define TILE 64
#define GROUP 8
#define BLOCK 1024
#define STRIP 64

typedef float vector __attribute__((vector_size(4 * GROUP)));
typedef float unaligned __attribute__((vector_size(4 * GROUP), aligned(4)));
#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t picked __attribute__((vector_size(4 * GROUP)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (picked){__VA_ARGS__})
#endif
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 12)
typedef float wide __attribute__((vector_size(64)));
#define HALF(a) (PICK(a, a, 0, 1, 2, 3, 4, 5, 6, 7) + PICK(a, a, 8, 9, 10, 11, 12, 13, 14, 15))
#else
typedef vector wide;
#define HALF(a) (a)
#endif
#define WIDES (TILE * 4 / (int)sizeof(wide))

/* (T, width) by token, or (width, T) by feature. */
typedef struct {
    const float *data;
    int64_t by_feature, width;
} operand;

static inline __attribute__((always_inline)) float total(wide b) {
    vector a = HALF(b);
    a += PICK(a, a, 4, 5, 6, 7, 0, 1, 2, 3);
    a += PICK(a, a, 2, 3, 0, 1, 6, 7, 4, 5);
    return a[0] + a[1];
}

static inline __attribute__((always_inline)) void transpose(const float *from, int64_t stride, float *to) {
    vector r[GROUP], s[GROUP];
    for (int i = 0; i < GROUP; i++) r[i] = *(const unaligned *)(from + i * stride);
    for (int i = 0; i < GROUP; i += 2) {
        s[i] = PICK(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        s[i + 1] = PICK(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < GROUP; i += 4)
        for (int j = i; j < i + 2; j++) {
            r[j] = PICK(s[j], s[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            r[j + 2] = PICK(s[j], s[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; j++) {
        *(vector *)(to + j * TILE) = PICK(r[j], r[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(vector *)(to + (j + 4) * TILE) = PICK(r[j], r[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* n <= TILE tokens, from `token` on, of the features from `first` to `last`, as rows of TILE, zeros behind the n-th. */
static void tile(const operand *a, int64_t T, int64_t token, int n, int64_t first, int64_t last, const uint8_t *used,
                 float *out) {
    for (int64_t strip = first; strip < last; strip += STRIP) {
        int64_t end = strip + STRIP < last ? strip + STRIP : last;
        for (int64_t c = strip; a->by_feature && c < end; c++) {
            float *to = out + (c - first) * TILE;
            memcpy(to, a->data + c * T + token, 4 * n);
            memset(to + n, 0, 4 * (TILE - n));
        }
        for (int t = 0; !a->by_feature && t < TILE; t += GROUP)
            for (int64_t c = strip; c < end; c += GROUP) {
                if (!used[c / GROUP]) continue;
                const float *from = a->data + (token + t) * a->width + c;
                float *to = out + (c - first) * TILE + t;
                if (t + GROUP <= n && c + GROUP <= end) {
                    transpose(from, a->width, to);
                    continue;
                }
                for (int j = 0; j < GROUP && c + j < end; j++)
                    for (int i = 0; i < GROUP; i++) to[j * TILE + i] = t + i < n ? from[i * a->width + j] : 0;
            }
    }
}

/* The tokens from `from` to `to`: k products are added to `out`. */
static void part(const operand *left, const operand *right, int64_t T, int64_t from, int64_t to, const int32_t *starts,
                 const int32_t *columns, const uint8_t *used_left, const uint8_t *used_right, float *out, float *buffer) {
    float *block = buffer + (right->width + GROUP) * TILE;
    for (int64_t t = from; t < to; t += TILE) {
        int n = to - t < TILE ? (int)(to - t) : TILE;
        tile(right, T, t, n, 0, right->width, used_right, buffer);
        for (int64_t first = 0; first < left->width; first += BLOCK) {
            int64_t last = first + BLOCK < left->width ? first + BLOCK : left->width;
            if (starts[first] == starts[last]) continue;
            tile(left, T, t, n, first, last, used_left, block);
            for (int64_t r = first; r < last; r++) {
                const wide *d = (const wide *)(block + (r - first) * TILE);
                for (int32_t e = starts[r]; e < starts[r + 1]; e++) {
                    const wide *v = (const wide *)(buffer + (int64_t)columns[e] * TILE);
                    wide a = d[0] * v[0], b = d[1] * v[1];
                    for (int i = 2; i < WIDES; i += 2) {
                        a += d[i] * v[i];
                        b += d[i + 1] * v[i + 1];
                    }
                    out[e] += total(a + b);
                }
            }
        }
    }
}

/* Where each of the first `width` features lies among the n that are held, in their order; all of them for features of
   NULL. */
static int32_t *places(const int32_t *features, int64_t n, int64_t width) {
    int32_t *at = calloc(width + 1, 4);
    for (int64_t f = 0; at && f < (features ? n : width); f++) at[features ? features[f] : f] = f;
    return at;
}

/* k products at sorted positions in a matrix of height by width. An operand whose features are given holds these only,
   by feature. 0, or 1 where memory is short. */
int sampled_product(const float *left_data, const int32_t *rows, int64_t left_width, const float *right_data,
                    const int32_t *columns_held, int64_t right_width, int64_t T, const int32_t *index, int64_t k,
                    int64_t height, int64_t width, int64_t threads, float *out) {
    operand left = {left_data, rows != NULL, left_width}, right = {right_data, columns_held != NULL, right_width};
    int32_t *left_at = places(rows, left_width, height), *right_at = places(columns_held, right_width, width);
    int64_t tiles = (T + TILE - 1) / TILE, groups = left_width / GROUP + right_width / GROUP + 2;
    int64_t size = (right_width + GROUP + BLOCK) * TILE;
    if (threads > tiles) threads = tiles;
    if (threads < 1) threads = 1;
    int32_t *starts = calloc(left_width + 2, 4), *columns = malloc(4 * (k + 1));
    uint8_t *used_left = calloc(groups, 1), *used_right = used_left + left_width / GROUP + 1;
    float *sums = calloc((threads - 1) * k + 1, 4), *buffers = aligned_alloc(64, 4 * size * threads);
    int failed = !starts || !columns || !used_left || !sums || !buffers || !left_at || !right_at;
    if (!failed) {
        for (int64_t e = 0; e < k; e++) {
            int32_t r = left_at[index[e] / width];
            columns[e] = right_at[index[e] % width];
            starts[r + 1]++;
            used_left[r / GROUP] = used_right[columns[e] / GROUP] = 1;
        }
        for (int64_t r = 0; r < left_width; r++) starts[r + 1] += starts[r];
        memset(out, 0, 4 * k);
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
        for (int64_t i = 0; i < threads; i++) {
            int64_t to = tiles * (i + 1) / threads * TILE;
            part(&left, &right, T, tiles * i / threads * TILE, to < T ? to : T, starts, columns, used_left, used_right,
                 i ? sums + (i - 1) * k : out, buffers + i * size);
        }
        for (int64_t i = 0; i + 1 < threads; i++)
            for (int64_t e = 0; e < k; e++) out[e] += sums[i * k + e];
    }
    free(starts), free(columns), free(used_left), free(sums), free(buffers), free(left_at), free(right_at);
    return failed;
}

/* dense[index] = values */
void write_entries(float *dense, const float *values, const int32_t *index, int64_t k) {
    for (int64_t e = 0; e < k; e++) dense[index[e]] = values[e];
}

/* n features of (T, width) by token as (n, T) by feature: TILE tokens at a time, whose rows stay in the cache. */
void gather_features(const float *from, int64_t T, int64_t width, const int32_t *features, int64_t n, int64_t threads,
                     float *out) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
    for (int64_t t = 0; t < T; t += TILE) {
        int64_t last = t + TILE < T ? t + TILE : T;
        for (int64_t f = 0; f < n; f++)
            for (int64_t i = t; i < last; i++) out[f * T + i] = from[i * width + features[f]];
    }
}
