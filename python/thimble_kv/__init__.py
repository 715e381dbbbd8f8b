"""Thimble's coded KV cache, for llama-cpp-python and as programs (the command `thimble`).

    import thimble_kv
    thimble_kv.enable(kv="2+64")
    from llama_cpp import Llama
    model = Llama("model.gguf", n_ctx=16384)
"""
import os

from .llama import Enabled, enable

__all__ = ["Enabled", "enable", "home", "plugin"]


def home():
    """The folder with the programs, the plugin, the profiles and a llama.cpp.

    llama-cpp-python takes that llama.cpp where LLAMA_CPP_LIB_PATH names this folder, as enable(own_llama=True) does.
    """
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "home")


def plugin():
    """The path of the ggml backend, for GGML_BACKEND_PATH."""
    return os.path.join(home(), "libggml-thimble.so")
