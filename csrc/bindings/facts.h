// SPDX-License-Identifier: BSD-3-Clause
//
// Looks at many entries of Python dictionaries in one call, to see whether modules are still as they were found. In
// Python, one look costs as much as ten here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <vector>

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

// The version of each dictionary, which is another one after every change of it and never comes again: a look at one
// number for all entries. None where Python does not count them, which it did up to 3.11 (PEP 509).
inline py::object dictionary_versions(const py::tuple& dictionaries) {
#if PY_VERSION_HEX < 0x030C0000
  std::vector<uint64_t> versions;
  versions.reserve(dictionaries.size());
  for (const py::handle dictionary : dictionaries) {
    if (!PyDict_Check(dictionary.ptr())) throw py::type_error("only dictionaries have versions");
    versions.push_back(reinterpret_cast<PyDictObject*>(dictionary.ptr())->ma_version_tag);
  }
  return py::bytes(reinterpret_cast<const char*>(versions.data()), versions.size() * sizeof(uint64_t));
#else
  return py::none();
#endif
}

// Whether `dictionaries` have the versions that `dictionary_versions` found.
inline bool are_unchanged(const py::tuple& dictionaries, const py::bytes& versions) {
#if PY_VERSION_HEX < 0x030C0000
  const char* expected = PyBytes_AS_STRING(versions.ptr());
  const Py_ssize_t count = PyTuple_GET_SIZE(dictionaries.ptr());
  if (PyBytes_GET_SIZE(versions.ptr()) != count * Py_ssize_t(sizeof(uint64_t))) return false;
  for (Py_ssize_t i = 0; i < count; ++i, expected += sizeof(uint64_t)) {
    const auto* const dictionary = reinterpret_cast<PyDictObject*>(PyTuple_GET_ITEM(dictionaries.ptr(), i));
    if (std::memcmp(&dictionary->ma_version_tag, expected, sizeof(uint64_t)) != 0) return false;
  }
  return true;
#else
  return false;
#endif
}

}  // namespace fusedsep
