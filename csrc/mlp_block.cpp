#include "mlp_block.hpp"

#include "mlp_products.hpp"

// The name of the function that this compilation defines.
#ifndef MFD_FAST_MLP_KERNELS
#define MFD_FAST_MLP_KERNELS mlp_kernels_baseline
#endif

namespace mfd_fast {
namespace {

// Rows that are enough to read a weight once for all of them: so many are evaluated in time at once, if there are few.
constexpr std::int64_t kTimeRows = 16;
constexpr float kLayerNormEpsilon = 1e-5f;

// Floats from row to row of a slot.
inline std::int64_t stride_of(std::int64_t width) { return rounded_up(width); }

inline std::int64_t time_points_at_once(std::int64_t rows) { return rows >= kTimeRows ? 1 : kTimeRows / rows; }

// Rows that a slot has room for in a block of so many, whose rows become fewer.
inline std::int64_t slot_rows(std::int64_t rows, bool of_time) { return of_time && rows < kTimeRows ? kTimeRows : rows; }

inline float smaller(float a, float b) { return b < a ? b : a; }
inline float larger(float a, float b) { return a < b ? b : a; }

// The state of a block under way. Slots hold a row for each live sample of each group, group after group; slots of time
// hold that for several time points, laid out for the samples that were live when they were computed.
class Block {
 public:
  explicit Block(const MlpBlock& block)
      : task_(block), rollout_(*block.rollout), program_(rollout_.program), groups_(rollout_.groups) {
    features_ = program_.widths[0];
    stride_ = stride_of(features_);
    float* free = block.scratch;
    const auto take = [&free](std::int64_t floats) {
      float* taken = free;
      free += floats;
      return taken;
    };
    const std::int64_t rows = block.rows * groups_;
    for (std::int64_t slot = 0; slot < program_.slots; ++slot) {
      slots_[slot] = take(slot_rows(rows, program_.of_time[slot]) * stride_of(program_.widths[slot]));
    }
    for (float** state : {&state_, &displacement_, &velocity_, &previous_}) *state = take(block.rows * stride_);
    const auto take_column = [&] { return take(rounded_up(block.rows)); };
    t_ = take_column(), r_ = take_column(), h_ = take_column();
    for (float* zero = block.scratch; zero < free; ++zero) *zero = 0;
  }

  static std::int64_t floats(const MlpRollout& rollout, std::int64_t rows) {
    const MlpProgram& program = rollout.program;
    const std::int64_t group_rows = rows * rollout.groups;
    std::int64_t total = 4 * rows * stride_of(program.widths[0]) + 3 * rounded_up(rows);
    for (std::int64_t slot = 0; slot < program.slots; ++slot) {
      total += slot_rows(group_rows, program.of_time[slot]) * stride_of(program.widths[slot]);
    }
    return total;
  }

  void run() {
    begin();
    const std::int64_t most = steps(0);
    evaluate(0, state_);
    for (std::int64_t i = 0; i < task_.rows; ++i) {
      if (steps(i) == 0) copy(velocity_ + i * stride_, rollout_.mean_velocity + row(i) * features_, features_);
    }
    for (std::int64_t step = 0; step < most; ++step) {
      while (steps(live_ - 1) <= step) --live_;
      if (step > 0) evaluate(step, state_);
      rollout_.two_step ? two_step(step) : euler();
      for (std::int64_t i = 0; i < live_; ++i) {
        const float *start = rollout_.x + row(i) * features_, *moved = displacement_ + i * stride_;
        for (std::int64_t j = 0; j < features_; ++j) state_[i * stride_ + j] = start[j] + moved[j];
      }
    }
    end();
  }

 private:
  std::int64_t row(std::int64_t i) const { return task_.order[i]; }
  std::int64_t steps(std::int64_t i) const { return rollout_.steps[row(i)]; }

  static void copy(const float* from, float* to, std::int64_t count) {
    for (std::int64_t j = 0; j < count; ++j) to[j] = from[j];
  }

  void begin() {
    live_ = task_.rows;
    for (std::int64_t i = 0; i < live_; ++i) {
      t_[i] = rollout_.t[row(i)], r_[i] = rollout_.r[row(i)];
      const std::int64_t planned = task_.planned[row(i)];
      h_[i] = (r_[i] - t_[i]) / static_cast<float>(planned > 0 ? planned : 1);
      copy(rollout_.x + row(i) * features_, state_ + i * stride_, features_);
    }
  }

  void end() {
    for (std::int64_t i = 0; i < task_.rows; ++i) {
      const float* moved = displacement_ + i * stride_;
      copy(moved, rollout_.displacement + row(i) * features_, features_);
      if (steps(i) == 0) continue;
      const bool all = steps(i) == task_.planned[row(i)];
      const float covered = all ? r_[i] - t_[i] : static_cast<float>(steps(i)) * h_[i];
      float* mean = rollout_.mean_velocity + row(i) * features_;
      for (std::int64_t j = 0; j < features_; ++j) mean[j] = moved[j] / covered;
    }
  }

