#!/usr/bin/env python3
"""`thimble bench`: every cache has a row at each depth, with its ratios to f16; with --sequences, the context has room for all
of them, in one stream or in a stream each, and a batch decodes a token of each.

usage: bench_test.py <thimble> <model>
"""
import json
import os
import subprocess
import sys
import tempfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
from llama_server import check

thimble, model = sys.argv[1:]
DEPTHS = [0, 270]
N_PROMPT = 16


def bench(*arguments):
    """The rows, by depth and cache."""
    with tempfile.TemporaryDirectory() as directory:
        out = os.path.join(directory, "bench.json")
        done = subprocess.run([thimble, "bench", "-m", model, "--depths", ",".join(map(str, DEPTHS)), "--kv", "f16,2", "--small", "0",
                               "--decode", "2", "--prompt", str(N_PROMPT), "--rounds", "1", "-t", "1", "--json", out, *arguments],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        check(done.returncode == 0, f"bench {' '.join(arguments)} ends well: {done.stdout.strip().splitlines()[-1]}")
        with open(out) as f:
            rows = {(row["depth"], row["kv"]): row for row in json.load(f)["rows"]}
    check(set(rows) == {(depth, kv) for depth in DEPTHS for kv in ("f16", "2")}, "a row for each cache and depth")
    check(all(rows[depth, "f16"][ratio] == 1 for depth in DEPTHS for ratio in ("decode_over_f16", "prompt_over_f16")),
          "f16 is as fast as itself")
    return rows


def padded(n_cells):
    return (n_cells + 255) // 256 * 256


of_a_sequence = DEPTHS[-1] + N_PROMPT
one = bench()[0, "f16"]
cell = one["kv_bytes"] / padded(of_a_sequence)
for n, flags, n_cells in ((3, [], padded(3 * of_a_sequence)), (5, ["--streams"], 5 * padded(of_a_sequence))):
    rows = bench("--sequences", str(n), *flags)
    f16, coded = rows[0, "f16"], rows[0, "2"]
    check(abs(f16["kv_bytes"] / (n_cells * cell) - 1) < 0.01, f"the cache has room for {n} sequences: {f16['kv_bytes'] / cell:.0f} cells")
    check(coded["kv_bytes"] < f16["kv_bytes"], "and a coded one for fewer bytes")
    check(rows[270, "2"]["sequences"] == n, f"{n} sequences decode")

rows = bench("--read", "100")
check(all(len(row["step_ms"]) == 2 for row in rows.values()), "depths of copied cells have rows")
done = subprocess.run([thimble, "bench", "-m", model, "--read", "100", "--streams"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                      text=True)
check(done.returncode != 0 and "--read" in done.stdout, "copies in more than one stream are refused")

done = subprocess.run([thimble, "bench", "-m", model, "--sequences", "0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
check(done.returncode != 0 and "--sequences" in done.stdout, "no sequence is refused")
