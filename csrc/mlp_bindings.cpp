// The Python face of the MLP rollouts. Programs come as arrays of 64-bit integers, tensors as addresses: a call from Python
// takes a few microseconds, which is what a rollout of a small network may take. The caller keeps the tensors alive.
#include "mlp_bindings.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <deque>
#include <memory>
#include <stdexcept>

#include "mlp_rollout.hpp"

namespace mfd_fast {
namespace {

namespace py = pybind11;

constexpr py::ssize_t kFieldsOfOp = 8, kFieldsOfInput = 2, kFieldsOfRollout = 21;

template <class T>
T* pointer(std::int64_t address) {
  return reinterpret_cast<T*>(static_cast<std::intptr_t>(address));
}

// What a rollout refers to, kept while it runs.
struct Owned {
  std::vector<std::int64_t> widths;
  std::unique_ptr<bool[]> of_time;
  std::vector<MlpOp> ops;
  std::vector<MlpInput> inputs;
};

std::vector<std::int64_t> integers(const py::handle& buffer) {
  const py::buffer_info info = py::reinterpret_borrow<py::buffer>(buffer).request();
  if (info.ndim != 1 || info.itemsize != 8) throw std::invalid_argument("expected an array of 64-bit integers");
  const auto* first = static_cast<const std::int64_t*>(info.ptr);
  return {first, first + info.size};
}

std::vector<MlpOp> operations(const std::vector<std::int64_t>& table) {
  if (table.size() % kFieldsOfOp != 0) throw std::invalid_argument("an operation has 8 fields");
  std::vector<MlpOp> ops;
  ops.reserve(table.size() / kFieldsOfOp);
  for (auto op = table.begin(); op != table.end(); op += kFieldsOfOp) {
    ops.push_back({static_cast<MlpCode>(op[0]), op[1], op[2], op[3], op[4], op[5], pointer<const float>(op[6]),
                   pointer<const float>(op[7]), nullptr});
  }
  return ops;
}

// Slots are of time if time operations write them; slot 1 holds the time.
void fill_program(MlpProgram& program, Owned& owned, std::int64_t time_ops, std::int64_t output) {
  const auto slots = static_cast<std::int64_t>(owned.widths.size()), all = static_cast<std::int64_t>(owned.ops.size());
  if (slots < 2 || time_ops < 0 || time_ops > all) throw std::invalid_argument("a program has too few slots or operations");
  owned.of_time = std::make_unique<bool[]>(owned.widths.size());
  owned.of_time[1] = true;
  for (std::int64_t i = 0; i < time_ops; ++i) {
    const std::int64_t dst = owned.ops[static_cast<std::size_t>(i)].dst;
    if (dst >= 0 && dst < slots) owned.of_time[static_cast<std::size_t>(dst)] = true;
  }
  program = {owned.widths.data(), owned.of_time.get(), slots, owned.ops.data(), time_ops, all, output};
}

MlpRollout rollout_from(const py::tuple& given, Owned& owned) {
  if (given.size() != kFieldsOfRollout) throw std::invalid_argument("a rollout has 21 fields");
  py::ssize_t next = 0;
  const auto integer = [&] { return given[next++].cast<std::int64_t>(); };
  MlpRollout rollout{};
  owned.widths = integers(given[next++]);
  owned.ops = operations(integers(given[next++]));
  const std::int64_t time_ops = integer(), output = integer();
  fill_program(rollout.program, owned, time_ops, output);
  const std::vector<std::int64_t> inputs = integers(given[next++]);
  for (std::size_t i = 0; i + 1 < inputs.size(); i += kFieldsOfInput) {
    owned.inputs.push_back({pointer<const void>(inputs[i]), inputs[i + 1]});
  }
  rollout.inputs = owned.inputs.data();
  rollout.groups = integer();
  if (rollout.groups < 1 || owned.inputs.size() % static_cast<std::size_t>(rollout.groups) != 0) {
    throw std::invalid_argument("inputs do not fit their groups");
  }
  rollout.inputs_per_group = static_cast<std::int64_t>(owned.inputs.size()) / rollout.groups;
  rollout.guidance_scale = pointer<const float>(integer());
  rollout.guidance_stride = integer();
  rollout.rows = integer();
  rollout.x = pointer<const float>(integer());
  rollout.t = pointer<const float>(integer());
  rollout.r = pointer<const float>(integer());
  rollout.host_t = pointer<const double>(integer());
  rollout.host_r = pointer<const double>(integer());
  rollout.step_size = given[next++].cast<double>();
  rollout.fixed_steps = integer();
  rollout.most_steps = integer();
  rollout.two_step = given[next++].cast<bool>();
  rollout.displacement = pointer<float>(integer());
  rollout.mean_velocity = pointer<float>(integer());
  auto* counts = pointer<std::int64_t>(integer());
  rollout.calls = counts, rollout.steps = counts + rollout.rows, rollout.status = counts + 2 * rollout.rows;
  return rollout;
}

bool mlp_rollout(const py::list& given, int threads, int lanes) {
  std::deque<Owned> owned;
  std::vector<MlpRollout> rollouts;
  for (const py::handle& one : given) {
    owned.emplace_back();
    rollouts.push_back(rollout_from(py::reinterpret_borrow<py::tuple>(one), owned.back()));
  }
  const py::gil_scoped_release released;
  return run_mlp_rollouts(rollouts, threads, lanes);
}

}  // namespace

void define_mlp_rollout(py::module_& module) {
  module.attr("MLP_LANES") = mlp_lanes();
  module.def("mlp_rollout", &mlp_rollout, py::arg("rollouts"), py::kw_only(), py::arg("threads"), py::arg("lanes") = 0,
             "Integrate MLP fields (mfd_fast.ops.mlp_rollout); returns whether every row succeeded.");
}

}  // namespace mfd_fast
