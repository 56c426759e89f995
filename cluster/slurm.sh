#!/usr/bin/env bash
# One shard of a folder for each task of a Slurm array; docs/cluster.md says how to submit it.
#
#   sbatch --array=1-20 cluster/slurm.sh INPUT OUTPUT [OPTIONS OF process-dir]
#
#SBATCH --job-name=bcseg-batch
#SBATCH --cpus-per-task=8
#SBATCH --mem=4G
#SBATCH --time=12:00:00
# A node that dies, or a task that is pushed aside, begins again and does what is left.
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before its time is up a task finishes the images in hand, and ends.
#SBATCH --signal=B:TERM@120
set -euo pipefail

if [[ $# -lt 2 ]]; then
  echo "usage: sbatch --array=1-N $0 INPUT OUTPUT [OPTIONS]" >&2
  exit 64
fi
: "${SLURM_ARRAY_TASK_ID:?submit this with sbatch --array=1-N}"

# To run some tasks again (--array=3,7), say how many there were: sbatch --export=ALL,SHARDS=20 ...
if [[ -z ${SHARDS:-} ]]; then
  if [[ $SLURM_ARRAY_TASK_MIN -ne 1 || $SLURM_ARRAY_TASK_MAX -ne $SLURM_ARRAY_TASK_COUNT ]]; then
    echo "the tasks are not 1 to N: name the number of shards, --export=ALL,SHARDS=N" >&2
    exit 64
  fi
  SHARDS=$SLURM_ARRAY_TASK_COUNT
fi

# In the shell's place, so that Slurm's signals reach it.
exec bcseg-batch process-dir "$1" "$2" --shard "$SLURM_ARRAY_TASK_ID/$SHARDS" "${@:3}"
