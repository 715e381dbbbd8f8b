"""Decode attention over codes on a GPU: accuracy against fp32, time against cuDNN and flash attention in f16.

usage: cuda_attention.py <shim.so>[,<other build>.so...] [--shapes 1x196608,...] [--bits 2,4,1] [--no-peers] [--once]
       [--no-check]

Shapes are streams x cells with 32 heads, 8 KV heads, head size 128. Times are medians of CUDA graph replays of 24 calls
over three rotating buffers; GB/s are the bytes of codes and scales over that time. "In a step" is what a call adds to a
product with 436 MB of weights before it, a layer of Llama-3.1-8B: nothing of it is cached then, nor overlaps with a call
before it.
"""
import argparse
import ctypes
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DEV = 'cuda'
HEADS, KV_HEADS, D = 32, 8, 128
GROUP = HEADS // KV_HEADS


class Shape(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ('n_streams', 'n_tokens', 'n_kv_heads', 'group', 'head_dim', 'n_cells',
                                            'key_width', 'value_width', 'n_exact')] + [('softcap', ctypes.c_float), ('scale', ctypes.c_float)]


POINTERS = ('keys', 'values', 'key_packed', 'key_scale', 'value_packed', 'value_scale', 'queries', 'mask',
            'hidden', 'exact_keys', 'exact_values', 'exact_cells', 'output', 'workspace')


class Pointers(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in POINTERS] + [('workspace_bytes', ctypes.c_size_t)]


def load(path):
    lib = ctypes.CDLL(path)
    lib.bench_message.restype = ctypes.c_char_p
    lib.bench_workspace_bytes.restype = ctypes.c_size_t
    return lib


