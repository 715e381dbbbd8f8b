#!/usr/bin/env python3
"""The wheel, as one installs it: into an empty virtual environment, from the file alone. It then serves, calibrates, measures
and runs, gives a service a coded cache by the line that doctor prints, and goes without a trace.

usage: wheel_test.py <folder of the wheel> <build directory> <model> <text>
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from server_process import ServerProcess  # noqa: E402

wheels, build, model, text = (Path(argument).resolve() for argument in sys.argv[1:])


def check(condition, what):
    if not condition:
        raise AssertionError(what)
    print("ok:", what, flush=True)


def run(*command, env, fails=False):
    begin = time.monotonic()
    done = subprocess.run([str(part) for part in command], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=600)
    said = done.stdout.decode(errors="replace")
    if (done.returncode != 0) != fails:
        raise AssertionError(f"{command}: exit code {done.returncode}\n{said[-3000:]}")
    print(f"    {time.monotonic() - begin:.2f} s: {' '.join(str(part) for part in command)[:100]}")
    return said


def doctor_without(home, thimble, hidden, env):
    """What doctor says where the plugin's builds for each version of ggml are gone."""
    hidden.mkdir()
    builds = list(home.glob("libggml-thimble-api*.so"))
    for build_of_plugin in builds:
        shutil.move(build_of_plugin, hidden)
    said = run(thimble, "doctor", env=env, fails=True)
    for build_of_plugin in builds:
        shutil.move(hidden / build_of_plugin.name, build_of_plugin)
    return said


class Server(ServerProcess):
    def __init__(self, env, *command):
        self.begin = time.monotonic()
        super().__init__(command, env)

    def __enter__(self):
        super().__enter__()
        print(f"    ready after {time.monotonic() - self.begin:.2f} s")
        return self

    def ask(self):
        body = {"messages": [{"role": "user", "content": "My dog is called Bingo. What is my dog called?"}], "max_tokens": 12,
                "temperature": 0}
        return self.request("/v1/chat/completions", body)["choices"][0]["message"]["content"]


