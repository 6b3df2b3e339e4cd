// Runs the ops of csrc/cpu for tests/arm/machine.py: requests come on stdin, replies go to stdout, as written below. It
// is linked with the kernels and their glue, and takes libtorch's place: with what the glue calls of torch's C shim,
// for tensors that came with the request.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

// In memory of its own, of exactly its size, at `offset` from an address that every alignment divides.
struct AtenTensorOpaque {
  int32_t dtype;
  std::vector<int64_t> sizes, strides;
  int64_t bytes;
  std::unique_ptr<char[]> memory;
  char* data;
};

struct StableListOpaque {
  std::vector<int64_t> items;
};

namespace {

using torch::headeronly::ScalarType;
using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

// Name -> function. The glue registers its ops before main begins.
std::map<std::string, Boxed>& ops() {
  static std::map<std::string, Boxed> registered;
  return registered;
}

int64_t ranges = 1;  // that parallel_for makes, whatever a range is worth

}  // namespace

extern "C" {

AOTITorchError aoti_torch_library_init_def(const char*, const char*, uint32_t, TorchLibraryHandle*) { return 0; }
AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryHandle*) { return 0; }
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle*) {
  return 0;
}
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char*) { return 0; }
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return 0; }
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, Boxed function, uint64_t) {
  ops()[name] = function;
  return 0;
}
uint64_t aoti_torch_abi_version() { return TORCH_ABI_VERSION; }

// A tensor belongs to the request.
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle) { return 0; }
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* dim) {
  *dim = static_cast<int64_t>(t->sizes.size());
  return 0;
}
AOTITorchError aoti_torch_get_size(AtenTensorHandle t, int64_t d, int64_t* size) {
  *size = t->sizes.at(d);
  return 0;
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle t, int64_t d, int64_t* stride) {
  *stride = t->strides.at(d);
  return 0;
}
AOTITorchError aoti_torch_get_numel(AtenTensorHandle t, int64_t* numel) {
  *numel = 1;
  for (const int64_t size : t->sizes) *numel *= size;
  return 0;
}
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle t, bool* is_contiguous) {
  int64_t numel = 1;
  *is_contiguous = true;
  for (size_t d = t->sizes.size(); d-- > 0; numel *= t->sizes[d]) {
    if (t->sizes[d] > 1 && t->strides[d] != numel) *is_contiguous = false;
  }
  return 0;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle t, int32_t* dtype) {
  *dtype = t->dtype;
  return 0;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle t, const void** data) {
  *data = t->data;
  return 0;
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle t, void** data) {
  *data = t->data;
  return 0;
}

size_t aoti_torch_dtype_element_size(int32_t dtype) {
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Byte:
    case ScalarType::Bool: return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Int:
    case ScalarType::Float: return 4;
    default: return 8;
  }
}
#define DTYPE(function, name) \
  int32_t function() { return static_cast<int32_t>(ScalarType::name); }
DTYPE(aoti_torch_dtype_uint8, Byte)
DTYPE(aoti_torch_dtype_int8, Char)
DTYPE(aoti_torch_dtype_int16, Short)
DTYPE(aoti_torch_dtype_int32, Int)
DTYPE(aoti_torch_dtype_int64, Long)
DTYPE(aoti_torch_dtype_float16, Half)
DTYPE(aoti_torch_dtype_float32, Float)
DTYPE(aoti_torch_dtype_float64, Double)
DTYPE(aoti_torch_dtype_complex32, ComplexHalf)
DTYPE(aoti_torch_dtype_complex64, ComplexFloat)
DTYPE(aoti_torch_dtype_complex128, ComplexDouble)
DTYPE(aoti_torch_dtype_bool, Bool)
DTYPE(aoti_torch_dtype_bfloat16, BFloat16)
DTYPE(aoti_torch_dtype_float8_e5m2, Float8_e5m2)
DTYPE(aoti_torch_dtype_float8_e4m3fn, Float8_e4m3fn)
DTYPE(aoti_torch_dtype_float8_e5m2fnuz, Float8_e5m2fnuz)
DTYPE(aoti_torch_dtype_float8_e4m3fnuz, Float8_e4m3fnuz)
DTYPE(aoti_torch_dtype_uint16, UInt16)
DTYPE(aoti_torch_dtype_uint32, UInt32)
DTYPE(aoti_torch_dtype_uint64, UInt64)
DTYPE(torch_dtype_float8_e8m0fnu, Float8_e8m0fnu)
DTYPE(torch_dtype_float4_e2m1fn_x2, Float4_e2m1fn_x2)
#undef DTYPE

