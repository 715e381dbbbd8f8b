#!/usr/bin/env python3
"""What llama-server does with states of a coded cache: slots saved and restored, on the same device and on another; cells
whose positions shift; a slot file of other settings. Each case prints figures beside their limits and is OK or FAIL.

usage: server_states.py <bin directory of a build> --model M.gguf [--profile P.gguf] [--kv 4,2] [--devices CUDA,CPU] [case...]

  slots    a slot is saved on each device and restored on each: the next token's KL divergence from before, and from f16's
  reuse    --cache-reuse: a part of the prompt is gone, what follows it shifts: KL divergence from f16's, asked the same way
  shift    --context-shift: an answer longer than the context, then a prompt that is read anew
  refused  a slot of other settings is not restored, or fails its own request alone; the server goes on serving

KL divergences are of the 200 likeliest tokens. f16 runs on the first device that is named.
"""
import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
import urllib.error

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "support"))
from server_process import ServerProcess  # noqa: E402

LIMITS = {"4": 0.08, "2": 0.20}  # mean KL divergence from f16's
SAME = 0.02                      # from the same cache's before its state was saved
TEXT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples", "gpl-3.0.txt")


class Server(ServerProcess):
    """llama-server on `device` with a cache of `kv` bits, or f16."""

    def __init__(self, kv, device, *flags, context=4096):
        coded = kv != "f16"
        plain = "none" if device == "CPU" else device + "0"
        environment = dict(os.environ)
        if coded:
            profile = f",profile={args.profile}" if args.profile else ""
            environment.update(GGML_BACKEND_PATH=os.path.join(args.bin, "libggml-thimble.so"),
                               THIMBLE_KV=f"bits={kv},device={device}{profile}")
        super().__init__([os.path.join(args.bin, "llama-server"), "-m", args.model, "-c", str(context), "--host", "127.0.0.1",
                          "-t", str(args.threads), "-lv", "4", "-fa", "on", "-ngl", "99",
                          "--device", "THIMBLE0" if coded else plain, *flags], environment)
        self.log_path = os.path.join(work, f"{time.time():.2f}-{kv}-{device}.log")

    def stop(self):
        status = super().stop()
        with open(self.log_path, "w") as log:
            log.write(self.text())
        return status

    def request(self, path, body=None):
        """The answer; of an error to a POST, its code as "http" and what it says."""
        try:
            return super().request(path, body)
        except urllib.error.HTTPError as error:
            if body is None:
                raise
            return {"http": error.code, "error": error.read().decode(errors="replace")[:300]}

    def complete(self, prompt, n=1, slot=0, n_probs=200, **more):
        return self.request("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "id_slot": slot,
                                            "cache_prompt": True, "n_probs": n_probs, **more})

    def slot(self, action, slot, name):
        return self.request(f"/slots/{slot}?action={action}", {"filename": name})


def next_token(answer):
    if "completion_probabilities" not in answer:
        raise RuntimeError(f"no answer: {answer}")
    return {t["id"]: t["logprob"] for t in answer["completion_probabilities"][0]["top_logprobs"]}


def kl(p, q):
    return sum(math.exp(a) * (a - q.get(token, -25.0)) for token, a in p.items())


def mean(values):
    return sum(values) / len(values)


failed = 0


def report(name, holds, figure):
    global failed
    failed += not holds
    print(f"{'OK  ' if holds else 'FAIL'} {name}: {figure}", flush=True)


PROMPTS = [(text_start, n) for text_start, n in ((0, 4000), (9000, 2500), (20000, 700))]


def prompt_of(i):
    start, n = PROMPTS[i]
    return text[start:start + n]


def slots(kv):
    """Slot i holds prompt i. `before` and `after`, by devices: the next token's distributions."""
    before, after = {}, {}
    n = len(PROMPTS)
    with tempfile.TemporaryDirectory() as states:
        flags = ("-np", str(n), "--slot-save-path", states)
        context = 2048 * n
        plain = {}
        for device in devices:
            with Server("f16", device, *flags, context=context) as server:
                plain[device] = [next_token(server.complete(prompt_of(i), slot=i)) for i in range(n)]
        exact = plain[devices[0]]
        floor = mean([kl(p, q) for p, q in zip(exact, plain[devices[-1]])])
        for device in devices:
            with Server(kv, device, *flags, context=context) as server:
                for i in range(n):
                    server.complete(prompt_of(i), slot=i)
                    saved = server.slot("save", i, f"{device}-{i}")
                    # The last token is read again, alone, as it is after the state was restored.
                    before.setdefault(device, []).append(next_token(server.complete(prompt_of(i), slot=i)))
                    if "n_saved" not in saved:
                        raise RuntimeError(f"not saved: {saved}")
        for to in devices:
            with Server(kv, to, *flags, context=context) as server:
                for source in devices:
                    for i in range(n):
                        slot = (i + 1) % n
                        restored = server.slot("restore", slot, f"{source}-{i}")
                        answer = server.complete(prompt_of(i), slot=slot)
                        if "n_restored" not in restored or answer.get("timings", {}).get("prompt_n", 99) > 4:
                            raise RuntimeError(f"not restored: {restored} {str(answer)[:300]}")
                        after.setdefault((source, to), []).append(next_token(answer))
                        server.slot("erase", slot, "")
    for (source, to), got in after.items():
        changes = [kl(p, q) for p, q in zip(before[source], got)]
        change = mean(changes)
        lost = mean([kl(p, q) for p, q in zip(exact, got)])
        was = mean([kl(p, q) for p, q in zip(exact, before[source])])
        report(f"slots, {kv} bits, {source} to {to}", change <= SAME and lost <= LIMITS[kv],
               f"mean KL {change:.4f} from before (<= {SAME}; each {', '.join(f'{x:.3f}' for x in changes)}); from f16 {lost:.3f} (<= {LIMITS[kv]}; before {was:.3f}; "
               f"f16 on {devices[-1]} {floor:.3f})")


