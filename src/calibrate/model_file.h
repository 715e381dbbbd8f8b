// Reads a model's shape from the metadata of its file, without loading the model.
#pragma once

#include <memory>
#include <string>

#include "profile/profile.h"

struct gguf_context;

namespace thimble {

class ModelFile {
public:
  /// Throws std::runtime_error where it is no GGUF file or names no architecture.
  explicit ModelFile(const std::string& path);

  const std::string& architecture() const { return architecture_; }
  /// The context length, in tokens, that the model was trained for; 0 where the file does not say.
  int context_length() const { return number("context_length", 0, 0); }
  int n_layers() const { return number("block_count", 0, 0); }
  /// Heads of a layer; those of a layer with a sliding window may have another size.
  LayerShape layer(int index, bool is_window) const;

private:
  // Reads a number that all layers share or, where the file has an array, that of one layer.
  int number(const std::string& name, int layer, int fallback) const;

  std::shared_ptr<gguf_context> gguf_;
  std::string architecture_;
};

}  // namespace thimble
