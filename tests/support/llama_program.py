#!/usr/bin/env python3
"""Runs one of llama.cpp's own test programs with the plugin, and fails where the program fails or did not use it.

usage: llama_program.py <bin directory of llama.cpp> <plugin> <preload> <line the output must have> <program> [arguments]

test-save-load-state has a case that makes a context without flash attention, which the plugin refuses: that one may fail, by
that refusal and no other.
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
good = done.returncode == 0
if program == "test-save-load-state" and not good:
    errors = set(re.findall(r" E (test_\w+: .*)", output))
    good = (errors == {"test_state_restore_failure: failed to create context"} and "flash attention is off" in output
            and output.count("PASS") >= 7)
    print("refused: the case without flash attention;", output.count("PASS"), "cases pass")
sys.exit(0 if good and found else 1)
