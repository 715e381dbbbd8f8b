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
    parts = ('one', 'layer', 'tensor_f16', 'tensor')
    return sorted({int(d) for part in parts for d in re.findall(r'^ *(\d+) (?:f16|2) +\d', run.text(part), re.M)}) or [196608]


def rows(run):
    for depth in depths(run):
        one, layer, exact, tensor = (run.token_ms(part, depth, kv) for part, kv in (('one', '2'), ('layer', '2'),
                                                                                    ('tensor_f16', 'f16'), ('tensor', '2')))
        yield compare(f'a token at {depth}, 2 bits, layers on two GPUs: its time over one GPU\'s', 'one GPU', one, layer, 'ms',
                      times_as_much, '<= 1.05x')
        yield compare(f'a token at {depth}, 2 bits, tensors split over two GPUs', 'llama.cpp f16 there', exact, tensor, 'ms',
                      faster, '>= 1.6x')
        yield compare(f'a token at {depth}, 2 bits, tensors split over two GPUs', 'one GPU, 2 bits', one, tensor, 'ms', faster)
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
