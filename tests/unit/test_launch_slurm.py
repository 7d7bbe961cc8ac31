"""launch/slurm.sbatch decides rightly what goes back into the queue; Slurm is played by scripts.

A real Slurm is in `tests/integration/test_slurm.py`. Here is what it brings about by chance only.
"""

from pathlib import Path

import pytest

from tests.helpers.launching import LAUNCH, Stage

# srun is the scenario's next line: Stage's Python plays it.
_SRUN = '#!/bin/sh\nexec "$PYTHON" "$@"\n'
_SCONTROL = r"""#!/bin/sh
case "$1 $2" in
"show hostnames") echo n1; sleep 0.1; echo n2 ;;  # a long list comes in parts
"show node") echo "   NodeAddr=10.1.2.3 NodeHostName=n1" ;;
"show job") echo "   JobState=$JOB_STATE Reason=None" ;;
requeue*) echo "$2" >>"$FAKE/requeued"; kill -TERM $PPID ;;  # which ends the batch script
esac
"""


def batch(folder: Path, line: str, **environment: str) -> Stage:
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL), ("scancel", "#!/bin/sh\n")):
        stub = folder / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(text)
        stub.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    path = f"{folder / 'bin'}:/usr/bin:/bin"
    stage = Stage(folder, [line], **slurm, PATH=path, **({"JOB_STATE": "RUNNING"} | environment))
    stage.run.mkdir()  # run.sh's doing, which srun does not start here
    return stage


@pytest.mark.parametrize(
    ("line", "job", "code", "goes_back"),
    [
        ("status done 40 0; exit 0", "RUNNING", 0, False),
        ("status done 40 0; exit 1", "RUNNING", 0, False),
        ("status preempted 7 75; exit 75", "RUNNING", 0, True),
        # It saved because it was cancelled; or Slurm itself has requeued it.
        ("status preempted 7 75; exit 75", "CANCELLED", 75, False),
        ("status preempted 7 75; exit 75", "COMPLETING", 75, False),
        ("exit 75", "RUNNING", 0, True),
        # Warned so early that the signal met bash, which had not become run.sh yet.
        ("exit 138", "RUNNING", 0, True),
        ("exit 143", "RUNNING", 0, True),
        ("exit 138", "CANCELLED", 138, False),
        ("status running 7; exit 143", "RUNNING", 143, False),
        ("status failed 5 2; exit 2", "RUNNING", 2, False),
        ("status failed 5 3; exit 3", "RUNNING", 3, False),
        ("exit 1", "RUNNING", 1, False),
    ],
)
def test_what_goes_back_into_the_queue(
    tmp_path: Path, line: str, job: str, code: int, goes_back: bool
) -> None:
    stage = batch(tmp_path, line, JOB_STATE=job)
    assert stage.play_command(["bash", str(LAUNCH / "slurm.sbatch"), "a.yaml"]) == code, stage.log()
    assert (tmp_path / "requeued").exists() == goes_back, stage.log()


def test_what_each_node_is_told(tmp_path: Path) -> None:
    stage = batch(
        tmp_path,
        "status done 40 0",
        SLURM_ARRAY_TASK_ID="3",
        SLURM_RESTART_COUNT="1",
        RUN_NAME="seeds",
    )
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "a.yaml", "run.overwrite=true"]
    assert stage.play_command(command) == 0, stage.log()
    (call,) = stage.calls()
    assert call.endswith("run a.yaml run.overwrite=true seed=3 run.overwrite=false run.resume=auto")
    told = (tmp_path / "environment").read_text().splitlines()
    wanted = ["NNODES=2", "RDZV_ID=slurm-31", "RDZV_ENDPOINT=10.1.2.3:20031", "RUN_NAME=seeds-s3"]
    assert [line for line in wanted if line not in told] == []


@pytest.mark.parametrize(
    ("environment", "cores", "processes"),
    [
        # The smallest node of a job counts: srun gives each the same.
        ({"SLURM_JOB_CPUS_PER_NODE": "128(x2),64", "SLURM_GPUS_PER_NODE": "h100:8"}, "64", "8"),
        ({"SLURM_JOB_CPUS_PER_NODE": "16", "SLURM_CPUS_PER_TASK": "4"}, "4", "2"),
        ({"SLURM_JOB_CPUS_PER_NODE": "16(x2)", "SLURM_GPUS_PER_NODE": "4"}, "16", "4"),
        ({"SLURM_JOB_CPUS_PER_NODE": "9", "SLURM_GPUS_PER_NODE": "4", "NPROC": "1"}, "9", "1"),
    ],
)
def test_the_one_task_of_a_node_gets_its_cores(
    tmp_path: Path, environment: dict[str, str], cores: str, processes: str
) -> None:
    stage = batch(tmp_path, "status done 40 0", **environment)
    (tmp_path / "bin" / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=0 exec "$@"\n'
    )
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "a.yaml"]
    assert stage.play_command(command) == 0, stage.log()
    assert f"SRUN_CPUS_PER_TASK={cores}" in (tmp_path / "environment").read_text().splitlines()
    (call,) = stage.calls()
    assert f"--nproc-per-node={processes}" in call
