#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command and under 9 minutes: benchmarks/gpu.sh OUT
#
# Needs python with torch (CUDA), triton, pytest, pytest-benchmark and hypothesis, and nvcc of the same CUDA (set CUDA_HOME if it is not
# in /usr/local/cuda); no network. Training steps also need the trainers' packages: where one is missing, a row says which. Wheels can be
# put on PYTHONPATH before.
#
# The most important comes first, no step takes longer than its limit, and what does not fit in the time that is left is not begun. OUT
# gets few files, each written as it goes, so that a run cut short still counts:
#   summary.txt        what each step came to
#   log.txt            all output; a line of JSON for each figure
#   <gpu>.csv          the rows, as in benchmarks/results
#   benchmarks.md, pictures.tar.gz    the same as docs/benchmarks.md
# The exit status says whether any step failed.
set -uo pipefail
out=$(mkdir -p "${1:?usage: benchmarks/gpu.sh OUT}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHON="${PYTHON:-python3}" PYTHONUNBUFFERED=1
deadline=$((SECONDS + 525))
kept=20 # seconds, for the report at the end
failed=0

say() { echo "$*" | tee -a "$out/summary.txt" "$out/log.txt"; }

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 started=$SECONDS status=0 left=$((deadline - kept - SECONDS))
  shift 2
  if [ "$left" -lt 5 ]; then
    say "$name: not begun, the time is used up"
    failed=1
    return
  fi
  echo "===== $name: $*" >>"$out/log.txt"
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" >>"$out/log.txt" 2>&1 || status=$?
  case $status in
    0) say "$name: done after $((SECONDS - started)) s" ;;
    124 | 137) say "$name: cut short after $((SECONDS - started)) s" && failed=1 ;;
    *) say "$name: failed (exit $status) after $((SECONDS - started)) s" && failed=1 ;;
  esac
}

gpu() { # gpu NAME SECONDS COMMAND...: a step that is nothing without a GPU
  if [ "$has_gpu" = yes ]; then step "$@"; else say "$1: not run, there is no GPU"; fi
}

bench() { # bench NAME SECONDS SUITES ARGUMENTS...: rows of some suites, in one process: to start one takes 13 s
  local name=$1 limit=$2 suites=$3
  shift 3
  # shellcheck disable=SC2086  # suites are words
  gpu "bench $name" "$limit" "$PYTHON" -m pytest -q -s -rfE -p no:cacheprovider --benchmark-only \
    --device cuda "$@" $(printf 'benchmarks/bench_%s.py ' $suites) --store "$out"
}

report() { # the page and its pictures from the rows so far; the pictures in one file
  step report 20 "$PYTHON" -m benchmarks.report "$out"
  if [ -d "$out/pictures" ]; then tar -C "$out" -czf "$out/pictures.tar.gz" pictures && rm -r "$out/pictures"; fi
}

: >"$out/summary.txt"
: >"$out/log.txt"
has_gpu=$("$PYTHON" -c 'import torch; print("yes" if torch.cuda.is_available() else "no")' 2>>"$out/log.txt" || echo no)
[ "$has_gpu" = yes ] || failed=1

step machine 30 "$PYTHON" -c 'import platform, torch, triton
print(platform.python_version(), torch.__version__, torch.version.cuda, triton.__version__)'
gpu "driver" 20 nvidia-smi
(gpu "build" 120 env KDOPS_BUILD=cuda "$PYTHON" setup.py build_ext --inplace && exit $failed) &
building=$!

# Correct first: of an op whose contract is red, or not done by then, a figure is in the log and not among the rows. What is built is
# not needed for Triton's kernels, and the longest of all compilations for a benchmark is done beside them.
(gpu "compile a training step" 100 "$PYTHON" -m pytest -q -p no:cacheprovider --benchmark-only --device cuda -k "skd and 512" \
  benchmarks/bench_step.py) &
compiling=$!
gpu "contract of Triton's kernels" 150 "$PYTHON" -m benchmarks.contract_gate 140 triton
wait $building || failed=1
step info 30 "$PYTHON" -c 'import json, kdops; print(json.dumps(kdops.info(), indent=1))'
gpu "contract of CUDA's kernels" 70 "$PYTHON" -m benchmarks.contract_gate 60 cuda
wait $compiling

# The goals of issue 8, each against its strongest rivals. Autotuning takes minutes a case: it comes last.
bench "goals of streaming ops" 130 "gaussian channel_attention contrast nss" --without "eager,max-autotune,convolved" \
  -k "not channel_attention or (distance and teacher)"
# SDPA's memory-efficient backend takes 36 to 290 ms where the others take 8 to 56: half of the suite's time.
bench "spatial_attention, 65,536 positions" 90 spatial_attention --without "eager,compile,max-autotune,flex,sdpa efficient" -k "resolution"
growing="eager,compile,max-autotune,flex,sdpa efficient,sdpa flash"
bench "spatial_attention, 1,048,576 positions" 60 spatial_attention --without "$growing" -k "growing and 1024x1024"
bench "training step, SKD at 512" 60 step -k "skd and 512"
# Clause 10 among them, and tiles of many channels, which no sample of the contract has.
gpu "gpu tests" 100 "$PYTHON" -m pytest -q -p no:cacheprovider --slow -m gpu -k "not (test_12 or test_13)" \
  tests/test_contract.py tests/ops
bench "other ops" 140 "codebook affinity channel_attention" --without "eager,max-autotune" -k "not (distance and teacher)"
bench "training step, other methods" 60 step -k "not 512"
bench "spatial_attention, growing N" 45 spatial_attention --without "$growing" -k "growing and not 1024x1024"
bench "spatial_attention, FlexAttention" 45 spatial_attention --without eager,compile,max-autotune -k "resolution and (flex or triton)"
kept=0
report
exit $failed
