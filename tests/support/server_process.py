"""A server under test: started on a free port, asked, and stopped cleanly."""
import json
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request


class ServerProcess:
    """What `command` starts, with a --port behind it, from when it answers until the end of a `with`."""

    def __init__(self, command, environment):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen([*command, "--port", str(self.port)], env=environment, stdout=self.log,
                                        stderr=subprocess.STDOUT)

    def __enter__(self):
        for _ in range(600):
            try:
                self.request("/health")
                return self
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.1)
        self.stop()
        raise AssertionError("the server does not start:\n" + self.text())

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Ends the server as Ctrl-C does, and returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode

    def text(self):
        """The log so far."""
        self.log.seek(0)
        return self.log.read()

    def request(self, path, body=None):
        """The answer to a GET, or to a POST of `body`. Raises urllib.error.HTTPError for another status than 200."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def status_of(self, path, body=None):
        """The HTTP status of the answer."""
        try:
            self.request(path, body)
            return 200
        except urllib.error.HTTPError as error:
            return error.code

    def complete(self, prompt, n, slot):
        return self.request("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "id_slot": slot})
