// Matrix products of a few rows with a weight [out, in]. Included by mlp_block.cpp alone; see mlp_vector.hpp.
#pragma once

#include "mlp_vector.hpp"

namespace mfd_fast {
namespace {

// Rows and panels of a register tile, chosen so that its sums fit in 32 or 16 registers beside what feeds them.
constexpr int kTileRows = kLanes == 16 ? 8 : 6;
constexpr int tile_panels(int rows) {
  if (kLanes == 16) return rows <= 2 ? 8 : rows <= 6 ? 4 : 2;
  return rows == 1 ? 8 : rows == 2 ? 4 : 2;
}

inline std::int64_t rounded_up(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Rows of inputs and outputs; a stride is the distance of rows in floats.
struct Rows {
  const float* in;
  std::int64_t in_stride;
  float* out;
  std::int64_t out_stride;
  std::int64_t count;
};

// Panel p holds outputs p * kLanes to (p + 1) * kLanes: for each input their weights side by side.
template <int R, int P>
inline void tile(const Rows& rows, const float* panels, std::int64_t width_in) {
  Vec sums[R][P] = {};
  const std::int64_t panel = width_in * kLanes;
  for (std::int64_t k = 0; k < width_in; ++k) {
    Vec weights[P];
    for (int p = 0; p < P; ++p) weights[p] = load(panels + p * panel + k * kLanes);
    for (int i = 0; i < R; ++i) {
      const float value = rows.in[i * rows.in_stride + k];
      for (int p = 0; p < P; ++p) sums[i][p] += weights[p] * value;
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int p = 0; p < P; ++p) store(rows.out + i * rows.out_stride + p * kLanes, sums[i][p]);
  }
}

// All outputs of R rows.
template <int R>
inline void tiles_across(const Rows& rows, const float* panels, std::int64_t width_in, std::int64_t count) {
  constexpr int kPanels = tile_panels(R);
  Rows part = rows;
  std::int64_t p = 0;
  for (; p + kPanels <= count; p += kPanels, panels += kPanels * width_in * kLanes, part.out += kPanels * kLanes) {
    tile<R, kPanels>(part, panels, width_in);
  }
  for (; p < count; ++p, panels += width_in * kLanes, part.out += kLanes) tile<R, 1>(part, panels, width_in);
}

template <int R>
inline void rest_of_tiles(const Rows& rows, const float* panels, std::int64_t width_in, std::int64_t count) {
  if constexpr (R > 0) {
    if (rows.count == R) return tiles_across<R>(rows, panels, width_in, count);
    rest_of_tiles<R - 1>(rows, panels, width_in, count);
  }
}

// Panels are the outer loop where there are several tiles of rows, so that each is read from far away once.
inline void product_with_panels(const Rows& rows, const float* panels, std::int64_t width_in, std::int64_t width_out) {
  const std::int64_t count = rounded_up(width_out) / kLanes;
  constexpr int kPanels = tile_panels(kTileRows);
  const std::int64_t whole = rows.count / kTileRows * kTileRows;
  for (std::int64_t p = 0; whole > 0 && p < count; p += kPanels) {
    const float* some = panels + p * width_in * kLanes;
    for (std::int64_t i = 0; i < whole; i += kTileRows) {
      const Rows part{rows.in + i * rows.in_stride, rows.in_stride, rows.out + i * rows.out_stride + p * kLanes,
                      rows.out_stride, kTileRows};
      tiles_across<kTileRows>(part, some, width_in, count - p < kPanels ? count - p : kPanels);
    }
  }
  const Rows last{rows.in + whole * rows.in_stride, rows.in_stride, rows.out + whole * rows.out_stride, rows.out_stride,
                  rows.count - whole};
  rest_of_tiles<kTileRows - 1>(last, panels, width_in, count);
}

// Outputs o to o + kLanes of one row, of which `count` exist, from the weight as it is.
inline Vec some_outputs(const float* in, const float* weight, std::int64_t width_in, std::int64_t count) {
  Vec sums[kLanes] = {};
  const std::int64_t whole = width_in / kLanes * kLanes;
  if (count == kLanes) {
    for (std::int64_t k = 0; k < whole; k += kLanes) {
      const Vec values = load(in + k);
      for (int o = 0; o < kLanes; ++o) sums[o] += load(weight + o * width_in + k) * values;
    }
  } else {
    for (std::int64_t k = 0; k < whole; k += kLanes) {
      const Vec values = load(in + k);
      for (std::int64_t o = 0; o < count; ++o) sums[o] += load(weight + o * width_in + k) * values;
    }
  }
  Vec total = sum_each(sums);
  for (std::int64_t k = whole; k < width_in; ++k) {
    for (std::int64_t o = 0; o < count; ++o) total[o] += in[k] * weight[o * width_in + k];
  }
  return total;
}

inline void product_with_weight(const Rows& rows, const float* weight, std::int64_t width_in, std::int64_t width_out) {
  for (std::int64_t o = 0; o < width_out; o += kLanes) {
    const std::int64_t count = width_out - o < kLanes ? width_out - o : kLanes;
    for (std::int64_t i = 0; i < rows.count; ++i) {
      const Vec total = some_outputs(rows.in + i * rows.in_stride, weight + o * width_in, width_in, count);
      store(rows.out + i * rows.out_stride + o, total);
    }
  }
}

inline std::int64_t panel_floats(std::int64_t width_in, std::int64_t width_out) {
  return width_in * rounded_up(width_out);
}

// Outputs that do not exist get weights of zero.
inline void pack(const float* weight, std::int64_t width_in, std::int64_t width_out, float* panels) {
  const std::int64_t whole = width_in / kLanes * kLanes;
  for (std::int64_t o = 0; o < width_out; o += kLanes, panels += width_in * kLanes) {
    const std::int64_t count = width_out - o < kLanes ? width_out - o : kLanes;
    for (std::int64_t k = 0; k < whole; k += kLanes) {
      Vec square[kLanes] = {};
      for (std::int64_t j = 0; j < count; ++j) square[j] = load(weight + (o + j) * width_in + k);
      transpose(square);
      for (int j = 0; j < kLanes; ++j) store(panels + (k + j) * kLanes, square[j]);
    }
    for (std::int64_t k = whole; k < width_in; ++k) {
      for (std::int64_t j = 0; j < kLanes; ++j) {
        panels[k * kLanes + j] = j < count ? weight[(o + j) * width_in + k] : 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace mfd_fast
