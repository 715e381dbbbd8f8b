#!/usr/bin/env python3
"""The same seed gives the same calibration file, another seed another; on text that the model writes itself too. Chats are
read.

calibrate_file_test.py THIMBLE MODEL TEXT
"""
import filecmp
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

thimble, model, text = sys.argv[1:]


def calibrate(output, seed, *source):
    """Returns what was printed."""
    # Small: a few windows of text, one rate.
    done = subprocess.run([thimble, "calibrate", "-m", model, "-o", output, "--seed", str(seed), "-n", "256", "--window", "64",
                    "--context", "4096", "--bits", "2", "--even", "--iterations", "2", "-t", "1", *source], check=True,
                          stdout=subprocess.PIPE, text=True)
    assert output.stat().st_size > 100_000, "hardly a profile"
    return done.stdout


with tempfile.TemporaryDirectory() as directory:
    for name, source in (("read", ["-f", text]), ("sampled", [])):
        first, again, other = (Path(directory) / f"{name}-{i}.gguf" for i in range(3))
        calibrate(first, 1, *source)
        calibrate(again, 1, *source)
        calibrate(other, 2, *source)
        assert filecmp.cmp(first, again, shallow=False), f"{name}: two files of one seed differ"
        assert not filecmp.cmp(first, other, shallow=False), f"{name}: the seed does not matter"

    chats = Path(directory) / "chats"
    chats.mkdir()
    turns = [{"role": role, "content": Path(text).read_text()[:500]} for role in ("user", "assistant")]
    (chats / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    printed = calibrate(Path(directory) / "chats.gguf", 1, "--texts", chats)
    # Of 256 tokens, 16 would be the model's own; of the chat, three windows of 64 fit into the rest.
    n_tokens = int(re.search(r"2 kinds of text, (\d+) tokens", printed)[1])
    assert n_tokens >= 3 * 64, f"{n_tokens} tokens: the chat was not read"
