#!/usr/bin/env bash
# Real text: pre-train the tiny built-in model on general text, then take it through biomedicine and computer science,
# naively at several learning rates and with DAS; with PEFT, LoRA adapters too. DATA holds
# {general,bio,cs}/{train,heldout}.jsonl.gz; finished runs are not repeated. About an hour on one core.
#
#     scripts/real_text.sh DATA OUTPUT [SEED]
#     MODEL=built-in-causal PEFT='{"r": 8, "lora_alpha": 16, "target_modules": ["c_attn", "c_fc"]}' \
#         scripts/real_text.sh DATA OUTPUT [SEED]
set -euo pipefail
data=$1 output=$2 seed=${3:-0}
mkdir -p "$output"

domain() { echo "  - {name: $1, data: $data/$1/train.jsonl.gz, held_out: $data/$1/heldout.jsonl.gz}"; }

recipe() { # MODEL; the domains come on standard input
    cat <<YAML
model_name_or_path: $1
output_dir: $output/unused
training:
  max_length: 128
  per_device_train_batch_size: 16
  per_device_eval_batch_size: 32
  importance_samples: 256
  warmup_steps: 0.1
  logging_steps: 50
  save_strategy: "no"
  disable_tqdm: true
  seed: $seed
YAML
    cat
}

run() { # NAME RECIPE, then options
    name=$1 file=$2
    shift 2
    [ -d "$output/$name/2-cs" ] || [ -d "$output/$name/1-general" ] ||
        das-lm pretrain --recipe "$file" --output_dir "$output/$name" --overwrite_output_dir "$@"
}

{ echo "domains:"; domain general; } | recipe "${MODEL:-built-in}" > "$output/base.yaml"
run base "$output/base.yaml" --method naive --learning_rate 1e-3 --max_steps 1500

{ echo "domains:"; domain bio; domain cs; echo "measure:"; domain general; } |
    recipe "$output/base/1-general" > "$output/bio_then_cs.yaml"
for rate in 2.5e-4 3.5e-4 5e-4 7e-4 1e-3; do
    run "naive-$rate-seed$seed" "$output/bio_then_cs.yaml" --method naive --learning_rate $rate --max_steps 200
done
run "masks-1e-3-seed$seed" "$output/bio_then_cs.yaml" --learning_rate 1e-3 --max_steps 200 --contrast_weight 0
run "das-1e-3-seed$seed" "$output/bio_then_cs.yaml" --learning_rate 1e-3 --max_steps 200
[ -z "${PEFT:-}" ] && exit
lora() { # NAME, then options
    name=$1
    shift
    run "lora-$name-seed$seed" "$output/bio_then_cs.yaml" --peft "$PEFT" --max_steps 200 "$@"
}
for rate in 1e-3 1.4e-3 2e-3 2.8e-3 4e-3; do
    lora "naive-$rate" --method naive --learning_rate $rate
done
lora masks-4e-3 --learning_rate 4e-3 --contrast_weight 0
lora das-4e-3 --learning_rate 4e-3
