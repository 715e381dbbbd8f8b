#include "profile/gguf.h"

#include <bit>
#include <stdexcept>

namespace thimble::gguf {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers are copied as they lie in the file");

constexpr char kMagic[] = {'G', 'G', 'U', 'F'};
constexpr uint32_t kVersion = 3;  // of written files; version 2 is the same in all that is read here
constexpr uint32_t kMaxDimensions = 4;
constexpr size_t kAlignment = 32;

[[noreturn]] void wrong(const std::string& what) {
  throw std::runtime_error(what);
}

/// Bytes of a value of fixed size, 0 for others.
size_t bytes_of(Type type) {
  switch (type) {
    case Type::u8:
    case Type::i8:
    case Type::boolean:
      return 1;
    case Type::u16:
    case Type::i16:
      return 2;
    case Type::u32:
    case Type::i32:
    case Type::f32:
      return 4;
    case Type::u64:
    case Type::i64:
    case Type::f64:
      return 8;
    default:
      return 0;
  }
}

/// Reads a file from front to back. Throws instead of reading past its end.
class Cursor {
public:
  Cursor(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  const uint8_t* take(uint64_t n) {
    if (n > size_ - at_) wrong("it is cut short");
    const uint8_t* taken = data_ + at_;
    at_ += size_t(n);
    return taken;
  }
  const uint8_t* take(uint64_t count, size_t element_bytes) {
    if (count > (size_ - at_) / element_bytes) wrong("it is cut short");
    return take(count * element_bytes);
  }
  template <typename T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }
  std::string_view text() {
    const auto length = number<uint64_t>();
    return {reinterpret_cast<const char*>(take(length)), size_t(length)};
  }
  size_t at() const { return at_; }

private:
  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
};

/// Moves the cursor past `count` values of a type; returns where they begin.
const uint8_t* take_values(Cursor& in, Type type, uint64_t count) {
  if (const size_t bytes = bytes_of(type)) return in.take(count, bytes);
  if (type != Type::string) wrong("a key has an unknown type");
  const uint8_t* first = in.take(0);
  for (uint64_t i = 0; i < count; i++) in.text();
  return first;
}

uint64_t element_count(Cursor& in) {
  const auto n_dimensions = in.number<uint32_t>();
  if (n_dimensions > kMaxDimensions) wrong("a tensor has too many dimensions");
  uint64_t count = 1;
  for (uint32_t i = 0; i < n_dimensions; i++) {
    const auto n = in.number<int64_t>();
    if (n < 0 || __builtin_mul_overflow(count, uint64_t(n), &count)) wrong("a tensor has an absurd size");
  }
  return count;
}

}  // namespace

Reader::Reader(const uint8_t* data, size_t size) {
  if (size < sizeof kMagic || std::memcmp(data, kMagic, sizeof kMagic) != 0) wrong("it is no GGUF file");
  Cursor in(data, size);
  in.take(sizeof kMagic);
  const auto version = in.number<uint32_t>();
  if (version != 2 && version != 3) wrong("its GGUF version is neither 2 nor 3");
  const auto n_tensors = in.number<int64_t>(), n_keys = in.number<int64_t>();
  if (n_tensors < 0 || n_keys < 0) wrong("it has an absurd number of keys or tensors");
  for (int64_t i = 0; i < n_keys; i++) {
    const std::string key(in.text());
    Value value{in.number<Type>(), Type::u8, 1, nullptr};
    if (value.type == Type::array) {
      value.element = in.number<Type>();
      value.count = in.number<uint64_t>();
    }
    value.data = take_values(in, value.type == Type::array ? value.element : value.type, value.count);
    if (!values_.emplace(key, value).second) wrong(key + " is there twice");
  }
  for (int64_t i = 0; i < n_tensors; i++) {
    const std::string name(in.text());
    const uint64_t count = element_count(in);
    const auto type = in.number<uint32_t>();
    if (!tensors_.emplace(name, Tensor{type, count, in.number<uint64_t>()}).second) wrong(name + " is there twice");
  }
  const size_t alignment = values_.contains("general.alignment") ? value<uint32_t>("general.alignment") : kAlignment;
  if (!std::has_single_bit(alignment)) wrong("its alignment is no power of two");
  const size_t start = (in.at() + alignment - 1) & ~(alignment - 1);
  if (start <= size) data_ = {data + start, size - start};  // else the file has keys alone
}

const Reader::Value& Reader::find(const std::string& key, Type type) const {
  const auto found = values_.find(key);
  if (found == values_.end()) wrong(key + " is missing");
  if (found->second.type != type) wrong(key + " has the wrong type");
  return found->second;
}

const Reader::Value& Reader::find_array(const std::string& key, Type element, size_t max_count) const {
  const Value& found = find(key, Type::array);
  if (found.element != element) wrong(key + " has the wrong type");
  if (found.count > max_count) wrong(key + " is too long");
  return found;
}

const uint8_t* Reader::find_tensor(const std::string& name, TensorType type, size_t count, size_t element_bytes) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) wrong(name + " is missing");
  const Tensor& tensor = found->second;
  if (tensor.type != uint32_t(type)) wrong(name + " has the wrong type");
  if (tensor.count != count) wrong(name + " has the wrong size");
  if (tensor.offset > data_.size() || count > (data_.size() - tensor.offset) / element_bytes) wrong("it is cut short");
  return data_.data() + tensor.offset;
}

std::string Reader::text(const std::string& key) const {
  const uint8_t* at = find(key, Type::string).data;  // the constructor has checked its length
  uint64_t length;
  std::memcpy(&length, at, sizeof length);
  return {reinterpret_cast<const char*>(at + sizeof length), size_t(length)};
}

void Writer::text(std::string_view key, std::string_view value) {
  begin_value(key, Type::string);
  append_text(keys_, value);
}

void Writer::begin_value(std::string_view key, Type type) {
  append_text(keys_, key);
  append(keys_, type);
  n_keys_++;
}

void Writer::begin_tensor(std::string_view name, size_t row_size, size_t rows, TensorType type) {
  append_text(tensors_, name);
  append(tensors_, uint32_t(rows > 1 ? 2 : 1));
  append(tensors_, uint64_t{row_size});
  if (rows > 1) append(tensors_, uint64_t{rows});
  append(tensors_, type);
  append(tensors_, uint64_t{data_.size()});
  n_tensors_++;
}

std::vector<uint8_t> Writer::file() const {
  Bytes file;
  append(file, kMagic, sizeof kMagic);
  append(file, kVersion);
  append(file, n_tensors_);
  append(file, n_keys_);
  for (const Bytes* part : {&keys_, &tensors_}) append(file, part->data(), part->size());
  pad(file);
  append(file, data_.data(), data_.size());
  return file;
}

void Writer::pad(Bytes& bytes) {
  bytes.resize((bytes.size() + kAlignment - 1) / kAlignment * kAlignment);
}

void Writer::append(Bytes& to, const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  if (size > 0) to.insert(to.end(), bytes, bytes + size);
}

void Writer::append_text(Bytes& to, std::string_view text) {
  append(to, uint64_t{text.size()});
  append(to, text.data(), text.size());
}

}  // namespace thimble::gguf
