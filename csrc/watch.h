// What tensors and dictionaries of Python were, to be compared with what they are, before an
// address of theirs is used.
//
// A tensor is asked through the DLPack exchange API of its class, a table of C functions that torch
// gives since 2.10 at the latest: one call fills a struct with the tensor's address, type, sizes
// and strides and takes no reference to the tensor.
//
// Thousands of small tensors are asked before an update that itself takes less than a millisecond,
// and each answer costs a chain of cache misses: Python's object, TensorImpl, StorageImpl. So the
// bytes of the three are remembered beside the answer: as long as they are what they were, the
// answer is what it was, and the lines can be fetched ahead, because their addresses are known. Any
// other bytes, such as a new reference to shared sizes, mean asking again, never a change by
// themselves. Where the bytes lie is torch's own business: `Layout` is looked for in a sample
// tensor, only with releases of torch whose layout was read (see _backends.py), and each tensor's
// bytes are used only if they tell the same address as DLPack. Everywhere else all tensors are
// asked.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace swa_fast {

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

template <typename T>
T read(const void* object, size_t offset) {
  T value;
  std::memcpy(&value, static_cast<const char*>(object) + offset, sizeof(T));
  return value;
}

// Where torch 2.10 to 2.14 keep what is compared, in bytes from the start of each object.
struct Layout {
  static constexpr size_t kImpl = 16;     // of TensorImpl's address in Python's object
  static constexpr size_t kStorage = 16;  // of StorageImpl's address in TensorImpl
  static constexpr size_t kVersion = 40;  // of the version counter's address in TensorImpl
  static constexpr size_t kData = 16;     // in StorageImpl: address, its owner, device, size
  static constexpr size_t kDataBytes = 40;
  // In TensorImpl, from `shape` on: number of dimensions, five sizes, five strides, offset, number
  // of elements, type with device and flags, dispatch keys.
  static constexpr size_t kShapeBytes = 120;
  static constexpr size_t kKeys = 112;       // the dispatch keys among them
  static constexpr int64_t kDimensions = 5;  // more of them are kept elsewhere

  size_t shape = 0;  // 0: not known, tensors are asked

  // Looks for it in a tensor of shape [3, 5, 7].
  void find(PyObject* sample) {
    const void* impl = read<const void*>(sample, kImpl);
    const int64_t dimensions = 3, sizes[] = {3, 5, 7}, strides[] = {35, 7, 1}, rest[] = {0, 105};
    for (size_t at : {56, 64}) {
      const char* found = static_cast<const char*>(impl) + at;
      if (std::memcmp(found, &dimensions, 8) == 0 && std::memcmp(found + 8, sizes, 24) == 0 &&
          std::memcmp(found + 48, strides, 24) == 0 && std::memcmp(found + 88, rest, 16) == 0) {
        shape = at;
      }
    }
  }
};

// What tensors were, in the order in which a check reads it.
class Facts {
 public:
  static inline const DLPackExchangeAPI* exchange = nullptr;
  static inline Layout layout;

  // False with a Python error where an object has no address.
  bool add(PyObject* tensor) {
    DLTensor now;
    if (exchange->look(tensor, &now) != 0) return false;
    facts_.push_back({now.data, type_of(now), Py_TYPE(tensor), now.dim, geometry_.size()});
    geometry_.insert(geometry_.end(), now.sizes, now.sizes + now.dim);
    geometry_.insert(geometry_.end(), now.strides, now.strides + now.dim);
    bytes_.emplace_back();
    bytes_.back().read_from(tensor, now);
    return true;
  }

  size_t count() const { return facts_.size(); }

  // Asks the memory for what `hold(i, ...)` will read.
  void prefetch(size_t i) const {
    if (i < bytes_.size()) bytes_[i].prefetch();
  }

  // True if `tensor` is what the one added as number `i` was.
  bool hold(size_t i, PyObject* tensor) {
    if (bytes_[i].hold(tensor)) return true;
    const Fact& was = facts_[i];
    if (Py_TYPE(tensor) != was.type || bytes_[i].other_keys(tensor)) return false;
    DLTensor now;
    if (exchange->look(tensor, &now) != 0) {
      PyErr_Clear();  // such as one that has become sparse
      return false;
    }
    const int64_t* geometry = geometry_.data() + was.geometry;
    const bool held = now.data == was.data && type_of(now) == was.element && now.dim == was.dim &&
                      std::equal(now.sizes, now.sizes + now.dim, geometry) &&
                      std::equal(now.strides, now.strides + now.dim, geometry + now.dim);
    if (held) bytes_[i].read_from(tensor, now);
    return held;
  }

 private:
  struct Fact {
    const void* data;
    uint64_t element;
    PyTypeObject* type;
    int64_t dim;
    size_t geometry;  // place of the sizes, which the strides follow
  };

  // The bytes of a tensor's three objects that tell what a look would find.
  struct Bytes {
    PyObject* object = nullptr;  // null: unknown, a look is needed. Not owned
    PyTypeObject* type;
    const void *impl, *storage;
    unsigned char data[Layout::kDataBytes], shape[Layout::kShapeBytes];

