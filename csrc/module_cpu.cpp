// The Python module swa_fast._C: importing it loads the library, whose operators register
// themselves, and it holds the functions that look at Python objects.
#include <Python.h>

#include "watch.h"

namespace {

// True if `expected`, (dict, (key, value, key, value, ...)), still describes the dictionary: same
// objects, same order, nothing more.
bool dictionary_holds(PyObject* expected) {
  PyObject* dictionary = PyTuple_GetItem(expected, 0);
  PyObject* items = PyTuple_GetItem(expected, 1);
  if (dictionary == nullptr || items == nullptr) return false;
  const Py_ssize_t size = PyTuple_Size(items);
  if (2 * PyDict_Size(dictionary) != size) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; i < size && PyDict_Next(dictionary, &position, &key, &value); i += 2) {
    if (PyTuple_GetItem(items, i) != key || PyTuple_GetItem(items, i + 1) != value) return false;
  }
  return true;
}

PyObject* unchanged(PyObject*, PyObject* arguments) {
  long long id;
  PyObject* dictionaries;
  if (!PyArg_ParseTuple(arguments, "LO!", &id, &PyTuple_Type, &dictionaries)) return nullptr;
  const Py_ssize_t count = PyTuple_Size(dictionaries);
  bool holds = swa_fast::watched_tensors_hold(id);
  for (Py_ssize_t i = 0; holds && i < count; ++i) {
    holds = dictionary_holds(PyTuple_GetItem(dictionaries, i));
  }
  if (PyErr_Occurred()) return nullptr;
  return PyBool_FromLong(holds);
}

PyObject* forget(PyObject*, PyObject* arguments) {
  long long id;
  if (!PyArg_ParseTuple(arguments, "L", &id)) return nullptr;
  swa_fast::forget_watch(id);
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"unchanged", unchanged, METH_VARARGS,
     "unchanged(watch: int, dictionaries: tuple) -> bool: whether the watched tensors and the "
     "contents of the dictionaries are what they were."},
    {"forget", forget, METH_VARARGS, "forget(watch: int) -> None: ends a watch."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
