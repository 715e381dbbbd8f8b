#include "cell_copies.h"

#include <cstring>
#include <stdexcept>

namespace thimble {
namespace {

// A sequence's state begins with a mark, the sequence, the number of streams and that of the cells; then each cell has
// its position, the number of its sequences (1) and the sequence.
constexpr size_t kHeader = 4 * sizeof(uint32_t), kCell = 3 * sizeof(uint32_t);

void move(std::vector<uint8_t>& state, int n_cells, int distance) {
  if (state.size() < kHeader + size_t(n_cells) * kCell) throw std::runtime_error("the sequence has no such state");
  for (int i = 0; i < n_cells; i++) {
    int32_t position;
    uint8_t* at = &state[kHeader + size_t(i) * kCell];
    std::memcpy(&position, at, sizeof(position));
    position += distance;
    std::memcpy(at, &position, sizeof(position));
  }
}

}  // namespace

void fill_with_copies(llama_context* context, int n, int n_cells) {
  constexpr llama_seq_id kAll = 0, kCopy = 1;
  llama_memory_t memory = llama_get_memory(context);
  std::vector<uint8_t> state(llama_state_seq_get_size(context, kAll));
  if (llama_state_seq_get_data(context, state.data(), state.size(), kAll) != state.size()) {
    throw std::runtime_error("the cells of " + std::to_string(n) + " tokens cannot be saved");
  }
  for (int at = n; at + n <= n_cells; at += n) {
    move(state, n, n);
    if (llama_state_seq_set_data(context, state.data(), state.size(), kCopy) == 0) {
      throw std::runtime_error("no copies of cells fit into the cache at " + std::to_string(at));
    }
    if (llama_memory_seq_pos_min(memory, kCopy) != at || llama_memory_seq_pos_max(memory, kCopy) != at + n - 1) {
      throw std::runtime_error("this libllama has states of another form, whose cells cannot be copied");
    }
    llama_memory_seq_cp(memory, kCopy, kAll, -1, -1);
    llama_memory_seq_rm(memory, kCopy, -1, -1);
  }
}

}  // namespace thimble
