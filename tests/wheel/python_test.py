#!/usr/bin/env python3
"""thimble_kv.enable() and llama-cpp-python, on the llama.cpp in the wheel: the example answers and restores a state, the cache
is coded as was asked, and what cannot be is refused with a sentence.

usage: python_test.py <folder of the wheel> <examples/python/chat.py> <model> <virtual environment>

Exits with 77 where llama-cpp-python cannot be had from PyPI. THIMBLE_TEST_LLAMA_CPP=<folder>: run on the libllama.so of that
folder, too, a build of the llama.cpp that this version of llama-cpp-python vendors.
"""
import os
import subprocess
import sys
from pathlib import Path

wheels, example, model, venv = (Path(argument).resolve() for argument in sys.argv[1:])
VERSION = "0.3.36"  # its Python side and the llama.h of the wheel's llama.cpp fit (docs/guide/python.md)
python = venv / "bin/python"
pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def check(condition, what):
    if not condition:
        raise AssertionError(what)
    print("ok:", what, flush=True)


def said_by(*arguments, **more):
    env = {name: value for name, value in os.environ.items() if name not in ("THIMBLE_KV", "GGML_BACKEND_PATH", "LLAMA_CPP_LIB_PATH")}
    done = subprocess.run([python, *arguments], env={**env, **more}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=600)
    return done.returncode, done.stdout.decode(errors="replace")


if not (venv / "ready").exists():
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    # Its Python side alone: the libraries are in the wheel.
    env = dict(os.environ, CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF")
    if subprocess.run([*pip, "--no-binary", "llama-cpp-python", "llama-cpp-python==" + VERSION], env=env).returncode != 0:
        print("skipped: cannot install llama-cpp-python")
        sys.exit(77)
    (venv / "ready").touch()
wheel, = wheels.glob("thimble_kv-*.whl")
subprocess.run([*pip, "--no-index", "--force-reinstall", wheel], check=True)


def check_example(kv, arguments, environment):
    code, said = said_by(example, model, kv, *arguments, **environment)
    print("".join(f"    {line}\n" for line in said.splitlines()[-8:]), end="")
    check(code == 0 and "coded KV cache on" in said, f"the example runs with kv={kv}")
    answers = [line.partition(": ")[2] for line in said.splitlines() if line.startswith(("answer:", "from the saved state:"))]
    check(len(answers) == 2 and "Bingo" in answers[0] and answers[1] == answers[0], "it answers, and the same from a saved state")


START = """
import sys, thimble_kv
model = sys.argv[1]
def llama(**arguments):
    from llama_cpp import Llama
    return Llama(model, **arguments)
"""


def check_settings(own, environment):
    def code(text):
        return said_by("-c", START + text.replace("ENABLE(", f"thimble_kv.enable(own_llama={own}, "), model, **environment)

    for kv in ("4", "2"):
        exit_code, said = code(f"ENABLE(kv='{kv}', settings='pool=8'); llama(n_ctx=2048, verbose=True)")
        check(exit_code == 0 and "thimble: KV cache of 30 layers" in said and f"bits={kv}," in said and "pool=8" in said,
              f"a cache of {kv} bits is coded as asked")
    exit_code, said = code("ENABLE(kv='4'); thimble_kv.enable(kv='2', window=32); llama(n_ctx=2048, verbose=True)")
    check(exit_code == 0 and "bits=2," in said and "window=32" in said, "a second call sets other settings")
    for text, sentence in [("ENABLE(kv='5')", "bits=5 is not one of"), ("ENABLE(settings='windo=3')", "unknown key"),
                           ("ENABLE(); llama(flash_attn=False)", "flash_attn=False: a coded cache"),
                           ("ENABLE(); llama(type_k=8)", "type_k=8: Thimble codes the cache itself"),
                           ("ENABLE(kv='f16')", "do not call enable()"),
                           ("ENABLE(settings='bits=2')", "bits=2 is said by an argument"),
                           ("ENABLE(profile='/nowhere')", "/nowhere: there is no such file"),
                           ("ENABLE(plugin='/nowhere.so')", "/nowhere.so is missing")]:
        exit_code, said = code(text)
        last = said.strip().splitlines()[-1]
        check(exit_code != 0 and sentence in last, f"{text}: {last}")


for kv in ("4", "2+64"):
    check_example(kv, ["own"], {})
check_settings(True, {})
if "THIMBLE_TEST_LLAMA_CPP" in os.environ:
    of_vendor = {"LLAMA_CPP_LIB_PATH": os.environ["THIMBLE_TEST_LLAMA_CPP"]}
    exit_code, said = said_by("-c", "import thimble_kv, llama_cpp; thimble_kv.enable(own_llama=True)", **of_vendor)
    check(exit_code != 0 and "comes too late" in said, "own_llama after llama_cpp is imported is refused")
    check_example("4", [], of_vendor)
    check_settings(False, of_vendor)
