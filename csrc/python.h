// The functions of fastsam._C that are not python.cpp's own.
#pragma once

#include <Python.h>

namespace fastsam {

// spec() -> dict
PyObject* spec(PyObject*, PyObject*);

}  // namespace fastsam
