// Adds the MLP rollouts to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace mfd_fast {

void define_mlp_rollout(pybind11::module_& module);

}  // namespace mfd_fast
