#include "plugin/self_check.h"

#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>

#include "plugin/ggml_api.h"

namespace thimble {
namespace {

void expect(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

// ---- structs that the host makes: tensors and graphs, read with the offsets of our headers

// A ggml context in memory of ours, so that the addresses of its objects are known.
class Context {
public:
  Context() : context_(ggml_init({memory_.size(), memory_.data(), /*no_alloc=*/true}), ggml_free) {
    expect(context_ != nullptr, "ggml_init");
  }
  ggml_context* get() const { return context_.get(); }
  const char* memory() const { return memory_.data(); }

private:
  alignas(64) std::array<char, 1 << 16> memory_;
  std::unique_ptr<ggml_context, void (*)(ggml_context*)> context_;
};

void check_tensor() {
  const Context context;
  ggml_tensor* t = ggml_new_tensor_4d(context.get(), GGML_TYPE_F16, 8, 3, 5, 7);
  const size_t header = reinterpret_cast<const char*>(t) - context.memory();
  expect(ggml_tensor_overhead() == header + sizeof(ggml_tensor), "the size of ggml_tensor");
  expect(t->type == GGML_TYPE_F16 && t->op == GGML_OP_NONE, "ggml_tensor's type or op");
  const int64_t ne[] = {8, 3, 5, 7};
  const size_t nb[] = {2, 16, 48, 240};
  expect(std::memcmp(t->ne, ne, sizeof(ne)) == 0, "ggml_tensor's ne");
  expect(std::memcmp(t->nb, nb, sizeof(nb)) == 0, "ggml_tensor's nb");
  ggml_set_name(t, "cache_k_l0");
  expect(std::strcmp(t->name, "cache_k_l0") == 0, "ggml_tensor's name");
  ggml_set_output(t);
  expect(t->flags == GGML_TENSOR_FLAG_OUTPUT, "ggml_tensor's flags");
  char data = 0;
  t->data = &data;
  expect(ggml_get_data(t) == &data, "ggml_tensor's data");
  const ggml_tensor* view = ggml_view_1d(context.get(), t, 4, 6);
  expect(view->view_src == t && view->view_offs == 6, "ggml_tensor's view_src or view_offs");
}

void check_types() {
  for (const auto& [type, name] :
       {std::pair{GGML_TYPE_F32, "f32"}, {GGML_TYPE_F16, "f16"}, {GGML_TYPE_I32, "i32"}, {GGML_TYPE_I64, "i64"}}) {
    expect(std::strcmp(ggml_type_name(type), name) == 0, "the numbers of types");
  }
}

void do_nothing(ggml_tensor*, int, int, void*) {}

ggml_tensor* make_custom(ggml_context* context) {
  return ggml_custom_4d(context, GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, do_nothing, GGML_N_TASKS_MAX, context);
}

void check_ops() {
  const Context context;
  ggml_context* c = context.get();
  ggml_tensor* q = ggml_new_tensor_4d(c, GGML_TYPE_F32, 64, 2, 4, 1);
  ggml_tensor* k = ggml_new_tensor_4d(c, GGML_TYPE_F16, 64, 32, 2, 1);
  ggml_tensor* v = ggml_new_tensor_4d(c, GGML_TYPE_F16, 64, 32, 2, 1);
  ggml_tensor* mask = ggml_new_tensor_4d(c, GGML_TYPE_F16, 32, 2, 1, 1);
  ggml_tensor* rows = ggml_new_tensor_2d(c, GGML_TYPE_F32, 64, 2);
  ggml_tensor* cache = ggml_new_tensor_2d(c, GGML_TYPE_F16, 64, 32);
  ggml_tensor* index = ggml_new_tensor_1d(c, GGML_TYPE_I64, 2);
  ggml_tensor* positions = ggml_new_tensor_1d(c, GGML_TYPE_I32, 4);
  ggml_tensor* picked = ggml_new_tensor_1d(c, GGML_TYPE_I32, 2);
  ggml_tensor* attend = ggml_flash_attn_ext(c, q, k, v, mask, 1.5F, 2.5F, 3.5F);
  ggml_tensor* write = ggml_set_rows(c, cache, rows, index);
  ggml_tensor* rotate = ggml_rope_ext(c, q, positions, nullptr, 64, 0, 0, 1e4F, 1, 0, 1, 32, 1);
  ggml_tensor* custom = make_custom(c);
  const struct {
    const ggml_tensor* node;
    ggml_op op;
    const char* name;
  } ops[] = {
      {attend, GGML_OP_FLASH_ATTN_EXT, "FLASH_ATTN_EXT"},
      {write, GGML_OP_SET_ROWS, "SET_ROWS"},
      {rotate, GGML_OP_ROPE, "ROPE"},
      {custom, custom_op(), "CUSTOM"},
      {ggml_view_1d(c, q, 4, 0), GGML_OP_VIEW, "VIEW"},
      {ggml_reshape_2d(c, q, 128, 4), GGML_OP_RESHAPE, "RESHAPE"},
      {ggml_permute(c, q, 0, 2, 1, 3), GGML_OP_PERMUTE, "PERMUTE"},
      {ggml_transpose(c, rows), GGML_OP_TRANSPOSE, "TRANSPOSE"},
      {ggml_mul_mat(c, cache, rows), GGML_OP_MUL_MAT, "MUL_MAT"},
      {ggml_soft_max(c, rows), GGML_OP_SOFT_MAX, "SOFT_MAX"},
      {ggml_cont(c, rows), GGML_OP_CONT, "CONT"},
      {ggml_rms_norm(c, rows, 1e-5F), GGML_OP_RMS_NORM, "RMS_NORM"},
      {ggml_mul(c, rows, rows), GGML_OP_MUL, "MUL"},
      {ggml_get_rows(c, rows, picked), GGML_OP_GET_ROWS, "GET_ROWS"},
  };
  for (const auto& [node, op, name] : ops) {
    expect(node->op == op && std::strcmp(ggml_op_name(op), name) == 0, name);
  }
  expect(std::strcmp(ggml_op_name(GGML_OP_MUL_MAT_ID), "MUL_MAT_ID") == 0, "MUL_MAT_ID");
  expect(attend->src[0] == q && attend->src[1] == k && attend->src[2] == v && attend->src[3] == mask,
         "the sources of FLASH_ATTN_EXT");
  float parameters[3];  // scale, max_bias, softcap
  std::memcpy(parameters, attend->op_params, sizeof(parameters));
  expect(parameters[0] == 1.5F && parameters[1] == 2.5F && parameters[2] == 3.5F, "the parameters of FLASH_ATTN_EXT");
  expect(write->src[0] == rows && write->src[1] == index && write->view_src == cache, "the sources of SET_ROWS");
  expect(rotate->src[0] == q && rotate->src[1] == positions, "the sources of ROPE");
  ggml_custom_op_params of_custom;
  std::memcpy(&of_custom, custom->op_params, sizeof(of_custom));
  expect(of_custom.fun == do_nothing && of_custom.n_tasks == GGML_N_TASKS_MAX && of_custom.userdata == c,
         "the parameters of CUSTOM");

  ggml_cgraph* graph = ggml_new_graph_custom(c, 8, /*grads=*/false);
  ggml_build_forward_expand(graph, attend);
  expect(graph->n_nodes == 1 && ggml_graph_n_nodes(graph) == 1 && graph->nodes == ggml_graph_nodes(graph) &&
             graph->nodes[0] == attend && graph->size == 8 && graph->n_leafs == 4,
         "ggml_cgraph");
  // The host puts the array of nodes right behind the struct.
  expect(reinterpret_cast<const char*>(graph->nodes) - reinterpret_cast<const char*>(graph) == sizeof(ggml_cgraph),
         "the size of ggml_cgraph");
  expect((attend->flags & GGML_TENSOR_FLAG_COMPUTE) != 0, "the flag COMPUTE");
}

// ---- structs that the plugin makes: tables of functions, and the structs around them

// Stands for one of ggml's structs. Word i is the address of a function that notes i. When a public function of the
// host is called on it, the function that it calls or the word that it returns tells which offset the host read.
class Dummy {
public:
  Dummy() : Dummy(std::make_integer_sequence<int, kWords>()) {}

  template <typename Struct>
  Struct* as() {
    static_assert(sizeof(Struct) < sizeof(words_) / 2);
    return reinterpret_cast<Struct*>(words_);
  }
  /// The byte offset of the member that holds `word`, or of the first of its 32 bits.
  size_t where(const void* word) const { return where(reinterpret_cast<uintptr_t>(word), ~uintptr_t(0)); }
  size_t where_u32(uint32_t word) const { return where(word, 0xffffffff); }

  static constexpr size_t kNowhere = ~size_t(0);
  static inline size_t called = kNowhere;  // the byte offset of the function that was called last

private:
  static constexpr int kWords = 64;

  template <int... I>
  explicit Dummy(std::integer_sequence<int, I...>) : words_{reinterpret_cast<uintptr_t>(note<I>)...} {}

  // The host calls this as one of ggml's functions; its arguments are ignored.
  template <int I>
  static uintptr_t note() {
    called = I * sizeof(uintptr_t);
    return 64;
  }
  size_t where(uintptr_t word, uintptr_t mask) const {
    for (size_t i = 0; i < kWords; i++) {
      if ((words_[i] & mask) == word) return i * sizeof(uintptr_t);
    }
    return kNowhere;
  }

  uintptr_t words_[kWords];
};

template <typename Ask>
void expect_call(size_t offset, const char* what, const Ask& ask) {
  Dummy::called = Dummy::kNowhere;
  ask();
  expect(Dummy::called == offset, what);
}

void check_buffer_type(const ggml_tensor* scalar) {
  using T = ggml_backend_buffer_type;
  Dummy dummy;
  T* t = dummy.as<T>();
  expect(dummy.where(ggml_backend_buft_get_device(t)) == offsetof(T, device), "the size of ggml_backend_buffer_type_i");
  constexpr const char* kTable = "the order of ggml_backend_buffer_type_i";
  expect_call(offsetof(T, iface.get_name), kTable, [&] { ggml_backend_buft_name(t); });
  expect_call(offsetof(T, iface.alloc_buffer), kTable, [&] { ggml_backend_buft_alloc_buffer(t, 1); });
  expect_call(offsetof(T, iface.get_alignment), kTable, [&] { ggml_backend_buft_get_alignment(t); });
  expect_call(offsetof(T, iface.get_max_size), kTable, [&] { ggml_backend_buft_get_max_size(t); });
  expect_call(offsetof(T, iface.get_alloc_size), kTable, [&] { ggml_backend_buft_get_alloc_size(t, scalar); });
  expect_call(offsetof(T, iface.is_host), kTable, [&] { ggml_backend_buft_is_host(t); });
}

void check_buffer(ggml_tensor* scalar) {
  using B = ggml_backend_buffer;
  Dummy dummy;
  B* b = dummy.as<B>();
  expect(dummy.where(ggml_backend_buffer_get_type(b)) == offsetof(B, buft), "the size of ggml_backend_buffer_i");
  expect(dummy.where(reinterpret_cast<void*>(ggml_backend_buffer_get_size(b))) == offsetof(B, size) &&
             dummy.where_u32(ggml_backend_buffer_get_usage(b)) == offsetof(B, usage),
         "ggml_backend_buffer");
  constexpr const char* kTable = "the order of ggml_backend_buffer_i";
  float number = 0;
  scalar->buffer = b;
  scalar->data = &number;
  expect_call(offsetof(B, iface.get_base), kTable, [&] { ggml_backend_buffer_get_base(b); });
  expect_call(offsetof(B, iface.init_tensor), kTable, [&] { ggml_backend_buffer_init_tensor(b, scalar); });
  expect_call(offsetof(B, iface.memset_tensor), kTable, [&] { ggml_backend_tensor_memset(scalar, 0, 0, 4); });
  expect_call(offsetof(B, iface.set_tensor), kTable, [&] { ggml_backend_tensor_set(scalar, &number, 0, 4); });
  expect_call(offsetof(B, iface.get_tensor), kTable, [&] { ggml_backend_tensor_get(scalar, &number, 0, 4); });
  expect_call(offsetof(B, iface.cpy_tensor), kTable, [&] { ggml_backend_buffer_copy_tensor(scalar, scalar); });
  expect_call(offsetof(B, iface.clear), kTable, [&] { ggml_backend_buffer_clear(b, 0); });
  expect_call(offsetof(B, iface.reset), kTable, [&] { ggml_backend_buffer_reset(b); });

  // The host makes buffers from a table of ours.
  ggml_backend_buffer_t made = ggml_backend_buffer_init(nullptr, b->iface, &number, 7);
  expect(std::memcmp(&made->iface, &b->iface, sizeof(b->iface)) == 0 && made->context == &number && made->size == 7,
         "ggml_backend_buffer_init");
  expect_call(offsetof(B, iface.free_buffer), kTable, [&] { ggml_backend_buffer_free(made); });
}

void check_backend(ggml_tensor* scalar) {
  using B = ggml_backend;
  Dummy dummy;
  B* b = dummy.as<B>();
  expect(dummy.where(ggml_backend_get_device(b)) == offsetof(B, device), "the size of ggml_backend_i");
  expect(dummy.where(ggml_backend_guid(b)) == offsetof(B, guid), "ggml_backend");
  constexpr const char* kTable = "the order of ggml_backend_i";
  float number = 0;
  scalar->data = &number;
  expect_call(offsetof(B, iface.get_name), kTable, [&] { ggml_backend_name(b); });
  expect_call(offsetof(B, iface.free), kTable, [&] { ggml_backend_free(b); });
  expect_call(offsetof(B, iface.set_tensor_async), kTable,
              [&] { ggml_backend_tensor_set_async(b, scalar, &number, 0, 4); });
  expect_call(offsetof(B, iface.get_tensor_async), kTable,
              [&] { ggml_backend_tensor_get_async(b, scalar, &number, 0, 4); });
  expect_call(offsetof(B, iface.synchronize), kTable, [&] { ggml_backend_synchronize(b); });
  expect_call(offsetof(B, iface.graph_compute), kTable, [&] { ggml_backend_graph_compute_async(b, nullptr); });
}

void check_device() {
  using D = ggml_backend_device;
  Dummy dummy;
  D* d = dummy.as<D>();
  expect(dummy.where(ggml_backend_dev_backend_reg(d)) == offsetof(D, reg), "the size of ggml_backend_device_i");
  constexpr const char* kTable = "the order of ggml_backend_device_i";
  size_t bytes[2];
  alignas(16) char props[1024];  // the host's ggml_backend_dev_props may be larger than ours
  expect_call(offsetof(D, iface.get_name), kTable, [&] { ggml_backend_dev_name(d); });
  expect_call(offsetof(D, iface.get_description), kTable, [&] { ggml_backend_dev_description(d); });
  expect_call(offsetof(D, iface.get_memory), kTable, [&] { ggml_backend_dev_memory(d, &bytes[0], &bytes[1]); });
  expect_call(offsetof(D, iface.get_type), kTable, [&] { ggml_backend_dev_type(d); });
  expect_call(offsetof(D, iface.get_props), kTable,
              [&] { ggml_backend_dev_get_props(d, reinterpret_cast<ggml_backend_dev_props*>(props)); });
  expect_call(offsetof(D, iface.init_backend), kTable, [&] { ggml_backend_dev_init(d, nullptr); });
  expect_call(offsetof(D, iface.get_buffer_type), kTable, [&] { ggml_backend_dev_buffer_type(d); });
  expect_call(offsetof(D, iface.get_host_buffer_type), kTable, [&] { ggml_backend_dev_host_buffer_type(d); });
  expect_call(offsetof(D, iface.buffer_from_host_ptr), kTable,
              [&] { ggml_backend_dev_buffer_from_host_ptr(d, props, 1, 1); });
  expect_call(offsetof(D, iface.supports_op), kTable, [&] { ggml_backend_dev_supports_op(d, nullptr); });
  expect_call(offsetof(D, iface.supports_buft), kTable, [&] { ggml_backend_dev_supports_buft(d, nullptr); });
  expect_call(offsetof(D, iface.offload_op), kTable, [&] { ggml_backend_dev_offload_op(d, nullptr); });
}

void check_registry() {
  using R = ggml_backend_reg;
  Dummy dummy;
  R* r = dummy.as<R>();
  constexpr const char* kTable = "the order of ggml_backend_reg_i";
  expect_call(offsetof(R, iface.get_name), kTable, [&] { ggml_backend_reg_name(r); });
  expect_call(offsetof(R, iface.get_device_count), kTable, [&] { ggml_backend_reg_dev_count(r); });
  expect_call(offsetof(R, iface.get_device), kTable, [&] { ggml_backend_reg_dev_get(r, 0); });
  expect_call(offsetof(R, iface.get_proc_address), kTable, [&] { ggml_backend_reg_get_proc_address(r, ""); });
}

}  // namespace

ggml_op custom_op() {
  static const ggml_op op = make_custom(Context().get())->op;
  return op;
}

std::string self_check() {
  try {
    check_tensor();
    check_types();
    check_ops();
    const Context context;
    ggml_tensor* scalar = ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, 1);
    check_buffer_type(scalar);
    check_buffer(scalar);
    check_backend(scalar);
    check_device();
    check_registry();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return {};
}

}  // namespace thimble
