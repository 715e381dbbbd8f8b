#!/usr/bin/env python3
"""What caches cost in quality on a device, beside the CPU: the KL divergence from f16 of the same device and batches, by
`thimble eval`. With a profile and without; decoded a token at a time, 8 at once and 512 at once; in a unified cache and in
streams. Fails where the device loses more than the CPU does, beyond what chance explains.

usage: gpu_eval.py <thimble> --model M --text T [--profile P] [--device CUDA0] [--kv 4,2,1,2+64] [--context 2048]
       [--decode 512] [--batches 1,8,512] [--jobs 4] [--threads 4] [--out folder]
"""
import argparse
import concurrent.futures
import json
import math
import os
import subprocess
import tempfile


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('thimble')
    parser.add_argument('--model', required=True)
    parser.add_argument('--text', required=True)
    parser.add_argument('--profile', default='')
    parser.add_argument('--device', default='CUDA0')
    parser.add_argument('--kv', default='4,2,1,2+64')
    parser.add_argument('--context', type=int, default=2048)
    parser.add_argument('--decode', type=int, default=512)
    parser.add_argument('--batches', default='1,8,512')
    parser.add_argument('--jobs', type=int, default=4, help='processes at a time; what they measure is no time')
    parser.add_argument('--threads', type=int, default=4)
    parser.add_argument('--out', help='folder for what each process says')
    return parser.parse_args()


class Runs:
    """Runs of `thimble eval`, one for each cache, since a cache that is refused ends its process."""

    def __init__(self, args, folder):
        self.args, self.folder = args, folder

    def command(self, device, batch, streams, profile, kv, exact, out):
        a = self.args
        return [a.thimble, 'eval', '-m', a.model, '-f', a.text, '-c', str(a.context), '--decode', str(a.decode), '--small', '0',
                '--device', device, '--batch', str(batch), '--kv', kv, '-t', str(a.threads), '--exact-run', exact, '--json', out,
                *(['--parallel', '4', '--streams'] if streams else []), *(['--profile', profile] if profile else [])]

    def of_batches(self, device, batch, streams, profile):
        """{cache: row, or a sentence}. The first run makes f16's predictions, which the others read."""
        rows = {}
        name = f'{device}-{batch}-{"streams" if streams else "unified"}-{"profile" if profile else "plain"}'
        exact = os.path.join(self.folder, name + '.exact')
        for kv in self.args.kv.split(','):
            out = os.path.join(self.folder, f'{name}-{kv}'.replace('/', '_'))
            done = subprocess.run(self.command(device, batch, streams, profile, kv, exact, out + '.json'),
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            with open(out + '.txt', 'w') as f:
                f.write(done.stdout)
            if done.returncode:
                said = done.stdout.strip().splitlines()
                rows[kv] = said[-1] if said else f'exit status {done.returncode}'
                continue
            with open(out + '.json') as f:
                rows[kv] = json.load(f)['rows'][1]
        if os.path.exists(exact):
            os.remove(exact)
        return rows


def excess(row, peer):
    """How much more a token diverges on the device than on the CPU, in the mean, and that mean's standard error."""
    differences = [a - b for a, b in zip(row['kld_by_position'], peer['kld_by_position'])]
    mean = sum(differences) / len(differences)
    return mean, math.sqrt(sum((d - mean) ** 2 for d in differences)) / len(differences)


def main():
    args = parse()
    beside = os.path.splitext(args.model)[0] + '.thimble.gguf'
    for found in (beside, os.path.join(os.path.dirname(args.thimble), 'profiles', os.path.basename(beside))):
        if os.path.exists(found):
            raise SystemExit(f'{found} would be taken where none is meant: move it, and name it with --profile')
    folder = args.out or tempfile.mkdtemp()
    os.makedirs(folder, exist_ok=True)
    batches = [int(b) for b in args.batches.split(',')]
    cases = [(batch, streams, profile) for profile in ([args.profile, ''] if args.profile else [''])
             for batch in batches for streams in (False, True)]
    runs = Runs(args, folder)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        # On the CPU, a stream of one's own and a unified cache with one sequence are the same.
        cpu = {(batch, profile): pool.submit(runs.of_batches, 'CPU', batch, False, profile)
               for batch, streams, profile in cases if not streams}
        device = {case: pool.submit(runs.of_batches, args.device, *case) for case in cases}
    print(f'{"profile":8} {"cells":8} {"batch":>5} {"kv":8} {"KLD " + args.device:>12} {"KLD CPU":>9} {"more":>18} {"ppl/f16":>8} '
          f'{"CPU":>7} {"top-1":>6} {"CPU":>6}')
    failed = 0
    for batch, streams, profile in cases:
        ours, peers = device[batch, streams, profile].result(), cpu[batch, profile].result()
        for kv in args.kv.split(','):
            row, peer = ours[kv], peers[kv]
            line = f'{"yes" if profile else "no":8} {"streams" if streams else "unified":8} {batch:5} {kv:8} '
            if isinstance(row, str) or isinstance(peer, str):
                print(line + ' '.join(f'{where}: {r}' for where, r in ((args.device, row), ('CPU', peer)) if isinstance(r, str)))
                failed += 1
                continue
            mean, error = excess(row, peer)
            allowed = max(3 * error, 0.05 * peer['kld_mean'], 2e-4)
            bad = mean > allowed or not row['kld_mean'] < 10
            failed += bad
            print(line + f'{row["kld_mean"]:12.5f} {peer["kld_mean"]:9.5f} {mean:9.5f} +-{error:7.5f} {row["ppl_ratio"]:8.4f} '
                  f'{peer["ppl_ratio"]:7.4f} {row["top1_agreement"]:6.3f} {peer["top1_agreement"]:6.3f}{"  MORE THAN CHANCE" if bad else ""}')
    if failed:
        raise SystemExit(f'{failed} rows are refused, or worse than on the CPU')


if __name__ == '__main__':
    main()
