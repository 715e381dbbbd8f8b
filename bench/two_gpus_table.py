#!/usr/bin/env python3
"""Prints the table of a run of bench/two_gpus.sh.

usage: two_gpus_table.py <output folder of bench/two_gpus.sh>
"""
import re
import sys
from pathlib import Path

from gpu_table import Run, compare, faster, print_table, times_as_much


def depths(run):
    """Those that any part has a row of, the deepest last."""
    parts = ('one', 'other', 'layer', 'tensor_f16', 'tensor')
    return sorted({int(d) for part in parts for d in re.findall(r'^ *(\d+) (?:f16|2) +\d', run.text(part), re.M)}) or [196608]


def rows(run):
    for depth in depths(run):
        one, other, layer, exact, tensor = (run.token_ms(part, depth, kv) for part, kv in (
            ('one', '2'), ('other', '2'), ('layer', '2'), ('tensor_f16', 'f16'), ('tensor', '2')))
        for name, alone in (('one GPU', one), ('the other GPU', other)):
            yield compare(f'a token at {depth}, 2 bits, layers on two GPUs: its time over one GPU\'s', name, alone, layer, 'ms',
                          times_as_much, '<= 1.05x')
        yield compare(f'a token at {depth}, 2 bits, tensors split over two GPUs', 'llama.cpp f16 there', exact, tensor, 'ms',
                      faster, '>= 1.6x')
        yield compare(f'a token at {depth}, 2 bits, tensors split over two GPUs', 'one GPU, 2 bits', one, tensor, 'ms', faster)
    exact, coded = (run.token_ms(part, 131072, kv) for part, kv in (('large_f16', 'f16'), ('large', '2')))
    yield compare('70B shape, a token at 131072, 2 bits, layers on two GPUs', 'llama.cpp f16 there', exact, coded, 'ms', faster, '>= 1.3x')
    f16, coded = (run.bench('prompt', 0, kv, 'prompt') for kv in ('f16', '2'))
    yield compare('a prompt, 2 bits, layers on two GPUs', 'llama.cpp f16 there', f16, coded, 'tokens/s', times_as_much, '>= 0.95x', 0)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__.strip())
    run = Run(Path(sys.argv[1]))
    print_table(run, rows(run))
    for line in re.findall(r'^server: .*', run.text('server'), re.M):
        print(line)


if __name__ == '__main__':
    main()
