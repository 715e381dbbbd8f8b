// Reads and writes GGUF files: typed values by key, and tensors by name. Only the part of the format that profiles
// need, so that the core depends on no other library.
//
// A file, little-endian: "GGUF", u32 version (2 or 3), i64 number of tensors, i64 number of keys, then
//   keys     string key, u32 type, value; an array is u32 type of its elements, u64 count, elements
//   tensors  string name, u32 number of dimensions, i64 dimensions (the fastest first), u32 type, u64 offset
//   data     from the next multiple of general.alignment on (32 where that key is missing); offsets count from there
// A string is u64 length and its bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace thimble::gguf {

// Types of values, by the format's own numbers.
enum class Type : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

// Types of tensors, as far as profiles use them.
enum class TensorType : uint32_t { f32 = 0, f16 = 1, i8 = 24, i16 = 25 };

template <typename T>
constexpr Type type_of() {
  if constexpr (std::is_same_v<T, uint32_t>) return Type::u32;
  if constexpr (std::is_same_v<T, int32_t>) return Type::i32;
  if constexpr (std::is_same_v<T, float>) return Type::f32;
}

template <typename T>
constexpr TensorType tensor_type_of() {
  if constexpr (std::is_same_v<T, float>) return TensorType::f32;
  if constexpr (std::is_same_v<T, uint16_t>) return TensorType::f16;  // its bits
  if constexpr (std::is_same_v<T, int8_t>) return TensorType::i8;
  if constexpr (std::is_same_v<T, int16_t>) return TensorType::i16;
}

/// A file in memory. Every length and offset is checked against the memory's size before it is used. A value or tensor
/// that is asked for must be there and have the type and count that are asked for. All functions throw
/// std::runtime_error with half a sentence that says what is wrong ("x is missing").
class Reader {
public:
  /// `data` must outlive the reader.
  Reader(const uint8_t* data, size_t size);

  std::string text(const std::string& key) const;
  template <typename T>
  T value(const std::string& key) const {
    T value;
    std::memcpy(&value, find(key, type_of<T>()).data, sizeof(T));
    return value;
  }
  template <typename T>
  std::vector<T> array(const std::string& key, size_t max_count) const {
    const Value& found = find_array(key, type_of<T>(), max_count);
    return copy<T>(found.data, found.count);
  }
  bool has_tensor(const std::string& name) const { return tensors_.contains(name); }
  template <typename T>
  std::vector<T> tensor(const std::string& name, size_t count) const {
    return copy<T>(find_tensor(name, tensor_type_of<T>(), count, sizeof(T)), count);
  }

private:
  struct Value {
    Type type;
    Type element;  // of an array
    uint64_t count;
    const uint8_t* data;
  };
  struct Tensor {
    uint32_t type;
    uint64_t count;  // elements
    uint64_t offset;
  };

  const Value& find(const std::string& key, Type type) const;
  const Value& find_array(const std::string& key, Type element, size_t max_count) const;
  const uint8_t* find_tensor(const std::string& name, TensorType type, size_t count, size_t element_bytes) const;
  template <typename T>
  static std::vector<T> copy(const uint8_t* data, size_t count) {
    std::vector<T> values(count);
    if (count > 0) std::memcpy(values.data(), data, count * sizeof(T));
    return values;
  }

  std::map<std::string, Value, std::less<>> values_;
  std::map<std::string, Tensor, std::less<>> tensors_;
  std::span<const uint8_t> data_;  // of the tensors
};

/// Makes a file's bytes, with keys and tensors in the order in which they were given.
class Writer {
public:
  void text(std::string_view key, std::string_view value);
  template <typename T>
  void value(std::string_view key, T value) {
    begin_value(key, type_of<T>());
    append(keys_, value);
  }
  template <typename T>
  void array(std::string_view key, const std::vector<T>& values) {
    begin_value(key, Type::array);
    append(keys_, type_of<T>());
    append(keys_, uint64_t{values.size()});
    append(keys_, values.data(), values.size() * sizeof(T));
  }
  /// Adds a tensor of `rows` rows.
  template <typename T>
  void tensor(std::string_view name, const std::vector<T>& values, size_t rows) {
    begin_tensor(name, values.size() / rows, rows, tensor_type_of<T>());
    append(data_, values.data(), values.size() * sizeof(T));
    pad(data_);
  }
  std::vector<uint8_t> file() const;

private:
  using Bytes = std::vector<uint8_t>;
  void begin_value(std::string_view key, Type type);
  void begin_tensor(std::string_view name, size_t row_size, size_t rows, TensorType type);
  static void pad(Bytes& bytes);
  static void append(Bytes& to, const void* data, size_t size);
  template <typename T>
  static void append(Bytes& to, T value) {
    append(to, &value, sizeof(T));
  }
  static void append_text(Bytes& to, std::string_view text);

  int64_t n_keys_ = 0, n_tensors_ = 0;
  Bytes keys_, tensors_, data_;
};

}  // namespace thimble::gguf
