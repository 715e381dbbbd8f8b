#!/usr/bin/env python3
"""libthimble from Python, by ctypes and numpy: codes a random cache, attends to it from the codes, and compares with
attention in float. Prints the errors and fails where one is beyond what its rate may cost.

usage: attend.py <libthimble.so> [profile.thimble.gguf]

With a profile, the codecs are those of its first layer that has keys and values. Its transform fits the model's keys, not
these random ones, so the bounds are wider.
"""
import ctypes as c
import sys

import numpy as np

BLOCK_CELLS = 64
KEY, VALUE = 0, 1
F32, F16 = 0, 1
pointer = c.c_void_p


def struct(*fields):
    """A structure of thimble.h; those that begin with their size have it set."""
    class Struct(c.Structure):
        _fields_ = list(fields)

        def __init__(self, **members):
            super().__init__(**members)
            if hasattr(self, "struct_size"):
                self.struct_size = c.sizeof(self)
    return Struct


size, i32, i64, f32, f64 = c.c_size_t, c.c_int32, c.c_int64, c.c_float, c.c_double
ProfileInfo = struct(("struct_size", size), ("n_layers", i32), ("n_rates", i32), ("rates", f64 * 16),
                     ("architecture", c.c_char_p), ("source", c.c_char_p))
LayerInfo = struct(("struct_size", size), ("n_kv_heads", i32), ("n_heads", i32), ("key_dim", i32), ("value_dim", i32))
CodecArgs = struct(("struct_size", size), ("profile", pointer), ("bits", f64), ("kind", i32), ("n_heads", i32),
                   ("head_dim", i32), ("layer", i32), ("first_head", i32))
CodecInfo = struct(("struct_size", size), ("block_bytes", size), ("bits", f64), ("kind", i32), ("n_heads", i32),
                   ("head_dim", i32))
Blocks = struct(("data", pointer), ("n_blocks", i64), ("block_stride", size), ("head_stride", size))
EncodeArgs = struct(("struct_size", size), ("codec", pointer), ("blocks", Blocks), ("n_rows", i64), ("cells", pointer),
                    ("rows", pointer), ("row_stride", size), ("type", i32))
DecodeArgs = EncodeArgs  # the same members in the same order
Exact = struct(("start", pointer), ("cells", pointer), ("rows", pointer), ("n_rows", i64), ("keys", pointer),
               ("values", pointer), ("key_stride", size), ("value_stride", size))
AttendArgs = struct(("struct_size", size), ("keys", pointer), ("values", pointer), ("key_blocks", Blocks),
                    ("value_blocks", Blocks), ("n_sequences", i32), ("blocks_per_sequence", i32),
                    ("block_table", pointer), ("n_cells", pointer), ("first_tokens", pointer), ("n_heads", i32),
                    ("q", pointer), ("q_token_stride", size), ("q_head_stride", size), ("out", pointer),
                    ("out_token_stride", size), ("out_head_stride", size), ("mask", pointer), ("mask_stride", size),
                    ("scale", f32), ("softcap", f32), ("max_bias", f32), ("sinks", pointer), ("exact", Exact))


class Thimble:
    def __init__(self, path):
        self.lib = c.CDLL(path)
        for name in ("last_error", "status_name", "version", "context_instruction_set"):
            getattr(self.lib, "thimble_" + name).restype = c.c_char_p
        self.context = self.make("context_create", None)

    def call(self, name, *arguments):
        """Calls thimble_<name>; a status that is not ok becomes an exception with the library's sentence."""
        status = getattr(self.lib, "thimble_" + name)(*arguments)
        if status != 0:
            raise RuntimeError(self.lib.thimble_last_error().decode())

    def make(self, name, *arguments):
        made = pointer()
        self.call(name, *arguments, c.byref(made))
        return made