wheel, = wheels.glob("thimble_kv-*.whl")
print(f"    {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
check(re.search(r"-py3-none-manylinux_2_\d+_x86_64\.whl$", wheel.name), "the wheel is for any Python 3 and says which glibc")
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    # Nothing of the shell that runs the test: no library path, no settings, no registry.
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run(sys.executable, "-m", "venv", folder / "venv", env=env)
    run(folder / "venv/bin/pip", "install", wheel, env=env)
    thimble = folder / "venv/bin/thimble"
    home = Path(run(folder / "venv/bin/python", "-c", "import thimble_kv; print(thimble_kv.home())", env=env).split("\n")[0])
    print(f"    {sum(f.stat().st_size for f in home.rglob('*') if f.is_file()) / 1e6:.1f} MB installed")
    named = [file.name for file in home.parent.rglob("*") if file.is_file() and str(build).encode() in file.read_bytes()]
    check(not named, f"nothing names the build directory ({named})")
    places = set()
    for file in home.parent.parent.glob("thimble_kv*/**/*"):
        if file.is_file() and file.read_bytes()[:4] == b"\x7fELF":
            dynamic = subprocess.run(["readelf", "-d", file], check=True, stdout=subprocess.PIPE, text=True).stdout
            places |= {place for found in re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", dynamic) for place in found.split(":")}
    check(places and all(place.startswith("$ORIGIN") for place in places), f"its parts find each other by where they lie ({sorted(places)})")
    check("| llama-cpp-py-sync" in (home / "hosts.md").read_text(), "it says which builds of llama.cpp it was run in")

    said = run(thimble, "doctor", "-m", model, env=env)
    check("THIMBLE0: coded KV cache on" in said, "doctor finds the plugin")
    check(re.search(rf"checked: {re.escape(str(home))}/llama-server lists THIMBLE0\n +THIMBLE0: coded KV cache on .* kernels\)", said),
          "doctor checks the line that it prints for a service, and says what the device is")
    service = dict(word.split("=", 1) for word in re.search(r"service +(.*)", said)[1].split())

    small = ["-c", "2048", "-t", "1"]
    with Server(env, thimble, "serve", "-m", model, "--kv", "4", *small) as server:
        check("Bingo" in server.ask(), "thimble serve answers")
        check("thimble: KV cache of 30 layers" in server.text(), "from a coded cache")
    with Server({**env, **service}, home / "llama-server", "-m", model, *small) as server:
        check("Bingo" in server.ask(), "a service with doctor's line answers")
        check("thimble: KV cache of 30 layers" in server.text(), "from a coded cache, too")
    other = folder / "other"
    other.mkdir()
    for name in ("llama-completion", "llama-server"):
        (other / name).write_text("#!/bin/sh\necho started instead\n")
        (other / name).chmod(0o755)
    said = run(thimble, "doctor", "--llama", other, env=env)
    check(f"{other}/llama-server does not load the plugin: started instead" in said, "doctor sees a program that does not load it")
    prompt = ["-m", model, "-p", "The capital of France is Paris. The capital of Italy is", "-n", "4", "-no-cnv", "--temp", "0", *small]
    check("Rome" in run(thimble, "run", *prompt, env=env), "thimble run answers")
    check("started instead" in run(thimble, "run", "--llama", other, *prompt, env=env), "--llama starts the program that it names")

    profile = folder / "made.thimble.gguf"
    run(thimble, "calibrate", "-m", model, "-f", text, "-o", profile, "-n", "256", "--window", "64", "--context", "4096",
        "--bits", "2", "--even", "--iterations", "2", "-t", "1", env=env)
    run(thimble, "eval", "-m", model, "-f", text, "-p", profile, "-c", "2048", "--decode", "32", "--chunks", "1", "-t", "1",
        "--kv", "f16,2", "--json", folder / "rows.json", env=env)
    rows = json.loads((folder / "rows.json").read_text())
    kl = {row["kv"]: row["kld_mean"] for row in rows["rows"] if "kld_mean" in row}
    print("   ", kl)
    check(0 < kl["2"] < 1, "eval measures the profile that calibrate made")
    said = run(thimble, "doctor", "-m", model, env=env)
    shipped = home / "profiles" / model.with_suffix(".thimble.gguf").name
    check(f"profile          {shipped}" in said and f"profile={shipped}" in said, "a shipped profile is found by the model's name")
    run(thimble, "bench", "-m", model, "--depths", "0", "--kv", "f16,4", "--decode", "2", "--prompt", "8", "--rounds", "1",
        "-t", "1", env=env)

    modules = list(home.glob("libggml-cpu-*.so"))
    if modules:  # a program that brings its backend by GGML_BACKEND_PATH, as Ollama does on a GPU, and starts ours for llama-server
        bare = folder / "host/llama/bin"
        bare.mkdir(parents=True)
        shutil.copytree(home.parent.parent / "thimble_kv.libs", folder / "host/thimble_kv.libs")
        for file in home.iterdir():
            if file.is_file() and file not in modules and "thimble" not in file.name:
                shutil.copy(file, bare)
        plain = shutil.copy(home / "libggml-cpu-x64.so", folder / "libggml-cpu-of-a-program.so")
        (bare / "llama-server").rename(bare / "llama-server.own")
        (bare / "llama-server").write_text(f'#!/bin/sh\nexec {thimble} serve --llama {bare}/llama-server.own "$@"\n')
        (bare / "llama-server").chmod(0o755)
        with Server({**env, "GGML_BACKEND_PATH": str(plain)}, bare / "llama-server", "-m", model, *small) as server:
            check("Bingo" in server.ask() and "thimble: KV cache of 30 layers" in server.text(),
                  "a backend that GGML_BACKEND_PATH named is loaded, too")
    emulator = shutil.which("qemu-x86_64-static")
    if emulator and (home / "libggml-cpu-x64.so").exists():  # a processor without AVX: plain kernels, and a plain CPU backend
        said = run(emulator, "-cpu", "Nehalem", home / "llama-completion", *prompt, env={**env, **service})
        check("scalar kernels" in said and "Rome" in said, "a processor without AVX runs the plain kernels")
    needed = home / re.search(r"takes (libggml-thimble-api\d\.so)", doctor_without(home, thimble, folder / "hidden", env))[1]
    check(needed.exists(), "a folder that was half copied is refused, and the file that is missing is named")
    run(folder / "venv/bin/pip", "uninstall", "-y", "thimble_kv", env=env)
    check(not home.parent.exists() and not thimble.exists(), "nothing is left of it")
