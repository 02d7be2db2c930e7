#include "mlp_rollout.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>

#include "mlp_block.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mfd_fast {
namespace {

// The values of mfd_fast.types.Status.
constexpr std::int64_t kDone = 0, kOutOfBudget = 1, kNotFinite = 3;

// Rows that go through their steps together: enough to read each weight from far away once for all of them.
constexpr std::int64_t kBlockRows = 16;

// mfd_fast.step_control.MAX_STEPS.
constexpr double kMostSteps = 100000;

constexpr std::int64_t kFloatsOfALine = 16;

// A weight is rearranged if so many rows times evaluations read it; one row reads it as it is, unless it is narrow.
constexpr std::int64_t kReadsWorthPacking = 16;

std::vector<const MlpKernels*> find_kernels() {
  std::vector<const MlpKernels*> found{&mlp_kernels_baseline()};
#ifdef MFD_FAST_X86_VARIANTS
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&mlp_kernels_avx2());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    found.push_back(&mlp_kernels_avx512());
  }
#endif
  return found;
}

const std::vector<const MlpKernels*>& all_kernels() {
  static const std::vector<const MlpKernels*> kernels = find_kernels();
  return kernels;
}

const MlpKernels& kernels_of(int lanes) {
  const auto& kernels = all_kernels();
  if (lanes == 0) return *kernels.back();
  for (const MlpKernels* one : kernels) {
    if (one->lanes == lanes) return *one;
  }
  throw std::invalid_argument("this processor has no vectors of " + std::to_string(lanes) + " floats");
}

// Memory that a thread keeps from call to call: fresh pages cost more than a short rollout.
class Arena {
 public:
  float* floats(std::int64_t count) {
    if (count > size_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (static_cast<std::size_t>(count) * 4 + 63) / 64 * 64)));
      if (memory_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
      size_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  std::int64_t size_ = 0;
};

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

bool reads_other(MlpCode code) { return code == kModulate || code == kAdd || code == kMultiplyAdd; }
bool reads_source(MlpCode code) { return code != kInput && code != kGather; }

void check_op(const MlpProgram& program, const MlpOp& op, bool in_time, std::int64_t inputs) {
  const auto is_slot = [&](std::int64_t slot) { return slot >= 0 && slot < program.slots; };
  require(op.code >= kLinear && op.code <= kCopy, "an operation has an unknown code");
  require(is_slot(op.dst) && op.dst > 1, "an operation writes a slot that is not there");
  require(program.of_time[op.dst] == in_time, "an operation of the state writes a slot of time, or the other way round");
  const std::int64_t width = program.widths[op.dst];
  if (reads_source(op.code)) {
    require(is_slot(op.src) && (!in_time || program.of_time[op.src]), "an operation reads a slot that is not there");
    const std::int64_t from = program.widths[op.src];
    if (op.code == kLinear) {
      require(op.weight != nullptr && op.src != op.dst && program.of_time[op.src] == in_time, "a product is malformed");
    } else if (op.code == kFourier) {
      require(from == 1 && op.weight != nullptr && op.bias != nullptr, "Fourier features are malformed");
    } else if (op.code == kCopy) {
      require(op.a >= 0 && op.a + from <= width, "a copy does not fit in its slot");
    } else {
      require(from == width, "an operation joins slots of different widths");
    }
  } else {
    require(op.a >= 0 && op.a < inputs && (op.code == kInput || op.weight != nullptr), "an input is not there");
  }
  if (reads_other(op.code)) {
    require(is_slot(op.other) && (!in_time || program.of_time[op.other]), "an operation reads a slot that is not there");
    const std::int64_t other = program.widths[op.other];
    const bool fits = op.code == kModulate
                          ? op.a >= 0 && op.b >= 0 && op.a + width <= other && op.b + width <= other
                          : other == width;
    require(fits, "an operation joins slots of different widths");
  }
  require(op.code != kActivation || (op.a >= kIdentity && op.a <= kTanh), "an activation is unknown");
}

void check_indices(const MlpRollout& rollout, const MlpOp& op) {
  for (std::int64_t group = 0; group < rollout.groups; ++group) {
    const MlpInput& input = rollout.inputs[group * rollout.inputs_per_group + op.a];
    const auto* index = static_cast<const std::int64_t*>(input.data);
    for (std::int64_t i = 0; i < (input.stride == 0 ? 1 : rollout.rows); ++i) {
      if (index[i * input.stride] < 0 || index[i * input.stride] >= op.b) throw std::out_of_range("no such row");
    }
  }
}

