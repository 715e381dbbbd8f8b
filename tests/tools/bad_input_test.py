#!/usr/bin/env python3
"""Bad input to the `thimble` command and to llama.cpp's program with the plugin: an error that says what is wrong and an
exit code, never a crash and never a run that ignores it.

usage: bad_input_test.py <thimble> <plugin> <llama-completion> <model>
"""
import os
import subprocess
import sys
import tempfile

thimble, plugin, program, model = sys.argv[1:]
failed = 0


def expect(said, *command, **environment):
    """The command ends by itself, with an error code, and says so."""
    global failed
    done = subprocess.run(command, env=dict(os.environ, **environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=240)
    output = done.stdout.decode(errors="replace")
    ok = 0 < done.returncode < 128 and said in output
    print("ok:" if ok else "FAILED:", " ".join(command[1:5]), "...", f"exit code {done.returncode}, '{said}'", flush=True)
    if not ok:
        failed += 1
        print("\n".join(output.splitlines()[-10:]))


with tempfile.TemporaryDirectory() as directory:
    def file(name, content):
        path = os.path.join(directory, name)
        with open(path, "wb") as f:
            f.write(content)
        return path

    with open(model, "rb") as f:
        head = f.read(3_000_000)
    run = [thimble, "run", "-p", "hi", "-n", "1", "-no-cnv", "-t", "1", "--kv", "4"]
    for name, content, said in [("cut", head, "is cut short: tensor"), ("cut-in-header", head[:1000], "a damaged one"),
                                ("garbage", bytes(range(256)) * 400, "is no GGUF file"), ("empty", b"", "is no GGUF file"),
                                ("wild", head[:4000] + b"\xff" * 100_000, "a damaged one")]:
        expect(said, *run, "-m", file(name + ".gguf", content))
    expect("there is no such file", *run, "-m", os.path.join(directory, "none.gguf"))
    expect("failed to create context", *run, "-m", model, "-c", "100000000")
    expect("bits=5 is not one of", *run[:-2], "-m", model, "--kv", "5")
    expect("bits=garbage is not one of", *run[:-2], "-m", model, "--kv", "garbage")
    expect("", *run, "-m", model, "--profile", file("bad.thimble.gguf", head))
    # Said before anything is read, however long the context is.
    expect("ask for less or give a longer text", thimble, "eval", "-m", model, "-f", file("short.txt", b"Few words."), "-c", "1000000")
    for settings, said in [("bits=4,foo=1", "unknown key 'foo'"), ("window=8+128", "window=8+128 must be a whole number"),
                           ("\x01\xff", "is not of the form key=value"), ("device=TPU9", "there is no ggml device 'TPU9'")]:
        expect(said, program, "-m", model, "--device", "THIMBLE0", "-p", "hi", "-n", "1", "-no-cnv",
               GGML_BACKEND_PATH=plugin, THIMBLE_KV=settings)
sys.exit(1 if failed else 0)
