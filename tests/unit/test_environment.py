"""What a run tells of the machine it is on, and where that makes its bits others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_resnet.base.errors import UserError
from dist_resnet.config.load import load_config, to_dict
from dist_resnet.machine.environment import differences, hardware, machine
from dist_resnet.runs.resume import (
    check_same_configuration,
    check_same_machines,
    other_rounding,
)
from tests.helpers.checkpoints import checkpoint_of

CPU = torch.device("cpu")
BEGAN = {
    "device": "cpu",
    "cpu": "AMD EPYC",
    "instructions": "AVX512 avx512_bf16",
    "threads_per_rank": 1,
}


def facts_under(**environment: str) -> dict[str, str]:
    program = (
        "import json, torch; from dist_resnet.machine.environment import hardware;"
        "print(json.dumps(hardware(torch.device('cpu'), 1)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], text=True, check=True,
        env=os.environ | environment, capture_output=True, timeout=240,
    )  # fmt: skip
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_limits_on_the_instructions_are_told() -> None:
    free = facts_under(ATEN_CPU_CAPABILITY="", ONEDNN_MAX_CPU_ISA="")
    limited = facts_under(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41")
    assert differences(free, limited) == [
        f"instructions: {free['instructions']} -> {limited['instructions']}"
    ]
    assert limited["instructions"].split()[0] in ("DEFAULT", "NO", "default")
    assert limited["instructions"].endswith("(oneDNN: at most SSE41)")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's /proc/cpuinfo")
def test_the_processor_is_the_one_linux_tells() -> None:
    words = Path("/proc/cpuinfo").read_text().split("\n\n")[0].split()
    found = hardware(CPU, 3)
    assert found["threads_per_rank"] == 3
    for name in ("cpu", "cpu_model"):
        assert set(str(found[name]).split()) <= set(words)
    assert found["cpu_model"]


def test_bf16_and_amx_stand_in_the_instructions_where_torch_finds_them() -> None:
    instructions = str(machine(CPU, 1)["instructions"])
    assert ("avx512_bf16" in instructions) == torch.cpu._is_avx512_bf16_supported()
    assert ("amx_tile" in instructions) == torch.cpu._is_amx_tile_supported()
    assert machine(CPU, 1)["torch"] == torch.__version__.split("+")[0]


def note(now: dict[str, object], mode: str = "fused", **saved: object) -> str:
    began = load_config(["train.step_mode=fused"])
    return other_rounding(checkpoint_of(1, began, **{"machine": BEGAN, **saved}), dict(now), mode)


def test_a_run_that_goes_on_elsewhere_is_told_in_one_line() -> None:
    assert note(BEGAN) == ""
    line = note({**BEGAN, "cpu": "Xeon", "threads_per_rank": 2}, "eager")
    assert "not bit for bit the undisturbed run" in line
    assert "\n" not in line
    for change in (
        "cpu: AMD EPYC -> Xeon", "threads_per_rank: 1 -> 2", "train.step_mode: fused -> eager",
    ):  # fmt: skip
        assert change in line
    assert "instructions" not in line


def test_of_a_checkpoint_that_names_no_machine_nothing_is_claimed() -> None:
    assert note({**BEGAN, "cpu": "Xeon"}, machine={}) == ""


def test_from_a_cpu_to_a_gpu() -> None:
    now = {**BEGAN, "device": "cuda", "gpu": "H100", "cuda": "13.0"}
    assert "(device: cpu -> cuda)" in note(now)


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        (["optim.lr=0.1"], "optim.lr: 0.05 -> 0.1"),
        (["model.name=my:net", "model.args={depth: 16}"], "model.args.depth: .* -> 16"),
        (["train.step_mode=eager"], "train.step_mode: auto -> eager"),
    ],
)
def test_processes_of_other_configurations_are_refused(pairs: list[str], told: str) -> None:
    plain, other = to_dict(load_config([])), to_dict(load_config(pairs))
    with pytest.raises(UserError, match=f"^the processes differ in .*{told}.*the same command"):
        check_same_configuration(other, plain)
    with pytest.raises(UserError, match=pairs[-1].partition("=")[0]):
        check_same_configuration(plain, other)
    check_same_configuration(plain, to_dict(load_config(["data.root=here", "run.dir=there"])))


def test_processes_on_machines_of_different_kinds_are_told_of_or_refused() -> None:
    others = {**BEGAN, "threads_per_rank": 4}, {**BEGAN, "cpu": "Xeon"}
    for reduction in ("fast", "exact"):
        assert check_same_machines([BEGAN], reduction) == ""
        assert check_same_machines([BEGAN, BEGAN, others[0]], reduction) == ""
    line = check_same_machines([BEGAN, BEGAN, others[1]], "fast")
    assert "cpu: AMD EPYC -> Xeon" in line
    assert "\n" not in line
    with pytest.raises(UserError, match=r"reduction=exact: .*cpu: AMD EPYC -> Xeon"):
        check_same_machines([BEGAN, *others], "exact")


def test_on_gpus_the_processor_is_no_other_kind_and_triton_is() -> None:
    card = {**BEGAN, "device": "cuda", "gpu": "H100", "cuda": "13.0", "Triton": "runs"}
    assert (
        check_same_machines([card, {**card, "cpu": "Xeon", "instructions": "none"}], "exact") == ""
    )
    for name, value in (("gpu", "A100"), ("Triton", "missing"), ("cuda", "12.8")):
        with pytest.raises(UserError, match=f"{name}: .* -> {value}"):
            check_same_machines([card, {**card, name: value}], "exact")
