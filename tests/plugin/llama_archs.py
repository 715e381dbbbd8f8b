#!/usr/bin/env python3
"""Runs llama.cpp's test-llama-archs (random models of every architecture) on the plain CPU, on THIMBLE0 and on the Meta
device over THIMBLE0, each architecture in a process of its own, and fails where one passes on the CPU but neither passes
on THIMBLE0 nor is refused with a sentence. With --table, writes the outcome as Markdown.

usage: llama_archs.py <bin directory> [--table table.md] [--kv bits=16,small=0]
"""
import argparse
import collections
import os
import re
import subprocess
import sys

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bin")
parser.add_argument("--table")
parser.add_argument("--kv", default="bits=16,small=0")
args = parser.parse_args()

program = os.path.join(args.bin, "test-llama-archs")
for name in ("THIMBLE_KV", "GGML_BACKEND_PATH"):
    os.environ.pop(name, None)
plain_env = dict(os.environ, LD_PRELOAD=os.path.join(args.bin, "libpreload_backends.so"))
plugin_env = dict(plain_env, THIMBLE_KV=args.kv, GGML_BACKEND_PATH=os.path.join(args.bin, "libggml-thimble.so"))


def run(arch, env):
    """The program's output, without colours, its last sentence of a refusal, and its exit code."""
    command = [program, "--seed", "1"] + (["-a", arch] if arch else [])
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=600)
    refusal = [l for l in done.stderr.splitlines() if "failed to initialize the context" in l or " thimble: " in l]
    # A thread of its own writes llama.cpp's log, which the table is part of; libpreload_backends waits for it.
    if not refusal and done.returncode == 0 and "Summary:" not in done.stdout:
        sys.exit(f"{arch}: the end of the output is missing")
    refusal = re.sub(r".*(initialize the context|thimble): ", "", refusal[-1]) if refusal else ""
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout), refusal, done.returncode


def rows(arch, env):
    """{(device, config): 'OK' | 'FAIL' | 'SKIP' | 'none'}, the last sentence of a refusal, and the exit code."""
    out, refusal, code = run(arch, env)
    found = collections.OrderedDict()
    for line in out.splitlines():
        cells = [c.strip() for c in line.split("|")[1:]]
        if len(cells) < 4 or cells[0].startswith("-") or cells[0] == "Model arch.":
            continue
        device = "meta" if cells[1] == "Meta" else "thimble" if cells[1].startswith("coded KV cache") else "cpu"
        outcome = re.match(r"OK|FAIL|SKIP", cells[3])
        outcome = outcome.group() if outcome else "none"
        if outcome == "OK" and len(cells) > 4 and cells[4].startswith("FAIL"):
            outcome = "FAIL"
        found[cells[0], device, cells[2]] = outcome
    return found, refusal, code


plain, _, _ = rows(None, plain_env)
archs = list(collections.OrderedDict.fromkeys(a for (a, d, c), o in plain.items() if d == "cpu" and o == "OK"))
n_cpu = sum(o == "OK" for (a, d, c), o in plain.items() if d == "cpu")
if not archs:
    sys.exit("no architecture passed on the CPU: nothing was tested")
table, failed = [], []
counts = collections.Counter()
for arch in archs:
    found, refusal, code = rows(arch, plugin_env)
    for (a, d, config), outcome in plain.items():
        if a != arch or d != "cpu" or outcome != "OK":
            continue
        ours = found.get((a, "thimble", config), "none")
        meta = found.get((a, "meta", config), "none")
        if ours == "none" and refusal:
            ours = "refused"
        elif ours == "OK" and meta == "none" and refusal:
            meta = "refused"
        counts["THIMBLE0 " + ours] += 1
        counts["Meta " + meta] += 1
        if ours not in ("OK", "refused"):
            failed.append(f"{arch} {config}: {ours} (exit {code})")
        table.append((arch, config, ours, meta, refusal if "refused" in (ours, meta) else ""))

print(f"{n_cpu} rows pass on the CPU; " + ", ".join(f"{k}: {v}" for k, v in sorted(counts.items())))
if args.table:
    with open(args.table, "w") as f:
        f.write(f"<!-- Made by tests/plugin/llama_archs.py. -->\n{n_cpu} rows pass on the plain CPU. With THIMBLE_KV=\"{args.kv}\": "
                + ", ".join(f"{k}: {v}" for k, v in sorted(counts.items())) + ".\n\n")
        f.write("| architecture | config | THIMBLE0 | Meta over THIMBLE0 | why refused |\n| --- | --- | --- | --- | --- |\n")
        for row in table:
            f.write("| " + " | ".join(row) + " |\n")
for line in failed:
    print("FAILED:", line)
sys.exit(1 if failed else 0)
