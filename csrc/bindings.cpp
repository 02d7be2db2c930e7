// The Python face of the core: numpy views in, new numpy arrays out, no arithmetic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "mlp_bindings.hpp"
#include "rollout_plan.hpp"
#include "step_controller.hpp"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void require_rows(const py::array& array, const char* name, py::ssize_t rows) {
  if (array.ndim() == 1 && array.shape(0) == rows) return;
  throw std::invalid_argument(std::string(name) + " must have shape [" + std::to_string(rows) + "], one element a row");
}

void require_shape_of_x(const py::array& array, const char* name, const py::array& x) {
  bool equal = array.ndim() == x.ndim();
  for (py::ssize_t axis = 0; equal && axis < x.ndim(); ++axis) equal = array.shape(axis) == x.shape(axis);
  if (!equal) throw std::invalid_argument(std::string(name) + " must have the shape of x");
}

template <class T>
py::tuple advance(const Array<T>& t, const Array<T>& step, const Array<T>& previous_error,
                  const Array<std::int64_t>& status, const Array<T>& r, const Array<T>& x, const Array<T>& candidate,
                  const Array<T>& error, int error_order, double rtol, double atol, double max_step, double safety,
                  double min_factor, double max_factor, int threads) {
  const py::ssize_t rows = t.size();
  require_rows(t, "t", rows);
  require_rows(step, "step", rows);
  require_rows(previous_error, "previous_error", rows);
  require_rows(status, "status", rows);
  require_rows(r, "r", rows);
  if (x.ndim() < 1 || x.shape(0) != rows) throw std::invalid_argument("x must have as many rows as t has elements");
  require_shape_of_x(candidate, "candidate", x);
  require_shape_of_x(error, "error", x);
  py::ssize_t width = 1;
  for (py::ssize_t axis = 1; axis < x.ndim(); ++axis) width *= x.shape(axis);

  Array<T> next_t(rows), next_step(rows), next_previous_error(rows);
  Array<std::int64_t> next_status(rows);
  Array<bool> accepted(rows);
  const mfd_fast::StepControl control{rtol, atol, max_step, safety, min_factor, max_factor, error_order};
  const mfd_fast::Proposal<T> proposal{rows,          width,    t.data(), step.data(),      previous_error.data(),
                                       status.data(), r.data(), x.data(), candidate.data(), error.data()};
  const mfd_fast::Decision<T> decision{next_t.mutable_data(), next_step.mutable_data(),
                                       next_previous_error.mutable_data(), next_status.mutable_data(),
                                       accepted.mutable_data()};
  {
    const py::gil_scoped_release released;
    mfd_fast::advance(control, threads, proposal, decision);
  }
  return py::make_tuple(next_t, next_step, next_previous_error, next_status, accepted);
}

// noconvert: another dtype or layout is an error of the caller, never a silent copy.
template <class T>
void define_advance(py::module_& module) {
  module.def("advance", &advance<T>, py::arg("t").noconvert(), py::arg("step").noconvert(),
             py::arg("previous_error").noconvert(), py::arg("status").noconvert(), py::arg("r").noconvert(),
             py::arg("x").noconvert(), py::arg("candidate").noconvert(), py::arg("error").noconvert(), py::kw_only(),
             py::arg("error_order"), py::arg("rtol"), py::arg("atol"), py::arg("max_step"), py::arg("safety"),
             py::arg("min_factor"), py::arg("max_factor"), py::arg("threads"),
             "Decide on a proposed step of every row; returns (t, step, previous_error, status, accepted).");
}

using Integers = Array<std::int64_t>;

Integers to_array(const std::vector<std::int64_t>& values) {
  return Integers(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple schedule(const Integers& lengths, std::int64_t slots) {
  require_rows(lengths, "lengths", lengths.size());
  const auto found = mfd_fast::make_schedule(lengths.data(), lengths.size(), slots);
  return py::make_tuple(to_array(found.order), to_array(found.slot), to_array(found.begin), to_array(found.live));
}

template <class T>
void tabulate(Array<T>& table, const Integers& slot, const Integers& begin, const Integers& length,
              const Array<double>& t, const Array<double>& r, const Integers& steps, const Integers& run,
              const std::vector<double>& positions, const std::vector<std::int64_t>& stores,
              const std::vector<std::vector<double>>& coefficients, std::int64_t start, std::int64_t first) {
  const py::ssize_t rows = slot.size();
  require_rows(slot, "slot", rows);
  require_rows(begin, "begin", rows);
  require_rows(length, "length", rows);
  require_rows(t, "t", rows);
  require_rows(r, "r", rows);
  require_rows(steps, "steps", rows);
  require_rows(run, "run", rows);
  const std::size_t phases = positions.size();
  const auto cycle = static_cast<std::int64_t>(phases) - start;
  if (start < 1 || cycle < 1 || stores.size() != phases || coefficients.size() != phases) {
    throw std::invalid_argument("positions, stores and coefficients must have one entry for each of two phases or more");
  }
  const std::size_t width = coefficients.front().size();
  std::vector<double> flat;
  for (const auto& row : coefficients) {
    if (row.size() != width || width < 2 || width % 2) throw std::invalid_argument("coefficients must come in pairs");
    flat.insert(flat.end(), row.begin(), row.end());
  }
  if (table.ndim() != 3 || table.shape(1) != static_cast<py::ssize_t>(3 + width)) {
    throw std::invalid_argument("table must have shape [evaluations, 3 + coefficients, slots]");
  }
  for (py::ssize_t row = 0; row < rows; ++row) {
    if (slot.at(row) < 0 || slot.at(row) >= table.shape(2)) throw std::invalid_argument("slot must be within table");
  }
  const mfd_fast::Program program{start,         cycle,          static_cast<std::int64_t>(width) / 2 - 1,
                                  positions.data(), stores.data(), flat.data()};
  const mfd_fast::Intervals intervals{rows, slot.data(), begin.data(), length.data(), t.data(), r.data(),
                                      steps.data(), run.data()};
  mfd_fast::tabulate(program, intervals, first, table.shape(0), table.shape(2), table.mutable_data());
}

template <class T>
void define_tabulate(py::module_& module) {
  module.def("tabulate", &tabulate<T>, py::arg("table").noconvert(), py::arg("slot").noconvert(),
             py::arg("begin").noconvert(), py::arg("length").noconvert(), py::arg("t").noconvert(),
             py::arg("r").noconvert(), py::arg("steps").noconvert(), py::arg("run").noconvert(), py::arg("positions"),
             py::arg("stores"), py::arg("coefficients"), py::kw_only(), py::arg("start"), py::arg("first"),
             "Fill a table of zeros with the numbers of every evaluation and slot.");
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled core of mfd_fast: plain C++17 over numpy arrays, without torch.";
  module.attr("HAS_OPENMP") = mfd_fast::has_openmp();
  define_advance<float>(module);
  define_advance<double>(module);
  module.def("schedule", &schedule, py::arg("lengths").noconvert(), py::arg("slots"),
             "Put rows of these lengths into slots, longest first; returns (order, slot, begin, live).");
  define_tabulate<float>(module);
  define_tabulate<double>(module);
  mfd_fast::define_mlp_rollout(module);
}
