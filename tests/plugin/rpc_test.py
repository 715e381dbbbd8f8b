#!/usr/bin/env python3
"""The plugin at the far end of ggml's RPC, and llama-server without it at the near end: texts are those of a server that has
the plugin itself, also from restored slots and shifted contexts, and two slots answer at a time; the far end's memory grows with the cells that
are filled and stays under a fifth of f16's; a token takes as many bytes on the wire as with an f16 cache; and where the far
end is killed, the near end ends too and both can be started again; ends of different versions refuse each other by name.

With `reserved`, the plugin is one for a device whose memory is mapped piece by piece (CUDA's, or its emulation): texts and memory alone,
with short prompts, as emulation is slow.

usage: rpc_test.py <llama-server> <rpc-server> <libggml-rpc.so> <plugin> <preload_backends> <model> [reserved]
"""
import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
from server_process import ServerProcess

program, rpc_server, rpc_library, plugin, preload, model = sys.argv[1:7]
for needed in (program, rpc_server, rpc_library):
    if not os.path.exists(needed):
        print("skipped: there is no", needed)
        sys.exit(77)
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data", "alice.txt")) as f:
    text = f.read()
KV = "bits=2,window=16,pool=8,small=0"
states_folder = tempfile.TemporaryDirectory()
states = states_folder.name


def check(condition, what):
    if not condition:
        raise AssertionError(what)
    print("ok:", what, flush=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Wire:
    """A port that leads to another one and counts the bytes that pass, both ways together. With `protocol`, the far end's first
    message, its answer to a greeting, names this major version."""

    def __init__(self, port, protocol=None):
        self.to, self.bytes, self.protocol = port, 0, protocol
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                return
            for s in (near, far):
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for a, b, protocol in ((near, far, None), (far, near, self.protocol)):
                threading.Thread(target=self.pass_on, args=(a, b, protocol), daemon=True).start()

    def pass_on(self, source, target, protocol):
        try:
            if protocol:  # 8 bytes of its size, then the version
                greeting = bytearray(source.recv(9, socket.MSG_WAITALL))
                greeting[8] = protocol
                target.sendall(greeting)
            while data := source.recv(1 << 20):
                self.bytes += len(data)
                target.sendall(data)
        except OSError:
            pass
        for s in (source, target):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class FarEnd:
    """The RPC server, on THIMBLE0 with settings `kv`, or on the CPU where they are None."""

    def __init__(self, kv):
        self.port = free_port()
        self.log = tempfile.TemporaryFile("w+", errors="replace")
        environment = dict(os.environ)
        if kv:
            environment.update(GGML_BACKEND_PATH=plugin, THIMBLE_KV=kv)
        self.process = subprocess.Popen(
            [rpc_server, "-d", "THIMBLE0" if kv else "CPU", "-p", str(self.port), "-t", "1"], env=environment,
            cwd=os.path.dirname(rpc_library), stdout=self.log, stderr=subprocess.STDOUT)
        for _ in range(600):
            if self.listens():
                self.wire = Wire(self.port)
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError("the RPC server does not start:\n" + self.text())

    def listens(self):
        with open("/proc/net/tcp") as f:  # to connect would be to be a client, and the server serves one at a time
            return any(line.split()[1].endswith(f":{self.port:04X}") and line.split()[3] == "0A" for line in f.readlines()[1:])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.wire.listener.close()

    def text(self):
        self.log.seek(0)
        return self.log.read()

    def resident(self):
        """Bytes of anonymous memory that are in RAM."""
        with open(f"/proc/{self.process.pid}/smaps_rollup") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("Anonymous:"))


def near_end(far, *arguments, n_cells=512, slots=2):
    """llama-server with its layers at the far end; where that is None, on its own THIMBLE0."""
    device = ["--rpc", f"127.0.0.1:{far.wire.port}", "--device", "RPC0"] if far else ["--device", "THIMBLE0"]
    environment = dict(os.environ, LD_PRELOAD=preload, GGML_BACKEND_PATH=rpc_library if far else plugin, THIMBLE_KV=KV)
    # Without the CPU's repacked weights, which RPC does not have, both ends compute the same.
    return ServerProcess([program, "-m", model, *device, "-ngl", "99", "-fa", "on", "-c", str(n_cells), "-np", str(slots),
                          "-no-kvu", "-t", "1", "--no-repack", "--context-shift", "-cram", "0", "-lv", "4",
                          "--slot-save-path", states, *arguments], environment)


