#!/usr/bin/env python3
"""`thimble run` and `thimble serve` as they are started: what the log says without a flag, which profile is found, and that
a slot file of other settings harms nobody.

usage: serve_test.py <thimble> <model>
"""
import os
import subprocess
import sys
import tempfile
import threading

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
from llama_server import check  # noqa: E402
from server_process import ServerProcess  # noqa: E402

thimble, model = sys.argv[1:]
environment = {name: value for name, value in os.environ.items() if name not in ("THIMBLE_KV", "GGML_BACKEND_PATH")}
text = "The quick brown fox jumps over the lazy dog. " * 40


class Server(ServerProcess):
    def __init__(self, *flags):
        super().__init__([thimble, "serve", *flags, "-t", "1"], environment)


def run(*flags, kv=None):
    env = environment if kv is None else {**environment, "THIMBLE_KV": kv}
    done = subprocess.run([thimble, "run", "-m", model, "-c", "2048", "-p", "hi", "-n", "1", "-no-cnv", "-t", "1", *flags],
                          env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=300)
    return done.stdout + done.stderr


said = run("--kv", "2")
check("thimble: KV cache of 30 layers: " in said and "bits=2," in said, "what the cache is stands there without a flag")
check("no profile: so few bits cost quality" in said, "so does what is missing")
said = run("--kv", "2+64", "--set", "pool=7", kv="bits=4,window=32")
check("--kv 2+64 takes the place of bits=4 in THIMBLE_KV" in said, "nothing in the environment is overridden in silence")
check("bits=2,window=32,pool=7," in said and "exact store of 30 layers" in said, "the rest of it holds, every layer retrieves")
check("--set pool=x: pool=x must be a whole number" in run("--set", "pool=x"), "a message names what was typed")

said = run("--kv", "2", "-ngl", "10")
check("the layers before layer 21 are not on this device" in said, "so do layers that are elsewhere")

doctor = subprocess.run([thimble, "doctor"], env={**environment, "THIMBLE_KV": "bits=4,device=CPU+CPU"}, stdin=subprocess.DEVNULL,
                        capture_output=True, text=True, errors="replace", timeout=300).stdout
check("LLAMA_ARG_DEVICE=THIMBLE0,THIMBLE1 " in doctor and "lists THIMBLE0,THIMBLE1" in doctor, "doctor's line names every device")

with tempfile.TemporaryDirectory() as disk:
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=3m none "$0" && exec "$@"', disk]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode != 0:
        print("left out: no file system can be mounted here")
    else:
        done = subprocess.run([*mounted, thimble, "run", "-m", model, "-c", "4096", "-p", text * 2, "-n", "4", "-no-cnv", "-t", "1",
                               "--kv", "2+64", "--store", disk],
                              env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        check(done.returncode == 0 and done.stderr.count("is full: cells that find no room there") == 1,
              "a full disk is said once, and the answer comes")

with tempfile.TemporaryDirectory() as folder:
    def serve(kv):
        return Server("--kv", kv, "-m", model, "-c", "8192", "-np", "2", "--slot-save-path", folder)

    with serve("2") as s:
        s.complete(text, 4, 0)
        check(s.request("/slots/0?action=save", {"filename": "slot"})["n_saved"] > 300, "a slot is saved")
    with serve("4") as s:
        check(s.status_of("/slots/1?action=restore", {"filename": "slot"}) == 400,
              "a slot file of other settings is refused when it is restored")
        answers = {}
        thread = threading.Thread(target=lambda: answers.update(s.complete("Once upon a time", 40, 0)))
        thread.start()
        own = s.complete(text, 8, 1)
        thread.join()
        check("content" in answers and "content" in own, "both slots answer afterwards")

    models = os.path.join(folder, "models")
    os.mkdir(models)
    os.symlink(os.path.abspath(model), os.path.join(models, "small.gguf"))
    profile = os.path.join(models, "small.thimble.gguf")
    with open(profile, "wb") as f:
        f.write(b"no profile")  # found, read and refused by name
    with Server("--kv", "2", "--models-dir", models) as s:
        check([m["id"] for m in s.request("/v1/models")["data"]] == ["small"], "a profile is not listed as a model")
        s.status_of("/v1/completions", {"model": "small", "prompt": "hi", "max_tokens": 1})
        check("small.thimble.gguf: not a usable profile" in s.text(), "the profile beside a model is found")
