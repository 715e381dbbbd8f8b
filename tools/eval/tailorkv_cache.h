// TailorKV as published (arXiv 2505.19586), emulated, to be compared with. The layers that the profile calls
// quantization-friendly are coded with one bit: the keys of 64 cells channel by channel, values cell by cell in groups
// of 64 numbers, each number the nearer of its group's least and greatest. The others stay exact: a decoded token
// attends to the window and to the `top` cells of greatest estimated score, where scores are estimated from a quarter
// of the channels, those of greatest |q| max|k|; all else is dropped. Prompts are read exactly.
//
// What the paper leaves to an implementation, and we chose: the share of channels, and that a KV head's channels and
// cells are chosen for its query heads together (the greatest estimate of the group counts), as ours are. The sketch
// keeps f16, which is to its advantage.
#pragma once

#include <map>
#include <vector>

#include "eval/emulated_cache.h"
#include "profile/profile.h"

namespace thimble {

class TailorKvCache : public EmulatedCache {
public:
  /// The profile, which tells the layers' classes, must outlive the cache.
  TailorKvCache(const Profile& profile, int first, int last, int top)
      : profile_(profile), first_(first), last_(last), top_(top) {}

  void clear() override { sides_.clear(); }

private:
  struct Side {
    int coded = 0;                // cells below are coded
    int n_cells = 0;              // written
    int n_written = 0;            // by the last batch
    std::vector<float> greatest;  // of keys: max |k| of every channel of a row
  };

  void stored(const ggml_tensor* cache, int layer, Kind kind, int first_written, int n_written) override;
  void attended(ggml_tensor* attention, int layer) override;
  bool attends(int layer) const override { return !profile_.quantization_friendly(layer); }
  /// The cells outside the window that a KV head attends to; `queries` [group][key_dim], the head's keys by cell.
  std::vector<int> retrieve(const std::vector<const float*>& queries, const char* keys, size_t stride,
                            const float* greatest, int dim, int end) const;

  const Profile& profile_;
  int first_, last_, top_;
  std::map<std::pair<int, Kind>, Side> sides_;
};

}  // namespace thimble
