"""What is left to the machine is settled once, and kept by whoever continues the run."""

import os

import pytest
import torch

from dist_resnet import session
from dist_resnet.config import load_config
from dist_resnet.distributed import World
from dist_resnet.errors import UserError
from dist_resnet.precision import choose_precision
from dist_resnet.session import choose_threads, settle
from tests.checkpoints import checkpoint_of

CPU = torch.device("cpu")


def world(size: int) -> World:
    return World(rank=0, size=size, local_rank=0, local_size=size, device=CPU)


@pytest.mark.usefixtures("compiler")
def test_a_new_run_takes_the_machine_s_replicas_precision_and_step_mode() -> None:
    config = settle(load_config([]), world(3), None)
    assert config.parallel.replicas == 3
    assert config.precision.dtype == choose_precision("auto", CPU)[0]
    assert config.precision.dtype in ("bf16", "fp32")
    assert config.train.step_mode == "fused"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("dtype", "mode"), [("bf16", "fused"), ("fp32", "eager")])
def test_a_continued_run_keeps_what_it_began_with(dtype: str, mode: str) -> None:
    settings = ["parallel.replicas=4", f"precision.dtype={dtype}", f"train.step_mode={mode}"]
    began = load_config(settings)
    config = settle(load_config([]), world(2), checkpoint_of(config=began))
    assert config == began


@pytest.mark.usefixtures("compiler")
def test_a_run_is_continued_where_its_step_mode_does_not_exist() -> None:
    began = checkpoint_of(config=load_config(["train.step_mode=graph"]))
    assert settle(load_config([]), world(1), began).train.step_mode == "fused"
    with pytest.raises(UserError, match=r"train\.step_mode=graph: only on GPUs"):
        settle(load_config(["train.step_mode=graph"]), world(1), None)


def test_what_is_configured_is_never_changed() -> None:
    wanted = load_config(["parallel.replicas=6", "precision.dtype=fp32", "train.step_mode=eager"])
    before = load_config(["parallel.replicas=4", "precision.dtype=bf16"])
    began = checkpoint_of(config=before)
    assert settle(wanted, world(2), began) == wanted


def test_where_onednn_may_not_use_bf16_it_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for limit, chosen in (("", "bf16"), ("AVX512_CORE_BF16", "bf16"), ("avx2", "fp32")):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert choose_precision("auto", CPU)[0] == chosen
    assert choose_precision("bf16", CPU) == ("bf16", "bf16 (this CPU emulates it: slow)")


def test_fp16_is_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match=r"precision\.dtype=fp16"):
        choose_precision("fp16", CPU)


def test_exact_reduction_uses_one_thread_whatever_the_number_of_ranks() -> None:
    exact = load_config(["parallel.reduction=exact"])
    assert {choose_threads(exact, ranks) for ranks in (1, 2, 4)} == {1}
    assert choose_threads(load_config(["parallel.threads=3"]), 2) == 3
    assert choose_threads(load_config([]), 10_000) == 1


def test_ranks_bound_to_other_cores_take_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of four ranks; ours binds two to each half of its eight cores."""
    halves = [set(range(4)), set(range(4, 8))]
    ours = [(0, halves[rank // 2]) for rank in range(4)]
    everyone = ours + [(1, set(range(8)))] * 4
    monkeypatch.setattr(session, "from_all", lambda value: everyone)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: halves[1])
    assert session.sharing_cores(world(4)) == 2
    assert choose_threads(load_config([]), 2) == 2
    monkeypatch.setattr(session, "from_all", lambda value: [(0, set(range(8)))] * 4)
    assert session.sharing_cores(world(4)) == 4, "nobody is bound"
