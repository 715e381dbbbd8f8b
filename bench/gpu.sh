#!/bin/bash
# Builds what is needed, checks it, measures it beside its peers and prints one table, on a machine with a GPU, nvcc and
# PyTorch and no network, in less than ten minutes. Made for one H200 or H100.
#
# usage: [THIMBLE_BUILD=...] bench/gpu.sh [output folder [part...]]
#
# The parts, all by default:
#   check       every kernel against the codec's specification (tests/cuda/device_check.cu), and small cases under compute-sanitizer
#   attention   decode attention against cuDNN and flash attention in f16 (cuda_attention.py)
#   step        what else a step does: encoding, window, retrieval, tile decode (cuda_bench)
#   limiters    ncu's limiter for each kernel
#   hf          a decoded token with HF transformers' DynamicCache (hf_decode.py)
#   end_to_end  a decoded token with llama.cpp's f16 cache and with 2 bits
#   retrieval   a decoded token with 2 bits and the 64 best cells from pinned memory, and the GPU memory that takes
#   prefill     a prompt of 32768 tokens, f16 and 2 bits
#   quality     perplexity of a small real model: THIMBLE_MODEL=<GGUF> and THIMBLE_TEXT=<text of 5000 tokens or more>
#   server      only when named: what llama-server does with saved states (server_states.py) and the cases of THIMBLE_CASES=
#               <server_cases.py>, of THIMBLE_MODEL, at 4 and 2 bits, with THIMBLE_PROFILE=<GGUF> and without a profile; THIMBLE_CASE
#               names the latter (default: two_chats many_chats bad_slot). f16 is CUDA0's. With quantized weights llama.cpp's own
#               rounding hides what 4 bits do: take f32 ones (tests/support/dequantize_model.cpp)
#   eval        only when named: KL divergence of 4, 2, 1 and 2+64 on CUDA0 beside the CPU's, of THIMBLE_MODEL on THIMBLE_TEXT
#               (default: the GPL), with THIMBLE_PROFILE=<GGUF> (calibrated with --even) and without (gpu_eval.py)
#   archs       only when named: random models of every architecture, f16's logits and 4 bits', and the Meta device
#               (tests/plugin/llama_archs.py). THIMBLE_ARCHS=<regular expression> takes some of them
#   moe         only when named: a decoded token and prompts of a mixture of experts, f16 and 2 bits, at depths 0 and 65536
#   depths      only when named: a decoded token at five depths to 131072, f16, 2 bits and 2+64
#   batched     only when named: 32 sequences of 8192 tokens and 128 of 2048, f16 and 2 bits, with llama.cpp's default batches
#   restore     only when named: the state of a sequence of 32768 tokens to memory and to a file, and back (state_bench.cpp)
# Parts from end_to_end on run programs from THIMBLE_BUILD, a build directory whose bin has thimble, the plugin for CUDA, llama.cpp's
# programs and its ggml-cuda. Without it they are built in build-cuda while the kernels are measured, from the source of
# llama.cpp at THIMBLE_LLAMA_CPP or where scripts/fetch-llama-cpp has left it. A first build takes half of the ten minutes,
# so the first call may end before the last parts; the next call runs them all. The random models (16 and 11 GB) stay in the
# output folder; THIMBLE_RANDOM=<GGUF> and THIMBLE_MOE=<GGUF> name those that are there.
#
# THIMBLE_DEVICE=<name of ggml's> takes the place of CUDA0 in eval and archs.
#
# Each part's output is in <output folder>/<part>.txt. A part that fails, or is ended after its own time or THIMBLE_SECONDS
# (590) in all, does not stop the others: the table and the exit status show it.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
all=(check attention step limiters hf end_to_end retrieval prefill quality)
named=(server eval archs moe depths batched restore)
parts=("${@:2}")
[ ${#parts[@]} -eq 0 ] && parts=("${all[@]}")
mkdir -p "$out"
out=$(cd "$out" && pwd)
for part in status "${all[@]}" "${named[@]}"; do rm -f "$out/$part.txt"; done  # the table is of one run
model=${THIMBLE_RANDOM:-$out/llama-8b-random.gguf}
moe=${THIMBLE_MOE:-$out/moe-random.gguf}
small=$out/small-random.gguf  # with the cache of Llama-3.1-8B, for what saved states cost
device=${THIMBLE_DEVICE:-CUDA0}
source bench/parts.sh

kernels() {
  local flags=(-std=c++20 -O3 -gencode="arch=compute_$capability,code=sm_$capability" -I. -Isrc -Itests
               -Xcompiler "-fPIC,-ffp-contract=off")
  local host=$out/host library=() sources pids=() source pid
  mapfile -t sources < <(find src/cuda -name '*.cu' -o -name '*.cpp')
  object() { echo "$out/${1//\//-}.o"; }
  for source in "${sources[@]}"; do library+=("$(object "$source")"); done
  for source in "${sources[@]}" tests/cuda/device_check.cu bench/*.cu; do
    nvcc "${flags[@]}" -c "$source" -o "$(object "$source")" &
    pids+=($!)
  done
  # What they need of the rest, as CMake builds it.
  { cmake -S . -B "$host" -DTHIMBLE_PLUGIN=OFF -DTHIMBLE_TESTS=OFF && cmake --build "$host" -j "$(nproc)" --target thimble_cache; } \
    > "$out/host.txt" 2>&1 || { tail -20 "$out/host.txt"; exit 1; }
  for pid in "${pids[@]}"; do wait "$pid"; done
  for source in cache store kernels codec; do library+=("$host/src/$source/libthimble_$source.a"); done
  nvcc -o "$out/device_check" "$(object tests/cuda/device_check.cu)" "${library[@]}"
  nvcc -o "$out/cuda_bench" "$(object bench/cuda_bench.cu)" "${library[@]}"
  nvcc -shared -o "$out/shim.so" "$(object bench/cuda_shim.cu)" "${library[@]}"
}

check() {
  local status tool
  within 100 "$out/device_check" > "$out/device_check.txt" || { status=$?; cat "$out/device_check.txt"; exit $status; }
  grep -c '^ok' "$out/device_check.txt" | sed 's/$/ checks passed/'
  grep '^none' "$out/device_check.txt" || true
  command -v compute-sanitizer > /dev/null || return 0
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool"
    within 100 compute-sanitizer --tool $tool "$out/device_check" --quick > "$out/$tool.txt" 2>&1 || echo "exit status $?"
    tail -2 "$out/$tool.txt"
  done
}

attention() { within 120 python3 bench/cuda_attention.py "$out/shim.so"; }

step() { within 60 "$out/cuda_bench"; }

limiters() {
  command -v ncu > /dev/null || { echo "no ncu"; exit $not_run; }
  local metrics=gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active
  metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active
  metrics+=,smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio
  metrics+=,smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio
  metrics+=,smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio
  within 100 ncu --clock-control none --metrics $metrics "$out/cuda_bench" --once 2>&1 |
    grep -E 'Context|duration|throughput|wavefronts|pipe_alu|issue'
}

hf() {
  python3 -c 'import transformers' 2> /dev/null || { echo "no transformers for this python3"; exit $not_run; }
  within 120 python3 bench/hf_decode.py
}

large_batches=(--rounds 3 --ubatch 2048)

end_to_end() { bench 280 "$model" "${large_batches[@]}" --depths 0,131072,196608 --kv f16,2 --decode 64 --prompt 2048; }

retrieval() {
  nvidia-smi -i 0 --query-gpu=memory.used --format=csv,noheader,nounits -lms 500 > "$out/memory.txt" 2>&1 &
  trap "kill $!" EXIT
  bench 150 "$model" "${large_batches[@]}" --depths 131072 --kv 2+64 --decode 64 --prompt 2048
  echo "GPU memory: $(grep -x '[0-9]*' "$out/memory.txt" | sort -n | tail -1) MiB at most"
}

prefill() { bench 90 "$model" "${large_batches[@]}" --depths 0 --kv f16,2 --decode 1 --prompt 32768; }

moe() { bench 280 "$moe" "${large_batches[@]}" --depths 0,65536 --kv f16,2 --decode 128 --prompt 2048; }

depths() {
  bench 320 "$model" "${large_batches[@]}" --depths 0,8192,32768,131072 --kv f16,2,2+64 --decode 64 --prompt 2048
}

# As `llama-batched-bench -npp 8192 -ntg 64 -npl 32` and `-npp 2048 -ntg 64 -npl 128`.
batched() {
  bench 200 "$model" --sequences 32 --streams --depths 0 --kv f16,2 --decode 1 --prompt 8192 --rounds 2
  bench 150 "$model" --sequences 32 --streams --depths 8192 --kv f16,2 --decode 64 --prompt 64 --rounds 3
  bench 150 "$model" --sequences 128 --streams --depths 2048 --kv f16,2 --decode 64 --prompt 64 --rounds 3
}

restore() {
  has state_bench
  [ -f "$small" ] || python3 bench/random_gguf.py "$small" --hidden 1024 --heads 8 --kv-heads 8 --ffn 256 --vocab 1024 --context 131072
  local bits plugin
  for bits in f16 4 2; do
    plugin=(GGML_BACKEND_PATH="$bin/libggml-thimble.so" THIMBLE_KV="bits=$bits")
    [ $bits = f16 ] && plugin=()
    echo "$bits:"
    within 60 env "${plugin[@]}" "$bin/state_bench" "$small" "$([ $bits = f16 ] && echo CUDA0 || echo THIMBLE0)" 32768 /dev/shm
  done
}

eval_on_device() { # of a part's name, as eval is a word of the shell's
  [ -n "${THIMBLE_MODEL:-}" ] || { echo "THIMBLE_MODEL says which small model to measure."; exit $not_run; }
  has thimble
  within 400 python3 bench/gpu_eval.py "$bin/thimble" --model "$THIMBLE_MODEL" --text "${THIMBLE_TEXT:-examples/gpl-3.0.txt}" \
    --profile "${THIMBLE_PROFILE:-}" --device "$device" --jobs 4 --threads $(($(nproc) / 4 > 1 ? $(nproc) / 4 : 1)) --out "$out/eval"
}

archs() {
  local status=0
  has test-llama-archs libpreload_backends.so
  rm -f "$out/archs.md"
  within 560 python3 tests/plugin/llama_archs.py "$bin" --device "$device" --coded bits=4,small=0,window=16,pool=4 \
    --only "${THIMBLE_ARCHS:-}" --jobs $(($(nproc) / 2 > 1 ? $(nproc) / 2 : 1)) --table "$out/archs.md" || status=$?
  [ ! -f "$out/archs.md" ] || cat "$out/archs.md"
  return $status
}

quality() {
  [ -n "${THIMBLE_MODEL:-}" ] && [ -n "${THIMBLE_TEXT:-}" ] ||
    { echo "THIMBLE_MODEL and THIMBLE_TEXT say what to measure quality on."; exit $not_run; }
  has llama-perplexity
  local batch bits environment status
  for batch in 512 8; do
    for bits in f16 4 2; do
      environment=(GGML_BACKEND_PATH="$bin/libggml-thimble.so" THIMBLE_KV="bits=$bits,small=0")
      [ $bits = f16 ] && environment=()
      printf '%s, batches of %s: ' $bits $batch
      within 60 env "${environment[@]}" "$bin/llama-perplexity" -m "$THIMBLE_MODEL" -f "$THIMBLE_TEXT" -c 2048 --chunks 2 \
        -fa on -b $batch -ub $batch --device "$([ $bits = f16 ] && echo CUDA0 || echo THIMBLE0)" > "$out/perplexity.txt" 2>&1 ||
        { status=$?; tail -5 "$out/perplexity.txt"; exit $status; }
      grep -o 'PPL = .*' "$out/perplexity.txt" | tail -1
    done
  done
}

# `thimble serve` is llama-server with the plugin, and f16 on the CPU. A few lines stand in for it where f16 is to run on the GPU,
# and where thimble is not built, which takes libraries that the plugin does without.
server() {
  [ -n "${THIMBLE_CASES:-}" ] && [ -n "${THIMBLE_MODEL:-}" ] ||
    { echo "THIMBLE_CASES and THIMBLE_MODEL say which cases to run, of what model."; exit $not_run; }
  has llama-server
  local folder=$out/server profile failed=0
  mkdir -p "$folder"
  rm -f "$folder/thimble"
  cat > "$folder/thimble" << END
#!/bin/bash
# usage: thimble serve --kv BITS [--profile GGUF] arguments of llama-server...
[ "\$1 \$2" = "serve --kv" ] || exit 2
kv=\$3 settings=bits=\$3
if [ "\$kv" != f16 ] && [ -e "$(realpath "$bin")/thimble" ]; then exec "$(realpath "$bin")/thimble" "\$@"; fi
shift 3
if [ "\$1" = --profile ]; then settings+=,profile=\$2; shift 2; fi
if [ "\$kv" = f16 ]; then exec "$(realpath "$bin")/llama-server" --device CUDA0 -ngl 99 -fa on "\$@"; fi
export THIMBLE_KV=\$settings GGML_BACKEND_PATH="$(realpath "$bin/libggml-thimble.so")"
exec "$(realpath "$bin")/llama-server" --device THIMBLE0 -ngl 99 -fa on "\$@"
END
  chmod +x "$folder/thimble"
  # Side by side: what they measure is no time.
  local jobs=() names=() name job
  for profile in ${THIMBLE_PROFILE:+"$THIMBLE_PROFILE"} ""; do
    name=${profile:+with}
    name=${name:-without}
    within 290 python3 bench/server_states.py "$bin" --model "$THIMBLE_MODEL" --profile "$profile" \
      --logs "$folder/logs-$name" > "$folder/states-$name.txt" 2>&1 &
    jobs+=($!) names+=("states-$name")
    within 290 python3 "$THIMBLE_CASES" "$folder" ${THIMBLE_CASE:-two_chats many_chats bad_slot} --model "$THIMBLE_MODEL" \
      --profile "$profile" --kv 4,2 --threads 4 > "$folder/cases-$name.txt" 2>&1 &
    jobs+=($!) names+=("cases-$name")
  done
  for job in "${!jobs[@]}"; do
    wait "${jobs[job]}" || { echo "exit status $?"; failed=1; }
    echo "-- ${names[job]} a profile"
    cat "$folder/${names[job]}.txt"
  done
  return $failed
}

jobs=()
if wants 'end_to_end|retrieval|prefill|depths|batched'; then
  [ -f "$model" ] || { python3 bench/random_gguf.py "$model" & jobs+=($!); }
fi
if wants 'check|attention|step|limiters'; then run kernels; fi
if wants moe; then
  shape=(--layers 16 --hidden 2048 --heads 32 --kv-heads 4 --ffn 768 --experts 64)
  [ -f "$moe" ] || { python3 bench/random_gguf.py "$moe" "${shape[@]}" & jobs+=($!); }
fi
programs='end_to_end|retrieval|prefill|quality|server|eval|archs|moe|depths|batched|restore'
if [ -z "${THIMBLE_BUILD:-}" ] && wants "$programs"; then
  programs thimble ggml-thimble llama-perplexity $(! wants server || echo llama-server) $(! wants archs || echo test-llama-archs) \
    $(! wants restore || echo state_bench) \
    > "$out/programs.txt" 2>&1 & jobs+=($!)
fi
for part in "${parts[@]}"; do
  if [[ $part =~ ^(hf|$programs)$ ]]; then  # the host's time counts in all of these
    for job in "${jobs[@]}"; do wait "$job" || true; done  # what is missing then, the part says
    jobs=()
  fi
  if [ "$part" = eval ]; then run eval eval_on_device; else run "$part"; fi
done
echo
python3 bench/gpu_table.py "$out" | tee "$out/table.txt"
exit $failed
