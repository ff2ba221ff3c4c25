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
#include <functional>
#include <map>
#include <vector>

#include "caches.h"

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
  static constexpr size_t kType = 8;      // of the type's address in Python's object
  static constexpr size_t kImpl = 16;     // of TensorImpl's address in Python's object
  static constexpr size_t kStorage = 16;  // of StorageImpl's address in TensorImpl
  static constexpr size_t kData = 16;     // in StorageImpl: address, its owner, device, size
  static constexpr size_t kDataBytes = 40;
  // In TensorImpl, from `shape` on: number of dimensions, five sizes, five strides, offset, number
  // of elements, type with device and flags, dispatch keys.
  static constexpr size_t kShapeBytes = 120;
  static constexpr size_t kKeys = 112;       // the dispatch keys among them
  static constexpr int64_t kDimensions = 5;  // more of them are kept elsewhere
  static constexpr size_t kCounter = 40;     // in TensorImpl, of its version counter's address
  static constexpr size_t kVersion = 16;     // in the counter: uint32, counted atomically

  size_t shape = 0;       // 0: not known, tensors are asked
  bool versions = false;  // whether version counters were found where they are looked for

  static uint32_t* version_of(const void* impl) {
    char* const counter = read<char*>(impl, kCounter);
    return counter == nullptr ? nullptr : reinterpret_cast<uint32_t*>(counter + kVersion);
  }

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

// Whether the bytes from `a` on are those from `b` on: word by word in registers, without a call.
template <size_t kBytes>
bool same_bytes(const void* a, const void* b) {
  static_assert(kBytes % 8 == 0, "whole words");
  uint64_t different = 0;
  for (size_t at = 0; at < kBytes; at += 8) {
    different |= read<uint64_t>(a, at) ^ read<uint64_t>(b, at);
  }
  return different == 0;
}

// What tensors were, in the order in which a check reads it.
class Facts {
 public:
  static inline const DLPackExchangeAPI* exchange = nullptr;
  static inline Layout layout;
  static constexpr size_t kAhead = 16;       // tensors whose memory is on its way
  static constexpr size_t kFormsAhead = 64;  // forms that are fetched before the first tensor

  // False with a Python error where an object has no address. It is not owned.
  bool add(PyObject* tensor) {
    DLTensor now;
    if (exchange->look(tensor, &now) != 0) return false;
    facts_.push_back({tensor, now.data, type_of(now), Py_TYPE(tensor), now.dim, geometry_.size()});
    geometry_.insert(geometry_.end(), now.sizes, now.sizes + now.dim);
    geometry_.insert(geometry_.end(), now.strides, now.strides + now.dim);
    bytes_.emplace_back();
    form_of_.emplace_back();
    remember(bytes_.size() - 1, tensor, now);
    return true;
  }

  size_t count() const { return facts_.size(); }

  // Asks the memory for what the first checks will read.
  void start() const {
    for (size_t i = 0; i < std::min(kFormsAhead, forms_.size()); ++i) {
      fetch_ahead(&forms_[i]);
      fetch_ahead(forms_[i].shape + Layout::kShapeBytes - 1);
    }
    for (size_t i = 0; i < kAhead; ++i) prefetch(i);
  }

  // True if `tensor` is what the one added as number `i` was; the numbers are asked in their order.
  bool hold(size_t i, PyObject* tensor) {
    prefetch(i + kAhead);
    return (tensor == bytes_[i].object && holds(i)) || look(i, tensor);
  }

  // True if the tensors that were added, which somebody has kept, are what they were.
  bool hold() {
    start();
    const size_t n = facts_.size();
    for (size_t i = 0; i < n; ++i) {
      prefetch(i + kAhead);
      if (!(bytes_[i].object != nullptr && holds(i)) && !look(i, facts_[i].object)) return false;
    }
    return true;
  }

  // Adds 1 to the version counters of `count` tensors from number `first` on, which somebody has
  // kept. False, with nothing done, where it is not known where they are or a tensor has none:
  // torch's own function takes five times as long for it, each counter being a miss of the caches
  // that nothing fetches ahead.
  bool raise_versions(size_t first, size_t count) {
    if (!layout.versions || first + count > facts_.size()) return false;
    versions_.clear();
    for (size_t i = first; i < first + count; ++i) {
      if (i + kAhead < first + count) bytes_[i + kAhead].prefetch_head();
      const Bytes& bytes = bytes_[i];
      if (bytes.object == nullptr || read<const void*>(bytes.object, Layout::kImpl) != bytes.impl) {
        return false;
      }
      uint32_t* const version = Layout::version_of(bytes.impl);
      if (version == nullptr) return false;
      fetch_ahead(version);
      versions_.push_back(version);
    }
    for (uint32_t* version : versions_) __atomic_fetch_add(version, 1, __ATOMIC_SEQ_CST);
    return true;
  }

