// Runs operators of csrc/*_cpu.cpp on recorded arguments, without torch.
//
//     run CASES RESULTS
//
// What those files call of libtorch is a table of C functions, torch/csrc/stable/c/shim.h and
// torch/csrc/inductor/aoti_torch/c/shim.h. The few that the kernels need are below, over tensors
// that are a piece of memory with sizes and strides, so the same sources that make swa_fast._C make
// a program for any processor. tests/test_arm.py says what is recorded and what is compared.
//
// CASES: words of eight bytes, each string and block of memory filled up to whole words.
//
//   cases, and for each of them
//     the operator's name: its bytes, then the characters
//     blocks of memory, for each: bytes, address modulo 64, contents
//     tensors, for each: block, offset in bytes, torch's number of the type, dimensions, sizes,
//       strides
//     addresses in memory, for each: block and offset where it lies, block and offset it is of
//     arguments, for each: whether it is optional; 0 (none), 1 and an integer, 2 and a double,
//       3 and a bool, 4 and a tensor, or 5, a number and as many tensors
//     whether a tensor is returned
//
// RESULTS: for each case the contents of its blocks, then bytes and contents of what was returned.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "stable_compat.h"

namespace {

struct Memory {
  Memory(int64_t bytes, int64_t remainder) : bytes(bytes) {
    void* const whole = std::aligned_alloc(64, (bytes + remainder + 127) / 64 * 64);
    if (whole == nullptr) throw std::bad_alloc();
    data = static_cast<char*>(whole) + remainder;
  }
  int64_t bytes;
  char* data;
};

struct Tensor {
  char* data;
  int32_t type;
  std::vector<int64_t> sizes, strides;

  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    return count;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (size_t d = sizes.size(); d-- > 0; expected *= sizes[d]) {
      if (sizes[d] != 1 && strides[d] != expected) return false;
    }
    return true;
  }
};

using List = std::vector<StableIValue>;
using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

Tensor* tensor_of(AtenTensorHandle handle) { return reinterpret_cast<Tensor*>(handle); }
AtenTensorHandle handle_of(Tensor* tensor) { return reinterpret_cast<AtenTensorHandle>(tensor); }
List* list_of(StableListHandle handle) { return reinterpret_cast<List*>(handle); }

}  // namespace

// Objects live as long as the program: handles are nothing but their addresses.
#pragma GCC visibility push(default)
extern "C" {

#define SWA_FAST_GIVE(expression) \
  {                               \
    expression;                   \
    return 0;                     \
  }

AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                            TorchLibraryHandle* out)
    SWA_FAST_GIVE(*out = nullptr) AOTITorchError
    aoti_torch_delete_library_object(TorchLibraryHandle) SWA_FAST_GIVE() AOTITorchError
    torch_library_impl(TorchLibraryHandle, const char* name, Kernel kernel, uint64_t)
        SWA_FAST_GIVE(kernels()[name] = kernel) uint64_t aoti_torch_abi_version() {
  return TORCH_ABI_VERSION;
}

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f,
                                  void* context)
    SWA_FAST_GIVE(if (begin < end) f(begin, end, context))

        AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle from, AtenTensorHandle* out)
            SWA_FAST_GIVE(*out = from) AOTITorchError
    aoti_torch_delete_tensor_object(AtenTensorHandle) SWA_FAST_GIVE() AOTITorchError
    aoti_torch_get_dim(AtenTensorHandle t, int64_t* out)
        SWA_FAST_GIVE(*out = static_cast<int64_t>(tensor_of(t)->sizes.size())) AOTITorchError
    aoti_torch_get_numel(AtenTensorHandle t, int64_t* out)
        SWA_FAST_GIVE(*out = tensor_of(t)->numel()) AOTITorchError
    aoti_torch_get_size(AtenTensorHandle t, int64_t d, int64_t* out)
        SWA_FAST_GIVE(*out = tensor_of(t)->sizes.at(d)) AOTITorchError
    aoti_torch_get_stride(AtenTensorHandle t, int64_t d, int64_t* out)
        SWA_FAST_GIVE(*out = tensor_of(t)->strides.at(d)) AOTITorchError
    aoti_torch_get_dtype(AtenTensorHandle t, int32_t* out)
        SWA_FAST_GIVE(*out = tensor_of(t)->type) AOTITorchError
    aoti_torch_get_device_type(AtenTensorHandle, int32_t* out)
        SWA_FAST_GIVE(*out = aoti_torch_device_type_cpu()) AOTITorchError
    aoti_torch_get_device_index(AtenTensorHandle, int32_t* out)
        SWA_FAST_GIVE(*out = -1) AOTITorchError
    aoti_torch_is_contiguous(AtenTensorHandle t, bool* out)
        SWA_FAST_GIVE(*out = tensor_of(t)->contiguous()) AOTITorchError
    torch_get_mutable_data_ptr(AtenTensorHandle t, void** out)
        SWA_FAST_GIVE(*out = tensor_of(t)->data) AOTITorchError
    torch_get_const_data_ptr(AtenTensorHandle t, const void** out)
        SWA_FAST_GIVE(*out = tensor_of(t)->data)

            AOTITorchError torch_new_list_reserve_size(size_t, StableListHandle* out)
                SWA_FAST_GIVE(*out = reinterpret_cast<StableListHandle>(new List)) AOTITorchError
    torch_delete_list(StableListHandle) SWA_FAST_GIVE() AOTITorchError
    torch_list_size(StableListHandle list, size_t* out)
        SWA_FAST_GIVE(*out = list_of(list)->size()) AOTITorchError
    torch_list_get_item(StableListHandle list, size_t i, StableIValue* out)
        SWA_FAST_GIVE(*out = list_of(list)->at(i)) AOTITorchError
    torch_list_push_back(StableListHandle list,
                         StableIValue value) SWA_FAST_GIVE(list_of(list)->push_back(value))
