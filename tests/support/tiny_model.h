// Makes models of a few layers with random weights from metadata, for all kinds of caches that architectures have.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "gguf.h"
#include "llama.h"

namespace thimble::test {

using Metadata = std::map<std::string, std::variant<uint32_t, float, std::vector<uint32_t>>>;

struct TinyModel {
  std::string architecture;
  Metadata metadata;  // keys without the architecture's prefix; keys that are missing are those of base_metadata
  // Where queries and keys are normalized: the weights make two numbers of every key far greater than all others, and
  // those of queries so much smaller.
  bool great_keys = false;
};

constexpr int kTinyVocabulary = 128;

/// Two layers of four heads of 64.
Metadata base_metadata();

/// Like Gemma 4: a layer with a sliding window of 64 tokens and heads of 256, and one that sees everything, with heads
/// of 512.
TinyModel gemma4_like();
/// Like DeepSeek 2 Lite: latent rows of 512 and 64 numbers, 16 heads.
TinyModel mla_like();

/// The model's metadata. `tokenizer`: a GGUF file whose tokenizer it gets; empty: none.
std::shared_ptr<gguf_context> gguf_of(const TinyModel& tiny, const std::string& tokenizer);

/// Throws where llama.cpp refuses the model. `tokenizer`: as above.
std::shared_ptr<llama_model> make_model(const TinyModel& tiny, const llama_model_params& params,
                                        const std::string& tokenizer = {});

/// A file with a low-rank adapter of the real model's keys and values, of `rank` random directions a layer.
void write_adapter(const std::string& path, const llama_model* model, int rank);

}  // namespace thimble::test
