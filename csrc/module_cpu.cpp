// The Python module swa_fast._C: importing it loads the library, whose operators register
// themselves, and it holds the functions that look at Python objects: whether tensors and module
// dictionaries are still what they were, before an address of theirs is used.
#include <Python.h>

#include <cstdio>
#include <memory>
#include <vector>

#include "watch.h"

namespace {

using swa_fast::Contents;
using swa_fast::DLPackExchangeAPI;
using swa_fast::Facts;
using swa_fast::kDLPackMajor;

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

PyObject* hold(PyObject*, PyObject* arguments) {
  PyObject *capsule, *first, *second;
  if (!PyArg_ParseTuple(arguments, "OOO", &capsule, &first, &second)) return nullptr;
  Facts* expected = facts_of(capsule);
  if (expected == nullptr || !are_sequences(first, second)) return nullptr;
  expected->start();
  size_t i = 0;
  const bool held = for_each(first, second, [&](PyObject* tensor) {
    return i < expected->count() && expected->hold(i++, tensor);
  });
  return PyBool_FromLong(held && i == expected->count());
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
  struct Place {
    PyObject *owner, *key, *dictionary, *items;
  };
  std::vector<Place> places(PyTuple_Size(dictionaries));
  for (size_t i = 0; i < places.size(); ++i) {
    Place& each = places[i];
    if (!PyArg_ParseTuple(PyTuple_GetItem(dictionaries, i), "O!OO!O!", &PyDict_Type, &each.owner,
                          &each.key, &PyDict_Type, &each.dictionary, &PyTuple_Type, &each.items)) {
      return nullptr;
    }
  }
  for (size_t i = 0; i < places.size(); ++i) {
    if (i == 0 || places[i].owner != places[i - 1].owner) {
      result->add_owner(places[i].owner);
      for (size_t k = i; k < places.size() && places[k].owner == places[i].owner; ++k) {
        result->add_item(places[k].key, places[k].dictionary);
      }
    }
    result->add_whole(places[i].dictionary);
    for (Py_ssize_t k = 0; k + 1 < PyTuple_Size(places[i].items); k += 2) {
      result->add_item(PyTuple_GetItem(places[i].items, k),
                       PyTuple_GetItem(places[i].items, k + 1));
    }
  }
  return PyCapsule_New(result.release(), kContents,
                       [](PyObject* capsule) { delete contents_of(capsule); });
}

PyObject* unchanged(PyObject*, PyObject* arguments) {
  PyObject *contents, *facts;
  if (!PyArg_ParseTuple(arguments, "OO", &contents, &facts)) return nullptr;
  Contents* const dictionaries = contents_of(contents);
  if (dictionaries == nullptr) return nullptr;
  Facts* const tensors = facts_of(facts);
  if (tensors == nullptr) return nullptr;
  return PyBool_FromLong(dictionaries->hold() && tensors->hold());
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
     "unchanged(contents: capsule, facts: capsule) -> bool: whether dictionaries and tensors are "
     "what they were. The tensors must have been kept."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
