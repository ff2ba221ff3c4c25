// The Python module swa_fast._C: importing it loads the library, whose operators register
// themselves, and it holds the functions that look at Python objects.
#include <Python.h>

#include <memory>
#include <vector>

#include "watch.h"

namespace {

// What dictionaries held, in the order in which a check reads it. The pointers are borrowed from
// the tuple it was made of, which its owner keeps: Python's garbage collector sees through a tuple,
// and not through a capsule.
struct Contents {
  struct Dictionary {
    PyObject* dictionary;
    Py_ssize_t size;
  };
  std::vector<Dictionary> dictionaries;
  std::vector<PyObject*> items;  // key, value, key, value, ... of one after the other

  // Same objects, same order, nothing more.
  bool hold() const {
    PyObject* const* expected = items.data();
    for (const Dictionary& each : dictionaries) {
      if (PyDict_Size(each.dictionary) != each.size) return false;
      PyObject *key, *value;
      Py_ssize_t position = 0;
      for (Py_ssize_t i = 0; i < each.size; ++i, expected += 2) {
        if (!PyDict_Next(each.dictionary, &position, &key, &value) || key != expected[0] ||
            value != expected[1]) {
          return false;
        }
      }
    }
    return true;
  }
};

constexpr char kContents[] = "swa_fast.contents";

Contents* contents_of(PyObject* capsule) {
  return static_cast<Contents*>(PyCapsule_GetPointer(capsule, kContents));
}

PyObject* contents(PyObject*, PyObject* dictionaries) {
  if (!PyTuple_Check(dictionaries)) {
    PyErr_SetString(PyExc_TypeError, "contents: expected a tuple");
    return nullptr;
  }
  auto result = std::make_unique<Contents>();
  for (Py_ssize_t i = 0; i < PyTuple_Size(dictionaries); ++i) {
    PyObject *dictionary, *items;
    if (!PyArg_ParseTuple(PyTuple_GetItem(dictionaries, i), "O!O!", &PyDict_Type, &dictionary,
                          &PyTuple_Type, &items)) {
      return nullptr;
    }
    result->dictionaries.push_back({dictionary, PyTuple_Size(items) / 2});
    for (Py_ssize_t k = 0; k < PyTuple_Size(items); ++k) {
      result->items.push_back(PyTuple_GetItem(items, k));
    }
  }
  return PyCapsule_New(result.release(), kContents,
                       [](PyObject* capsule) { delete contents_of(capsule); });
}

PyObject* unchanged(PyObject*, PyObject* arguments) {
  long long id;
  PyObject* capsule;
  if (!PyArg_ParseTuple(arguments, "LO", &id, &capsule)) return nullptr;
  const Contents* expected = contents_of(capsule);
  if (expected == nullptr) return nullptr;
  return PyBool_FromLong(expected->hold() && swa_fast::watched_tensors_hold(id));
}

PyObject* forget(PyObject*, PyObject* arguments) {
  long long id;
  if (!PyArg_ParseTuple(arguments, "L", &id)) return nullptr;
  swa_fast::forget_watch(id);
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"contents", contents, METH_O,
     "contents(dictionaries: tuple) -> capsule: of pairs of a dictionary and a tuple of its keys "
     "and values in turn. The tuple must be kept as long as the capsule."},
    {"unchanged", unchanged, METH_VARARGS,
     "unchanged(watch: int, contents: capsule) -> bool: whether the watched tensors and the "
     "dictionaries are what they were."},
    {"forget", forget, METH_VARARGS, "forget(watch: int) -> None: ends a watch."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
