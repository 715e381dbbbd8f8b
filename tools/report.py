#!/usr/bin/env python3
"""Pictures from the JSON that `thimble eval --json` writes.

    python3 -m pip install -r tools/requirements.txt
    tools/report.py docs/results/quality/*.json                          # tables
    tools/report.py docs/results/quality/*.json -o docs/results/quality  # pictures

draws those that the files have numbers for:
    <context>-ppl.svg      perplexity and KL divergence of every cache against the bytes of a token
    position.svg           KL divergence by position, of every context
    layer.svg              KL divergence with one layer coded at a time
    <task>-<context>.svg   scores of the needle tasks by depth
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "thimble"  # the same picture gives the same file
matplotlib.rcParams["svg.fonttype"] = "none"
import matplotlib.pyplot as plt

POSITIONS_A_POINT = 32


def label(result, row):
    """A row's name in a picture."""
    if row["method"] == "llama.cpp":
        return row["kv"]
    if row["method"] == "tailorkv":
        return f"TailorKV, {row['kv'].split('+')[1]} cells"
    name = row["kv"] if "+" in row["kv"] else row["kv"] + (" bit" if row["kv"] == "1" else " bits")
    if "+" in row["kv"] and result.get("policy", "all") != "all":
        name += ", policy=" + result["policy"]
    published = {"vecinfer": "VecInfer", "oscar": "OSCAR", "kvarn": "KVarN"}
    if row["method"] in published:
        return f"{name}, {published[row['method']]}"
    return name + (", self-made text" if "sampled" in result["profile"] else "")


def rows_of(results, *needed):
    """(label, result, row) of every row that has what is needed, each label once."""
    seen = set()
    for result in results:
        for row in result["rows"]:
            name = label(result, row)
            if name not in seen and all(key in row for key in needed):
                seen.add(name)
                yield name, result, row


def save(figure, path):
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def draw_ppl(results, context, path):
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, result, row in rows_of(results, "ppl_ratio"):
        size = row["kv_bytes"] / context / 1000
        colour = {"llama.cpp": "C7", "thimble": "C0"}.get(row["method"], "C1")
        style = dict(marker="^" if "+" in row["kv"] else "o", color=colour, linestyle="none")
        note = dict(xytext=(5, 4), textcoords="offset points", fontsize=7)
        panels[0].errorbar(size, row["ppl_ratio"], yerr=row["ppl_ratio_error"], elinewidth=0.7, **style)
        panels[0].annotate(name, (size, row["ppl_ratio"]), **note)
        if row["kld_mean"] > 0:
            panels[1].plot(size, row["kld_mean"], **style)
            panels[1].annotate(name, (size, row["kld_mean"]), **note)
    panels[0].set_ylabel("perplexity, f16 = 1, with standard error")
    panels[1].set_ylabel("mean KL divergence from f16")
    panels[1].set_yscale("log")
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlabel("kB a token next to the compute")
        panel.margins(x=0.25, y=0.12)
        panel.grid(alpha=0.3, which="both")
    save(figure, path)


def draw_positions(by_context, path):
    figure, panels = plt.subplots(1, len(by_context), figsize=(5.5 * len(by_context), 4), layout="constrained",
                                  sharey=True, squeeze=False)
    for panel, (context, results) in zip(panels[0], sorted(by_context.items())):
        for name, result, row in rows_of(results, "kld_by_position"):
            values = row["kld_by_position"]
            if row["method"] not in ("thimble", "vecinfer") or not any(values):
                continue
            starts = range(0, len(values) - POSITIONS_A_POINT + 1, POSITIONS_A_POINT)
            means = [sum(values[s:s + POSITIONS_A_POINT]) / POSITIONS_A_POINT for s in starts]
            panel.plot([context - len(values) + s + POSITIONS_A_POINT / 2 for s in starts], means, label=name)
        panel.set_yscale("log")
        panel.set_xlabel("position")
        panel.set_title(f"{context} tokens", fontsize=10)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0][0].set_ylabel(f"KL divergence from f16, mean of {POSITIONS_A_POINT}")
    save(figure, path)


def draw_layers(results, path):
    figure, panel = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, result, row in rows_of(results, "kld_by_layer"):
        panel.plot(row["kld_by_layer"], marker=".", label=name)
    panel.set_yscale("log")
    panel.set_xlabel("the layer that is coded")
    panel.set_ylabel("mean KL divergence from f16")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    save(figure, path)


def draw_needle(results, path):
    rows = list(rows_of(results, "by_depth"))
    depths = [d["depth"] for d in rows[0][2]["by_depth"]]
    scores = [[d["score"] for d in row["by_depth"]] for _, _, row in rows]
    figure, panel = plt.subplots(figsize=(7, 0.4 * len(rows) + 1.2), layout="constrained")
    image = panel.imshow(scores, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    for y, line in enumerate(scores):
        for x, score in enumerate(line):
            panel.text(x, y, f"{score:.2f}", ha="center", va="center", fontsize=7, color="w" if score < 0.6 else "k")
    panel.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    panel.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    panel.set_xlabel("depth of the key")
    figure.colorbar(image, label="probability of right digits")
    save(figure, path)


def read_results(paths):
    """The results of all files in order; those of other tasks than these pictures' are left to `thimble report`."""
    results = []
    for path in sorted(paths):
        content = json.loads(path.read_text())
        for result in content.get("results", [content]):
            if result.get("task") in ("text", "needle", "multikey"):
                results.append(result)
            else:
                print(f"{path}: {result.get('task', 'no task')} is left out; thimble report shows it", file=sys.stderr)
    return results


def print_tables(results):
    """The rows as Markdown."""
    for result in results:
        print(f"\n{result['task']}, {result['context']} tokens, by the {result['by']}; profile: {result['profile']}")
        for row in result["rows"]:
            size = row["kv_bytes"] / result["context"] / 1000
            start = f"| {label(result, row)} | {row['bits_per_value']:.2f} | {size:.1f} |"
            if "ppl" in row:
                print(f"{start} {row['ppl_ratio']:.4f} ± {row['ppl_ratio_error']:.4f} | {row['kld_mean']:.4f} | "
                      f"{row['kld_p99']:.3f} | {row['top1_agreement']:.3f} |")
            else:
                depths = " | ".join(f"{depth['score']:.3f}" for depth in row["by_depth"])
                print(f"{start} {row['score']:.4f} | {row['score_ratio']:.4f} | {row['first_digit']:.3f} | "
                      f"{row['found']:.2f} | {depths} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="directory of the pictures; without it, tables as Markdown")
    args = parser.parse_args()
    if not args.output:
        print_tables(read_results(args.json))
        return
    texts, needles = {}, {}
    for result in read_results(args.json):
        if result["task"] == "text":
            texts.setdefault(result["context"], []).append(result)
        else:
            needles.setdefault((result["task"], result["context"]), []).append(result)
    # Emulated rows repeat what the plugin measured; they are for the layers.
    plugin = {c: [r for r in rs if r["by"] == "plugin"] for c, rs in texts.items()}
    plugin = {c: rs for c, rs in plugin.items() if rs}
    for context, results in plugin.items():
        draw_ppl(results, context, args.output / f"{context}-ppl.svg")
    if plugin:
        draw_positions(plugin, args.output / "position.svg")
    layers = [r for rs in texts.values() for r in rs if any("kld_by_layer" in row for row in r["rows"])]
    if layers:
        draw_layers(layers, args.output / "layer.svg")
    for (task, context), results in needles.items():
        draw_needle(results, args.output / f"{task}-{context}.svg")


if __name__ == "__main__":
    main()
