#!/usr/bin/env bash
# A run on SLURM that may be interrupted at any time: from the root of the repository,
#   sbatch recipes/accelerate/slurm.sh my_recipe.yaml output/my_run
# Ten minutes before its time is over the run saves, and the job goes back into the queue and continues from there; what
# a node that fails takes along is what was learned since the last `save_steps`. For FSDP2: sbatch --export=ALL,CONFIG=…
#SBATCH --job-name=das-lm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1  # a launcher, which starts a process for every GPU of its node
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600  # to this script alone, see below
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

recipe=$1
output=$2
config=${CONFIG:-recipes/accelerate/ddp.yaml}
gpus=${SLURM_GPUS_ON_NODE:?start this script with sbatch}
main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
resume=()
if [ -f "$output/recipe.yaml" ]; then resume=(--resume); fi
export LAUNCHER=/tmp/das-lm.$SLURM_JOB_ID  # where each node notes which process its launcher is

# A launcher that is told to stop kills its processes half a minute later. They are told themselves.
stopped=
# shellcheck disable=SC2329 # called by the trap
stop() {
  stopped=yes
  # shellcheck disable=SC2016 # the node's shell reads its own file
  srun --overlap --ntasks-per-node=1 bash -c 'pkill -TERM -P "$(cat "$LAUNCHER")"' || true
}
trap stop TERM

# shellcheck disable=SC2016 # every node has its own SLURM_NODEID
srun --kill-on-bad-exit=1 bash -c 'echo $$ >"$LAUNCHER"; exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' - \
  --config_file "$config" \
  --num_machines "$SLURM_NNODES" \
  --num_processes $((SLURM_NNODES * gpus)) \
  --main_process_ip "$main" \
  --main_process_port $((20000 + SLURM_JOB_ID % 10000)) \
  scripts/continual_pretrain.py --recipe "$recipe" --output_dir "$output" "${resume[@]}" &
run=$!
status=0
wait "$run" || status=$?
if [ -n "$stopped" ]; then
  wait "$run" || true  # the signal ended the first wait
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
