#include <string>

#include "api/args.h"
#include "api/handles.h"

namespace thimble::api {
namespace {

constexpr int kMaxHeads = 1024;  // as in a profile

using Heads = std::vector<HeadCodec>;

Kind kind_of(const thimble_codec_args& args) {
  require(args.kind == THIMBLE_KEY || args.kind == THIMBLE_VALUE,
          "thimble_codec_args.kind must be THIMBLE_KEY or THIMBLE_VALUE");
  return args.kind == THIMBLE_KEY ? Kind::key : Kind::value;
}

Heads uncalibrated(const thimble_codec_args& args) {
  require(args.n_heads > 0 && args.n_heads <= kMaxHeads, "thimble_codec_args.n_heads must be between 1 and 1024");
  return Heads(args.n_heads, make_uncalibrated_codec(kind_of(args), make_format(args.head_dim, args.bits)));
}

// Fills in from the profile what the caller left 0, and checks the rest against it.
thimble_codec_args completed(thimble_codec_args args) {
  const std::vector<LayerShape>& layers = args.profile->profile.shape.layers;
  require(args.layer >= 0 && size_t(args.layer) < layers.size(), [&] {
    return "thimble_codec_args.layer is " + std::to_string(args.layer) + ", the profile has layers 0 to " +
           std::to_string(layers.size() - 1);
  });
  const LayerShape& shape = layers[args.layer];
  const std::string layer = "layer " + std::to_string(args.layer);
  require(shape.n_kv_heads > 0,
          [&] { return "the profile holds nothing for " + layer + ": it keeps no keys and values"; });
  require(args.first_head >= 0 && args.first_head < shape.n_kv_heads && args.n_heads >= 0 &&
              args.n_heads <= shape.n_kv_heads - args.first_head,
          [&] {
            return "thimble_codec_args.first_head and n_heads reach beyond the " + std::to_string(shape.n_kv_heads) +
                   " KV heads of " + layer;
          });
  if (args.n_heads == 0) args.n_heads = shape.n_kv_heads - args.first_head;
  const int dim = shape.dim(kind_of(args));
  require(args.head_dim == 0 || args.head_dim == dim, [&] {
    return "thimble_codec_args.head_dim is " + std::to_string(args.head_dim) + ", the profile was made for " +
           std::to_string(dim) + ": leave it 0, or use the profile of this model";
  });
  args.head_dim = dim;
  return args;
}

Heads calibrated(const thimble_codec_args& args) {
  Heads heads;
  try {
    for (int head = args.first_head; head < args.first_head + args.n_heads; head++) {
      heads.push_back(args.profile->profile.codec(args.layer, head, kind_of(args), args.bits));
    }
  } catch (const std::runtime_error& e) {
    throw Failure(THIMBLE_BAD_PROFILE, e.what());
  }
  return heads;
}

Heads heads_of(const thimble_codec_args& args) {
  if (!args.profile) {
    require(args.layer == 0 && args.first_head == 0,
            "thimble_codec_args.layer and first_head are of a profile: without one, "
            "leave them 0");
    return uncalibrated(args);
  }
  const thimble_codec_args all = completed(args);
  return all.bits == 16 ? uncalibrated(all) : calibrated(all);
}

}  // namespace
}  // namespace thimble::api

using namespace thimble::api;

thimble_status thimble_codec_create(const thimble_codec_args* args, thimble_codec** codec) {
  return guarded([&] {
    require(codec != nullptr, "the place for the codec is null");
    *codec = nullptr;
    auto heads = heads_of(take_args(args, "thimble_codec_args"));
    *codec = new thimble_codec{std::make_shared<const Heads>(std::move(heads))};
  });
}

void thimble_codec_free(thimble_codec* codec) {
  delete codec;
}

thimble_status thimble_codec_get_info(const thimble_codec* codec, thimble_codec_info* info) {
  return guarded([&] {
    require(codec != nullptr, "the codec is null: make one with thimble_codec_create");
    const thimble::Format& format = codec->format();
    const int32_t kind = codec->kind() == thimble::Kind::key ? THIMBLE_KEY : THIMBLE_VALUE;
    give_info({0, format.block_bytes(), format.bits(), kind, codec->n_heads(), format.head_dim}, info,
              "thimble_codec_info");
  });
}

size_t thimble_codec_block_bytes(const thimble_codec* codec) {
  return codec ? codec->format().block_bytes() : 0;
}
