// y = x W^T for few rows of x, with W read from memory once for all of them.
//
//   float32   y = sum of w * x
//   packed    a group of 32 weights is  w = scale * value - min  with small whole values; 32 numbers of x are
//             rounded to  x = step * q  with q from -127 to 127. What a group adds is then
//             y += scale * step * (sum of value * q)  -  min * step * (sum of q)
//             whose sums are of whole numbers, exact, and 32 products of bytes are one or three instructions.
//             Some formats store each value too large by an excess. No value is mended for that: the sum
//             begins at  -excess * (sum of q),  which is the same for all rows of W.
//
// A call with few rows waits for memory: its time is that of reading W. Three things follow.
// - Each row of W meets all rows of x while it is at hand.
// - Packed weights are unpacked in registers, never in memory.
// - What is done with a weight must take less time than fetching it: hence 8 bits for x.
//
// The order in which an output is summed depends neither on the number of threads nor on that of rows, so a
// row of x gives the same bits in any company.
//
// Layouts: ggml-common.h of llama.cpp, byte for byte. Vectors are GCC's and Clang's own, which become what
// the processor has; only a few products need its instructions. All paths add in one order.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef MINICPM_LITE_PORTABLE
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define AVX2
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define NEON
#include <arm_neon.h>
#endif
#endif

namespace {

using torch::stable::Tensor;

// ---------------------------------------------------------------------------------------------- vectors

using Bytes = int8_t __attribute__((vector_size(32)));
using Unsigned = uint8_t __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));
using Floats = float __attribute__((vector_size(32)));
#if defined(__AVX512F__)
using WideFloats = float __attribute__((vector_size(64)));
#else
struct WideFloats {  // the compiler would keep a vector that is wider than a register in memory
  Floats first, second;
};
#endif

inline Floats all_lanes(float number) {
  return number - Floats{};  // which changes no number: 0 + number would change -0
}

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

#if defined(AVX2) && !defined(__AVX512F__)
template <>
inline WideFloats load<WideFloats>(const void* from) {  // in halves: a copy as a whole goes through memory
  return {load<Floats>(from), load<Floats>((const Floats*)from + 1)};
}
#endif

// sum + a * b, rounded once where the processor can. Left to the compiler, that would be so in one loop and
// not in the next, and a row's bits would depend on how many rows come with it.
inline float add_product(float sum, float a, float b) {
#if defined(AVX2) || defined(NEON)
  return std::fma(a, b, sum);
#else
  return sum + a * b;
#endif
}

inline Floats add_product(Floats sum, Floats a, Floats b) {
#if defined(AVX2)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(NEON)
  float32x4_t s[2], x[2], y[2];
  std::memcpy(s, &sum, 32);
  std::memcpy(x, &a, 32);
  std::memcpy(y, &b, 32);
  float32x4_t sums[2] = {vfmaq_f32(s[0], x[0], y[0]), vfmaq_f32(s[1], x[1], y[1])};
  return load<Floats>(sums);
#else
  return sum + a * b;
#endif
}

#if defined(__AVX512F__)
inline Floats low(WideFloats wide) {
  return __builtin_shufflevector(wide, wide, 0, 1, 2, 3, 4, 5, 6, 7);
}
inline Floats high(WideFloats wide) {
  return __builtin_shufflevector(wide, wide, 8, 9, 10, 11, 12, 13, 14, 15);
}
#else
inline Floats low(WideFloats wide) { return wide.first; }
inline Floats high(WideFloats wide) { return wide.second; }
#endif

inline WideFloats add_product(WideFloats sum, WideFloats a, WideFloats b) {
#if defined(AVX2) && defined(__AVX512F__)
  return (WideFloats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX512F__)
  return sum + a * b;
#else
  return {add_product(sum.first, a.first, b.first), add_product(sum.second, a.second, b.second)};
#endif
}

// Holds a vector in a register. GCC would read it from memory again for each use, if there are several.
inline void keep([[maybe_unused]] WideFloats& vector) {
#if defined(__AVX512F__)
  asm("" : "+v"(vector));
#endif
}