def median_us(fn, n, repeats=11):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            fn(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(n):
            fn(i)
    for _ in range(10):  # clocks settle
        graph.replay()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) / n * 1e3)
    times.sort()
    return times[len(times) // 2], times[0], times[-1]


def in_step_us(call, n):
    weights = torch.randn(53248, 4096, device=DEV, dtype=torch.half)
    x = torch.randn(4096, device=DEV, dtype=torch.half)

    def layer(i):
        torch.mv(weights, x)
        call(i)
    return median_us(layer, n)[0] - median_us(lambda i: torch.mv(weights, x), n)[0]


def hadamard(n):
    h = torch.ones(1, 1, device=DEV)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / math.sqrt(n)


class Codec:
    """Random codewords, [KV head][128][D], and a scale for each subspace."""

    def __init__(self, width, is_key):
        self.width, self.m = width, D // width
        self.words = (torch.randn(KV_HEADS, 128, D, device=DEV) * 42).round().clamp(-127, 127).to(torch.int8)
        self.scale = torch.rand(KV_HEADS, self.m, device=DEV) * 0.01 + 0.02
        packed = self.words
        if not is_key and width == 2:  # subspaces 16u + g and 16u + 8 + g side by side
            packed = packed.view(KV_HEADS, 128, D // 32, 2, 8, 2).transpose(3, 4).contiguous()
        self.packed = packed.contiguous().view(-1).view(torch.int32)
        full = torch.cat([self.words.float(), -self.words.float()], 1).view(KV_HEADS, 256, self.m, width)
        self.real = full * self.scale[:, None, :, None]

    def decode(self, head, codes, scales):  # [cells][m] bytes, [cells] -> [cells][D]
        m = torch.arange(self.m, device=DEV)
        return self.real[head][codes.long(), m].reshape(-1, D) * scales.float()[:, None]


def blocks(lib, is_key, codes, scales):  # [B][H][L][m], [B][H][L] -> records
    m = codes.shape[-1]
    table = (ctypes.c_int * (m * 64))()
    lib.bench_positions(int(is_key), m, table)
    position = torch.tensor(list(table), device=DEV).view(m, 64)
    inverse = torch.empty(m * 64, dtype=torch.long, device=DEV)
    inverse[position.T.reshape(-1)] = torch.arange(64 * m, device=DEV)  # byte -> cell * m + subspace
    n = codes.numel() // (64 * m)
    out = torch.empty(n, (m + 2) * 64, dtype=torch.uint8, device=DEV)
    out[:, :m * 64] = codes.view(n, 64 * m)[:, inverse]
    out[:, m * 64:] = scales.reshape(n, 64).contiguous().view(torch.uint8)
    return out


def run_shape(libs, b, cells, bits, args):
    kw, vw = {1: (8, 8), 2: (4, 4), 4: (2, 2), 3: (2, 4)}[bits]
    key, value = Codec(kw, True), Codec(vw, False)
    q = torch.randn(b, HEADS, D, device=DEV) * 1.5
    kc = torch.randint(0, 256, (b, KV_HEADS, cells, key.m), device=DEV, dtype=torch.uint8)
    vc = torch.randint(0, 256, (b, KV_HEADS, cells, value.m), device=DEV, dtype=torch.uint8)
    ks = (torch.rand(b, KV_HEADS, cells, device=DEV) * .5 + .75).half()
    vs = (torch.rand(b, KV_HEADS, cells, device=DEV) * .5 + .75).half()
    scale = D ** -0.5
    mask = torch.zeros(b, cells, device=DEV, dtype=torch.half)
    undo = hadamard(D)
    transformed = q @ undo
    rows = []
    for name, lib in libs.items():
        kb, vb = blocks(lib, True, kc, ks), blocks(lib, False, vc, vs)
        copies = [(kb, vb)] + [(kb.clone(), vb.clone()) for _ in range(0 if args.once else 2)]
        shape = Shape(b, 1, KV_HEADS, GROUP, D, cells, kw, vw, 0, 0.0, scale)
        work = torch.zeros(lib.bench_workspace_bytes(ctypes.byref(shape)), dtype=torch.uint8, device=DEV)
        out = torch.full((b, HEADS, D), float('nan'), device=DEV)

        def caller(mask_pointer):
            pointers = [Pointers(k.data_ptr(), v.data_ptr(), key.packed.data_ptr(), key.scale.data_ptr(),
                                 value.packed.data_ptr(), value.scale.data_ptr(), q.data_ptr(),
                                 mask_pointer, None, None, None, None, out.data_ptr(), work.data_ptr(), work.numel())
                        for k, v in copies]

            def call(i):
                r = lib.bench_attend(ctypes.byref(shape), ctypes.byref(pointers[i % len(pointers)]),
                                     ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
                assert r == 0, lib.bench_message()
            return call

        call = caller(None)
        call(0)
        torch.cuda.synchronize()
        error = 0
        if not args.no_check:
            for i, h in {(0, 0), (b - 1, 7), (b // 2, 3)}:
                k = key.decode(h, kc[i, h], ks[i, h])
                s = transformed[i, 4 * h:4 * h + 4] @ k.T * scale
                del k
                y = torch.softmax(s.double(), -1).float() @ value.decode(h, vc[i, h], vs[i, h])
                expected = y @ undo
                got = out[i, 4 * h:4 * h + 4]
                e = ((got - expected).norm() / expected.norm()).item()
                error = e if not e <= error else error
        if args.once:
            continue
        t, low, high = median_us(call, 24)
        tm = median_us(caller(mask.data_ptr()), 24)[0]
        ts = in_step_us(caller(mask.data_ptr()), 12)
        moved = kb.numel() + vb.numel()
        print(f'{b}x{cells} {bits} bits {name}: {t:.1f} us ({low:.1f}..{high:.1f}), with mask {tm:.1f}, '
              f'in a step {ts:.1f}, {moved / t / 1e3:.0f} GB/s, relative error {error:.1e}', flush=True)
        rows.append((name, t, tm, ts, moved / t / 1e3, error))
        del copies, kb, vb
    del kc, vc, ks, vs
    torch.cuda.empty_cache()
    return rows


def run_peers(b, cells):
    q = torch.randn(b, HEADS, 1, D, device=DEV, dtype=torch.half)
    k = torch.randn(b, KV_HEADS, cells, D, device=DEV, dtype=torch.half)
    v = torch.randn(b, KV_HEADS, cells, D, device=DEV, dtype=torch.half)
    times = {}
    for name, backend in (('cudnn', SDPBackend.CUDNN_ATTENTION), ('flash', SDPBackend.FLASH_ATTENTION)):
        def call(i):
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        with sdpa_kernel(backend):
            times[name] = median_us(call, 6)[0]
            times[name + ' in a step'] = in_step_us(call, 6)
    print(f'{b}x{cells} f16: ' + ', '.join(f'{name} {us:.1f} us' for name, us in times.items()), flush=True)
    del k, v
    torch.cuda.empty_cache()
    return times


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('libs')
    parser.add_argument('--shapes', default='1x196608,8x32768,32x8192,128x2048')
    parser.add_argument('--bits', default='2,4,1')
    parser.add_argument('--no-peers', action='store_true')
    parser.add_argument('--no-check', action='store_true')
    parser.add_argument('--once', action='store_true', help='one call a shape, for profilers')
    args = parser.parse_args()
    torch.manual_seed(0)
    libs = {p.split('/')[-1].removesuffix('.so'): load(p) for p in args.libs.split(',')}
    table = []
    for text in args.shapes.split(','):
        b, cells = map(int, text.split('x'))
        peers = {} if args.no_peers or args.once else run_peers(b, cells)
        for bits in map(int, args.bits.split(',')):
            for row in run_shape(libs, b, cells, bits, args):
                table.append((text, bits, peers) + row)
    if args.once:
        return
    print('\n| shape | bits | build | us | with mask, us | in a step, us | GB/s | cuDNN f16 us | flash f16 us | x cuDNN | error |')
    print('| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |')
    for text, bits, peers, name, t, tm, ts, rate, error in table:
        c, f = peers.get('cudnn', math.nan), peers.get('flash', math.nan)
        print(f'| {text} | {bits} | {name} | {t:.1f} | {tm:.1f} | {ts:.1f} | {rate:.0f} | {c:.1f} | {f:.1f} | {c / t:.2f} | '
              f'{error:.1e} |')


if __name__ == '__main__':
    main()
