#!/usr/bin/env bash
# Builds, tests, sanitises and measures on a machine with an NVIDIA GPU, in the Python that is given:
#
#   PYTHON=python3 tools/gpu_check.sh [build] [test] [sanitize] [bench]      default: all four, in this order
#
# Needs torch for CUDA, its nvcc, ninja, nlohmann-json and the extra [test]. Figures are appended to
# benchmarks/results/<card>.jsonl, each with the card's name, driver, torch and commit. JOBS compilers and test
# processes run at once; SHAPES names the models that are measured.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}
steps=${*:-build test sanitize bench}
export PYTHONPATH=$PWD

card=$("$python" -c 'import torch; print(torch.cuda.get_device_name())') || {
  echo "gpu_check: torch finds no GPU here" >&2
  exit 2
}
echo "== $card, driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1)"

build() {
  MODELTORCH_CUDA=1 MAX_JOBS=$jobs "$python" setup.py --quiet build_ext --inplace
}

# The tests of everything that has a device, on cuda.
run_tests() {
  local many=()
  "$python" -c 'import xdist' 2> /dev/null && many=(-n "$((jobs < 8 ? jobs : 8))")
  "$python" -m pytest tests/test_operations.py tests/test_cuda.py tests/test_parity.py -k cuda "${many[@]}"
}

# The tools side by side, for each is slow alone. Only our own kernels are looked at.
sanitize() {
  local tool failed=0 logs running=()
  logs=$(mktemp -d)
  for tool in memcheck initcheck racecheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --kernel-regex kns=modeltorch "$python" tools/run_cuda_cases.py > "$logs/$tool" 2>&1 &
    running+=("$tool:$!")
  done
  for tool in "${running[@]}"; do
    wait "${tool#*:}" || failed=1
    echo "== compute-sanitizer ${tool%:*}: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$logs/${tool%:*}" || tail -3 "$logs/${tool%:*}")"
  done
  [ $failed = 0 ] || { cat "$logs"/*; return 1; }
}

bench() {
  local results
  mkdir -p benchmarks/results
  results=benchmarks/results/$(tr ' ' '-' <<< "${card,,}").jsonl
  for shape in ${SHAPES:-qwen2.5-0.5b qwen2.5-7b}; do
    local run=("$python" -m modeltorch bench --device cuda --shape "$shape" --json "$results")
    "${run[@]}" --prefill-batch 1 --prompt-len 512,2048,8192 --decode-batch 1,8,32,128 --context 512
    "${run[@]}" --prefill-batch 8 --prompt-len 1024 --decode-batch 1 --context 8192 --requests 256
  done
  "$python" benchmarks/bench_execute.py --device cuda
  echo "== figures are in $results"
}

for step in $steps; do
  case $step in
    build) build ;;
    test) run_tests ;;
    sanitize) sanitize ;;
    bench) bench ;;
    *) echo "usage: tools/gpu_check.sh [build] [test] [sanitize] [bench]" >&2; exit 2 ;;
  esac
done
echo "== all passed"