// 8 sums and 32 products: lane i adds bytes 4i to 4i + 3. Values may be -128 to 127 if they are signed, else
// 0 to 127; q -127 to 127.
template <bool SIGNED>
inline Ints dot(Ints sums, Bytes values, Bytes q) {
#if defined(AVX2)
  __m256i sizes = (__m256i)values, signed_q = (__m256i)q;
  if constexpr (SIGNED) {  // the instruction wants one side without signs: those of the values move over to q
    signed_q = _mm256_sign_epi8(signed_q, sizes);
    sizes = _mm256_abs_epi8(sizes);
  }
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return (Ints)_mm256_dpbusd_epi32((__m256i)sums, sizes, signed_q);
#elif defined(__AVXVNNI__)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, sizes, signed_q);
#else
  // A pair of products stays below 2 * 128 * 127 and so fits in 16 bits; with q = -128 it would not.
  return sums + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(sizes, signed_q), _mm256_set1_epi16(1));
#endif
#elif defined(NEON)
  int8x16_t v[2], x[2];
  std::memcpy(v, &values, 32);
  std::memcpy(x, &q, 32);
  int32x4_t s[2];
  std::memcpy(s, &sums, 32);
  int32x4_t found[2] = {vdotq_s32(s[0], v[0], x[0]), vdotq_s32(s[1], v[1], x[1])};
  return load<Ints>(found);
