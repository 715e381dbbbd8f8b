#!/usr/bin/env python3
"""calibrate= of the plugin: a program that reads a text writes the very file that `thimble calibrate` writes of it; a server
at work writes a usable one; and what cannot be read or written is said in a sentence.

usage: calibrate_plugin_test.py <thimble> <plugin> <llama.cpp's programs> <model> <text> <test> (same, server or refusals)
"""
import filecmp
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
from server_process import ServerProcess  # noqa: E402

thimble, plugin, programs, model, text, test = sys.argv[1:]
completion, server = (os.path.join(programs, name) for name in ("llama-completion", "llama-server"))
on_plugin = ["-m", model, "--device", "THIMBLE0", "-ngl", "99", "-fa", "on", "-t", "1"]


def check(condition, what, log=""):
    if not condition:
        raise AssertionError(f"{what}\n{log}")
    print("ok:", what, flush=True)


def environment(settings):
    return dict(os.environ, GGML_BACKEND_PATH=plugin, THIMBLE_KV=settings)


def run(settings, *arguments, status=0):
    done = subprocess.run([completion, *on_plugin, "-no-cnv", *arguments], env=environment(settings),
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    log = done.stdout.decode(errors="replace")
    check(done.returncode == status, f"{settings or 'no settings'}: exit code {done.returncode}", log)
    return log


def same_file(folder):
    # One sequence of two batches, 512 tokens and a rest. Both files name what was read, so the text has the program's name.
    prompt = folder / "llama-completion"
    prompt.write_text(Path(text).read_text()[:2500].strip())
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    log = run(f"calibrate={ours}", "-f", str(prompt), "-c", "1024", "-n", "1")
    check("thimble: calibrating: keys, values and queries of 30 layers are read off an f16 cache" in log, "said at the start")
    check(f"thimble: calibrate={ours}: written" in log, "said at the end", log)
    said = subprocess.run([thimble, "calibrate", "-m", model, "-f", str(prompt), "-o", str(theirs), "--window", "1024",
                           "-n", "1024", "-t", "1"], check=True, stdout=subprocess.PIPE, text=True).stdout
    n_tokens = int(re.search(r"(\d+) tokens", said)[1])
    check(512 < n_tokens < 1024 and f"{n_tokens} tokens" in log, f"{n_tokens} tokens in both", log)
    check(filecmp.cmp(ours, theirs, shallow=False), "the same file")


def of_a_server(folder):
    # Two chats at once, whose tokens share batches, in one cache; then a profile that a cache of 2 bits can use.
    profile = folder / "server.thimble.gguf"
    words = Path(text).read_text()
    prompts = [words[:1200], words[3000:4400]]
    at_work = ServerProcess([server, *on_plugin, "-c", "2048", "-np", "2", "-kvu", "-lv", "4"],
                            environment(f"calibrate={profile},rates=2,even=yes"))
    with at_work:
        chats = [threading.Thread(target=at_work.complete, args=(prompt, 24, slot)) for slot, prompt in enumerate(prompts)]
        for chat in chats:
            chat.start()
        for chat in chats:
            chat.join()
        check(not profile.exists(), "nothing is written while it works")
        check(at_work.stop() == 0, "clean stop", at_work.text()[-3000:])
    log = at_work.text()
    written = re.search(r"written, [0-9.]+ MB \(llama-server, (\d+) tokens, seed 1, positions to 8192\)", log)
    check(written, "written at its end", log[-3000:])
    # Prompts and answers, without each answer's last token, which is never run.
    run_by_server = sum(int(n) for n in re.findall(r"eval time =.*/ +(\d+) tokens", log)) - 2
    check(abs(int(written[1]) - run_by_server) <= 2, f"{written[1]} of {run_by_server} tokens that the server ran were read")
    shown = subprocess.run([thimble, "doctor", "-m", model, "--profile", str(profile)], check=True, stdout=subprocess.PIPE,
                           text=True).stdout
    check("architecture llama, 30 layers" in shown, "doctor reads the profile", shown)
    log = run(f"bits=2,small=0,profile={profile}", "-p", "The white rabbit", "-n", "4", "-c", "512")
    check(f"profile={profile}" in log and "KV cache of 30 layers" in log, "a cache uses it", log)


def refusals(folder):
    out = folder / "out.gguf"
    short = ["-p", "hello there", "-n", "1", "-c", "512"]
    for settings, said in [(f"calibrate={folder}/none/out.gguf", "the folder is not there, or cannot be written to"),
                           (f"calibrate={folder}", "it must name a file"),
                           (f"calibrate={out},bits=2", "bits= has no meaning with calibrate="),
                           (f"calibrate={out},profile=auto", "profile= has no meaning with calibrate="),
                           ("tokens=5", "tokens= has no meaning without calibrate=")]:
        check(said in run(settings, *short, status=1), said)
    log = run(f"calibrate={out}", *short, "-fa", "off", status=1)
    check("flash attention is off, which calibrate= needs" in log, "flash attention is needed", log)
    # Layers that the plugin does not see: the program goes on, and no half profile is written.
    log = run(f"calibrate={out}", *short, "-ngl", "10")
    check("no profile will be written: the layers before layer" in log, "layers elsewhere", log)
    log = run(f"calibrate={out}", *short, "--no-kv-offload")
    check("is not on THIMBLE0 and so not read for calibrate=" in log, "a cache elsewhere", log)
    log = run(f"calibrate={out}", "-p", "hello", "-n", "1", "-c", "512")
    check("no profile was written: the program ran no tokens" in log, "too short", log)
    # The folder goes away while the program runs: found out at the end.
    gone = folder / "gone"
    gone.mkdir()
    running = ServerProcess([server, *on_plugin, "-c", "512", "-np", "1"], environment(f"calibrate={gone}/out.gguf,rates=2"))
    with running:
        running.complete(Path(text).read_text()[:200], 1, 0)
        gone.rmdir()
        check(running.stop() == 0, "clean stop", running.text()[-3000:])
    check("no profile was written: cannot write" in running.text(), "a folder that is gone", running.text()[-3000:])
    check(not list(folder.iterdir()), "no file is left")


with tempfile.TemporaryDirectory() as directory:
    {"same": same_file, "server": of_a_server, "refusals": refusals}[test](Path(directory))
