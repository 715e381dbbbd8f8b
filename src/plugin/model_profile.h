// Finds the profile beside the model, for profile=auto.
#pragma once

#include <string>
#include <vector>

namespace thimble {

/// The model that a program of llama.cpp was started with: -m or --model, or LLAMA_ARG_MODEL; else empty.
std::string model_of(const std::vector<std::string>& arguments);
std::vector<std::string> arguments_of_this_process();

/// The path of <model>.thimble.gguf beside a model or, where the model is a link, beside its target, and so on; empty
/// where there is none.
std::string profile_beside_model(const std::string& model);

}  // namespace thimble