#else
  using Shorts = int16_t __attribute__((vector_size(64)));
  using Pairs = int32_t __attribute__((vector_size(64)));
  Shorts products = __builtin_convertvector(values, Shorts) * __builtin_convertvector(q, Shorts);
  Pairs pairs = (((Pairs)products << 16) >> 16) + ((Pairs)products >> 16);  // the low one and the high one
  return sums + __builtin_shufflevector(pairs, pairs, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(pairs, pairs, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

// A float16 as a float. Bits, not arithmetic, where there is no instruction: subnormals may be switched off.
inline float half(const uint8_t* from) {
  uint16_t bits = load<uint16_t>(from);
#if defined(AVX2)
  return _cvtsh_ss(bits);
#else
  uint32_t size = bits & 0x7fff, sign = (bits & 0x8000u) << 16;
  if (size < 0x400)
    size = std::bit_cast<uint32_t>(std::bit_cast<float>(size | 126u << 23) - 0.5f);  // subnormal
  else
    size = (size << 13) + (size < 0x7c00 ? 112u << 23 : 224u << 23);  // the exponent's 15 becomes 127
  return std::bit_cast<float>(size | sign);
#endif
}

// The same in all lanes.
inline Floats halves(const uint8_t* from) {
#if defined(AVX2)
  return (Floats)_mm256_cvtph_ps(_mm_set1_epi16(load<int16_t>(from)));
#else
  return all_lanes(half(from));
#endif
}

inline float sum_of(Floats lanes) {
  using Four = float __attribute__((vector_size(16)));
  Four sums =
      __builtin_shufflevector(lanes, lanes, 0, 1, 2, 3) + __builtin_shufflevector(lanes, lanes, 4, 5, 6, 7);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

inline float sum_of(WideFloats lanes) {
  return sum_of(low(lanes) + high(lanes));
}

// ---------------------------------------------------------------------------------------------- formats
//
// Of each: how many weights and bytes a block has, the excess of its values, and the i-th group of 32 in it.

struct F32 {
  static constexpr int weights = 1, bytes = 4, excess = 0;
};

struct Group {
  Bytes values;
  Floats scale;  // lane i: of weights 4i to 4i + 3, as `dot` adds them
  float min = 0;
};

struct Q8_0 {  // a scale, 32 bytes
  static constexpr int weights = 32, bytes = 34, excess = 0;
  static Group group(const uint8_t* block, int) { return {load<Bytes>(block + 2), halves(block)}; }
};

// Of 16 bytes the low halves are weights 0 to 15, the high ones 16 to 31.
inline Unsigned nibbles(const uint8_t* from) {
  using Packed = uint8_t __attribute__((vector_size(16)));
  Packed packed = load<Packed>(from), low = packed & 15, high = packed >> 4;
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18,
                                 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}

struct Q4_0 {  // a scale, 16 bytes
  static constexpr int weights = 32, bytes = 18, excess = 8;
  static Group group(const uint8_t* block, int) { return {(Bytes)nibbles(block + 2), halves(block)}; }
};

struct Q5_0 {  // a scale, the fifth bit of each weight, 16 bytes
  static constexpr int weights = 32, bytes = 22, excess = 16;
  static Group group(const uint8_t* block, int) {
    using Words = uint32_t __attribute__((vector_size(32)));
    Unsigned fifths = (Unsigned)(Words{} + load<uint32_t>(block + 2));  // the four bytes, eight times
    Unsigned eight_each =
        __builtin_shufflevector(fifths, fifths, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 18, 18, 18,
                                18, 18, 18, 18, 18, 19, 19, 19, 19, 19, 19, 19, 19);
    Unsigned own_bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128,
                        1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    Bytes fifth = ((eight_each & own_bit) != 0) & 16;
    return {(Bytes)nibbles(block + 6) | fifth, halves(block)};
  }
};

// Of Q4_K and Q5_K: what scales the scales, what scales the mins, then 8 of each in 6 bits. Those of the
// first four groups stand whole in 8 bytes, those of the others are cut in two.
inline Group scaled(const uint8_t* block, int i, Unsigned values) {
  const uint8_t* six = block + 4;
  int scale = i < 4 ? six[i] & 63 : (six[i + 4] & 15) | six[i - 4] >> 6 << 4;
  int min = i < 4 ? six[i + 4] & 63 : six[i + 4] >> 4 | six[i] >> 6 << 4;
  return {(Bytes)values, all_lanes(half(block) * scale), half(block + 2) * min};
}

struct Q4_K {  // scales and mins, 4 times 32 bytes: low halves are one group, high ones the next
  static constexpr int weights = 256, bytes = 144, excess = 0;
  static Group group(const uint8_t* block, int i) {
    Unsigned packed = load<Unsigned>(block + 16 + i / 2 * 32);
    return scaled(block, i, i % 2 ? packed >> 4 : packed & 15);
  }
};

struct Q5_K {  // scales and mins, 32 bytes whose i-th bits are the fifth ones of group i, then as Q4_K
  static constexpr int weights = 256, bytes = 176, excess = 0;
  static Group group(const uint8_t* block, int i) {
    Unsigned packed = load<Unsigned>(block + 48 + i / 2 * 32), fifth = load<Unsigned>(block + 16) >> i & 1;
    return scaled(block, i, (i % 2 ? packed >> 4 : packed & 15) | fifth << 4);
  }
};

struct Q6_K {  // low 4 bits, high 2 bits, 16 scales of 8 bits, what scales them
  static constexpr int weights = 256, bytes = 210, excess = 32;
  static Group group(const uint8_t* block, int i) {
    int quarter = i % 4;  // of one half of the block, which has 64 bytes of low bits and 32 of high bits
    Unsigned low = load<Unsigned>(block + i / 4 * 64 + quarter % 2 * 32);
    Unsigned high = load<Unsigned>(block + 128 + i / 4 * 32) >> 2 * quarter & 3;
    Unsigned values = (quarter < 2 ? low & 15 : low >> 4) | high << 4;
    const int8_t* scales = (const int8_t*)block + 192 + 2 * i;
    float first = half(block + 208) * scales[0], second = half(block + 208) * scales[1];
    return {(Bytes)values, Floats{first, first, first, first, second, second, second, second}};
  }
};

struct TQ2_0 {  // twice 32 bytes, whose lowest two bits are weights 0 to 31, ...; a scale
  static constexpr int weights = 256, bytes = 66, excess = 1;
  static Group group(const uint8_t* block, int i) {
    Unsigned values = load<Unsigned>(block + i / 4 * 32) >> 2 * (i % 4) & 3;
    return {(Bytes)values, halves(block + 64)};
  }
};

template <class Format>
constexpr bool has_min = std::is_same_v<Format, Q4_K> || std::is_same_v<Format, Q5_K>;
template <class Format>
constexpr bool is_signed = std::is_same_v<Format, Q8_0>;

// ---------------------------------------------------------------------------------------------- rows of x
//
// A few rows side by side, as the loop meets them: of every row the first numbers, of every row the next
// ones. They have 1, 2, 4 or 8 places; where rows are missing, zeros stand.

struct ExactRows {
  static constexpr int64_t most = 4;
  std::vector<WideFloats> values;

  ExactRows(const float* x, int64_t rows, int64_t places, int64_t features, int)
      : values((features + 15) / 16 * places) {
    for (int64_t row = 0; row < rows; row++)
      for (int64_t i = 0; i < features; i++)
        ((float*)&values[i / 16 * places + row])[i % 16] = x[row * features + i];
  }
};

struct RoundedRows {
  static constexpr int64_t most = 8;
  std::vector<Bytes> q;
  std::vector<Ints> start;       // of the sums of products: -excess * (sum of q)
  std::vector<float> step, sum;  // sum: step * (sum of q)

  RoundedRows(const float* x, int64_t rows, int64_t places, int64_t features, int excess)
      : q(features / 32 * places), start(q.size()), step(q.size()), sum(q.size()) {
    for (int64_t row = 0; row < rows; row++)
      for (int64_t group = 0; group < features / 32; group++)
        round(x + row * features + group * 32, group * places + row, excess);
  }

  void round(const float* x, int64_t place, int excess) {
    int32_t largest = 0;  // sizes compare like their bits, and NaN comes out above infinity
    for (int i = 0; i < 32; i++) largest = std::max(largest, std::bit_cast<int32_t>(x[i]) & 0x7fffffff);
    float peak = std::bit_cast<float>(largest);
    bool finite = largest < 0x7f800000;
    float inverse = peak > 0x1p-119f ? 127 / peak : 0;  // of less it would overflow
    int8_t rounded[32] = {};
    if (finite)
      for (int i = 0; i < 32; i++) rounded[i] = (int)std::rint(x[i] * inverse);
    q[place] = load<Bytes>(rounded);
    Ints sums = dot<false>(Ints{}, Bytes{} + 1, q[place]);
    start[place] = -excess * sums;
    step[place] = finite ? peak / 127 : NAN;  // what is no number must not get lost: it makes the output none
    int32_t total = 0;
    for (int lane = 0; lane < 8; lane++) total += sums[lane];
    sum[place] = step[place] * total;
  }
};

template <class Format>
using RowsFor = std::conditional_t<std::is_same_v<Format, F32>, ExactRows, RoundedRows>;

// ---------------------------------------------------------------------------------------------- products

constexpr int64_t AHEAD = 2048;  // bytes; the processor's own look ahead stops at pages, and starts late

// What some rows of x give with one row of packed weights.
template <class Format, int PLACES>
void multiply(const uint8_t* weights, int64_t row_bytes, const RoundedRows& x, float* y) {
  Floats sums[PLACES] = {};
  float mins[PLACES] = {};
  const Bytes* q = x.q.data();
  const Ints* start = x.start.data();
  const float *step = x.step.data(), *sum = x.sum.data();
  for (const uint8_t* block = weights; block < weights + row_bytes; block += Format::bytes) {
#pragma GCC unroll 8
    for (int i = 0; i < Format::weights / 32;
         i++, q += PLACES, start += PLACES, step += PLACES, sum += PLACES) {
      if (i % 2 == 0) __builtin_prefetch(block + i * Format::bytes * 32 / Format::weights + AHEAD);
      Group group = Format::group(block, i);
#pragma GCC unroll 8
      for (int row = 0; row < PLACES; row++) {
        Ints whole = dot<is_signed<Format>>(Format::excess ? start[row] : Ints{}, group.values, q[row]);
        Floats products = __builtin_convertvector(whole, Floats);
        sums[row] = add_product(sums[row], products, group.scale * step[row]);
        if (has_min<Format>) mins[row] = add_product(mins[row], group.min, sum[row]);
      }
    }
  }
  for (int row = 0; row < PLACES; row++) y[row] = sum_of(sums[row]) - mins[row];
}

// What some rows of x give with OUTPUTS rows of float32 weights, in y[output * PLACES + row].
template <int OUTPUTS, int PLACES>
void multiply(const float* weights, int64_t features, const ExactRows& rows, float* y) {
  WideFloats sums[OUTPUTS][PLACES] = {};
  const WideFloats* x = rows.values.data();
  int64_t ahead = OUTPUTS == 1 ? AHEAD / sizeof(float) : OUTPUTS * features, i = 0;
  for (; i + 16 <= features; i += 16, x += PLACES) {
    WideFloats here[PLACES];
#pragma GCC unroll 4
    for (int row = 0; row < PLACES; row++) keep(here[row] = x[row]);
#pragma GCC unroll 4
    for (int output = 0; output < OUTPUTS; output++) {
      __builtin_prefetch(weights + output * features + i + ahead);
      WideFloats w = load<WideFloats>(weights + output * features + i);
      keep(w);
#pragma GCC unroll 4
      for (int row = 0; row < PLACES; row++) sums[output][row] = add_product(sums[output][row], w, here[row]);
    }
  }
  if (i < features) {  // the end of a row, and zeros
#pragma GCC unroll 4
    for (int output = 0; output < OUTPUTS; output++) {
      WideFloats w = {};
      std::memcpy(&w, weights + output * features + i, (features - i) * sizeof(float));
#pragma GCC unroll 4
      for (int row = 0; row < PLACES; row++) sums[output][row] = add_product(sums[output][row], w, x[row]);
    }
  }
#pragma GCC unroll 4
  for (int output = 0; output < OUTPUTS; output++)
#pragma GCC unroll 4
    for (int row = 0; row < PLACES; row++) y[output * PLACES + row] = sum_of(sums[output][row]);
}

// The next one to four outputs, in y[output * PLACES + row].
constexpr int64_t NEXT = 4;

template <class Format, int PLACES>
void multiply_next(const uint8_t* weights, int64_t outputs, int64_t features, const RowsFor<Format>& x,
                   float* y) {
  int64_t row_bytes = features / Format::weights * Format::bytes;
  if constexpr (std::is_same_v<Format, F32> && PLACES == 4)
    // Each number of x that is read meets four weights. One output after the other would read all of x for
    // each, which takes longer once x has outgrown the first cache.
    if (outputs == NEXT) return multiply<NEXT, PLACES>((const float*)weights, features, x, y);
  for (int64_t output = 0; output < outputs; output++, weights += row_bytes, y += PLACES)
    if constexpr (std::is_same_v<Format, F32>)
      multiply<1, PLACES>((const float*)weights, features, x, y);
    else
      multiply<Format, PLACES>(weights, row_bytes, x, y);
}

// ---------------------------------------------------------------------------------------------- operators

struct Matrix {
  const uint8_t* weights;
  int64_t outputs;
};

// y (rows, outputs) = x (rows, features) times all matrices (outputs, features), shared out among torch's
// threads as if they were one.
template <class Format>
void multiply_all(const float* x, int64_t rows, const std::vector<Matrix>& matrices, int64_t outputs,
                  int64_t features, float* y) {
  using Rows = RowsFor<Format>;
  struct Tile {
    int64_t first, rows, places;
    Rows x;
  };
  std::vector<Tile> tiles;
  for (int64_t first = 0; first < rows; first += Rows::most) {
    int64_t here = std::min(Rows::most, rows - first), places = std::bit_ceil((uint64_t)here);
    Rows rows_here(x + first * features, here, places, features, Format::excess);
    tiles.push_back({first, here, places, std::move(rows_here)});
  }
  int64_t row_bytes = features / Format::weights * Format::bytes;
  int64_t worth_a_thread = 1 + 65536 / (row_bytes + 1);  // what is multiplied while a thread wakes up
  torch::stable::parallel_for(0, outputs, worth_a_thread, [&](int64_t begin, int64_t end) {
    float found[NEXT * Rows::most];
    int64_t before = 0;  // outputs of the matrices before
    for (const Matrix& matrix : matrices) {
      int64_t last = std::min(end - before, matrix.outputs);
      for (int64_t output = std::max(begin - before, (int64_t)0); output < last; output += NEXT) {
        int64_t next = std::min(NEXT, last - output);
        for (const Tile& tile : tiles) {
          auto multiply = tile.places == 1   ? multiply_next<Format, 1>
                          : tile.places == 2 ? multiply_next<Format, 2>
                          : tile.places == 4 ? multiply_next<Format, 4>
                                             : multiply_next<Format, Rows::most>;
          multiply(matrix.weights + output * row_bytes, next, features, tile.x, found);
          for (int64_t i = 0; i < next; i++)
            for (int64_t row = 0; row < tile.rows; row++)
              y[(tile.first + row) * outputs + before + output + i] = found[i * tile.places + row];
        }
      }
      before += matrix.outputs;
    }
  });
}

template <class Format>
void dequantize_all(const uint8_t* packed, int64_t blocks, float* weights) {
  torch::stable::parallel_for(0, blocks, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      for (int i = 0; i < Format::weights / 32; i++) {
        Group group = Format::group(packed + block * Format::bytes, i);
        float* out = weights + block * Format::weights + i * 32;
        for (int j = 0; j < 32; j++)
          out[j] = group.scale[j / 4] * (group.values[j] - Format::excess) - group.min;
      }
  });
}

// Calls `run` with the format that ggml gives this number.
template <class Run>
void with_format(int64_t type, Run run) {
  switch (type) {
    case 2: return run(Q4_0{});
    case 6: return run(Q5_0{});
    case 8: return run(Q8_0{});
    case 12: return run(Q4_K{});
    case 13: return run(Q5_K{});
    case 14: return run(Q6_K{});
    case 35: return run(TQ2_0{});
    default: return run(F32{});
  }
}

// Both are called from Python, where types and shapes were checked.

constexpr int64_t IN_CACHE = 128;  // rows at once; with more, those that wait would leave the cache

// What each weight gives stands behind what the one before it gives.
Tensor linear(Tensor x, std::vector<Tensor> weights, int64_t type) {
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  std::vector<Matrix> matrices;
  int64_t outputs = 0, rows = 1;
  for (Tensor& weight : weights) {
    if (!weight.is_contiguous()) weight = torch::stable::contiguous(weight);
    matrices.push_back({(const uint8_t*)weight.const_data_ptr(), weight.size(0)});
    outputs += weight.size(0);
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  int64_t features = shape.back();
  shape.back() = outputs;
  for (size_t i = 0; i + 1 < shape.size(); i++) rows *= shape[i];
  Tensor y = torch::stable::new_empty(x, shape);
  const float* from = (const float*)x.const_data_ptr();
  float* to = (float*)y.mutable_data_ptr();
  with_format(type, [&]<class Format>(Format) {
    for (int64_t first = 0; first < rows; first += IN_CACHE)
      multiply_all<Format>(from + first * features, std::min(IN_CACHE, rows - first), matrices, outputs,
                           features, to + first * outputs);
  });
  return y;
}

Tensor dequantize(Tensor weight, int64_t type, int64_t features) {
  if (!weight.is_contiguous()) weight = torch::stable::contiguous(weight);
  int64_t outputs = weight.size(0);
  Tensor weights =
      torch::stable::new_empty(weight, {outputs, features}, torch::headeronly::ScalarType::Float);
  const uint8_t* packed = (const uint8_t*)weight.const_data_ptr();
  float* to = (float*)weights.mutable_data_ptr();
  with_format(type, [&]<class Format>(Format) {
    if constexpr (!std::is_same_v<Format, F32>)
      dequantize_all<Format>(packed, outputs * (features / Format::weights), to);
  });
  return weights;
}

}  // namespace

STABLE_TORCH_LIBRARY(minicpm_lite, library) {
  library.def("linear(Tensor x, Tensor[] weights, int type) -> Tensor");
  library.def("dequantize(Tensor weight, int type, int features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(minicpm_lite, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("dequantize", TORCH_BOX(&dequantize));
}
