// Times saving and restoring a sequence's state: to memory, as llama-server's prompt cache does, and to a file, as it
// saves its server slots. The restored state must be the saved one, byte for byte but for the sequence's number, which
// is saved with each cell.
//
// usage: THIMBLE_KV=... GGML_BACKEND_PATH=... state_bench <model.gguf> <device> <tokens> [directory for the file]
#include <ggml-backend.h>
#include <llama.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace {

double milliseconds_of(const std::function<void()>& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void fill(llama_context* context, int n_tokens, int n_batch, int n_vocab) {
  std::vector<llama_token> tokens(n_tokens);
  for (int i = 0; i < n_tokens; i++) tokens[i] = llama_token((i * 7919u + 13) % unsigned(n_vocab));
  for (int first = 0; first < n_tokens; first += n_batch) {
    const int n = std::min(n_batch, n_tokens - first);
    require(llama_decode(context, llama_batch_get_one(tokens.data() + first, n)) == 0, "decoding failed");
  }
  llama_synchronize(context);
}

}  // namespace

int main(int argc, char** argv) {
  require(argc == 4 || argc == 5, "usage: state_bench <model.gguf> <device> <tokens> [directory for the file]");
  const int n_tokens = std::atoi(argv[3]), n_batch = 2048, rounds = 3;
  const std::string path = std::string(argc > 4 ? argv[4] : ".") + "/state_bench.bin";
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level >= GGML_LOG_LEVEL_WARN || std::strstr(text, "thimble")) std::fputs(text, stderr);
      },
      nullptr);
  ggml_backend_load_all();
  llama_model_params model_params = llama_model_default_params();
  ggml_backend_dev_t devices[] = {ggml_backend_dev_by_name(argv[2]), nullptr};
  require(devices[0], "there is no such device");
  model_params.devices = devices;
  model_params.n_gpu_layers = 999;
  llama_model* model = llama_model_load_from_file(argv[1], model_params);
  require(model, "the model does not load");
  llama_context_params params = llama_context_default_params();
  params.n_ctx = uint32_t(2 * n_tokens + 512) / 256 * 256;
  params.n_batch = params.n_ubatch = n_batch;
  params.n_seq_max = 2;
  params.kv_unified = true;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  llama_context* context = llama_init_from_model(model, params);
  require(context, "the context is not made");
  fill(context, n_tokens, n_batch, llama_vocab_n_tokens(llama_model_get_vocab(model)));

  std::vector<uint8_t> state(llama_state_seq_get_size(context, 0)), again(state.size());
  std::fill(state.begin(), state.end(), 1);  // so that the system has given the pages before time is taken
  std::fill(again.begin(), again.end(), 1);
  std::printf("%d tokens, a state of %.1f MiB; ms:\n", n_tokens, double(state.size()) / (1 << 20));
  for (int round = 0; round < rounds; round++) {
    size_t saved = 0, restored = 0, n = 0;
    const double save =
        milliseconds_of([&] { saved = llama_state_seq_get_data(context, state.data(), state.size(), 0); });
    require(saved == state.size(), "the state was not saved");
    llama_memory_seq_rm(llama_get_memory(context), 1, -1, -1);
    const double restore =
        milliseconds_of([&] { restored = llama_state_seq_set_data(context, state.data(), state.size(), 1); });
    require(restored == state.size(), "the state was not restored");
    require(llama_state_seq_get_data(context, again.data(), again.size(), 1) == again.size(), "it was not saved again");
    size_t differing = 0;
    for (size_t i = 0; i < state.size(); i++) differing += state[i] != again[i];
    require(differing <= size_t(n_tokens) + 1, "what was restored is not what was saved");  // the sequence's number
    const double save_file =
        milliseconds_of([&] { n = llama_state_seq_save_file(context, path.c_str(), 0, nullptr, 0); });
    require(n > 0, "the file was not written");
    llama_memory_seq_rm(llama_get_memory(context), 1, -1, -1);
    llama_token token = 0;
    size_t n_read = 0;
    const double load_file =
        milliseconds_of([&] { n = llama_state_seq_load_file(context, path.c_str(), 1, &token, 1, &n_read); });
    require(n > 0, "the file was not read");
    llama_memory_seq_rm(llama_get_memory(context), 1, -1, -1);
    std::printf("memory: saved in %.0f, restored in %.0f; file: %.0f, %.0f\n", save, restore, save_file, load_file);
  }
  std::filesystem::remove(path);
  llama_free(context);
  llama_model_free(model);
  return 0;
}
