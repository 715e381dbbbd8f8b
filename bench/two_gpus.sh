#!/bin/bash
# Measures a model that two GPUs share, beside one GPU and beside llama.cpp's f16, on a machine with two GPUs, nvcc and no
# network, and prints a table. Made for two H200; the random 8B model of f16 weights takes 16 GB on each that has it whole.
#
# usage: [THIMBLE_BUILD=...] bench/two_gpus.sh [output folder [part...]]
#
# The parts, all by default, each ended after its own time:
#   one         a decoded token at THIMBLE_DEPTHS (default 131072,196608), 2 bits, on one GPU
#   other       the same on the other: two GPUs of one host may differ by 4 %
#   layer       the same, two GPUs with half of the layers each
#   tensor_f16  the same, two GPUs with half of each tensor, llama.cpp's f16 cache
#   tensor      the same with 2 bits
#   large_f16   a decoded token of a 70B model's shape at 131072, f16 weights (141 GB) on two GPUs, half of the layers each, f16 cache
#   large       the same with 2 bits
#   prompt      a prompt of 32768 tokens, f16 and 2 bits in turn, two GPUs with half of the layers each
#   server      whether llama-server on both GPUs, by layers and by tensors, answers as on one: THIMBLE_MODEL=<small real GGUF>
# Depths are filled with copies of 8192 cells that were read (thimble bench --read), but for tensors at 2 bits, whose states take
# longer than reading. The 70B model is a file of holes in RAM (/dev/shm), which shows random pages (repeat_pages.cpp).
# THIMBLE_BUILD, THIMBLE_LLAMA_CPP, THIMBLE_RANDOM and THIMBLE_SECONDS are gpu.sh's; a first build takes half of the ten minutes.
# THIMBLE_NCCL=ON builds ggml-cuda with NCCL. THIMBLE_ONE=<name of a ggml device>, THIMBLE_OTHER and THIMBLE_TWO=<names> take the
# place of CUDA0, CUDA1 and CUDA0,CUDA1.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/two_gpus}
all=(one other layer tensor_f16 tensor large_f16 large prompt server)
parts=("${@:2}")
[ ${#parts[@]} -eq 0 ] && parts=("${all[@]}")
mkdir -p "$out"
out=$(cd "$out" && pwd)
for part in status "${all[@]}"; do rm -f "$out/$part.txt"; done  # the table is of one run
model=${THIMBLE_RANDOM:-$out/llama-8b-random.gguf}
depths=${THIMBLE_DEPTHS:-131072,196608}
one=${THIMBLE_ONE:-CUDA0}
other=${THIMBLE_OTHER:-CUDA1}
two=${THIMBLE_TWO:-CUDA0,CUDA1}
source bench/parts.sh

decode() { # devices, how they share the model, cache, cells that are read and copied
  bench 130 "$model" --device "$1" --split-mode "$2" --kv "$3" --depths "$depths" --read "$4" --decode 64 --prompt 64 --rounds 3 --ubatch 2048
}
one() { decode "$one" layer 2 8192; }
other() { decode "$other" layer 2 8192; }
layer() { decode "$two" layer 2 8192; }
tensor_f16() { decode "$two" tensor f16 8192; }
tensor() { decode "$two" tensor 2 0; }

large=/dev/shm/llama-70b-random.gguf
of_70b() { # cache
  [ -f "$large" ] || python3 bench/random_gguf.py "$large" --layers 80 --hidden 8192 --ffn 28672 --heads 64 --holes
  c++ -O2 -shared -fPIC bench/repeat_pages.cpp -o "$out/repeat_pages.so" -ldl
  REPEAT_PAGES=$large.pages LD_PRELOAD=$out/repeat_pages.so \
    bench 130 "$large" --device "$two" --kv "$1" --depths 131072 --read 8192 --decode 24 --prompt 64 --rounds 3 --ubatch 2048
}
large_f16() { of_70b f16; }
large() { of_70b 2; }

# Batches of 512 in logical batches of 2048, as llama.cpp has them by default: the first GPU reads the next while the second
# is at the last.
prompt() {
  bench 100 "$model" --device "$two" --kv f16,2 --depths 0 --decode 1 --prompt "${THIMBLE_PROMPT:-32768}" --ubatch 512 --rounds 3
}

server() {
  [ -n "${THIMBLE_MODEL:-}" ] || { echo "THIMBLE_MODEL says which small model to serve."; exit $not_run; }
  has llama-server
  within 150 python3 bench/two_gpus_server.py "$bin" "$THIMBLE_MODEL" --one "$one" --two "$two"
}

jobs=()
! wants 'one|other|layer|tensor_f16|tensor|prompt' || [ -f "$model" ] || { python3 bench/random_gguf.py "$model" & jobs+=($!); }
if [ -z "${THIMBLE_BUILD:-}" ]; then
  programs thimble ggml-thimble $(! wants server || echo llama-server) > "$out/programs.txt" 2>&1 & jobs+=($!)
fi
for job in "${jobs[@]}"; do wait "$job" || true; done  # what is missing then, the part says
for part in "${parts[@]}"; do run "$part"; done
echo
python3 bench/two_gpus_table.py "$out" | tee "$out/table.txt"
exit $failed
