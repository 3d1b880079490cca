#include <pybind11/pybind11.h>

#include "register.hpp"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The loops over routes. Arrays are taken as they are: a dtype or layout that does not fit is refused.";
  r3::register_balance(module);
  r3::register_routes(module);
  r3::register_repack(module);
  r3::register_collect(module);
  r3::register_sets(module);
}
