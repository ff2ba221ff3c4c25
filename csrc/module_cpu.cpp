// The Python module swa_fast._C: importing it loads the library, whose operators register
// themselves, and it holds the functions that look at Python objects: whether tensors and module
// dictionaries are still what they were, before an address of theirs is used.
//
// A tensor is asked through the DLPack exchange API of its class, a table of C functions that torch
// gives since 2.11 at the latest: one call fills a struct with the tensor's address, type, sizes
// and strides, takes no reference to the tensor and took 71 nanoseconds with the comparison where a
// core was measured.
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace {

// The part of DLPack 1 that is used, https://dmlc.github.io/dlpack/latest/c_api.html.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t* sizes;
  const int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  struct Header {
    uint32_t major, minor;
    Header* previous;
  } header;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*look)(void* object, DLTensor* out);  // sets a Python error and returns -1 where it fails
  void* current_stream;
};

constexpr uint32_t kDLPackMajor = 1;
const DLPackExchangeAPI* exchange = nullptr;

// What tensors were, in the order in which a check reads it: where thousands of small tensors are
// watched, most of its time is waiting for memory.
class Facts {
 public:
  // False with a Python error where an object has no address.
  bool add(PyObject* tensor) {
    DLTensor now;
    if (exchange->look(tensor, &now) != 0) return false;
    facts_.push_back({now.data, type_of(now), now.dim, geometry_.size()});
    geometry_.insert(geometry_.end(), now.sizes, now.sizes + now.dim);
    geometry_.insert(geometry_.end(), now.strides, now.strides + now.dim);
    return true;
  }

  size_t count() const { return facts_.size(); }

  // True if `tensor` is what the one added as number `i` was.
  bool hold(size_t i, PyObject* tensor) const {
    DLTensor now;
    if (exchange->look(tensor, &now) != 0) {
      PyErr_Clear();  // such as one that has become sparse
      return false;
    }
    const Fact& was = facts_[i];
    const int64_t* geometry = geometry_.data() + was.geometry;
    return now.data == was.data && type_of(now) == was.type && now.dim == was.dim &&
           std::equal(now.sizes, now.sizes + now.dim, geometry) &&
           std::equal(now.strides, now.strides + now.dim, geometry + now.dim);
  }

 private:
  struct Fact {
    const void* data;
    uint64_t type;
    int64_t dim;
    size_t geometry;  // place of the sizes, which the strides follow
  };

  static uint64_t type_of(const DLTensor& tensor) {
    return uint64_t{tensor.type_code} << 32 | uint64_t{tensor.type_bits} << 16 | tensor.type_lanes;
  }

  std::vector<Fact> facts_;
  std::vector<int64_t> geometry_;  // sizes, then strides, of one tensor after the other
};

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

PyObject* start(PyObject*, PyObject* capsule) {
  const auto* found =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (found == nullptr) return nullptr;
  if (found->header.major != kDLPackMajor || found->look == nullptr) {
    PyErr_Format(PyExc_RuntimeError, "expected the DLPack exchange API of version %u, found %u.%u",
                 kDLPackMajor, found->header.major, found->header.minor);
    return nullptr;
  }
  exchange = found;
  Py_RETURN_NONE;
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
  const Facts* expected = facts_of(capsule);
  if (expected == nullptr || !are_sequences(first, second)) return -1;
  size_t i = 0;
  return for_each(first, second,
                  [&](PyObject* tensor) {
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

// What dictionaries held and where they were kept themselves, in the order in which a check reads
// it. The pointers are borrowed from the tuple it was made of, which its owner keeps: Python's
// garbage collector sees through a tuple, and not through a capsule.
struct Contents {
  struct Dictionary {
    PyObject *owner, *key;  // owner[key] is the dictionary
    PyObject* dictionary;
    Py_ssize_t size;
  };
  std::vector<Dictionary> dictionaries;
  std::vector<PyObject*> items;  // key, value, key, value, ... of one after the other

  // Same objects, same order, nothing more.
  bool hold() const {
    PyObject* const* expected = items.data();
    for (const Dictionary& each : dictionaries) {
      if (PyDict_GetItem(each.owner, each.key) != each.dictionary) return false;
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
    PyObject *owner, *key, *dictionary, *items;
    if (!PyArg_ParseTuple(PyTuple_GetItem(dictionaries, i), "O!OO!O!", &PyDict_Type, &owner, &key,
                          &PyDict_Type, &dictionary, &PyTuple_Type, &items)) {
      return nullptr;
    }
    result->dictionaries.push_back({owner, key, dictionary, PyTuple_Size(items) / 2});
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
    const Contents* expected = contents_of(contents);
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
    {"start", start, METH_O,
     "start(capsule) -> None: hands over torch.Tensor.__dlpack_c_exchange_api__, without which no "
     "tensor can be asked."},
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
