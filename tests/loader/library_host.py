#!/usr/bin/env python3
"""A host that is a library: a program of a few lines on a libllama.so, either the prebuilt one of PyPI's llama-cpp-py-sync, whose
bindings are made from the llama.h of its version (they need cffi), or that of the llama-cpp-python that this Python has. It
loads the plugin and prints, as JSON, what scripts/check-hosts looks at.

usage: library_host.py <folder of llama-cpp-py-sync, or llama_cpp> <plugin> <model> <prompt> <prompt of a second sequence>

THIMBLE_KV holds the settings, as for any program. What ggml and the plugin log goes to stderr.
"""
import ctypes
import importlib.util
import json
import os
import sys


class Prebuilt:
    """The bindings of llama-cpp-py-sync."""

    def __init__(self, folder):
        # The plugin finds ggml's functions in it.
        self.ggml = ctypes.CDLL(os.path.join(folder, "libggml.so.0"), mode=ctypes.RTLD_GLOBAL)
        spec = importlib.util.spec_from_file_location("bindings", os.path.join(folder, "_cffi_bindings.py"))
        bindings = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bindings)
        self.ffi = bindings.ffi
        self.llama = self.ffi.dlopen(os.path.join(folder, "libllama.so"), self.ffi.RTLD_NOW | self.ffi.RTLD_GLOBAL)

    def choose(self, params, device):
        self.devices = self.ffi.new("void *[2]", [self.ffi.cast("void *", device), self.ffi.NULL])
        params.devices = self.ffi.cast("ggml_backend_dev_t *", self.devices)

    def set_flash_attention(self, params, number):
        params.flash_attn_type = self.ffi.cast("enum llama_flash_attn_type", number)

    def tokens(self, n):
        return self.ffi.new("llama_token[]", n)

    def characters(self, n):
        return self.ffi.new("char[]", n)

    def bytes(self, n):
        return self.ffi.new("uint8_t[]", n)

    def text(self, characters, n):
        return self.ffi.buffer(characters, n)[:]

    def floats(self, pointer, n):
        return self.ffi.unpack(pointer, n)


class Installed:
    """llama-cpp-python."""

    def __init__(self, name):
        self.llama = importlib.import_module(name + ".llama_cpp")
        self.ggml = ctypes.CDLL(self.llama._lib._name, mode=ctypes.RTLD_GLOBAL)

    def choose(self, params, device):
        self.devices = (ctypes.c_void_p * 2)(device, None)
        params.devices = ctypes.cast(self.devices, ctypes.c_void_p).value

    def set_flash_attention(self, params, number):
        params.flash_attn_type = number

    def tokens(self, n):
        return (self.llama.llama_token * n)()

    def characters(self, n):
        return ctypes.create_string_buffer(n)

    def bytes(self, n):
        return (ctypes.c_uint8 * n)()

    def text(self, characters, n):
        return characters.raw[:n]

    def floats(self, pointer, n):
        return pointer[:n]


folder, plugin, model_path, *prompts = sys.argv[1:]
library = Prebuilt(folder) if os.path.isdir(folder) else Installed(folder)
ggml, llama = library.ggml, library.llama
ggml.ggml_backend_load.restype = ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
CELLS, N = 1024, 16


def print_and_end(**result):
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


ggml.ggml_backend_load(plugin.encode())
device = ggml.ggml_backend_dev_by_name(b"THIMBLE0")
if not device:
    print_and_end(loaded=False)
llama.llama_backend_init()
params = llama.llama_model_default_params()
library.choose(params, device)
params.n_gpu_layers = 99
model = llama.llama_model_load_from_file(model_path.encode(), params)
vocab = llama.llama_model_get_vocab(model)
n_vocab = llama.llama_vocab_n_tokens(vocab)


def new_context(flash_attention=1):
    context = llama.llama_context_default_params()
    context.n_ctx, context.n_seq_max, context.n_threads, context.n_threads_batch = 2 * CELLS, 2, 1, 1
    library.set_flash_attention(context, flash_attention)
    return llama.llama_init_from_model(model, context)


def tokens_of(text):
    tokens = library.tokens(CELLS)
    n = llama.llama_tokenize(vocab, text.encode(), len(text.encode()), tokens, CELLS, True, True)
    return list(tokens[0:n])


def text_of(tokens):
    piece, text = library.characters(256), b""
    for token in tokens:
        n = llama.llama_token_to_piece(vocab, token, piece, 256, 0, False)
        text += library.text(piece, n)
    return text.decode(errors="replace")


def decode(items):
    """items: (token, position, sequence, whether logits are wanted). Returns the likeliest next token of each that wants them."""
    batch = llama.llama_batch_init(len(items), 0, 1)
    batch.n_tokens = len(items)
    for i, (token, position, sequence, wanted) in enumerate(items):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
        batch.seq_id[i][0] = sequence
    if llama.llama_decode(context, batch) != 0:
        raise RuntimeError("llama_decode fails")
    best = []
    for i, item in enumerate(items):
        if item[3]:
            logits = library.floats(llama.llama_get_logits_ith(context, i), n_vocab)
            best.append(max(range(n_vocab), key=logits.__getitem__))
    llama.llama_batch_free(batch)
    return best


def read(*sequences):
    """Reads prompts, all in one batch, given as (sequence, text). Returns [sequence, next position, next token] of each."""
    items, state = [], []
    for sequence, text in sequences:
        tokens = tokens_of(text)
        items += [(token, i, sequence, i + 1 == len(tokens)) for i, token in enumerate(tokens)]
        state.append([sequence, len(tokens)])
    return [[*one, token] for one, token in zip(state, decode(items))]


def go_on(state):
    """N tokens of each sequence, decoded together, as texts."""
    answers = [[token] for _, _, token in state]
    for step in range(N - 1):
        items = [(answer[-1], position + step, sequence, True) for (sequence, position, _), answer in zip(state, answers)]
        for answer, token in zip(answers, decode(items)):
            answer.append(token)
    return [text_of(answer) for answer in answers]


context = new_context()
if not context:
    print_and_end(loaded=True, context=False)
memory = llama.llama_get_memory(context)
state = read((0, prompts[0]))
saved = library.bytes(llama.llama_state_seq_get_size(context, 0))
n_saved = llama.llama_state_seq_get_data(context, saved, len(saved), 0)
alone = go_on(state)
llama.llama_memory_clear(memory, True)
n_restored = llama.llama_state_seq_set_data(context, saved, n_saved, 0)
restored = go_on(state)
llama.llama_memory_clear(memory, True)
alone += go_on(read((1, prompts[1])))
llama.llama_memory_clear(memory, True)
together = go_on(read((0, prompts[0]), (1, prompts[1])))
llama.llama_free(context)
print_and_end(loaded=True, context=True, alone=alone, restored=restored, together=together, saved=n_saved, read_back=n_restored,
              without_flash_attention=bool(new_context(0)))
