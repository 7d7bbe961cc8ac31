"""Every file of launch/: sound by its own rules, and its very command run as its engine would."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.jobs import ROOT
from tests.helpers.launching import LAUNCH, assert_meets, played

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
EXIT_USER, EXIT_DIVERGED, EXIT_PREEMPTED = 2, 3, 75
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # RFC 1123


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def variables(entries: list[dict[str, Any]]) -> dict[str, str]:
    """The literal ones of a container's `env`."""
    return {entry["name"]: entry["value"] for entry in entries if "value" in entry}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK) or path.name in ("setup.sh", "slurm.sbatch")
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", path], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def test_what_a_launcher_reads_is_explained() -> None:
    """Each variable that run.sh gives a default is in the list at its top."""
    text = (LAUNCH / "run.sh").read_text()
    top = text.split("\nset -euo")[0]
    names = set(re.findall(r'"\$\{(\w+):=', text))
    assert len(names) > 8
    assert {name for name in names if not re.search(rf"\b{name}\b", top)} == set()


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda p: p.name)
def test_no_secret_and_no_setting_that_does_not_exist(path: Path) -> None:
    from dist_resnet.config.keys import describe_keys
    from dist_resnet.config.load import load_config

    text = path.read_text()
    assert not re.search(
        r"(?i)(api_key|token|password|secret)['\"]?\s*[:=]\s*['\"]?[0-9a-f]{20}", text
    )
    for file in re.findall(r"\bconfigs/\w+\.yaml", text):
        load_config([str(ROOT / file)])
    keys = {key for key, *_ in describe_keys()}
    sections = "|".join({key.split(".")[0] for key in keys if "." in key})
    used = set(re.findall(rf"\b((?:{sections})\.\w+)=", text))
    assert used - keys == set()


class TestKubernetes:
    service, job = documents("kubernetes.yaml")
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]

    def test_models(self) -> None:
        client = pytest.importorskip("kubernetes.client", reason="pip install kubernetes")
        client.V1Service.model_validate(self.service)
        client.V1Job.model_validate(self.job)

    def test_pods_find_each_other(self) -> None:
        spec, labels = self.job["spec"], self.job["spec"]["template"]["metadata"]["labels"]
        assert (self.job["kind"], self.job["apiVersion"]) == ("Job", "batch/v1")
        assert spec["completionMode"] == "Indexed"
        assert self.service["spec"]["clusterIP"] == "None"
        assert self.service["spec"]["publishNotReadyAddresses"] is True
        assert self.service["spec"]["selector"].items() <= labels.items()
        assert self.pod["subdomain"] == self.service["metadata"]["name"]
        names = variables(self.container["env"])
        assert int(names["NNODES"]) == spec["completions"] == spec["parallelism"]
        first = f"{self.job['metadata']['name']}-0.{self.service['metadata']['name']}"
        host, port = names["RDZV_ENDPOINT"].split(":")
        assert host == first
        assert int(port) == self.service["spec"]["ports"][0]["port"]
        for name in (*first.split("."), self.container["name"]):
            assert NAME.fullmatch(name)
            assert len(name) <= 63

    def test_restarts_follow_the_exit_codes(self) -> None:
        assert self.pod["restartPolicy"] == "Never"  # podFailurePolicy demands it
        rules = self.job["spec"]["podFailurePolicy"]["rules"]
        by_code = {
            code: rule["action"]
            for rule in rules
            if "onExitCodes" in rule
            for code in rule["onExitCodes"]["values"]
        }
        assert by_code == {EXIT_USER: "FailJob", EXIT_DIVERGED: "FailJob", EXIT_PREEMPTED: "Ignore"}
        assert all(r["onExitCodes"]["operator"] == "In" for r in rules if "onExitCodes" in r)
        timeout = re.search(r"SHUTDOWN_TIMEOUT:=(\d+)", (LAUNCH / "run.sh").read_text())
        assert timeout
        assert self.pod["terminationGracePeriodSeconds"] >= int(timeout[1]) + 15

    def test_storage(self) -> None:
        mounts = {m["mountPath"]: m["name"] for m in self.container["volumeMounts"]}
        volumes = {v["name"]: v for v in self.pod["volumes"]}
        assert set(mounts.values()) == volumes.keys()
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in volumes[mounts["/store"]]
        assert self.pod["securityContext"]["fsGroup"] == image_user()
        assert variables(self.container["env"])["RUN_DIR"].startswith("/store/")
        quantities = [volumes[mounts["/dev/shm"]]["emptyDir"]["sizeLimit"]]
        for part in self.container["resources"].values():
            quantities += part.values()
        assert all(isinstance(q, str) and QUANTITY.fullmatch(q) for q in quantities)

    @pytest.mark.parametrize("index", [0, 1])
    def test_contract(self, tmp_path: Path, index: int) -> None:
        """The container's command, with what the kubelet would set."""
        by_field = {
            entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"]
            for entry in self.container["env"]
            if "fieldRef" in entry.get("valueFrom", {})
        }
        assert by_field == {
            "NODE_RANK": "metadata.annotations['batch.kubernetes.io/job-completion-index']",
            "RDZV_ID": "metadata.labels['batch.kubernetes.io/controller-uid']",
        }
        engine = {"JOB_COMPLETION_INDEX": str(index), "NODE_RANK": str(index), "RDZV_ID": "u-1"}
        own = variables(self.container["env"])
        call = played(tmp_path, [*self.container["command"], *self.container["args"]], own | engine)
        assert_meets(call, "2", own["RDZV_ENDPOINT"], index)
        assert "--rdzv-id=u-1" in call.split()
        assert call.endswith(
            "configs/resnet20.yaml data.root=/store/data run.dir=/store/runs run.name=resnet20"
        )