// As numbered by torch::headeronly::ScalarType, which is what libtorch gives.
#define SWA_FAST_TYPE(name, member)                  \
  int32_t name() {                                   \
    using torch::headeronly::ScalarType;             \
    return static_cast<int32_t>(ScalarType::member); \
  }
        SWA_FAST_TYPE(aoti_torch_dtype_bfloat16, BFloat16) SWA_FAST_TYPE(
            aoti_torch_dtype_bool, Bool) SWA_FAST_TYPE(aoti_torch_dtype_complex128, ComplexDouble)
            SWA_FAST_TYPE(aoti_torch_dtype_complex32,
                          ComplexHalf) SWA_FAST_TYPE(aoti_torch_dtype_complex64, ComplexFloat)
                SWA_FAST_TYPE(aoti_torch_dtype_float16, Half) SWA_FAST_TYPE(
                    aoti_torch_dtype_float32, Float) SWA_FAST_TYPE(aoti_torch_dtype_float64, Double)
                    SWA_FAST_TYPE(aoti_torch_dtype_float8_e4m3fn, Float8_e4m3fn) SWA_FAST_TYPE(
                        aoti_torch_dtype_float8_e4m3fnuz,
                        Float8_e4m3fnuz) SWA_FAST_TYPE(aoti_torch_dtype_float8_e5m2, Float8_e5m2)
                        SWA_FAST_TYPE(aoti_torch_dtype_float8_e5m2fnuz,
                                      Float8_e5m2fnuz) SWA_FAST_TYPE(aoti_torch_dtype_int16, Short)
                            SWA_FAST_TYPE(aoti_torch_dtype_int32,
                                          Int) SWA_FAST_TYPE(aoti_torch_dtype_int64, Long)
                                SWA_FAST_TYPE(aoti_torch_dtype_int8,
                                              Char) SWA_FAST_TYPE(aoti_torch_dtype_uint16, UInt16)
                                    SWA_FAST_TYPE(aoti_torch_dtype_uint32, UInt32) SWA_FAST_TYPE(
                                        aoti_torch_dtype_uint64,
                                        UInt64) SWA_FAST_TYPE(aoti_torch_dtype_uint8, Byte)
                                        SWA_FAST_TYPE(torch_dtype_float8_e8m0fnu, Float8_e8m0fnu)
                                            SWA_FAST_TYPE(torch_dtype_float4_e2m1fn_x2,
                                                          Float4_e2m1fn_x2)
#define SWA_FAST_DEVICE(name, number) \
  int32_t aoti_torch_device_type_##name() { return number; }
                                                SWA_FAST_DEVICE(cpu, 0) SWA_FAST_DEVICE(cuda, 1)
                                                    SWA_FAST_DEVICE(meta, 2) SWA_FAST_DEVICE(mps, 3)
                                                        SWA_FAST_DEVICE(privateuse1,
                                                                        4) SWA_FAST_DEVICE(xpu, 5)
#define SWA_FAST_LAYOUT(name, number) \
  int32_t aoti_torch_layout_##name() { return number; }
                                                            SWA_FAST_LAYOUT(
                                                                strided,
                                                                0) SWA_FAST_LAYOUT(sparse_coo, 1)
                                                                SWA_FAST_LAYOUT(sparse_csr, 2)
                                                                    SWA_FAST_LAYOUT(_mkldnn, 3)
                                                                        SWA_FAST_LAYOUT(sparse_csc,
                                                                                        4)
                                                                            SWA_FAST_LAYOUT(
                                                                                sparse_bsr, 5)
                                                                                SWA_FAST_LAYOUT(
                                                                                    sparse_bsc, 6)
                                                                                    SWA_FAST_LAYOUT(
                                                                                        jagged, 7)

                                                                                        size_t
    aoti_torch_dtype_element_size(int32_t type) {
  using torch::headeronly::ScalarType;
  switch (static_cast<ScalarType>(type)) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
      return 4;
    default:
      return 8;
  }
}

