"""The arithmetic of quantized weights: in plain torch and in C++ for the CPU; in Triton for GPUs in quantization_gpu.py.

`quantized_linear` chooses among them. The plain path is always right; the others are faster. The C++ is compiled at first
use for the machine it is on; its text is in this file as remote code is loaded from Python files alone.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import nn
from transformers.utils import logging

from .quantization_gpu import HAS_TRITON, gpu_linear


logger = logging.get_logger(__name__)


def is_traced(x: torch.Tensor) -> bool:
    """Whether operations on it are recorded, by torch.compile or another, so that its data is not to be touched."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (torch.Tensor, nn.Parameter)


# The number formats


def pack_int4(quantized: torch.Tensor) -> torch.Tensor:
    """Packs int8 `[out, in]` with values in -8..7 into `[out, in / 2]`, even columns in the high half of the byte."""
    return (quantized[:, 0::2] << 4) | (quantized[:, 1::2] & 15)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`. Shifts of int8 are arithmetic: they keep the sign."""
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """
    Returns the matrix `[out, in]` in the dtype of `scale`.

    Args:
        weight: int8 `[out, in]`, or packed `[out, in / 2]` if `bits` is 4.
        scale: One for each row, `[out]`, or for each group of columns, `[out, groups]`.

    Raises:
        ValueError: if there are too few or too many scales.
    """
    columns = weight.shape[1] * 8 // bits
    if len(scale) != len(weight) or (scale.ndim == 2 and columns % scale.shape[1]):
        raise ValueError(f"Scales {list(scale.shape)} do not fit a weight {[len(weight), columns]}.")
    if scale.dtype == torch.float32 and not is_traced(weight) and weight.device.type == "cpu" and cpu_library():
        return cpu_dequantize(weight, scale, bits)
    quantized = (unpack_int4(weight) if bits == 4 else weight).to(scale.dtype)
    # In place: the memory of a second matrix would have to be mapped anew, which takes longer than the product.
    if scale.ndim == 1:
        return quantized.mul_(scale[:, None])
    return quantized.unflatten(1, (scale.shape[1], -1)).mul_(scale[:, :, None]).flatten(1)


# Plain torch

CHUNK_ROWS = 1024  # of the weight: 16 MB as float32 in the 6B shape, which stays in the cache until it is multiplied


def chunked_linear(x: torch.Tensor, out_features: int, rows_as_float, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    `x @ weight.T + bias` in float32, for a weight that is turned into float32 chunk by chunk, so that it never is as a
    whole.

    Args:
        x: `[rows, in]`.
        rows_as_float: Called with a slice of the weight's rows, returns them in float32, `[n, in]`.
        bias: `[out]`.

    Returns:
        `[rows, out]`, in the dtype of `x`.
    """
    output = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    x = x.float()
    with torch.autocast("cpu", enabled=False):
        for start in range(0, out_features, CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            part, weight = output[:, rows], rows_as_float(rows)
            if bias is None and part.dtype == weight.dtype:
                torch.mm(x, weight.T, out=part)  # a copy would take a tenth of the time
            else:
                part.copy_(nn.functional.linear(x, weight, None if bias is None else bias[rows].float()))
    return output


def torch_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """`x @ weight.T` for x `[rows, in]`, in plain torch on any device."""
    if x.device.type != "cpu":
        return nn.functional.linear(x, dequantize_weight(weight, scale.to(x.dtype), bits))
    int8_matmul = getattr(torch, "_weight_int8pack_mm", None)
    is_supported = int8_matmul is not None and scale.ndim == 1 and x.dtype in SCALE_TYPES
    # For bfloat16 torch (2.13) reads beyond the rows if they are no multiple of 16.
    if is_supported and x.shape[0] <= FEW_ROWS and x.shape[1] % 16 == 0:
        if bits == 8:
            return int8_matmul(x.contiguous(), weight, scale.to(x.dtype))
        chunks = zip(weight.split(CHUNK_ROWS), scale.to(x.dtype).split(CHUNK_ROWS))
        return torch.cat([int8_matmul(x.contiguous(), unpack_int4(w), s) for w, s in chunks], dim=1)

    def rows_as_float(rows: slice) -> torch.Tensor:
        return dequantize_weight(weight[rows], scale[rows].float(), bits)

    return chunked_linear(x, weight.shape[0], rows_as_float)


# C++ for the CPU

# Up to so many rows a weight is read from memory as it is used (decoding, small batches, speculation); beyond, it is
# unpacked panel by panel first. The C++ has the same number.
FEW_ROWS = 16

CPP_SOURCE = r"""
// y = x * weight^T, for weights in INT8 or INT4 with a scale for each row or each group of columns.
//
// Activations are quantized to INT8 in blocks of 32 columns, so that an outlier spoils no more than its block, and
// multiplied as integers: vpdpbusd or vpmaddubsw take unsigned weights and signed activations, so `offset` is added to
// the weights, and the sum that it adds to each product is what the accumulators start from.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__AVX2__) && !defined(CHATGLM_SCALAR)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
extern "C" int omp_get_thread_num(void);  // macOS has no omp.h
#endif

namespace {

constexpr int64_t BLOCK = 32;     // columns of activations that share a scale
constexpr int64_t FEW_ROWS = 16;
constexpr int64_t PADDING = 128;  // columns are padded to a multiple of this, at least a vector of INT4

enum ScaleType { FLOAT32, FLOAT16, BFLOAT16 };

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
    int64_t begin = row * groups;
    if (scale_type == FLOAT32) {
      memcpy(to, (const float *)scale + begin, groups * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < groups; i++) {
      uint32_t half = ((const uint16_t *)scale)[begin + i];
      uint32_t word = half << 16;
      if (scale_type == FLOAT16) word = ((half & 0x8000) << 16) + ((half & 0x7fff) << 13) + (112 << 23);
      memcpy(to + i, &word, sizeof(float));
      // Subnormal; scales are finite, so there is no other special case.
      if (scale_type == FLOAT16 && !(half & 0x7c00)) to[i] = (half & 0x8000 ? -0x1p-24f : 0x1p-24f) * (half & 0x3ff);
    }
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

// The weight in float32, to y.
template <int bits>
void dequantize(const Problem &p) {
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
        float *y = p.y + n * p.in;
#pragma omp simd
        for (int64_t k = g * p.group_size(); k < (g + 1) * p.group_size(); k++) y[k] = quantized[k] * scale[g];
      }
    }
  }
}

// Exact activations, few rows: each row of the weight is unpacked, and multiplied in float32.
template <int bits>
void exact_linear(const Problem &p) {
  const Scratch<int8_t> quantized_scratch(p.threads, p.in);
  const Scratch<float> weight_scratch(p.threads, p.in), scale_scratch(p.threads, p.groups);
#pragma omp parallel num_threads(p.threads)
  {
    int8_t *quantized = quantized_scratch.mine();
    float *weight = weight_scratch.mine(), *scale = scale_scratch.mine();
#pragma omp for schedule(dynamic, 64)
    for (int64_t n = 0; n < p.out; n++) {
      unpack_row<bits>(p.weight + n * p.row_bytes(), p.in, quantized);
      p.read_scales(n, scale);
#pragma omp simd
      for (int64_t k = 0; k < p.in; k++) weight[k] = quantized[k];
      for (int64_t m = 0; m < p.rows; m++) {
        const float *x = p.x + m * p.in;
        float total = 0;
        for (int64_t g = 0; g < p.groups; g++) {
          float sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t k = g * p.group_size(); k < (g + 1) * p.group_size(); k++) sum += x[k] * weight[k];
          total += sum * scale[g];
        }
        p.y[m * p.out + n] = total;
      }
    }
  }
}

// What the instruction set has to offer: vectors of `lanes` 32-bit numbers, and the product of bytes, four to a lane.

#if defined(__AVX512BW__) && defined(__AVX512VNNI__) && !defined(CHATGLM_SCALAR)
#define CHATGLM_VECTORS
typedef __m512i Ints;
typedef __m512 Floats;
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;  // accumulators of a tile, all in registers
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
inline Floats pick(const float *p, Ints lanes) { return _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(p)); }
inline Ints gather(const int8_t *p, Ints offsets) { return _mm512_i32gather_epi32(offsets, p, 1); }

#elif defined(__AVX2__) && defined(__FMA__) && !defined(CHATGLM_SCALAR)
#define CHATGLM_VECTORS
typedef __m256i Ints;
typedef __m256 Floats;
constexpr int TILE_ROWS = 4, TILE_VECTORS = 2;
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
inline Floats pick(const float *p, Ints lanes) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), lanes); }
inline Ints gather(const int8_t *p, Ints offsets) { return _mm256_i32gather_epi32((const int *)p, offsets, 1); }
#endif

#if defined(CHATGLM_VECTORS)

constexpr int64_t VECTOR = sizeof(Ints), LANES = VECTOR / 4;

// ---- Few rows: memory is the limit. The weight is read once, four of its rows at a time, in its own order.

// A row of activations in the order in which unpacking leaves the weights. Each vector of INT4 holds 2 * VECTOR columns:
// the even ones, then the odd ones. The lanes of a product sum neighbouring columns, which share a scale.
struct FewRow {
  const int8_t *q;
  const float *scale;     // of each lane of each vector
  const int32_t *start;   // -offset * sum of q in each lane
};

template <int bits>
struct FewRowsLinear {
  static constexpr int64_t COLUMNS = VECTOR * 8 / bits;  // in a vector of weights
  static constexpr int64_t LANE_COLUMNS = COLUMNS / LANES;
  static constexpr int WEIGHT_ROWS = 4;

  static void arrange(const int8_t *q, const float *scale, int64_t vectors, int8_t *to, float *lane_scale,
                      int32_t *start) {
    for (int64_t lane = 0; lane < vectors * LANES; lane++) {
      int32_t sum = 0;
      for (int64_t i = lane * LANE_COLUMNS; i < (lane + 1) * LANE_COLUMNS; i++) sum += q[i];
      start[lane] = -offset(bits) * sum;
      lane_scale[lane] = scale[lane * LANE_COLUMNS / BLOCK];
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

  // y[m][r] = product of M rows of activations with WEIGHT_ROWS rows of the weight
  template <int M, bool grouped>
  static void tile(const Problem &p, const int8_t *const *weight, const float *const *scale, const FewRow *x,
                   float (*y)[WEIGHT_ROWS]) {
    const int64_t bytes = p.row_bytes(), full = bytes / VECTOR, group_size = p.group_size();
    Floats sum[WEIGHT_ROWS][M];
    for (auto &row : sum)
      for (auto &element : row) element = repeat_float(0);
    int32_t group_of_lane[LANES];
    for (int64_t lane = 0; lane < LANES; lane++) group_of_lane[lane] = lane * LANE_COLUMNS / group_size;
    const Ints lanes = load(group_of_lane);

    auto step = [&](const int8_t *const *at, int64_t v) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < WEIGHT_ROWS; r++) {
        Ints packed = load(at[r]);
        // The same place in the next rows to come: hardware does not foresee the jump.
        __builtin_prefetch(at[r] + WEIGHT_ROWS * bytes);
        Ints first = bits == 4 ? high_half(packed) : whole_byte(packed);
        Ints second = low_half(packed);
        Floats group_scale = grouped ? pick(scale[r] + v * COLUMNS / group_size, lanes) : repeat_float(1);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
          Ints product = dot<bits>(load(x[m].start + v * LANES), first, load(x[m].q + v * COLUMNS));
          if (bits == 4) product = dot<bits>(product, second, load(x[m].q + v * COLUMNS + VECTOR));
          Floats s = load_floats(x[m].scale + v * LANES);
          if (grouped) s = multiply(s, group_scale);
          sum[r][m] = multiply_add(to_floats(product), s, sum[r][m]);
        }
      }
    };
    const int8_t *at[WEIGHT_ROWS];
    for (int64_t v = 0; v < full; v++) {
      for (int r = 0; r < WEIGHT_ROWS; r++) at[r] = weight[r] + v * VECTOR;
      step(at, v);
    }
    if (full * VECTOR < bytes) {
      int8_t rest[WEIGHT_ROWS][VECTOR] = {};
      for (int r = 0; r < WEIGHT_ROWS; r++) {
        memcpy(rest[r], weight[r] + full * VECTOR, bytes - full * VECTOR);
        at[r] = rest[r];
      }
      step(at, full);
    }
    for (int m = 0; m < M; m++)
      for (int r = 0; r < WEIGHT_ROWS; r++) y[m][r] = total(sum[r][m]) * (grouped ? 1 : scale[r][0]);
  }

  template <bool grouped>
  static void run(const Problem &p) {
    const int64_t padded = round_up(p.in, PADDING), vectors = padded / COLUMNS, lanes = vectors * LANES;
    Buffer<int8_t> natural(padded), q(p.rows * padded);
    Buffer<float> block_scale(padded / BLOCK), lane_scale(p.rows * lanes);
    Buffer<int32_t> start(p.rows * lanes);
    FewRow x[FEW_ROWS];
    memset(natural, 0, padded);
    memset(block_scale, 0, padded / BLOCK * sizeof(float));
    for (int64_t m = 0; m < p.rows; m++) {
      quantize_row(p.x + m * p.in, p.in, natural, block_scale);
      arrange(natural, block_scale, vectors, q + m * padded, lane_scale + m * lanes, start + m * lanes);
      x[m] = {q + m * padded, lane_scale + m * lanes, start + m * lanes};
    }
    const int64_t scales = p.groups + LANES;  // `pick` reads a whole vector
    const Scratch<float> scale_scratch(p.threads, WEIGHT_ROWS * scales);
#pragma omp parallel num_threads(p.threads)
    {
      float *scale = scale_scratch.mine();
      memset(scale, 0, WEIGHT_ROWS * scales * sizeof(float));
#pragma omp for schedule(dynamic, 16)
      for (int64_t n = 0; n < p.out; n += WEIGHT_ROWS) {
        const int64_t count = std::min<int64_t>(WEIGHT_ROWS, p.out - n);
        const int8_t *weight[WEIGHT_ROWS];
        const float *row_scale[WEIGHT_ROWS];
        for (int64_t r = 0; r < WEIGHT_ROWS; r++) {
          int64_t row = std::min(n + r, p.out - 1);
          weight[r] = p.weight + row * p.row_bytes();
          p.read_scales(row, scale + r * scales);
          row_scale[r] = scale + r * scales;
        }
        float y[4][WEIGHT_ROWS];
        for (int64_t m = 0, done; m < p.rows; m += done) {
          done = p.rows - m >= 4 ? 4 : p.rows - m >= 2 ? 2 : 1;
          if (done == 4) tile<4, grouped>(p, weight, row_scale, x + m, y);
          if (done == 2) tile<2, grouped>(p, weight, row_scale, x + m, y);
          if (done == 1) tile<1, grouped>(p, weight, row_scale, x + m, y);
          for (int64_t i = 0; i < done; i++) memcpy(p.y + (m + i) * p.out + n, y[i], count * sizeof(float));
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
    for (int64_t r = 0; r < TILE_VECTORS; r++) {
      const int8_t *from[LANES];
      int32_t offsets[LANES];
      for (int64_t lane = 0; lane < LANES; lane++) {
        int64_t n = std::min(r * LANES + lane, count - 1);
        from[lane] = p.weight + (row + n) * bytes + begin * bits / 8;
        offsets[lane] = (int32_t)(from[lane] - from[0]);
      }
      const Ints lanes = load(offsets);
      for (int64_t k = 0; k < wanted; k += 4) {
        Ints packed;
        if (k + 4 <= available) {
          packed = gather(from[0] + k, lanes);
        } else {
          int8_t rest[VECTOR] = {};
          for (int64_t lane = 0; lane < LANES && k < available; lane++)
            memcpy(rest + 4 * lane, from[lane] + k, available - k);
          packed = load(rest);
        }
        if (bits == 8) {
          store(to + (k / 4 * TILE_VECTORS + r) * VECTOR, whole_byte(packed));
        } else {
          store(to + (k / 2 * TILE_VECTORS + r) * VECTOR, high_half(packed));
          store(to + ((k / 2 + 1) * TILE_VECTORS + r) * VECTOR, low_half(packed));
        }
      }
    }
  }

  // sum[TILE_ROWS, PANEL] += activations from row m on * a panel, over `blocks` blocks
  template <bool grouped>
  static void tile(const Activations &x, int64_t m, int64_t first_block, int64_t blocks, const uint8_t *panel,
                   const float *scale, int64_t blocks_in_group, float *sum) {
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t block = first_block + b;
      Ints product[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
      for (int i = 0; i < TILE_ROWS; i++) {
        Ints start = repeat(x.start[(m + i) * x.blocks + block]);
#pragma GCC unroll 8
        for (int r = 0; r < TILE_VECTORS; r++) product[i][r] = start;
      }
      const int8_t *q = x.q + m * x.columns + block * BLOCK;
      for (int64_t k = 0; k < BLOCK / 4; k++) {
        Ints weight[TILE_VECTORS];
#pragma GCC unroll 8
        for (int r = 0; r < TILE_VECTORS; r++)
          weight[r] = load(panel + ((b * BLOCK / 4 + k) * TILE_VECTORS + r) * VECTOR);
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++) {
          int32_t four;
          memcpy(&four, q + i * x.columns + 4 * k, 4);
          Ints activations = repeat(four);
#pragma GCC unroll 8
          for (int r = 0; r < TILE_VECTORS; r++) product[i][r] = dot<bits>(product[i][r], weight[r], activations);
        }
      }
      const float *group_scale = scale + b / blocks_in_group * PANEL;
#pragma GCC unroll 8
      for (int i = 0; i < TILE_ROWS; i++) {
        Floats s = repeat_float(x.scale[(m + i) * x.blocks + block]);
#pragma GCC unroll 8
        for (int r = 0; r < TILE_VECTORS; r++) {
          float *to = sum + i * PANEL + r * LANES;
          Floats both = grouped ? multiply(s, load_floats(group_scale + r * LANES)) : s;
          store_floats(to, multiply_add(to_floats(product[i][r]), both, load_floats(to)));
        }
      }
    }
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

}  // namespace

// Both return 0, or 1 if there is not enough memory. Groups are multiples of 32 columns; `in` is even for INT4.
extern "C" int chatglm_linear(const float *x, const int8_t *weight, const void *scale, int scale_type, float *y,
                              int64_t rows, int64_t out, int64_t in, int64_t groups, int bits, int exact,
                              int threads) {
  const Problem p = {x, weight, scale, scale_type, y, rows, out, in, groups, bits, threads};
  try {
    if (exact)
      bits == 4 ? exact_linear<4>(p) : exact_linear<8>(p);
    else
      bits == 4 ? linear<4>(p) : linear<8>(p);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}

extern "C" int chatglm_dequantize(const int8_t *weight, const void *scale, int scale_type, float *y, int64_t out,
                                  int64_t in, int64_t groups, int bits, int threads) {
  const Problem p = {nullptr, weight, scale, scale_type, y, 0, out, in, groups, bits, threads};
  try {
    bits == 4 ? dequantize<4>(p) : dequantize<8>(p);
  } catch (const std::bad_alloc &) {
    return 1;
  }
  return 0;
}
"""

SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
COMPILE_SECONDS = 60  # a few in fact; beyond this the compiler hangs


def find_compiler() -> list[str] | None:
    """Returns the command of a C++ compiler: `$CXX`, or else g++ or clang++."""
    for command in (os.environ.get("CXX"), "g++", "clang++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    return None


def compiler_flags() -> list[str]:
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC"]
    # By g++ and on macOS, OpenMP is the one that torch has loaded: two would fight for the cores.
    if platform.system() == "Darwin":
        library_path = Path(torch.__file__).parent / "lib"
        flags += ["-Xclang", "-fopenmp", f"-L{library_path}", "-lomp", f"-Wl,-rpath,{library_path}"]
    else:
        flags += ["-fopenmp"]
    return flags + ["-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]


def cpu_features() -> str:
    """Says which instructions the CPU has: a library compiled on another machine may crash on this one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def run_compiler(command: list[str]):
    """Raises `OSError` if the compiler fails, or takes longer than `COMPILE_SECONDS`."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=COMPILE_SECONDS)
    except BaseException as error:  # Ctrl-C too
        os.killpg(process.pid, signal.SIGKILL)  # the compiler proper is a child of the command
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise OSError(f"{command[0]} did not end within {COMPILE_SECONDS} s") from None
        raise
    if process.returncode:
        raise OSError(f"{command[0]} failed with {process.returncode}:\n{output.decode(errors='replace')[-2000:]}")


def compile_library(path: Path):
    """Compiles `CPP_SOURCE` into `path`, which exists only once it is whole."""
    compiler = find_compiler()
    if compiler is None:
        raise OSError("There is no C++ compiler. Install g++ or clang++, or name another one by CXX.")
    with tempfile.TemporaryDirectory(dir=path.parent) as build:
        source, library = Path(build, "chatglm_linear.cpp"), Path(build, path.name)
        source.write_text(CPP_SOURCE)
        run_compiler([*compiler, *compiler_flags(), str(source), "-o", str(library)])
        os.replace(library, path)


def load_library(folder: Path) -> ctypes.CDLL:
    """Loads the library from `folder`, compiled if it is not there yet. Processes that start together wait for one."""
    key = "\n".join([CPP_SOURCE, *compiler_flags(), platform.machine(), cpu_features()])
    path = folder / f"chatglm_linear-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            logger.warning(f"{path} is damaged, and compiled again.")
            path.unlink()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        logger.warning(
            f"{folder} cannot be written to ({error.strerror}): each process compiles its own kernels. Set XDG_CACHE_HOME "
            "to a folder that can."
        )
        with tempfile.TemporaryDirectory() as private:
            compile_library(Path(private, path.name))
            return ctypes.CDLL(str(Path(private, path.name)))
    with FileLock(f"{path}.lock", timeout=2 * COMPILE_SECONDS):
        if not path.exists():
            compile_library(path)
    return ctypes.CDLL(str(path))


@functools.cache
def cpu_library() -> ctypes.CDLL | None:
    """Returns the compiled library; or None, with a warning once, if it cannot be had."""
    try:
        if os.name != "posix":
            raise OSError(f"The kernels are made for Linux and macOS, not for {platform.system()}.")
        library = load_library(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "chatglm2"))
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.chatglm_linear.argtypes = [pointer] * 3 + [number, pointer] + [size] * 4 + [number] * 3
        library.chatglm_dequantize.argtypes = [pointer] * 2 + [number, pointer] + [size] * 3 + [number] * 2
        return library
    # RuntimeError: no home; ValueError: CXX with an open quotation; AttributeError: a library of something else
    except (OSError, RuntimeError, ValueError, AttributeError, Timeout) as error:
        logger.warning(
            "There are no kernels for the CPU: INT4 and INT8 weights are multiplied by plain torch, several times slower. "
            f"{error}"
        )
        return None


def cpu_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, exact: bool) -> torch.Tensor:
    """`x @ weight.T` for x `[..., in]` by the compiled kernels, or by plain torch if there are none."""
    library = cpu_library()
    rows = x.numel() // x.shape[-1]
    if library is None or (exact and rows > FEW_ROWS) or scale.dtype not in SCALE_TYPES:
        return torch_linear(x.reshape(rows, -1), weight, scale, bits).view(*x.shape[:-1], -1)
    dtype, (out, columns) = x.dtype, (weight.shape[0], x.shape[-1])
    x, weight, scale = x.float().contiguous(), weight.contiguous(), scale.contiguous()
    output = torch.empty(*x.shape[:-1], out)
    failed = library.chatglm_linear(
        x.data_ptr(), weight.data_ptr(), scale.data_ptr(), SCALE_TYPES[scale.dtype], output.data_ptr(),
        rows, out, columns, scale.numel() // out, bits, exact, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"Not enough memory to multiply {rows} rows. Pass fewer at a time (prefill_chunk_size).")
    return output.to(dtype)


def cpu_dequantize(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """`dequantize_weight` by the compiled kernels, which write each number once."""
    weight, scale = weight.contiguous(), scale.contiguous()
    out, columns = weight.shape[0], weight.shape[1] * 8 // bits
    output = torch.empty(out, columns)
    failed = cpu_library().chatglm_dequantize(
        weight.data_ptr(), scale.data_ptr(), SCALE_TYPES[scale.dtype], output.data_ptr(),
        out, columns, scale.numel() // max(out, 1), bits, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"Not enough memory to dequantize a weight of {out} rows.")
    return output


# The choice


def quantized_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, exact: bool = False
) -> torch.Tensor:
    """
    `x @ weight.T` without gradients, by the fastest way that there is.

    Args:
        x: `[..., in]`, floating point.
        weight: int8 `[out, in]`, or packed `[out, in / 2]` if `bits` is 4.
        scale: `[out]`, or `[out, groups]`.
        exact: Whether to leave activations as they are on the CPU, where they are otherwise quantized to INT8 in blocks
            of 32 columns. Elsewhere they always are.

    Returns:
        `[..., out]`, in the dtype of `x`.

    Raises:
        ValueError: if the shapes or dtypes do not fit.
    """
    if is_traced(x):
        return quantized_linear_op(x, weight, scale, bits, exact)
    if weight.dtype != torch.int8 or x.shape[-1] * bits != 8 * weight.shape[1] or not x.is_floating_point():
        raise ValueError(
            f"Cannot multiply {x.dtype} {list(x.shape)} with a weight of {bits} bits in {weight.dtype} {list(weight.shape)}."
        )
    return multiply(x, weight, scale, bits, exact)


def quantized_linear_backward(
    grad_output: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """The gradient of `quantized_linear` for x: `grad_output @ weight`, for grad_output `[..., out]`."""
    if grad_output.dtype != torch.float32 or grad_output.device.type != "cpu" or is_traced(grad_output):
        return grad_output @ dequantize_weight(weight, scale, bits).to(grad_output.dtype)
    rows = grad_output.reshape(-1, weight.shape[0])
    grad = rows.new_zeros(rows.shape[0], weight.shape[1] * 8 // bits)
    for start in range(0, weight.shape[0], CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        grad.addmm_(rows[:, chunk], dequantize_weight(weight[chunk], scale[chunk].float(), bits))
    return grad.view(*grad_output.shape[:-1], -1)


def multiply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, exact: bool) -> torch.Tensor:
    """`quantized_linear`, of tensors that are what they seem."""
    if x.device.type == weight.device.type == "cpu" and x.numel() > 0:
        return cpu_linear(x, weight, scale, bits, exact)
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type == "cuda" and HAS_TRITON and x.numel() > 0:
        output = gpu_linear(rows, weight, scale, bits)
    else:
        output = torch_linear(rows, weight, scale, bits)
    return output.view(*x.shape[:-1], weight.shape[0])


# What torch.compile sees of it. Each copy of this module has its own name, lest they replace each other.
_namespace = "chatglm_" + hashlib.sha256(__name__.encode()).hexdigest()[:16]


@torch.library.custom_op(f"{_namespace}::quantized_linear", mutates_args=())
def quantized_linear_op(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, exact: bool
) -> torch.Tensor:
    return multiply(x, weight, scale, bits, exact)


@quantized_linear_op.register_fake
def _(x, weight, scale, bits, exact):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
