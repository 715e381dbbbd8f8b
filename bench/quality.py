#!/usr/bin/env python3
"""The table of quality: KL divergence from f16 and perplexity over f16's, of two small models on four kinds of text, three
stretches of each, by `thimble eval` (docs/results/quality.md says what was measured so).

    quality.py texts FOLDER --wikitext wikitext2-test.txt     writes the stretches of text, from scripts/*-text
    quality.py run OUT --thimble T --texts FOLDER --smollm2 M.gguf --gemma M.gguf [--profiles FOLDER] [--devices CUDA0,CUDA1]
                       [--parts profile,none,leave-out,published,tasks] [--jobs 8] [--seconds S]
    quality.py table OUT...                                   prints mean and standard error over the stretches
    quality.py pack FILE OUT...                               the figures of all runs, without those of single tokens, as one JSON

Profiles are <profiles>/<model>.gguf, <model>-oscar.gguf and <model>-without-<kind>.gguf. A job whose result is there is not run
again; with --seconds none begins later. Each job's command is beside its result."""
import argparse
import concurrent.futures
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TEMPLATES = {'smollm2': 'chatml', 'gemma': 'gemma'}
# A text, and at what share of it its later stretches begin: behind the next end of a line, or of a chat.
STARTS = {'wikitext': (1 / 3, 2 / 3), 'code': (1 / 3, 2 / 3), 'chat': (0.3, 0.6), 'german': (0.33, 0.62)}
CHAT = 'You are a helpful assistant. You may call'  # begins each chat of scripts/chat-text
# What stands for a kind of text that calibration has not seen.
UNSEEN = {'code': 'code', 'chat': 'chat', 'languages': 'german', 'prose': 'wikitext', 'tables': 'tables', 'logs': 'logs',
          'mathematics': 'mathematics'}
PARTS = ('profile', 'none', 'leave-out', 'published', 'tasks')


def stretches_of(kind, text):
    starts = [0]
    for share in STARTS[kind]:
        at = int(len(text) * share)
        if kind == 'chat':
            starts.append(text.rindex('\n', 0, text.rindex('<', 0, text.index(CHAT, at))) + 1)
        else:
            starts.append(text.index('\n', at) + 1)
    return [text[start:start + 150_000] for start in starts]


def write_texts(args):
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = lambda *command: subprocess.run([str(HERE / 'scripts' / command[0]), *command[1:]], check=True, stdout=subprocess.PIPE, text=True).stdout
    texts = {'wikitext': ('wikitext', Path(args.wikitext).read_text()), 'code': ('code', made('python-text')),
             'german': ('german', made('german-text'))}
    texts.update({f'chat-{t}': ('chat', made('chat-text', t)) for t in TEMPLATES.values()})
    for name, (kind, text) in texts.items():
        for i, stretch in enumerate(stretches_of(kind, text), 1):
            (folder / f'{name}-{i}.txt').write_text(stretch)
    for kind in ('tables', 'logs', 'mathematics'):
        (folder / f'{kind}-1.txt').write_text((HERE / 'texts' / f'{kind}.txt').read_text())


class Jobs:
    def __init__(self, args):
        self.args = args

    def text(self, model, kind, i):
        return Path(self.args.texts) / (f'chat-{TEMPLATES[model]}-{i}.txt' if kind == 'chat' else f'{kind}-{i}.txt')

    def profile(self, model, more=''):
        return str(Path(self.args.profiles or '.') / f'{model}{more}.gguf')

    def evaluate(self, part, model, kind, i, kv, *more):
        special = ['--special'] if kind == 'chat' else []
        return (f'{part}.{model}.{kind}.{i}', ['-m', getattr(self.args, model), '-f', str(self.text(model, kind, i)), '-c', str(self.args.context),
                                               '--decode', str(self.args.decode), '--kv', kv, *special, *more])

    def all(self):
        models = [m for m in TEMPLATES if getattr(self.args, m)]
        cells = [(m, kind, i) for i in (1, 2, 3) for m in models for kind in STARTS]
        for part in self.args.parts.split(','):
            if part == 'profile':
                for m, kind, i in cells:
                    yield self.evaluate(part, m, kind, i, '4,2,2+64' + (',1.5,1' if kind == 'wikitext' else ''), '-p', self.profile(m))
            elif part == 'none':
                unseen = [(m, kind, 1) for m in models for kind in UNSEEN.values() if kind not in STARTS]
                for m, kind, i in cells + unseen:
                    yield self.evaluate(part, m, kind, i, '4,2')
            elif part == 'published':
                for m, kind, i in cells:
                    yield self.evaluate(part, m, kind, i, '2,4/2', '-p', self.profile(m), '--method', 'oscar,kvarn',
                                        '--oscar-profile', self.profile(m, '-oscar'))
            elif part == 'leave-out':
                for i in (1, 2, 3):
                    for m in models:
                        for left, kind in UNSEEN.items():
                            if i == 1 or kind in STARTS:
                                yield self.evaluate(part, m, kind, i, '4,2', '-p', self.profile(m, f'-without-{left}'))
            elif part == 'tasks':
                for task, context, kv in (('generate', 8192, '4,2,2+64,1'), ('ruler', 4096, '4,2,2+64'), ('tools', 8192, '4,2,2+64')):
                    for m in models:
                        yield f'tasks.{m}.{task}.1', ['-m', getattr(self.args, m), '--task', task, '-c', str(context), '--kv', kv, '-p', self.profile(m)]
            else:
                sys.exit(f'no part {part}: {", ".join(PARTS)}')


