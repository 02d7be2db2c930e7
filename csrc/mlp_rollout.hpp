// Rollouts of MLP velocity fields: all steps and all layers of a batch in one call.
// The meaning of every operation and of the rollout is that of mfd_fast/ops/mlp_rollout.py, which is their definition.
// Plain C++17: neither Python nor torch.
#pragma once

#include <cstdint>
#include <vector>

namespace mfd_fast {

// The values of mfd_fast.ops.mlp_program.Code.
enum MlpCode : std::int64_t {
  kLinear = 0,
  kActivation = 1,
  kLayerNorm = 2,
  kFourier = 3,
  kInput = 4,
  kGather = 5,
  kModulate = 6,
  kAdd = 7,
  kMultiplyAdd = 8,
  kCopy = 9
};

// The values of mfd_fast.ops.mlp_program.ACTIVATIONS.
enum MlpActivation : std::int64_t { kIdentity = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4, kTanh = 5 };

// One operation on slots, which are matrices with a row per sample. What a and b mean depends on the code.
struct MlpOp {
  MlpCode code;
  std::int64_t dst;
  std::int64_t src;
  std::int64_t other;
  std::int64_t a;
  std::int64_t b;
  const float* weight;
  const float* bias;
  const float* panels;  // the weight rearranged for matrix products, or null: read `weight` as it is
};

// A network: operations that depend on time and condition alone, then those that need the state.
// Slot 0 is the state, slot 1 the time.
struct MlpProgram {
  const std::int64_t* widths;  // of each slot
  const bool* of_time;         // whether time operations write a slot, slot 1 among them
  std::int64_t slots;
  const MlpOp* ops;
  std::int64_t time_ops;  // the first of them
  std::int64_t all_ops;
  std::int64_t output;
};

constexpr std::int64_t kMostMlpSlots = 512;

// Rows of a condition: float32 or int64 data, `stride` elements from row to row (0: shared by all rows).
struct MlpInput {
  const void* data;
  std::int64_t stride;
};

// One rollout: `rows` samples of widths[0] numbers, each with its own interval and equal steps.
struct MlpRollout {
  MlpProgram program;
  std::int64_t rows;
  const float* x;
  const float* t;
  const float* r;
  const double* host_t;  // from which steps are counted; null: from t and r, which are checked together with x
  const double* host_r;
  double step_size;         // 0: take `fixed_steps`
  std::int64_t fixed_steps;
  std::int64_t most_steps;  // run in a row, negative: no limit
  bool two_step;            // Adams-Bashforth 2 with a Heun start instead of Euler
  // The inputs of the conditional network and, under guidance, of the negative one after them.
  const MlpInput* inputs;
  std::int64_t inputs_per_group;
  std::int64_t groups;  // 2 under guidance, else 1
  const float* guidance_scale;
  std::int64_t guidance_stride;
  // Written, in the order of the rows.
  float* displacement;
  float* mean_velocity;
  std::int64_t* steps;  // run
  std::int64_t* calls;
  std::int64_t* status;
};

// Integrate all rollouts with at most `threads` threads. `lanes` chooses the width of the vectors (mlp_lanes), 0 the
// widest. Returns whether every row ended with Status.SUCCESS.
// Throws std::invalid_argument for a program that makes no sense, std::out_of_range for an index that has no row.
bool run_mlp_rollouts(std::vector<MlpRollout>& rollouts, int threads, int lanes);

// Widths of vectors in floats that this processor has, narrowest first.
std::vector<int> mlp_lanes();

}  // namespace mfd_fast
