#!/usr/bin/env python3
"""Time of a decoded token with HF transformers' DynamicCache, on Llama-3.1-8B's shape with random bf16 weights.

usage: hf_decode.py [--depths 16,131072,196608] [--warm 4] [--tokens 16] [--device cuda] [--tiny]

The cache is filled with random keys and values, not by a prompt: a step takes as long. Attention is the model's own choice,
sdpa, and the cache grows as it always does, each layer's tensors copied into longer ones for every token.
"""
import argparse
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig


def make_model(args):
    shape = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                 num_key_value_heads=8, vocab_size=128256)
    if args.tiny:
        shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=256)
    config = LlamaConfig(**shape, max_position_embeddings=262144, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None,
                         rope_parameters={'rope_type': 'default', 'rope_theta': 500000.0})
    with torch.device(args.device):  # weights are made there, in place
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation='sdpa').eval()


def filled_cache(config, depth, device):
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(1, config.num_key_value_heads, depth, config.head_dim, device=device,
                                    dtype=torch.bfloat16) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def decode_ms(model, depth, args):
    wait = torch.cuda.synchronize if args.device == 'cuda' else lambda: None
    cache = filled_cache(model.config, depth, args.device)
    token = torch.zeros(1, 1, dtype=torch.long, device=args.device)
    times = []
    for _ in range(args.warm + args.tokens):
        wait()
        start = time.perf_counter()
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    assert cache.get_seq_length() == depth + args.warm + args.tokens
    return sorted(times[args.warm:])


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--depths', default='16,131072,196608')
    parser.add_argument('--warm', type=int, default=4)
    parser.add_argument('--tokens', type=int, default=16)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--tiny', action='store_true', help='a model of no size, to test this program')
    args = parser.parse_args()
    torch.manual_seed(0)
    model = make_model(args)
    for depth in map(int, args.depths.split(',')):
        ms = decode_ms(model, depth, args)
        line = f'depth {depth}: {ms[len(ms) // 2]:.2f} ms a token ({ms[0]:.2f}..{ms[-1]:.2f})'
        if args.device == 'cuda':
            line += f', {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most'
            torch.cuda.empty_cache()  # the next depth's tensors are of other sizes
        print(line, flush=True)


if __name__ == '__main__':
    main()
