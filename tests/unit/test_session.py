"""What is left to the machine is settled once, and kept by whoever continues the run."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_resnet.augment import normalise
from dist_resnet.base.errors import UserError
from dist_resnet.config.load import load_config, trajectory_hash
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset
from dist_resnet.distributed.group import World
from dist_resnet.step.precision import choose_precision
from dist_resnet.training import session
from dist_resnet.training.session import Session, choose_threads, open_session, resolve_auto
from tests.helpers.checkpoints import checkpoint_of

CPU = torch.device("cpu")


def world(size: int) -> World:
    return World(rank=0, size=size, local_rank=0, local_size=size, device=CPU)


@pytest.mark.usefixtures("compiler")
def test_a_new_run_takes_the_machine_s_replicas_precision_and_step_mode() -> None:
    config = resolve_auto(load_config([]), world(3), None)
    assert config.parallel.replicas == 3
    assert config.precision.dtype == choose_precision("auto", CPU)[0]
    assert config.precision.dtype in ("bf16", "fp32")
    assert config.train.step_mode == "fused"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("dtype", "mode"), [("bf16", "fused"), ("fp32", "eager")])
def test_a_continued_run_keeps_what_it_began_with(dtype: str, mode: str) -> None:
    settings = ["parallel.replicas=4", f"precision.dtype={dtype}", f"train.step_mode={mode}"]
    began = load_config(settings)
    config = resolve_auto(load_config([]), world(2), checkpoint_of(config=began))
    assert config == began


@pytest.mark.usefixtures("compiler")
def test_a_run_is_continued_where_its_step_mode_does_not_exist() -> None:
    began = checkpoint_of(config=load_config(["train.step_mode=graph"]))
    assert resolve_auto(load_config([]), world(1), began).train.step_mode == "fused"
    with pytest.raises(UserError, match=r"train\.step_mode=graph: only on GPUs"):
        resolve_auto(load_config(["train.step_mode=graph"]), world(1), None)


def test_what_is_configured_is_never_changed() -> None:
    wanted = load_config(["parallel.replicas=6", "precision.dtype=fp32", "train.step_mode=eager"])
    before = load_config(["parallel.replicas=4", "precision.dtype=bf16"])
    began = checkpoint_of(config=before)
    assert resolve_auto(wanted, world(2), began) == wanted


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
    monkeypatch.setattr(session, "gather_objects", lambda value: everyone)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: halves[1])
    assert session.sharing_cores(world(4)) == 2
    assert choose_threads(load_config([]), 2) == 2
    monkeypatch.setattr(session, "gather_objects", lambda value: [(0, set(range(8)))] * 4)
    assert session.sharing_cores(world(4)) == 4, "nobody is bound"


def _session(dataset: Dataset, *pairs: str, device: torch.device = CPU) -> Session:
    place = f"data.root={dataset.folder.parent}", f"data.dataset={dataset.folder.name}"
    return open_session(load_config([*place, *pairs]), replace(world(1), device=device))


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("pairs", "calls"),
    [
        ((), ["repeatable False"]),
        (("parallel.reduction=exact",), ["repeatable True"]),
        (("precision.deterministic=true",), ["deterministic", "repeatable True"]),
    ],
)
def test_a_gpu_is_told_how_to_compute(
    tiny: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    pairs: tuple[str, ...],
    calls: list[str],
) -> None:
    """Before anything computes there."""
    called: list[str] = []

    def set_up(repeatable: bool) -> str:
        called.append(f"repeatable {repeatable}")
        return "set up"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(session, "set_up_cuda", set_up)
    monkeypatch.setattr(session, "make_deterministic", lambda: called.append("deterministic"))
    opened = _session(tiny, *pairs, device=torch.device(kind))
    assert called == [call for call in calls if kind == "cuda" or call == "deterministic"]
    assert opened.precision_reason.endswith(", set up") == (kind == "cuda")


def test_balanced_class_weights_are_scikit_learns_of_what_is_trained_on(tiny: Dataset) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    held = _session(tiny, "optim.class_weights=balanced", "data.val_split=11")
    labels = read_back(tiny.train_path).labels[held.train_indices]
    wanted = compute_class_weight("balanced", classes=np.arange(5), y=labels)
    found = held.class_weights()
    assert found is not None
    assert len(set(wanted)) > 1
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
    assert _session(tiny).class_weights() is None
    given = _session(tiny, "optim.class_weights=[1,2,3,0.5,1]").class_weights()
    assert given is not None
    assert given.tolist() == [1, 2, 3, 0.5, 1]


def test_class_weights_that_do_not_fit_are_refused(tiny: Dataset) -> None:
    few = _session(tiny, "optim.class_weights=[1,2]")
    with pytest.raises(UserError, match=r"2 numbers; .* has 5 classes: class0, class1"):
        few.class_weights()
    none = _session(tiny, "optim.class_weights=balanced", "data.val_split=50")
    with pytest.raises(UserError, match=r"no image of class class[0-4] is trained on"):
        none.class_weights()


@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("[[0.5,0.4,0.3],[1,0.25,0.5]]", (0.5, 0.4, 0.3), (1, 0.25, 0.5)),
    ],
)
def test_normalisation_is_torchvisions(
    tiny: Dataset, given: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    from torchvision.transforms.functional import normalize

    images = torch.from_numpy(np.asarray(read_back(tiny.test_path).images))
    statistics = _session(tiny, f"data.normalisation={given}").normalisation()
    wanted = normalize(images.permute(0, 3, 1, 2) / 255, list(mean), list(std))
    torch.testing.assert_close(normalise(images, statistics), wanted, rtol=1e-5, atol=1e-5)


def test_the_dataset_s_own_normalisation_is_as_it_was(tiny: Dataset) -> None:
    assert _session(tiny).channel_scale == (tiny.mean, tiny.std)


def test_normalisation_and_class_weights_are_part_of_what_a_run_is() -> None:
    hashes = {
        trajectory_hash(load_config(pairs))
        for pairs in (
            [],
            ["data.normalisation=imagenet"],
            ["data.normalisation=[[0.5,0.5,0.5],[0.2,0.2,0.2]]"],
            ["optim.class_weights=balanced"],
            ["optim.class_weights=[1,2]"],
        )
    }
    assert len(hashes) == 5
    # Where the images came from is not: what they are is known by their fingerprint.
    assert trajectory_hash(load_config(["data.source=a:b"])) == trajectory_hash(load_config([]))


@pytest.mark.parametrize(
    "pair",
    [
        "data.normalisation=imagnet",
        "data.normalisation=[0.5,0.5]",
        "data.normalisation=[[0.5,0.5,0.5]]",
        "data.normalisation=[[0.5,0.5],[0.2,0.2]]",
        "data.normalisation=[[125,125,125],[60,60,60]]",  # on the scale to 255
        "data.normalisation=[[0.5,0.5,0.5],[0.2,0,0.2]]",
        "data.normalisation=[[0.5,0.5,a],[0.2,0.2,0.2]]",
        "optim.class_weights=balance",
        "optim.class_weights=[]",
        "optim.class_weights=[1,-2]",
        "optim.class_weights=[1,inf]",
        "optim.class_weights=[1,[2]]",
        "data.source=my_data.birds",
    ],
)
def test_what_cannot_be_is_refused_by_its_key(pair: str) -> None:
    with pytest.raises(UserError, match=f"{pair.partition('=')[0]}=.*: must be"):
        load_config([pair])
