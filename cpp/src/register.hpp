#pragma once

#include <pybind11/pybind11.h>

namespace r3 {

void register_balance(pybind11::module_& module);
void register_routes(pybind11::module_& module);
void register_repack(pybind11::module_& module);
void register_collect(pybind11::module_& module);
void register_sets(pybind11::module_& module);

}  // namespace r3
