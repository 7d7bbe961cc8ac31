"""What the doctor says of one machine, and how it judges several."""

import os
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

from dist_resnet.base.errors import UserError
from dist_resnet.config.load import load_config
from dist_resnet.data.dataset import Dataset
from dist_resnet.distributed.group import World
from dist_resnet.doctor import Finding, examine, gpu
from dist_resnet.doctor.network import (
    SKEW_SECONDS,
    Facts,
    all_reduce_findings,
    clock_offsets,
    dataset_finding,
    network_findings,
    same_finding,
    skew_finding,
    versions_finding,
)
from dist_resnet.doctor.node import OLDEST_TORCH, cpu_quota, node_findings
from dist_resnet.machine import devices
from tests.helpers.jobs import ROOT

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def findings(tmp_path: Path, digits: Dataset, *extra: str, ranks: int = 1) -> dict[str, Finding]:
    config = load_config(
        [
            "data.dataset=digits",
            f"data.root={digits.folder.parent}",
            f"run.dir={tmp_path / 'runs'}",
            "wandb.mode=disabled",
            "parallel.device=cpu",
            "parallel.threads=1",
            *extra,
        ]
    )
    return {finding.subject: finding for finding in node_findings(config, ranks)}


def test_a_sound_machine(tmp_path: Path, digits: Dataset) -> None:
    found = findings(tmp_path, digits)
    # Of a torch before 2.10 the doctor has something to note.
    assert {f.level for subject, f in found.items() if subject != "torch"} == {"ok"}, found
    assert torch.__version__ in found["torch"].text
    assert "written and read back" in found["ffcv"].text
    assert digits.fingerprint[:12] in found["dataset"].text
    assert len(found) == 10


