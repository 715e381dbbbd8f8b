#!/usr/bin/env python3
"""`thimble eval --task all` on a small model in a short context, and `thimble report` on what it wrote: the figures are there, f16
does better than chance, and the page recommends a cache.

usage: eval_tasks_test.py <thimble> <model> <profile>
"""
import json
import os
import subprocess
import sys
import tempfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
from llama_server import check

thimble, model, profile = sys.argv[1:]
context, n_decode = 512, 16


def run(*arguments):
    return subprocess.run([thimble, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


with tempfile.TemporaryDirectory() as directory:
    measured, page = os.path.join(directory, "eval.json"), os.path.join(directory, "page.html")
    # Small caches stay f16 by default.
    done = run("eval", "-m", model, "--profile", profile, "--task", "all", "-c", str(context), "--decode", str(n_decode), "--small", "0",
               "--kv", "2", "--ruler", "niah_single_2", "-t", "1", "--json", measured)
    print(done.stdout)
    check(done.returncode == 0, "eval ends well")
    with open(measured) as f:
        results = {result["task"]: result for result in json.load(f)["results"]}
    check(list(results) == ["generate", "ruler", "tools"], f"{list(results)} without a text")
    for task, result in results.items():
        exact, coded = result["rows"]
        check((exact["kv"], coded["kv"]) == ("f16", "2"), f"{task}: f16 and 2 bits")
        check(coded["bits_per_value"] < 3 and coded["kv_bytes"] < exact["kv_bytes"], f"{task}: the cache is coded")

    exact, coded = results["generate"]["rows"]
    check(exact["kld_mean"] == 0 and exact["kld_growth"] is None, "f16 does not differ from itself")
    check(0 < coded["kld_mean"] < 1, f"2 bits do: {coded['kld_mean']:.4f}")
    check(len(coded["kld_by_position"]) == n_decode, "of every token that was written")
    quarters = [sum(coded["kld_by_position"][i:i + 4]) / 4 for i in range(0, n_decode, 4)]
    check(all(abs(a - b) < 1e-9 for a, b in zip(quarters, coded["kld_by_quarter"])), f"by quarter: {quarters}")
    check(abs(coded["kld_growth"] - quarters[3] / quarters[0]) < 1e-6, f"growth {coded['kld_growth']:.3f}")
    # f16 wrote the text by its greatest probabilities, so each token's is above chance by far.
    check(max(exact["log_p"]) <= 0 and sum(exact["log_p"]) / n_decode > -4, "the text is f16's own")

    exact, coded = results["ruler"]["rows"]
    check([t["task"] for t in exact["by_task"]] == ["niah_single_2"], "the task that was asked for")
    for row in (exact, coded):
        check(row["score"] > row["chance"] + 0.3, f"RULER, {row['kv']}: {row['score']:.3f} where chance is {row['chance']:.3f}")

    exact, coded = results["tools"]["rows"]
    check([v["value"] for v in exact["by_value"]] == ["function", "id", "town", "price"], "values of a call")
    check(exact["score"] > exact["chance"] + 0.3, f"tools, f16: {exact['score']:.3f} where chance is {exact['chance']:.3f}")
    check(exact["parses"] == 1, "f16's call is JSON")

    done = run("report", measured, "-o", page)
    check(done.returncode == 0 and ("Take --kv 2" in done.stdout or "Keep f16" in done.stdout), f"report: {done.stdout.strip()}")
    with open(page) as f:
        html = f.read()
    check(html.startswith("<!DOCTYPE html>") and done.stdout.splitlines()[0].split(":")[0] in html, "the page says the same")

    for said, *arguments in [("--context", "eval", "-m", model, "--task", "ruler", "-c", "100", "--kv", "f16"),
                             ("needs a context of", "eval", "-m", model, "--task", "tools", "-c", "100", "--kv", "f16"),
                             ("smaller than the context", "eval", "-m", model, "--task", "generate", "-c", "64", "--decode", "64", "--kv", "f16"),
                             ("is no JSON", "report", os.path.abspath(__file__)),
                             ("cannot read", "report", os.path.join(directory, "none.json"))]:
        done = run(*arguments)
        check(0 < done.returncode < 128 and said in done.stdout, f"{' '.join(arguments[:1])}: {done.stdout.strip().splitlines()[-1]}")
