#!/usr/bin/env bash
# Builds the torch-free C++ tests and runs them once for each processor level.
#
#   tests/cpp/run.sh [plain|sanitize] [filter]
#
# plain is the default; sanitize adds the address and undefined-behaviour sanitizers. `filter` runs the tests whose
# name holds it. PYTHON names an interpreter that has the package nlohmann_json (its headers), JOBS the compilers
# that run at once.
set -euo pipefail
cd "$(dirname "$0")/../.."

mode=${1:-plain}
filter=${2:-}
case $mode in plain | sanitize) ;; *) echo "usage: tests/cpp/run.sh [plain|sanitize] [filter]" >&2; exit 2 ;; esac

make -f tests/cpp/Makefile -j"${JOBS:-2}" --no-print-directory --quiet MODE="$mode" PYTHON="${PYTHON:-python3}"

failed=0
skipped=""
for level in generic avx2 avx512 avx512_bf16 amx; do
  status=0
  MODELTORCH_CPU_LEVEL=$level "build/cpp-$mode/cpp_tests" "$filter" || status=$?
  case $status in
    0) ;;
    77) skipped="$skipped $level" ;;
    *) failed=1 ;;
  esac
done

# A misspelt level must stop the program, not fall back to another one.
if MODELTORCH_CPU_LEVEL=sse9 "build/cpp-$mode/cpp_tests" "$filter" > /dev/null; then
  echo "FAILED: MODELTORCH_CPU_LEVEL=sse9 was accepted"
  failed=1
fi
if [ -n "$skipped" ]; then
  echo "*** SKIPPED, NOT TESTED: this processor lacks the level$skipped ***"
fi
exit $failed