// aten::empty_like, and aten::new_empty of a list of sizes.
AOTITorchError torch_call_dispatcher(const char* name, const char*, StableIValue* stack, uint64_t) {
  const auto* like = reinterpret_cast<const Tensor*>(stack[0]);
  auto made = std::make_unique<Tensor>(*like);
  if (std::string(name) == "aten::new_empty") {
    const List& sizes = *reinterpret_cast<const List*>(stack[1]);
    made->sizes.assign(sizes.begin(), sizes.end());
    made->strides.assign(sizes.size(), 1);
  } else if (std::string(name) != "aten::empty_like") {
    return 1;
  }
  const auto bytes =
      made->numel() * static_cast<int64_t>(aoti_torch_dtype_element_size(made->type));
  made->data = Memory(bytes, 0).data;
  stack[0] = reinterpret_cast<StableIValue>(made.release());
  return 0;
}

}  // extern "C"
#pragma GCC visibility pop

namespace {

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {
    file_.exceptions(std::ios::failbit | std::ios::badbit | std::ios::eofbit);
  }
  int64_t word() {
    int64_t value;
    file_.read(reinterpret_cast<char*>(&value), sizeof(value));
    return value;
  }
  std::vector<int64_t> words(int64_t count) {
    std::vector<int64_t> values(count);
    for (int64_t& value : values) value = word();
    return values;
  }
  void bytes(char* to, int64_t count) {
    char rest[8];
    if (count > 0) file_.read(to, count);
    if (count % 8 != 0) file_.read(rest, 8 - count % 8);
  }
  std::string text() {
    std::string value(word(), ' ');
    bytes(value.data(), static_cast<int64_t>(value.size()));
    return value;
  }

 private:
  std::ifstream file_;
};

StableIValue read_argument(Reader& cases, std::vector<Tensor>& tensors) {
  const bool optional = cases.word() != 0;
  const int64_t kind = cases.word();
  StableIValue value = 0;
  if (kind == 0) return value;
  if (kind == 5) {
    auto* const list = new List;
    for (const int64_t i : cases.words(cases.word())) {
      list->push_back(torch::stable::detail::from(handle_of(&tensors.at(i))));
    }
    value = torch::stable::detail::from(reinterpret_cast<StableListHandle>(list));
  } else {
    const int64_t word = cases.word();
    value = kind == 3   ? torch::stable::detail::from(word != 0)
            : kind == 4 ? torch::stable::detail::from(handle_of(&tensors.at(word)))
                        : static_cast<StableIValue>(word);
  }
  return optional ? torch::stable::detail::from(new StableIValue(value)) : value;
}

void run_case(Reader& cases, std::ofstream& results) {
  const auto write = [&](const char* data, int64_t bytes) {
    const char zeros[8] = {};
    results.write(data, bytes);
    results.write(zeros, (8 - bytes % 8) % 8);
  };
  const std::string name = cases.text();
  std::vector<Memory> blocks;
  for (int64_t left = cases.word(); left > 0; --left) {
    const int64_t bytes = cases.word();
    blocks.emplace_back(bytes, cases.word());
    cases.bytes(blocks.back().data, bytes);
  }
  std::vector<Tensor> tensors;
  for (int64_t left = cases.word(); left > 0; --left) {
    char* const block = blocks.at(cases.word()).data;
    Tensor tensor{block + cases.word(), static_cast<int32_t>(cases.word()), {}, {}};
    const int64_t dimensions = cases.word();
    tensor.sizes = cases.words(dimensions);
    tensor.strides = cases.words(dimensions);
    tensors.push_back(std::move(tensor));
  }
  for (int64_t left = cases.word(); left > 0; --left) {
    const std::vector<int64_t> at = cases.words(4);
    char* const address = blocks.at(at[2]).data + at[3];
    std::memcpy(blocks.at(at[0]).data + at[1], &address, sizeof(address));
  }
  const int64_t count = cases.word();
  std::vector<StableIValue> stack(count + 1);
  for (int64_t i = 0; i < count; ++i) stack[i] = read_argument(cases, tensors);
  const int64_t returned = cases.word();
  const auto kernel = kernels().find(name);
  if (kernel == kernels().end()) throw std::runtime_error("no operator " + name);
  kernel->second(stack.data(), count, returned);
  for (const Memory& block : blocks) write(block.data, block.bytes);
  if (returned != 0) {
    const auto* result = reinterpret_cast<const Tensor*>(stack[0]);
    const int64_t bytes =
        result->numel() * static_cast<int64_t>(aoti_torch_dtype_element_size(result->type));
    write(reinterpret_cast<const char*>(&bytes), sizeof(bytes));
    write(result->data, bytes);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s CASES RESULTS\n", arguments[0]);
    return 2;
  }
  try {
    Reader cases(arguments[1]);
    std::ofstream results(arguments[2], std::ios::binary);
    results.exceptions(std::ios::failbit | std::ios::badbit);
    for (int64_t left = cases.word(); left > 0; --left) run_case(cases, results);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
