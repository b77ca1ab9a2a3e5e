"""The C++ for CPUs: quantized and half-precision matrix multiplication, attention of one token, what lies between them, and a
layer made of these.

Remote code is loaded from Python files alone, so the C++ stands here as text. How it is compiled and called is in
quantization_cpu.py.
"""

CPP_SOURCE = r"""
// In this order: numbers and buffers; y = x * weight^T for weights in half precision; attention; norm, rotation and
// activation; y = x * weight^T for weights in INT8 or INT4, with a scale for each row or each group of columns; many rows times
// weights in half precision; layers for one token.
//
// For INT8 and INT4, activations are quantized to INT8 in blocks of 32 columns, so that an outlier spoils no more than its
// block, and multiplied as integers: vpdpbusd or vpmaddubsw take unsigned weights and signed activations, so `offset` is
// added to the weights. What it adds to the products is subtracted: for few rows from the sum of a row, for many rows from
// where the accumulators start.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
extern "C" int omp_get_thread_num(void);  // macOS has no omp.h
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t BLOCK = 32;     // columns of activations that share a scale
constexpr int64_t FEW_ROWS = 16;
constexpr int64_t PADDING = 128;  // columns are padded to a multiple of this, at least a vector of INT4

enum ScaleType { FLOAT32, FLOAT16, BFLOAT16 };

// f(0), f(1), ... f(n - 1), written out before the compiler decides which arrays can stay in registers: a loop that it
// unrolls later leaves accumulators in memory, and takes twice as long.
#define INLINE __attribute__((always_inline))
template <class F, int... i> inline INLINE void call_each(F f, std::integer_sequence<int, i...>) { (f(i), ...); }
template <int n, class F> inline INLINE void each(F f) { call_each(f, std::make_integer_sequence<int, n>()); }

#if defined(__AVX512F__) && !defined(CHATGLM_SCALAR)
constexpr int64_t WIDE = 16;  // numbers in a vector
#elif defined(__AVX2__) && !defined(CHATGLM_SCALAR)
constexpr int64_t WIDE = 8;
#else
constexpr int64_t WIDE = 4;
#endif
typedef float Wide __attribute__((vector_size(4 * WIDE)));  // of GCC and clang, for any instruction set
typedef uint32_t WideBits __attribute__((vector_size(4 * WIDE)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDE)));

template <int type>
inline INLINE Wide widen(const uint16_t *p) {
#if defined(__AVX512F__) && !defined(CHATGLM_SCALAR)
  if (type == FLOAT16) return (Wide)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__) && defined(__F16C__) && !defined(CHATGLM_SCALAR)
  if (type == FLOAT16) return (Wide)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#endif
  Halves halves;
  memcpy(&halves, p, sizeof(halves));
  const WideBits bits = __builtin_convertvector(halves, WideBits);
  if (type == BFLOAT16) return (Wide)(bits << 16);
  // The bits of a float16, exponent and all, moved to where a float32 has them, are 2^-112 times its value.
  const Wide value = (Wide)((bits & 0x7fff) << 13) * 0x1p112f;
  const WideBits not_finite = (WideBits)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return (Wide)((WideBits)value | not_finite | (bits & 0x8000) << 16);
}

// n numbers of any type, as float32
template <int type>
void to_float32(const void *from, int64_t n, float *to) {
  if (type == FLOAT32) {
    memcpy(to, from, n * sizeof(float));
    return;
  }
  const uint16_t *halves = (const uint16_t *)from;
  int64_t i = 0;
  for (; i + WIDE <= n; i += WIDE) {
    const Wide numbers = widen<type>(halves + i);
    memcpy(to + i, &numbers, sizeof(numbers));
  }
  if (i < n) {
    uint16_t last[WIDE] = {};
    memcpy(last, halves + i, (n - i) * sizeof(uint16_t));
    const Wide numbers = widen<type>(last);
    memcpy(to + i, &numbers, (n - i) * sizeof(float));
  }
}

// To the nearest, ties to even
template <int type>
inline INLINE Halves narrow(Wide numbers) {
#if defined(__AVX512F__) && !defined(CHATGLM_SCALAR)
  if (type == FLOAT16) return (Halves)_mm512_cvtps_ph((__m512)numbers, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__) && defined(__F16C__) && !defined(CHATGLM_SCALAR)
  if (type == FLOAT16) return (Halves)_mm256_cvtps_ph((__m256)numbers, _MM_FROUND_TO_NEAREST_INT);
#endif
  const WideBits bits = (WideBits)numbers, size = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  WideBits result;
  if (type == BFLOAT16) {
    result = size > 0x7f800000 ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // NaN stays NaN
  } else {
    const WideBits normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
    const WideBits subnormal = (WideBits)((Wide)size + 0.5f) - 0x3f000000;  // the sum rounds where a subnormal number ends
    const WideBits not_finite = size > 0x7f800000 ? 0x7e00 + WideBits{} : 0x7c00 + WideBits{};
    result = sign | (size < 0x38800000 ? subnormal : size < 0x477ff000 ? normal : not_finite);
  }
  return __builtin_convertvector(result, Halves);
}

// The inverse of to_float32
template <int type>
void from_float32(const float *from, int64_t n, void *to) {
  if (type == FLOAT32) {
    memcpy(to, from, n * sizeof(float));
    return;
  }
  uint16_t *halves = (uint16_t *)to;
  for (int64_t i = 0; i < n; i += WIDE) {
    Wide numbers = {};
    memcpy(&numbers, from + i, std::min(WIDE, n - i) * sizeof(float));
    const Halves narrowed = narrow<type>(numbers);
    memcpy(halves + i, &narrowed, std::min(WIDE, n - i) * sizeof(uint16_t));
  }
}

struct Problem {
  const float *x;        // [rows, in]
  const int8_t *weight;  // [out, in * bits / 8]
  const void *scale;     // [out, groups]
  int scale_type;
  float *y;              // [rows, out]
  int64_t rows, out, in, groups;
  int bits, threads;

  int64_t row_bytes() const { return in * bits / 8; }
  int64_t group_size() const { return in / groups; }

  void read_scales(int64_t row, float *to) const {
    const void *from = (const char *)scale + row * groups * (scale_type == FLOAT32 ? 4 : 2);
    if (scale_type == FLOAT32) to_float32<FLOAT32>(from, groups, to);
    if (scale_type == FLOAT16) to_float32<FLOAT16>(from, groups, to);
    if (scale_type == BFLOAT16) to_float32<BFLOAT16>(from, groups, to);
  }
};

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
struct Buffer {
  T *data;
  explicit Buffer(int64_t n) : data((T *)aligned_alloc(64, round_up(n * sizeof(T) + 64, 64))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer &) = delete;
  operator T *() const { return data; }
};

// Has the system give memory that was never used in pages of 2 MB, where it can: for the outputs of a prompt, page faults of 4 KB
// take as long as a tenth of the product.
void prefer_large_pages(void *data, int64_t size) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, begin = ((uintptr_t)data + page - 1) / page * page, end = ((uintptr_t)data + size) / page * page;
  if (size >= 8 << 20) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}

// A part for each thread. Allocated before they start: what one of them throws would end the process.
template <class T>
struct Scratch : Buffer<T> {
  int64_t size;
  Scratch(int threads, int64_t n) : Buffer<T>(threads * round_up(n, 64)), size(round_up(n, 64)) {}
  T *mine() const {
#if defined(_OPENMP)
    return this->data + omp_get_thread_num() * size;
#else
    return this->data;
#endif
  }
};

// Quantizes a row; scale[i] is that of columns [i * BLOCK, (i + 1) * BLOCK). NaN and infinity make the scale NaN.
void quantize_row(const float *x, int64_t columns, int8_t *q, float *scale) {
  for (int64_t begin = 0; begin < columns; begin += BLOCK) {
    int64_t n = std::min(BLOCK, columns - begin);
    float largest = 0, not_finite = 0;
#pragma omp simd reduction(max : largest) reduction(+ : not_finite)
    for (int64_t i = begin; i < begin + n; i++) {
      largest = std::max(largest, std::fabs(x[i]));
      not_finite += x[i] * 0.0f;
    }
    float inverse = largest > 0 && largest < INFINITY ? 127 / largest : 0;
    if (!(inverse < INFINITY)) inverse = largest = 0;  // so small that 127 / largest overflows
#pragma omp simd
    for (int64_t i = begin; i < begin + n; i++) q[i] = (int8_t)(int32_t)std::nearbyint(x[i] * inverse);
    scale[begin / BLOCK] = largest / 127 + not_finite;
  }
}

template <int bits>
void unpack_row(const int8_t *weight, int64_t columns, int8_t *to) {
  if (bits == 8) {
    memcpy(to, weight, columns);
  } else {
    for (int64_t i = 0; i < columns / 2; i++) {
      to[2 * i] = weight[i] >> 4;
      to[2 * i + 1] = (int8_t)((uint8_t)weight[i] << 4) >> 4;
    }
  }
}

inline void put(float value, float *to) { *to = value; }
inline void put(float value, uint16_t *to) {  // bfloat16, to the nearest, ties to even; there is no NaN
  uint32_t word;
  memcpy(&word, &value, sizeof(word));
  *to = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
}

// The weight in float32 or bfloat16, to y.
template <int bits, class T>
void dequantize(const Problem &p, T *y) {
  const Scratch<int8_t> quantized_scratch(p.threads, p.in);
  const Scratch<float> scale_scratch(p.threads, p.groups);
#pragma omp parallel num_threads(p.threads)
  {
    int8_t *quantized = quantized_scratch.mine();
    float *scale = scale_scratch.mine();
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.out; n++) {
      unpack_row<bits>(p.weight + n * p.row_bytes(), p.in, quantized);
      p.read_scales(n, scale);
      for (int64_t g = 0; g < p.groups; g++) {
        T *to = y + n * p.in;
#pragma omp simd
        for (int64_t k = g * p.group_size(); k < (g + 1) * p.group_size(); k++) put(quantized[k] * scale[g], to + k);
      }
    }
  }
}

// ---- Few rows of activations times weights in half precision: y = x * weight^T. Sums are in float32.

template <int type>
struct Products {  // of float32
  typedef float Activation;
  static constexpr int64_t COLUMNS = WIDE;
  static void convert(const uint16_t *x, int64_t n, float *to) { to_float32<type>(x, n, to); }
  typedef Wide Weights;
  static INLINE Weights load(const uint16_t *weight) { return widen<type>(weight); }
  static INLINE Wide add(Wide sum, const float *x, Weights weights) {
    Wide activations;
    memcpy(&activations, x, sizeof(activations));
    return sum + activations * weights;
  }
};

#if defined(__AVX512BF16__) && !defined(CHATGLM_SCALAR)
template <>
struct Products<BFLOAT16> {  // of pairs
  typedef uint16_t Activation;
  static constexpr int64_t COLUMNS = 2 * WIDE;
  static void convert(const uint16_t *x, int64_t n, uint16_t *to) { memcpy(to, x, n * sizeof(uint16_t)); }
  typedef __m512bh Weights;
  static INLINE Weights load(const uint16_t *weight) { return (__m512bh)_mm512_loadu_si512(weight); }
  static INLINE Wide add(Wide sum, const uint16_t *x, Weights weights) {
    return (Wide)_mm512_dpbf16_ps((__m512)sum, weights, (__m512bh)_mm512_loadu_si512(x));
  }
};
#endif

// y[m * out + r] = product of R rows of the weight with M rows of activations. U sums of each hide the latency of adding.
template <int type, int M, int R, int U, class P = Products<type>>
void half_tile(const typename P::Activation *x, const uint16_t *weight, float *y, int64_t out, int64_t in) {
  Wide sum[R][M][U] = {};
  int64_t k = 0;
  for (; k + U * P::COLUMNS <= in; k += U * P::COLUMNS)
    each<U>([&](int u) INLINE {
      each<R>([&](int r) INLINE {
        const uint16_t *at = weight + r * in + k + u * P::COLUMNS;
        __builtin_prefetch(at + (R == 1 ? 2048 : R * in));
        const typename P::Weights weights = P::load(at);
        each<M>([&](int m) INLINE { sum[r][m][u] = P::add(sum[r][m][u], x + m * in + k + u * P::COLUMNS, weights); });
      });
    });
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      for (int64_t i = k; i < in; i += P::COLUMNS) {
        const int64_t n = std::min(P::COLUMNS, in - i);
        typename P::Activation last_x[P::COLUMNS] = {};
        uint16_t last_weights[P::COLUMNS] = {};
        memcpy(last_x, x + m * in + i, n * sizeof(*x));
        memcpy(last_weights, weight + r * in + i, n * sizeof(uint16_t));
        sum[r][m][0] = P::add(sum[r][m][0], last_x, P::load(last_weights));
      }
      float total = 0;
      for (int u = 0; u < U; u++)
        for (int64_t i = 0; i < WIDE; i++) total += sum[r][m][u][i];
      y[m * out + r] = total;
    }
}

// R rows of the weight with all rows of activations, up to 4 at a time
template <int type, int R>
void half_tiles(const typename Products<type>::Activation *x, const uint16_t *weight, float *y, int64_t rows, int64_t out,
                int64_t in) {
  for (int64_t m = 0; m < rows; m += 4) {
    const int64_t count = std::min<int64_t>(4, rows - m);
    if (count == 4) half_tile<type, 4, R, 1>(x + m * in, weight, y + m * out, out, in);
    if (count == 3) half_tile<type, 3, R, 1>(x + m * in, weight, y + m * out, out, in);
    if (count == 2) half_tile<type, 2, R, 1>(x + m * in, weight, y + m * out, out, in);
    if (count == 1) half_tile<type, 1, R, 1>(x + m * in, weight, y + m * out, out, in);
  }
}

template <int type>
void half_linear(const uint16_t *halves, const uint16_t *weight, float *y, int64_t rows, int64_t out, int64_t in,
                 int threads) {
  Buffer<typename Products<type>::Activation> x(rows * in);
  Products<type>::convert(halves, rows * in, x);
  constexpr int MOST = WIDE == 16 ? 4 : 2;  // rows of the weight whose sums stay in registers
  const int64_t together = rows == 1 ? 1 : MOST;
#pragma omp parallel for schedule(guided, 64) num_threads(threads)
  for (int64_t n = 0; n < out; n += together) {
    const uint16_t *at = weight + n * in;
    if (rows == 1)
      half_tile<type, 1, 1, 4>(x, at, y + n, out, in);
    else if (n + MOST <= out)
      half_tiles<type, MOST>(x, at, y + n, rows, out, in);
    else
      for (int64_t r = n; r < out; r++) half_tiles<type, 1>(x, weight + r * in, y + r, rows, out, in);
  }
}

// ---- Attention of one token, whose query heads share few key-value heads. The lanes are query heads, so that each number of
// a key or a value is read once for all of them. (Online softmax, by parts: Dao et al. 2022, arXiv 2205.14135.)

constexpr int64_t KEYS = 64;       // taken together: they and their values stay in the cache
constexpr int64_t PART = 16 * KEYS;  // of a thread
constexpr int64_t MOST_COLUMNS = 256;

inline INLINE Wide largest(Wide a, Wide b) { return a > b ? a : b; }

// e^x for x <= 0, to 2 units in the last place. x = n ln 2 + r; the polynomial is the Taylor series of e^r.
inline INLINE Wide exponential(Wide x) {
  x = largest(x, Wide{} - 87.0f);
  const Wide shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, n, in the lowest bits
  const Wide n = shifted - 12582912.0f;
  const Wide r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Wide p = r * (1 / 720.0f) + 1 / 120.0f;
  p = p * r + 1 / 24.0f;
  p = p * r + 1 / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (Wide)((WideBits)p + ((WideBits)shifted << 23));
}

struct Attention {
  const float *query;       // [kv_heads, heads, columns]
  const void *key, *value;  // [kv_heads, length, columns]
  float *y;                 // [kv_heads, heads, columns]
  int64_t kv_heads, heads, length, columns;
  int64_t head_stride, stride;  // of key and value, in numbers
  float scaling;                // of the query
  int threads;
};

// What is known of some keys: for each of WIDE heads the largest score, the sum of e^(score - largest), and the sum of the
// values so weighted.
struct Softmax {
  Wide largest, sum, values[MOST_COLUMNS];
};

// n rows in float32: as they are, or in `scratch`
template <int type>
const float *as_float32(const void *from, int64_t n, int64_t stride, int64_t columns, float *scratch) {
  if (type == FLOAT32 && stride == columns) return (const float *)from;
  const int64_t size = type == FLOAT32 ? 4 : 2;
  for (int64_t i = 0; i < n; i++)
    to_float32<type>((const char *)from + i * stride * size, columns, scratch + i * columns);
  return scratch;
}

template <int N>
inline INLINE void scores(const Wide *query, const float *key, int64_t columns, Wide *to) {
  Wide sum[N] = {};
  for (int64_t k = 0; k < columns; k++)
    each<N>([&](int i) INLINE { sum[i] += query[k] * key[i * columns + k]; });
  each<N>([&](int i) INLINE { to[i] = sum[i]; });
}

// Adds n keys, at most KEYS, to what is known.
inline void add_keys(const Wide *query, const float *key, const float *value, int64_t n, int64_t columns, Softmax *known) {
  Wide score[KEYS], largest_score = known->largest;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int64_t k = 0; k < 8 * columns; k += 16) {
      __builtin_prefetch(value + i * columns + k);
      __builtin_prefetch(key + (i + 8) * columns + k);
    }
    scores<8>(query, key + i * columns, columns, score + i);
  }
  for (; i < n; i++) scores<1>(query, key + i * columns, columns, score + i);
  for (i = 0; i < n; i++) largest_score = largest(largest_score, score[i]);
  const Wide shrink = exponential(known->largest - largest_score);
  Wide sum = known->sum * shrink;
  for (i = 0; i < n; i++) {
    sum += 0.0f * score[i];  // NaN, if it is not finite
    score[i] = exponential(score[i] - largest_score);
    sum += score[i];
  }
  known->largest = largest_score;
  known->sum = sum;
  constexpr int TOGETHER = 16;
  for (int64_t k = 0; k < columns; k += TOGETHER) {
    Wide total[TOGETHER];
    each<TOGETHER>([&](int c) INLINE { total[c] = known->values[k + c] * shrink; });
    for (i = 0; i < n; i++)
      each<TOGETHER>([&](int c) INLINE { total[c] += score[i] * value[i * columns + k + c]; });
    each<TOGETHER>([&](int c) INLINE { known->values[k + c] = total[c]; });
  }
}

template <int type>
void attention(const Attention &a) {
  const int64_t parts = (a.length + PART - 1) / PART, size = type == FLOAT32 ? 4 : 2;
  const int64_t blocks = (a.heads + WIDE - 1) / WIDE;  // of query heads, for each key-value head
  Buffer<Wide> query(a.kv_heads * blocks * a.columns);  // [kv_heads * blocks, columns][WIDE heads]
  Buffer<Softmax> known(a.kv_heads * blocks * parts);   // [kv_heads * blocks, parts]
  const Scratch<float> scratch(a.threads, 2 * KEYS * a.columns);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.kv_heads * blocks; i++)
      for (int64_t lane = 0; lane < WIDE; lane++) {
        const int64_t head = std::min(i % blocks * WIDE + lane, a.heads - 1);
        const float *from = a.query + (i / blocks * a.heads + head) * a.columns;
        for (int64_t k = 0; k < a.columns; k++) query[i * a.columns + k][lane] = from[k] * a.scaling;
      }

    float *keys = scratch.mine(), *values = keys + KEYS * a.columns;
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t h = 0; h < a.kv_heads; h++)
      for (int64_t part = 0; part < parts; part++) {
        for (int64_t i = h * blocks; i < (h + 1) * blocks; i++) {
          known[i * parts + part] = Softmax{};
          known[i * parts + part].largest = Wide{} - INFINITY;
        }
        const int64_t end = std::min((part + 1) * PART, a.length);
        for (int64_t begin = part * PART; begin < end; begin += KEYS) {
          const int64_t n = std::min(KEYS, end - begin), offset = (h * a.head_stride + begin * a.stride) * size;
          const float *key = as_float32<type>((const char *)a.key + offset, n, a.stride, a.columns, keys);
          const float *value = as_float32<type>((const char *)a.value + offset, n, a.stride, a.columns, values);
          for (int64_t i = h * blocks; i < (h + 1) * blocks; i++)
            add_keys(query + i * a.columns, key, value, n, a.columns, known + i * parts + part);
        }
      }
  }
  for (int64_t i = 0; i < a.kv_heads * blocks; i++) {
    const Softmax *of = known + i * parts;
    Softmax total = {};
    total.largest = of[0].largest;
    for (int64_t part = 1; part < parts; part++) total.largest = largest(total.largest, of[part].largest);
    for (int64_t part = 0; part < parts; part++) {
      const Wide weight = exponential(of[part].largest - total.largest);
      total.sum += of[part].sum * weight;
      for (int64_t k = 0; k < a.columns; k++) total.values[k] += of[part].values[k] * weight;
    }
    const int64_t first = i % blocks * WIDE;
    for (int64_t lane = 0; lane < WIDE && first + lane < a.heads; lane++)
      for (int64_t k = 0; k < a.columns; k++)
        a.y[(i / blocks * a.heads + first + lane) * a.columns + k] = total.values[k][lane] / total.sum[lane];
  }
}

// ---- Between the matrix multiplications. x and y are of any type; all is computed in float32.

constexpr int64_t PIECE = 256;  // numbers of a row that are converted at a time, and stay in the cache

template <int type> struct Number { typedef uint16_t T; };
template <> struct Number<FLOAT32> { typedef float T; };
template <int type> using Numbers = typename Number<type>::T;

// y = x * weight / sqrt(mean of x^2 + eps)
template <int type>
void rms_norm(const Numbers<type> *x, const float *weight, Numbers<type> *y, int64_t columns, float eps) {
  float piece[PIECE], squares = 0;
  for (int64_t k = 0; k < columns; k += PIECE) {
    const int64_t n = std::min(PIECE, columns - k);
    to_float32<type>(x + k, n, piece);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; i++) squares += piece[i] * piece[i];
  }
  const float factor = 1 / std::sqrt(squares / columns + eps);
  for (int64_t k = 0; k < columns; k += PIECE) {
    const int64_t n = std::min(PIECE, columns - k);
    to_float32<type>(x + k, n, piece);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) piece[i] = piece[i] * factor * weight[k + i];
    from_float32<type>(piece, n, y + k);
  }
}

// Rotates pairs of columns; `sin` is negated for the first of each.
template <int type>
void rotate(const Numbers<type> *x, const float *cos, const float *sin, Numbers<type> *y, int64_t columns) {
  float piece[PIECE], rotated[PIECE];
  for (int64_t k = 0; k < columns; k += PIECE) {
    const int64_t n = std::min(PIECE, columns - k);
    to_float32<type>(x + k, n, piece);
    for (int64_t i = 0; i < n; i += 2) {
      rotated[i] = piece[i] * cos[k + i] + piece[i + 1] * sin[k + i];
      rotated[i + 1] = piece[i + 1] * cos[k + i + 1] + piece[i] * sin[k + i + 1];
    }
    from_float32<type>(rotated, n, y + k);
  }
}

// y = gate / (1 + e^-gate) * up
template <int type>
void swiglu(const Numbers<type> *gate, const Numbers<type> *up, Numbers<type> *y, int64_t columns) {
  Wide g[PIECE / WIDE] = {}, u[PIECE / WIDE] = {};
  for (int64_t k = 0; k < columns; k += PIECE) {
    const int64_t n = std::min(PIECE, columns - k);
    to_float32<type>(gate + k, n, (float *)g);
    to_float32<type>(up + k, n, (float *)u);
    for (int64_t i = 0; i < PIECE / WIDE; i++) {
      const Wide e = exponential(g[i] < 0 ? g[i] : -g[i]);
      u[i] *= g[i] * (g[i] < 0 ? e : 1.0f + Wide{}) / (1.0f + e);
    }
    from_float32<type>((const float *)u, n, y + k);
  }
}

template <int type>
void rms_norms(const void *x, const float *weight, void *y, int64_t rows, int64_t columns, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
  for (int64_t i = 0; i < rows; i++)
    rms_norm<type>((const Numbers<type> *)x + i * columns, weight, (Numbers<type> *)y + i * columns, columns, eps);
}

struct Rotation {
  const void *x;           // [batch, heads, length, columns], with strides
  const float *cos, *sin;  // [batch, length, columns]; with angle_stride 0, the same for the whole batch
  void *y;                 // [batch, heads, length, columns]
  int64_t batch, heads, length, columns, batch_stride, head_stride, stride, angle_stride;
  int threads;
};

template <int type>
void rotate_all(const Rotation &r) {
#pragma omp parallel for collapse(2) num_threads(r.threads) if (r.length > 1)
  for (int64_t b = 0; b < r.batch; b++)
    for (int64_t h = 0; h < r.heads; h++)
      for (int64_t i = 0; i < r.length; i++) {
        const int64_t angles = b * r.angle_stride + i * r.columns;
        rotate<type>((const Numbers<type> *)r.x + b * r.batch_stride + h * r.head_stride + i * r.stride, r.cos + angles,
                     r.sin + angles, (Numbers<type> *)r.y + ((b * r.heads + h) * r.length + i) * r.columns, r.columns);
      }
}

template <int type>
void swiglus(const void *x, void *y, int64_t rows, int64_t columns, int threads) {
  prefer_large_pages(y, rows * columns * sizeof(Numbers<type>));
#pragma omp parallel for num_threads(threads) if (rows > 1)
  for (int64_t i = 0; i < rows; i++) {
    const Numbers<type> *gate = (const Numbers<type> *)x + 2 * i * columns;
    swiglu<type>(gate, gate + columns, (Numbers<type> *)y + i * columns, columns);
  }
}

// What the instruction set has to offer: vectors of `lanes` 32-bit numbers, and the product of bytes, four to a lane.

#if defined(__AVX512BW__) && defined(__AVX512VNNI__) && !defined(CHATGLM_SCALAR)
#define CHATGLM_VECTORS
typedef __m512i Ints;
typedef __m512 Floats;
constexpr int TILE_ROWS = 4, TILE_VECTORS = 3;  // two accumulators for each, all in registers
constexpr int STEPS = 8;  // of a block, written out
inline Ints load(const void *p) { return _mm512_loadu_si512(p); }
inline void store(void *p, Ints v) { _mm512_storeu_si512(p, v); }
inline Floats load_floats(const float *p) { return _mm512_loadu_ps(p); }
inline void store_floats(float *p, Floats v) { _mm512_storeu_ps(p, v); }
inline Ints repeat(int32_t v) { return _mm512_set1_epi32(v); }
inline Floats repeat_float(float v) { return _mm512_set1_ps(v); }
// (v ^ 8) & 15 in each byte: INT4 with 8 added, from the low and the high half
inline Ints low_half(Ints v) { return _mm512_ternarylogic_epi32(v, repeat(0x08080808), repeat(0x0f0f0f0f), 0x28); }
inline Ints high_half(Ints v) { return low_half(_mm512_srli_epi16(v, 4)); }
inline Ints whole_byte(Ints v) { return _mm512_xor_si512(v, repeat((int32_t)0x80808080)); }
template <int bits> inline Ints dot(Ints sum, Ints weight, Ints x) { return _mm512_dpbusd_epi32(sum, weight, x); }
constexpr int offset(int bits) { return bits == 4 ? 8 : 128; }
inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float total(Floats v) { return _mm512_reduce_add_ps(v); }
// Four numbers, as `lanes` says which to each lane
inline Floats pick(const float *p, Ints lanes) {
  return _mm512_permutexvar_ps(lanes, _mm512_broadcast_f32x4(_mm_loadu_ps(p)));
}
// The lanes of a and b in turn
inline void zip(Ints a, Ints b, Ints *first, Ints *second) {
  const Ints low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  *first = _mm512_permutex2var_epi32(a, low, b);
  *second = _mm512_permutex2var_epi32(a, _mm512_add_epi32(low, repeat(8)), b);
}

#elif defined(__AVX2__) && defined(__FMA__) && !defined(CHATGLM_SCALAR)
#define CHATGLM_VECTORS
typedef __m256i Ints;
typedef __m256 Floats;
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
#if defined(__AVXVNNI__)
constexpr int STEPS = 8;
#else
constexpr int STEPS = 1;
#endif
inline Ints load(const void *p) { return _mm256_loadu_si256((const Ints *)p); }
inline void store(void *p, Ints v) { _mm256_storeu_si256((Ints *)p, v); }
inline Floats load_floats(const float *p) { return _mm256_loadu_ps(p); }
inline void store_floats(float *p, Floats v) { _mm256_storeu_ps(p, v); }
inline Ints repeat(int32_t v) { return _mm256_set1_epi32(v); }
inline Floats repeat_float(float v) { return _mm256_set1_ps(v); }
inline Ints low_half(Ints v) {
  return _mm256_and_si256(_mm256_xor_si256(v, repeat(0x08080808)), repeat(0x0f0f0f0f));
}
inline Ints high_half(Ints v) { return low_half(_mm256_srli_epi16(v, 4)); }
#if defined(__AVXVNNI__)
inline Ints whole_byte(Ints v) { return _mm256_xor_si256(v, repeat((int32_t)0x80808080)); }
template <int bits> inline Ints dot(Ints sum, Ints weight, Ints x) { return _mm256_dpbusd_avx_epi32(sum, weight, x); }
constexpr int offset(int bits) { return bits == 4 ? 8 : 128; }
#else
inline Ints whole_byte(Ints v) { return v; }
template <int bits> inline Ints dot(Ints sum, Ints weight, Ints x) {
  // Pairs are summed in 16 bits, which 255 * 127 * 2 would not fit: INT8 keeps its sign and gives it to x instead.
  Ints pairs = bits == 4 ? _mm256_maddubs_epi16(weight, x)
                         : _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
constexpr int offset(int bits) { return bits == 4 ? 8 : 0; }
#endif
inline Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline float total(Floats v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline Floats pick(const float *p, Ints lanes) {
  return _mm256_permutevar8x32_ps(_mm256_broadcast_ps((const __m128 *)p), lanes);
}
inline void zip(Ints a, Ints b, Ints *first, Ints *second) {
  const Ints low = _mm256_unpacklo_epi32(a, b), high = _mm256_unpackhi_epi32(a, b);
  *first = _mm256_permute2x128_si256(low, high, 0x20);
  *second = _mm256_permute2x128_si256(low, high, 0x31);
}
#endif

#if defined(CHATGLM_VECTORS)

constexpr int64_t VECTOR = sizeof(Ints), LANES = VECTOR / 4;

// Lane j of vector i goes to lane i of vector j: zipping the halves moves the bits of an element's place round by one.
inline INLINE void transpose(Ints (&v)[LANES]) {
  for (int64_t size = 1; size < LANES; size *= 2) {
    Ints zipped[LANES];
    each<LANES / 2>([&](int i) INLINE { zip(v[i], v[i + LANES / 2], &zipped[2 * i], &zipped[2 * i + 1]); });
    each<LANES>([&](int i) INLINE { v[i] = zipped[i]; });
  }
}

// ---- Few rows: memory is the limit. The weight is read once, each thread's part as one long stream: several short ones
// in turn are slower. With three rows of activations or more the cache's bandwidth counts too, and a tile has several rows of both.

// A row of activations in the order in which unpacking leaves the weights. Each vector of INT4 holds 2 * VECTOR columns:
// the even ones, then the odd ones. The lanes of a product sum neighbouring columns, which share a scale.
struct FewRow {
  const int8_t *q;
  const float *scale;       // of each block
  const float *correction;  // what `offset` adds to the products of each group of columns, negated
};

template <int bits>
struct FewRowsLinear {
  static constexpr int64_t COLUMNS = VECTOR * 8 / bits;  // in a vector of weights
  static constexpr int64_t LANE_COLUMNS = COLUMNS / LANES;
  static constexpr int64_t X_ROWS = 4, WEIGHT_ROWS = 4;  // of the largest tile
  static constexpr int64_t AHEAD = 4096;  // bytes, to prefetch

  static void arrange(const int8_t *q, const float *scale, int64_t columns, int64_t vectors, int64_t group_size, int8_t *to,
                      float *correction) {
    for (int64_t b = 0; b * BLOCK < columns; b++) {  // what is padded adds nothing, and has no group
      int32_t sum = 0;
      for (int64_t i = b * BLOCK; i < (b + 1) * BLOCK; i++) sum += q[i];
      correction[b * BLOCK / group_size] -= offset(bits) * sum * scale[b];
    }
    if (bits == 8) {
      memcpy(to, q, vectors * COLUMNS);
      return;
    }
    for (int64_t v = 0; v < vectors; v++)
      for (int64_t i = 0; i < VECTOR; i++) {
        to[v * COLUMNS + i] = q[v * COLUMNS + 2 * i];
        to[v * COLUMNS + VECTOR + i] = q[v * COLUMNS + 2 * i + 1];
      }
  }

  struct Scales {
    const float *of_row;  // of the weight, `stride` to the next row
    int64_t stride;
    Ints block_of_lane, group_of_lane;
  };

  // y[m * p.out + r] = product of R rows of the weight with M rows of activations
  template <int M, int R, bool grouped>
  static void tile(const Problem &p, const int8_t *weight, const Scales &scales, const FewRow *x, float *y) {
    const int64_t bytes = p.row_bytes(), full = bytes / VECTOR;
    Floats sum[R][M];
    for (auto &row : sum)
      for (auto &element : row) element = repeat_float(0);
    auto step = [&](const int8_t *at, int64_t stride, int64_t v) INLINE {
      each<R>([&](int r) INLINE {
        const Ints packed = load(at + r * stride);
        const Ints first = bits == 4 ? high_half(packed) : whole_byte(packed), second = low_half(packed);
        const Floats group_scale =
            grouped ? pick(scales.of_row + r * scales.stride + v * COLUMNS / p.group_size(), scales.group_of_lane)
                    : repeat_float(1);
        each<M>([&](int m) INLINE {
          Ints product = dot<bits>(repeat(0), first, load(x[m].q + v * COLUMNS));
          if (bits == 4) product = dot<bits>(product, second, load(x[m].q + v * COLUMNS + VECTOR));
          Floats s = pick(x[m].scale + v * COLUMNS / BLOCK, scales.block_of_lane);
          if (grouped) s = multiply(s, group_scale);
          sum[r][m] = multiply_add(to_floats(product), s, sum[r][m]);
        });
      });
    };
#pragma GCC unroll 2
    for (int64_t v = 0; v < full; v++) {
      const int8_t *at = weight + v * VECTOR;
      // One row is a stream that goes on. Of several rows it is the same place in the next ones, a jump.
      for (int r = 0; r < R; r++) __builtin_prefetch(at + r * bytes + (R == 1 ? AHEAD : R * bytes));
      step(at, bytes, v);
    }
    if (full * VECTOR < bytes) {
      int8_t rest[R][VECTOR] = {};
      for (int r = 0; r < R; r++) memcpy(rest[r], weight + r * bytes + full * VECTOR, bytes - full * VECTOR);
      step(rest[0], VECTOR, full);
    }
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++) {
        const float *scale = scales.of_row + r * scales.stride;
        float corrected = total(sum[r][m]);
        if (grouped) {
#pragma omp simd reduction(+ : corrected)
          for (int64_t g = 0; g < p.groups; g++) corrected += scale[g] * x[m].correction[g];
        } else {
          corrected = (corrected + x[m].correction[0]) * scale[0];
        }
        y[m * p.out + r] = corrected;
      }
  }

  template <bool grouped>
  static void run(const Problem &p) {
    const int64_t padded = round_up(p.in, PADDING), vectors = padded / COLUMNS;
    const int64_t scales = p.groups + 4, blocks = padded / BLOCK + 4;  // `pick` reads four
    Buffer<int8_t> q(p.rows * padded);
    Buffer<float> block_scale(p.rows * blocks), correction(p.rows * scales);
    const Scratch<int8_t> natural_scratch(p.threads, padded);
    const Scratch<float> scale_scratch(p.threads, WEIGHT_ROWS * scales);
    FewRow x[FEW_ROWS];
    int32_t block_of[LANES], group_of[LANES];
    for (int64_t lane = 0; lane < LANES; lane++) {
      block_of[lane] = lane * LANE_COLUMNS / BLOCK;
      group_of[lane] = lane * LANE_COLUMNS / p.group_size();
    }
    const Ints block_of_lane = load(block_of), group_of_lane = load(group_of);
#pragma omp parallel num_threads(p.threads)
    {
      int8_t *natural = natural_scratch.mine();
      float *scale = scale_scratch.mine();
      memset(natural, 0, padded);
      memset(scale, 0, WEIGHT_ROWS * scales * sizeof(float));
#pragma omp for schedule(static)
      for (int64_t m = 0; m < p.rows; m++) {
        x[m] = {q + m * padded, block_scale + m * blocks, correction + m * scales};
        memset(block_scale + m * blocks, 0, blocks * sizeof(float));
        memset(correction + m * scales, 0, scales * sizeof(float));
        quantize_row(p.x + m * p.in, p.in, natural, block_scale + m * blocks);
        arrange(natural, block_scale + m * blocks, p.in, vectors, p.group_size(), q + m * padded, correction + m * scales);
      }
      const int64_t together = p.rows < 3 ? 1 : WEIGHT_ROWS;
#pragma omp for schedule(guided, 64)
      for (int64_t n = 0; n < p.out; n += together) {
        const int64_t count = std::min(together, p.out - n);
        for (int64_t r = 0; r < count; r++) p.read_scales(n + r, scale + r * scales);
        for (int64_t m = 0, done; m < p.rows; m += done) {
          const int64_t left = p.rows - m;
          done = count == WEIGHT_ROWS ? std::min<int64_t>(left, X_ROWS) : left >= 2 ? 2 : 1;
          for (int64_t r = 0; r < count; r += done >= 3 ? count : 1) {
            const int8_t *weight = p.weight + (n + r) * p.row_bytes();
            const Scales s = {scale + r * scales, scales, block_of_lane, group_of_lane};
            float *y = p.y + m * p.out + n + r;
            if (done == 4) tile<4, WEIGHT_ROWS, grouped>(p, weight, s, x + m, y);
            if (done == 3) tile<3, WEIGHT_ROWS, grouped>(p, weight, s, x + m, y);
            if (done == 2) tile<2, 1, grouped>(p, weight, s, x + m, y);
            if (done == 1) tile<1, 1, grouped>(p, weight, s, x + m, y);
          }
        }
      }
    }
  }
};

// ---- Many rows: arithmetic is the limit. A panel of the weight is unpacked and transposed, so that the lanes are its
// rows, and stays in the cache while all activations pass by, a tile of accumulators in registers at a time.

template <int bits>
struct ManyRowsLinear {
  static constexpr int64_t PANEL = TILE_VECTORS * LANES;  // rows of the weight
  static constexpr int64_t DEPTH = 2048;                  // columns unpacked at a time

  struct Activations {
    int8_t *q;       // [rows, columns]; for INT4, of each 8 columns first the even ones, then the odd ones
    float *scale;    // [rows, blocks]
    int32_t *start;  // [rows, blocks], -offset * sum of q
    int64_t columns, blocks;
  };

  static void quantize(const Problem &p, int64_t m, const Activations &x) {
    int8_t *q = x.q + m * x.columns;
    float *scale = x.scale + m * x.blocks;
    memset(q, 0, x.columns);
    memset(scale, 0, x.blocks * sizeof(float));
    if (m < p.rows) quantize_row(p.x + m * p.in, p.in, q, scale);
    for (int64_t b = 0; b < x.blocks; b++) {
      int32_t sum = 0;
      for (int64_t i = 0; i < BLOCK; i++) sum += q[b * BLOCK + i];
      x.start[m * x.blocks + b] = -offset(bits) * sum;
    }
    if (bits == 4)
      for (int64_t i = 0; i < x.columns; i += 8) {
        int8_t even_odd[8];
        for (int j = 0; j < 4; j++) {
          even_odd[j] = q[i + 2 * j];
          even_odd[4 + j] = q[i + 2 * j + 1];
        }
        memcpy(q + i, even_odd, 8);
      }
  }

  // Columns [begin, begin + columns) of `count` rows, as [columns / 4][PANEL][4]; beyond the matrix anything will do for
  // rows, as they are not written, and for columns, as activations are zero there.
  static void unpack(const Problem &p, int64_t row, int64_t count, int64_t begin, int64_t columns, uint8_t *to) {
    const int64_t bytes = p.row_bytes();
    const int64_t available = (std::min(begin + columns, p.in) - begin) * bits / 8, wanted = columns * bits / 8;
    for (int64_t r = 0; r < TILE_VECTORS; r++)
      for (int64_t begin_byte = 0; begin_byte < wanted; begin_byte += VECTOR) {
        const int64_t n = std::min(VECTOR, available - begin_byte);
        Ints packed[LANES];
        each<LANES>([&](int lane) INLINE {
          const int64_t weight_row = row + std::min(r * LANES + lane, count - 1);
          const int8_t *from = p.weight + weight_row * bytes + begin * bits / 8 + begin_byte;
          if (n == VECTOR) {
            packed[lane] = load(from);
          } else {
            int8_t rest[VECTOR] = {};
            if (n > 0) memcpy(rest, from, n);
            packed[lane] = load(rest);
          }
        });
        transpose(packed);
        each<LANES>([&](int i) INLINE {
          const int64_t k = begin_byte + 4 * i;
          if (bits == 8) {
            store(to + (k / 4 * TILE_VECTORS + r) * VECTOR, whole_byte(packed[i]));
          } else {
            store(to + (k / 2 * TILE_VECTORS + r) * VECTOR, high_half(packed[i]));
            store(to + ((k / 2 + 1) * TILE_VECTORS + r) * VECTOR, low_half(packed[i]));
          }
        });
      }
  }

  // sum[TILE_ROWS, PANEL] += activations from row m on * a panel, over `blocks` blocks
  template <bool grouped>
  static void tile(const Activations &x, int64_t m, int64_t first_block, int64_t blocks, const uint8_t *panel,
                   const float *scale, int64_t blocks_in_group, float *sum) {
    Floats total[TILE_ROWS][TILE_VECTORS];
    each<TILE_ROWS>([&](int i) INLINE {
      each<TILE_VECTORS>([&](int r) INLINE { total[i][r] = load_floats(sum + i * PANEL + r * LANES); });
    });
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t block = first_block + b;
      Ints product[TILE_ROWS][TILE_VECTORS];
      each<TILE_ROWS>([&](int i) INLINE {
        const Ints start = repeat(x.start[(m + i) * x.blocks + block]);
        each<TILE_VECTORS>([&](int r) INLINE { product[i][r] = start; });
      });
      const int8_t *q = x.q + m * x.columns + block * BLOCK;
      const uint8_t *weights = panel + b * BLOCK * PANEL;
      for (int64_t k = 0; k < BLOCK; k += 4 * STEPS)
        each<STEPS>([&](int s) INLINE {
          Ints weight[TILE_VECTORS];
          each<TILE_VECTORS>([&](int r) INLINE { weight[r] = load(weights + (k + 4 * s) * PANEL + r * VECTOR); });
          each<TILE_ROWS>([&](int i) INLINE {
            int32_t four;
            memcpy(&four, q + i * x.columns + k + 4 * s, 4);
            const Ints activations = repeat(four);
            each<TILE_VECTORS>([&](int r) INLINE { product[i][r] = dot<bits>(product[i][r], weight[r], activations); });
          });
        });
      const float *group_scale = scale + b / blocks_in_group * PANEL;
      each<TILE_ROWS>([&](int i) INLINE {
        const Floats s = repeat_float(x.scale[(m + i) * x.blocks + block]);
        each<TILE_VECTORS>([&](int r) INLINE {
          const Floats both = grouped ? multiply(s, load_floats(group_scale + r * LANES)) : s;
          total[i][r] = multiply_add(to_floats(product[i][r]), both, total[i][r]);
        });
      });
    }
    each<TILE_ROWS>([&](int i) INLINE {
      each<TILE_VECTORS>([&](int r) INLINE { store_floats(sum + i * PANEL + r * LANES, total[i][r]); });
    });
  }

  template <bool grouped>
  static void run(const Problem &p) {
    const int64_t columns = round_up(p.in, PADDING), blocks = columns / BLOCK, rows = round_up(p.rows, TILE_ROWS);
    Buffer<int8_t> q(rows * columns);
    Buffer<float> x_scale(rows * blocks);
    Buffer<int32_t> start(rows * blocks);
    const Activations x = {q, x_scale, start, columns, blocks};
    const int64_t groups_in_depth = grouped ? DEPTH / p.group_size() : 1;
    const Scratch<uint8_t> panel_scratch(p.threads, PANEL * DEPTH);
    const Scratch<float> sum_scratch(p.threads, rows * PANEL), scale_scratch(p.threads, PANEL * p.groups);
    const Scratch<float> panel_scale_scratch(p.threads, PANEL * groups_in_depth);
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(static)
      for (int64_t m = 0; m < rows; m++) quantize(p, m, x);

      uint8_t *panel = panel_scratch.mine();
      float *sum = sum_scratch.mine(), *scale = scale_scratch.mine(), *panel_scale = panel_scale_scratch.mine();
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < p.out; n += PANEL) {
        const int64_t count = std::min(PANEL, p.out - n);
        memset(sum, 0, rows * PANEL * sizeof(float));
        for (int64_t r = 0; r < PANEL; r++) p.read_scales(n + std::min(r, count - 1), scale + r * p.groups);
        for (int64_t begin = 0; begin < columns; begin += DEPTH) {
          const int64_t depth = std::min(DEPTH, columns - begin);
          unpack(p, n, count, begin, depth, panel);
          for (int64_t g = 0; grouped && g < groups_in_depth; g++)
            for (int64_t r = 0; r < PANEL; r++) {
              int64_t group = std::min(begin / p.group_size() + g, p.groups - 1);
              panel_scale[g * PANEL + r] = scale[r * p.groups + group];
            }
          for (int64_t m = 0; m < rows; m += TILE_ROWS)
            tile<grouped>(x, m, begin / BLOCK, depth / BLOCK, panel, panel_scale, p.group_size() / BLOCK + !grouped,
                          sum + m * PANEL);
        }
        for (int64_t m = 0; m < p.rows; m++)
          for (int64_t r = 0; r < count; r++)
            p.y[m * p.out + n + r] = sum[m * PANEL + r] * (grouped ? 1 : scale[r]);
      }
    }
  }
};

#if defined(__AVX512BF16__)
#define CHATGLM_BFLOAT16

// ---- Many rows of activations times weights in half precision, on CPUs that multiply pairs of bfloat16; sums are in float32.
// As above, a panel of the weight is transposed, here as pairs of columns, and stays in the cache.

template <int type>
struct ManyRowsHalf {
  static constexpr int ROWS = 8, VECTORS = 3;  // of a tile, whose accumulators are all in registers
  static constexpr int64_t PANEL = VECTORS * LANES, DEPTH = 2048, COLUMNS = VECTOR / 2;

  // COLUMNS numbers as bfloat16: those of n that are there, then zeros
  static Ints read(const uint16_t *p, int64_t n) {
    uint16_t rest[COLUMNS] = {};
    if (n < COLUMNS) {
      if (n > 0) memcpy(rest, p, n * sizeof(uint16_t));
      p = rest;
    }
    if (type == BFLOAT16) return load(p);
    return (Ints)_mm512_cvtne2ps_pbh((Floats)widen<type>(p + WIDE), (Floats)widen<type>(p));
  }

  // LANES numbers, of which n are written
  static void write(Floats numbers, int64_t n, uint16_t *to) {
    const Halves halves = narrow<type>((Wide)numbers);
    memcpy(to, &halves, std::min(n, LANES) * sizeof(uint16_t));
  }

  // Columns [begin, begin + columns) of `count` rows, as [columns / 2][PANEL][2]
  static void unpack(const uint16_t *weight, int64_t in, int64_t count, int64_t begin, int64_t columns, uint16_t *to) {
    for (int64_t v = 0; v < VECTORS; v++)
      for (int64_t k = 0; k < columns; k += COLUMNS) {
        Ints pairs[LANES];
        each<LANES>([&](int lane) INLINE {
          const int64_t row = std::min(v * LANES + lane, count - 1);
          pairs[lane] = read(weight + row * in + begin + k, in - begin - k);
        });
        transpose(pairs);
        each<LANES>([&](int i) INLINE { store(to + (k + 2 * i) * PANEL + v * COLUMNS, pairs[i]); });
      }
  }

  // sum[ROWS, PANEL] += x, [ROWS, stride], * a panel
  static void tile(const uint16_t *x, int64_t stride, const uint16_t *panel, int64_t columns, float *sum) {
    Floats total[ROWS][VECTORS];
    each<ROWS>([&](int i) INLINE {
      each<VECTORS>([&](int v) INLINE { total[i][v] = load_floats(sum + i * PANEL + v * LANES); });
    });
    for (int64_t k = 0; k < columns; k += 2) {
      Ints weights[VECTORS];
      each<VECTORS>([&](int v) INLINE { weights[v] = load(panel + k * PANEL + v * COLUMNS); });
      each<ROWS>([&](int i) INLINE {
        int32_t pair;
        memcpy(&pair, x + i * stride + k, 4);
        const Ints activations = repeat(pair);
        each<VECTORS>([&](int v) INLINE {
          total[i][v] = _mm512_dpbf16_ps(total[i][v], (__m512bh)weights[v], (__m512bh)activations);
        });
      });
    }
    each<ROWS>([&](int i) INLINE {
      each<VECTORS>([&](int v) INLINE { store_floats(sum + i * PANEL + v * LANES, total[i][v]); });
    });
  }

  static void run(const uint16_t *x, const uint16_t *weight, uint16_t *y, int64_t rows, int64_t out, int64_t in,
                  int threads) {
    const int64_t columns = round_up(in, COLUMNS), padded = round_up(rows, ROWS);
    Buffer<uint16_t> activations(padded * columns);
    const Scratch<uint16_t> panel_scratch(threads, PANEL * DEPTH);
    const Scratch<float> sum_scratch(threads, padded * PANEL);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t m = 0; m < padded; m++)
        for (int64_t k = 0; k < columns; k += COLUMNS)
          store(activations + m * columns + k, read(x + m * in + k, m < rows ? in - k : 0));

      uint16_t *panel = panel_scratch.mine();
      float *sum = sum_scratch.mine();
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < out; n += PANEL) {
        const int64_t count = std::min(PANEL, out - n);
        memset(sum, 0, padded * PANEL * sizeof(float));
        for (int64_t begin = 0; begin < columns; begin += DEPTH) {
          const int64_t depth = std::min(DEPTH, columns - begin);
          unpack(weight + n * in, in, count, begin, depth, panel);
          for (int64_t m = 0; m < padded; m += ROWS)
            tile(activations + m * columns + begin, columns, panel, depth, sum + m * PANEL);
        }
        for (int64_t m = 0; m < rows; m++)
          for (int64_t r = 0; r < count; r += LANES)
            write(load_floats(sum + m * PANEL + r), count - r, y + m * out + n + r);
      }
    }
  }
};

#endif

template <int bits>
void linear(const Problem &p) {
  if (p.rows <= FEW_ROWS) {
    p.groups > 1 ? FewRowsLinear<bits>::template run<true>(p) : FewRowsLinear<bits>::template run<false>(p);
  } else {
    p.groups > 1 ? ManyRowsLinear<bits>::template run<true>(p) : ManyRowsLinear<bits>::template run<false>(p);
  }
}

#else  // Loops that compilers turn into what vector instructions there are.

template <int bits>
void linear(const Problem &p) {
  const int64_t blocks = (p.in + BLOCK - 1) / BLOCK;
  Buffer<int8_t> x(p.rows * p.in);
  Buffer<float> x_scale(p.rows * blocks);
  const Scratch<int8_t> weight_scratch(p.threads, p.in);
  const Scratch<float> scale_scratch(p.threads, p.groups);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < p.rows; m++) quantize_row(p.x + m * p.in, p.in, x + m * p.in, x_scale + m * blocks);

    int8_t *weight = weight_scratch.mine();
    float *scale = scale_scratch.mine();
#pragma omp for schedule(dynamic, 64)
    for (int64_t n = 0; n < p.out; n++) {
      unpack_row<bits>(p.weight + n * p.row_bytes(), p.in, weight);
      p.read_scales(n, scale);
      for (int64_t m = 0; m < p.rows; m++) {
        float total = 0;
        for (int64_t b = 0; b < blocks; b++) {
          int32_t sum = 0;
          const int64_t end = std::min((b + 1) * BLOCK, p.in);
          for (int64_t k = b * BLOCK; k < end; k++) sum += (int32_t)x[m * p.in + k] * weight[k];
          total += sum * x_scale[m * blocks + b] * scale[b * BLOCK / p.group_size()];
        }
        p.y[m * p.out + n] = total;
      }
    }
  }
}

#endif

// ---- A layer for one token of each of a few sequences, as modeling_chatglm.py has it: all results are rounded as there.

struct Matrix {
  const void *weight, *scale, *bias;  // the bias is of the layer's type
  int64_t out, in, groups;
  int bits, scale_type;  // 16 bits: a weight of the layer's type, without scales
};

struct Layer {
  const void *input_norm, *attention_norm;
  Matrix qkv, dense, gate_and_up, down;
  void *key, *value;  // [rows, kv_heads, length, columns], with head_stride; those of the token are written, as the last ones
  int64_t heads, kv_heads, columns, length, head_stride;  // heads: for each key-value head
  float input_eps, attention_eps, scaling;
};

struct Token {
  const void *cos, *sin;       // [rows or 1, columns]
  void *y;                     // [rows, hidden]: the input, then the output
  int64_t rows, angle_stride;  // angle_stride 0: the same angles for all rows
  int threads;
};

// y += x
template <int type>
void add(Numbers<type> *y, const Numbers<type> *x, int64_t n) {
  float a[PIECE], b[PIECE];
  for (int64_t k = 0; k < n; k += PIECE) {
    const int64_t size = std::min(PIECE, n - k);
    to_float32<type>(y + k, size, a);
    to_float32<type>(x + k, size, b);
    for (int64_t i = 0; i < size; i++) a[i] += b[i];
    from_float32<type>(a, size, y + k);
  }
}

template <int type>
void layer(const Layer &l, const Token &token) {
  typedef Numbers<type> T;
  const int64_t rows = token.rows, hidden = l.dense.out, queries = l.dense.in, width = l.down.in;
  const int64_t heads = l.kv_heads * l.heads, widest = std::max({hidden, l.qkv.out, l.gate_and_up.out});
  Buffer<T> inputs(rows * widest), outputs(rows * widest);
  Buffer<float> wide_inputs(rows * widest), wide_outputs(rows * widest);
  Buffer<float> norm_weight(hidden), angles(2 * rows * l.columns);
  T *y = (T *)token.y;

  const auto wide = [&](int64_t n) { return as_float32<type>(inputs, 1, n, n, wide_inputs); };
  float *const products = type == FLOAT32 ? (float *)outputs.data : wide_outputs.data;
  const auto multiply = [&](const Matrix &matrix) {
    if (matrix.bits == 16) {
      if constexpr (type != FLOAT32)
        half_linear<type>(inputs, (const uint16_t *)matrix.weight, products, rows, matrix.out, matrix.in, token.threads);
    } else {
      const Problem p = {wide(rows * matrix.in), (const int8_t *)matrix.weight, matrix.scale, matrix.scale_type, products, rows,
                         matrix.out, matrix.in, matrix.groups, matrix.bits, token.threads};
      matrix.bits == 4 ? linear<4>(p) : linear<8>(p);
    }
    if (type != FLOAT32) from_float32<type>(products, rows * matrix.out, outputs);
    for (int64_t m = 0; matrix.bias && m < rows; m++) add<type>(outputs + m * matrix.out, (const T *)matrix.bias, matrix.out);
  };
  const auto norm = [&](const void *of, float eps) {
    to_float32<type>(of, hidden, norm_weight);
    rms_norms<type>(y, norm_weight, inputs, rows, hidden, eps, token.threads);
  };

  norm(l.input_norm, l.input_eps);
  multiply(l.qkv);
  for (int64_t m = 0; m < rows; m++) {
    float *cos = angles, *sin = cos + l.columns;
    to_float32<type>((const T *)token.cos + m * token.angle_stride, l.columns, cos);
    to_float32<type>((const T *)token.sin + m * token.angle_stride, l.columns, sin);
    const T *from = outputs + m * l.qkv.out;
    for (int64_t h = 0; h < heads; h++, from += l.columns)
      rotate<type>(from, cos, sin, inputs + m * queries + h * l.columns, l.columns);
    for (int64_t h = 0; h < l.kv_heads; h++, from += l.columns) {
      const int64_t last = (m * l.kv_heads + h) * l.head_stride + (l.length - 1) * l.columns;
      rotate<type>(from, cos, sin, (T *)l.key + last, l.columns);
      memcpy((T *)l.value + last, from + l.kv_heads * l.columns, l.columns * sizeof(T));
    }
  }
  attention<type>({wide(rows * queries), l.key, l.value, products, rows * l.kv_heads, l.heads, l.length, l.columns,
                   l.head_stride, l.columns, l.scaling, token.threads});
  from_float32<type>(products, rows * queries, inputs);
  multiply(l.dense);
  add<type>(y, outputs, rows * hidden);

  norm(l.attention_norm, l.attention_eps);
  multiply(l.gate_and_up);
  for (int64_t m = 0; m < rows; m++) {
    const T *gate = outputs + m * 2 * width;
    swiglu<type>(gate, gate + width, inputs + m * width, width);
  }
  multiply(l.down);
  add<type>(y, outputs, rows * hidden);
}

}  // namespace

// Both return 0, or 1 if there is not enough memory. Groups are multiples of 32 columns; `in` is even for INT4.
extern "C" int chatglm_linear(const float *x, const int8_t *weight, const void *scale, int scale_type, float *y,
                              int64_t rows, int64_t out, int64_t in, int64_t groups, int bits, int threads) {
  const Problem p = {x, weight, scale, scale_type, y, rows, out, in, groups, bits, threads};
  prefer_large_pages(y, rows * out * sizeof(float));
  try {
    bits == 4 ? linear<4>(p) : linear<8>(p);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

// x and weight are both in float16, or both in bfloat16. Returns 1 if there is not enough memory.
extern "C" int chatglm_half_linear(const uint16_t *x, const uint16_t *weight, int type, float *y, int64_t rows, int64_t out,
                                   int64_t in, int threads) {
  try {
    if (type == FLOAT16)
      half_linear<FLOAT16>(x, weight, y, rows, out, in, threads);
    else
      half_linear<BFLOAT16>(x, weight, y, rows, out, in, threads);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

// Whether chatglm_half_matmul multiplies.
extern "C" int chatglm_has_half_matmul() {
#if defined(CHATGLM_BFLOAT16)
  return 1;
#else
  return 0;
#endif
}

// All are in float16, or all in bfloat16. Returns 1 if there is not enough memory.
extern "C" int chatglm_half_matmul(const uint16_t *x, const uint16_t *weight, int type, uint16_t *y, int64_t rows,
                                   int64_t out, int64_t in, int threads) {
#if defined(CHATGLM_BFLOAT16)
  prefer_large_pages(y, rows * out * sizeof(uint16_t));
  try {
    if (type == FLOAT16)
      ManyRowsHalf<FLOAT16>::run(x, weight, y, rows, out, in, threads);
    else
      ManyRowsHalf<BFLOAT16>::run(x, weight, y, rows, out, in, threads);
    return 0;
  } catch (const std::bad_alloc &) {
  }
#endif
  return 1;
}

// Returns 1 if there is not enough memory. `columns` is a multiple of 16, at most 256.
extern "C" int chatglm_attention(const float *query, const void *key, const void *value, int type, float *y,
                                 int64_t kv_heads, int64_t heads, int64_t length, int64_t columns, int64_t head_stride,
                                 int64_t stride, float scaling, int threads) {
  const Attention a = {query, key, value, y, kv_heads, heads, length, columns, head_stride, stride, scaling, threads};
  try {
    if (type == FLOAT32) attention<FLOAT32>(a);
    if (type == FLOAT16) attention<FLOAT16>(a);
    if (type == BFLOAT16) attention<BFLOAT16>(a);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

// x and y are of `type`, and the rest is in float32.
extern "C" void chatglm_rms_norm(const void *x, int type, const float *weight, void *y, int64_t rows, int64_t columns,
                                 float eps, int threads) {
  if (type == FLOAT32) rms_norms<FLOAT32>(x, weight, y, rows, columns, eps, threads);
  if (type == FLOAT16) rms_norms<FLOAT16>(x, weight, y, rows, columns, eps, threads);
  if (type == BFLOAT16) rms_norms<BFLOAT16>(x, weight, y, rows, columns, eps, threads);
}

extern "C" void chatglm_rotate(const void *x, int type, const float *cos, const float *sin, void *y, int64_t batch,
                               int64_t heads, int64_t length, int64_t columns, int64_t batch_stride, int64_t head_stride,
                               int64_t stride, int64_t angle_stride, int threads) {
  const Rotation r = {x, cos, sin, y, batch, heads, length, columns, batch_stride, head_stride, stride, angle_stride, threads};
  if (type == FLOAT32) rotate_all<FLOAT32>(r);
  if (type == FLOAT16) rotate_all<FLOAT16>(r);
  if (type == BFLOAT16) rotate_all<BFLOAT16>(r);
}

// x is [rows, 2 * columns], gate and up.
extern "C" void chatglm_swiglu(const void *x, int type, void *y, int64_t rows, int64_t columns, int threads) {
  if (type == FLOAT32) swiglus<FLOAT32>(x, y, rows, columns, threads);
  if (type == FLOAT16) swiglus<FLOAT16>(x, y, rows, columns, threads);
  if (type == BFLOAT16) swiglus<BFLOAT16>(x, y, rows, columns, threads);
}

// Returns 1 if there is not enough memory. `columns` is a multiple of 16, at most 256.
extern "C" int chatglm_layers(const Layer *layers, int64_t n, const void *cos, const void *sin, void *y, int64_t rows,
                              int64_t angle_stride, int type, int threads) {
  const Token token = {cos, sin, y, rows, angle_stride, threads};
  try {
    for (int64_t i = 0; i < n; i++) {
      if (type == FLOAT32) layer<FLOAT32>(layers[i], token);
      if (type == FLOAT16) layer<FLOAT16>(layers[i], token);
      if (type == BFLOAT16) layer<BFLOAT16>(layers[i], token);
    }
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

extern "C" int chatglm_dequantize(const int8_t *weight, const void *scale, int scale_type, void *y, int y_type,
                                  int64_t out, int64_t in, int64_t groups, int bits, int threads) {
  const Problem p = {nullptr, weight, scale, scale_type, nullptr, 0, out, in, groups, bits, threads};
  try {
    if (y_type == FLOAT32)
      bits == 4 ? dequantize<4>(p, (float *)y) : dequantize<8>(p, (float *)y);
    else
      bits == 4 ? dequantize<4>(p, (uint16_t *)y) : dequantize<8>(p, (uint16_t *)y);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}
"""
