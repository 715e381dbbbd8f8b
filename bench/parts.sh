# What the scripts that measure in parts share (gpu.sh, two_gpus.sh). To be sourced where `out` is the output folder and `parts`
# are the names of the parts to run. A part's output is in $out/<part>.txt, what became of it in $out/status.txt.
export PYTHONUNBUFFERED=1
bin=${THIMBLE_BUILD:-build-cuda}/bin
not_run=77

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$out/card.txt"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
[ "$capability" = 90 ] && capability=90a

within() { # seconds, command: nor past the end of all
  local left=$((${THIMBLE_SECONDS:-590} - SECONDS))
  [ $left -gt 0 ] || { echo "no time is left for $2"; return 124; }
  timeout -k 10 $(($1 < left ? $1 : left)) "${@:2}"
}

wants() { [[ " ${parts[*]} " =~ \ ($1)\  ]]; }

programs() { # target...: builds them in build-cuda, and the library that test-llama-archs needs
  local source api
  source=${THIMBLE_LLAMA_CPP:-$(scripts/fetch-llama-cpp)} &&
    api=$(sed -n 's/^#define GGML_BACKEND_API_VERSION //p' "$source/ggml/src/ggml-backend-impl.h") &&
    cmake -S . -B build-cuda -DTHIMBLE_CUDA=ON -DGGML_CUDA=ON -DGGML_CUDA_NCCL="${THIMBLE_NCCL:-OFF}" -DTHIMBLE_TESTS=OFF -DTHIMBLE_BENCH="$(wants restore && echo ON || echo OFF)" \
      -DLLAMA_BUILD_TESTS="$(wants archs && echo ON || echo OFF)" -DTHIMBLE_APIS="$api" -DCMAKE_CUDA_ARCHITECTURES="$capability" -DTHIMBLE_LLAMA_CPP="$source" &&
    within 590 nice cmake --build build-cuda -j "$(nproc)" --target "$@" &&
    { ! wants archs || c++ -std=c++20 -shared -fPIC -I"$source/ggml/include" tests/support/preload_backends.cpp \
      -o build-cuda/bin/libpreload_backends.so; }
}

has() { # program...: says what is missing, if anything is
  local program
  for program in "$@" libggml-thimble.so; do
    [ -e "$bin/$program" ] && continue
    echo "No $bin/$program: give a build by THIMBLE_BUILD, or see $out/programs.txt for what building one lacks" \
      "(llama.cpp's source by THIMBLE_LLAMA_CPP, the packages that scripts/install-deps names)."
    exit $not_run
  done
}

bench() { # seconds, model, arguments
  has thimble
  within "$1" "$bin/thimble" bench -m "$2" "${@:3}"
}

failed=0
run() { # part, its function where that has another name
  echo "== $1"
  local start=$SECONDS status
  set +e
  (set -e; "${2:-$1}") 2>&1 | tee "$out/$1.txt"
  status=${PIPESTATUS[0]}
  set -e
  echo "$1 $status $((SECONDS - start))" >> "$out/status.txt"
  [ "$status" -eq 0 ] || [ "$status" -eq $not_run ] || { echo "exit status $status"; failed=1; }
}
