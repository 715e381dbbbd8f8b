#!/usr/bin/env python3
"""Decoding over ggml's RPC: a far end with an f16 cache, and one with the plugin, in turn. Both ends run on this machine, over loopback;
the near ends are llama-server without the plugin. Prints tokens/s of each round and the ratio of medians.

usage: rpc.py <llama-server> <rpc-server> <libggml-rpc.so> <plugin> <preload_backends> <model> [--kv bits=2] [--depth 4096]
       [--tokens 32] [--rounds 5] [--threads 1]

The programs and libraries are those of the test `rpc` (build/bin/rpc), or of an llama.cpp that was built with RPC.
"""
import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "support"))
from server_process import ServerProcess  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("llama_server", "rpc_server", "rpc_library", "plugin", "preload_backends", "model"):
    parser.add_argument(name)
parser.add_argument("--kv", default="bits=2")
for name, value in (("depth", 4096), ("tokens", 32), ("rounds", 5), ("threads", 1)):
    parser.add_argument("--" + name, type=int, default=value)
args = parser.parse_args()
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples", "gpl-3.0.txt")) as f:
    text = f.read()


class Pair:
    """A far end and the near end that has all layers there. `kv`: the plugin's settings, or None for f16 on the CPU."""

    def __init__(self, kv):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        environment = dict(os.environ)
        if kv:
            environment.update(GGML_BACKEND_PATH=os.path.abspath(args.plugin), THIMBLE_KV=kv)
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        self.far = subprocess.Popen([os.path.abspath(args.rpc_server), "-d", "THIMBLE0" if kv else "CPU", "-p", str(port), "-t", str(args.threads)],
                                    env=environment, cwd=os.path.dirname(os.path.abspath(args.rpc_library)), stdout=self.log,
                                    stderr=subprocess.STDOUT)
        time.sleep(3)
        near = dict(os.environ, LD_PRELOAD=os.path.abspath(args.preload_backends), GGML_BACKEND_PATH=os.path.abspath(args.rpc_library))
        self.near = ServerProcess([args.llama_server, "-m", args.model, "--rpc", f"127.0.0.1:{port}", "--device", "RPC0", "-ngl", "99",
                                   "-fa", "on", "-c", str(args.depth + 512), "-np", "1", "-t", str(args.threads), "--no-repack", "-cram", "0"],
                                  near).__enter__()

    def fill(self):
        tokens = self.near.request("/tokenize", {"content": text})["tokens"][:args.depth]
        self.prompt = tokens
        return self.decode(1)

    def decode(self, n):
        answer = self.near.request("/completion", {"prompt": self.prompt, "n_predict": n, "temperature": 0, "ignore_eos": True,
                                                   "cache_prompt": True, "id_slot": 0})
        if answer["tokens_predicted"] != n:
            raise AssertionError("too few tokens were made")
        return answer["timings"]["predicted_per_second"]

    def said(self):
        self.log.seek(0)
        return self.log.read()

    def end(self):
        self.near.stop()
        self.far.kill()
        self.far.wait()


pairs = {"f16": Pair(None), args.kv: Pair(args.kv)}
try:
    for pair in pairs.values():
        pair.fill()
    if "KV cache of" not in pairs[args.kv].said():
        sys.exit("the far end did not code the cache:\n" + pairs[args.kv].said())
    speeds = {name: [] for name in pairs}
    for _ in range(args.rounds):
        for name, pair in pairs.items():
            speeds[name].append(pair.decode(args.tokens))
    for name, values in speeds.items():
        print(f"{name:>8}: {statistics.median(values):.2f} tokens/s at depth {args.depth}, rounds " + " ".join(f"{v:.2f}" for v in values))
    ratios = sorted(coded / exact for exact, coded in zip(speeds["f16"], speeds[args.kv]))
    print(f"{args.kv} over f16, of each round: median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}")
finally:
    for pair in pairs.values():
        pair.end()
