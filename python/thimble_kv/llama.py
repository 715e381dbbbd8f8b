"""Gives the models of llama-cpp-python a coded KV cache."""
import contextlib
import ctypes
import dataclasses
import functools
import os
import sys

DEVICE = b"THIMBLE0"
F16 = 1  # ggml's number of the type, which a coded cache must be asked for as


@dataclasses.dataclass(frozen=True)
class Enabled:
    """What enable() found and set."""

    llama: str  # the library that llama-cpp-python runs on
    ggml: str  # its version of ggml
    device: str  # what THIMBLE0 is
    settings: str  # THIMBLE_KV, but for the profile of a model


class _State:
    """Of this process: ggml keeps its devices, and llama-cpp-python its functions, in one place each."""

    enabled = None
    profile = None  # None: the one beside each model
    devices = None  # what llama_model_params.devices points to


def enable(kv="4", profile=None, *, window=None, policy=None, store=None, settings="", own_llama=False, plugin=None):
    """Makes every model that llama-cpp-python loads from now on keep its KV cache coded. Call it before llama_cpp.Llama.

    kv        bits a number, as `thimble run --kv` has it: "4", "2", "1.5", "4/2" for keys and values, "2+64" to attend to the
              64 best cells exactly
    profile   the model's calibration; by default `<model>.thimble.gguf` beside each model, where there is one
    window    last cells of each sequence that stay exact (128)
    policy    layers that "2+64" retrieves in: "all", "auto" or "none"
    store     a folder for the f16 cells of "2+64", instead of RAM
    settings  any other "key=value,..." of THIMBLE_KV
    own_llama run llama-cpp-python on the llama.cpp in this package instead of its own build. Its Python side must fit that
              llama.cpp: docs/guide/python.md names the versions that do. Only before llama_cpp is imported
    plugin    another libggml-thimble.so than the one in this package

    It loads the backend into the ggml that llama-cpp-python runs on, and sets THIMBLE_KV for this process and those that it
    starts. What llama_cpp.Llama then gets by default: flash_attn=True, n_gpu_layers=-1, the device THIMBLE0. These defaults,
    and those of llama_model_default_params and llama_context_default_params, are replaced in the module llama_cpp, since its
    Llama has no argument for a device. What cannot be is refused with a ValueError or RuntimeError: flash_attn=False, a cache
    type other than f16, a ggml that shows plugins no functions, one that is too old or too new. What only
    shows when a context is made (a model that cannot be, a profile that does not fit) is refused there: Llama raises, and
    verbose=True shows the plugin's sentence.
    May be called again, to set other settings for later models, but for settings="device=...", which the first call decides.
    Models that are loaded already keep theirs.
    """
    from . import home
    from . import plugin as own_plugin

    text = _settings_text(kv, window, policy, store, settings)
    if profile is not None and not os.path.isfile(profile):
        raise ValueError(f"profile={profile}: there is no such file")
    if own_llama:
        loaded = sys.modules.get("llama_cpp.llama_cpp")
        if loaded and os.path.dirname(loaded._lib._name) != home():
            raise RuntimeError("own_llama=True comes too late: llama_cpp is imported already. Call enable() before")
        os.environ["LLAMA_CPP_LIB_PATH"] = home()
    llama = _llama_cpp()
    library = _load(llama, plugin or own_plugin(), text)
    _check_settings(library, text)
    os.environ["THIMBLE_KV"] = text
    _State.profile = os.path.abspath(profile) if profile else None
    if not _State.enabled:
        _replace_defaults(llama, library)
    device = library.ggml_backend_dev_by_name(DEVICE)
    _State.enabled = Enabled(llama=llama._lib._name, ggml=library.ggml_version().decode(),
                             device=library.ggml_backend_dev_description(device).decode(), settings=text)
    return _State.enabled


def _settings_text(kv, window, policy, store, settings):
    bits, plus, top = str(kv).partition("+")
    if bits == "f16":
        raise ValueError("kv='f16': without a coded cache, do not call enable()")
    items = [("bits", bits)]
    if plus:
        items.append(("top", top))
    if window is not None:
        items.append(("window", str(window)))
    if policy is not None:
        items.append(("policy", policy))
    if store is not None:
        items += [("store", "file"), ("path", os.path.abspath(store))]
    for item in filter(None, settings.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"settings: '{item}' is not key=value")
        if key in dict(items) or key == "profile":
            raise ValueError(f"settings: {item} is said by an argument of enable()")
        items.append((key, value))
    return ",".join(f"{key}={value}" for key, value in items)


def _llama_cpp():
    try:
        import llama_cpp.llama_cpp as llama
    except ImportError as error:
        raise RuntimeError("llama-cpp-python is not installed (pip install llama-cpp-python)") from error
    return llama


