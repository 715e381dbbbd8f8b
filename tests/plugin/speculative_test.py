#!/usr/bin/env python3
"""Greedy text of llama-server with a draft model against the same without: twenty prompts of 64 tokens each, or as many as
THIMBLE_TEST_PROMPTS says, at most 80.

usage: speculative_test.py <llama-server> <plugin> <model> <draft model> <profile> <directory for the virtual environment>
                           <cache>

<cache>: f16, or bits and retrieved cells as --kv has them (4, 2, 2+64). No text may part. That takes a model whose products with
weights ggml rounds alike for one token and for several, as it does with Q4_1 (but for the last, which has no successor); with f32
weights its sums differ, which decides between two first choices that are equally likely. Where texts part, the two are told
with the difference of their log-probabilities.
"""
import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
from llama_server import Server, check, data, enter_environment

server, plugin, model, draft, profile, venv, cache = sys.argv[1:]
enter_environment(venv)
with open(os.path.join(data, "alice.txt")) as f:
    alice = f.read()
with open(os.path.join(data, "..", "..", "examples", "gpl-3.0.txt")) as f:
    gpl = f.read()
# About 210 tokens each, so that cells leave the window before and while the answer is decoded.
n_prompts = int(os.environ.get("THIMBLE_TEST_PROMPTS", "20"))
prompts = [text[start:start + 850] for part in (0, 1 / 2, 1 / 4, 3 / 4) for i in range(10)
           for text, start in ((alice, int(270 * (i + part))), (gpl, int(3000 * (i + part))))][:n_prompts]


def start(*arguments):
    bits, _, top = cache.partition("+")
    settings = f"bits={bits},profile={profile}" + (f",top={top}" if top else "") if cache != "f16" else "bits=16"
    device = ["--device", "none"] if cache == "f16" else []
    threads = os.environ.get("THIMBLE_TEST_THREADS", "1")
    return Server(server, plugin, model, settings, "-np", "1", "-c", "2048", "-t", threads, "-tb", threads, *device, *arguments)


def complete(s, prompt):
    answer = s.request("/completion", {"prompt": prompt, "n_predict": 64, "temperature": 0, "cache_prompt": False,
                                    "ignore_eos": True, "n_probs": 2, "return_tokens": True})
    return answer["tokens"], answer["completion_probabilities"], answer["timings"]


with start() as s:
    plain = [complete(s, prompt) for prompt in prompts]
    check(("thimble: KV cache of 30 layers" in s.text()) == (cache != "f16"), "the cache is coded where it is to be")
home = ["-devd", "none"] if cache == "f16" else ["-devd", "THIMBLE0", "-ngld", "99"]
with start("--spec-type", "draft-simple", "--spec-draft-n-max", "8", "-md", draft, *home) as s:
    drafted = [complete(s, prompt) for prompt in prompts]

accepted = sum(timings.get("draft_n_accepted", 0) for _, _, timings in drafted)
total = sum(timings.get("draft_n", 0) for _, _, timings in drafted)
check(accepted > n_prompts * 64 / 4, f"{accepted} of {total} drafted tokens accepted")
n_parted = 0
for i, ((tokens, probabilities, _), (other, _, _)) in enumerate(zip(plain, drafted)):
    check(len(tokens) == len(other) == 64, f"prompt {i}: 64 tokens each")
    if tokens == other:
        continue
    at = next(j for j in range(64) if tokens[j] != other[j])
    first, second = probabilities[at]["top_logprobs"][:2]
    n_parted += 1
    print(f"prompt {i} parts at token {at}: {first['token']!r} before {second['token']!r} by "
          f"{first['logprob'] - second['logprob']:.5f}, with the draft model {other[at]} (they are {first['id']}, {second['id']})")
check(n_parted == 0, f"{cache}: of {len(prompts)} texts {n_parted} part with a draft model")
