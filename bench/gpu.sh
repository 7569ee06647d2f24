#!/usr/bin/env bash
# What needs a CUDA GPU, from a checkout or a copy of one; the default in under 9 minutes together:
#
#   bench/gpu.sh [PART…]      default: tests core
#     tests      every kernel on the device against the fp64 reference, small and at real sizes
#     core       the block, its operations and a training step at Llama-3.2-3B's shapes
#     recipe     both stages by molora.train itself, tiny and against its own resumed run; then at their own size, on
#                random weights (python -m bench recipe)
#     more       what changes with tokens, experts, dropout, the other stage; torch.compile
#     sanitize   compute-sanitizer over a small block, which has every operation in it
#     tune       tiles that kernels could have beside those they have (see bench/tune.py)
#
# MOLORA_GPU_SECONDS, 530 by default, is what all of it may take. A step that has less than half of its own time left is
# not begun: most write nothing until they are through.
#
# A red test does not cost the benchmarks: each holds what it times to fp64 itself, and what is wrong gets no time. The
# exit status is that of the first step that failed or ran out of time.
#
# Results go to $OUT, else outputs/gpu, as few files: logs and JSON in gpu.tar.gz, packed anew after each step, and the
# JSON of the main benchmarks beside it.
#
# Builds nothing. Needs python3 with torch, triton, transformers, pytest, hypothesis, rich, tqdm and pyyaml. Tests run
# in parallel with pytest-xdist; the training step and the recipe need pydantic (with pydantic-core, typing-inspection and
# annotated-types), PEFT's LoRA peft and accelerate. What python3 lacks is found on PYTHONPATH: wheels unpacked there
# are enough. A copy without .git is told its commit by MOLORA_COMMIT.
set -uo pipefail
out=$(realpath -m "${OUT:-outputs/gpu}")
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1
unset TRITON_INTERPRET
parts=${*:-tests core}
for part in $parts; do
  case $part in tests | core | recipe | more | sanitize | tune) ;;
    *) echo "no part $part: tests, core, recipe, more, sanitize or tune" && exit 2 ;;
  esac
done
everything=$(mktemp -d)/gpu
mkdir -p "$out" "$everything"
trap 'rm -rf "$(dirname "$everything")"' EXIT

failed=0
step() { # step NAME SECONDS COMMAND…: as long as that, and as the whole script may take; its log and status are kept
  local name=$1 most=$2 left=$((${MOLORA_GPU_SECONDS:-530} - SECONDS)) status
  shift 2
  if [ "$((2 * left))" -lt "$most" ]; then
    echo "no time left for: $*" >"$everything/$name.log"
    status=124
  else
    # As from the keyboard: pytest then tells what failed until there, and a benchmark where it was.
    timeout -s INT -k 5 "$((most < left ? most : left))" "$@" >"$everything/$name.log" 2>&1
    status=$?
  fi
  grep -v rounds: "$everything/$name.log" | tail -n 40
  echo "== $name: exit $status after $SECONDS s"
  [ "$failed" -ne 0 ] || failed=$status
  tar -czf "$everything.tar.gz" -C "$(dirname "$everything")" gpu && mv -f "$everything.tar.gz" "$out/gpu.tar.gz"
}

{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  git rev-parse HEAD 2>/dev/null || echo "commit ${MOLORA_COMMIT:-unknown}"
} 2>&1 | tee "$everything/machine.log"

# --- tests ---------------------------------------------------------------------------------------------------------

