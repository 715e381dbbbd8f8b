#!/usr/bin/env python3
"""How llama.cpp spreads a model over two devices of the plugin: layers in the proportions of --tensor-split, all on the device that
--main-gpu names, tensors; the text is that of one device, and each device has its share of a coded cache. Where rows are asked
for, which no device of this llama.cpp has, it says so.

usage: split_test.py <llama-completion> <plugin> <model>
"""
import os
import re
import subprocess
import sys

program, plugin, model = sys.argv[1:]
PROMPT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Germany is"


def check(condition, what):
    if not condition:
        raise AssertionError(what)
    print("ok:", what, flush=True)


def run(*arguments, kv="bits=4,window=4,pool=2,small=0"):
    done = subprocess.run([program, "-m", model, "-ngl", "99", "-fa", "on", "-t", "1", "-c", "512", "-p", PROMPT, "-n", "6", "-no-cnv",
                           "--temp", "0", "--no-warmup", "--no-repack", "-lv", "4", *arguments], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, errors="replace", timeout=300,
                          env=dict(os.environ, GGML_BACKEND_PATH=plugin, THIMBLE_KV=kv + ",device=CPU+CPU"))
    return done.returncode, done.stdout.strip(), done.stderr


def cache_of(log):
    """MiB of the caches by device, those of the context that answers: the last of each."""
    return {device: float(mib) for device, mib in re.findall(r"(THIMBLE\d) KV buffer size = *([0-9.]+) MiB", log)}


def answered(what, *arguments):
    code, text, log = run(*arguments)
    check(code == 0, f"{what}: an answer{'' if code == 0 else log[-2000:]}")
    return text, log


both = ["--device", "THIMBLE0,THIMBLE1"]
alone, log = answered("one device", "--device", "THIMBLE0")
whole = cache_of(log)["THIMBLE0"]
check("Berlin" in alone, f"which is right: {alone[len(PROMPT):]!r}")

text, log = answered("layers, 3 to 1", *both, "--split-mode", "layer", "--tensor-split", "3,1")
check(text == alone, "with the text of one device")
mib = cache_of(log)
check(abs(sum(mib.values()) - whole) < 0.05 and 2 < mib["THIMBLE0"] / mib["THIMBLE1"] < 5, f"and the cache where its layers are: {mib}")

text, log = answered("one of two", *both, "--split-mode", "none", "--main-gpu", "1")
check(text == alone and cache_of(log) == {"THIMBLE1": whole}, f"all is on the main device: {cache_of(log)}")

text, log = answered("tensors", *both, "--split-mode", "tensor")
check("Berlin" in text, f"with the right text: {text[len(PROMPT):]!r}")
lines = re.findall(r"THIMBLE\d: KV cache of (\d+) layers: ([0-9.]+) MiB, ([0-9.]+) MiB as f16", log)
check(len(lines) >= 2 and all(float(coded) < 0.5 * float(exact) for _, coded, exact in lines), f"and each device's part is coded: {lines}")

code, _, log = run(*both, "--split-mode", "row")
check(code != 0 and "THIMBLE0 does not support split buffers" in log, "rows of weights over several devices are refused by name")