def run(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    devices = queue.Queue()
    for i in range(args.jobs):
        devices.put(args.devices.split(',')[i % len(args.devices.split(','))])
    start = time.monotonic()

    def one(job):
        name, arguments = job
        result = out / f'{name}.json'
        left = args.seconds - (time.monotonic() - start)
        if result.exists() or left <= 5:
            return f'{name}: {"is there" if result.exists() else "no time"}'
        device = devices.get()
        command = [args.thimble, 'eval', *arguments, '-t', str(args.threads), '--device', device, '--json', f'{result}.part']
        (out / f'{name}.command').write_text(' '.join(command) + '\n')
        began = time.monotonic()
        try:
            with open(out / f'{name}.txt', 'w') as log:
                status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            status = 'stopped'
        finally:
            devices.put(device)
        if status == 0:
            os.rename(f'{result}.part', result)
        return f'{name}: {status} in {time.monotonic() - began:.0f} s'

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for said in pool.map(one, Jobs(args).all()):
            print(said, flush=True)


def results(folders):
    """{(part, model, kind, cache): {stretch: row}}"""
    rows = {}
    for folder in folders:
        path = Path(folder)
        packed = json.loads(path.read_text()) if path.is_file() else {p.stem: json.loads(p.read_text()) for p in sorted(path.glob('*.json'))}
        for name, result in packed.items():
            part, model, kind, i = name.split('.')
            for row in result['rows'] if isinstance(result, dict) and 'rows' in result else []:
                method = row.get('method') or 'thimble'
                if row.get('kv') != 'f16' and 'kld_mean' in row:
                    rows.setdefault((part, model, kind, row['kv'] + ('' if method == 'thimble' else f' {method}')), {})[i] = row
    return rows


def mean_and_error(values):
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def table(args):
    print(f'{"part":10} {"model":8} {"text":12} {"cache":12} {"n":>2} {"bits":>5} {"MB":>7} {"KLD":>17} {"worst":>7} {"PPL ratio":>16} {"top-1":>6}')
    for (part, model, kind, cache), by_stretch in sorted(results(args.out).items()):
        rows = list(by_stretch.values())
        kld, kld_error = mean_and_error([r['kld_mean'] for r in rows])
        ratio, ratio_error = mean_and_error([math.log(r['ppl_ratio']) for r in rows])
        print(f'{part:10} {model:8} {kind:12} {cache:12} {len(rows):2} {rows[0]["bits_per_value"]:5.2f} {rows[0]["kv_bytes"] / 1e6:7.2f} '
              f'{kld:8.4f} +- {kld_error:6.4f} {max(r["kld_mean"] for r in rows):7.4f} {math.exp(ratio):7.3f} +- {ratio_error:5.3f} '
              f'{statistics.mean(r["top1_agreement"] for r in rows):6.3f}')


def pack(args):
    packed = {}
    for folder in args.out:
        for path in sorted(Path(folder).glob('*.json')):
            result = json.loads(path.read_text())
            for row in result.get('rows', []):
                for long in ('kld_by_position', 'log_p', 'decode_tok_s'):
                    row.pop(long, None)
            packed[path.stem] = result
    Path(args.file).write_text(json.dumps(packed, indent=0, sort_keys=True) + '\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    texts = commands.add_parser('texts')
    texts.add_argument('folder')
    texts.add_argument('--wikitext', required=True)
    texts.set_defaults(do=write_texts)
    runs = commands.add_parser('run')
    runs.add_argument('out')
    for name in ('thimble', 'texts'):
        runs.add_argument(f'--{name}', required=True)
    for name in (*TEMPLATES, 'profiles'):
        runs.add_argument(f'--{name}')
    runs.add_argument('--devices', default='CPU')
    runs.add_argument('--parts', default=','.join(PARTS))
    runs.add_argument('--jobs', type=int, default=1)
    runs.add_argument('--threads', type=int, default=1)
    runs.add_argument('--context', type=int, default=8192)
    runs.add_argument('--decode', type=int, default=256)
    runs.add_argument('--seconds', type=float, default=math.inf)
    runs.set_defaults(do=run)
    tables = commands.add_parser('table')
    tables.add_argument('out', nargs='+')
    tables.set_defaults(do=table)
    packs = commands.add_parser('pack')
    packs.add_argument('file')
    packs.add_argument('out', nargs='+')
    packs.set_defaults(do=pack)
    args = parser.parse_args()
    args.do(args)


if __name__ == '__main__':
    main()
