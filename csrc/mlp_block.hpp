// A few rows of an MLP rollout through all of their steps. Compiled once for every set of instructions, so nothing that is
// shared with other files may be a function with external linkage: the linker would keep any one of its versions.
#pragma once

#include <cstdint>

#include "mlp_rollout.hpp"

namespace mfd_fast {

// Rows order[0..rows) of a rollout, most steps first.
struct MlpBlock {
  const MlpRollout* rollout;
  const std::int64_t* order;
  const std::int64_t* planned;  // steps of each row, by row of the rollout
  std::int64_t rows;
  float* scratch;  // aligned to 64 bytes
};

struct MlpKernels {
  int lanes;
  // Floats of scratch memory that a block of so many rows needs.
  std::int64_t (*scratch_floats)(const MlpRollout& rollout, std::int64_t rows);
  void (*run)(const MlpBlock& block);
  // Floats that the panels of a weight [out, in] take, and their making.
  std::int64_t (*panel_floats)(std::int64_t in, std::int64_t out);
  void (*pack)(const float* weight, std::int64_t in, std::int64_t out, float* panels);
};

const MlpKernels& mlp_kernels_baseline();
#ifdef MFD_FAST_X86_VARIANTS
const MlpKernels& mlp_kernels_avx2();
const MlpKernels& mlp_kernels_avx512();
#endif

// Time points of a row that runs so many steps at which the network is evaluated.
static inline std::int64_t mlp_time_points(std::int64_t steps, bool two_step) {
  if (steps == 0) return 1;
  return two_step && steps == 1 ? 2 : steps;
}

}  // namespace mfd_fast
