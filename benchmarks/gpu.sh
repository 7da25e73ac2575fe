#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command and under 9 minutes: benchmarks/gpu.sh OUT
#
# Needs python with torch (CUDA), triton, pytest and pytest-benchmark, and nvcc of the same CUDA (set CUDA_HOME if it is not in
# /usr/local/cuda); no network. The most important comes first, and every step writes its log to OUT as it goes, so that a run cut
# short still counts. A failing step does not stop the others; the exit status says whether any failed.
set -uo pipefail
out=$(mkdir -p "${1:?usage: benchmarks/gpu.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHON="${PYTHON:-python3}"
failed=0

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 started=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  echo "$name: exit $status after $((SECONDS - started)) s" | tee -a "$out/summary.txt"
  [ "$status" -eq 0 ] || failed=1
}

: >"$out/summary.txt"
step machine 60 sh -c 'nvidia-smi; "$PYTHON" --version; "$PYTHON" -c "import torch, triton; print(torch.__version__, torch.version.cuda, triton.__version__)"'
step build 150 env KDOPS_BUILD=cuda "$PYTHON" setup.py build_ext --inplace
step info 60 "$PYTHON" -c 'import json, kdops; print(json.dumps(kdops.info(), indent=1))'
step contract 180 "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml="$out/contract.xml" -k "cuda or triton" tests/test_contract.py
step gpu_tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml="$out/gpu_tests.xml" --slow -m gpu tests
step bench_contrast 180 "$PYTHON" -m pytest -q -s -p no:cacheprovider --benchmark-only --benchmark-json="$out/bench_contrast.json" \
  -k cuda benchmarks/bench_contrast.py
exit $failed
