#!/usr/bin/env python3
"""Whether llama-server answers alike with a model on one device of the plugin, with its layers on two and with its tensors split
over two: the next token's KL divergence from f16's on one device. A slot that was saved on two devices is restored on one, and
the other way round.

usage: two_gpus_server.py <bin directory of a build> <model> [--one CUDA0] [--two CUDA0,CUDA1] [--kv 4,2]
"""
import argparse
import math
import os
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "support"))
from server_process import ServerProcess  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bin")
parser.add_argument("model")
parser.add_argument("--one", default="CUDA0")
parser.add_argument("--two", default="CUDA0,CUDA1")
parser.add_argument("--kv", default="4,2")
args = parser.parse_args()

LIMITS = {"4": 0.08, "2": 0.20}  # KL divergence from f16's
SAME = 0.02                      # of a restored slot from what it was
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples", "gpl-3.0.txt")) as f:
    prompt = f.read()[:4000]
failed = 0


def serve(kv, devices, split, states):
    environment = dict(os.environ)
    names = devices
    if kv != "f16":
        environment.update(GGML_BACKEND_PATH=os.path.join(args.bin, "libggml-thimble.so"),
                           THIMBLE_KV=f"bits={kv},small=0,device={devices.replace(',', '+')}")
        names = ",".join(f"THIMBLE{i}" for i in range(len(devices.split(","))))
    elif devices.split(",")[0] == "CPU":
        names = "none"
    return ServerProcess([os.path.join(args.bin, "llama-server"), "-m", args.model, "-c", "4096", "-np", "1", "--host", "127.0.0.1",
                          "-t", "4", "-fa", "on", "-ngl", "99", "--device", names, "--split-mode", split,
                          "--slot-save-path", states], environment)


def ask(server):
    answer = server.request("/completion", {"prompt": prompt, "n_predict": 1, "temperature": 0, "id_slot": 0, "n_probs": 200})
    return {t["id"]: t["logprob"] for t in answer["completion_probabilities"][0]["top_logprobs"]}


def kl(p, q):
    return sum(math.exp(a) * (a - q.get(token, -25.0)) for token, a in p.items())


def report(name, figure, limit):
    global failed
    failed += figure > limit
    print(f"server: {name}: KL {figure:.4f}{'' if figure <= limit else f', MORE THAN {limit}'}", flush=True)


with tempfile.TemporaryDirectory() as states:
    with serve("f16", args.one, "layer", states) as server:
        exact = ask(server)
    for kv in args.kv.split(","):
        answers = {}
        for place, devices, split in (("one", args.one, "layer"), ("layers", args.two, "layer"), ("tensors", args.two, "tensor")):
            try:
                with serve(kv, devices, split, states) as server:
                    answers[place] = ask(server)
                    server.request("/slots/0?action=save", {"filename": f"{kv}-{place}"})
                    for source in [p for p in answers if p != place and "tensors" not in (p, place)]:
                        server.request("/slots/0?action=restore", {"filename": f"{kv}-{source}"})
                        report(f"{kv} bits, saved on {source}, restored on {place}, from before", kl(answers[source], ask(server)), SAME)
            except (AssertionError, OSError, KeyError) as error:
                failed += 1
                said = str(error).strip().splitlines()
                print(f"server: {kv} bits, {place}: FAILED: {said[-1] if said else error!r}", flush=True)
                continue
            report(f"{kv} bits, {place}, from f16 on {args.one}", kl(exact, answers[place]), LIMITS.get(kv, 0.2))
sys.exit(1 if failed else 0)
