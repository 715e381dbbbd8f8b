#!/usr/bin/env python3
"""Runs llama.cpp's test-llama-archs (random models of every architecture) on a plain device, on THIMBLE0 around it and on the
Meta device over THIMBLE0, each architecture in a process of its own. Fails where one passes on the plain device but neither
passes on THIMBLE0 nor is refused with a sentence, or passes on THIMBLE0 and fails on Meta. With --table, writes the outcome as Markdown.

With --coded, runs THIMBLE0 a second time with these settings, around the device and around the CPU, and fails where the device's
logits are more than twice as far from plain llama.cpp's on the CPU as coding and the plain device make them. The program's prompts
have 128 tokens, so a window= of less leaves cells to be coded.

--device CUDA0+CUDA1 takes a device of the plugin around each, and the Meta device over all of them.

usage: llama_archs.py <bin directory> [--device CPU] [--plugin libggml-thimble.so] [--kv bits=16,small=0] [--coded bits=4,small=0,window=16,pool=4]
       [--reads-codes] [--only REGEX] [--jobs 1] [--table table.md]
"""
import argparse
import collections
import concurrent.futures
import os
import re
import subprocess
import sys

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bin")
parser.add_argument("--device", default="CPU")
parser.add_argument("--plugin", help="instead of the one in the bin directory, to which it is held")
parser.add_argument("--kv", default="bits=16,small=0")
parser.add_argument("--coded")
parser.add_argument("--reads-codes", action="store_true", help="with --coded, fails where nothing was read from codes")
parser.add_argument("--only", default="")
parser.add_argument("--jobs", type=int, default=1)
parser.add_argument("--table")
args = parser.parse_args()

program = os.path.join(args.bin, "test-llama-archs")
for name in ("THIMBLE_KV", "GGML_BACKEND_PATH"):
    os.environ.pop(name, None)
Row = collections.namedtuple("Row", "outcome nmse")


def environment(device, kv=None, plugin=None):
    """That in which the program sees the plain devices, or those of the plugin around them."""
    plain = device.split("+")
    seen = [f"THIMBLE{i}" for i in range(len(plain))] if kv else dict.fromkeys(plain)
    env = dict(os.environ, LD_PRELOAD=os.path.join(args.bin, "libpreload_backends.so"),
               THIMBLE_TEST_ONLY_DEVICES=",".join(seen))
    if kv:
        env.update(THIMBLE_KV=f"{kv},device={device}", GGML_BACKEND_PATH=plugin or os.path.join(args.bin, "libggml-thimble.so"))
    return env


def run(arch, env, *more):
    """The program's output, without colours, its last sentence of a refusal, and its exit code."""
    command = [program, "--seed", "1", *more] + (["-a", arch] if arch else [])
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", timeout=600)
    except subprocess.TimeoutExpired:
        return "", "", "timeout"
    refusal = [l for l in done.stderr.splitlines() if "failed to initialize the context" in l or " thimble: " in l]
    # A thread of its own writes llama.cpp's log, which the table is part of; libpreload_backends waits for it.
    if not refusal and done.returncode == 0 and "Summary:" not in done.stdout:
        sys.exit(f"{arch}: the end of the output is missing")
    refusal = re.sub(r".*(initialize the context|thimble): ", "", refusal[-1]) if refusal else ""
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout), refusal, done.returncode


def rows(arch, env, *more):
    """{(arch, device, config): Row}, the device being 'plain', 'thimble' or 'meta', and the outcome 'OK', 'FAIL', 'SKIP' or
    'none'; the last sentence of a refusal, and the exit code."""
    out, refusal, code = run(arch, env, *more)
    found = collections.OrderedDict()
    for line in out.splitlines():
        cells = [c.strip() for c in line.split("|")[1:]]
        if len(cells) < 4 or cells[0].startswith("-") or cells[0] == "Model arch.":
            continue
        outcome, nmse = re.match(r"OK|FAIL|SKIP", cells[3]), re.search(r"\((\S+e\S+)\)", cells[3])
        outcome = outcome.group() if outcome else "none"
        if outcome == "OK" and len(cells) > 4 and cells[4].startswith("FAIL"):
            outcome = "FAIL"
        device = "meta" if cells[1] == "Meta" else "thimble" if cells[1].startswith("coded KV cache") else "plain"
        found[cells[0], device, cells[2]] = Row(outcome, float(nmse.group(1)) if nmse else None)
    return found, refusal, code


