#!/usr/bin/env bash
# One command on each of several machines that see the same run folder and the same prepared data.
#
#   launch/multi_node.sh RANK NODES HOST[:PORT] [FILE.yaml ...] [key=value ...]
#
#   on gpu0:  launch/multi_node.sh 0 4 gpu0 configs/resnet20.yaml run.name=four
#   on gpu1:  launch/multi_node.sh 1 4 gpu0 configs/resnet20.yaml run.name=four      ... to RANK 3
#
# HOST is the machine of RANK 0 (PORT: 29400 unless given). NODES may be a range, such as 2:4: the
# training starts with two, takes in others as they come, and goes on without those that leave.
# IFNAME=eth0 names the network, where a machine has several. Between the machines nothing is
# encrypted or authenticated: a trusted network only. Restarts and exit codes: launch/run.sh.
set -euo pipefail
if [[ $# -lt 3 || ! $1 =~ ^[0-9]+$ || ! $2 =~ ^[0-9]+(:[0-9]+)?$ ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
export NODE_RANK=$1 NNODES=$2 RDZV_ENDPOINT=$3
[[ $RDZV_ENDPOINT == *:* ]] || RDZV_ENDPOINT=$RDZV_ENDPOINT:29400
shift 3
exec "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$@"