 private:
  struct Fact {
    PyObject* object;
    const void* data;
    uint64_t element;
    PyTypeObject* type;
    int64_t dim;
    size_t geometry;  // place of the sizes, which the strides follow
  };

  // What many tensors have in common: kept once, so that a check finds it in the first-level cache.
  struct Form {
    PyTypeObject* type;
    unsigned char shape[Layout::kShapeBytes];

    bool operator<(const Form& other) const {
      if (type != other.type) return std::less<PyTypeObject*>()(type, other.type);
      return std::memcmp(shape, other.shape, sizeof(shape)) < 0;
    }
  };

  // The rest of the bytes of a tensor's three objects that tell what a look would find: one line
  // of the caches.
  struct alignas(64) Bytes {
    PyObject* object = nullptr;  // null: unknown, a look is needed. Not owned
    const void *impl, *storage;
    unsigned char data[Layout::kDataBytes];

    // Each line is read only once the one before it was found to be what it was: the owner of the
    // tensor keeps Python's object, that keeps TensorImpl, and that keeps StorageImpl.
    bool hold(const Form& form) const {
      return Py_TYPE(object) == form.type && read<const void*>(object, Layout::kImpl) == impl &&
             read<const void*>(impl, Layout::kStorage) == storage &&
             same_bytes<Layout::kShapeBytes>(shape_in(impl), form.shape) &&
             same_bytes<Layout::kDataBytes>(data_in(storage), data);
    }

    // What leads to the version counter.
    void prefetch_head() const {
      if (object == nullptr) return;
      fetch_ahead(reinterpret_cast<const char*>(object) + Layout::kImpl);
      fetch_ahead(static_cast<const char*>(impl) + Layout::kCounter);
    }

    // To the last byte: objects begin at multiples of 16, so that they reach into one line more
    // than their sizes would say.
    void prefetch() const {
      fetch_ahead(reinterpret_cast<const char*>(object) + Layout::kType);
      fetch_ahead(reinterpret_cast<const char*>(object) + Layout::kImpl);
      const char* const last = shape_in(impl) + Layout::kShapeBytes - 1;
      for (const char* at = static_cast<const char*>(impl); at < last; at += 64) {
        fetch_ahead(at);
      }
      fetch_ahead(last);
      fetch_ahead(data_in(storage));
      fetch_ahead(data_in(storage) + Layout::kDataBytes - 1);
    }
  };
  static_assert(sizeof(Bytes) == 64, "a line");

  static const char* shape_in(const void* impl) {
    return static_cast<const char*>(impl) + layout.shape;
  }
  static const char* data_in(const void* storage) {
    return static_cast<const char*>(storage) + Layout::kData;
  }

  // Keeps the bytes of number `i`, if they tell what a look has told.
  void remember(size_t i, PyObject* tensor, const DLTensor& look) {
    Bytes& bytes = bytes_[i];
    bytes.object = nullptr;
    if (layout.shape == 0 || look.dim > Layout::kDimensions) return;
    Form form{Py_TYPE(tensor), {}};
    bytes.impl = read<const void*>(tensor, Layout::kImpl);
    bytes.storage = read<const void*>(bytes.impl, Layout::kStorage);
    if (bytes.storage == nullptr) return;
    std::memcpy(bytes.data, data_in(bytes.storage), sizeof(bytes.data));
    std::memcpy(form.shape, shape_in(bytes.impl), sizeof(form.shape));
    const int64_t dim = read<int64_t>(form.shape, 0), offset = read<int64_t>(form.shape, 88);
    const char* start = read<const char*>(bytes.data, 0) + offset * (look.type_bits / 8);
    const char* found = static_cast<const char*>(look.data) + look.byte_offset;
    if (dim == look.dim && (start == found || found == nullptr) &&
        std::memcmp(form.shape + 8, look.sizes, 8 * dim) == 0 &&
        std::memcmp(form.shape + 48, look.strides, 8 * dim) == 0) {
      const auto place = numbers_.try_emplace(form, static_cast<uint32_t>(forms_.size()));
      if (place.second) forms_.push_back(form);
      form_of_[i] = place.first->second;
      bytes.object = tensor;
    }
  }

  void prefetch(size_t i) const {
    if (i < bytes_.size() && bytes_[i].object != nullptr) bytes_[i].prefetch();
  }