// 0 * v is 0 for a finite v and NaN for any other.
bool all_finite(const float* values, std::int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t j = 0; j < count; ++j) sum += 0.0f * values[j];
  return sum == 0.0f;
}

void check_values(const MlpRollout& rollout) {
  require(all_finite(rollout.t, rollout.rows) && all_finite(rollout.r, rollout.rows), "t and r must be finite");
  require(all_finite(rollout.x, rollout.rows * rollout.program.widths[0]), "x must be finite");
}

void check(const MlpRollout& rollout) {
  const MlpProgram& program = rollout.program;
  require(program.slots >= 2 && program.slots <= kMostMlpSlots, "a program has too few or too many slots");
  for (std::int64_t slot = 0; slot < program.slots; ++slot) {
    require(program.widths[slot] >= 1, "a slot is narrower than one number");
  }
  require(program.widths[1] == 1 && program.of_time[1] && !program.of_time[0], "slots 0 and 1 are state and time");
  require(program.output > 1 && program.output < program.slots && !program.of_time[program.output] &&
              program.widths[program.output] == program.widths[0],
          "the output must be like the state");
  // A tensor without rows has no address.
  const bool has_scale = rollout.guidance_scale != nullptr || rollout.rows == 0;
  require(rollout.groups == 1 || (rollout.groups == 2 && has_scale), "guidance is malformed");
  for (std::int64_t i = 0; i < program.all_ops; ++i) {
    check_op(program, program.ops[i], i < program.time_ops, rollout.inputs_per_group);
    if (program.ops[i].code == kGather) check_indices(rollout, program.ops[i]);
  }
  if (rollout.host_t == nullptr) check_values(rollout);
}

// The number of equal steps of each row: mfd_fast.step_control.FixedSteps.count.
std::vector<std::int64_t> count_steps(const MlpRollout& rollout) {
  std::vector<std::int64_t> planned(static_cast<std::size_t>(rollout.rows));
  for (std::int64_t i = 0; i < rollout.rows; ++i) {
    const double t = rollout.host_t != nullptr ? rollout.host_t[i] : static_cast<double>(rollout.t[i]);
    const double r = rollout.host_r != nullptr ? rollout.host_r[i] : static_cast<double>(rollout.r[i]);
    std::int64_t steps = rollout.fixed_steps;
    if (rollout.step_size > 0) {
      const double needed = std::abs(t - r) / rollout.step_size;
      require(needed <= kMostSteps, "a row needs too many steps");
      steps = std::max<std::int64_t>(1, static_cast<std::int64_t>(std::ceil(needed - 1e-6)));
    }
    planned[static_cast<std::size_t>(i)] = t == r ? 0 : steps;
  }
  return planned;
}

// A rollout with what its blocks share.
struct Work {
  std::vector<std::int64_t> planned;
  std::vector<std::int64_t> order;  // rows, most steps first
  std::vector<MlpOp> ops;
};

Work plan(MlpRollout& rollout) {
  Work work;
  work.planned = count_steps(rollout);
  work.order.resize(static_cast<std::size_t>(rollout.rows));
  std::iota(work.order.begin(), work.order.end(), std::int64_t{0});
  for (std::int64_t i = 0; i < rollout.rows; ++i) {
    const std::int64_t planned = work.planned[static_cast<std::size_t>(i)];
    const std::int64_t run = rollout.most_steps < 0 ? planned : std::min(planned, rollout.most_steps);
    rollout.steps[i] = run;
    rollout.calls[i] = rollout.two_step ? run + 1 : std::max<std::int64_t>(1, run);
    rollout.status[i] = run < planned ? kOutOfBudget : kDone;
  }
  std::stable_sort(work.order.begin(), work.order.end(),
                   [&](std::int64_t a, std::int64_t b) { return rollout.steps[a] > rollout.steps[b]; });
  work.ops.assign(rollout.program.ops, rollout.program.ops + rollout.program.all_ops);
  rollout.program.ops = work.ops.data();
  return work;
}

