// SPDX-License-Identifier: BSD-3-Clause
//
// Looks at many entries of Python dictionaries in one call, to see whether modules are still as they were found. In
// Python, one look costs as much as ten here.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedsep {

namespace py = pybind11;

// Entries stand one after the other in a flat tuple, which Python's garbage collector can see through.
class Entries {
 public:
  Entries(const py::tuple& items, Py_ssize_t width) : items_(items.ptr()) {
    if (PyTuple_GET_SIZE(items_) % width != 0) throw py::value_error("an entry is not complete");
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items_); i += width) {
      if (!PyDict_Check(at(i, 0))) throw py::type_error("an entry must begin with a dictionary");
    }
  }
  Py_ssize_t end() const { return PyTuple_GET_SIZE(items_); }
  PyObject* at(Py_ssize_t i, Py_ssize_t j) const { return PyTuple_GET_ITEM(items_, i + j); }
  // Borrowed; null if the dictionary has no such key.
  PyObject* value(Py_ssize_t i) const { return get(at(i, 0), at(i, 1)); }
  static PyObject* get(PyObject* dictionary, PyObject* key) {
    PyObject* const found = PyDict_GetItemWithError(dictionary, key);
    if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return found;
  }

 private:
  PyObject* items_;
};

// Whether all of these are true:
// identical  dictionary, key, object: the value is that object
// same       dictionary, key, dictionary: both have the same object under that key
// equal      dictionary, key, value: an equal one; a missing one counts as None
// empty      dictionary, key: the value is a dictionary without entries
// absent     dictionary, key, class: there is none, or an instance of that class
// classes    object, class: that is its class
inline bool facts_hold(const py::tuple& identical, const py::tuple& same, const py::tuple& equal,
                       const py::tuple& empty, const py::tuple& absent, const py::tuple& classes) {
  const Entries identities(identical, 3), pairs(same, 3), values(equal, 3), dictionaries(empty, 2), absences(absent, 3);
  for (Py_ssize_t i = 0; i < identities.end(); i += 3) {
    if (identities.value(i) != identities.at(i, 2)) return false;
  }
  for (Py_ssize_t i = 0; i < pairs.end(); i += 3) {
    if (!PyDict_Check(pairs.at(i, 2))) throw py::type_error("the other one must be a dictionary too");
    if (pairs.value(i) != Entries::get(pairs.at(i, 2), pairs.at(i, 1))) return false;
  }
  for (Py_ssize_t i = 0; i < dictionaries.end(); i += 2) {
    PyObject* const found = dictionaries.value(i);
    if (found == nullptr || !PyDict_Check(found) || PyDict_GET_SIZE(found) != 0) return false;
  }
  for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(classes.ptr()); i += 2) {
    PyObject* const its_class = reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(classes.ptr(), i)));
    if (its_class != PyTuple_GET_ITEM(classes.ptr(), i + 1)) return false;
  }
  // From here on Python may run, and change what the entries point to: a value is held while it is looked at.
  for (Py_ssize_t i = 0; i < absences.end(); i += 3) {
    const auto found = py::reinterpret_borrow<py::object>(absences.value(i));
    if (!found) continue;
    const int is_one = PyObject_IsInstance(found.ptr(), absences.at(i, 2));
    if (is_one < 0) throw py::error_already_set();
    if (is_one == 0) return false;
  }
  for (Py_ssize_t i = 0; i < values.end(); i += 3) {
    PyObject* const found = values.value(i);
    if (found == values.at(i, 2)) continue;
    const auto value = py::reinterpret_borrow<py::object>(found == nullptr ? Py_None : found);
    const int is_equal = PyObject_RichCompareBool(value.ptr(), values.at(i, 2), Py_EQ);
    if (is_equal < 0) PyErr_Clear();  // what cannot be compared is not known to be equal
    if (is_equal != 1) return false;
  }
  return true;
}

}  // namespace fusedsep
