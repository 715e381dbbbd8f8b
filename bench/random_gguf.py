#!/usr/bin/env python3
"""Writes a GGUF model of Llama's architecture with random f16 weights: speed and memory can be measured on it, not quality.

usage: random_gguf.py <out.gguf> [--layers 32] [--hidden 4096] [--ffn 14336] [--heads 32] [--kv-heads 8]
       [--vocab 128256] [--context 262144]

The defaults are Llama-3.1-8B's shape: 16 GB, which take as long as the disk does. It has no tokenizer.
"""
import argparse
import math
import os
import random
import struct

U32, F32, STRING = 4, 6, 8  # GGUF's types of metadata
F32_TENSOR, F16_TENSOR = 0, 1
ALIGNMENT = 32
# Weights come from one pool of numbers, over and over. Its length is prime: each row of a matrix starts elsewhere in it.
POOL = 1_000_003


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
            entry('tokenizer.ggml.model', STRING, 'no_vocab')]


def tensors(a):
    """(name, columns, rows) of each; norms have no rows."""
    kv = a.hidden // a.heads * a.kv_heads
    yield 'token_embd.weight', a.hidden, a.vocab
    yield 'output.weight', a.hidden, a.vocab
    yield 'output_norm.weight', a.hidden, 0
    for i in range(a.layers):
        for name, columns, rows in (('attn_norm', a.hidden, 0), ('attn_q', a.hidden, a.hidden), ('attn_k', a.hidden, kv),
                                    ('attn_v', a.hidden, kv), ('attn_output', a.hidden, a.hidden), ('ffn_norm', a.hidden, 0),
                                    ('ffn_gate', a.hidden, a.ffn), ('ffn_up', a.hidden, a.ffn), ('ffn_down', a.ffn, a.hidden)):
            yield f'blk.{i}.{name}.weight', columns, rows


def n_bytes(columns, rows):
    return columns * rows * 2 if rows else columns * 4


def padding(n):
    return -n % ALIGNMENT


def write(file, a):
    listed = list(tensors(a))
    header = [struct.pack('<4sIQQ', b'GGUF', 3, len(listed), len(metadata(a))), *metadata(a)]
    offset = 0
    for name, columns, rows in listed:
        shape = (columns, rows) if rows else (columns,)
        header.append(text(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape,
                                               F16_TENSOR if rows else F32_TENSOR, offset))
        offset += n_bytes(columns, rows) + padding(n_bytes(columns, rows))
    header = b''.join(header)
    file.write(header + bytes(padding(len(header))))

    random.seed(0)
    normal = [random.gauss(0, 1) for _ in range(POOL)]
    pools = {columns: memoryview(struct.pack(f'<{POOL}e', *(x / math.sqrt(columns) for x in normal)))
             for columns in {a.hidden, a.ffn}}
    for _, columns, rows in listed:
        left = n_bytes(columns, rows)
        end = bytes(padding(left))
        if not rows:
            file.write(struct.pack('<f', 1) * columns)
            left = 0
        start = 2 * random.randrange(POOL)
        while left:
            piece = pools[columns][start:start + left]
            file.write(piece)
            left -= len(piece)
            start = 0
        file.write(end)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out')
    for name, value in (('layers', 32), ('hidden', 4096), ('ffn', 14336), ('heads', 32), ('kv-heads', 8),
                        ('vocab', 128256), ('context', 262144)):
        parser.add_argument('--' + name, type=int, default=value)
    args = parser.parse_args()
    # A file that is there is whole.
    with open(args.out + '.part', 'wb') as file:
        write(file, args)
    os.replace(args.out + '.part', args.out)


if __name__ == '__main__':
    main()
