#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in under 9 minutes, from a plain checkout: correctness first, then benchmarks, then
# compute-sanitizer with the time that is left. Builds nothing; needs python3 with torch, triton, pytest, hypothesis and
# transformers, and pydantic for the training step. Nothing is timed when a test fails.
#
#   bench/gpu.sh [FOLDER]     results and logs; default: $OUT, else outputs/gpu
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-outputs/gpu}}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1
unset TRITON_INTERPRET

within() { # within SECONDS COMMAND…: as long as that, and as the whole script may take
  local most=$1 left=$((530 - SECONDS))
  shift
  if [ "$left" -lt 5 ]; then
    echo "no time left for: $*"
    return 124
  fi
  timeout -k 5 "$((most < left ? most : left))" "$@"
}

{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  git rev-parse HEAD
} 2>&1 | tee "$out/machine.log"

# Most of the time of the small cases goes into compiling kernels, which several processes share.
workers=()
if python3 -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
test_kernels() { # test_kernels NAME SECONDS ARGUMENTS…
  local name=$1 most=$2
  shift 2
  within "$most" python3 -m pytest tests/molora_kernels -q --maxfail 10 --durations 8 -p no:cacheprovider "$@" \
    >"$out/tests-$name.log" 2>&1
  local status=$?
  tail -n 25 "$out/tests-$name.log"
  echo "== $name: exit $status after $SECONDS s"
  return "$status"
}

echo "== correctness: every kernel on the device against the fp64 reference"
test_kernels small 170 -m "not gpu" "${workers[@]}"
small=$?
echo "== correctness at real sizes: 100 runs bit for bit, CUDA graphs, torch.compile, offsets beyond 2^31"
test_kernels real 130 -m gpu
real=$?
# 124: out of time. What did not run is not wrong, and each benchmark checks its variants in fp64 before it times them.
for status in "$small" "$real"; do
  if [ "$status" -ne 0 ] && [ "$status" -ne 124 ]; then
    echo "kernels are wrong here (see $out/tests-*.log): nothing is timed"
    exit "$status"
  fi
done

echo "== benchmarks at Llama-3.2-3B's shapes, what decides most first; the names are those of bench/results"
shapes=(--device cuda --dtype bf16 --hidden 3072 --intermediate 8192)
model=(--device cuda --dtype bf16 --model llama3.2-3b --warmup 2 --rounds 5)
bench() { # bench NAME COMMAND ARGUMENTS…
  local name=$1
  shift
  within 75 python3 -m bench "$@" --json "$out/$name.json" >"$out/$name.log" 2>&1
  local status=$?
  grep -v rounds: "$out/$name.log" | tail -n 30
  echo "== $name: exit $status after $SECONDS s"
}
bench mlp-cuda-bf16 mlp "${shapes[@]}" --tokens 8192
bench step-cuda-bf16-stage2 step "${model[@]}" --rows 8 --length 1024 --checkpointing none
bench sweep-cuda-bf16-experts sweep --over experts "${shapes[@]}" --tokens 8192 --rounds 10
bench sweep-cuda-bf16-tokens sweep --over tokens "${shapes[@]}" --rounds 10
bench mlp-cuda-bf16-dropout mlp "${shapes[@]}" --tokens 8192 --dropout 0.05 \
  --only molora "molora grouped" "PEFT LoRA r=64"
bench op-cuda-bf16 op "${shapes[@]}" --tokens 8192

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [ -z "$sanitizer" ]; then
  echo "== compute-sanitizer is not installed here: memcheck and racecheck not run" | tee "$out/sanitizer.log"
else
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool: one small case of each operation, dense and grouped"
    within 60 "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all \
      python3 -m pytest tests/molora_kernels -q -p no:cacheprovider -k sanitizer -m gpu >"$out/$tool.log" 2>&1
    status=$?
    tail -n 4 "$out/$tool.log"
    echo "== $tool: exit $status after $SECONDS s"
  done
fi
[ "$small" -eq 0 ] && [ "$real" -eq 0 ]
