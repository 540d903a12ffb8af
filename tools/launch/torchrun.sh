#!/usr/bin/env bash
# Trains with torchrun: on this machine's GPUs, or, started on each of several machines, on all of theirs.
#
#   tools/launch/torchrun.sh configs/retina_focal.yaml OUTPUT_DIR output/focal
#   NODES=2 HEAD=10.0.0.1:29400 tools/launch/torchrun.sh configs/retina_ohem.yaml OUTPUT_DIR /shared/ohem   # on both
#
# The first word is the config, the others go to train_net.py: flags first, then KEY VALUE. HEAD is a port of one of the
# machines, the same everywhere; OUTPUT_DIR is a folder that all of them see, or only one could resume. GPUS=2 takes 2
# GPUs a machine. The configs are for 8 GPUs (SOLVER.REFERENCE_WORLD_SIZE) and are scaled to as many as there are.
#
# What ends how:
# - A worker fails: torchrun stops the others and starts all again, 3 times; --resume goes on from the last checkpoint.
# - torchrun gets TERM: it hands it on to the workers and kills them after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds. They
#   save a checkpoint and exit with 75, which torchrun does not hand on: it ends with 1, as after a failure. So nothing
#   here calls it again on 75: it would never see one, and on 1 it would repeat a broken run for ever. The same command,
#   typed again or by the scheduler, goes on from the checkpoint.
# - A worker alone gets TERM: all save and exit with 75; for torchrun that is a failure like any other, and it starts
#   them again itself.
set -euo pipefail
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CONFIG=${1:?usage: tools/launch/torchrun.sh configs/retina_focal.yaml [FLAGS] [KEY VALUE ...]}
shift
# Time for a last checkpoint; torchrun's own 30 s can be short on a network drive. Older ones do not read it.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}
# Started again, workers of several machines would meet in the store of the attempt before, and wait for the addresses
# of dead workers (pytorch/pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Otherwise torchrun sets 1 with a warning; the image work is done by DATALOADER.NUM_WORKERS processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec torchrun --nnodes="${NODES:-1}" --nproc-per-node="${GPUS:-gpu}" --max-restarts=3 \
    --rdzv-id="${RUN_ID:-focal}" --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost:0}" \
    "$TOOLS/train_net.py" --config-file "$CONFIG" --resume "$@"
