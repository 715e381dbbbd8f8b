// Where graphs are cut for an engine with a queue. Runs no graph: the cache is in RAM.
#include "plugin/cuts.h"

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>

namespace thimble {
namespace {

constexpr int kDim = 64, kHeads = 2, kCells = 256;

struct FreeContext {
  void operator()(ggml_context* context) const { ggml_free(context); }
};
using Context = std::unique_ptr<ggml_context, FreeContext>;

// Layers as llama.cpp builds them: keys, values, writes, attention, and nodes of the inner backend between.
class CutsTest : public ::testing::Test {
protected:
  CutsTest() : cache_(make_context(true)), context_(make_context(false)) {
    setenv("THIMBLE_KV", "bits=4,small=0", 1);
    for (int layer = 0; layer < 2; layer++) {
      for (char kind : {'k', 'v'}) {
        ggml_tensor* tensor = ggml_new_tensor_2d(cache_.get(), GGML_TYPE_F16, kDim * kHeads, kCells);
        ggml_set_name(tensor, ("cache_" + std::string(1, kind) + "_l" + std::to_string(layer)).c_str());
      }
    }
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    device_.emplace(nullptr, cpu, "THIMBLE0");
    buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(cache_.get(), device_->buffer_type()));
    graph_ = ggml_new_graph(context_.get());
    input_ = ggml_new_tensor_2d(context_.get(), GGML_TYPE_F32, kDim * kHeads, 1);
    cells_ = ggml_new_tensor_1d(context_.get(), GGML_TYPE_I64, 1);
  }

  static Context make_context(bool no_alloc) {
    return Context(ggml_init({ggml_tensor_overhead() * 64 + (1 << 20), nullptr, no_alloc}));
  }

  ggml_tensor* cache(char kind, int layer) {
    return ggml_get_tensor(cache_.get(), ("cache_" + std::string(1, kind) + "_l" + std::to_string(layer)).c_str());
  }
  ggml_tensor* add(ggml_tensor* node) {
    ggml_build_forward_expand(graph_, node);
    return node;
  }
  ggml_tensor* write(char kind, int layer, ggml_tensor* rows) {
    return add(ggml_set_rows(context_.get(), cache(kind, layer), rows, cells_));
  }
  ggml_tensor* attend(int layer, ggml_tensor* queries) {
    ggml_context* c = context_.get();
    ggml_tensor* q = ggml_reshape_4d(c, queries, kDim, 1, kHeads, 1);
    const auto view = [&](char kind) {
      ggml_tensor* t = cache(kind, layer);
      return ggml_view_4d(c, t, kDim, kCells, kHeads, 1, t->nb[1], kDim * sizeof(uint16_t), t->nb[2], 0);
    };
    return add(ggml_flash_attn_ext(c, q, view('k'), view('v'), nullptr, 1, 0, 0));
  }

  struct FreeBuffer {
    void operator()(ggml_backend_buffer_t buffer) const { ggml_backend_buffer_free(buffer); }
  };
  Context cache_, context_;
  std::optional<Device> device_;
  std::unique_ptr<ggml_backend_buffer, FreeBuffer> buffer_;
  ggml_cgraph* graph_;
  ggml_tensor *input_, *cells_;
};

TEST_F(CutsTest, OneCutALayer) {
  ggml_tensor* x = input_;
  for (int layer = 0; layer < 2; layer++) {
    ggml_tensor* keys = add(ggml_scale(context_.get(), x, 2));
    ggml_tensor* values = add(ggml_scale(context_.get(), x, 3));
    write('k', layer, keys);
    write('v', layer, values);
    ggml_tensor* out = attend(layer, x);
    x = add(ggml_reshape_2d(context_.get(), out, kDim * kHeads, 1));
  }
  add(ggml_scale(context_.get(), x, 4));
  const std::vector<Step> steps = plan_cuts(graph_);
  ASSERT_EQ(steps.size(), 3u);
  for (int layer = 0; layer < 2; layer++) {
    const Cut& cut = steps[layer].cut;
    ASSERT_TRUE(cut.layer);
    EXPECT_EQ(cut.layer->index, layer);
    EXPECT_TRUE(cut.writes[0] && cut.writes[1] && cut.attend);
    EXPECT_EQ(cut.writes[int(Kind::key)]->view_src, cache('k', layer));
  }
  EXPECT_FALSE(steps[2].cut.layer);
  EXPECT_EQ(steps[2].inner.back()->op, GGML_OP_SCALE);
  size_t inner = 0;
  for (const Step& step : steps) {
    for (const ggml_tensor* node : step.inner) inner += !is_view_op(node->op);
  }
  EXPECT_EQ(inner, 5u);  // all scales, each once
}

// Where another node gets the memory of a waiting write's rows, the write must be cut before that node.
TEST_F(CutsTest, RowsThatAreOverwrittenAreWrittenBefore) {
  ggml_tensor* keys = add(ggml_scale(context_.get(), input_, 2));
  write('k', 0, keys);
  ggml_tensor* reuse = add(ggml_scale(context_.get(), input_, 5));
  reuse->data = keys->data;
  attend(0, reuse);
  const std::vector<Step> steps = plan_cuts(graph_);
  ASSERT_EQ(steps.size(), 2u);
  EXPECT_TRUE(steps[0].cut.writes[int(Kind::key)]);
  EXPECT_FALSE(steps[0].cut.attend);
  EXPECT_EQ(steps[1].inner.front(), reuse);
  EXPECT_TRUE(steps[1].cut.attend);
  EXPECT_FALSE(steps[1].cut.writes[int(Kind::key)]);
}

TEST_F(CutsTest, WritesWithoutAttentionEndTheGraph) {
  write('k', 0, input_);
  write('k', 0, input_);  // the same keys again: the first cannot wait for the second
  write('v', 1, input_);
  const std::vector<Step> steps = plan_cuts(graph_);
  ASSERT_EQ(steps.size(), 3u);
  for (const Step& step : steps) EXPECT_TRUE(step.cut.layer && !step.cut.attend);
}

// What reads rows is a cut behind the writes of its layer, which it may overwrite; the writes of others are cut before.
TEST_F(CutsTest, WhatReadsRowsIsACut) {
  ggml_tensor* keys = add(ggml_scale(context_.get(), input_, 2));
  write('k', 0, keys);
  write('v', 0, input_);
  ggml_tensor* other = add(ggml_scale(context_.get(), input_, 3));
  write('k', 1, other);
  ggml_tensor* read = add(ggml_cont(context_.get(), cache('k', 0)));
  read->data = keys->data;  // and more, up to the other layer's keys
  const std::vector<Step> steps = plan_cuts(graph_);
  ASSERT_EQ(steps.size(), 2u);
  EXPECT_EQ(steps[0].cut.layer->index, 1);
  EXPECT_FALSE(steps[0].cut.read);
  EXPECT_EQ(steps[1].cut.layer->index, 0);
  EXPECT_TRUE(steps[1].cut.writes[0] && steps[1].cut.writes[1]);
  EXPECT_EQ(steps[1].cut.read, read);
  EXPECT_TRUE(std::find(steps[1].inner.begin(), steps[1].inner.end(), read) == steps[1].inner.end());
}

TEST_F(CutsTest, RefusesWhatWritesOtherwise) {
  add(ggml_cpy(context_.get(), input_, ggml_view_1d(context_.get(), cache('k', 0), kDim * kHeads, 0)));
  EXPECT_THROW(plan_cuts(graph_), std::runtime_error);
}

}  // namespace
}  // namespace thimble