def ours(arch, device, kv):
    """The same on THIMBLE0. Where the program ended in the midst of a Meta row, the rows behind it are of a second run without."""
    found, refusal, code = rows(arch, environment(device, kv, args.plugin))
    if code not in (0, 1) and any(device == "meta" for _, device, _ in found):
        for key, row in rows(arch, environment(device, kv, args.plugin), "-b", "THIMBLE0")[0].items():
            if row.outcome != "none":
                found[key] = row
    return found, refusal, code


none = Row("none", None)
plain, _, _ = rows(args.only, environment(args.device))
archs = list(collections.OrderedDict.fromkeys(a for (a, d, c), row in plain.items() if d == "plain" and row.outcome == "OK"))
n_plain = sum(row.outcome == "OK" for (a, d, c), row in plain.items() if d == "plain")
if not archs:
    sys.exit(f"no architecture passed on {args.device}: nothing was tested")
pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
exact = {arch: pool.submit(ours, arch, args.device, args.kv) for arch in archs}
places = dict.fromkeys(((args.device, args.plugin), ("CPU", None)))
coded = {(arch, where): pool.submit(rows, arch, environment(where[0], args.coded, where[1]), "-b", "THIMBLE0")
         for arch in archs if args.coded for where in places}
table, failed, counts = [], [], collections.Counter()
for arch in archs:
    found, refusal, code = exact[arch].result()
    for (a, device, config), row in plain.items():
        if a != arch or device != "plain" or row.outcome != "OK":
            continue
        single, meta = (found.get((a, kind, config), none).outcome for kind in ("thimble", "meta"))
        if single == "none" and refusal:
            single = "refused"
        elif single == "OK" and meta == "none" and refusal:
            meta = "refused"
        counts["THIMBLE0 " + single] += 1
        counts["Meta " + meta] += 1
        if single not in ("OK", "refused"):
            failed.append(f"{arch} {config}: {single} (exit {code})")
        if single == "OK" and meta not in ("OK", "SKIP", "refused"):
            failed.append(f"{arch} {config}: Meta {meta} (exit {code}), "
                          f"{plain.get((a, 'meta', config), none).outcome} over {args.device}")
        cells = [arch, config, single, meta]
        if args.coded:
            wheres = ((args.device, args.plugin), ("CPU", None))
            at = [coded[arch, where].result()[0].get((a, "thimble", config), none).nmse for where in wheres]
            cells += [f"{nmse:.1e}" if nmse is not None else "none" for nmse in at]
            if single == "OK" and None in at:
                failed.append(f"{arch} {config}, {args.coded}: NMSE {cells[-2]}, on the CPU {cells[-1]}")
            elif None not in at and not at[0] <= 2 * (at[1] + row.nmse) + 1e-9:
                failed.append(f"{arch} {config}, {args.coded}: NMSE {at[0]:.1e}, on the CPU {at[1]:.1e}, f16's {row.nmse:.1e}")
            if args.reads_codes and None not in at and not min(at) > 10 * row.nmse:
                failed.append(f"{arch} {config}, {args.coded}: NMSE {at[0]:.1e}, on the CPU {at[1]:.1e}: nothing was read from codes")
            counts["coded " + ("none" if None in at else "OK")] += 1
        table.append(cells + [refusal if "refused" in (single, meta) else ""])

summary = ", ".join(f"{k}: {v}" for k, v in sorted(counts.items()))
print(f"{n_plain} rows pass on {args.device}; {summary}")
if args.table:
    head = ["architecture", "config", "THIMBLE0", "Meta over THIMBLE0",
            *([f"NMSE with {args.coded}", "the same on the CPU"] if args.coded else []), "why refused"]
    with open(args.table, "w") as f:
        f.write(f"<!-- Made by tests/plugin/llama_archs.py. -->\n{n_plain} rows pass on plain {args.device}. With "
                f"THIMBLE_KV=\"{args.kv}\": {summary}.\n\n")
        for cells in [head, ["---"] * len(head), *table]:
            f.write("| " + " | ".join(cells) + " |\n")
for line in failed:
    print("FAILED:", line)
sys.exit(1 if failed else 0)
