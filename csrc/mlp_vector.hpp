// Vectors of floats and the functions that networks apply to them. Included by mlp_block.cpp alone, once for each set of
// instructions; everything has internal linkage, so that no copy for one processor is linked into code for another.
#pragma once

#include <cstdint>

namespace mfd_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t IntVec __attribute__((vector_size(4 * kLanes)));

inline Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof value); }

// x - 0 is x for every float, so this is a broadcast and nothing else.
inline Vec broadcast(float value) { return value - Vec{}; }

inline Vec bits_to_float(IntVec bits) {
  Vec value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline IntVec float_to_bits(Vec value) {
  IntVec bits;
  __builtin_memcpy(&bits, &value, sizeof value);
  return bits;
}

// NaN stays NaN in both.
inline Vec at_least(Vec value, float low) { return value < low ? broadcast(low) : value; }
inline Vec at_most(Vec value, float high) { return value > high ? broadcast(high) : value; }

inline Vec magnitude(Vec value) { return bits_to_float(float_to_bits(value) & 0x7fffffff); }

// The nearest whole number of |value| < 2^22, as a float and as an integer (of NaN: anything).
inline Vec nearest(Vec value, IntVec* whole) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  const Vec shifted = value + kShift;
  *whole = float_to_bits(shifted) - float_to_bits(broadcast(kShift));
  return shifted - kShift;
}

// e^x for x of at most 88, relative error 2e-7; below -87 it is 1e-38.
inline Vec exponential(Vec x) {
  x = at_most(at_least(x, -87.0f), 88.0f);
  IntVec power;
  const Vec n = nearest(x * 1.44269504088896f, &power);
  const Vec rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec sum = broadcast(1.0f / 5040);
  sum = sum * rest + 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  return sum * bits_to_float((power + 127) << 23);
}

// sin x for |x| < 1e4, absolute error 1e-7 beside the rounding of x.
inline Vec sine(Vec x) {
  IntVec half_turns;
  const Vec n = nearest(x * 0.318309886183791f, &half_turns);
  // pi in three parts, of which n times the first two is exact.
  const Vec rest = ((x - n * 3.140625f) - n * 9.67502593994140625e-4f) - n * 1.509957990978376e-7f;
  const Vec square = rest * rest;
  Vec sum = broadcast(1.6059043836821613e-10f);
  sum = sum * square - 2.505210838544172e-8f;
  sum = sum * square + 2.7557319223985893e-6f;
  sum = sum * square - 1.984126984126984e-4f;
  sum = sum * square + 8.333333333333333e-3f;
  sum = sum * square - 0.16666666666666666f;
  const Vec value = rest + rest * square * sum;
  return bits_to_float(float_to_bits(value) ^ (half_turns << 31));
}

// Near zero Lambert's continued fraction, elsewhere through e^2|x|.
inline Vec hyperbolic_tangent(Vec x) {
  const Vec size = magnitude(x), square = x * x;
  const Vec near = x * (((square + 378.0f) * square + 17325.0f) * square + 135135.0f) /
                   (((square * 28.0f + 3150.0f) * square + 62370.0f) * square + 135135.0f);
  const Vec far = 1.0f - 2.0f / (exponential(2.0f * at_most(size, 10.0f)) + 1.0f);
  const Vec signed_far = bits_to_float(float_to_bits(far) | (float_to_bits(x) & INT32_MIN));
  return size < 0.625f ? near : signed_far;
}

// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: absolute error 1.5e-7.
inline Vec error_function(Vec x) {
  const Vec size = magnitude(x);
  const Vec s = 1.0f / (1.0f + 0.3275911f * size);
  Vec sum = broadcast(1.061405429f);
  sum = sum * s - 1.453152027f;
  sum = sum * s + 1.421413741f;
  sum = sum * s - 0.284496736f;
  sum = sum * s + 0.254829592f;
  const Vec value = 1.0f - sum * s * exponential(-size * size);
  return bits_to_float(float_to_bits(value) | (float_to_bits(x) & INT32_MIN));
}

inline Vec silu(Vec x) { return x / (1.0f + exponential(-x)); }
inline Vec gelu(Vec x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678118654752f)); }
inline Vec gelu_tanh(Vec x) {
  return 0.5f * x * (1.0f + hyperbolic_tangent(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
inline Vec relu(Vec x) { return at_least(x, 0.0f); }

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

// Which lane of the pair (first, second) is lane i of their folding: the groups of `size` lanes of both, of each either
// its lower or its upper half.
constexpr int folded_lane(int i, int size, bool upper) {
  const int half = size / 2, group = i / half;
  return group * size + (upper ? half : 0) + i % half;
}

template <int Size, int... I>
inline Vec fold(Vec first, Vec second, Indices<I...>) {
  return __builtin_shufflevector(first, second, folded_lane(I, Size, false)...) +
         __builtin_shufflevector(first, second, folded_lane(I, Size, true)...);
}

// Lane i of the result is the sum of sums[i].
template <int Size = kLanes>
inline Vec sum_each(Vec* sums) {
  if constexpr (Size == 1) {
    return sums[0];
  } else {
    for (int i = 0; i < Size / 2; ++i) {
      sums[i] = fold<Size>(sums[2 * i], sums[2 * i + 1], typename MakeIndices<kLanes>::type{});
    }
    return sum_each<Size / 2>(sums);
  }
}

// One level of a transposition by interleaving: lanes of the first and of the second in turn.
template <bool Upper, int... I>
inline Vec interleave(Vec first, Vec second, Indices<I...>) {
  return __builtin_shufflevector(first, second, (I / 2 + (Upper ? kLanes / 2 : 0) + (I % 2 ? kLanes : 0))...);
}

// Transpose kLanes vectors: interleaving i with i + kLanes / 2, as often as kLanes has bits, is a transposition.
inline void transpose(Vec* rows) {
  using All = MakeIndices<kLanes>::type;
  Vec other[kLanes];
  for (int level = 1; level < kLanes; level *= 2) {
    for (int i = 0; i < kLanes / 2; ++i) {
      other[2 * i] = interleave<false>(rows[i], rows[i + kLanes / 2], All{});
      other[2 * i + 1] = interleave<true>(rows[i], rows[i + kLanes / 2], All{});
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = other[i];
  }
}

}  // namespace
}  // namespace mfd_fast
