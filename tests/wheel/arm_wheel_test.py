#!/usr/bin/env python3
"""The wheel for 64-bit Arm, in an emulator (qemu-user): its tag and files, the plugin in its llama.cpp, an answer from a coded
cache, what doctor says, and that programs for this machine are refused.

usage: arm_wheel_test.py <folder of the wheel> <model> [<thimble of this machine>]

Exits with 77 where the emulator or Arm's C library is missing (Debian: qemu-user-static, libc6-arm64-cross).
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

wheels, model, *of_this_machine = (Path(argument).resolve() for argument in sys.argv[1:])
ROOT = Path("/usr/aarch64-linux-gnu")  # Arm's C and C++ libraries
emulator = shutil.which("qemu-aarch64-static")
if not emulator or not (ROOT / "lib/libstdc++.so.6").exists():
    print("skipped: no qemu-aarch64-static, or no libraries of 64-bit Arm in", ROOT)
    sys.exit(77)


def check(condition, what, said=""):
    if not condition:
        raise AssertionError(f"{what}\n{said[-2000:]}")
    print("ok:", what, flush=True)


def run(*command, **environment):
    begin = time.monotonic()
    env = {"PATH": "/usr/bin:/bin", "HOME": "/nowhere", "QEMU_LD_PREFIX": str(ROOT), **environment}
    done = subprocess.run([str(part) for part in command], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=900)
    print(f"    {time.monotonic() - begin:.1f} s: {' '.join(str(part) for part in command)[:110]}")
    return done.returncode, done.stdout.decode(errors="replace")


def dynamic(file):
    """The libraries that a file asks for, and where it looks for them first."""
    said = subprocess.run(["readelf", "-d", file], check=True, stdout=subprocess.PIPE, text=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", said), re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", said)


wheel, = wheels.glob("thimble_kv-*aarch64.whl")
print(f"    {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
check(re.search(r"-py3-none-manylinux_2_\d+_aarch64\.whl$", wheel.name), "the wheel is for any Python 3 and says which glibc")
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    zipfile.ZipFile(wheel).extractall(folder)
    home = folder / "thimble_kv/home"
    programs = ["thimble", "llama-server", "llama-cli", "llama-completion"]
    for name in programs:
        (home / name).chmod(0o755)
    files = [file for file in folder.rglob("*") if file.is_file() and file.read_bytes()[:4] == b"\x7fELF"]
    check(len(files) > 10 and all(file.read_bytes()[18:20] == b"\xb7\0" for file in files), f"its {len(files)} programs and libraries are for Arm")
    names = {file.name for file in files}
    missing, places = set(), set()
    for file in files:
        needed, looks = dynamic(file)
        missing |= {name for name in needed if name not in names and not (ROOT / "lib" / name).exists()}
        places |= {place for text in looks for place in text.split(":")}
    check(not missing, f"what they ask for is in the wheel or in Arm's C and C++ libraries ({missing or 'nothing is missing'})")
    check(all(place.startswith("$ORIGIN") for place in places), f"they look for each other by where they lie ({sorted(places)})")

    # Programs that start others do so by the kernel, which knows no Arm: scripts start the emulator.
    scripts = folder / "scripts"
    scripts.mkdir()
    for name in programs[1:]:
        (scripts / name).write_text(f'#!/bin/sh\nQEMU_LD_PREFIX={ROOT} exec {emulator} {home / name} "$@"\n')
        (scripts / name).chmod(0o755)
    code, said = run(emulator, home / "thimble", "doctor", "-m", model, "--llama", scripts)
    check(code == 0 and "THIMBLE0: coded KV cache on" in said and "neon" in said, "doctor finds the plugin and the NEON kernels", said)
    check(f"checked: {scripts}/llama-server lists THIMBLE0" in said, "and has llama-server load it", said)
    service = dict(word.split("=", 1) for word in re.search(r"service +(.*)", said)[1].split())
    prompt = ["-m", model, "-p", "The capital of France is Paris. The capital of Italy is", "-n", "4", "-no-cnv", "--temp", "0",
              "-c", "512", "-t", "1"]
    code, said = run(emulator, home / "llama-completion", *prompt, "-lv", "4", **{**service, "THIMBLE_KV": "bits=4,small=0,window=8,pool=0"})
    check(code == 0 and "thimble: KV cache of 30 layers" in said and "neon kernels" in said and "Rome" in said,
          "an answer from a cache of 4 bits, by the NEON kernels", said)
    code, said = run(emulator, home / "thimble", "run", "--llama", scripts, "--kv", "4", *prompt)
    check(code == 0 and "Rome" in said, "thimble run answers", said)
    if of_this_machine:
        code, said = run(of_this_machine[0], "run", "--llama", home, *prompt)
        check(code != 0 and "is a program for 64-bit Arm, and this Thimble is for x86-64" in said,
              "this machine's thimble refuses the wheel's programs by name", said)
    for build in home.glob("libggml-thimble-api*.so"):
        build.rename(folder / build.name)
    code, said = run(emulator, home / "llama-server", "--list-devices", **service)
    check("which is missing beside libggml-thimble.so" in said and "THIMBLE0: " not in said, "a folder that was half copied is refused", said)