// Floats of the panels of operation i, 0 where its weight is read as it is.
std::int64_t floats_of_panels(const MlpRollout& rollout, std::int64_t i, const MlpKernels& kernels) {
  const MlpOp& op = rollout.program.ops[i];
  if (op.code != kLinear) return 0;
  const std::int64_t in = rollout.program.widths[op.src], out = rollout.program.widths[op.dst];
  const bool narrow = in < 2 * kernels.lanes;
  const bool one_row = rollout.rows * rollout.groups == 1 && i >= rollout.program.time_ops;
  const std::int64_t evaluations = std::accumulate(rollout.calls, rollout.calls + rollout.rows, std::int64_t{0});
  const bool few = evaluations * rollout.groups < kReadsWorthPacking;
  return !narrow && (one_row || few) ? 0 : kernels.panel_floats(in, out);
}

// Rows first..first + rows of one rollout.
struct Task {
  std::size_t rollout;
  std::int64_t first;
  std::int64_t rows;
};

std::vector<Task> cut(const std::vector<MlpRollout>& rollouts, int threads) {
  std::vector<Task> tasks;
  for (std::size_t k = 0; k < rollouts.size(); ++k) {
    const std::int64_t rows = rollouts[k].rows;
    const std::int64_t size = std::clamp<std::int64_t>((rows + threads - 1) / threads, 1, kBlockRows);
    for (std::int64_t first = 0; first < rows; first += size) tasks.push_back({k, first, std::min(size, rows - first)});
  }
  return tasks;
}

int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

void pack_weights(std::vector<MlpRollout>& rollouts, std::vector<Work>& works, const MlpKernels& kernels, float* free) {
  for (std::size_t k = 0; k < rollouts.size(); ++k) {
    const MlpProgram& program = rollouts[k].program;
    for (std::int64_t i = 0; i < program.all_ops; ++i) {
      const std::int64_t floats = floats_of_panels(rollouts[k], i, kernels);
      if (floats == 0) continue;
      MlpOp& op = works[k].ops[static_cast<std::size_t>(i)];
      kernels.pack(op.weight, program.widths[op.src], program.widths[op.dst], free);
      op.panels = free;
      free += (floats + kFloatsOfALine - 1) / kFloatsOfALine * kFloatsOfALine;
    }
  }
}

bool mark_bad_rows(const MlpRollout& rollout) {
  bool good = true;
  const std::int64_t features = rollout.program.widths[0];
  for (std::int64_t i = 0; i < rollout.rows; ++i) {
    if (!all_finite(rollout.mean_velocity + i * features, features)) rollout.status[i] = kNotFinite;
    good = good && rollout.status[i] == kDone;
  }
  return good;
}

}  // namespace

bool run_mlp_rollouts(std::vector<MlpRollout>& rollouts, int threads, int lanes) {
  require(threads >= 1, "threads must be at least 1");
  const MlpKernels& kernels = kernels_of(lanes);
  std::vector<Work> works;
  std::int64_t packed = 0, scratch = 0;
  for (MlpRollout& rollout : rollouts) {
    check(rollout);
    works.push_back(plan(rollout));
    for (std::int64_t i = 0; i < rollout.program.all_ops; ++i) {
      packed += floats_of_panels(rollout, i, kernels) + kFloatsOfALine;
    }
    scratch = std::max(scratch, kernels.scratch_floats(rollout, std::min(kBlockRows, rollout.rows)) + kFloatsOfALine);
  }
  scratch = scratch / kFloatsOfALine * kFloatsOfALine;
  thread_local Arena arena;
  float* const memory = arena.floats(packed + scratch * threads);
  pack_weights(rollouts, works, kernels, memory + scratch * threads);
  const std::vector<Task> tasks = cut(rollouts, threads);
  const auto count = static_cast<std::int64_t>(tasks.size());
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && count > 1)
  for (std::int64_t i = 0; i < count; ++i) {
    const Task& task = tasks[static_cast<std::size_t>(i)];
    const Work& work = works[task.rollout];
    kernels.run({&rollouts[task.rollout], work.order.data() + task.first, work.planned.data(), task.rows,
                 memory + scratch * this_thread()});
  }
  bool good = true;
  for (const MlpRollout& rollout : rollouts) good = mark_bad_rows(rollout) && good;
  return good;
}

std::vector<int> mlp_lanes() {
  std::vector<int> lanes;
  for (const MlpKernels* one : all_kernels()) lanes.push_back(one->lanes);
  return lanes;
}

}  // namespace mfd_fast
