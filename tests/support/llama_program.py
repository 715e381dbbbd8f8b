#!/usr/bin/env python3
"""Runs one of llama.cpp's own test programs with the plugin, and fails where the program fails or did not use it.

usage: llama_program.py <bin directory of llama.cpp> <plugin> <preload> <line the output must have> <program> [arguments]
"""
import os
import re
import subprocess
import sys

bin_dir, plugin, preload, wanted, program, *arguments = sys.argv[1:]
env = dict(os.environ, GGML_BACKEND_PATH=plugin, LD_PRELOAD=preload)
done = subprocess.run([os.path.join(bin_dir, program), *arguments], env=env, stdout=subprocess.PIPE,
                      stderr=subprocess.STDOUT, text=True, errors="replace")
output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
found = re.findall(wanted, output)
print("\n".join(output.splitlines()[-40:]))
print(f"exit code {done.returncode}; '{wanted}': {found[:3]}")
sys.exit(0 if done.returncode == 0 and found else 1)
