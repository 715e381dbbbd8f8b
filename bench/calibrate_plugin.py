#!/usr/bin/env python3
"""Time and memory of calibration by a program with the plugin (THIMBLE_KV=calibrate=), beside `thimble calibrate` for the same
tokens: the two in turn, round by round, the files compared. Time is the processor's, which other programs on the machine
change little with one thread; by the clock it is shown, too.

usage: calibrate_plugin.py [--rounds N] [--cells C] [--bytes B] <folder of thimble and the plugin> <llama-completion> <model> <text>

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
args = parser.parse_args()
plugin = os.path.join(os.path.abspath(args.folder), "libggml-thimble.so")
cells = str(args.cells)


def measure(command, settings=None):
    """Seconds of the processor and by the clock, and peak resident MB of a command, and what it said."""
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
    return usage.ru_utime + usage.ru_stime, seconds, usage.ru_maxrss / 1024, said


with tempfile.TemporaryDirectory() as folder:
    # Both profiles name what was read: the text has the program's name.
    prompt = os.path.join(folder, os.path.basename(args.program))
    with open(args.text, encoding="utf-8") as source, open(prompt, "w", encoding="utf-8") as target:
        target.write(source.read(args.bytes).strip())
    by_plugin, by_command = os.path.join(folder, "plugin.gguf"), os.path.join(folder, "command.gguf")
    read = [args.program, "-m", args.model, "-fa", "on", "-no-cnv", "-f", prompt, "-c", cells, "-n", "1", "-t", "1"]
    ways = {
        "thimble calibrate": lambda: measure([os.path.join(args.folder, "thimble"), "calibrate", "-m", args.model, "-f", prompt, "-o",
                                              by_command, "--window", cells, "-n", cells, "-t", "1"]),
        "calibrate=": lambda: measure([*read, "--device", "THIMBLE0", "-ngl", "99"], f"calibrate={by_plugin}"),
        "the program alone": lambda: measure([*read, "--device", "none"]),
    }
    figures = {way: [] for way in ways}  # of each round: (seconds of the processor, by the clock, MB)
    for n in range(args.rounds):
        for way, run in ways.items():
            *figure, said = run()
            figures[way].append(figure)
            tokens = re.search(r"(\d+) tokens", said) if way == "thimble calibrate" else tokens
            print(f"round {n + 1}: {way}: {figure[0]:.1f} s ({figure[1]:.1f} by the clock), {figure[2]:.0f} MB", flush=True)
    same = filecmp.cmp(by_plugin, by_command, shallow=False)
    print(f"\n{tokens[1]} tokens, one thread; the profiles are {'the same' if same else 'NOT the same'}\n")
    print("| | s of the processor | s by the clock | peak MB |\n| --- | --- | --- | --- |")
    medians = {}
    for way in ways:
        columns = list(zip(*figures[way]))
        medians[way] = [statistics.median(column) for column in columns]
        print(f"| {way} | " + " | ".join(f"{median:.1f} ({min(column):.1f} to {max(column):.1f})"
                                         for median, column in zip(medians[way], columns)) + " |")
    ratios = [a / b for a, b in zip(medians["calibrate="], medians["thimble calibrate"])]
    print(f"\ncalibrate= over thimble calibrate: {ratios[0]:.2f} in time, {ratios[2]:.2f} in memory")
    sys.exit(0 if same else 1)