def reuse(kv):
    # Parts that begin with a paragraph have the same tokens wherever they stand.
    first, second, third = (text.index("\n\n", at) for at in (900, 2100, 6000))
    begin, gone, rest = text[:first], text[first:second], text[second:third]
    ends = [rest.index("\n", at) for at in (2000, 2500, 3000)]
    answers, shifted = {}, {}
    for cache in ("f16", kv):
        with Server(cache, devices[0], "-np", "1", "--cache-ram", "0", "--cache-reuse", "32") as server:
            got, read = [], 0
            for end in ends:
                server.complete(begin + gone + rest)
                answer = server.complete(begin + rest[:end])
                got.append(next_token(answer))
                read = max(read, answer["timings"]["prompt_n"])
            answers[cache], shifted[cache] = got, read < 100
    divergence = mean([kl(p, q) for p, q in zip(answers["f16"], answers[kv])])
    report(f"reuse, {kv} bits", divergence <= LIMITS[kv] and shifted["f16"] and shifted[kv],
           f"mean KL {divergence:.3f} (<= {LIMITS[kv]}), shifted: f16 {shifted['f16']}, {kv} bits {shifted[kv]}")


def shift(kv):
    answers = {}
    for cache in ("f16", kv):
        with Server(cache, devices[0], "-np", "1", "--context-shift", context=1024) as server:
            long = server.complete(text[:2500], n=900, n_probs=0, ignore_eos=True)
            again = [next_token(server.complete(text[start:start + 1500])) for start in (9000, 15000)]
            answers[cache] = long, again, server.text().count("slot context shift")
    long, again, shifts = answers[kv]
    divergence = mean([kl(p, q) for p, q in zip(answers["f16"][1], again)])
    report(f"shift, {kv} bits", long.get("tokens_predicted") == 900 and shifts > 0 and divergence <= LIMITS[kv],
           f"{shifts} shifts, {long.get('tokens_predicted', long)} tokens; then mean KL {divergence:.3f} (<= {LIMITS[kv]}) "
           f"of other prompts; text ends {long.get('content', '')[-60:]!r}")


def refused(kv):
    other = "2" if kv == "4" else "4"
    with tempfile.TemporaryDirectory() as states:
        flags = ("-np", "2", "--slot-save-path", states)
        with Server(other, devices[0], *flags) as server:
            server.complete(prompt_of(0), slot=0)
            server.slot("save", 0, "other")
        with Server(kv, devices[0], *flags) as server:
            expected = server.complete(prompt_of(1), n=16, slot=0)
            restored = server.slot("restore", 1, "other")
            failing = server.complete(prompt_of(0), n=4, slot=1)
            good = [server.complete(prompt_of(1), n=16, slot=0), server.complete(prompt_of(2), n=4, slot=1)]
            said = re.search(r"thimble: [^\n]*settings[^\n]*", server.text())
    report(f"refused, {kv} bits", all("content" in answer for answer in good) and
           good[0]["content"] == expected["content"] and bool(said),
           f"restoring: {str(restored)[:60]}; its request: {failing.get('error', 'answered')[:80]}; others: "
           f"{[answer.get('content', answer)[:30] for answer in good]}; {said.group()[:160] if said else 'nothing said'}")


CASES = {"slots": slots, "reuse": reuse, "shift": shift, "refused": refused}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bin")
parser.add_argument("cases", nargs="*", default=list(CASES))
parser.add_argument("--model", required=True)
parser.add_argument("--profile", default="")
parser.add_argument("--kv", default="4,2")
parser.add_argument("--devices", default="CUDA,CPU")
parser.add_argument("--threads", type=int, default=8)
parser.add_argument("--logs", help="directory for the servers' logs, which stay there")
args = parser.parse_args()
devices = args.devices.split(",")
with open(TEXT) as file:
    text = file.read()
with tempfile.TemporaryDirectory() as scratch:
    work = args.logs or scratch
    os.makedirs(work, exist_ok=True)
    for case in args.cases:
        for kv in args.kv.split(","):
            try:
                CASES[case](kv)
            except Exception as error:  # a case that fails does not stop the others
                report(f"{case}, {kv} bits", False, repr(error)[:400])
sys.exit(failed > 0)
