#!/usr/bin/env bash
# A private Slurm on this machine, for tests: needs root and Debian's slurm-wlm and munge.
#
#   tests/slurm_cluster.sh install                 Debian's packages, and ip, where they are missing
#   tests/slurm_cluster.sh up FOLDER               prints the SLURM_CONF to use
#   tests/slurm_cluster.sh crash FOLDER NODE       what a power cut does to a node
#   tests/slurm_cluster.sh down FOLDER             ends it, with everything that its jobs started
#
# Every node is a slurmd of its own on this host. n1 and n2 are in partition low, which is preempted
# by partition high; n3, n4 and n5 in partition side, which nothing disturbs.
set -euo pipefail

action=$1 folder=$(realpath -m "${2:-.}") node=${3:-}
nodes=5 config=$folder/slurm.conf
munge=$(cat "$folder/munge" 2>/dev/null || true)

install() {
    local missing=()
    command -v slurmctld >/dev/null || missing+=(slurm-wlm)
    command -v munged >/dev/null || missing+=(munge)
    command -v ip >/dev/null || missing+=(iproute2)
    [[ ${#missing[@]} != 0 ]] || return 0
    export DEBIAN_FRONTEND=noninteractive
    if [[ ! -e /usr/sbin/policy-rc.d ]]; then  # the packages would start daemons of their own
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
    fi
    apt-get -qq -o DPkg::Lock::Timeout=300 update || true
    apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}" >/dev/null
}

marked() {  # VARIABLE=VALUE...: the processes that have all of these in their environment
    local entry line all
    for entry in /proc/[0-9]*; do
        [[ ${entry#/proc/} != "$$" ]] || continue
        all=1
        for line in "$@"; do
            { grep -qzxF -- "$line" "$entry/environ"; } 2>/dev/null || { all=; break; }
        done
        [[ -z $all ]] || echo "${entry#/proc/}"
    done
}

managers() {  # PID...: slurmstepd wipes its environment; it is known by its children
    local pid parent
    for pid in "$@"; do
        parent=$(sed -n 's/^PPid:\t//p' "/proc/$pid/status") || continue
        [[ $(cat "/proc/$parent/comm") != slurmstepd ]] || echo "$parent"
    done 2>/dev/null | sort -u
}

crash() {
    local daemons tasks steps
    mapfile -t daemons < <(marked "SLURM_CONF=$config" "TEST_NODE=$node")
    mapfile -t tasks < <(marked "SLURM_CONF=$config" "SLURMD_NODENAME=$node")
    mapfile -t steps < <(managers "${tasks[@]}")
    # Who could tell of the others' end goes first.
    kill -9 "${daemons[@]}" "${steps[@]}" "${tasks[@]}" 2>/dev/null || true
}

down() {
    local all steps
    for _ in 1 2; do  # the first may have met a process that was just starting another
        mapfile -t all < <(marked "SLURM_CONF=$config")
        mapfile -t steps < <(managers "${all[@]}")
        kill -9 "${steps[@]}" "${all[@]}" 2>/dev/null || true
    done
    [[ -z $munge ]] || rm -rf "$munge"
}

configure() {
    local host port
    host=$(hostname -s)
    port=$((10000 + RANDOM % 9000))  # two clusters may be up on one machine
    # cred_expire: a requeued job waits for its old credential to expire, 120 s by default.
    # config_overrides: nodes may promise more processors than the host has.
    cat >"$config" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=$port
FirstJobId=$port
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
KillWait=10
SlurmdTimeout=10
MinJobAge=3600
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=side Nodes=n[3-$nodes] MaxTime=INFINITE State=UP PriorityTier=1
CONF
}

up() {
    mkdir -p "$folder/state"
    munge=$(mktemp -d)  # all users must get at its socket: a private folder will not do
    echo "$munge" >"$folder/munge"
    chmod 711 "$munge"
    mungekey -c -k "$munge/key"
    configure
    export SLURM_CONF=$config  # down knows all of this cluster by it
    munged --key-file="$munge/key" --socket="$munge/socket" --pid-file="$munge/pid" \
        --log-file="$munge/log" --seed-file="$munge/seed"
    slurmctld -f "$config"
    for ((i = 1; i <= nodes; i++)); do
        mkdir -p "$folder/spool.n$i"
        TEST_NODE=n$i slurmd -f "$config" -N "n$i"
    done
    for ((i = 0; i < 300; i++)); do
        if [[ $(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l) == "$nodes" ]]; then
            echo "$config"
            return
        fi
        sleep 0.2
    done
    echo "Slurm does not come up: $folder/*.log" >&2
    unset SLURM_CONF  # this shell is none of it
    down
    exit 1
}

"$action"