def texts_of(server):
    """What a server answers, in all ways in which its cache is used."""
    prompts = [text[:700], text[700:1400]]
    texts = [server.complete(prompts[0], 12, 0)["content"]]
    saved = server.request("/slots/0?action=save", {"filename": "state"})
    restored = server.request("/slots/1?action=restore", {"filename": "state"})
    check(saved["n_saved"] == restored["n_restored"] > 100, f"a slot of {saved['n_saved']} cells is saved and restored")
    again = server.complete(prompts[0] + texts[0], 12, 1)
    check(again["timings"]["prompt_n"] < 20, "the restored cells are not read again")
    texts.append(again["content"])
    texts.append(server.complete(prompts[1], 12, 1)["content"])
    texts.append(server.complete(prompts[1] + texts[2], 90, 1)["content"])
    check("slot context shift" in server.text(), "the context is shifted")
    # Which tokens share a batch can change a text, so these have a right answer and are not compared.
    facts = {"The capital of France is Paris. The capital of Italy is": "Rome", "One, two, three, four, five, six,": "seven"}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda fact, slot: server.complete(fact, 8, slot)["content"], facts, (0, 1)))
    check(all(right in answer for right, answer in zip(facts.values(), found)), f"two slots answer at a time: {found}")
    return texts


def bytes_per_token(server, far):
    """Of tokens 5 to 20, when the graph of a step was sent before."""
    counts = []
    for n in (4, 20):
        before = far.wire.bytes
        answer = server.request("/completion", {"prompt": text[:300], "n_predict": n, "temperature": 0, "id_slot": 0,
                                                "cache_prompt": False, "ignore_eos": True})
        check(answer["tokens_predicted"] == n, f"{n} tokens are made")
        counts.append(far.wire.bytes - before)
    return (counts[1] - counts[0]) / 16


def answers():
    with near_end(None) as server:
        alone = texts_of(server)
    with FarEnd(KV) as far:
        with near_end(far) as server:
            over_rpc = texts_of(server)
            check(over_rpc == alone, f"the texts are those of one process: {over_rpc[0]!r}")
        check("thimble: KV cache of 30 layers" in far.text(), "the far end codes the cache and says so")
        with near_end(far) as server:
            check(server.complete(text[:700], 12, 0)["content"] == alone[0], "the far end serves a second program")
            check(server.request("/slots/1?action=restore", {"filename": "state"})["n_restored"] > 100, "restored")
            again = server.complete(text[:700] + alone[0], 12, 1)["content"]
            check(again == alone[1], "a slot that another program saved is restored")
        with near_end(far, "--no-warmup") as server:
            server.request("/slots/1?action=restore", {"filename": "state"})
            again = server.complete(text[:700] + alone[0], 12, 1)["content"]
            check(again == alone[1], "a slot is restored before any graph was run")


def memory_and_wire():
    cell = 30 * 2 * 192 * 2  # bytes as f16
    resident, wire = {}, {}
    for kv, n_cells in ((None, 256), (None, 8192), (KV, 8192)):
        with FarEnd(kv) as far, near_end(far, "-b", "32", "-ub", "32", n_cells=n_cells, slots=1) as server:
            wire[kv] = bytes_per_token(server, far)
            resident[kv, n_cells] = far.resident()
            if kv:
                server.complete(text[:4000], 1, 0)
                filled = far.resident()
    # What is no cache: what a server takes whose cache is small, after batches as large.
    others = resident[None, 256] - 256 * cell
    f16, coded, filled = resident[None, 8192] - others, resident[KV, 8192] - others, filled - others
    print(f"resident of 8192 cells: f16 {f16 >> 10} KiB, coded {coded >> 10} KiB, with 900 cells more {filled >> 10} KiB; "
          f"bytes a token: f16 {wire[None]:.0f}, coded {wire[KV]:.0f}")
    check(f16 >= 0.95 * 8192 * cell, "an f16 cache takes its memory at once")
    check(coded < filled < f16 / 5, "a coded cache takes memory for the cells that are filled")
    check(abs(wire[KV] / wire[None] - 1) < 0.01, "a token takes as many bytes on the wire as with f16")


