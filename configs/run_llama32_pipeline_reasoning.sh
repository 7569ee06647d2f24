#!/usr/bin/env bash
# The two-stage reasoning pipeline: general instructions, both benches (the base model's too), then chain of thought,
# both benches again, and what that means, in words. Rows that were measured once are not measured again.
#
#   MODEL=meta-llama/Llama-3.2-3B OUTPUT=outputs/reasoning configs/run_llama32_pipeline_reasoning.sh
#
# Run it in the repository's root. Every variable below can be set from outside. Data that is not there is prepared from
# the Hugging Face hub. A stage that is finished is not trained again, and one that was interrupted goes on from its
# newest checkpoint: the script can simply be run again.
set -euo pipefail

: "${PYTHON:=python3}"
: "${MODEL:=meta-llama/Llama-3.2-3B}"
: "${OUTPUT:=outputs/reasoning}"
: "${GENERAL_DATA:=data/sft_50k_en_ko_raw.jsonl}"
: "${GENERAL_BENCH:=data/sft_1k_en_ko_raw.jsonl}"
: "${MATH_DATA:=data/reasoning/openr1_math_40k.jsonl}"
: "${MATH_BENCH:=data/reasoning/openr1_math_1k.jsonl}"
: "${PREPARE_ARGS:=}" # further arguments of both data sets, e.g. "--seed 1"
: "${STAGE1_STEPS:=5000}"
: "${STAGE2_STEPS:=3000}"
: "${METRICS_LEVEL:=minimal}"
: "${TRAIN_ARGS:=}" # further arguments of both stages, e.g. "--set training.num_workers=4"
: "${BENCH_ARGS:=}" # further arguments of every bench

presets=configs/presets/reasoning
stage1=$OUTPUT/stage1_general_sft
stage2=$OUTPUT/stage2_reasoning_sft

prepare() { # prepare SUBJECT DATA BENCH
    # shellcheck disable=SC2086 # the arguments are meant to be split
    [ -e "$2" ] && [ -e "$3" ] || "$PYTHON" -m molora.prepare "$1" --out "$2" --bench "$3" $PREPARE_ARGS
}

bench() { # bench RESULTS_FILE --model NAME...
    # shellcheck disable=SC2086 # the arguments are meant to be split
    "$PYTHON" -m molora.evaluate "${@:2}" --bench "$GENERAL_BENCH" --bench "$MATH_BENCH" --output "$1" $BENCH_ARGS
}

prepare general-en-ko "$GENERAL_DATA" "$GENERAL_BENCH"
prepare openr1-math "$MATH_DATA" "$MATH_BENCH"

# shellcheck disable=SC2086
"$PYTHON" -m molora.train \
    --preset "$presets/llama3.2_3b_mixture_lora_sft.yml" \
    --set "model_name=$MODEL" \
    --set data.format=raw --set data.task=sft \
    --set "data.path=$GENERAL_DATA" \
    --set data.max_length=512 \
    --set "training.max_train_steps=$STAGE1_STEPS" \
    --set training.batch_size=10 --set training.grad_accum_steps=2 \
    --output-dir "$stage1" --metrics-level "$METRICS_LEVEL" --resume $TRAIN_ARGS
bench "$OUTPUT/bench_stage1.json" --model base --model "$stage1/final"

# shellcheck disable=SC2086
"$PYTHON" -m molora.train \
    --preset "$presets/llama3.2_3b_mixture_lora_sft_cot.yml" \
    --set "model_name=$stage1/final" \
    --set data.format=raw --set data.task=sft \
    --set "data.path=$MATH_DATA" \
    --set data.max_length=1024 \
    --set "training.max_train_steps=$STAGE2_STEPS" \
    --set training.batch_size=8 --set training.grad_accum_steps=2 \
    --output-dir "$stage2" --metrics-level "$METRICS_LEVEL" --resume $TRAIN_ARGS
bench "$OUTPUT/bench_stage2.json" --model "$stage2/final"

"$PYTHON" -m molora.verdict "$OUTPUT/bench_stage1.json" "$OUTPUT/bench_stage2.json" \
    --general "$GENERAL_BENCH" --maths "$MATH_BENCH" --output "$OUTPUT/verdict.json"
