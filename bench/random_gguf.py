#!/usr/bin/env python3
"""Writes a GGUF model of Llama's architecture with random f16 weights: speed and memory can be measured on it, not quality.

usage: random_gguf.py <out.gguf> [--layers 32] [--hidden 4096] [--ffn 14336] [--heads 32] [--kv-heads 8]
       [--experts 0] [--experts-used 8] [--vocab 128256] [--context 262144] [--jobs 1]
       [--holes]

The defaults are Llama-3.1-8B's shape: 16 GB, which take as long as the disk does. It has no tokenizer. With --jobs, so many
processes write at a time, which is quicker where the file is in RAM. Llama-3.1-70B's shape, 141 GB:
    --layers 80 --hidden 8192 --ffn 28672 --heads 64 --jobs 8
With --holes, all weights but norms are holes of the file, which takes no room, and <out.gguf>.pages gets random weights that
bench/repeat_pages.cpp shows in their place.
With --experts, each layer has so many feed-forward networks of --ffn numbers, --experts-used of them for each token. The
mixture of experts that bench/gpu.sh measures, 11 GB:
    --layers 16 --hidden 2048 --heads 32 --kv-heads 4 --ffn 768 --experts 64
"""
import argparse
import math
import multiprocessing
import os
import random
import struct

U32, F32, STRING = 4, 6, 8  # GGUF's types of metadata
F32_TENSOR, F16_TENSOR = 0, 1
ALIGNMENT = 32
# Weights come from one pool of numbers, over and over. Its length is prime: each row of a matrix starts elsewhere in it.
POOL = 1_000_003
PAGES = 1 << 30  # bytes of them in a file


def text(s):
    return struct.pack('<Q', len(s)) + s.encode()


def entry(key, kind, value):
    return text(key) + struct.pack('<I', kind) + (text(value) if kind == STRING else
                                                  struct.pack('<I' if kind == U32 else '<f', value))


def metadata(a):
    return [entry('general.architecture', STRING, 'llama'),
            entry('general.file_type', U32, 1),  # mostly f16
            entry('llama.block_count', U32, a.layers),
            entry('llama.context_length', U32, a.context),
            entry('llama.embedding_length', U32, a.hidden),
            entry('llama.feed_forward_length', U32, a.ffn),
            entry('llama.attention.head_count', U32, a.heads),
            entry('llama.attention.head_count_kv', U32, a.kv_heads),
            entry('llama.attention.layer_norm_rms_epsilon', F32, 1e-5),
            entry('llama.rope.dimension_count', U32, a.hidden // a.heads),
            entry('llama.rope.freq_base', F32, 500000.0),
            entry('llama.vocab_size', U32, a.vocab),
            *([entry('llama.expert_count', U32, a.experts),
               entry('llama.expert_used_count', U32, a.experts_used)] if a.experts else []),
            entry('tokenizer.ggml.model', STRING, 'no_vocab')]


def tensors(a):
    """(name, shape) of each, as GGUF has it: columns first. Norms have one dimension."""
    kv = a.hidden // a.heads * a.kv_heads
    yield 'token_embd.weight', (a.hidden, a.vocab)
    yield 'output.weight', (a.hidden, a.vocab)
    yield 'output_norm.weight', (a.hidden,)
    each, suffix = ((a.experts,), '_exps') if a.experts else ((), '')
    for i in range(a.layers):
        yield f'blk.{i}.attn_norm.weight', (a.hidden,)
        for name, columns, rows in (('attn_q', a.hidden, a.hidden), ('attn_k', a.hidden, kv), ('attn_v', a.hidden, kv),
                                    ('attn_output', a.hidden, a.hidden)):
            yield f'blk.{i}.{name}.weight', (columns, rows)
        yield f'blk.{i}.ffn_norm.weight', (a.hidden,)
        if a.experts:
            yield f'blk.{i}.ffn_gate_inp.weight', (a.hidden, a.experts)
        for name, columns, rows in (('ffn_gate', a.hidden, a.ffn), ('ffn_up', a.hidden, a.ffn), ('ffn_down', a.ffn, a.hidden)):
            yield f'blk.{i}.{name}{suffix}.weight', (columns, rows, *each)


def n_bytes(shape):
    return math.prod(shape) * (2 if len(shape) > 1 else 4)


def padding(n):
    return -n % ALIGNMENT


def write_tensors(path, todo, pools, holes):
    """`todo` has of each tensor its place in the file, its shape and where in the pool it starts."""
    with open(path, 'r+b', buffering=0) as file:
        for offset, shape, start in todo:
            left = n_bytes(shape)
            if holes and len(shape) > 1:
                continue
            file.seek(offset)
            if len(shape) == 1:
                file.write(struct.pack('<f', 1) * shape[0])
                left = 0
            while left:
                left -= file.write(pools[shape[0]][start:start + left])
                start = 0


def write(file, a):
    listed = list(tensors(a))
    places = []
    header = [struct.pack('<4sIQQ', b'GGUF', 3, len(listed), len(metadata(a))), *metadata(a)]
    offset = 0
    for name, shape in listed:
        header.append(text(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape,
                                               F16_TENSOR if len(shape) > 1 else F32_TENSOR, offset))
        places.append(offset)
        offset += n_bytes(shape) + padding(n_bytes(shape))
    header = b''.join(header)
    header += bytes(padding(len(header)))
    file.write(header)
    file.truncate(len(header) + offset)
    file.flush()

    random.seed(0)
    normal = [random.gauss(0, 1) for _ in range(POOL)]
    pools = {columns: memoryview(struct.pack(f'<{POOL}e', *(x / math.sqrt(columns) for x in normal)))
             for columns in {a.hidden, a.ffn}}
    if a.holes:
        with open(a.out + '.pages', 'wb') as pages:
            pool = bytes(pools[a.hidden])
            for at in range(0, PAGES, len(pool)):
                pages.write(pool[:PAGES - at])
    todo = [(len(header) + place, shape, 2 * random.randrange(POOL)) for place, (_, shape) in zip(places, listed)]
    writers = [multiprocessing.get_context('fork').Process(target=write_tensors, args=(file.name, todo[i::a.jobs], pools, a.holes))
               for i in range(a.jobs)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        if writer.exitcode != 0:
            raise OSError('a writer failed')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out')
    for name, value in (('layers', 32), ('hidden', 4096), ('ffn', 14336), ('heads', 32), ('kv-heads', 8),
                        ('experts', 0), ('experts-used', 8), ('vocab', 128256), ('context', 262144), ('jobs', 1)):
        parser.add_argument('--' + name, type=int, default=value)
    parser.add_argument('--holes', action='store_true')
    args = parser.parse_args()
    # A file that is there is whole.
    with open(args.out + '.part', 'wb') as file:
        write(file, args)
    os.replace(args.out + '.part', args.out)


if __name__ == '__main__':
    main()
