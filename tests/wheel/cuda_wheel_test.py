#!/usr/bin/env python3
"""The wheel of a build for CUDA on a machine with a GPU, installed into an empty virtual environment: with a llama.cpp that has
ggml-cuda, `thimble run` and `thimble serve` answer from a cache that the GPU codes, slots are saved and restored, and the
wheel's own llama.cpp answers on the CPU; where no GPU is to be seen, a cache that is asked for on CUDA0 is refused.

usage: cuda_wheel_test.py <folder of the wheel> <programs of a llama.cpp with ggml-cuda> <model>

Exits with 77 where there is no GPU.
"""
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from server_process import ServerProcess  # noqa: E402

wheels, cuda_llama, model = (Path(argument).resolve() for argument in sys.argv[1:])
if not Path("/dev/nvidia0").exists():
    print("skipped: there is no GPU")
    sys.exit(77)


def check(condition, what, said=""):
    if not condition:
        raise AssertionError(f"{what}\n{said[-3000:]}")
    print("ok:", what, flush=True)


def run(*command, **environment):
    begin = time.monotonic()
    done = subprocess.run([str(part) for part in command], env={**env, **environment}, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    print(f"    {time.monotonic() - begin:.2f} s: {' '.join(str(part) for part in command)[:110]}")
    return done.returncode, done.stdout.decode(errors="replace")


def is_coded_on_gpu(said):
    """All 30 layers by the kernels over codes, and the model beside them on the GPU."""
    line = re.search(r"thimble: KV cache of 30 layers: .*", said)
    return line and "CUDA kernels" in line[0] and "slower" not in line[0] and "decoded for each batch" not in said


wheel, = wheels.glob("thimble_kv-*.whl")
print(f"    {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
           "CUDA_VISIBLE_DEVICES": "0"}
    if "LD_LIBRARY_PATH" in os.environ:  # where the driver and CUDA's libraries for that llama.cpp are
        env["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    code, said = run(sys.executable, "-m", "venv", folder / "venv")
    check(code == 0, "an empty virtual environment", said)
    code, said = run(folder / "venv/bin/pip", "install", wheel)
    check(code == 0, "the wheel is installed", said)
    thimble = folder / "venv/bin/thimble"

    code, said = run(thimble, "doctor", "-m", model, "--llama", cuda_llama)
    check(code == 0 and re.search(r"lists THIMBLE0\n +THIMBLE0: coded KV cache on NVIDIA .*\(CUDA kernels\)", said),
          "doctor has that llama.cpp load the plugin, on the GPU", said)
    print("".join(f"    {line}\n" for line in said.splitlines() if re.match(r"ggml|plugin|device|kernels| +(checked|THIMBLE0):", line)), end="")

    prompt = ["-m", model, "-p", "The capital of France is Paris. The capital of Italy is", "-n", "4", "-no-cnv", "--temp", "0",
              "-c", "2048", "--kv", "4"]
    code, said = run(thimble, "run", "--llama", cuda_llama, *prompt, "-lv", "4")
    check(code == 0 and "Rome" in said and is_coded_on_gpu(said), "thimble run answers from a cache of 4 bits on the GPU", said)
    check(re.search(r"CUDA0 model buffer size|THIMBLE0 model buffer size", said) and "offloaded 31/31 layers" in said,
          "the model is on the GPU, too", said)
    print("    " + re.search(r"thimble: KV cache of .*", said)[0])

    slots = folder / "slots"
    slots.mkdir()
    with ServerProcess([thimble, "serve", "--llama", cuda_llama, "-m", model, "--kv", "4", "-c", "4096", "-np", "2", "--slot-save-path", slots],
                       env) as server:
        story = "My dog is called Bingo, and he likes to sleep under the red table. " * 40
        prompt_of_chat = f"<|im_start|>user\n{story}What is my dog called?<|im_end|>\n<|im_start|>assistant\n"
        first = server.complete(prompt_of_chat, 12, 0)["content"]
        check("Bingo" in first, f"thimble serve answers: {first!r}")
        check(is_coded_on_gpu(server.text()), "from a cache of 4 bits on the GPU", server.text())
        # Asked again, a prompt's last token is decoded by itself, from codes, as it is behind a restored slot.
        asked_again = server.complete(prompt_of_chat, 12, 0)["content"]
        server.request("/slots/0?action=save", {"filename": "slot"})
        server.request("/slots/0?action=erase", {})
        restored = server.request("/slots/0?action=restore", {"filename": "slot"})
        again = server.complete(prompt_of_chat, 12, 0)
        check(restored["n_restored"] > 600 and again["timings"]["prompt_n"] < 16 and again["content"] == asked_again,
              f"a slot of {restored['n_restored']} cells is saved and restored, and answers the same",
              f"{again['timings']['prompt_n']} tokens read, {again['content']!r}\n{server.text()}")

    code, said = run(thimble, "run", "--llama", cuda_llama, *prompt, "--set", "device=CUDA0", CUDA_VISIBLE_DEVICES="-1")
    check(code != 0 and "there is no ggml device 'CUDA0' to run on" in said and "Rome" not in said,
          "where no GPU is to be seen, a cache on CUDA0 is refused", said)
    code, said = run(thimble, "run", *prompt, "--set", "device=CUDA0")
    check(code != 0 and "there is no ggml device 'CUDA0' to run on" in said and "Rome" not in said,
          "and so it is by the wheel's own llama.cpp, which has no CUDA", said)
    code, said = run(thimble, "run", *prompt, "-lv", "4")
    check(code == 0 and "Rome" in said and re.search(r"thimble: KV cache of 30 layers.*(avx|scalar)\w* kernels", said),
          "without device= it answers on the CPU, and says by which kernels", said)
