#!/usr/bin/env python3
"""llama-server on THIMBLE0 through the OpenAI client: two requests at a time get the answers that each gets alone, slots
are saved and restored, a draft model changes no answer, and SIGINT stops it cleanly.

usage: server_test.py <llama-server> <plugin> <model> <draft model> <directory for the virtual environment>
"""
import os
import re
import sys
import tempfile

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
from llama_server import Server, check, data, enter_environment, two_at_a_time

server, plugin, model, draft, venv = sys.argv[1:]
enter_environment(venv)
with open(os.path.join(data, "alice.txt")) as f:
    alice = f.read()
questions = ["My dog is called Bingo. What is my dog called?", alice[:1200] + "\n\nWho wrote this?",
             "The cup is on the red table. Where is the cup?", alice[1200:2000] + "\n\nWhat happened?"]


def start(*arguments):
    return Server(server, plugin, model, "bits=4,window=32,pool=4", *arguments)


def ask_restored(s, i):
    """Answers question i in slot i % 2, which has read it already."""
    return s.ask(questions[i], slot=i % 2, cached=True)


def restore(s, i):
    s.request(f"/slots/{i % 2}?action=restore", {"filename": f"question-{i}"})


with tempfile.TemporaryDirectory() as states, start("-np", "2", "--slot-save-path", states) as s:
    alone = [s.ask(q) for q in questions]
    check("Bingo" in alone[0] and "table" in alone[2], f"right answers: {alone}")
    # Only the answers that are beyond doubt: tokens of one batch attend to one another exactly, and which tokens of a prompt
    # are in one batch depends on what the other slot is at.
    together = two_at_a_time(s.ask, questions)
    check([together[i] == alone[i] for i in (0, 2)] == [True, True], f"the same two at a time: {together}")

    # Prompts that each were read alone leave only the decoding to be done together, and then all answers are the same.
    for i, question in enumerate(questions):
        s.ask(question, slot=i % 2, n_tokens=1, cached=True)
        s.request(f"/slots/{i % 2}?action=save", {"filename": f"question-{i}"})
        s.request(f"/slots/{i % 2}?action=erase", {})
    alone = []
    for i in range(len(questions)):
        restore(s, i)
        alone.append(ask_restored(s, i))
    together = []
    for pair in ((0, 1), (2, 3)):
        for i in pair:
            restore(s, i)
        together += two_at_a_time(lambda i: ask_restored(s, i), pair)
    check(together == alone, f"all the same from restored slots, two at a time: {together}")

    prompt = {"prompt": alice[:1500], "n_predict": 16, "temperature": 0, "id_slot": 0, "cache_prompt": True}
    first = s.request("/completion", prompt)
    saved = s.request("/slots/0?action=save", {"filename": "alice"})
    s.request("/slots/0?action=erase", {})
    restored = s.request("/slots/0?action=restore", {"filename": "alice"})
    check(restored["n_restored"] == saved["n_saved"] > 300, f"slot of {saved['n_saved']} tokens saved and restored")
    second = s.request("/completion", prompt)
    check(second["content"] == first["content"], "the restored slot goes on alike")
    check(second["timings"]["prompt_n"] < 10, "without reading its prompt again")
    size = re.search(r"THIMBLE0 KV buffer size = *([0-9.]+) MiB", s.text())
    check(size and float(size[1]) < 0.35 * 180, f"coded cache in the log: {size and size[1]} MiB of 180 as f16")
    check("thimble: KV cache of 30 layers" in s.text(), "what the cache is stands in the log")

with start("-np", "1", "-ctk", "q8_0", "-ctv", "q8_0") as s:
    check("Bingo" in s.ask(questions[0]), "a right answer with -ctk q8_0")
    check("cache type q8_0 means bits=4" in s.text(), "the log says what the type means")
    check("thimble: KV cache of 30 layers" in s.text(), "and the cache is coded")

with start("-np", "1") as s:
    prompt = {"prompt": alice[:1500], "n_predict": 32, "temperature": 0, "cache_prompt": False}
    plain = s.request("/completion", prompt)
with start("-np", "1", "--spec-type", "draft-simple", "-md", draft, "-devd", "THIMBLE0", "-ngld", "99") as s:
    drafted = s.request("/completion", prompt)
    check(drafted["content"] == plain["content"], f"the same with a draft model: {drafted['content']!r}")
    accepted = drafted["timings"].get("draft_n_accepted", 0)
    check(accepted > 8, f"{accepted} of {drafted['timings'].get('draft_n')} drafted tokens accepted")
    check(s.text().count("thimble: KV cache of 30 layers") == 2, "both caches are coded")
