#!/usr/bin/env python3
"""Pictures from the JSON that `thimble eval --json` writes.

    python3 -m pip install -r tools/requirements.txt
    tools/report.py docs/quality/8k-*.json -o docs/quality/8k.svg

One panel for each measure, against the bytes that a token's keys and values take; lower is better in both.
"""
import argparse
import json

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "thimble"  # the same picture gives the same file
import matplotlib.pyplot as plt


def rows_of(paths):
    """(label, row, kilobytes a token) of every cache measured, each once; f16 of the first file stands for all."""
    seen = set()
    for path in paths:
        with open(path) as file:
            result = json.load(file)
        recipe = result["profile"].split(",")[0]
        for row in result["rows"]:
            ours = row["kv"][0].isdigit()
            label = f"{row['kv']} bits, {recipe}" if ours else row["kv"]
            if "sampled" in result["profile"] and ours:
                label += ", self-made text"
            if label in seen:
                continue
            seen.add(label)
            yield label, row, row["kv_bytes"] / result["context"] / 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="+")
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for label, row, size in rows_of(args.json):
        ours = row["kv"][0].isdigit()
        style = dict(marker="o" if ours else "s", color="C0" if ours else "C7")
        panels[0].plot(size, row["ppl_ratio"], **style)
        panels[0].annotate(label, (size, row["ppl_ratio"]), xytext=(5, 5), textcoords="offset points", fontsize=8)
        if row["kld_mean"] > 0:
            panels[1].plot(size, row["kld_mean"], **style)
            panels[1].annotate(label, (size, row["kld_mean"]), xytext=(5, 5), textcoords="offset points", fontsize=8)
    panels[0].set_ylabel("perplexity, f16 = 1")
    panels[1].set_ylabel("mean KL divergence from f16")
    panels[1].set_yscale("log")
    for panel in panels:
        panel.set_xlabel("kB a token")
        panel.set_xlim(left=0)
        panel.margins(x=0.2, y=0.15)
        panel.grid(alpha=0.3, which="both")
    figure.savefig(args.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
