#!/usr/bin/env bash
# All visible GPUs of this machine, or on a CPU two processes; NPROC=N says how many.
#
#   launch/single_node.sh [FILE.yaml ...] [key=value ...]
#   NPROC=4 launch/single_node.sh configs/digits.yaml
#   DOCTOR=1 launch/single_node.sh configs/resnet20.yaml     checks this machine instead
#
# Restarts and exit codes: launch/run.sh.
set -euo pipefail
export NNODES=1 NODE_RANK=0
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$@"
