#!/usr/bin/env python3
"""What `thimble eval` measures is what llama-server answers: the log-probabilities of a text's next tokens, decoded one by one
behind a prompt, are the same from both, for f16 and coded caches with all settings at their defaults; and `thimble doctor`
tells the bytes that the server allocates.

usage: eval_server_test.py <thimble> <llama-server> <plugin> <model> <profile or -> <text> <directory for the virtual environment>
"""
import json
import os
import re
import subprocess
import sys
import tempfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
from llama_server import Server, check, enter_environment

thimble, server, plugin, model, profile, text, venv = sys.argv[1:]
enter_environment(venv)
context, n_decode, n_probs = 1280, 12, 1000  # more cells than `small`, and than the last ones and the pool
settings = {"f16": None, "2": "bits=2", "2+64": "bits=2,top=64"}
with_profile = [] if profile == "-" else ["--profile", profile]


def of_server(cache):
    """Log-probability of each decoded token, None where it is none of the most probable; and the caches' MiB."""
    kv = (settings[cache] or "bits=16") + ("" if profile == "-" else f",profile={profile}")
    device = ["--device", "none"] if cache == "f16" else []
    with Server(server, plugin, model, kv, "-c", str(context), "--ctx-checkpoints", "0", *device) as s:
        with open(text) as f:
            tokens = s.request("/tokenize", {"content": f.read(), "add_special": True})["tokens"][:context + 1]
        check(len(tokens) == context + 1, f"{cache}: the text is long enough")
        read = context - n_decode
        found = []
        # The prompt first, then a token at a time; the server leaves the last cell for an answer.
        for end in range(read, context):
            answer = s.request("/completion", {"prompt": tokens[:end], "n_predict": 1, "temperature": 0, "n_probs": n_probs,
                                            "id_slot": 0, "cache_prompt": True})
            if end == read:
                check(answer["timings"]["prompt_n"] == read, f"{cache}: {read} tokens read")
                continue
            check(answer["timings"]["prompt_n"] == 1, f"{cache}: one token decoded")
            likely = {t["id"]: t["logprob"] for t in answer["completion_probabilities"][0]["top_logprobs"]}
            found.append(likely.get(tokens[end]))
        return found, sum(float(m) for m in re.findall(r"KV buffer size = *([0-9.]+) MiB", s.text()))


with tempfile.TemporaryDirectory() as directory:
    result = os.path.join(directory, "rows.json")
    subprocess.run([thimble, "eval", "-m", model, "-f", text, "-c", str(context), "--decode", str(n_decode), "-t", "1", "--kv",
                    ",".join(settings), "--json", result, *with_profile], check=True)
    with open(result) as f:
        rows = {row["kv"]: row for row in json.load(f)["rows"]}
environment = {k: v for k, v in os.environ.items() if k != "THIMBLE_KV"}
doctor = subprocess.run([thimble, "doctor", "-m", model, "-c", str(context), *with_profile], check=True, env=environment,
                        stdout=subprocess.PIPE, text=True).stdout
greatest = {}
for cache in settings:
    log_p, mib = of_server(cache)
    known = [(a, b) for a, b in zip(log_p, rows[cache]["log_p"]) if a is not None]
    check(len(known) > len(log_p) / 2, f"{cache}: {len(known)} of {len(log_p)} tokens are among the {n_probs} most probable")
    greatest[cache] = max(abs(a - b) for a, b in known)
    check(greatest[cache] < 1e-3, f"{cache}: log-probabilities of eval and the server differ by at most {greatest[cache]:.2g}")
    check(abs(rows[cache]["kv_bytes"] / 2**20 - mib) < 0.02, f"{cache}: {mib} MiB, as eval says")
    if cache != "2+64":
        told = re.search(rf"^ +{cache}(?: bits)? +([0-9.]+) MiB", doctor, re.M)
        check(told and abs(float(told[1]) - mib) < 0.02, f"{cache}: and as doctor says: {told and told[1]}")
# The comparison can tell caches apart.
apart = max(abs(a - b) for a, b in zip(rows["f16"]["log_p"], rows["2"]["log_p"]))
check(apart > 0.01, f"2 bits differ from f16 by up to {apart:.3g}")