@pytest.mark.parametrize(
    ("extra", "subject", "level", "text"),
    [
        (["data.dataset=birds"], "dataset", "FAIL", "data.prepare --help"),
        (["data.dataset=cifar10"], "dataset", "note", "data.prepare cifar10 --output"),
        (
            ["data.dataset=birds", "data.source=my_data:birds"],
            "dataset",
            "note",
            "data.prepare source my_data:birds --name birds --output",
        ),
        (["wandb.mode=online"], "wandb", "FAIL", "wandb login"),
        (["run.dir=/proc/nowhere"], "disk", "FAIL", "set run.dir"),
        (["data.root=/proc/nowhere"], "dataset", "FAIL", "; set data.root"),
        (["parallel.threads=4096"], "threads", "FAIL", "parallel.threads"),
        (["precision.dtype=fp16"], "precision", "FAIL", "use bf16, fp32 or auto"),
    ],
)
def test_what_is_wrong_has_a_remedy(
    tmp_path: Path,
    digits: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    subject: str,
    level: str,
    text: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    found = findings(tmp_path, digits, *extra)
    assert found[subject].level == level
    assert found[subject].remedy
    assert text in found[subject].line()
    assert [s for s, f in found.items() if f.level == "FAIL"] == [subject] * (level == "FAIL")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_asked_for_and_missing(tmp_path: Path, digits: Dataset) -> None:
    found = findings(tmp_path, digits, "parallel.device=cuda")
    assert found["device"].level == "FAIL"
    assert "parallel.device=cpu" in found["device"].remedy


def test_a_damaged_dataset(tmp_path: Path, tiny: Dataset, digits: Dataset) -> None:
    root = tmp_path / "data"
    (root / "digits").mkdir(parents=True)
    for path in digits.folder.iterdir():
        content = bytearray(path.read_bytes())
        if path.name == "test.beton":
            content[-1] ^= 1
        (root / "digits" / path.name).write_bytes(content)
    found = findings(tmp_path, digits, f"data.root={root}")
    assert found["dataset"].level == "FAIL"
    assert "python -m dist_resnet.data.prepare digits" in found["dataset"].remedy


def test_the_command_that_prepares_a_dataset_can_be_copied(tmp_path: Path, digits: Dataset) -> None:
    found = findings(tmp_path, digits, f"data.root={tmp_path}/my data")
    command = found["dataset"].remedy.split("do it now: ")[1]
    assert shlex.split(command)[-2:] == ["--output", f"{tmp_path}/my data"]


def test_an_exception_is_a_finding_with_a_remedy() -> None:
    def user() -> Finding:
        raise UserError("the thing is broken; mend it with glue")

    def bug() -> Finding:
        raise ImportError("libopencv_core.so.406: no such file")

    assert examine("x", user) == Finding("FAIL", "x", "the thing is broken", "mend it with glue")
    found = examine("x", bug)
    assert found.level == "FAIL"
    assert "make setup" in found.remedy


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


def test_who_differs_is_named() -> None:
    same = [("rank 0 on a", "x"), ("rank 1 on b", "x")]
    assert same_finding("data", same, "copy it") == Finding("ok", "data", "x everywhere")
    found = same_finding("data", [*same, ("rank 2 on c", "y")], "copy it")
    assert found == Finding("FAIL", "data", "x at rank 0 on a, but y at rank 2 on c", "copy it")


def test_versions() -> None:
    facts = [Facts("rank 0 on a", {"torch": "2.14.1"}, "c", "f")] * 2
    assert versions_finding(facts).level == "ok"
    odd = Facts("rank 2 on b", {"torch": "2.13.0"}, "c", "f")
    found = versions_finding([*facts, odd])
    assert (found.level, found.subject) == ("FAIL", "torch")
    assert "2.13.0 at rank 2 on b" in found.text
    missing = versions_finding([*facts, Facts("rank 2 on b", {}, "c", "f")])
    assert "missing at rank 2 on b" in missing.text


def test_the_same_dataset_everywhere() -> None:
    def judged(*fingerprints: str) -> Finding:
        return dataset_finding(
            [Facts(f"rank {n} on a", {}, "c", mark) for n, mark in enumerate(fingerprints)]
        )

    assert judged("x", "x").level == "ok"
    one_without = judged("x", "missing")
    assert one_without.level == "FAIL"
    assert "missing at rank 1 on a; copy the prepared folder" in one_without.line()
    assert judged("missing", "missing").level == "note", "nothing that is missing is the same"


def test_clocks() -> None:
    places = ["rank 0 on a", "rank 1 on b"]
    assert skew_finding(places, [0.0, -0.9 * SKEW_SECONDS]).level == "ok"
    found = skew_finding(places, [0.0, -2 * SKEW_SECONDS])
    assert found.level == "FAIL"
    assert found.text == "rank 1 on b is -10.0 s off rank 0's"
    assert found.remedy


def test_one_process_measures_itself(tmp_path: Path, digits: Dataset) -> None:
    assert [f.level for f in all_reduce_findings(ALONE)] == ["ok"]
    assert clock_offsets(ALONE) == [0.0]
    config = load_config([f"data.root={digits.folder.parent}", "data.dataset=digits"])
    assert {f.level for f in network_findings(config, ALONE)} == {"ok"}
    assert os.environ.get("RANK") is None


class TestGpus:
    """On a machine whose CUDA is played: two H100 of which a stub tells the facts."""

    @pytest.fixture(autouse=True)
    def gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.peers, self.driver = [70 << 30, 60 << 30], True, (13, 2)
        monkeypatch.setattr(gpu, "driver", lambda: "580.65.06 (CUDA 13.2)")
        monkeypatch.setattr(gpu, "driver_cuda", lambda: self.driver)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "mem_get_info", lambda n: (self.free[n], 80 << 30))
        monkeypatch.setattr(cuda, "can_device_access_peer", lambda a, b: self.peers or a + b != 1)
        monkeypatch.setattr(cuda, "get_device_capability", lambda *_: (7, 0))
        monkeypatch.setattr(cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
        monkeypatch.setattr(gpu, "cuda_count", lambda _: 2)

    def test_driver(self) -> None:
        assert gpu.driver_finding() == Finding(
            "ok", "driver", "580.65.06 (CUDA 13.2), torch was built for CUDA 13.0"
        )
        self.driver = (12, 8)
        found = gpu.driver_finding()
        assert (found.level, "CUDA 13.0" in found.remedy) == ("note", True)

    @pytest.mark.parametrize(("free", "level"), [(60, "ok"), (30, "note"), (1, "FAIL")])
    def test_free_memory_of_the_fullest(self, free: int, level: str) -> None:
        self.free[1] = free << 30
        found = gpu.memory_finding(2)
        assert (found.level, found.subject) == (level, "GPU memory")
        assert f"{free}.0 of 80.0 GiB free on GPU 1" in found.text
        assert ("CUDA_VISIBLE_DEVICES" in found.remedy) == (level != "ok")

    def test_peer_access(self) -> None:
        assert gpu.peer_finding(2) == Finding("ok", "peer access", "between all 2 GPUs")
        self.peers = False
        found = gpu.peer_finding(3)
        assert found.level == "note"
        assert "2 of 6 pairs, such as GPUs 0 and 1" in found.text
        assert "nvidia-smi topo -m" in found.remedy

    def test_a_gpu_that_torch_has_no_code_for(self) -> None:
        found = gpu.device_finding(load_config([]), 1)
        assert found.level == "FAIL"
        assert "GPU 0: this GPU is sm_70" in found.text
        assert "sm_75 sm_90" in found.text
        assert "whl/cu126" in found.remedy

    def test_all_of_it_is_examined(self, monkeypatch: pytest.MonkeyPatch) -> None:
        subjects = list(gpu.gpu_examinations(2))
        assert subjects == ["driver", "GPU memory", "peer access"]
        for level in [action().level for action in gpu.gpu_examinations(2).values()]:
            assert level == "ok"


def test_gpus_that_torch_cannot_use(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is too old: one FAIL with a remedy, whatever else would ask for the GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "driver_cuda", lambda: (12, 2))
    found = findings(tmp_path, digits, "parallel.device=auto")
    assert [s for s, f in found.items() if f.level == "FAIL"] == ["device"]
    assert "(CUDA 12.2) is too old for torch" in found["device"].text
    assert "update the driver" in found["device"].remedy


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.5.1", "FAIL"), ("2.6.0+cu124", "note"), ("2.11.0+cu130", "ok"), ("2.14.1", "ok")],
)
def test_torch_of_any_version_that_the_trainer_runs_on(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch, version: str, level: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    found = findings(tmp_path, digits)["torch"]
    assert (found.level, bool(found.remedy)) == (level, level != "ok")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"torch>={'.'.join(map(str, OLDEST_TORCH))}" in declared
