#!/usr/bin/env python3
"""A model most of whose layers have sliding windows (gemma-3-270m), without a profile: the layers that see everything are
coded, the windows stay f16 and `doctor` says why; 4 bits stay close to f16, and not so close that nothing was coded.

usage: window_model_test.py <thimble> <model> <text>
"""
import json
import os
import re
import subprocess
import sys
import tempfile

thimble, model, text = sys.argv[1:]
context = "2048"  # more cells than `small`


def check(held, what):
    if not held:
        sys.exit("FAILED: " + what)
    print("ok: " + what)


with tempfile.TemporaryDirectory() as directory:
    plain = os.path.join(directory, "model.gguf")  # no profile lies beside it
    os.symlink(os.path.abspath(model), plain)
    environment = {k: v for k, v in os.environ.items() if k != "THIMBLE_KV"}
    doctor = subprocess.run([thimble, "doctor", "-m", plain, "-c", context], check=True, env=environment, stdout=subprocess.PIPE,
                            text=True).stdout
    check(re.search(r"4 bits .*: 3 layers coded, .*; 15 stay f16, .*: sliding windows", doctor), "3 layers of 18 are coded")
    # A batch as large as the context leaves the windows' cache no smaller than the other.
    for ubatch in ("64", context):
        done = subprocess.run([thimble, "run", "--kv", "4", "-m", plain, "-p", "Once", "-n", "1", "-c", context, "-b", context, "-ub",
                               ubatch, "-no-cnv"], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace")
        check(done.returncode == 0 and "KV cache of 3 layers" in done.stdout and "15 layers stay f16" in done.stdout,
              f"the same with batches of {ubatch}: " + " ".join(re.findall("thimble: KV.*", done.stdout)))
    rows = os.path.join(directory, "rows.json")
    subprocess.run([thimble, "eval", "-m", plain, "-f", text, "-c", context, "--decode", "32", "--kv", "4", "--json", rows],
                   check=True)
    with open(rows) as f:
        four = next(row for row in json.load(f)["rows"] if row["kv"] == "4")
    check(1e-4 < four["kld_mean"] < 0.03, f"at 4 bits the divergence from f16 is {four['kld_mean']:.4f}")
