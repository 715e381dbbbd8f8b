#!/usr/bin/env python3
"""llama.cpp's --fit knows what a coded cache takes: where memory is left for the coded cache of the whole context but not
for f16's, the context stays whole at 4 bits and shrinks at 16.

usage: fit_test.py <llama-completion> <plugin> <model>
"""
import os
import re
import subprocess
import sys

program, plugin, model = sys.argv[1:]


def run(bits, *arguments):
    done = subprocess.run([program, "-m", model, "--device", "THIMBLE0", "-ngl", "99", "-fa", "on", "-t", "1", "-p", "hi",
                           "-n", "1", "-no-cnv", "-lv", "4", *arguments], env=dict(os.environ, GGML_BACKEND_PATH=plugin,
                          THIMBLE_KV=f"bits={bits}"), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        sys.exit(f"exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stderr


def number(pattern, log):
    found = re.search(pattern, log)
    if not found:
        sys.exit(f"no '{pattern}' in the log:\n{log[-3000:]}")
    return int(found[1])


needed, contexts = {}, {}
for bits in (16, 4):
    log = run(bits)
    needed[bits] = number(r"projected to use (\d+) MiB", log)
    available = number(r"vs\. (\d+) MiB", log)
allowed = (needed[16] + needed[4]) // 2
for bits in (16, 4):
    contexts[bits] = number(r"llama_context: n_ctx += (\d+)", run(bits, "-fit", "on", "-fitt", str(available - allowed)))
print(f"MiB needed: {needed}; contexts in {allowed} MiB: {contexts}")
sys.exit(0 if needed[4] < needed[16] and contexts[16] < contexts[4] == 8192 else 1)