workers() { # workers N: what makes pytest use N processes, if it can
  python3 -c 'import xdist' 2>/dev/null && echo "-n $1"
}
pytest=(python3 -m pytest -q --maxfail 10 --durations 8 -p no:cacheprovider)
on_the_device=(tests/molora_kernels/_triton tests/molora_kernels/*/test_*_triton.py tests/bench/test_measure.py)
tests() {
  # Most of the time of the small cases goes into compiling kernels. Real sizes take up to 10 GiB a process, and those
  # of more elements than an int32 counts up to 40, so they come one after the other.
  # shellcheck disable=SC2046 # "-n 14" is two words
  {
    OMP_NUM_THREADS=1 step tests-small 130 "${pytest[@]}" -m "not gpu" $(workers 14) "${on_the_device[@]}"
    OMP_NUM_THREADS=2 step tests-real 80 "${pytest[@]}" -m gpu -k "not more_elements and not sanitizer" $(workers 5) \
      "${on_the_device[@]}"
    step tests-large 45 "${pytest[@]}" -m gpu -k more_elements "${on_the_device[@]}"
  }
}

# --- benchmarks; the names are those of bench/results ----------------------------------------------------------------

main=(mlp-cuda-bf16 step-cuda-bf16-stage2 step-cuda-bf16-stage2-checkpointing sweep-cuda-bf16-experts
  sweep-cuda-bf16-tokens mlp-cuda-bf16-dropout op-cuda-bf16)
measure() { # measure NAME SECONDS COMMAND ARGUMENTS…
  local name=$1 most=$2
  shift 2
  step "$name" "$most" python3 -m bench "$@" --threads "$(nproc)" --json "$everything/$name.json"
  if [[ " ${main[*]} " == *" $name "* && -e $everything/$name.json ]]; then cp "$everything/$name.json" "$out/"; fi
}
shapes=(--device cuda --dtype bf16 --hidden 3072 --intermediate 8192)
model=(--device cuda --dtype bf16 --model llama3.2-3b --warmup 2 --rounds 5)
forms=(molora "molora dense" "molora grouped" "dense eager")
core() {
  local eager=("${forms[@]}" "transformers LlamaMLP" "naive loop" "loop with index_select" "PEFT LoRA r=64"
    "PEFT LoRA r=128" eulerforge mixlora moe-peft)
  measure mlp-cuda-bf16 100 mlp "${shapes[@]}" --tokens 8192 --only "${eager[@]}"
  # What a card of 24 GB has to run; then what a larger one can.
  measure step-cuda-bf16-stage2-checkpointing 90 step "${model[@]}" --rows 8 --length 1024 \
    --checkpointing non_reentrant --only molora "PEFT LoRA r=64"
  measure step-cuda-bf16-stage2 110 step "${model[@]}" --rows 8 --length 1024 --checkpointing none \
    --only molora "molora grouped" "PEFT LoRA r=64" "PEFT LoRA r=128"
  measure op-cuda-bf16 60 op "${shapes[@]}" --tokens 8192
}
recipe() {
  step tests-device 60 "${pytest[@]}" -m gpu tests/molora/test_device.py
  measure recipe-cuda 200 recipe --device cuda
}
more() {
  # Both micro-batches of a step at once, which asks half as much of the host.
  measure step-cuda-bf16-stage2-whole 80 step "${model[@]}" --rows 16 --length 1024 --checkpointing non_reentrant \
    --only molora "PEFT LoRA r=64"
  measure sweep-cuda-bf16-experts 110 sweep --over experts "${shapes[@]}" --tokens 8192 --rounds 10 --only "${forms[@]}"
  measure sweep-cuda-bf16-tokens 90 sweep --over tokens "${shapes[@]}" --rounds 10 \
    --only "${forms[@]}" "PEFT LoRA r=128"
  measure mlp-cuda-bf16-dropout 60 mlp "${shapes[@]}" --tokens 8192 --dropout 0.05 \
    --only molora "molora grouped" "PEFT LoRA r=64"
  measure step-cuda-bf16-stage1 75 step "${model[@]}" --rows 10 --length 512 --checkpointing none \
    --only molora "PEFT LoRA r=64"
  measure expand-cuda-bf16 40 expand --device cuda --dtype bf16 --tokens 8192
  # Last: nobody knows how long it compiles.
  measure step-cuda-bf16-stage2-compile 150 step "${model[@]}" --rows 8 --length 1024 --checkpointing non_reentrant \
    --only molora --compile
  measure mlp-cuda-bf16-compile 110 mlp "${shapes[@]}" --tokens 8192 --only molora "dense torch.compile"
}

# --- tiles -----------------------------------------------------------------------------------------------------------

tune() {
  step tune-cuda-bf16 110 python3 -m bench tune --seconds 60 --json "$everything/tune-cuda-bf16.json"
}

# --- compute-sanitizer -----------------------------------------------------------------------------------------------

sanitize() {
  local sanitizer tool
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
  if [ -z "$sanitizer" ]; then
    echo "== compute-sanitizer is not installed here: memcheck and racecheck not run"
    return
  fi
  # PyTorch's allocator hands out parts of large blocks, past whose ends there is more memory: without it each tensor is
  # an allocation of its own, and memcheck sees where it ends.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  # Beside other tests neither came to an end in 55 seconds on an H200: one file, and nothing beside it.
  for tool in memcheck racecheck; do
    step "$tool" 150 "$sanitizer" --tool "$tool" --target-processes application-only --error-exitcode 9 \
      python3 -m pytest tests/molora_kernels/mlp_block/test_mlp_block_triton.py -q -p no:cacheprovider -k sanitizer -m gpu
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

for part in $parts; do
  echo "== $part"
  $part
done
exit "$failed"
