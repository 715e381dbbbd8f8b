#!/usr/bin/env python3
"""Time and memory of calibration by a program with the plugin (THIMBLE_KV=calibrate=), beside `thimble calibrate` for the same
tokens: the two in turn, round by round, the files compared.

usage: calibrate_plugin.py [--rounds N] [--cells C] [--bytes B] [--threads T] <folder of thimble and the plugin> <llama-completion> <model> <text>

The program reads the text's first bytes as one prompt into a cache of C cells. Its own work is in its figures: it is started once
a round without calibrate=, too.
"""
import argparse
import filecmp
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("program")
parser.add_argument("model")
parser.add_argument("text")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--cells", type=int, default=8192)
parser.add_argument("--bytes", type=int, default=30000)
parser.add_argument("--threads", type=int, default=os.cpu_count())
args = parser.parse_args()
plugin = os.path.join(os.path.abspath(args.folder), "libggml-thimble.so")
cells, threads = str(args.cells), str(args.threads)


def measure(command, settings=None):
    """Seconds and peak resident MB of a command, and what it said."""
    environment = dict(os.environ)
    environment.pop("THIMBLE_KV", None)
    if settings:
        environment.update(GGML_BACKEND_PATH=plugin, THIMBLE_KV=settings)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        begin = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read()
    if process.returncode != 0:
        sys.exit(f"{command[0]} ends with {process.returncode}: {said[-2000:]}")
    return seconds, usage.ru_maxrss / 1024, said


with tempfile.TemporaryDirectory() as folder:
    # Both profiles name what was read: the text has the program's name.
    prompt = os.path.join(folder, os.path.basename(args.program))
    with open(args.text, encoding="utf-8") as source, open(prompt, "w", encoding="utf-8") as target:
        target.write(source.read(args.bytes).strip())
    by_plugin, by_command = os.path.join(folder, "plugin.gguf"), os.path.join(folder, "command.gguf")
    read = [args.program, "-m", args.model, "-fa", "on", "-no-cnv", "-f", prompt, "-c", cells, "-n", "1", "-t", threads]
    ways = {
        "thimble calibrate": lambda: measure([os.path.join(args.folder, "thimble"), "calibrate", "-m", args.model, "-f", prompt, "-o",
                                              by_command, "--window", cells, "-n", cells, "-t", threads]),
        "calibrate=": lambda: measure([*read, "--device", "THIMBLE0", "-ngl", "99"], f"calibrate={by_plugin}"),
        "the program alone": lambda: measure([*read, "--device", "none"]),
    }
    seconds, megabytes = {way: [] for way in ways}, {way: [] for way in ways}
    for n in range(args.rounds):
        for way, run in ways.items():
            took, peak, said = run()
            seconds[way].append(took)
            megabytes[way].append(peak)
            tokens = re.search(r"(\d+) tokens", said) if way == "thimble calibrate" else tokens
            print(f"round {n + 1}: {way}: {took:.1f} s, {peak:.0f} MB", flush=True)
    same = filecmp.cmp(by_plugin, by_command, shallow=False)
    print(f"\n{tokens[1]} tokens, {threads} threads; the profiles are {'the same' if same else 'NOT the same'}\n")
    print("| | s: median (range) | peak MB |\n| --- | --- | --- |")
    for way in ways:
        print(f"| {way} | {statistics.median(seconds[way]):.1f} ({min(seconds[way]):.1f} to {max(seconds[way]):.1f}) | "
              f"{statistics.median(megabytes[way]):.0f} |")
    ratios = [statistics.median(figure["calibrate="]) / statistics.median(figure["thimble calibrate"]) for figure in (seconds, megabytes)]
    print(f"\ncalibrate= over thimble calibrate: {ratios[0]:.2f} in time, {ratios[1]:.2f} in memory")
    sys.exit(0 if same else 1)
