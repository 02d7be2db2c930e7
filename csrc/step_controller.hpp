// Per-row adaptive step control: error norm, PI controller, accept or reject, result codes.
// The formulas are those of advance_reference in mfd_fast/ops/step_control.py, which is their definition.
// Plain C++17: neither Python nor torch.
#pragma once

#include <cstdint>

namespace mfd_fast {

// The values of mfd_fast.types.Status.
enum Status : std::int64_t { kSuccess = 0, kStepSizeUnderflow = 2, kNonFinite = 3, kRunning = 4 };

// The settings of AdaptiveSteps and the order of the error estimate. No largest step: infinity.
struct StepControl {
  double rtol;
  double atol;
  double max_step;
  double safety;
  double min_factor;
  double max_factor;
  int error_order;
};

// A proposed step of `rows` samples. Per row: t, step, previous_error, status, r; x, candidate, error hold
// rows * width elements, row after row.
template <class T>
struct Proposal {
  std::int64_t rows;
  std::int64_t width;
  const T* t;
  const T* step;
  const T* previous_error;
  const std::int64_t* status;
  const T* r;
  const T* x;
  const T* candidate;
  const T* error;
};

// What the controller decides: `rows` elements each.
template <class T>
struct Decision {
  T* t;
  T* step;
  T* previous_error;
  std::int64_t* status;
  bool* accepted;
};

// Decide on every row, with at most `threads` threads when the batch is large enough to be worth it.
// T is float or double. Throws std::invalid_argument if a size is negative or error_order or threads below one.
template <class T>
void advance(const StepControl& control, int threads, const Proposal<T>& proposal, const Decision<T>& decision);

// Whether this build can use more than one thread.
bool has_openmp();

}  // namespace mfd_fast