  void euler() {
    for (std::int64_t i = 0; i < live_; ++i) {
      for (std::int64_t j = i * stride_; j < (i + 1) * stride_; ++j) displacement_[j] += h_[i] * velocity_[j];
    }
  }

  void two_step(std::int64_t step) {
    if (step == 0) {
      // The velocity at the start is the previous one of the next step; the state at the end is that step's, too.
      for (std::int64_t i = 0; i < live_; ++i) {
        for (std::int64_t j = i * stride_; j < (i + 1) * stride_; ++j) {
          previous_[j] = velocity_[j];
          state_[j] += h_[i] * velocity_[j];
        }
      }
      evaluate(1, state_);
      for (std::int64_t i = 0; i < live_; ++i) {
        for (std::int64_t j = i * stride_; j < (i + 1) * stride_; ++j) {
          displacement_[j] += h_[i] * (0.5f * (previous_[j] + velocity_[j]));
        }
      }
      return;
    }
    for (std::int64_t i = 0; i < live_; ++i) {
      for (std::int64_t j = i * stride_; j < (i + 1) * stride_; ++j) {
        displacement_[j] += h_[i] * (1.5f * velocity_[j] - 0.5f * previous_[j]);
        previous_[j] = velocity_[j];
      }
    }
  }

  // The velocity of the live rows at time point `point`.
  void evaluate(std::int64_t point, const float* state) {
    if (point >= time_end_ || point < time_begin_) evaluate_time(point);
    time_offset_ = (point - time_begin_) * groups_ * time_rows_;
    for (std::int64_t g = 0; g < groups_; ++g) copy(state, slots_[0] + g * live_ * stride_, live_ * stride_);
    for (std::int64_t i = program_.time_ops; i < program_.all_ops; ++i) apply(program_.ops[i], groups_ * live_);
    const float* out = slots_[program_.output];
    if (groups_ == 1) return copy(out, velocity_, live_ * stride_);
    const float* negative = out + live_ * stride_;
    for (std::int64_t i = 0; i < live_; ++i) {
      const float scale = rollout_.guidance_scale[row(i) * rollout_.guidance_stride];
      for (std::int64_t j = i * stride_; j < (i + 1) * stride_; ++j) {
        velocity_[j] = negative[j] + scale * (out[j] - negative[j]);
      }
    }
  }

  // Whatever depends on time and condition alone, for the time points from `point` on.
  void evaluate_time(std::int64_t point) {
    const std::int64_t last = mlp_time_points(steps(0), rollout_.two_step);
    time_rows_ = live_;
    time_begin_ = point;
    time_end_ = point + time_points_at_once(groups_ * live_);
    if (time_end_ > last) time_end_ = last;
    float* times = slots_[1];
    const std::int64_t stride = stride_of(1);
    for (std::int64_t p = point; p < time_end_; ++p) {
      for (std::int64_t g = 0; g < groups_; ++g) {
        for (std::int64_t i = 0; i < live_; ++i, times += stride) {
          // t + h may pass r by a rounding error, and the steps of a row may have ended.
          const float now = t_[i] + static_cast<float>(p) * h_[i];
          *times = smaller(larger(now, smaller(t_[i], r_[i])), larger(t_[i], r_[i]));
        }
      }
    }
    const std::int64_t rows = (time_end_ - time_begin_) * groups_ * live_;
    for (std::int64_t i = 0; i < program_.time_ops; ++i) apply(program_.ops[i], rows);
  }

  // Row j of an operation on state slots reads this row of a slot of time.
  std::int64_t time_row(std::int64_t j) const { return time_offset_ + j / live_ * time_rows_ + j % live_; }

  const float* source(std::int64_t slot, std::int64_t j, bool in_time) const {
    const std::int64_t from = program_.of_time[slot] && !in_time ? time_row(j) : j;
    return slots_[slot] + from * stride_of(program_.widths[slot]);
  }

  // Row j of a condition: rows of a group are live samples, in slots of time for several time points.
  std::int64_t input_row(std::int64_t j, const MlpInput** input, std::int64_t index) const {
    *input = &rollout_.inputs[j / live_ % groups_ * rollout_.inputs_per_group + index];
    return row(j % live_) * (*input)->stride;
  }