class TestTrainJob:
    (job,) = documents("trainjob.yaml")
    trainer = job["spec"]["trainer"]

    def test_model(self) -> None:
        models = pytest.importorskip(
            "kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api"
        )
        read = models.TrainerV1alpha1TrainJob.from_dict(self.job)
        assert list(dropped(self.job, read.to_dict())) == []

    def test_rules(self) -> None:
        assert self.job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        assert self.job["spec"]["runtimeRef"]["name"] == "torch-distributed"
        names = {entry["name"] for entry in self.trainer["env"]}
        assert not {name for name in names if name.startswith("PET_")}, "the operator refuses these"
        (patch,) = self.job["spec"]["runtimePatches"]
        (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod = node["template"]["spec"]["template"]["spec"]
        mounted = {m["name"] for m in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert (node["name"], pod["containers"][0]["name"]) == ("node", "node")
        assert pod["terminationGracePeriodSeconds"] >= 75
        assert pod["securityContext"]["fsGroup"] == image_user()

    @pytest.mark.parametrize("index", [0, 1])
    def test_contract(self, tmp_path: Path, index: int) -> None:
        """The container's command, with what the operator would set."""
        endpoint = "resnet20-node-0-0.resnet20:29500"
        host, port = endpoint.split(":")
        engine = {
            "PET_NNODES": str(self.trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(self.trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(index),
            "PET_MASTER_ADDR": host,
            "PET_MASTER_PORT": port,
        }
        command = [*self.trainer["command"], *self.trainer["args"]]
        call = played(tmp_path, command, variables(self.trainer["env"]) | engine)
        assert_meets(call, "2", endpoint, index)
        assert "--nproc-per-node=8" in call.split()
        environment = (tmp_path / "environment").read_text()
        assert environment.count("\nPET_") == environment.count("\nPET_SIGNALS_TO_HANDLE=") == 1


def test_modules_that_launchers_name_exist() -> None:
    files = [path for path in LAUNCH.iterdir() if path.is_file()]
    named = {n for path in files for n in re.findall(r"\bdist_resnet(?:\.\w+)+", path.read_text())}
    assert "dist_resnet.train" in named
    for name in named:
        assert find_spec(name), name


def test_dockerfile() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert source == "." or f"!{source.split('/')[0]}" in ignored
    command = re.search(r"^CMD (\[.+\])$", text, re.M)
    assert command
    script, config = yaml.safe_load(command[1])
    assert (ROOT / script).exists()
    assert (ROOT / config).exists()
    # The names are Debian 12's, with the libraries that FFCV's extension is linked to.
    assert set(re.findall(r"FROM (\S+)", text)) == {"python:3.12-slim-bookworm"}
    for package in ("libopencv-core406", "libopencv-imgproc406", "libturbojpeg0", "numactl"):
        assert f" {package} " in text


def test_sbatch_options() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = re.findall(r"^#SBATCH (\S+)$", text, re.M)
    wanted = {"--requeue", "--open-mode=append", "--ntasks-per-node=1", "--exclusive"}
    assert wanted <= set(options)
    first_command = text.index("\nset -euo")
    assert text.rindex("#SBATCH") < first_command, "sbatch stops reading at the first command"


def image_user() -> int:
    """The one that the image's processes run as, and that must be able to write the run folder."""
    text = (LAUNCH / "Dockerfile").read_text()
    user = re.search(r"useradd .*--uid (\d+) (\w+)", text)
    assert user
    assert f"\nUSER {user[2]}\n" in text
    return int(user[1])


def dropped(wanted: Any, found: Any, place: str = "") -> Iterator[str]:
    """What of `wanted` is not in `found`."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            yield from dropped(value, (found or {}).get(key), f"{place}.{key}")
    elif isinstance(wanted, list):
        for number, value in enumerate(wanted):
            inner = found[number] if found and number < len(found) else None
            yield from dropped(value, inner, f"{place}[{number}]")
    elif wanted != found:
        yield f"{place}: {wanted!r} became {found!r}"
