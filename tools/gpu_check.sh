#!/usr/bin/env bash
# Builds, tests, sanitises and measures on a machine with an NVIDIA GPU, in the Python that is given:
#
#   PYTHON=python3 tools/gpu_check.sh [build] [test] [bench] [sanitize] [plot]     default: all but plot, in this order
#
# Needs torch for CUDA, its nvcc, ninja, nlohmann-json and the extra [test]; plot needs the extra [plot] too. Figures
# are appended to benchmarks/results/<card>.jsonl, each with the card's name, driver, torch and commit, and README's
# table is made from that file; plot draws the nodes of some steps into build/pictures. JOBS compilers and test
# processes run at once; SHAPES names the models that are measured. Where the sources came without their history,
# MODELTORCH_COMMIT says what they are.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}
steps=${*:-build test bench sanitize}
shapes=${SHAPES:-qwen2.5-0.5b qwen2.5-7b}
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
  "$python" -c 'import xdist' 2> /dev/null && many=(-n "$((jobs < 12 ? jobs : 12))")
  "$python" -m pytest tests -k cuda "${many[@]}"
}

# The tools side by side, for each is slow alone. Only our own kernels are looked at. A log ends with the case that
# failed.
sanitize() {
  local tool failed=0 logs running=()
  logs=$(mktemp -d)
  for tool in memcheck initcheck racecheck synccheck; do
    # initcheck must also see what cuBLASLt writes, or it takes that for uninitialised.
    local filter=(--kernel-name kns=modeltorch)
    [ $tool = initcheck ] && filter=()
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 "${filter[@]}" \
      "$python" tools/run_cuda_cases.py > "$logs/$tool" 2>&1 &
    running+=("$tool:$!")
  done
  for tool in "${running[@]}"; do
    wait "${tool#*:}" || failed=1
    local log=$logs/${tool%:*}
    echo "== compute-sanitizer ${tool%:*}: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" || tail -3 "$log")"
  done
  [ $failed = 0 ] || { cat "$logs"/*; return 1; }
}

# benchmarks/gpu_table.py has a row for each of these workloads.
bench() {
  local results shape
  mkdir -p benchmarks/results
  results=benchmarks/results/$(tr ' ' '-' <<< "${card,,}").jsonl
  for shape in $shapes; do
    local run=("$python" -m modeltorch bench --device cuda --shape "$shape" --json "$results")
    "${run[@]}" --prefill-batch 1 --prompt-len 512,2048,8192 --decode-batch 1,8,32,128 --context 512 --requests 0
    "${run[@]}" --prefill-batch 8 --prompt-len 1024 --decode-batch 1 --context 8192 --requests 256
  done
  "$python" benchmarks/gpu_table.py "$results" --into README.md
  echo "== figures are in $results, the table in README.md"
  "$python" benchmarks/bench_execute.py --device cuda
}

plot() {
  local nodes=build/pictures/nodes.jsonl shape
  mkdir -p build/pictures
  rm -f $nodes
  for shape in $shapes; do
    "$python" -m modeltorch bench --device cuda --shape "$shape" --nodes $nodes --requests 0 --runs 1 \
      --prefill-batch 1 --prompt-len 2048 --decode-batch 1,32 --context 512
  done
  "$python" benchmarks/plot.py $nodes --out build/pictures
}

for step in $steps; do
  case $step in
    build) build ;;
    test) run_tests ;;
    sanitize) sanitize ;;
    bench) bench ;;
    plot) plot ;;
    *) echo "usage: tools/gpu_check.sh [build] [test] [bench] [sanitize] [plot]" >&2; exit 2 ;;
  esac
done
echo "== all passed"
