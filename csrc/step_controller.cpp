#include "step_controller.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace mfd_fast {
namespace {

constexpr double kSmallestError = 1e-10;
constexpr double kSmallestPreviousError = 1e-4;
constexpr double kLastStepShare = 1 - 1e-6;
constexpr double kProportional = 0.7;
constexpr double kIntegral = 0.4;
// Below this many elements waking the other threads takes longer than the work.
constexpr std::int64_t kParallelElements = std::int64_t{1} << 16;

template <class T>
double error_norm(const StepControl& control, const T* x, const T* candidate, const T* error, std::int64_t width) {
  const T rtol = static_cast<T>(control.rtol);
  const T atol = static_cast<T>(control.atol);
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t j = 0; j < width; ++j) {
    const T scale = atol + rtol * std::max(std::abs(x[j]), std::abs(candidate[j]));
    // 0 * candidate: an infinite candidate would make the scale infinite and hide itself.
    const double ratio = static_cast<double>((error[j] + T{0} * candidate[j]) / scale);
    total += ratio * ratio;
  }
  return std::sqrt(total / static_cast<double>(width));
}

// A signed step of the given size from t towards r; exactly r - t if it would (nearly) reach r.
template <class T>
T step_towards(double size, T t, T r) {
  const T gap = r - t;
  if (size >= std::abs(static_cast<double>(gap)) * kLastStepShare) return gap;
  return static_cast<T>(std::copysign(size, static_cast<double>(gap)));
}

double step_factor(const StepControl& control, double norm, double previous_error, bool accepted) {
  const double floored = std::max(norm, kSmallestError);
  if (!accepted) {
    return std::clamp(control.safety * std::pow(floored, -1.0 / control.error_order), control.min_factor, 1.0);
  }
  const double factor = control.safety * std::pow(floored, -kProportional / control.error_order) *
                        std::pow(previous_error, kIntegral / control.error_order);
  return std::clamp(factor, control.min_factor, control.max_factor);
}

template <class T>
void advance_row(const StepControl& control, const Proposal<T>& in, const Decision<T>& out, std::int64_t i) {
  out.t[i] = in.t[i];
  out.step[i] = in.step[i];
  out.previous_error[i] = in.previous_error[i];
  out.status[i] = in.status[i];
  out.accepted[i] = false;
  if (in.status[i] != kRunning) return;

  const std::int64_t first = i * in.width;
  const double norm = error_norm(control, in.x + first, in.candidate + first, in.error + first, in.width);
  if (!std::isfinite(norm)) {
    out.status[i] = kNonFinite;
    return;
  }
  const bool accepted = norm <= 1;
  const double factor = step_factor(control, norm, static_cast<double>(in.previous_error[i]), accepted);
  const T r = in.r[i];
  T t = in.t[i];
  if (accepted) {
    t = in.step[i] == r - t ? r : t + in.step[i];
    out.previous_error[i] = static_cast<T>(std::max(norm, kSmallestPreviousError));
  }
  const double size = std::min(std::abs(static_cast<double>(in.step[i])) * factor, control.max_step);
  const T step = step_towards(size, t, r);
  out.t[i] = t;
  out.step[i] = step;
  out.accepted[i] = accepted;
  if (t == r) {
    out.status[i] = kSuccess;
  } else if (static_cast<T>(t + step) == t) {
    out.status[i] = kStepSizeUnderflow;
  }
}

}  // namespace

template <class T>
void advance(const StepControl& control, int threads, const Proposal<T>& proposal, const Decision<T>& decision) {
  if (proposal.rows < 0 || proposal.width < 0) throw std::invalid_argument("rows and width must not be negative");
  if (control.error_order < 1) throw std::invalid_argument("error_order must be at least 1");
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
#pragma omp parallel for schedule(static) num_threads(threads) \
    if (threads > 1 && proposal.rows * proposal.width >= kParallelElements)
  for (std::int64_t i = 0; i < proposal.rows; ++i) {
    advance_row(control, proposal, decision, i);
  }
}

template void advance(const StepControl&, int, const Proposal<float>&, const Decision<float>&);
template void advance(const StepControl&, int, const Proposal<double>&, const Decision<double>&);

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace mfd_fast
