#!/usr/bin/env bash
# One node's share of a training, supervised: what every launcher here ends in.
#
#   launch/run.sh [FILE.yaml ...] [key=value ...]       trains
#   launch/run.sh --folder [FILE.yaml ...] [...]        prints the run folder and ends
#   DOCTOR=1 launch/run.sh ...                          python -m dist_resnet.doctor instead of a training
#
# Read from the environment:
#   NNODES=1            nodes; MIN:MAX lets the number vary (set parallel.replicas to a multiple of all)
#   NODE_RANK=0         this node's number; node 0 must have the address in RDZV_ENDPOINT
#   RDZV_ENDPOINT       HOST:PORT of node 0, with more than one node
#   RDZV_ID=none        this job's name, where a scheduler gives one: equal on all nodes, used by no other job
#   NPROC               processes on this node (default: one for each visible GPU, else 2)
#   RUN_DIR, RUN_NAME   run.dir and run.name; all nodes must see the folder
#   MAX_RESTARTS=3      restarts without progress before giving up
#   SHUTDOWN_TIMEOUT=60 seconds the processes get to save after a signal (torch before 2.12: 30)
#   JOIN_TIMEOUT=600    seconds to wait for other nodes
#   LAST_CALL=30        seconds to wait for more nodes once MIN are there
#   IFNAME              network interface of the job, where a host has several
#   NUMA_BINDING=node   torchrun's --numa-binding on GPUs, or none
#   LOCK_WAIT=20        seconds to wait for another job to leave the run folder
#   BACKOFF=1, REJOIN=20   seconds before a restart, times the failures; and before joining unasked
#   PYTHON              the interpreter (default: .venv/bin/python, else python3)
# CUDA_VISIBLE_DEVICES, NCCL_* and all else reach the processes as they are.
#
# Exit codes: 0 finished; 2 the user's to mend; 3 diverged; 75 stopped by a signal, start it again;
# 1 it crashed MAX_RESTARTS times without progress. TERM, INT, HUP and USR1 are passed on.
set -euo pipefail

: "${NNODES:=1}" "${NODE_RANK:=0}" "${RDZV_ENDPOINT:=}" "${NPROC:=}" "${MAX_RESTARTS:=3}"
: "${SHUTDOWN_TIMEOUT:=60}" "${JOIN_TIMEOUT:=600}" "${LAST_CALL:=30}" "${IFNAME:=}"
: "${LOCK_WAIT:=20}" "${RDZV_ID:=none}" "${BACKOFF:=1}" "${REJOIN:=20}" "${NUMA_BINDING:=node}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$root/.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi

say() { printf 'launch, node %s: %s\n' "$NODE_RANK" "$*" >&2; }
fail() { say "$*"; exit 2; }

agent='' stop='' signalled='' passed_on=-9 rc=0
on_signal() {
    signalled=1 stop=1
    # Schedulers signal all processes of a job, and more than once; a later one means "at once".
    if [[ -n $agent ]] && ((SECONDS - passed_on > 2)); then
        passed_on=$SECONDS
        kill -s "$1" "$agent" 2>/dev/null || true
    fi
}
trap 'on_signal TERM' TERM HUP INT  # background processes ignore INT
trap 'on_signal USR1' USR1

only_folder=
if [[ ${1:-} == --folder ]]; then only_folder=1; shift; fi
settings=("$@")
[[ -z ${RUN_DIR:-} ]] || settings+=("run.dir=$RUN_DIR")
[[ -z ${RUN_NAME:-} ]] || settings+=("run.name=$RUN_NAME")

