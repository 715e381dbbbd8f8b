#!/usr/bin/env python3
"""One model through both engines: with the CPU's and with the CUDA engine in emulation, a coded cache is about as far from f16.
All layers are coded, those with sliding windows too, and a prompt's cells are read from codes. The CPU engine
takes its scalar kernels, so that machines with different vector kernels run the same sums. At 4 bits any rounding
moves the divergence of so short a run (docs/results/models.md): a change of rounding may need another bound there.

usage: engines_test.py <thimble> <plugin with the emulated CUDA engine> <model> <text>
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile

thimble, emulated, model, text = sys.argv[1:]
n_decode = 24


def check(held, what):
    if not held:
        sys.exit("FAILED: " + what)
    print("ok: " + what, flush=True)


def measure(plugin, directory):
    """{cache: row of `thimble eval`}. Both are measured against the same f16 run."""
    out = os.path.join(directory, "rows.json")
    environment = {k: v for k, v in os.environ.items() if k not in ("THIMBLE_KV", "GGML_BACKEND_PATH")}
    environment.update({"GGML_BACKEND_PATH": plugin} if plugin else {"THIMBLE_ISA": "scalar"})
    done = subprocess.run([thimble, "eval", "-m", model, "-f", text, "-c", "128", "--decode", str(n_decode), "--small", "0", "--last",
                           "32", "--pool", "8", "--kv", "4,2", "-t", "1", "--exact-run", os.path.join(directory, "f16"), "--json", out],
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    check(done.returncode == 0, f"eval with {plugin or 'the CPU engine'}: {(done.stdout.strip().splitlines() or ['nothing said'])[-1]}")
    with open(out) as f:
        return {row["kv"]: row for row in json.load(f)["rows"]}


with tempfile.TemporaryDirectory() as directory:
    cpu, cuda = measure(None, directory), measure(emulated, directory)
for bits in ("4", "2"):
    at = [rows[bits]["kld_by_position"] for rows in (cpu, cuda)]
    means = [statistics.mean(values) for values in at]
    said = f"{bits} bits: mean KL divergence from f16 {means[0]:.5f} on the CPU engine, {means[1]:.5f} on the CUDA engine"
    check(len(at[0]) == len(at[1]) == n_decode and cpu[bits]["bits_per_value"] == cuda[bits]["bits_per_value"], f"{bits} bits: the same cache")
    check(min(means) > 1e-4 / float(bits), said + ": cells are coded")
    check(means[0] / 1.6 < means[1] < means[0] * 1.6, said)
    check(at[0] != at[1], f"{bits} bits: not the same engine twice")
