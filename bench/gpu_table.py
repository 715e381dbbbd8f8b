#!/usr/bin/env python3
"""Prints the table of a run of bench/gpu.sh: what was measured beside which peer, and what is required.

usage: gpu_table.py <output folder of bench/gpu.sh>
"""
import re
import sys
from pathlib import Path

SHAPES = ('1x196608', '8x32768', '32x8192', '128x2048')
NOT_RUN, TIMED_OUT = 77, (124, 137)


class Run:
    """The outputs of the parts, and what became of them."""

    def __init__(self, folder):
        self.folder = folder
        self.status = {part: int(code) for part, code, _ in map(str.split, self.text('status').splitlines())}

    def text(self, name):
        path = self.folder / f'{name}.txt'
        return path.read_text() if path.exists() else ''

    def find(self, part, pattern):
        """Numbers of the first line that matches, or why there are none."""
        if match := re.search(pattern, self.text(part), re.M):
            return [float(x) for x in match.groups()]
        code = self.status.get(part, NOT_RUN)
        if code == NOT_RUN:
            return 'not run'
        return 'timed out' if code in TIMED_OUT else f'failed (exit status {code})' if code else 'no figure'

    def attention(self, shape, bits):  # us: ours, cuDNN's
        return self.find('attention', rf'^\| {shape} \| {bits} \| \S+ \| (\S+) \|(?: \S+ \|){{3}} (\S+) \|')

    def bench(self, part, depth, kv, column):  # tokens/s: median, lowest, highest
        numbers = r'\s+(\S+) \[\s*(\S+),\s*(\S+)\]'
        skipped = r'\s+\S+ \[[^]]*\](?: +\d+\.\d\d)?' if column == 'prompt' else ''  # and its ratio to f16
        return self.find(part, rf'^\s*{depth} {re.escape(kv)}\s+\S+{skipped}{numbers}')

    def token_ms(self, part, depth, kv):
        found = self.bench(part, depth, kv, 'decode')
        return found if isinstance(found, str) else [1000 / found[i] for i in (0, 2, 1)]

    def hf_ms(self, depth):
        return self.find('hf', rf'^depth {depth}: (\S+) ms a token \((\S+)\.\.(\S+)\)')


def figure(found, unit, digits):
    if isinstance(found, str):
        return found
    spread = f' ({found[1]:.{digits}f}..{found[2]:.{digits}f})' if len(found) > 2 else ''
    return f'{found[0]:.{digits}f} {unit}{spread}'.replace(' )', ')').rstrip()


def judge(value, required):
    """`required` is such as '>= 4x': said as it is where it is met, or where there is nothing to judge."""
    if not required or value is None:
        return required or '-'
    relation, bound = required.split()[:2]
    bound = float(bound.rstrip('x'))
    met = {'>=': value >= bound, '<=': value <= bound, '<': value < bound}[relation]
    return required if met else f'{required}: missed'


def compare(what, peer_name, peer, ours, unit, ratio, required='', digits=2):
    """A row; `ratio` is of the medians, such as lambda ours, peer: peer / ours."""
    value = None if isinstance(ours, str) or isinstance(peer, str) else ratio(ours[0], peer[0])
    return (what, f'{peer_name}: {figure(peer, unit, digits)}', figure(ours, unit, digits),
            '-' if value is None else f'{value:.2f}x', judge(value, required))


def faster(ours, peer):
    return peer / ours


def times_as_much(ours, peer):
    return ours / peer


