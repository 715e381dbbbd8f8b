// Conversations about calls of tools, generated from a seed: definitions of many functions, calls and their results,
// all as JSON, and then a request whose call must have the right function and values that one of the results has. As in
// Hermes' format, definitions stand between <tools> tags of the system's message, a call between <tool_call> tags, and
// a result between <tool_response> tags.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "eval/sample.h"

namespace thimble {

struct Message {
  std::string role;  // system, user, assistant
  std::string content;
};
/// A conversation as a model's chat template writes it, up to where the assistant's next message begins.
using Render = std::function<std::string(const std::vector<Message>&)>;

struct ToolCall {
  /// The conversation as text, and one question: what the assistant's message begins with, the function and its values.
  Sample sample;
  nlohmann::json right;  // {"name": ..., "arguments": {...}}
};

/// A conversation of at most `n_tokens` tokens, the call included, of which definitions take about half. Throws
/// std::runtime_error where it has no room.
ToolCall make_tool_call(int n_tokens, uint64_t seed, const TokenCount& count, const Render& render);

/// How far a text that a model wrote is the call that was asked for.
struct CallCheck {
  bool parses = false;  // its first object is JSON
  bool names = false;   // and has the right function and the right names of arguments
  bool right = false;   // and their values
};
CallCheck check_call(const std::string& text, const nlohmann::json& right);

/// The first JSON object that a text has, up to its closing brace; empty where there is none or it does not end.
std::string first_object(const std::string& text);

}  // namespace thimble
