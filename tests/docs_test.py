#!/usr/bin/env python3
"""Holds the documents to the tree: every link between them leads to a file and a heading that exist, and so does every path
of the tree that they or a comment of the sources name.

usage: docs_test.py <root of the tree>
"""
import re
import sys
from pathlib import Path

LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.-])(?:src|docs|tests|tools|bench|scripts|profiles|examples|cmake)/[\w./+-]*[\w+-]")
FOLDERS = ("docs", "src", "tests", "tools", "bench", "scripts", "cmake")
SOURCES = (".h", ".cpp", ".cu", ".py", ".txt", ".cmake")


def headings(text):
    """GitHub's anchors of a document's headings."""
    anchors, in_code = set(), False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        if not in_code and (found := re.match(r"#+ (.*)", line)):
            title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", found[1].strip().lower())
            anchors.add(re.sub(r"[^\w\- ]", "", title).replace(" ", "-"))
    return anchors


def broken_links(document):
    for link in LINK.findall(document.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists():
            yield f"{link}: there is no such file"
        elif anchor and anchor not in headings(target.read_text()):
            yield f"{link}: there is no such heading"


def missing_paths(root, file):
    for path in set(PATH.findall(file.read_text(errors="replace"))):
        # A name may leave out its ending, or its folder's files stand for it.
        if not (root / path).exists() and not list((root / path).parent.glob((root / path).name + "*")):
            yield f"{path}: there is no such file"


root = Path(sys.argv[1]).resolve()
documents = [p for p in root.glob("*.md")]
sources = []
for folder in FOLDERS:
    documents += (root / folder).rglob("*.md")
    sources += [p for p in (root / folder).rglob("*") if p.suffix in SOURCES and "data" not in p.parts]
failures = [(d, what) for d in documents for what in broken_links(d)]
failures += [(f, what) for f in documents + sources for what in missing_paths(root, f)]
for file, what in sorted(failures):
    print(f"{file.relative_to(root)}: {what}")
print(f"{len(documents)} documents, {len(sources)} sources, {len(failures)} failures")
sys.exit(1 if failures or len(documents) < 10 else 0)