def rows(run):
    checks = run.find('check', r'^(\d+) checks passed')
    yield 'kernels against the codec', '-', figure(checks, 'checks passed', 0), '-', 'all'
    for tool, summary in (('memcheck', 'ERROR'), ('racecheck', 'RACECHECK')):
        found = run.find('check', rf'^=+ {summary} SUMMARY: (\d+)')
        yield f'small ones of them under {tool}', '-', figure(found, 'errors', 0), '-', '0'
    for bits, required in ((2, ('>= 4x', '>= 4x', '>= 4x', '>= 3.3x')), (4, ('>= 2.2x',) * 4), (1, ('>= 6x',) * 4)):
        for shape, bound in zip(SHAPES, required):
            found = run.attention(shape, bits)
            ours, peer = (found, found) if isinstance(found, str) else (found[:1], found[1:])
            yield compare(f'decode attention, {shape}, {bits} bit{"s" * (bits > 1)}', 'cuDNN f16', peer, ours, 'us', faster, bound, 1)

    def token(depth, kv='2', part='end_to_end'):
        return run.token_ms(part, depth, kv)

    yield compare('a token at 196608, 2 bits', 'HF DynamicCache', run.hf_ms(196608), token(196608), 'ms', faster, '>= 8.3x')
    yield compare('a token at 196608, 2 bits', 'llama.cpp f16', token(196608, 'f16'), token(196608), 'ms', faster, '>= 2.1x')
    yield compare('a token at 131072, 2 bits', 'HF DynamicCache', run.hf_ms(131072), token(131072), 'ms', faster)
    yield compare('a token at 131072, 2 bits', 'llama.cpp f16', token(131072, 'f16'), token(131072), 'ms', faster)
    yield compare('a token at 0, 2 bits: our time over theirs', 'llama.cpp f16', token(0, 'f16'), token(0), 'ms',
                  times_as_much, '<= 1.05x')
    exact = token(131072, '2+64', 'retrieval')
    yield ('a token at 131072, 2 bits + 64 exact from pinned memory', '-', figure(exact, 'ms', 2), '-',
           judge(None if isinstance(exact, str) else exact[0], '<= 25 ms'))
    memory = run.find('retrieval', r'^GPU memory: (\d+) MiB')
    gib = memory if isinstance(memory, str) else [memory[0] / 1024]
    yield 'GPU memory of that', '-', figure(gib, 'GiB', 1), '-', judge(None if isinstance(gib, str) else gib[0], '< 24 GiB')
    yield compare('prompt of 32768, 2 bits', 'llama.cpp f16', run.bench('prefill', 0, 'f16', 'prompt'),
                  run.bench('prefill', 0, '2', 'prompt'), 'tokens/s', times_as_much, '>= 0.9x', 0)
    for depth, bound in ((0, '>= 0.98x'), (65536, '>= 1.25x')):
        yield compare(f'a token of a mixture of experts at {depth}, 2 bits', 'llama.cpp f16', token(depth, 'f16', 'moe'),
                      token(depth, '2', 'moe'), 'ms', faster, bound)
    for depth, bound, bound_64 in ((0, '>= 1x', '>= 0.97x'), (8192, '>= 1.05x', '>= 0.97x'), (32768, '>= 1.22x', '>= 1.1x'),
                                   (131072, '>= 2.1x', '>= 1.7x')):
        for kv, required in (('2', bound), ('2+64', bound_64)):
            yield compare(f'a token at {depth}, {kv}{" bits" * (kv == "2")}', 'llama.cpp f16', token(depth, 'f16', 'depths'),
                          token(depth, kv, 'depths'), 'ms', faster, required)
    yield compare('prompts of 8192, 32 sequences, 2 bits', 'llama.cpp f16', run.bench('batched', 0, 'f16', 'prompt'),
                  run.bench('batched', 0, '2', 'prompt'), 'tokens/s', times_as_much, '>= 0.97x', 0)
    for sequences, depth, bound in ((32, 8192, '>= 1.8x'), (128, 2048, '>= 1.5x')):
        yield compare(f'decoding, {sequences} sequences at {depth}, 2 bits', 'llama.cpp f16',
                      run.bench('batched', depth, 'f16', 'decode'), run.bench('batched', depth, '2', 'decode'), 'tokens/s',
                      times_as_much, bound, 0)
    for kv, bound in (('f16', ''), ('4', '<= 200 ms'), ('2', '<= 200 ms')):
        found = run.find('restore', rf'^{kv}:\n(?:.*\n)*?memory: saved in \S+ restored in (\d+)')
        yield (f'a state of 32768 tokens from memory, {kv}', '-', figure(found, 'ms', 0), '-',
               judge(None if isinstance(found, str) else found[0], bound))
    for batch in (512, 8):
        peer, *ours = (run.find('quality', rf'^{kv}, batches of {batch}: PPL = (\S+)') for kv in ('f16', 4, 2))
        for bits, found in zip((4, 2), ours):
            yield compare(f'perplexity, batches of {batch}, {bits} bits', 'llama.cpp f16', peer, found, '', times_as_much)


def print_table(run, rows):
    print('Measured on: ' + (run.text('card').strip().replace('\n', '; ') or 'an unknown card'))
    print('\n| row | peer | measured | ratio | required |\n| --- | --- | --- | --- | --- |')
    for row in rows:
        print('| ' + ' | '.join(row) + ' |')


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__.strip())
    run = Run(Path(sys.argv[1]))
    print_table(run, rows(run))


if __name__ == '__main__':
    main()