# A wrong configuration ends here, before anything is started.
facts=$("$PYTHON" - "${settings[@]}" <<'PY'
import sys
try:
    import torch
except ImportError as error:
    sys.exit(print(f"launch: {error} ({sys.executable}); run make setup, or set PYTHON", file=sys.stderr) or 2)
from dist_resnet.base.cli import run_command
from dist_resnet.config.load import load_config
from dist_resnet.machine.devices import cuda_count
from dist_resnet.machine.numa import why_not_bound
from dist_resnet.runs.resume import run_name
def tell():
    config = load_config(sys.argv[1:])
    print(f"{config.run.dir}/{run_name(config)}")
    gpus = cuda_count(config.parallel.device)
    print(gpus)
    print(why_not_bound(gpus))
    return 0
run_command(tell)
PY
) || { code=$?; [[ -z $stop ]] || code=75; exit "$code"; }
{ read -r run; read -r gpus; read -r unbound || true; } <<<"$facts"
if [[ -n $only_folder ]]; then echo "$run"; exit 0; fi
[[ -n $NPROC ]] || NPROC=$((gpus > 0 ? gpus : 2))
(($(nproc) >= NPROC)) || say "$(nproc) cores for $NPROC processes: they will wait for each other"

unset "${!PET_@}"  # Kubeflow's defaults for torchrun; they choose a rendezvous that cannot restart
# Without it a second rendezvous with the same agent reads the addresses of dead gloo workers.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Not as options, which torch before 2.9 and before 2.12 does not know. Of the first torchrun
# overwrites its own TORCHELASTIC_SIGNALS_TO_HANDLE.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$SHUTDOWN_TIMEOUT
# torchrun's own default is one thread a process, which leaves most of a CPU node idle.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > NPROC ? $(nproc) / NPROC : 1))}

torchrun=("$PYTHON" -m torch.distributed.run "--nproc-per-node=$NPROC" --max-restarts=0)
if [[ $NNODES == 1 ]]; then
    torchrun+=(--standalone)
else
    [[ $RDZV_ENDPOINT == *:* ]] || fail "NNODES=$NNODES needs RDZV_ENDPOINT=HOST:PORT of node 0"
    # is_host: else both sides may wait for a server, for ever, and a port in use goes unnoticed.
    conf=is_host=$((NODE_RANK == 0)),join_timeout=$JOIN_TIMEOUT,last_call_timeout=$LAST_CALL
    torchrun+=("--nnodes=$NNODES" --rdzv-backend=c10d "--rdzv-endpoint=$RDZV_ENDPOINT"
        "--rdzv-id=$RDZV_ID" "--rdzv-conf=$conf")
    if [[ -n $IFNAME ]]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$IFNAME}
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$IFNAME}
        address=$(ip -o addr show dev "$IFNAME" scope global | sed -n '1s/.*inet6* \([^/ ]*\).*/\1/p')
        [[ -z $address ]] || torchrun+=("--local-addr=$address")
    fi
fi
if [[ -n ${DOCTOR:-} ]]; then
    verdict=$(mktemp)
    DOCTOR_VERDICT=$verdict "${torchrun[@]}" -m dist_resnet.doctor "${settings[@]}" || true
    code=$(<"$verdict")
    rm -f "$verdict"
    exit "${code:-2}"
fi

if ((gpus == 0 || NPROC > gpus)) || [[ $NUMA_BINDING == none || $unbound == unneeded ]]; then
    :
elif [[ -n $unbound ]]; then
    say "no NUMA binding: $unbound"
else
    say "NUMA binding: $NUMA_BINDING, each process beside its GPU"
    torchrun+=("--numa-binding=$NUMA_BINDING")
fi

status=$run/status.json
mkdir -p "$run" 2>/dev/null || true
[[ -w $run ]] || fail "$run: cannot be written; choose another run.dir"
# Workers are started anew whenever a node joins: each time it would be deleted.
[[ $NNODES != *:* || " ${settings[*]} " != *" run.overwrite=true "* ]] ||
    fail "run.overwrite=true does not go with NNODES=$NNODES; delete $run or choose another run.name"

field() { sed -n "s/^  \"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" "$status" 2>/dev/null || true; }
stamp() { stat -c '%i %.Y' "$status" 2>/dev/null || true; }

