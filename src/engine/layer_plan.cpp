#include "engine/layer_plan.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "cache/state_row.h"
#include "engine/engine.h"

namespace thimble {
namespace {

// The head size where nothing tells it. Each head has a scale, so the memory of codes depends (a little) on it.
constexpr int kAssumedHeadDim = 64;

// The cache of a sliding window has as many cells as the window and a batch. With this limit the size of a batch, up to
// 2048 tokens, does not decide whether it is left f16: sliding windows of 512 and 1024 cells are, those of 4096 are
// not.
constexpr int64_t kLongWindow = 4096;

// A cache that would take a larger share of f16's memory than this is left f16, as coding would save too little.
constexpr double kWorthCoding = 0.75;

// Of a side's memory, where two lie in one tensor's.
constexpr size_t kSideAlignment = 256;

std::string name_of(int layer) {
  return "layer " + std::to_string(layer) + ": ";
}

}  // namespace

int piece_of_row(int64_t width) {
  return std::clamp(width % kAssumedHeadDim == 0 ? kAssumedHeadDim : int(width & -width), 2, kMaxHeadDim);
}

CachePlanner::CachePlanner(const Engine& engine, const Settings& settings)
    : engine_(engine), settings_(settings), source_(std::make_shared<const CodecSource>(settings)) {
  if (const std::string why = engine.refusal(settings); !why.empty()) throw std::runtime_error(why);
}

std::string CachePlanner::why_f16(const LayerGeometry& geometry) const {
  if (settings_.calibrates()) return "calibrate=";
  if (engine_.leaves_f16(settings_)) return "bits=16";
  if (settings_.small_cells == 0) return {};
  const int64_t cells = geometry.cells_per_stream;
  if (geometry.is_window && cells <= kLongWindow) {
    return "sliding windows of at most " + std::to_string(kLongWindow) + " cells";
  }
  if (cells * geometry.n_streams <= settings_.small_cells) {
    return "caches of at most small=" + std::to_string(settings_.small_cells) + " cells";
  }
  if (settings_.passthrough()) return {};
  // The share of f16's memory that codes and the exact rows of one sequence would take.
  const double exact_rows = std::min<int64_t>(cells, settings_.window.slots());
  const double share = (settings_.key_bits + settings_.value_bits) / 32 + exact_rows / double(cells);
  if (share > kWorthCoding) {
    return "of " + std::to_string(cells) + " cells a stream so many are exact that coding the others saves little";
  }
  return {};
}

LayerPlan CachePlanner::plan(const LayerGeometry& geometry) const {
  LayerPlan plan;
  plan.layer = geometry.layer;
  plan.shape = {geometry.n_kv_heads, geometry.cells_per_stream, geometry.n_streams};
  plan.f16_bytes = size_t(geometry.width[0] + geometry.width[1]) * sizeof(uint16_t) * size_t(plan.shape.n_cells());
  plan.why_f16 = why_f16(geometry);
  if (!plan.why_f16.empty()) return plan;
  plan.coded = true;
  plan.as_f16 = geometry.as_f16;
  plan.heads = {geometry.first_head, geometry.n_kv_heads,
                geometry.heads_of_layer > 0 ? geometry.heads_of_layer : geometry.n_kv_heads};
  plan.group = geometry.group;
  std::copy(std::begin(geometry.rotated), std::end(geometry.rotated), plan.rotated);
  plan.window = settings_.passthrough() || plan.as_f16 ? WindowSize{0, 0, 0} : settings_.window;
  plan.top = source_->retrieves(geometry.layer) && !plan.as_f16 ? settings_.top : 0;
  plan.drop_tail = settings_.drop_tail;
  plan.has_codes[int(Kind::value)] = plan.top == 0 || !plan.drop_tail;
  if (geometry.latent > 0 && !plan.as_f16) {
    plan_latent(geometry, plan);
    return plan;
  }
  for (Kind kind : {Kind::key, Kind::value}) {
    const int64_t width = geometry.width[int(kind)];
    if (width == 0) continue;
    const int assumed = source_->head_dim(geometry.layer, kind).value_or(piece_of_row(width));
    const int dim = geometry.head_dim[int(kind)] == 0 ? assumed : geometry.head_dim[int(kind)];
    // Where n_kv_heads is not known, keys and values may get different assumed numbers.
    const auto side_of = [&](int head_dim, int n_kv_heads) {
      LayerPlan side = plan;
      side.shape.n_kv_heads = n_kv_heads;
      side.format[int(kind)] =
          plan.as_f16 ? make_format(head_dim, 16) : source_->format(geometry.layer, kind, head_dim);
      return side;
    };
    const LayerPlan side = side_of(dim, geometry.n_kv_heads == 0 ? int(width / dim) : geometry.n_kv_heads);
    plan.format[int(kind)] = side.format[int(kind)];
    if (geometry.n_kv_heads > 0 && !state_row_fits(side.side(kind))) {
      throw std::runtime_error(name_of(geometry.layer) + "heads of size " + std::to_string(dim) +
                               " are too small to code; use bits=16 or run without the THIMBLE device");
    }
    plan.bytes[int(kind)] = engine_.side_bytes(side, kind);
    // llama.cpp allocated the memory before the head size was known.
    if (dim != assumed) {
      const size_t reserved = engine_.side_bytes(side_of(assumed, int(width / assumed)), kind);
      plan.bytes[int(kind)] = std::max(plan.bytes[int(kind)], reserved);
    }
    plan.more_bytes += engine_.more_bytes(side, kind);
  }
  if (plan.top > 0) plan.store_bytes = plan.f16_bytes;
  plan.as_rows = geometry.n_kv_heads > 0 && !engine_.attends(plan);
  plan.why_slow = engine_.why_slow(plan);
  if (geometry.n_kv_heads == 0) return plan;
  if (source_->stretches_keys() && !plan.as_f16) {
    plan.key_stretches =
        key_stretches(geometry.query_norm, geometry.key_norm, geometry.n_kv_heads, plan.side(Kind::key).head_dim);
    plan.norms_unread = geometry.norms_unread && plan.key_stretches.empty();
  }
  for (int head = 0; head < geometry.n_kv_heads; head++) {
    plan.hashes.push_back(source_->hash(plan.heads.first + head,
                                        plan.key_stretches.empty() ? std::vector<float>() : plan.key_stretches[head]));
  }
  if (plan.keys_alone()) plan.has_codes[int(Kind::value)] = false;
  if (const std::string why = engine_.refusal(plan); !why.empty()) throw std::runtime_error(name_of(plan.layer) + why);
  return plan;
}

// A row is coded in two parts, both in the memory that was reserved for it in pieces.
void CachePlanner::plan_latent(const LayerGeometry& geometry, LayerPlan& plan) const {
  const int64_t width = geometry.width[int(Kind::key)];
  const int piece = piece_of_row(width), n_pieces = int(width / piece);
  LayerPlan pieces = plan;
  pieces.shape.n_kv_heads = n_pieces;
  pieces.format[int(Kind::key)] = source_->format(geometry.layer, Kind::key, piece);
  const size_t reserved = engine_.side_bytes(pieces, Kind::key);
  plan.latent = geometry.latent;
  plan.shape.n_kv_heads = 1;
  plan.has_codes[int(Kind::value)] = true;  // scores need them
  const Format& latent = plan.format[int(Kind::value)] = make_format(plan.latent, settings_.key_bits);
  plan.format[int(Kind::key)] =
      make_position_format(int(width) - plan.latent, latent, n_pieces * size_t(pieces.side(Kind::key).vector_bytes()));
  for (Kind kind : {Kind::key, Kind::value}) {
    if (!state_row_fits(plan.side(kind))) {
      throw std::runtime_error(name_of(plan.layer) +
                               "the parts of its rows are too small to code; use bits=16 or run without the THIMBLE "
                               "device");
    }
    plan.bytes[int(kind)] = engine_.side_bytes(plan, kind);
    plan.more_bytes += engine_.more_bytes(plan, kind);
  }
  // Both lie one behind the other.
  plan.bytes[0] = (plan.bytes[0] + kSideAlignment - 1) / kSideAlignment * kSideAlignment;
  if (plan.bytes[0] + plan.bytes[1] < reserved) plan.bytes[1] = reserved - plan.bytes[0];
  if (plan.top > 0) plan.store_bytes = plan.f16_bytes;
  plan.as_rows = !engine_.attends(plan);
  plan.why_slow = engine_.why_slow(plan);
  plan.hashes = {source_->hash(0, {float(plan.latent)})};  // rows that are cut elsewhere have other codes
  if (const std::string why = engine_.refusal(plan); !why.empty()) throw std::runtime_error(name_of(plan.layer) + why);
}

int64_t CachePlanner::row_of_profile(int layer, Kind kind) const {
  const int64_t heads = source_->n_kv_heads(layer).value_or(0);
  return heads * source_->head_dim(layer, kind).value_or(0);
}

LayerCodecs CachePlanner::codecs(const LayerPlan& plan) const {
  LayerCodecs codecs;
  for (Kind kind : {Kind::key, Kind::value}) {
    const Format& format = plan.side(kind);
    if (plan.as_f16 || plan.latent > 0 || format.head_dim == 0) {
      HeadCodec codec;
      codec.kind = kind;
      if (format.head_dim > 0) codec = make_uncalibrated_codec(kind, format);
      codecs.sides[int(kind)] = std::make_shared<const std::vector<HeadCodec>>(plan.shape.n_kv_heads, codec);
      continue;
    }
    auto known = source_->codecs(plan.layer, kind, format.head_dim, plan.heads,
                                 kind == Kind::key ? plan.key_stretches : std::vector<std::vector<float>>());
    if (const int block = plan.rotated[int(kind)]; block > 0 && !format.f16) {
      auto rotated = std::make_shared<std::vector<HeadCodec>>(*known);
      for (HeadCodec& codec : *rotated) codec.transform = codec.transform.behind_hadamard(block);
      known = std::move(rotated);
    }
    codecs.sides[int(kind)] = std::move(known);
  }
  return codecs;
}

std::string mebibytes(size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f MiB", double(bytes) / (1 << 20));
  return text;
}

void PlanTotals::add(const LayerPlan& plan) {
  layers.insert(plan.layer);
  if (!plan.coded || plan.as_f16) {
    if (n_f16++ == 0) why_f16 = plan.as_f16 ? "they choose which cells are attended to" : plan.why_f16;
    f16_bytes += plan.f16_bytes;
    return;
  }
  n_coded++;
  if (!plan.why_slow.empty() && n_slow++ == 0) why_slow = plan.why_slow;
  n_retrieving += plan.top > 0;
  n_norms_unread += plan.norms_unread;
  coded_bytes += plan.bytes[0] + plan.bytes[1];
  coded_f16_bytes += plan.f16_bytes;
  more_bytes += plan.more_bytes;
  store_bytes += plan.store_bytes;
}

}  // namespace thimble
