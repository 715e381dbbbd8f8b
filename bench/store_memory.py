#!/usr/bin/env python3
"""Memory of a long context as the system sees it: f16, and retrieval with its exact store in RAM and in a file.

usage: store_memory.py <build/bin/thimble> <model> [<profile>] [--cells 8192] [--dir DIR]

Fills contexts of 2048 and of `--cells` cells with a prompt, and looks at /proc/<pid>/status and the store's file while the
answer is written. The difference is what cells take; what does not grow with them is the first of the two: the weights,
a calibration's tables (14 MB for SmolLM2), buffers. Batches are small (-ub 128), as llama.cpp's mask of a batch grows
with the cells, too.
"""
import argparse
import os
import re
import subprocess
import tempfile
import threading
import time

parser = argparse.ArgumentParser()
parser.add_argument("thimble")
parser.add_argument("model")
parser.add_argument("profile", nargs="?")
parser.add_argument("--cells", type=int, default=8192)
parser.add_argument("--dir", default="/var/tmp", help="of the store's file: on a disk, not in memory")
options = parser.parse_args()

here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, "..", "examples", "gpl-3.0.txt")) as f:
    text = f.read()


FEW = 2048


def status(pid):
    """MiB: anonymous memory, and what is mapped of files."""
    with open(f"/proc/{pid}/status") as f:
        found = dict(re.findall(r"(Rss\w+):\s+(\d+) kB", f.read()))
    return int(found["RssAnon"]) / 1024, (int(found["RssFile"]) + int(found["RssShmem"])) / 1024


def stores(pid):
    """MiB of disk that unlinked files of the process take."""
    blocks = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            if "(deleted)" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                blocks += os.stat(f"/proc/{pid}/fd/{fd}").st_blocks
        except OSError:
            pass
    return blocks / 2048


def measure(kv, cells, extra=()):
    """The greatest values while a context of `cells` cells is filled and an answer is written."""
    n_chars = int(cells * 4.2)  # a little less than the context holds
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompt:
        prompt.write((text * (n_chars // len(text) + 1))[:n_chars])
        prompt.flush()
        command = [options.thimble, "run", "--kv", kv, *extra, "-m", options.model, "-f", prompt.name, "-c", str(cells),
                   "-n", "16", "--temp", "0", "-no-cnv", "-ub", "128", "-t", str(os.cpu_count())]
        if options.profile and kv != "f16":
            command[4:4] = ["--profile", options.profile]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        log = []
        reader = threading.Thread(target=lambda: log.extend(process.stderr))
        reader.start()
        most = (0, 0, 0)
        while process.poll() is None:
            try:
                most = max(most, (*status(process.pid), stores(process.pid)), key=lambda m: m[0] + m[1])
            except (OSError, KeyError):
                pass
            time.sleep(0.05)
        reader.join()
        if process.returncode != 0:
            raise SystemExit("".join(log[-20:]))
        return most


if __name__ == "__main__":
    print(f"MiB with {options.cells} cells, and what the cells behind the first {FEW} added")
    print(f"{'cache':22} {'anonymous':>10} {'added':>8} {'over f16':>9} {'file pages':>11} {'file on disk':>13}")
    f16 = None
    for name, kv, extra in (("f16", "f16", ()), ("2", "2", ()), ("2+64, store in RAM", "2+64", ()),
                            ("2+64, store in a file", "2+64", ("--store", options.dir))):
        few, many = measure(kv, FEW, extra), measure(kv, options.cells, extra)
        added = many[0] - few[0]
        f16 = f16 or added
        print(f"{name:22} {many[0]:10.1f} {added:8.1f} {added / f16:9.3f} {many[1]:11.1f} {many[2]:13.1f}", flush=True)
