// The Python face of the core: numpy views in, new numpy arrays out, no arithmetic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

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

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled core of mfd_fast: plain C++17 over numpy arrays, without torch.";
  module.attr("HAS_OPENMP") = mfd_fast::has_openmp();
  define_advance<float>(module);
  define_advance<double>(module);
}
