// For the Python modules: they keep to Python's stable ABI (setup.py defines Py_LIMITED_API), so that one build of them
// serves every Python from 3.10 on.
#pragma once

#include <Python.h>

#include <exception>
#include <stdexcept>

namespace fastcnn {

// What f() returns, a new reference; what it throws becomes the Python exception that it would have been.
template <typename F>
PyObject* as_python(F f) {
  try {
    return f();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A list of what each(item) makes of the items, new references.
template <typename Items, typename F>
PyObject* as_list(const Items& items, F each) {
  PyObject* const list = PyList_New(0);
  for (const auto& item : items) {
    PyObject* const value = list ? each(item) : nullptr;
    if (!value || PyList_Append(list, value) != 0) {
      Py_XDECREF(value);
      Py_XDECREF(list);
      return nullptr;
    }
    Py_DECREF(value);
  }
  return list;
}

}  // namespace fastcnn