    void read_from(PyObject* tensor, const DLTensor& look) {
      object = nullptr;
      if (layout.shape == 0 || look.dim > Layout::kDimensions) return;
      type = Py_TYPE(tensor);
      impl = read<const void*>(tensor, Layout::kImpl);
      storage = read<const void*>(impl, Layout::kStorage);
      if (storage == nullptr) return;
      std::memcpy(data, static_cast<const char*>(storage) + Layout::kData, sizeof(data));
      std::memcpy(shape, static_cast<const char*>(impl) + layout.shape, sizeof(shape));
      const int64_t dim = read<int64_t>(shape, 0), offset = read<int64_t>(shape, 88);
      const char* start = read<const char*>(data, 0) + offset * (look.type_bits / 8);
      const char* found = static_cast<const char*>(look.data) + look.byte_offset;
      if (dim == look.dim && (start == found || found == nullptr) &&
          std::memcmp(shape + 8, look.sizes, 8 * dim) == 0 &&
          std::memcmp(shape + 48, look.strides, 8 * dim) == 0) {
        object = tensor;
      }
    }

    // Each line is read only once the one before it was found to be what it was: the owner of the
    // tensor keeps Python's object, that keeps TensorImpl, and that keeps StorageImpl.
    bool hold(PyObject* tensor) const {
      if (tensor != object || Py_TYPE(tensor) != type ||
          read<const void*>(tensor, Layout::kImpl) != impl ||
          read<const void*>(impl, Layout::kStorage) != storage) {
        return false;
      }
      // Whoever updates next advances the versions of averages.
      __builtin_prefetch(read<const void*>(impl, Layout::kVersion));
      const char* at = static_cast<const char*>(impl) + layout.shape;
      return std::memcmp(at, shape, sizeof(shape)) == 0 &&
             std::memcmp(static_cast<const char*>(storage) + Layout::kData, data, sizeof(data)) ==
                 0;
    }

    // Whether its dispatch keys are known to be others, as those of values that are conjugated or
    // negated where they lie, of which DLPack does not tell.
    bool other_keys(PyObject* tensor) const {
      if (tensor != object || read<const void*>(tensor, Layout::kImpl) != impl) return false;
      const char* at = static_cast<const char*>(impl) + layout.shape;
      return std::memcmp(at + Layout::kKeys, shape + Layout::kKeys, 8) != 0;
    }

    void prefetch() const {
      if (object == nullptr) return;
      __builtin_prefetch(object);
      for (size_t at = 0; at < layout.shape + Layout::kShapeBytes; at += 64) {
        __builtin_prefetch(static_cast<const char*>(impl) + at);
      }
      __builtin_prefetch(static_cast<const char*>(storage) + Layout::kData);
    }
  };

  static uint64_t type_of(const DLTensor& tensor) {
    return uint64_t{tensor.type_code} << 32 | uint64_t{tensor.type_bits} << 16 | tensor.type_lanes;
  }

  std::vector<Fact> facts_;
  std::vector<int64_t> geometry_;  // sizes, then strides, of one tensor after the other
  std::vector<Bytes> bytes_;
};

// What dictionaries held and where they were kept themselves, in the order in which a check reads
// it. The pointers are borrowed from the tuple it was made of, which its owner keeps: Python's
// garbage collector sees through a tuple, and not through a capsule.
struct Contents {
  struct Dictionary {
    PyObject *owner, *key;  // owner[key] is the dictionary
    PyObject* dictionary;
    Py_ssize_t size;
    uint64_t version;  // with which it was last found to hold what was expected; 0: none
  };
  static constexpr size_t kAhead = 16;
  // CPython 3.10 to 3.12 give a dictionary another number at every change, one that no other has
  // had (PEP 509): the same number means the same contents. Where it lies, in bytes from the
  // start, is read in these releases only.
  static constexpr size_t kUsed = 16, kVersion = 24;
  static inline bool versioned = false;

  // Looks for the number in a dictionary. -1 with a Python error.
  static int find_versions(int minor) {
    versioned = false;
    if (minor < 10 || minor > 12) return 0;
    PyObject* const sample = PyDict_New();
    if (sample == nullptr) return -1;
    uint64_t seen[3];
    int failed = 0;
    for (int i = 0; i < 3 && failed == 0; ++i) {
      // A new key, then another value for it, then nothing.
      if (i < 2) failed = PyDict_SetItemString(sample, "key", i == 0 ? Py_None : Py_True);
      seen[i] = read<uint64_t>(sample, kVersion);
    }
    versioned = failed == 0 && read<Py_ssize_t>(sample, kUsed) == 1 && seen[0] != 0 &&
                seen[0] != seen[1] && seen[1] == seen[2];
    Py_DECREF(sample);
    return failed;
  }

  std::vector<Dictionary> dictionaries;
  std::vector<PyObject*> items;  // key, value, key, value, ... of one after the other

  // Same objects, same order, nothing more.
  bool hold() {
    PyObject* const* expected = items.data();
    for (size_t d = 0; d < dictionaries.size(); ++d) {
      if (d + kAhead < dictionaries.size()) __builtin_prefetch(dictionaries[d + kAhead].dictionary);
      Dictionary& each = dictionaries[d];
      if (PyDict_GetItemWithError(each.owner, each.key) != each.dictionary) return false;
      const uint64_t version = versioned ? read<uint64_t>(each.dictionary, kVersion) : 0;
      if (version != 0 && version == each.version) {
        expected += 2 * each.size;
        continue;
      }
      if (PyDict_Size(each.dictionary) != each.size) return false;
      PyObject *key, *value;
      Py_ssize_t position = 0;
      for (Py_ssize_t i = 0; i < each.size; ++i, expected += 2) {
        if (!PyDict_Next(each.dictionary, &position, &key, &value) || key != expected[0] ||
            value != expected[1]) {
          return false;
        }
      }
      each.version = version;
    }
    return true;
  }
};

}  // namespace swa_fast