  void apply(const MlpOp& op, std::int64_t rows) {
    const std::int64_t width = program_.widths[op.dst], stride = stride_of(width);
    const bool in_time = program_.of_time[op.dst];
    float* dst = slots_[op.dst];
    if (op.code == kLinear) return linear(op, rows);
    for (std::int64_t j = 0; j < rows; ++j, dst += stride) {
      switch (op.code) {
        case kActivation:
          activate(static_cast<MlpActivation>(op.a), source(op.src, j, in_time), dst, stride);
          break;
        case kLayerNorm:
          normalise(source(op.src, j, in_time), dst, width);
          break;
        case kFourier: {
          const float time = *source(op.src, j, in_time);
          for (std::int64_t k = 0; k < width; ++k) dst[k] = op.bias[k] + time * op.weight[k];
          for (std::int64_t k = 0; k < stride; k += kLanes) store(dst + k, sine(load(dst + k)));
          break;
        }
        case kInput: {
          const MlpInput* input;
          const std::int64_t from = input_row(j, &input, op.a);
          copy(static_cast<const float*>(input->data) + from, dst, width);
          break;
        }
        case kGather: {
          const MlpInput* input;
          const std::int64_t from = input_row(j, &input, op.a);
          const std::int64_t index = static_cast<const std::int64_t*>(input->data)[from];
          copy(op.weight + index * width, dst, width);
          break;
        }
        case kModulate: {
          const float *src = source(op.src, j, in_time), *other = source(op.other, j, in_time);
          for (std::int64_t k = 0; k < width; ++k) dst[k] = src[k] + other[op.b + k] + src[k] * other[op.a + k];
          break;
        }
        case kAdd: {
          const float *src = source(op.src, j, in_time), *other = source(op.other, j, in_time);
          for (std::int64_t k = 0; k < stride; ++k) dst[k] = src[k] + other[k];
          break;
        }
        case kMultiplyAdd: {
          const float *src = source(op.src, j, in_time), *other = source(op.other, j, in_time);
          for (std::int64_t k = 0; k < stride; ++k) dst[k] += src[k] * other[k];
          break;
        }
        case kCopy:
          copy(source(op.src, j, in_time), dst + op.a, program_.widths[op.src]);
          break;
        case kLinear:
          break;
      }
    }
  }

  // Both slots are of the same kind: a product of a slot of time is an operation of time.
  void linear(const MlpOp& op, std::int64_t rows) {
    const std::int64_t in = program_.widths[op.src], out = program_.widths[op.dst];
    const Rows all{slots_[op.src], stride_of(in), slots_[op.dst], stride_of(out), rows};
    if (op.panels != nullptr) {
      product_with_panels(all, op.panels, in, out);
    } else {
      product_with_weight(all, op.weight, in, out);
    }
    if (op.bias == nullptr) return;
    for (std::int64_t j = 0; j < rows; ++j) {
      float* dst = all.out + j * all.out_stride;
      for (std::int64_t k = 0; k < out; ++k) dst[k] += op.bias[k];
    }
  }

  template <class Function>
  static void map(const float* src, float* dst, std::int64_t stride, Function function) {
    for (std::int64_t k = 0; k < stride; k += kLanes) store(dst + k, function(load(src + k)));
  }

  static void activate(MlpActivation kind, const float* src, float* dst, std::int64_t stride) {
    switch (kind) {
      case kIdentity:
        return copy(src, dst, stride);
      case kSilu:
        return map(src, dst, stride, [](Vec x) { return silu(x); });
      case kGelu:
        return map(src, dst, stride, [](Vec x) { return gelu(x); });
      case kGeluTanh:
        return map(src, dst, stride, [](Vec x) { return gelu_tanh(x); });
      case kRelu:
        return map(src, dst, stride, [](Vec x) { return relu(x); });
      case kTanh:
        return map(src, dst, stride, [](Vec x) { return hyperbolic_tangent(x); });
    }
  }

  static float sum(Vec value) {
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += value[i];
    return total;
  }

  static void normalise(const float* src, float* dst, std::int64_t width) {
    const std::int64_t whole = width / kLanes * kLanes;
    Vec sums = {};
    for (std::int64_t k = 0; k < whole; k += kLanes) sums += load(src + k);
    float total = sum(sums);
    for (std::int64_t k = whole; k < width; ++k) total += src[k];
    const float mean = total / static_cast<float>(width);
    sums = Vec{};
    for (std::int64_t k = 0; k < whole; k += kLanes) {
      const Vec centred = load(src + k) - mean;
      sums += centred * centred;
    }
    total = sum(sums);
    for (std::int64_t k = whole; k < width; ++k) total += (src[k] - mean) * (src[k] - mean);
    const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(width) + kLayerNormEpsilon);
    for (std::int64_t k = 0; k < width; ++k) dst[k] = (src[k] - mean) * scale;
  }

  const MlpBlock& task_;
  const MlpRollout& rollout_;
  const MlpProgram& program_;
  const std::int64_t groups_;
  std::int64_t features_, stride_;
  float* slots_[kMostMlpSlots];
  float *state_, *displacement_, *velocity_, *previous_, *t_, *r_, *h_;
  std::int64_t live_ = 0;
  std::int64_t time_rows_ = 0, time_begin_ = 0, time_end_ = 0, time_offset_ = 0;
};

void run_block(const MlpBlock& block) { Block(block).run(); }

}  // namespace

const MlpKernels& MFD_FAST_MLP_KERNELS() {
  static constexpr MlpKernels kKernels{kLanes, &Block::floats, &run_block, &panel_floats, &pack};
  return kKernels;
}

}  // namespace mfd_fast