def _load(llama, plugin, text):
    """The library of llama-cpp-python's ggml, with THIMBLE0 among its devices: around the device that the settings name."""
    path = llama._lib._name
    # Python loads libraries without showing their functions to others, and the plugin needs ggml's: this shows them, those of
    # the libraries that libllama is linked to among them.
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    try:
        library.ggml_backend_load.restype = ctypes.c_void_p
        library.ggml_backend_load.argtypes = [ctypes.c_char_p]
        library.ggml_backend_reg_count.restype = ctypes.c_size_t
        library.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        library.ggml_backend_dev_by_name.restype = ctypes.c_void_p
        library.ggml_backend_dev_by_name.argtypes = [ctypes.c_char_p]
        library.ggml_backend_dev_description.restype = ctypes.c_char_p
        library.ggml_backend_dev_description.argtypes = [ctypes.c_void_p]
        library.ggml_version.restype = ctypes.c_char_p
        library.ggml_backend_reg_by_name.restype = ctypes.c_void_p
        library.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
        library.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
        library.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    except AttributeError as error:
        raise RuntimeError(f"{path} shows no ggml functions to plugins (ggml is linked into it statically, or is too old): "
                           "use a build with shared libraries") from error
    if library.ggml_backend_dev_by_name(DEVICE):
        return library
    if library.ggml_backend_reg_count() == 0:  # its backends are modules, which lie beside it
        library.ggml_backend_load_all_from_path(os.path.dirname(path).encode())
    if not os.path.isfile(plugin):
        raise RuntimeError(f"{plugin} is missing: install thimble_kv again")
    kept = os.environ.get("THIMBLE_KV", "")
    os.environ["THIMBLE_KV"] = ",".join(item for item in text.split(",") if item.startswith("device="))
    said = _said_while(lambda: library.ggml_backend_load(plugin.encode()))
    os.environ["THIMBLE_KV"] = kept
    if not library.ggml_backend_dev_by_name(DEVICE):
        raise RuntimeError(f"the plugin does not load into {path}: {said or 'no reason given'}")
    return library


def _said_while(call):
    """What the plugin writes to stderr, where it says why it does not load."""
    import tempfile
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            call()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        said.seek(0)
        text = said.read().decode(errors="replace")
    sys.stderr.write(text)
    return " ".join(line.partition("thimble: ")[2] for line in text.splitlines() if "thimble: " in line)


def _check_settings(library, text):
    registry = library.ggml_backend_reg_by_name(b"THIMBLE")
    function = library.ggml_backend_reg_get_proc_address(registry, b"thimble_settings_error")
    if function:  # a plugin of before this function refuses when a context is made
        wrong = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_char_p)(function)(text.encode())
        if wrong:
            raise ValueError(wrong.decode())


def _replace_defaults(llama, library):
    import llama_cpp

    device = library.ggml_backend_dev_by_name(DEVICE)
    _State.devices = (ctypes.c_void_p * 2)(device, None)

    model_defaults, context_defaults = llama.llama_model_default_params, llama.llama_context_default_params

    @functools.wraps(model_defaults)
    def model_params():
        params = model_defaults()
        params.devices = ctypes.cast(_State.devices, ctypes.c_void_p).value
        params.n_gpu_layers = 0x7FFFFFFF
        return params

    @functools.wraps(context_defaults)
    def context_params():
        params = context_defaults()
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        return params

    for module in (llama, llama_cpp):  # the package shows them a second time
        module.llama_model_default_params = model_params
        module.llama_context_default_params = context_params

    make = llama_cpp.Llama.__init__

    @functools.wraps(make)
    def make_coded(self, model_path, **arguments):
        self._stack = contextlib.ExitStack()  # which Llama's end closes, whether or not it was made
        if not arguments.setdefault("flash_attn", True):
            raise ValueError("flash_attn=False: a coded cache is attended to by flash attention alone")
        for name in ("type_k", "type_v"):
            if arguments.get(name) not in (None, F16):
                raise ValueError(f"{name}={arguments[name]}: Thimble codes the cache itself, which must be f16 (leave it out)")
        arguments.setdefault("n_gpu_layers", -1)
        profile = _State.profile or _profile_beside(model_path)
        text = _State.enabled.settings
        os.environ["THIMBLE_KV"] = f"{text},profile={profile}" if profile else text
        make(self, model_path, **arguments)

    llama_cpp.Llama.__init__ = make_coded


def _profile_beside(model_path):
    from . import home

    beside = os.path.splitext(os.path.abspath(model_path))[0] + ".thimble.gguf"
    for profile in (beside, os.path.join(home(), "profiles", os.path.basename(beside))):
        if os.path.isfile(profile):
            return profile
    return None
