#!/usr/bin/env python3
"""llama-server on THIMBLE0 through the OpenAI client: two requests at a time get the answers that each gets alone, slots
are saved and restored, a draft model changes no answer, and SIGINT stops it cleanly.

usage: server_test.py <llama-server> <plugin> <model> <draft model> <directory for the virtual environment>
"""
import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

server, plugin, model, draft, venv = sys.argv[1:]
here = os.path.dirname(os.path.abspath(__file__))
python = os.path.join(venv, "bin", "python")
if os.path.realpath(sys.prefix) != os.path.realpath(venv):  # once more, where the client is
    ready = os.path.join(venv, "ready")
    if not os.path.exists(ready):
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        requirements = os.path.join(here, "requirements.txt")
        if subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements]).returncode != 0:
            print("skipped: no OpenAI client")
            sys.exit(77)
        open(ready, "w").close()
    os.execv(python, [python, *sys.argv])
import openai

with open(os.path.join(here, "data", "alice.txt")) as f:
    alice = f.read()
questions = ["My dog is called Bingo. What is my dog called?", alice[:1200] + "\n\nWho wrote this?",
             "The cup is on the red table. Where is the cup?", alice[1200:2000] + "\n\nWhat happened?"]


def check(condition, what):
    if not condition:
        raise AssertionError(what)
    print("ok:", what, flush=True)


class Server:
    """A running llama-server; ends with a clean stop."""

    def __init__(self, *arguments):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", timeout=120)
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [server, "-m", model, "--port", str(port), "--device", "THIMBLE0", "-ngl", "99", "-fa", "on", "-c", "8192",
             "-t", "1", "-lv", "4", *arguments],
            env=dict(os.environ, GGML_BACKEND_PATH=plugin, THIMBLE_KV="bits=4,window=4+32"),
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

    def ask_restored(self, i):
        """Answers question i in slot i % 2, which has read it already."""
        return self.ask(questions[i], slot=i % 2, cached=True)

    def restore(self, i):
        self.post(f"/slots/{i % 2}?action=restore", {"filename": f"question-{i}"})


def two_at_a_time(call, inputs):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(call, inputs))


with tempfile.TemporaryDirectory() as states, Server("-np", "2", "--slot-save-path", states) as s:
    alone = [s.ask(q) for q in questions]
    check("Bingo" in alone[0] and "table" in alone[2], f"right answers: {alone}")
    # Only the answers that are beyond doubt: tokens of one batch attend to one another exactly, and which tokens of a prompt
    # are in one batch depends on what the other slot is at.
    together = two_at_a_time(s.ask, questions)
    check([together[i] == alone[i] for i in (0, 2)] == [True, True], f"the same two at a time: {together}")

    # Prompts that each were read alone leave only the decoding to be done together, and then all answers are the same.
    for i, question in enumerate(questions):
        s.ask(question, slot=i % 2, n_tokens=1, cached=True)
        s.post(f"/slots/{i % 2}?action=save", {"filename": f"question-{i}"})
        s.post(f"/slots/{i % 2}?action=erase", {})
    alone = []
    for i in range(len(questions)):
        s.restore(i)
        alone.append(s.ask_restored(i))
    together = []
    for pair in ((0, 1), (2, 3)):
        for i in pair:
            s.restore(i)
        together += two_at_a_time(s.ask_restored, pair)
    check(together == alone, f"all the same from restored slots, two at a time: {together}")

    prompt = {"prompt": alice[:1500], "n_predict": 16, "temperature": 0, "id_slot": 0, "cache_prompt": True}
    first = s.post("/completion", prompt)
    saved = s.post("/slots/0?action=save", {"filename": "alice"})
    s.post("/slots/0?action=erase", {})
    restored = s.post("/slots/0?action=restore", {"filename": "alice"})
    check(restored["n_restored"] == saved["n_saved"] > 300, f"slot of {saved['n_saved']} tokens saved and restored")
    second = s.post("/completion", prompt)
    check(second["content"] == first["content"], "the restored slot goes on alike")
    check(second["timings"]["prompt_n"] < 10, "without reading its prompt again")
    size = re.search(r"THIMBLE0 KV buffer size = *([0-9.]+) MiB", s.text())
    check(size and float(size[1]) < 0.35 * 180, f"coded cache in the log: {size and size[1]} MiB of 180 as f16")
    check("thimble: KV cache of 30 layers" in s.text(), "what the cache is stands in the log")

with Server("-np", "1") as s:
    prompt = {"prompt": alice[:1500], "n_predict": 32, "temperature": 0, "cache_prompt": False}
    plain = s.post("/completion", prompt)
with Server("-np", "1", "--spec-type", "draft-simple", "-md", draft, "-devd", "THIMBLE0", "-ngld", "99") as s:
    drafted = s.post("/completion", prompt)
    check(drafted["content"] == plain["content"], f"the same with a draft model: {drafted['content']!r}")
    accepted = drafted["timings"].get("draft_n_accepted", 0)
    check(accepted > 8, f"{accepted} of {drafted['timings'].get('draft_n')} drafted tokens accepted")
    check(s.text().count("thimble: KV cache of 30 layers") == 2, "both caches are coded")
