// Emulates TailorKV as published (arXiv 2505.19586), for comparison. The layers that the profile calls
// quantization-friendly are coded with one bit: keys in groups of 64 cells of one channel, values in groups of 64
// numbers of one cell; each number becomes the least or the greatest of its group, whichever is nearer. The other
// layers stay exact: a decoded token attends to the window and to the `top` cells of greatest estimated score. Scores
// are estimated from a quarter of the channels, those of greatest |q| max|k|; all other cells are dropped. Prompts are
// read exactly.
//
// Two choices are ours, as the paper leaves them open: the share of channels, and that a KV head's channels and cells
// are chosen for all query heads of its group together (the greatest estimate counts), as in Thimble. The sketch, the
// channels that are kept of each key, is f16, which favours TailorKV.
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
    int coded = 0;                // cells below this number are coded
    int n_cells = 0;              // cells that were written
    int n_written = 0;            // cells that the last batch wrote
    std::vector<float> greatest;  // for keys: max |k| of every channel of a row
  };

  void stored(const ggml_tensor* cache, int layer, Kind kind, int first_written, int n_written) override;
  void attended(ggml_tensor* attention, int layer) override;
  bool attends(int layer) const override { return !profile_.quantization_friendly(layer); }
  /// Chooses the cells outside the window that a KV head attends to. `queries` [group][key_dim]; the keys are the
  /// head's, by cell.
  std::vector<int> retrieve(const std::vector<const float*>& queries, const char* keys, size_t stride,
                            const float* greatest, int dim, int end) const;

  const Profile& profile_;
  int first_, last_, top_;
  std::map<std::pair<int, Kind>, Side> sides_;
};

}  // namespace thimble
