// Reads the scripts of tests/data/window_vectors.txt, which every implementation of the window is held to.
// window_vectors.py makes them and says what a line means.
#pragma once

#include <cstdint>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cache/window.h"

namespace thimble {

struct WindowScript {
  struct Token {
    int64_t cell = 0;
    int sequence = 0, importance = 0;
  };
  struct Step {
    enum { write, arrive, remove } what = write;
    std::vector<Token> tokens;             // of a batch, or rows that arrive
    std::vector<int64_t> exact;            // cells that are exact while the batch is attended to, ascending
    int sequence = 0, first = 0, end = 0;  // positions that are removed
  };
  std::string name;
  WindowSize size;
  int slots = 0;  // of a stream
  int64_t cells_per_stream = 0;
  int n_streams = 1;
  std::vector<Step> steps;
};

/// Which sequence and position each cell belongs to, which llama.cpp knows and shows in masks.
class WindowOwners {
public:
  /// The cells that a step writes, or whose rows arrive in it; none where the step removes.
  std::vector<int64_t> take(const WindowScript::Step& step) {
    std::vector<int64_t> cells;
    if (step.what == WindowScript::Step::remove) remove(step);
    for (const WindowScript::Token& token : step.tokens) {
      write(token);
      cells.push_back(token.cell);
    }
    return cells;
  }
  bool sees(int64_t token, int64_t cell) const {
    const auto it = owner_.find(cell);
    const auto [sequence, position] = owner_.at(token);
    return it != owner_.end() && it->second.first == sequence && it->second.second <= position;
  }
  int importance(int64_t cell) const { return importance_.at(cell); }

private:
  void write(const WindowScript::Token& token) {
    owner_[token.cell] = {token.sequence, length_[token.sequence]++};
    importance_[token.cell] = token.importance;
  }
  void remove(const WindowScript::Step& step) {
    std::erase_if(owner_, [&](const auto& entry) {
      const auto [sequence, position] = entry.second;
      return sequence == step.sequence && position >= step.first && position < step.end;
    });
    int& length = length_[step.sequence];
    if (step.end >= length) length = std::min(step.first, length);
  }

  std::map<int64_t, std::pair<int, int>> owner_;  // sequence, position
  std::map<int64_t, int> importance_;
  std::map<int, int> length_;
};

inline std::vector<WindowScript> read_window_scripts(const std::string& path) {
  std::vector<WindowScript> scripts;
  std::ifstream file(path);
  for (std::string text; std::getline(file, text);) {
    std::istringstream line(text);
    std::string word;
    line >> word;
    if (word == "case") {
      WindowScript& s = scripts.emplace_back();
      line >> s.name >> s.size.last >> s.size.pool >> s.size.spare >> s.slots >> s.cells_per_stream >> s.n_streams;
      continue;
    }
    std::vector<WindowScript::Step>& steps = scripts.back().steps;
    if (word == "exact") {
      for (int64_t cell; line >> cell;) steps.back().exact.push_back(cell);
      continue;
    }
    WindowScript::Step& step = steps.emplace_back();
    step.what = word == "write"    ? WindowScript::Step::write
                : word == "arrive" ? WindowScript::Step::arrive
                                   : WindowScript::Step::remove;
    if (word == "remove") {
      line >> step.sequence >> step.first >> step.end;
      continue;
    }
    char colon;
    for (WindowScript::Token t; line >> t.cell >> colon >> t.sequence >> colon >> t.importance;)
      step.tokens.push_back(t);
  }
  return scripts;
}

}  // namespace thimble
