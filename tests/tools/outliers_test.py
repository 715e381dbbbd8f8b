#!/usr/bin/env python3
"""Keys with the outliers that Qwen's have: calibrated codes hold where plain rotation collapses.

outliers_test.py THIMBLE OUTLIER_MODEL MODEL CALIBRATION_TEXT TEXT

Measures the same model with and without outliers (tests/support/outlier_model.cpp), each against its own f16 cache, with
calibrated 2-bit codes and with the uncalibrated codec, which only rotates.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

thimble, outlier_model, plain, calibration_text, text = sys.argv[1:]
context, n_decode, n_calibrate, iterations = 768, 64, 1024, 5


def run(*command):
    subprocess.run([str(part) for part in command], check=True)


def divergence(directory, model, *profile):
    result = directory / "result.json"
    run(thimble, "eval", "-m", model, "-f", text, "-c", context, "--decode", n_decode, "--first", 4, "--last", 32,
        "--small", 0, "-t", 1, "--exact-run", model.with_suffix(".f16"), "--kv", "2", "--json", result, *profile)
    rows = json.loads(result.read_text())["rows"]
    assert [row["kv"] for row in rows] == ["f16", "2"]
    return rows[1]["kld_mean"]


with tempfile.TemporaryDirectory() as name:
    directory = Path(name)
    outliers = directory / "outliers.gguf"
    run(outlier_model, plain, outliers)
    (directory / "plain.gguf").symlink_to(plain)
    kld = {}
    for model in ("plain", "outliers"):
        path, profile = directory / f"{model}.gguf", directory / f"{model}.profile"
        kld[model, "rotated"] = divergence(directory, path)  # before there is a profile beside the model
        run(thimble, "calibrate", "-m", path, "-f", calibration_text, "-o", profile, "-n", n_calibrate,
            "--window", n_calibrate // 2, "--context", 2048, "--bits", 2, "--even", "--iterations", iterations, "-t", 1)
        kld[model, "calibrated"] = divergence(directory, path, "--profile", profile)
    print({" ".join(k): round(v, 4) for k, v in kld.items()})
    assert kld["outliers", "calibrated"] < 2 * kld["plain", "calibrated"]
    assert kld["outliers", "rotated"] > 2 * kld["plain", "rotated"]
    assert kld["outliers", "rotated"] > 10 * kld["outliers", "calibrated"]
