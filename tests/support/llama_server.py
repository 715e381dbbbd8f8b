"""llama-server on THIMBLE0, and the OpenAI client to ask it with."""
import concurrent.futures
import fcntl
import os
import subprocess
import sys

from server_process import ServerProcess

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


class Server(ServerProcess):
    """A running llama-server on THIMBLE0, with these settings of the cache; ends with a clean stop."""

    def __init__(self, server, plugin, model, settings, *arguments):
        super().__init__([server, "-m", model, "--device", "THIMBLE0", "-ngl", "99", "-fa", "on", "-c", "8192", "-t", "1",
                          "-lv", "4", *arguments],
                         dict(os.environ, GGML_BACKEND_PATH=plugin, THIMBLE_KV=settings))
        import openai  # of the virtual environment
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", timeout=120)

    def __exit__(self, error, *_):
        status = self.stop()
        sys.stdout.write("".join(f"server: {line}\n" for line in self.text().splitlines()[-15:]))
        if error is None:
            check(status == 0, "clean stop")

    def ask(self, question, slot=-1, n_tokens=12, cached=False):
        answer = self.client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": question}], max_tokens=n_tokens, temperature=0,
            extra_body={"id_slot": slot, "cache_prompt": cached})
        return answer.choices[0].message.content