AOTITorchError torch_list_size(StableListHandle list, size_t* size) {
  *size = list->items.size();
  return 0;
}
AOTITorchError torch_list_get_item(StableListHandle list, size_t i, StableIValue* item) {
  *item = static_cast<StableIValue>(list->items.at(i));
  return 0;
}
// A list belongs to the request too.
AOTITorchError torch_delete_list(StableListHandle) { return 0; }

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc function, void* context) {
  for (int64_t i = 0; i < ranges; ++i) {
    function(begin + (end - begin) * i / ranges, begin + (end - begin) * (i + 1) / ranges, context);
  }
  return 0;
}

}  // extern "C"

namespace {

// A request:
//   op                                        text
//   ranges, results of the op, arguments      3 int64
//   each argument                             a letter, and by it
//     N none; I int, B bool, L list of int    int64; for the list their number and they
//     F float                                 double
//     T tensor                                dtype, sizes, strides, offset, then its memory as text
//   before which is a ? where the schema has it
// The reply: a letter, and by it
//   E error                                   text
//   R result                                  8 bytes, and each tensor's memory as text
// Text is its length as int64, then its bytes.
[[noreturn]] void stop() { std::exit(std::feof(stdin) ? 0 : 1); }

void read(void* to, size_t bytes) {
  if (bytes && std::fread(to, bytes, 1, stdin) != 1) stop();
}

template <typename T = int64_t>
T read() {
  T value;
  read(&value, sizeof value);
  return value;
}

std::vector<int64_t> read_list() {
  std::vector<int64_t> list(read());
  read(list.data(), list.size() * sizeof(int64_t));
  return list;
}

std::string read_text() {
  std::string text(read(), '\0');
  read(text.data(), text.size());
  return text;
}

void write(const void* from, size_t bytes) { std::fwrite(from, 1, bytes, stdout); }

void write_text(const char* text, int64_t bytes) {
  write(&bytes, sizeof bytes);
  write(text, bytes);
}

// What arguments point to; at places that stay theirs.
struct Request {
  std::deque<AtenTensorOpaque> tensors;
  std::deque<StableListOpaque> lists;

  StableIValue read_tensor() {
    AtenTensorOpaque& t = tensors.emplace_back();
    t.dtype = static_cast<int32_t>(read());
    t.sizes = read_list(), t.strides = read_list();
    const int64_t offset = read();
    t.bytes = read();
    t.memory.reset(new char[offset + t.bytes]);
    t.data = t.memory.get() + offset;
    read(t.data, t.bytes);
    return reinterpret_cast<StableIValue>(&t);
  }

  StableIValue read_argument() {
    const char kind = read<char>();
    switch (kind) {
      case '?': {
        const StableIValue value = read_argument();
        return value ? reinterpret_cast<StableIValue>(new StableIValue(value)) : 0;  // the glue deletes it
      }
      case 'N': return 0;
      case 'T': return read_tensor();
      case 'L': return reinterpret_cast<StableIValue>(&lists.emplace_back(StableListOpaque{read_list()}));
      default: return read<StableIValue>();
    }
  }
};

void answer() {
  const std::string op = read_text();
  ranges = read();
  const int64_t results = read();
  Request request;
  std::vector<StableIValue> stack(read());
  for (StableIValue& argument : stack) argument = request.read_argument();
  try {
    ops().at(op)(stack.data(), stack.size(), results);
  } catch (const std::exception& error) {
    write("E", 1);
    write_text(error.what(), static_cast<int64_t>(std::strlen(error.what())));
    return;
  }
  write("R", 1);
  write(&stack[0], sizeof stack[0]);
  for (const AtenTensorOpaque& t : request.tensors) write_text(t.data, t.bytes);
}

}  // namespace

int main() {
  for (;;) {
    answer();
    std::fflush(stdout);
  }
}
