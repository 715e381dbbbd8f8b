#!/usr/bin/env python3
"""Holds shared libraries to what they may show of themselves: the symbols that they are there for, and nothing of the C++ library.

usage: exports_test.py <library>=<symbol>,... [<library>=@<header with THIMBLE_API>] ...
"""
import re
import subprocess
import sys
from pathlib import Path


def shown_by(library):
    table = subprocess.run(["nm", "--dynamic", "--defined-only", "--format=posix", library], check=True, stdout=subprocess.PIPE, text=True)
    return {line.split()[0] for line in table.stdout.splitlines()}


def declared_in(header):
    return set(re.findall(r"^THIMBLE_API [\w *]*?(\w+)\(", Path(header).read_text(), re.MULTILINE))


failed = False
for argument in sys.argv[1:]:
    library, _, wanted = argument.partition("=")
    wanted = declared_in(wanted[1:]) if wanted.startswith("@") else set(wanted.split(","))
    shown = shown_by(library)
    if not wanted or shown != wanted:
        failed = True
        print(f"{library} shows {sorted(shown - wanted)}, which it should not, and lacks {sorted(wanted - shown)}")
    else:
        print(f"ok: {library} shows {len(shown)} symbols")
sys.exit(1 if failed else 0)
