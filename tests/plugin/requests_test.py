#!/usr/bin/env python3
"""200 requests of mixed lengths through two slots of llama-server, with retrieval: each is answered as it is alone.

usage: requests_test.py <llama-server> <plugin> <model> <directory for the virtual environment>
"""
import os
import random
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
from llama_server import Server, check, data, enter_environment, two_at_a_time

server, plugin, model, venv = sys.argv[1:]
enter_environment(venv)
with open(os.path.join(data, "alice.txt")) as f:
    words = f.read().split()

N_REQUESTS = 200
rng = random.Random(1)
requests = []
for i in range(N_REQUESTS):
    # Most are short; one in twenty is so long that most of its cells are neither in the window nor retrieved.
    n_words = rng.randint(3, 15) if i % 20 else rng.randint(120, 200)
    first = rng.randrange(len(words) - n_words)
    requests.append((" ".join(words[first:first + n_words]), rng.randint(2, 3)))


def answer(s, request):
    prompt, n_predict = request
    return s.request("/completion", {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "cache_prompt": False})


with Server(server, plugin, model, "bits=2,window=16,pool=4,top=16,small=0", "-np", "2") as s:
    alone = [answer(s, r) for r in requests]
    longest = max(a["timings"]["prompt_n"] for a in alone)
    check(longest > 150, f"prompts of up to {longest} tokens")
    together = two_at_a_time(lambda r: answer(s, r), requests)
    different = [i for i in range(N_REQUESTS) if together[i]["content"] != alone[i]["content"]]
    for i in different:
        print(f"{i}: alone {alone[i]['content']!r}, together {together[i]['content']!r}")
    check(not different, f"{N_REQUESTS} answers, two at a time, are those given alone")
    check("exact store of 30 layers" in s.text(), "with retrieval")
