#include "rollout_plan.hpp"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace mfd_fast {
namespace {

// When a slot is free again, and which slot.
using Free = std::pair<std::int64_t, std::int64_t>;

// Name the slots anew so that those that work longest come first: then nothing ever moves from slot to slot.
void sort_slots(std::vector<std::int64_t>& ends, Schedule& schedule) {
  std::vector<std::int64_t> by_end(ends.size()), name(ends.size());
  std::iota(by_end.begin(), by_end.end(), 0);
  std::stable_sort(by_end.begin(), by_end.end(), [&](auto a, auto b) { return ends[a] > ends[b]; });
  for (std::size_t rank = 0; rank < by_end.size(); ++rank) name[by_end[rank]] = static_cast<std::int64_t>(rank);
  for (auto& slot : schedule.slot) slot = name[slot];
  std::sort(ends.begin(), ends.end(), std::greater<>());
}

}  // namespace

Schedule make_schedule(const std::int64_t* lengths, std::int64_t rows, std::int64_t slots) {
  if (rows < 0 || slots < 1) throw std::invalid_argument("rows must not be negative and slots at least 1");
  if (std::any_of(lengths, lengths + rows, [](auto length) { return length < 0; })) {
    throw std::invalid_argument("lengths must not be negative");
  }
  Schedule schedule{std::vector<std::int64_t>(rows), std::vector<std::int64_t>(rows), std::vector<std::int64_t>(rows),
                    {}};
  std::iota(schedule.order.begin(), schedule.order.end(), 0);
  std::stable_sort(schedule.order.begin(), schedule.order.end(),
                   [&](auto a, auto b) { return lengths[a] > lengths[b]; });
  std::vector<std::int64_t> ends(std::min(slots, rows), 0);
  std::priority_queue<Free, std::vector<Free>, std::greater<>> free;
  for (std::size_t slot = 0; slot < ends.size(); ++slot) free.emplace(0, static_cast<std::int64_t>(slot));
  for (const auto row : schedule.order) {
    const auto [time, slot] = free.top();
    free.pop();
    schedule.slot[row] = slot;
    schedule.begin[row] = time;
    ends[slot] = time + lengths[row];
    free.emplace(ends[slot], slot);
  }
  sort_slots(ends, schedule);
  const std::int64_t evaluations = ends.empty() ? 0 : ends.front();
  auto working = static_cast<std::int64_t>(ends.size());
  schedule.live.resize(evaluations);
  for (std::int64_t evaluation = 0; evaluation < evaluations; ++evaluation) {
    while (ends[working - 1] <= evaluation) --working;
    schedule.live[evaluation] = working;
  }
  return schedule;
}

template <class T>
void tabulate(const Program& program, const Intervals& in, std::int64_t first, std::int64_t count, std::int64_t slots,
              T* table) {
  const std::int64_t width = 2 * (1 + program.memories);
  for (std::int64_t row = 0; row < in.rows; ++row) {
    const double h = in.run[row] == 0 ? 0.0 : (in.r[row] - in.t[row]) / static_cast<double>(in.steps[row]);
    const auto [low, high] = std::minmax(in.t[row], in.r[row]);
    const std::int64_t from = std::max(first, in.begin[row]);
    const std::int64_t to = std::min(first + count, in.begin[row] + in.length[row]);
    for (std::int64_t evaluation = from; evaluation < to; ++evaluation) {
      const std::int64_t late = evaluation - in.begin[row] - program.start;
      const std::int64_t rounds = late < 0 ? 0 : late / program.cycle;
      const std::int64_t phase = program.start + (late < 0 ? late : late % program.cycle);
      T* cell = table + (evaluation - first) * (3 + width) * slots + in.slot[row];
      const double position = program.positions[phase] + static_cast<double>(rounds);
      cell[0] = static_cast<T>(std::clamp(in.t[row] + position * h, low, high));
      cell[slots] = T{1};
      cell[2 * slots] = static_cast<T>(program.stores[phase]);
      for (std::int64_t j = 0; j < width; ++j) {
        cell[(3 + j) * slots] = static_cast<T>(program.coefficients[phase * width + j] * h);
      }
      // A row without steps ends with its velocity in place of a displacement.
      if (in.run[row] == 0) cell[3 * slots] = T{1};
    }
  }
}

template void tabulate(const Program&, const Intervals&, std::int64_t, std::int64_t, std::int64_t, float*);
template void tabulate(const Program&, const Intervals&, std::int64_t, std::int64_t, std::int64_t, double*);

}  // namespace mfd_fast
