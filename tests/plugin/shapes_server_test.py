#!/usr/bin/env python3
"""llama-server on THIMBLE0 with a random model of a shape that the small real models do not have: two chats in turn get next
tokens as from plain llama.cpp, a slot is saved and restored, and a state of other settings is refused. With latent rows (mla), a
context is shifted.

usage: shapes_server_test.py <llama-server> <plugin> <random_model> <gemma4 | mla> <model whose tokenizer it gets>
"""
import math
import os
import subprocess
import sys
import tempfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
from server_process import ServerProcess

server, plugin, random_model, kind, tokenizer = sys.argv[1:]
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data", "alice.txt")) as f:
    alice = f.read()
# Two chats in turn, each longer by every turn.
prompts = [alice[start:start + 500 + 120 * turn] for turn in range(5) for start in (0, 1200)]


def check(condition, what):
    if not condition:
        raise AssertionError(what)
    print("ok:", what, flush=True)


class Server(ServerProcess):
    """With these settings of the cache, or plain llama.cpp."""

    def __init__(self, model, settings, *arguments):
        environment = {k: v for k, v in os.environ.items() if k not in ("THIMBLE_KV", "GGML_BACKEND_PATH")}
        device = "none"
        if settings:
            environment.update(GGML_BACKEND_PATH=plugin, THIMBLE_KV=settings)
            device = "THIMBLE0"
        super().__init__([server, "-m", model, "--device", device, "-ngl", "99" if settings else "0", "-fa", "on", "-t", "1",
                          "-lv", "4", "--no-warmup", *arguments], environment)

    def complete(self, prompt, n=1, slot=-1):
        return self.request("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "id_slot": slot,
                                            "cache_prompt": True, "n_probs": 200})

    def next_token(self, prompt, slot=-1, n_read=None):
        """`n_read`: of how many tokens the server must read, and not have in its cache."""
        answer = self.complete(prompt, slot=slot)
        if n_read is not None:
            check(answer["timings"]["prompt_n"] == n_read, f"{answer['timings']['prompt_n']} tokens were read, the others were there")
        return {t["id"]: t["logprob"] for t in answer["completion_probabilities"][0]["top_logprobs"]}


def kl(p, q):
    """Of what the greatest 200 of p have in q, both as shares of these."""
    both = [t for t in p if t in q]
    sums = [math.log(sum(math.exp(d[t]) for t in both)) for d in (p, q)]
    return sum(math.exp(p[t] - sums[0]) * ((p[t] - sums[0]) - (q[t] - sums[1])) for t in both)


with tempfile.TemporaryDirectory() as folder:
    model = os.path.join(folder, kind + ".gguf")
    subprocess.run([random_model, kind, tokenizer, model], check=True, stdout=subprocess.DEVNULL)
    with Server(model, None, "-c", "2048") as s:
        plain = [s.next_token(p) for p in prompts]
    small = "small=0,window=32,pool=8"
    means = {}
    for bits in ("16", "4", "2"):
        with Server(model, f"bits={bits},{small}", "-c", "2048") as s:
            answers = [s.next_token(p) for p in prompts]
            divergences = [kl(p, q) for p, q in zip(plain, answers)]
            means[bits] = sum(divergences) / len(divergences)
            log = s.text()
        check(f"bits={bits}" in log and "thimble: KV cache of" in log, f"{bits} bits: the cache is coded")
        check("decoded for every batch" not in log, f"{bits} bits: attention is from codes")
        check(s.process.returncode == 0, f"{bits} bits: clean stop")
    # Of layers with windows a slot's file has what the next token sees. llama-server wants a token more of it, and reads the
    # whole prompt again without --swa-full.
    slots = ["-c", "2048", "--slot-save-path", folder, *(["--swa-full"] if kind == "gemma4" else [])]
    with Server(model, f"bits=2,{small}", *slots) as s:
        s.complete(prompts[0], slot=0)
        s.request("/slots/0?action=save", {"filename": "of-2-bits"})
        before = s.next_token(prompts[0] + " And", slot=0, n_read=1)
        s.request("/slots/0?action=erase", {})
        s.request("/slots/0?action=restore", {"filename": "of-2-bits"})
        after = s.next_token(prompts[0] + " And", slot=0, n_read=1)
        check(kl(before, after) < 1e-3, f"a restored slot goes on as it was: KL {kl(before, after):.1e}")
    with Server(model, f"bits=4,{small}", *slots) as s:
        check(s.status_of("/slots/0?action=restore", {"filename": "of-2-bits"}) >= 400, "a state of other settings is refused")
        check(s.complete(prompts[0], n=4)["content"] is not None, "and the server goes on")
    if kind == "mla":  # sliding windows rule a shift out
        with Server(model, f"bits=4,{small}", "-c", "256", "-np", "1", "--context-shift") as s:
            check(len(s.complete(alice[:400], n=300)["content"]) > 0, "a context is shifted")
            check("shift" in s.text(), "the log says so")
    print(f"{kind}: mean KL of the next token against plain llama.cpp: {means}", flush=True)
    check(means["16"] < 1e-4, "16 bits are plain llama.cpp's")
    check(means["4"] < 0.08, "4 bits")
    check(means["2"] < 0.3 and means["2"] > means["16"], "2 bits")
