"""llama-server on THIMBLE0, and the OpenAI client to ask it with."""
import concurrent.futures
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

here = os.path.dirname(os.path.abspath(__file__))
data = os.path.join(os.path.dirname(here), "data")


def enter_environment(venv, requirements=os.path.join(here, "requirements.txt")):
    """Runs the program again in a virtual environment that has what is required, made where it is not there yet."""
    python = os.path.join(venv, "bin", "python")
    if os.path.realpath(sys.prefix) == os.path.realpath(venv):
        return
    os.makedirs(venv, exist_ok=True)
    ready = os.path.join(venv, "ready")
    # Tests that share the environment run side by side: the first makes it, the others wait.
    with open(os.path.join(venv, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(ready):
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            if subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements]).returncode != 0:
                print("skipped: cannot install", requirements)
                sys.exit(77)
            open(ready, "w").close()
    os.execv(python, [python, *sys.argv])


def check(condition, what):
    if not condition:
        raise AssertionError(what)
    print("ok:", what, flush=True)


def two_at_a_time(call, inputs):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(call, inputs))


class Server:
    """A running llama-server on THIMBLE0, with these settings of the cache; ends with a clean stop."""

    def __init__(self, server, plugin, model, settings, *arguments):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        import openai  # of the virtual environment
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", timeout=120)
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [server, "-m", model, "--port", str(port), "--device", "THIMBLE0", "-ngl", "99", "-fa", "on", "-c", "8192",
             "-t", "1", "-lv", "4", *arguments],
            env=dict(os.environ, GGML_BACKEND_PATH=plugin, THIMBLE_KV=settings),
            stdout=self.log, stderr=subprocess.STDOUT)

    def __enter__(self):
        for _ in range(120):
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5)
                return self
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.5)
        self.__exit__(None)
        raise AssertionError("the server does not start")

    def __exit__(self, error, *_):
        if error is None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            check(self.process.wait(timeout=60) == 0, "clean stop")
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        sys.stdout.write("".join(f"server: {line}\n" for line in self.text().splitlines()[-15:]))

    def text(self):
        self.log.seek(0)
        return self.log.read()

    def post(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def ask(self, question, slot=-1, n_tokens=12, cached=False):
        answer = self.client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": question}], max_tokens=n_tokens, temperature=0,
            extra_body={"id_slot": slot, "cache_prompt": cached})
        return answer.choices[0].message.content