# Node 0 decides, the others follow: it leaves one word for them in the run folder.
lead() { [[ $NODE_RANK == 0 ]]; }
tell() { [[ $NNODES == 1 ]] || { echo "$* $$.$SECONDS.$RANDOM" >"$run/.word.new" && mv "$run/.word.new" "$run/.word"; }; }
word() { cat "$run/.word" 2>/dev/null || true; }

attempt() {  # sets rc
    before=$(stamp)
    ! lead || rm -f "$run/.refused"
    # setsid: a Ctrl-C reaches torchrun once, through us. setpriv: if we are killed, it is told.
    setpriv --pdeathsig TERM setsid "${torchrun[@]}" -m dist_resnet.train "${settings[@]}" \
        "${again[@]}" &
    agent=$!
    [[ -z $stop ]] || kill "$agent"
    while :; do
        signalled=
        wait "$agent" && rc=0 || rc=$?
        [[ -n $signalled ]] || break  # wait returns on every trapped signal too
    done
    agent=
    if [[ $(stamp) == "$before" ]]; then
        state=none  # a status of an earlier job says nothing about this one
    else
        state=$(field state)
        again=(run.overwrite=false run.resume=auto)  # these are meant once
    fi
    # Workers whose torchrun died stop by themselves: told to the others, it is no request to stop.
    ((rc < 128)) || [[ -n $stop ]] || touch "$run/.agent-died"
}

finish() {  # CODE: ends this node, and on node 0 the job
    if lead; then
        tell exit "$1"
        rm -f "$run/.agent-died"
    fi
    exit "$1"
}

judge() {  # on node 0: ends the job, or returns to start it again
    local code step
    code=$(field exit_code) step=$(field step)
    # A refused command leaves the status as it was.
    [[ ! -e $run/.refused ]] || finish 2
    if [[ $rc == 0 || $state == "done" ]]; then finish 0; fi
    [[ $state != failed || $code != [23] ]] || finish "$code"
    [[ -z $stop ]] || finish 75
    # Stopped, though not by us: by W&B's button, by hand, or on a node that the job can do without.
    if [[ $state == preempted && ! -e $run/.agent-died && $NNODES != *:* ]]; then finish 75; fi
    if [[ $state != none ]] && ((${step:-0} > best)); then best=$step failures=0; fi
    ((++failures <= MAX_RESTARTS)) || {
        say "no progress past step $best in $MAX_RESTARTS restarts; giving up"
        finish 1
    }
    say "it ended with $rc (${state}: $(field reason)) at step ${step:-0}; restart $failures of $MAX_RESTARTS without progress"
    rm -f "$run/.agent-died"
    sleep $((failures * BACKOFF))
}

follow() {  # elsewhere: waits for node 0's next word; without one, joins again, as it may wait for us
    local now
    if [[ $rc == 0 || $state == "done" ]]; then finish 0; fi
    [[ -z $stop ]] || finish 75
    for ((i = 0; i < REJOIN; i++)); do
        now=$(word)
        [[ $now == "$heard" ]] || break
        sleep 1
        [[ -z $stop ]] || finish 75
    done
    if [[ $now != "$heard" ]]; then
        heard=$now heard_at=$SECONDS
        [[ $now != exit* ]] || finish "$(cut -d' ' -f2 <<<"$now")"
    elif ((SECONDS - heard_at > JOIN_TIMEOUT)); then
        say "node 0 has been silent for $JOIN_TIMEOUT s; giving up"
        finish 1
    fi
    say "it ended with $rc; joining again"
}

best=-1 failures=0 again=() state=none heard=$(word) heard_at=$SECONDS
if lead; then rm -f "$run/.agent-died"; fi
while :; do
    if lead; then
        # The lock of the run folder; after a restart, until the last of the old workers has gone.
        free=0; flock -E 9 -w "$LOCK_WAIT" "$run/.lock" true || free=$?
        if [[ $free == 9 ]]; then say "$run is in use by $(<"$run/.lock")"; finish 2; fi
        tell start
    fi
    [[ -z $stop ]] || finish 75
    attempt
    if lead; then judge; else follow; fi
done
