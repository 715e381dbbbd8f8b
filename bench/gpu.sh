#!/bin/bash
# Builds the CUDA kernels, checks them and measures them beside their peers, on a machine with a GPU, nvcc and PyTorch and
# no network, in less than ten minutes. Made for one H200.
#
# usage: bench/gpu.sh [output folder [part...]]
#
# The parts, all by default:
# 1. check: every kernel against the codec's specification (cuda_check), and small cases under compute-sanitizer
# 2. attention: decode attention against cuDNN and flash attention in f16 (cuda_attention.py)
# 3. step: what else a step does: encoding, window, retrieval, tile decode (cuda_bench)
# 4. limiters: ncu's limiter for each kernel
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
parts=("${@:2}")
[ ${#parts[@]} -eq 0 ] && parts=(check attention step limiters)
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONUNBUFFERED=1

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
[ "$capability" = 90 ] && capability=90a
flags=(-std=c++20 -O3 -gencode="arch=compute_$capability,code=sm_$capability" -Isrc -Itests -Xcompiler -fPIC,-ffp-contract=off)
objects=()
pids=()
compile() { # source
  local object="$out/$(basename "$1").o"
  nvcc "${flags[@]}" -c "$1" -o "$object" &
  pids+=($!)
  objects+=("$object")
}
for source in src/cuda/*.cu src/cuda/*.cpp src/codec/*.cpp; do compile "$source"; done
library=("${objects[@]}")
for program in cuda_check cuda_bench cuda_shim; do compile "bench/$program.cu"; done
for pid in "${pids[@]}"; do wait "$pid"; done
nvcc -o "$out/cuda_check" "$out/cuda_check.cu.o" "${library[@]}"
nvcc -o "$out/cuda_bench" "$out/cuda_bench.cu.o" "${library[@]}"
nvcc -shared -o "$out/shim.so" "$out/cuda_shim.cu.o" "${library[@]}"

check() {
  "$out/cuda_check" > "$out/check.txt" || { cat "$out/check.txt"; exit 1; }
  grep -c '^ok' "$out/check.txt" | sed 's/$/ checks passed/'
  grep '^none' "$out/check.txt" || true
  command -v compute-sanitizer > /dev/null || return 0
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool"
    timeout 150 compute-sanitizer --tool $tool "$out/cuda_check" --quick > "$out/$tool.txt" 2>&1 || echo "exit status $?"
    tail -2 "$out/$tool.txt"
  done
}

attention() { python3 bench/cuda_attention.py "$out/shim.so" | tee "$out/attention.txt"; }

step() { "$out/cuda_bench" | tee "$out/step.txt"; }

limiters() {
  command -v ncu > /dev/null || return 0
  local metrics=gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active
  metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active
  metrics+=,smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio
  metrics+=,smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio
  metrics+=,smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio
  timeout 100 ncu --clock-control none --metrics $metrics "$out/cuda_bench" --once 2>&1 |
    grep -E 'Context|duration|throughput|wavefronts|pipe_alu|issue' | tee "$out/ncu.txt" || true
}

for part in "${parts[@]}"; do
  echo "== $part"
  "$part"
done
