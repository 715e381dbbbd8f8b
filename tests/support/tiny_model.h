// Models of a few layers with random weights, made from metadata: every kind of cache that an architecture can bring.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "llama.h"

namespace thimble::test {

using Metadata = std::map<std::string, std::variant<uint32_t, float, std::vector<uint32_t>>>;

struct TinyModel {
  std::string architecture;
  Metadata metadata;  // without the architecture's prefix; what is not said here is as in base_metadata
};

constexpr int kTinyVocabulary = 128;

/// Two layers of four heads of 64.
Metadata base_metadata();

/// Throws where llama.cpp refuses.
std::shared_ptr<llama_model> make_model(const TinyModel& tiny, const llama_model_params& params);

/// A file with a low-rank adapter of the real model's keys and values, of `rank` random directions a layer.
void write_adapter(const std::string& path, const llama_model* model, int rank);

}  // namespace thimble::test
