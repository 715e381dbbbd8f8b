// A ggml backend of two devices that compute on the CPU and can be recorded, as ggml-cuda's streams can: where a queue
// of the emulated CUDA engine records (tests/cuda/emulated), a backend that awaits an event of it records its graphs,
// too. Loaded by ggml_backend_load; named as GGML_BACKEND_DL has it.
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

namespace {

struct Recorder {
  ggml_backend_t cpu;
  std::shared_ptr<CUgraph_st> recording;
};
Recorder& recorder_of(ggml_backend_t backend) {
  return *static_cast<Recorder*>(backend->context);
}

// Copies of some nodes and of what they read, since a recording knows nothing but places in memory.
class Nodes {
public:
  explicit Nodes(const ggml_cgraph& graph) {
    for (int i = 0; i < graph.n_nodes; i++) nodes_.push_back(copy(graph.nodes[i]));
  }
  void compute(ggml_backend_t cpu) {
    std::vector<uint8_t> memory(ggml_graph_overhead_custom(nodes_.size(), false) + (size_t{1} << 16));
    const std::unique_ptr<ggml_context, void (*)(ggml_context*)> context(
        ggml_init({memory.size(), memory.data(), true}), ggml_free);
    ggml_cgraph* graph = ggml_new_graph_custom(context.get(), nodes_.size(), false);
    for (ggml_tensor* node : nodes_) graph->nodes[graph->n_nodes++] = node;
    if (ggml_backend_graph_compute(cpu, graph) != GGML_STATUS_SUCCESS) GGML_ABORT("a recorded graph failed");
  }

private:
  ggml_tensor* copy(ggml_tensor* tensor) {
    auto& mine = copies_[tensor];
    if (mine) return mine.get();
    mine = std::make_unique<ggml_tensor>(*tensor);
    ggml_tensor* result = mine.get();
    for (ggml_tensor*& src : result->src) {
      if (src) src = copy(src);
    }
    return result;
  }

  std::map<const ggml_tensor*, std::unique_ptr<ggml_tensor>> copies_;
  std::vector<ggml_tensor*> nodes_;
};

ggml_status compute(ggml_backend_t backend, ggml_cgraph* graph) {
  Recorder& recorder = recorder_of(backend);
  if (!recorder.recording) return ggml_backend_graph_compute(recorder.cpu, graph);
  recorder.recording->work.emplace_back(
      [nodes = std::make_shared<Nodes>(*graph), cpu = recorder.cpu] { nodes->compute(cpu); });
  return GGML_STATUS_SUCCESS;
}

CUevent_st& cuda_event(ggml_backend_event_t event) {
  return *static_cast<CUevent_st*>(event->context);
}

extern ggml_backend_device devices[2];

ggml_backend_t new_backend(ggml_backend_dev_t device, const char*) {
  auto* backend = new ggml_backend{};
  static ggml_guid guid = {0x72, 0x65, 0x63, 0x6f, 0x72, 0x64};
  backend->guid = &guid;
  backend->device = device;
  backend->context = new Recorder{ggml_backend_cpu_init(), nullptr};
  ggml_backend_i& i = backend->iface;
  i.get_name = [](ggml_backend_t) { return "RECORDING"; };
  i.free = [](ggml_backend_t b) {
    ggml_backend_free(recorder_of(b).cpu);
    delete &recorder_of(b);
    delete b;
  };
  i.synchronize = [](ggml_backend_t) {};
  i.graph_compute = compute;
  i.event_record = [](ggml_backend_t b, ggml_backend_event_t event) {
    cuda_event(event).recording = recorder_of(b).recording;
  };
  i.event_wait = [](ggml_backend_t b, ggml_backend_event_t event) {
    recorder_of(b).recording = cuda_event(event).recording;
  };
  return backend;
}

ggml_backend_dev_t cpu_device() {
  return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

void set_n_threads(ggml_backend_t backend, int n) {
  ggml_backend_cpu_set_n_threads(recorder_of(backend).cpu, n);
}

ggml_backend_reg registry = [] {
  ggml_backend_reg r{};
  r.api_version = GGML_BACKEND_API_VERSION;
  r.iface.get_name = [](ggml_backend_reg_t) { return "RECORDING"; };
  r.iface.get_device_count = [](ggml_backend_reg_t) { return std::size(devices); };
  r.iface.get_device = [](ggml_backend_reg_t, size_t index) { return &devices[index]; };
  r.iface.get_proc_address = [](ggml_backend_reg_t, const char* name) {
    return name == std::string("ggml_backend_set_n_threads") ? reinterpret_cast<void*>(set_n_threads) : nullptr;
  };
  return r;
}();

// The CPU's memory, but other devices do not see it as theirs.
ggml_backend_buffer_type_t memory_of(ggml_backend_dev_t device) {
  static ggml_backend_buffer_type types[2] = {*ggml_backend_cpu_buffer_type(), *ggml_backend_cpu_buffer_type()};
  ggml_backend_buffer_type& type = types[device - devices];
  type.device = device;
  type.iface.is_host = nullptr;
  type.iface.get_name = [](ggml_backend_buffer_type_t) { return "RECORDING"; };
  return &type;
}

const ggml_backend_device_i kDevice = [] {
  ggml_backend_device_i i{};
  i.get_name = [](ggml_backend_dev_t device) { return device == &devices[0] ? "RECORDING0" : "RECORDING1"; };
  i.get_description = [](ggml_backend_dev_t) { return "the CPU, to be recorded"; };
  i.get_memory = [](ggml_backend_dev_t, size_t* free, size_t* total) {
    ggml_backend_dev_memory(cpu_device(), free, total);
  };
  i.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
  i.get_props = [](ggml_backend_dev_t device, ggml_backend_dev_props* props) {
    ggml_backend_dev_get_props(cpu_device(), props);
    props->name = ggml_backend_dev_name(device);
    props->type = GGML_BACKEND_DEVICE_TYPE_GPU;
    props->device_id = device == &devices[0] ? "0" : "1";
    props->caps.async = props->caps.events = true;
  };
  i.init_backend = new_backend;
  i.get_buffer_type = memory_of;
  i.supports_op = [](ggml_backend_dev_t, const ggml_tensor* op) {
    return ggml_backend_dev_supports_op(cpu_device(), op);
  };
  i.supports_buft = [](ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
    return type == memory_of(device);
  };
  i.event_new = [](ggml_backend_dev_t device) { return new ggml_backend_event{device, new CUevent_st}; };
  i.event_free = [](ggml_backend_dev_t, ggml_backend_event_t event) {
    delete &cuda_event(event);
    delete event;
  };
  i.event_synchronize = [](ggml_backend_dev_t, ggml_backend_event_t) {};
  return i;
}();

ggml_backend_device devices[2] = {{kDevice, &registry, nullptr}, {kDevice, &registry, nullptr}};

}  // namespace

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
  return &registry;
}
