// The Python module swa_fast._C: importing it loads the library, whose operators register
// themselves, and it holds the functions that look at Python objects: whether tensors and module
// dictionaries are still what they were, before an address of theirs is used; and the update that
// follows, where the operator need not be called.
#include <Python.h>

#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "direct.h"
#include "watch.h"

namespace {

using swa_fast::Contents;
using swa_fast::DirectUpdate;
using swa_fast::DLPackExchangeAPI;
using swa_fast::Facts;
using swa_fast::kDLPackMajor;
using swa_fast::Layout;

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

constexpr char kDirect[] = "swa_fast.direct";

DirectUpdate* direct_of(PyObject* capsule) {
  return static_cast<DirectUpdate*>(PyCapsule_GetPointer(capsule, kDirect));
}

// A tuple of functions, each of which returns something true while somebody would see a call of an
// operator, and the function that raises the version counters of tensors.
PyObject* listeners = nullptr;
PyObject* increment_version = nullptr;

// Tells torch that tensors of a list or tuple were written. False with a Python error.
bool raise_by_torch(PyObject* tensors) {
  PyObject* const done = PyObject_CallFunctionObjArgs(increment_version, tensors, nullptr);
  Py_XDECREF(done);
  return done != nullptr;
}

// Whether the counter of a tensor, alone in a tuple, counts what torch counts.
bool finds_versions(PyObject* samples, PyObject* sample) {
  const void* const impl = swa_fast::read<const void*>(sample, Layout::kImpl);
  const uint32_t* const version = Layout::version_of(impl);
  if (version == nullptr) return false;
  const uint32_t start = *version;
  for (uint32_t i = 0; i < 3; ++i) {
    PyObject* const told = PyObject_GetAttrString(sample, "_version");
    if (told == nullptr) return false;
    const bool same = *version == start + i && PyLong_AsLong(told) == static_cast<long>(*version);
    Py_DECREF(told);
    if (!same || !raise_by_torch(samples)) return false;
  }
  return true;
}

PyObject* hear(PyObject*, PyObject* arguments) {
  PyObject *functions, *increment, *sample;
  if (!PyArg_ParseTuple(arguments, "O!OO", &PyTuple_Type, &functions, &increment, &sample)) {
    return nullptr;
  }
  Py_INCREF(functions);
  Py_INCREF(increment);
  Py_XDECREF(listeners);
  Py_XDECREF(increment_version);
  listeners = functions;
  increment_version = increment;
  PyObject* const samples = PyTuple_Pack(1, sample);
  if (samples == nullptr) return nullptr;
  Facts::layout.versions = Facts::layout.shape != 0 && finds_versions(samples, sample);
  Py_DECREF(samples);
  return PyErr_Occurred() != nullptr ? nullptr : PyBool_FromLong(Facts::layout.versions);
}

// Whether an object, which is given away, is true; -1 with a Python error, as for null.
int is_true(PyObject* object) {
  const int found = object == nullptr ? -1 : PyObject_IsTrue(object);
  Py_XDECREF(object);
  return found;
}

// 1 if an operator would be seen, 0 if not, -1 with a Python error.
int somebody_listens() {
  if (listeners == nullptr) return 1;
  const Py_ssize_t count = PyTuple_Size(listeners);
  for (Py_ssize_t i = 0; i < count; ++i) {
    const int listens = is_true(PyObject_CallNoArgs(PyTuple_GetItem(listeners, i)));
    if (listens != 0) return listens;
  }
  return 0;
}

PyObject* direct(PyObject*, PyObject* arguments) {
  long long n_averaged, counters, rules, table, segments, seed = 0;
  int averages, skip_nonfinite;
  PyObject* seed_or_none;
  if (!PyArg_ParseTuple(arguments, "LLLLLiOp", &n_averaged, &counters, &rules, &table, &segments,
                        &averages, &seed_or_none, &skip_nonfinite)) {
    return nullptr;
  }
  const bool seeded = seed_or_none != Py_None;
  if (seeded) seed = PyLong_AsLongLong(seed_or_none);
  if (PyErr_Occurred() != nullptr) return nullptr;
  auto result = swa_fast::make_direct_update(
      {reinterpret_cast<int64_t*>(n_averaged), reinterpret_cast<int64_t*>(counters),
       reinterpret_cast<const double*>(rules), reinterpret_cast<const int64_t*>(table), segments,
       averages, seeded ? std::optional<int64_t>(seed) : std::nullopt, skip_nonfinite != 0});
  return PyCapsule_New(result.release(), kDirect,
                       [](PyObject* capsule) { delete direct_of(capsule); });
}

// Interned once: other names of attributes are looked for in every class.
struct Names {
  PyObject* lock = PyUnicode_InternFromString("lock");
  PyObject* acquire = PyUnicode_InternFromString("acquire");
  PyObject* release = PyUnicode_InternFromString("release");
  PyObject* applied = PyUnicode_InternFromString("applied");
  PyObject* at_once = PyUnicode_InternFromString("at_once");
};

const Names& names() {
  static const Names found;
  return found;
}

// Updates by what `Storage.at_once` holds. 1 if done; 0 with nothing done if something has changed
// or an operator would be seen; -1 with a Python error.
int update_at_once(PyObject* at_once) {
  PyObject *kept, *rest, *contents, *facts, *direct, *written;
  Py_ssize_t first;
  if (!PyArg_ParseTuple(at_once, "OOOOOnO", &kept, &rest, &contents, &facts, &direct, &first,
                        &written)) {
    return -1;
  }
  Contents* const dictionaries = contents_of(contents);
  Facts* const tensors = facts_of(facts);
  DirectUpdate* const update = direct_of(direct);
  if (dictionaries == nullptr || tensors == nullptr || update == nullptr) return -1;
  const int listens = somebody_listens();
  if (listens != 0) return listens < 0 ? -1 : 0;
  if (rest != Py_None) {
    const int holds = is_true(PyObject_CallNoArgs(rest));
    if (holds <= 0) return holds;
  }
  if (!dictionaries->hold() || !tensors->hold()) return 0;
  std::string failure;
  Py_BEGIN_ALLOW_THREADS try { update->run(); } catch (const std::exception& error) {
    failure = error.what();
  }
  Py_END_ALLOW_THREADS if (!failure.empty()) {
    PyErr_SetString(PyExc_RuntimeError, failure.c_str());
    return -1;
  }
  const bool raised =
      first >= 0 && PyList_Check(written) && tensors->raise_versions(first, PyList_Size(written));
  return raised || raise_by_torch(written) ? 1 : -1;
}

// Under the storage's lock.
int update_locked(PyObject* storage) {
  PyObject* const applied = PyObject_GetAttr(storage, names().applied);
  if (applied == nullptr) return -1;
  Py_DECREF(applied);
  if (applied != Py_None) return 0;
  PyObject* const at_once = PyObject_GetAttr(storage, names().at_once);
  if (at_once == nullptr) return -1;
  const int done = at_once == Py_None ? 0 : update_at_once(at_once);
  Py_DECREF(at_once);
  return done;
}

PyObject* update(PyObject*, PyObject* storage) {
  PyObject* const lock = PyObject_GetAttr(storage, names().lock);
  if (lock == nullptr) return nullptr;
  PyObject* const entered = PyObject_CallMethodObjArgs(lock, names().acquire, nullptr);
  if (entered == nullptr) {
    Py_DECREF(lock);
    return nullptr;
  }
  Py_DECREF(entered);
  const int done = update_locked(storage);
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyObject* const left = PyObject_CallMethodObjArgs(lock, names().release, nullptr);
  Py_DECREF(lock);
  if (left == nullptr) {
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return nullptr;
  }
  Py_DECREF(left);
  PyErr_Restore(type, value, trace);
  return done < 0 ? nullptr : PyBool_FromLong(done);
}

PyMethodDef functions[] = {
    {"contents", contents, METH_O,
     "contents(dictionaries: tuple) -> capsule: of tuples (owner, key, dictionary, items) of a "
     "dictionary that is owner[key] and a tuple of its keys and values in turn. The tuple must be "
     "kept as long as the capsule."},
    {"direct", direct, METH_VARARGS,
     "direct(n_averaged, counters, rules, table: addresses, segments: int, averages: int, seed: "
     "int | None, skip_nonfinite: bool) -> capsule: an update by a table on the CPU, whose memory "
     "must be kept as long as the capsule. Address 0: no counters."},
    {"hear", hear, METH_VARARGS,
     "hear(listeners: tuple, increment_version, sample: tensor) -> bool: functions that return "
     "something true while somebody would see a call of an operator, and torch's function of the "
     "name, for ``update``. Whether the version counters of tensors were found."},
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
    {"update", update, METH_O,
     "update(storage) -> bool: the update of a Storage and a higher version for the averages it "
     "has written, under its lock and by its at_once: a tuple of a function or None, capsules of "
     "``contents``, ``facts`` and ``direct``, the number in ``facts`` of the first average or -1, "
     "and the list of averages. False, with nothing done, if there is none, an average is applied, "
     "the function returns something false, something is not ``unchanged`` or somebody listens."},
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
