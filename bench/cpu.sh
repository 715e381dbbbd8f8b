#!/usr/bin/env bash
# Every figure of two CPU cores in one go: bench/cpu.sh <model> <folder> [part ...]
#   model    SmolLM2-135M-Instruct, with its profile in profiles/ or beside it
#   folder   for the results, a file a part
#   parts    smollm2 gemma first store threads attention (all but gemma where none is said)
# In the environment:
#   THIMBLE_BUILD   the build directory (default: build), of -DTHIMBLE_BENCH=ON
#   AVX2_GGML       a folder of scripts/build-ggml's libraries with haswell's variant alone: smollm2 is measured with AVX2, too,
#                   of ggml and of ours. Other ggml libraries do not fit: with them a build for AVX-512 would be compared
#   GEMMA           the model of part gemma
# Nothing else should run. Part smollm2 takes about 12 minutes, most of it to fill ggml's q8_0 cache.
set -euo pipefail
model=${1:?} out=${2:?}
shift 2
parts=("$@")
[ $# -gt 0 ] || parts=(first smollm2 attention threads store)
root=$(cd "$(dirname "$0")/.." && pwd)
build=${THIMBLE_BUILD:-$root/build}
profile=$root/profiles/SmolLM2-135M-Instruct.Q4_1.thimble.gguf
mkdir -p "$out"

bench() { "$1/thimble" bench -t 2 --rounds 3 --decode 24 --prompt 128 "${@:2}"; }

part_smollm2() {
  local arguments=(-m "$model" --profile "$profile" --depths 8000 --kv f16,q8_0,2,2+64)
  bench "$build/bin" "${arguments[@]}" | tee "$out/smollm2.txt"
  [ -n "${AVX2_GGML:-}" ] || return 0
  # ggml looks for its variants beside the program.
  local avx2=$out/avx2
  mkdir -p "$avx2"
  cp -L "$build/bin/thimble" "$build"/bin/libggml-thimble*.so "$AVX2_GGML"/libggml-cpu-haswell.so "$avx2"
  LD_LIBRARY_PATH=$AVX2_GGML THIMBLE_ISA=avx2 bench "$avx2" "${arguments[@]}" | tee "$out/smollm2-avx2.txt"
}

part_gemma() { bench "$build/bin" -m "${GEMMA:?}" --depths 16000 --kv f16,4,2 | tee "$out/gemma.txt"; }

# Model load and one token: whole runs in turn.
part_first() {
  local TIMEFORMAT='%R s, %U s of user time, %S s of the system'
  for _ in 1 2 3 4 5 6 7; do
    for kv in f16 2 2+64; do
      printf '%s ' "$kv"
      { time "$build/bin/thimble" run --kv "$kv" --profile "$profile" -m "$model" -p Hi -n 1 -c 8192 -t 2 -no-cnv --no-warmup \
        > /dev/null 2>&1; } 2>&1
    done
  done | tee "$out/first.txt"
}

attention() {
  "$build/bin/attention_bench" --benchmark_enable_random_interleaving=true --benchmark_repetitions=9 \
    --benchmark_min_time=0.05 --benchmark_report_aggregates_only=true --benchmark_filter="$1"
}
part_attention() {
  attention '(avx512_2bit|avx512_2.64|avx2_2bit|avx2_2.64|ggml_f16|ggml_q8_0)/(64x3|128x4)/8192/[12]/' | tee "$out/attention.txt"
  attention '(avx512_2bit|avx2_2bit|ggml_f16)/(64x3|128x4)/prefill512/4608/1/' | tee "$out/prompts.txt"
}
# Needs 8 cores at least.
part_threads() { attention 'avx512_2bit/(64x3|128x4)/32768/[18]/' | tee "$out/threads.txt"; }
part_store() { "$build/bin/store_bench" "$out" 131072 31 | tee "$out/store.txt"; }

for part in "${parts[@]}"; do "part_$part"; done
