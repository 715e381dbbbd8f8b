// profile=auto: the profile beside the model.
#pragma once

#include <string>
#include <vector>

namespace thimble {

/// The model that a program of llama.cpp was started with: -m or --model, or LLAMA_ARG_MODEL; else empty.
std::string model_of(const std::vector<std::string>& arguments);
std::vector<std::string> arguments_of_this_process();

/// <model>.thimble.gguf beside a model, or beside what its link leads to, and so on; else empty.
std::string profile_beside_model(const std::string& model);

}  // namespace thimble
