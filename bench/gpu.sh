#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in under 9 minutes, from a plain checkout: correctness first, then benchmarks.
# Builds nothing; needs python3 with torch, triton, pytest and transformers.
#
#   bench/gpu.sh [FOLDER]     results and logs; default: $OUT, else outputs/gpu
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-outputs/gpu}}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'

echo "== correctness: every kernel on the device against the fp64 reference"
timeout 210 python3 -m pytest tests/molora_kernels -x -q -p no:cacheprovider 2>&1 | tee "$out/tests.log" | tail -n 15
correct=${PIPESTATUS[0]}
if [ "$correct" -ne 0 ]; then
  echo "kernels are wrong or slow to compile here (see $out/tests.log): nothing is timed"
  exit "$correct"
fi

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool on a small block"
    timeout 45 compute-sanitizer --tool "$tool" --error-exitcode 9 python3 -m bench mlp --device cuda --dtype bf16 \
      --tokens 256 --hidden 256 --intermediate 512 --rounds 1 --warmup 0 --only molora >"$out/$tool.log" 2>&1
    tail -n 2 "$out/$tool.log"
  done
fi

echo "== benchmarks at Llama-3.2-3B's shapes"
shapes=(--device cuda --dtype bf16 --hidden 3072 --intermediate 8192)
for tokens in 8192 5120 1024 64; do
  timeout 60 python3 -m bench mlp "${shapes[@]}" --tokens "$tokens" --rounds 30 --warmup 5 \
    --json "$out/mlp-bf16-$tokens.json" 2>&1 | grep -v rounds:
done
timeout 60 python3 -m bench mlp "${shapes[@]}" --tokens 8192 --dropout 0.08 --rounds 20 --only molora "PEFT LoRA r=64" \
  --json "$out/mlp-bf16-8192-dropout.json" 2>&1 | grep -v rounds:
