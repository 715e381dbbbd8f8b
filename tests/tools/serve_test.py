#!/usr/bin/env python3
"""`thimble run` and `thimble serve` as they are started: what the log says without a flag, which profile is found, and that
a slot file of other settings harms nobody.

usage: serve_test.py <thimble> <model>
"""
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

thimble, model = sys.argv[1:]
environment = {name: value for name, value in os.environ.items() if name not in ("THIMBLE_KV", "GGML_BACKEND_PATH")}
text = "The quick brown fox jumps over the lazy dog. " * 40


def check(condition, what):
    if not condition:
        raise AssertionError(what)
    print("ok:", what, flush=True)


class Server:
    def __init__(self, folder, *flags):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log_path = os.path.join(folder, f"{self.port}.log")
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen([thimble, "serve", *flags, "--port", str(self.port), "-t", "1"], stdout=log,
                                            stderr=log, env=environment)

    def __enter__(self):
        for _ in range(600):
            try:
                if self.ask("/health").get("status") == "ok":
                    return self
            except OSError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.__exit__()
        raise RuntimeError("the server did not start:\n" + self.log())

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log(self):
        with open(self.log_path, errors="replace") as f:
            return f.read()

    def ask(self, path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body and json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            return json.load(urllib.request.urlopen(request, timeout=300))
        except urllib.error.HTTPError as error:
            return {"status_code": error.code}

    def complete(self, prompt, n, slot):
        return self.ask("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "id_slot": slot})


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

with tempfile.TemporaryDirectory() as folder:
    def serve(kv):
        return Server(folder, "--kv", kv, "-m", model, "-c", "8192", "-np", "2", "--slot-save-path", folder)

    with serve("2") as s:
        s.complete(text, 4, 0)
        check(s.ask("/slots/0?action=save", {"filename": "slot"}).get("n_saved", 0) > 300, "a slot is saved")
    with serve("4") as s:
        check(s.ask("/slots/1?action=restore", {"filename": "slot"}).get("status_code") == 400,
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
    with Server(folder, "--kv", "2", "--models-dir", models) as s:
        check([m["id"] for m in s.ask("/v1/models")["data"]] == ["small"], "a profile is not listed as a model")
        s.ask("/v1/completions", {"model": "small", "prompt": "hi", "max_tokens": 1})
        check("small.thimble.gguf: not a usable profile" in s.log(), "the profile beside a model is found")
