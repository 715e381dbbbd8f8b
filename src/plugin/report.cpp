#include "plugin/report.h"

#include <algorithm>
#include <iterator>
#include <set>

namespace thimble {

// Where a device does not get all layers (-ngl), llama.cpp puts the last ones there. Layers with a cache lie at regular
// distances, so if the first of them here is farther from the model's beginning, others are on another device.
std::string layers_elsewhere(const std::set<int>& layers) {
  if (layers.size() < 2) return {};
  int distance = 0;
  for (auto at = std::next(layers.begin()); at != layers.end(); at++)
    distance = std::max(distance, *at - *std::prev(at));
  const int first = *layers.begin();
  if (first < distance) return {};
  return "the layers before layer " + std::to_string(first) +
         " are not on this device, and their cache is f16 there (-ngl 99 puts all layers here)";
}

std::string report(const PlanTotals& totals, const Settings& settings, const Engine& engine, bool is_far) {
  const std::string f16 = totals.n_f16 == 0 ? ""
                                            : std::to_string(totals.n_f16) + " layers stay f16, " +
                                                  mebibytes(totals.f16_bytes) + ": " + totals.why_f16;
  if (settings.calibrates() && is_far) {
    return "calibrate= collects nothing over RPC: run the model with it in a process of its own; " + f16;
  }
  if (settings.calibrates()) {
    return "calibrating: keys, values and queries of " + std::to_string(totals.n_f16) +
           " layers are read off an f16 cache of " + mebibytes(totals.f16_bytes) + ", and the profile is written to " +
           settings.calibrate.path + " when the context ends; " + settings.to_string();
  }
  if (totals.n_coded == 0) return "KV cache not coded: " + f16 + "; " + settings.to_string();
  std::string text = "KV cache of " + std::to_string(totals.n_coded) + " layers: " + mebibytes(totals.coded_bytes) +
                     ", " + mebibytes(totals.coded_f16_bytes) + " as f16";
  if (totals.more_bytes > 0) text += ", up to " + mebibytes(totals.more_bytes) + " more as sequences come to share it";
  if (!f16.empty()) text += "; " + f16;
  const std::string elsewhere = is_far ? "" : layers_elsewhere(totals.layers);  // other far ends have theirs
  if (!elsewhere.empty()) text += "; " + elsewhere;
  text += "; " + settings.to_string() + "; " + engine.kernels() + " kernels";
  if (totals.n_slow > 0) text += "; " + std::to_string(totals.n_slow) + " layers are slower: " + totals.why_slow;
  if (totals.n_norms_unread > 0) {
    text += "; the weights of the norms behind keys and queries cannot be read in " +
            std::to_string(totals.n_norms_unread) +
            " layers (they are not f32 in one piece), so their keys lose more at few bits: a profile mends it (thimble "
            "calibrate)";
  }
  if (totals.store_bytes > 0) {
    text += "; exact store of " + std::to_string(totals.n_retrieving) + " layers: up to " +
            mebibytes(totals.store_bytes) + " in " + engine.store_place(settings);
  }
  if (settings.profile.empty() && std::min(settings.key_bits, settings.value_bits) < 3) {
    text += "; no profile: so few bits cost quality without one (thimble calibrate)";
  }
  if (is_far) {
    return text +
           ". Over RPC llama.cpp reserves the size of an f16 cache and names it; only the codes take memory here.";
  }
  return text + ". llama.cpp's line on this cache names the type f16 and the size of the codes.";
}

}  // namespace thimble
