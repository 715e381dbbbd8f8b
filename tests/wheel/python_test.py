#!/usr/bin/env python3
"""thimble_kv.enable() and llama-cpp-python, on the llama.cpp in the wheel or on its own build: the example answers and restores
a state, the cache is coded as was asked, and what cannot be is refused with a sentence.

Exits with 77 where llama-cpp-python cannot be had from PyPI.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("wheels", type=Path, help="folder of the wheel")
parser.add_argument("example", type=Path, help="examples/python/chat.py")
parser.add_argument("model", type=Path)
parser.add_argument("venv", type=Path, help="virtual environment to make, or one that this test made")
parser.add_argument("--version", default="0.3.36", help="of llama-cpp-python. The Python side of this one fits the wheel's llama.cpp")
parser.add_argument("--own-build", action="store_true", help="have pip build llama-cpp-python with its llama.cpp, and test it on that")
parser.add_argument("--only-install", action="store_true")
args = parser.parse_args()
wheels, example, model, venv = (path.resolve() for path in (args.wheels, args.example, args.model, args.venv))
python = venv / "bin/python"
pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def check(condition, what):
    if not condition:
        raise AssertionError(what)
    print("ok:", what, flush=True)


def said_by(*arguments):
    env = {name: value for name, value in os.environ.items() if name not in ("THIMBLE_KV", "GGML_BACKEND_PATH", "LLAMA_CPP_LIB_PATH")}
    done = subprocess.run([python, *arguments], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=600)
    return done.returncode, done.stdout.decode(errors="replace")


if not (venv / "ready").exists():
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    package = "llama-cpp-python==" + args.version
    # Without a build of its own it is its Python side alone: the libraries are in the wheel.
    env = dict(os.environ) if args.own_build else dict(os.environ, CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF")
    if subprocess.run([*pip, "--no-binary", "llama-cpp-python", package], env=env).returncode != 0:
        print("skipped: cannot install llama-cpp-python")
        sys.exit(77)
    (venv / "ready").touch()
wheel, = wheels.glob("thimble_kv-*.whl")
subprocess.run([*pip, "--no-index", "--force-reinstall", wheel], check=True)
if args.only_install:
    sys.exit(0)


def check_example(kv, arguments):
    code, said = said_by(example, model, kv, *arguments)
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


def check_settings(own):
    def code(text):
        return said_by("-c", START + text.replace("ENABLE(", f"thimble_kv.enable(own_llama={own}, "), model)

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


if args.own_build:  # what pip built may not run at all
    exit_code, said = said_by("-c", "import sys, llama_cpp; llama_cpp.Llama(sys.argv[1], n_ctx=512)", model)
    check(exit_code == 0, f"llama-cpp-python loads the model without the plugin (exit code {exit_code}: ...{said[-300:]})")
for kv in ("4", "2+64"):
    check_example(kv, [] if args.own_build else ["own"])
check_settings(not args.own_build)
if args.own_build:
    exit_code, said = said_by("-c", "import thimble_kv, llama_cpp; thimble_kv.enable(own_llama=True)")
    check(exit_code != 0 and "comes too late" in said, "own_llama after llama_cpp is imported is refused")
