#!/usr/bin/env python3
"""The same seed gives the same calibration file, another seed another; on text that the model writes itself too.

calibrate_file_test.py THIMBLE MODEL TEXT
"""
import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

thimble, model, text = sys.argv[1:]


def calibrate(output, seed, *source):
    # Small: a few windows of text, one rate.
    subprocess.run([thimble, "calibrate", "-m", model, "-o", output, "--seed", str(seed), "-n", "256", "--window", "64",
                    "--context", "4096", "--bits", "2", "--even", "--iterations", "2", "-t", "1", *source], check=True)
    assert output.stat().st_size > 100_000, "hardly a profile"


with tempfile.TemporaryDirectory() as directory:
    for name, source in (("read", ["-f", text]), ("sampled", [])):
        first, again, other = (Path(directory) / f"{name}-{i}.gguf" for i in range(3))
        calibrate(first, 1, *source)
        calibrate(again, 1, *source)
        calibrate(other, 2, *source)
        assert filecmp.cmp(first, again, shallow=False), f"{name}: two files of one seed differ"
        assert not filecmp.cmp(first, other, shallow=False), f"{name}: the seed does not matter"
