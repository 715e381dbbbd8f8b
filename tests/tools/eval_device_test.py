#!/usr/bin/env python3
"""`thimble eval --device`: the devices of llama.cpp and those of the plugin around them name the same caches, of which the
figures are the same; and `--batch`, which decodes several tokens at once.

usage: eval_device_test.py <thimble> <model> <text>
"""
import json
import os
import subprocess
import sys
import tempfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
from llama_server import check

thimble, model, text = sys.argv[1:]
n_decode = 24


def run(arguments, thimble_kv, out):
    command = [thimble, "eval", "-m", model, "-f", text, "-c", "256", "--decode", str(n_decode), "--small", "0", "--last", "32",
               "--pool", "8", "--kv", "2", "-t", "1", "--json", out, *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("THIMBLE_KV", "GGML_BACKEND_PATH")}
    if thimble_kv:
        environment["THIMBLE_KV"] = thimble_kv
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


with tempfile.TemporaryDirectory() as directory:
    out = os.path.join(directory, "eval.json")

    def measure(*arguments, thimble_kv=""):
        done = run(arguments, thimble_kv, out)
        check(done.returncode == 0, f"eval {' '.join(arguments)}: {done.stdout.strip().splitlines()[-1]}")
        with open(out) as f:
            return json.load(f)

    def figures(result):
        return [{k: v for k, v in row.items() if k != "decode_tok_s"} for row in result["rows"]]

    default = measure()
    exact, coded = default["rows"]
    check(default["device"] == "CPU" and default["batch"] == 1, "the CPU, a token at a time")
    check(coded["bits_per_value"] < 3 and 0 < coded["kld_mean"] < 1, f"2 bits are coded: {coded['kld_mean']:.4f}")
    for arguments, thimble_kv, device in ((["--device", "THIMBLE0"], "", "CPU"),
                                          (["--device", "THIMBLE0,THIMBLE1"], "device=CPU+CPU", "CPU,CPU")):
        result = measure(*arguments, thimble_kv=thimble_kv)
        check(result["device"] == device, f"{arguments[1]} is around {result['device']}")
        # f16 itself is measured on what the plugin's devices wrap.
        check(figures(result) == figures(default), f"{arguments[1]}: the figures of {device}")

    # Eight tokens attend together, over cells of which the same are coded but for the last few.
    batch = measure("--batch", "8")
    together = batch["rows"][1]
    check(batch["batch"] == 8 and len(together["kld_by_position"]) == n_decode, "of every token of a batch")
    check(abs(batch["rows"][0]["ppl"] / exact["ppl"] - 1) < 0.02, f"f16: {batch['rows'][0]['ppl']:.3f}, a token at a time {exact['ppl']:.3f}")
    check(coded["kld_mean"] / 2 < together["kld_mean"] < coded["kld_mean"] * 2,
          f"2 bits: {together['kld_mean']:.4f}, a token at a time {coded['kld_mean']:.4f}")
    streams = measure("--streams", "--parallel", "2", "--batch", "8")
    check(figures(streams)[1]["kld_mean"] == together["kld_mean"], "a stream of its own is as good as all of a unified cache")

    done = run(["--device", "NONE0"], "", out)
    check(0 < done.returncode < 128 and "--device NONE0: there is no such device" in done.stdout, done.stdout.strip().splitlines()[-1])
