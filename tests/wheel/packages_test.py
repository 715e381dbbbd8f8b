#!/usr/bin/env python3
"""The packages that CPack makes, .deb and .tar.gz, and `cmake --install`, in folders of their own: the command answers from there,
and the three hold the same files.

usage: packages_test.py <build directory> <model>
"""
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

build, model = (Path(argument).resolve() for argument in sys.argv[1:])


def check(condition, what):
    if not condition:
        raise AssertionError(what)
    print("ok:", what, flush=True)


def said_by(*command):
    done = subprocess.run([str(part) for part in command], env={"PATH": "/usr/bin:/bin"}, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    said = done.stdout.decode(errors="replace")
    check(done.returncode == 0, f"{command[0]} {command[1]}" + (said[-1000:] if done.returncode else ""))
    return said


with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    subprocess.run(["cpack", "--config", build / "CPackConfig.cmake", "-B", folder], check=True, stdout=subprocess.DEVNULL)
    deb, = folder.glob("*.deb")
    tar, = folder.glob("*.tar.gz")
    subprocess.run(["dpkg-deb", "-x", deb, folder / "deb"], check=True)
    with tarfile.open(tar) as archive:
        archive.extractall(folder / "tar")
    subprocess.run(["cmake", "--install", build, "--prefix", folder / "installed"], check=True, stdout=subprocess.DEVNULL)
    roots = [folder / "deb" / "usr", *(folder / "tar").iterdir(), folder / "installed"]
    contents = []
    for package, root in zip((deb, tar, None), roots):
        print(f"    {package.name}: {package.stat().st_size / 1e6:.1f} MB" if package else f"    {root}")
        contents.append({str(path.relative_to(root)) for path in root.rglob("*")})
        check("lists THIMBLE0" in said_by(root / "bin/thimble", "doctor"), "its plugin loads into its llama-server")
        answer = said_by(root / "bin/thimble", "run", "-m", model, "-c", "2048", "-t", "1", "-n", "4", "-no-cnv", "--temp", "0",
                         "-p", "The capital of France is Paris. The capital of Italy is")
        check("Rome" in answer and "thimble: KV cache of 30 layers" in answer, "its llama.cpp answers from a coded cache")
        named = [path.name for path in root.rglob("*") if path.is_file() and str(build).encode() in path.read_bytes()]
        check(not named, f"nothing names the build directory ({named})")
    check(contents[0] == contents[1] == contents[2] and len(contents[0]) > 20, "all hold the same files")
