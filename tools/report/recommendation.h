// Which cache to take: the smallest one that is as good as f16, within bounds.
#pragma once

#include <string>
#include <vector>

#include "report/results.h"

namespace thimble {

struct Bounds {
  double kld = 0.05;    // greatest mean KL divergence from f16, in nats; of generate's last quarter, too
  double score = 0.95;  // least score of a task, over f16's
  double growth = 1.2;  // of KLD from the first to the last quarter of what is written; more of it is pointed out
  double margin = 0.1;  // f16's score above chance from which on a task tells caches apart
};

/// What speaks against a cache, in words.
struct Judgement {
  std::string cache;
  std::vector<std::string> against;  // empty: it is within the bounds
  std::vector<std::string> remarks;  // what does not count against it, but should be known
  int n_measured = 0;                // results of quality that have the cache
};

struct Recommendation {
  std::vector<Judgement> judged;      // all caches but f16
  std::string smallest;               // of those within the bounds, counting all memory; f16 where there is none
  std::string smallest_beside_store;  // the same without exact stores, which may lie in slower memory or a file
  std::vector<std::string> words;     // sentences that say what to take and why
};

/// Caches of published methods, which are emulated, are not recommended; nor are those that a task did not measure.
Recommendation recommend(const Results& results, const Bounds& bounds);

}  // namespace thimble
