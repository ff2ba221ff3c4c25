// The Python module swa_fast._C: importing it loads the library, whose operators register
// themselves, and it holds the functions that look at Python objects: whether tensors and module
// dictionaries are still what they were, before an address of theirs is used.
#include <Python.h>

#include <cstdio>
#include <memory>

#include "watch.h"

namespace {

using swa_fast::Contents;
using swa_fast::DLPackExchangeAPI;
using swa_fast::Facts;
using swa_fast::kDLPackMajor;

constexpr size_t kAhead = 16;  // tensors whose memory is on its way
constexpr char kFacts[] = "swa_fast.facts";

Facts* facts_of(PyObject* capsule) {
  return static_cast<Facts*>(PyCapsule_GetPointer(capsule, kFacts));
}

// Calls f(item) for the items of two tuples or lists, until it returns false; false then.
template <typename F>
bool for_each(PyObject* first, PyObject* second, const F& f) {
  for (PyObject* items : {first, second}) {
    const bool is_list = PyList_Check(items);
    const Py_ssize_t count = is_list ? PyList_Size(items) : PyTuple_Size(items);
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (!f(is_list ? PyList_GetItem(items, i) : PyTuple_GetItem(items, i))) return false;
    }
  }
  return true;
}

bool are_sequences(PyObject* first, PyObject* second) {
  for (PyObject* items : {first, second}) {
    if (!PyList_Check(items) && !PyTuple_Check(items)) {
      PyErr_SetString(PyExc_TypeError, "expected two lists or tuples of tensors");
      return false;
    }
  }
  return true;
}

PyObject* start(PyObject*, PyObject* arguments) {
  PyObject *capsule, *sample;
  if (!PyArg_ParseTuple(arguments, "OO", &capsule, &sample)) return nullptr;
  const auto* found =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (found == nullptr) return nullptr;
  if (found->header.major != kDLPackMajor || found->look == nullptr) {
    PyErr_Format(PyExc_RuntimeError, "expected the DLPack exchange API of version %u, found %u.%u",
                 kDLPackMajor, found->header.major, found->header.minor);
    return nullptr;
  }
  Facts::exchange = found;
  Facts::layout = {};
  int minor = 0;
  // Such as "3.12.4 (main, ...".
  if (std::sscanf(Py_GetVersion(), "3.%d", &minor) != 1) minor = 0;
  if (Contents::find_versions(minor) != 0) return nullptr;
  if (sample != Py_None) Facts::layout.find(sample);
  return PyBool_FromLong(Facts::layout.shape != 0);
}

PyObject* facts(PyObject*, PyObject* arguments) {
  PyObject *first, *second;
  if (!PyArg_ParseTuple(arguments, "OO", &first, &second)) return nullptr;
  if (!are_sequences(first, second)) return nullptr;
  auto result = std::make_unique<Facts>();
  if (!for_each(first, second, [&](PyObject* tensor) { return result->add(tensor); })) {
    return nullptr;
  }
  return PyCapsule_New(result.release(), kFacts,
                       [](PyObject* capsule) { delete facts_of(capsule); });
}

// Whether the tensors of two sequences are what they were; -1 with a Python error.
int tensors_hold(PyObject* capsule, PyObject* first, PyObject* second) {
  Facts* expected = facts_of(capsule);
  if (expected == nullptr || !are_sequences(first, second)) return -1;
  for (size_t i = 0; i < kAhead; ++i) expected->prefetch(i);
  size_t i = 0;
  return for_each(first, second,
                  [&](PyObject* tensor) {
                    expected->prefetch(i + kAhead);
                    return i < expected->count() && expected->hold(i++, tensor);
                  }) &&
         i == expected->count();
}

PyObject* hold(PyObject*, PyObject* arguments) {
  PyObject *capsule, *first, *second;
  if (!PyArg_ParseTuple(arguments, "OOO", &capsule, &first, &second)) return nullptr;
  const int held = tensors_hold(capsule, first, second);
  return held < 0 ? nullptr : PyBool_FromLong(held);
}

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
    PyObject *owner, *key, *dictionary, *items;
    if (!PyArg_ParseTuple(PyTuple_GetItem(dictionaries, i), "O!OO!O!", &PyDict_Type, &owner, &key,
                          &PyDict_Type, &dictionary, &PyTuple_Type, &items)) {
      return nullptr;
    }
    result->dictionaries.push_back({owner, key, dictionary, PyTuple_Size(items) / 2, 0});
    for (Py_ssize_t k = 0; k < PyTuple_Size(items); ++k) {
      result->items.push_back(PyTuple_GetItem(items, k));
    }
  }
  return PyCapsule_New(result.release(), kContents,
                       [](PyObject* capsule) { delete contents_of(capsule); });
}

PyObject* unchanged(PyObject*, PyObject* arguments) {
  PyObject *contents, *facts, *tensors, *none = PyTuple_New(0);
  if (none == nullptr) return nullptr;
  int held = -1;
  if (PyArg_ParseTuple(arguments, "OOO", &contents, &facts, &tensors)) {
    Contents* expected = contents_of(contents);
    if (expected != nullptr) {
      held = expected->hold() ? tensors_hold(facts, tensors, none) : 0;
    }
  }
  Py_DECREF(none);
  return held < 0 ? nullptr : PyBool_FromLong(held);
}

PyMethodDef functions[] = {
    {"contents", contents, METH_O,
     "contents(dictionaries: tuple) -> capsule: of tuples (owner, key, dictionary, items) of a "
     "dictionary that is owner[key] and a tuple of its keys and values in turn. The tuple must be "
     "kept as long as the capsule."},
    {"start", start, METH_VARARGS,
     "start(capsule, sample) -> bool: hands over torch.Tensor.__dlpack_c_exchange_api__, without "
     "which no tensor can be asked, and an fp32 tensor of shape [3, 5, 7] or, where torch's layout "
     "of tensors is not known, None. Whether the bytes of tensors are compared before asking."},
    {"facts", facts, METH_VARARGS,
     "facts(first, second) -> capsule: what the tensors of two lists or tuples are: addresses, "
     "types, sizes and strides. The tensors are not kept."},
    {"hold", hold, METH_VARARGS,
     "hold(facts: capsule, first, second) -> bool: whether the tensors of two lists or tuples are "
     "what those of ``facts`` were."},
    {"unchanged", unchanged, METH_VARARGS,
     "unchanged(contents: capsule, facts: capsule, tensors) -> bool: whether dictionaries and "
     "tensors are what they were."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