def left_f16():
    with FarEnd(KV) as far:
        with near_end(far, "-fa", "off") as server:
            check(server.complete(text[:300], 4, 0)["content"] != "", "without flash attention there is an answer")
        check("KV cache not coded: 30 layers stay f16" in far.text() and "flash attention is off" in far.text(),
              "and the far end says that its cache is f16, and why")
    with FarEnd(KV) as far:
        with near_end(far, "-ctk", "q8_0", "-ctv", "q8_0") as server:
            check(server.complete(text[:300], 4, 0)["content"] != "", "with a cache of another type there is an answer")
        check("the cache type is q8_0" in far.text(), "and the far end says that it leaves this cache as it is")


def other_versions():
    with FarEnd(KV) as far:
        true_wire = far.wire
        for major in (6, 8):
            far.wire = Wire(far.port, protocol=major)
            try:
                with near_end(far):
                    message = "it starts"
            except AssertionError as error:
                message = str(error)
            check(f"RPC server version mismatch: {major}." in message and "RPC handshake failed for 127.0.0.1:" in message,
                  f"a near end refuses a far end of version {major} by name, and ends")
            far.wire.listener.close()
        greeting = bytes(3)  # an older program's, of another size
        with socket.create_connection(("127.0.0.1", far.port)) as older:
            older.sendall(bytes([14]) + len(greeting).to_bytes(8, "little") + greeting)
            try:
                answer = older.recv(1)
            except ConnectionResetError:
                answer = b""
            check(answer == b"", "the far end lets go of a near end of another version")
        far.wire = true_wire
        with near_end(far) as server:
            check(server.complete(text[:300], 4, 0)["content"] != "", "and serves one of its own afterwards")
        check("client needs upgrade to protocol" in far.text(), "of which its log says so")


def killed():
    with FarEnd(KV) as far:
        with near_end(far) as server:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                answer = pool.submit(server.status_of, "/completion", {"prompt": text[:700], "n_predict": 2000, "ignore_eos": True})
                time.sleep(2)
                check(not answer.done(), "an answer is being made")
                far.process.send_signal(signal.SIGKILL)
                try:
                    status = answer.result(60)
                except OSError as error:
                    status = error
                check(status != 200, f"the request fails: {status}")
            server.process.wait(60)
            check("Remote RPC server crashed or returned malformed response" in server.text(), "the near end says why it ends")
    with FarEnd(KV) as far, near_end(far) as server:
        check(server.complete(text[:700], 4, 0)["content"] != "", "both ends are started again, and answer")


def reserved():
    """The far end has addresses for f16 caches and memory for codes."""
    cell = 30 * 2 * 192 * 2  # bytes as f16
    resident, sizes = {}, (256, 8192)
    for n_cells in sizes:
        with FarEnd(KV) as far:
            with near_end(far, "-b", "32", "-ub", "32", n_cells=n_cells, slots=1) as server:
                answer = server.complete(text[:150], 4, 0)["content"]
                resident[n_cells] = far.resident()
                server.request("/slots/0?action=save", {"filename": "state"})
                again = server.complete(text[:150] + answer, 2, 0)["content"]
            check("thimble: KV cache of 30 layers" in far.text(), "the far end codes the cache")
            with near_end(far, "--no-warmup", n_cells=512, slots=1) as server:
                server.request("/slots/0?action=restore", {"filename": "state"})
                check(server.complete(text[:150] + answer, 2, 0)["content"] == again, "a slot is restored before any graph")
    with FarEnd(None) as far, near_end(far, slots=1) as server:
        check(server.complete(text[:150], 4, 0)["content"] == answer, f"with an f16 cache the answer is as well {answer!r}")
    coded, f16 = resident[sizes[1]] - resident[sizes[0]], (sizes[1] - sizes[0]) * cell
    print(f"resident of {sizes[1] - sizes[0]} cells more: {coded >> 10} KiB, as f16 {f16 >> 10} KiB")
    of_prompts = f16 / 30  # rows of one layer, which prompts are decoded to
    check(f16 / 20 < coded < f16 / 5 + of_prompts, "a coded cache takes less than a fifth of f16's memory")


if sys.argv[7:] == ["reserved"]:
    reserved()
    sys.exit(0)
answers()
memory_and_wire()
left_f16()
other_versions()
killed()