class Side:
    """The keys or the values of a layer: numbers [cell][KV head][dim] and their codes, all blocks of a head together."""

    def __init__(self, thimble, kind, numbers, **codec):
        n_cells, n_heads, dim = numbers.shape
        self.thimble, self.numbers = thimble, numbers
        self.codec = thimble.make("codec_create", c.byref(CodecArgs(kind=kind, n_heads=n_heads, head_dim=dim, **codec)))
        info = CodecInfo()
        thimble.call("codec_get_info", self.codec, c.byref(info))
        self.info = info
        self.n_blocks = -(-n_cells // BLOCK_CELLS)
        self.memory = np.empty((n_heads, self.n_blocks, info.block_bytes), np.uint8)
        self.blocks = Blocks(data=self.memory.ctypes.data, n_blocks=self.n_blocks, block_stride=info.block_bytes,
                             head_stride=self.n_blocks * info.block_bytes)
        self.cells = np.arange(n_cells, dtype=np.int64)
        self.rows("encode", EncodeArgs, numbers)

    def rows(self, name, Args, numbers):
        args = Args(codec=self.codec, blocks=self.blocks, n_rows=len(numbers), cells=self.cells.ctypes.data,
                    rows=numbers.ctypes.data, row_stride=numbers[0].size, type=F32)
        self.thimble.call(name, self.thimble.context, c.byref(args), None)

    def decoded(self):
        numbers = np.empty_like(self.numbers)
        self.rows("decode", DecodeArgs, numbers)
        return numbers


def attend(thimble, keys, values, q):
    """q [token][head][dim] of one sequence; every token sees all cells."""
    out = np.empty((*q.shape[:2], values.numbers.shape[2]), np.float32)
    n_cells = np.array([len(keys.numbers)], np.int64)
    first_tokens = np.array([0, len(q)], np.int64)
    args = AttendArgs(keys=keys.codec, values=values.codec, key_blocks=keys.blocks, value_blocks=values.blocks,
                      n_sequences=1, blocks_per_sequence=keys.n_blocks, n_cells=n_cells.ctypes.data,
                      first_tokens=first_tokens.ctypes.data, n_heads=q.shape[1], q=q.ctypes.data,
                      q_token_stride=q[0].size, q_head_stride=q.shape[2], out=out.ctypes.data,
                      out_token_stride=out[0].size, out_head_stride=out.shape[2])
    thimble.call("attend", thimble.context, c.byref(args), None)
    return out


def attend_in_float(k, v, q):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat(group, axis=1).astype(np.float64) for x in (k, v))
    scores = np.einsum("thd,chd->thc", q, k) / np.sqrt(q.shape[2])
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return np.einsum("thc,chd->thd", weights / weights.sum(axis=2, keepdims=True), v)


def error(x, expected):
    return float(((x - expected) ** 2).sum() / (expected**2).sum())


def first_layer(thimble, path):
    """A profile, its info, and the number and shape of its first layer with keys and values."""
    profile, info = thimble.make("profile_open", path.encode()), ProfileInfo()
    thimble.call("profile_get_info", profile, c.byref(info))
    for layer in range(info.n_layers):
        shape = LayerInfo()
        thimble.call("profile_get_layer", profile, layer, c.byref(shape))
        if shape.n_kv_heads > 0:
            return profile, info, layer, shape
    raise RuntimeError("the profile has no layer with keys and values")


def main(library, profile_path=None):
    thimble = Thimble(library)
    print(f"libthimble {thimble.lib.thimble_version().decode()}, "
          f"{thimble.lib.thimble_context_instruction_set(thimble.context).decode()}")
    # Squared error over squared size of what is decoded, and of attention's result.
    bounds = {16: (1e-6, 1e-6), 4: (0.018, 0.018), 3: (0.15, 0.15), 2: (0.21, 0.21), 1: (0.58, 0.58)}
    heads, kv_heads, k_dim, v_dim, codec = 6, 2, 64, 64, {}
    if profile_path:
        codec["profile"], info, codec["layer"], shape = first_layer(thimble, profile_path)
        heads, kv_heads, k_dim, v_dim = shape.n_heads, shape.n_kv_heads, shape.key_dim, shape.value_dim
        bounds = {bits: (0.9, 1.0) for bits in info.rates[:info.n_rates]}
        print(f"{info.architecture.decode()}: {info.n_layers} layers, {kv_heads} KV heads in layer {codec['layer']}")
    random = np.random.default_rng(1)
    k, v = (random.standard_normal((1000, kv_heads, dim), np.float32) for dim in (k_dim, v_dim))
    q = random.standard_normal((3, heads, k_dim), np.float32)
    good = True
    for bits, bound in bounds.items():
        keys, values = Side(thimble, KEY, k, bits=bits, **codec), Side(thimble, VALUE, v, bits=bits, **codec)
        # Of the same blocks, float attention over what they stand for shows that the codes were read right.
        errors = error(keys.decoded(), k), error(attend(thimble, keys, values, q), attend_in_float(k, v, q))
        own = error(attend(thimble, keys, values, q), attend_in_float(keys.decoded(), values.decoded(), q))
        fine = errors[0] < bound[0] and errors[1] < bound[1] and own < 1e-3
        good &= fine
        print(f"{bits:5g} bits (keys {keys.info.bits:g}): error of keys {errors[0]:.1e}, of attention {errors[1]:.1e} and {own:.1e} of what the "
              f"codes stand for: {'ok' if fine else 'FAILED'}")
        thimble.lib.thimble_codec_free(keys.codec)
        thimble.lib.thimble_codec_free(values.codec)
    if profile_path:
        thimble.lib.thimble_profile_close(codec["profile"])
    thimble.lib.thimble_context_free(thimble.context)
    return 0 if good else 1


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
