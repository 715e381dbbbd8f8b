#!/usr/bin/env python3
"""Decoding speed of two builds beside one another: `thimble serve` of each has a prompt of --depth tokens in its cache, and they
answer in turn, so that what else a machine does meets both alike. Prints each build's tokens/s and the ratio, pair by pair, of
the second to the first.

usage: serve_pairs.py <thimble of one build> <thimble of another> -m MODEL -f TEXT [--profile GGUF] [--kv 2] [--depth 8000]
       [--pairs 30] [--decode 100] [-t 2]

Run it on idle cores; under `chrt -f 10` the servers, which inherit it, are not interrupted by other programs.
"""
import argparse
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from server_process import ServerProcess  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("thimble", nargs=2)
parser.add_argument("-m", "--model", required=True)
parser.add_argument("-f", "--text", required=True)
parser.add_argument("--profile")
parser.add_argument("--kv", default="2")
parser.add_argument("--depth", type=int, default=8000)
parser.add_argument("--pairs", type=int, default=30)
parser.add_argument("--decode", type=int, default=100)
parser.add_argument("-t", "--threads", type=int, default=2)
args = parser.parse_args()


def command(thimble):
    # More cells than `small`, so that a cache at depth 0 is coded, too.
    return [thimble, "serve", "-m", args.model, "--kv", args.kv, *(["--profile", args.profile] if args.profile else []), "-np", "1",
            "-c", str(max(args.depth + 2048, 10048)), "-t", str(args.threads)]


def answer(server, prompt):
    body = {"prompt": prompt, "n_predict": args.decode, "cache_prompt": True, "temperature": 0, "ignore_eos": True}
    return server.request("/completion", body)["timings"]["predicted_per_second"]


with ServerProcess(command(args.thimble[0]), os.environ) as one, ServerProcess(command(args.thimble[1]), os.environ) as other:
    text = Path(args.text).read_text(errors="replace")
    prompt = one.request("/tokenize", {"content": text[:args.depth * 8]})["tokens"][:args.depth] or "Once upon a time"
    servers = [one, other]
    for server in servers:
        answer(server, prompt)  # reads the prompt
    speeds = {id(server): [] for server in servers}
    for i in range(args.pairs):
        for server in servers if i % 2 else servers[::-1]:
            speeds[id(server)].append(answer(server, prompt))
for thimble, server in zip(args.thimble, servers):
    own = speeds[id(server)]
    print(f"{thimble}: {statistics.median(own):.1f} [{min(own):.1f}, {max(own):.1f}] tokens/s")
ratios = sorted(b / a for a, b in zip(speeds[id(one)], speeds[id(other)]))
print(f"second over first: {statistics.median(ratios):.3f}, quartiles {ratios[len(ratios) // 4]:.3f} and {ratios[3 * len(ratios) // 4]:.3f}")