  // By its bytes, which are known.
  bool holds(size_t i) const { return bytes_[i].hold(forms_[form_of_[i]]); }

  // By asking it.
  bool look(size_t i, PyObject* tensor) {
    const Fact& was = facts_[i];
    if (Py_TYPE(tensor) != was.type || other_keys(i, tensor)) return false;
    DLTensor now;
    if (exchange->look(tensor, &now) != 0) {
      PyErr_Clear();  // such as one that has become sparse
      return false;
    }
    const int64_t* geometry = geometry_.data() + was.geometry;
    const bool held = now.data == was.data && type_of(now) == was.element && now.dim == was.dim &&
                      std::equal(now.sizes, now.sizes + now.dim, geometry) &&
                      std::equal(now.strides, now.strides + now.dim, geometry + now.dim);
    if (held) remember(i, tensor, now);
    return held;
  }

  // Whether its dispatch keys are known to be others, as those of values that are conjugated or
  // negated where they lie, of which DLPack does not tell.
  bool other_keys(size_t i, PyObject* tensor) const {
    const Bytes& seen = bytes_[i];
    if (tensor != seen.object || read<const void*>(tensor, Layout::kImpl) != seen.impl) {
      return false;
    }
    return !same_bytes<8>(shape_in(seen.impl) + Layout::kKeys,
                          forms_[form_of_[i]].shape + Layout::kKeys);
  }

  static uint64_t type_of(const DLTensor& tensor) {
    return uint64_t{tensor.type_code} << 32 | uint64_t{tensor.type_bits} << 16 | tensor.type_lanes;
  }

  std::vector<Fact> facts_;
  std::vector<int64_t> geometry_;  // sizes, then strides, of one tensor after the other
  std::vector<Bytes> bytes_;
  std::vector<uint32_t> form_of_;  // each tensor's, where its object is known
  std::vector<Form> forms_;
  std::map<Form, uint32_t> numbers_;  // of the forms
  std::vector<uint32_t*> versions_;   // while they are raised
};

// What dictionaries held and where they were kept themselves, in the order in which a check reads
// it. The pointers are borrowed from the tuple it was made of, which its owner keeps: Python's
// garbage collector sees through a tuple, and not through a capsule.
class Contents {
 public:
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

  // A dictionary that has others as values of some of its keys, whatever else it holds. Asked about
  // once for all of them, of a module once for its three.
  void add_owner(PyObject* dictionary) { add(dictionary, false); }
  // One that holds these keys and values in this order, and nothing more.
  void add_whole(PyObject* dictionary) { add(dictionary, true); }
  // Of the one that was added last.
  void add_item(PyObject* key, PyObject* value) {
    items_.push_back({key, value});
    ++expected_.back().count;
  }

  // Same objects, same order, nothing more.
  bool hold() {
    for (size_t i = 0; i < seen_.size(); ++i) {
      if (i + kAhead < seen_.size()) {
        fetch_ahead(static_cast<const char*>(seen_[i + kAhead].dictionary) + kVersion);
      }
      Seen& each = seen_[i];
      const uint64_t version = versioned ? read<uint64_t>(each.dictionary, kVersion) : 0;
      if (version != 0 && version == each.version) continue;
      if (!holds(static_cast<PyObject*>(each.dictionary), expected_[i])) return false;
      each.version = version;
    }
    return true;
  }

 private:
  struct Seen {
    void* dictionary;
    uint64_t version;  // with which it was last found to hold what was expected; 0: none
  };
  struct Item {
    PyObject *key, *value;
  };
  struct Expected {
    size_t first;  // of the items
    Py_ssize_t count;
    bool whole;
  };
  static constexpr size_t kAhead = 64;

  void add(PyObject* dictionary, bool whole) {
    seen_.push_back({dictionary, 0});
    expected_.push_back({items_.size(), 0, whole});
  }

  bool holds(PyObject* dictionary, const Expected& expected) const {
    const Item* item = items_.data() + expected.first;
    const Item* const end = item + expected.count;
    if (!expected.whole) {
      return std::all_of(item, end, [&](const Item& each) {
        return PyDict_GetItemWithError(dictionary, each.key) == each.value;
      });
    }
    if (PyDict_Size(dictionary) != expected.count) return false;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    for (; item != end; ++item) {
      if (!PyDict_Next(dictionary, &position, &key, &value) || key != item->key ||
          value != item->value) {
        return false;
      }
    }
    return true;
  }

  std::vector<Seen> seen_;  // all that is read while nothing changes
  std::vector<Expected> expected_;
  std::vector<Item> items_;
};

}  // namespace swa_fast
