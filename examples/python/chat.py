#!/usr/bin/env python3
"""llama-cpp-python with a coded KV cache: answers a question about a text, and again from the saved state.

usage: chat.py <model.gguf> [kv] [own]      kv: "2+64" and so on (4); own: run on the llama.cpp in the package thimble_kv
"""
import sys
import time

import thimble_kv

model = sys.argv[1]
kv = sys.argv[2] if len(sys.argv) > 2 else "4"
enabled = thimble_kv.enable(kv=kv, own_llama="own" in sys.argv[3:])  # before Llama is made
print(f"{enabled.device}; ggml {enabled.ggml} in {enabled.llama}")

from llama_cpp import Llama  # noqa: E402  after enable(), which chooses the library that it loads

llama = Llama(model, n_ctx=4096, verbose=False)
story = "My dog is called Bingo, and he likes to sleep under the red table. " * 40
prompt = f"<|im_start|>user\n{story}What is my dog called?<|im_end|>\n<|im_start|>assistant\n"
tokens = llama.tokenize(prompt.encode(), special=True)


def answer(last_token):
    """The next eight tokens by the greatest logit, after what the model has read."""
    out = []
    for token in llama.generate([*llama.input_ids[: llama.n_tokens], last_token], temp=0.0, reset=True):
        if token == llama.token_eos() or len(out) == 8:
            break
        out.append(token)
    return llama.detokenize(out).decode().strip()


begin = time.monotonic()
llama.eval(tokens[:-1])
print(f"read {len(tokens)} tokens in {time.monotonic() - begin:.1f} s")
state = llama.save_state()
first = answer(tokens[-1])
print("answer:", first)

llama.reset()
llama.load_state(state)
print("from the saved state:", answer(tokens[-1]))
print("state:", len(state.llama_state), "bytes")
