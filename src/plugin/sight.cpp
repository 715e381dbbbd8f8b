#include "plugin/sight.h"

namespace thimble {

bool sees_refused_cell(const ggml_tensor* node, const void* mask_data, const ManagedLayer& layer) {
  const Sight sight(node, mask_data);
  for (const auto& cells : layer.refused) {
    for (const auto& [cell, bytes] : cells) {
      for (int64_t row = 0; row < node->src[0]->ne[1] * node->src[0]->ne[3]; row++) {
        if (sight.sees(row, cell)) return true;
      }
    }
  }
  return false;
}

std::string refused_cell_seen(const ManagedLayer& layer) {
  return "layer " + std::to_string(layer.index) +
         " cannot be attended to: its cells hold a state of other cache settings, or one that its exact store had no "
         "room for";
}

}  // namespace thimble
