"""Derived numbers against a table worked out by hand, and their invariants."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_resnet.base.errors import UserError
from dist_resnet.config.builtins import OPTIMIZERS
from dist_resnet.config.load import load_config
from dist_resnet.config.plan import Plan, check_statistics, explain, make_plan, rates
from dist_resnet.config.schema import Config, DataConfig, ParallelConfig
from dist_resnet.models.resnet import resnet


def _plan(images: int, ranks: int, *pairs: str) -> Plan:
    return make_plan(load_config(pairs), images, ranks)


def test_the_recipe_on_one_process() -> None:
    assert _plan(50_000, 1).as_dict() == {
        "world_size": 1,
        "replicas": 1,
        "replicas_per_rank": 1,
        "batch_size_per_replica": 32,
        "global_batch_size": 32,
        "train_images": 50_000,
        "steps_per_epoch": 1562,
        "images_left_out_per_epoch": 16,
        "schedule_steps": 234_300,
        "total_steps": 234_300,
        "base_lr": 0.05,
        "lr_factor": 1.0,
        "peak_lr": 0.05,
    }


@pytest.mark.parametrize(
    ("ranks", "replicas", "each", "batch", "steps", "left"),
    [
        (1, "auto", 1, 32, 1562, 16),
        (4, "auto", 1, 128, 390, 80),
        (1, "4", 4, 128, 390, 80),
        (2, "4", 2, 128, 390, 80),
        (4, "4", 1, 128, 390, 80),
        (3, "6", 2, 192, 260, 80),
        (7, "auto", 1, 224, 223, 48),
    ],
)
def test_replicas_over_ranks(
    ranks: int, replicas: str, each: int, batch: int, steps: int, left: int
) -> None:
    plan = _plan(50_000, ranks, f"parallel.replicas={replicas}")
    found = (plan.replicas_per_rank, plan.global_batch_size, plan.steps_per_epoch)
    assert (*found, plan.images_left_out_per_epoch) == (each, batch, steps, left)


@pytest.mark.parametrize(
    ("scaling", "reference", "factor"),
    [
        ("none", 32, 1), ("linear", 32, 4), ("sqrt", 32, 2), ("linear", 256, 0.5),
        ("sqrt", 512, 0.5),
    ],
)  # fmt: skip
def test_the_rate_follows_the_global_batch(scaling: str, reference: int, factor: float) -> None:
    pairs = [f"optim.lr_scaling={scaling}", f"optim.reference_batch_size={reference}"]
    one, four = _plan(50_000, 1, *pairs, "parallel.replicas=4"), _plan(50_000, 4, *pairs)
    assert one.peak_lr == four.peak_lr == pytest.approx(0.05 * factor)
    assert four.lr_factor == pytest.approx(factor)


def test_max_steps_stops_early_but_bends_no_schedule() -> None:
    long, short = _plan(1000, 1, "train.epochs=4"), _plan(1000, 1, "train.epochs=4",
                                                           "train.max_steps=10")  # fmt: skip
    assert (short.total_steps, short.schedule_steps) == (10, 124)
    config = load_config(["train.epochs=4"])
    assert rates(config, long)[:10] == rates(config, short)[:10]
    assert len(rates(config, short)) == 124
    assert _plan(1000, 1, "train.epochs=1", "train.max_steps=99999").total_steps == 31


def test_epochs_end_where_they_should() -> None:
    plan = _plan(1000, 1, "train.epochs=4")  # 31 steps an epoch
    assert [s for s in range(125) if plan.ends_epoch(s, 1)] == [31, 62, 93, 124]
    assert [s for s in range(125) if plan.ends_epoch(s, 2)] == [62, 124]
    assert not any(plan.ends_epoch(s, 0) for s in range(125))


@pytest.mark.parametrize(("replicas", "ranks", "start"), [(4, 3, 2), (6, 4, 3), (1, 2, 1)])
def test_replicas_that_do_not_divide(replicas: int, ranks: int, start: int) -> None:
    with pytest.raises(UserError, match=rf"parallel.replicas={replicas}: .*start {start},"):
        _plan(50_000, ranks, f"parallel.replicas={replicas}")


def test_a_set_smaller_than_one_batch() -> None:
    assert _plan(64, 2).steps_per_epoch == 1
    with pytest.raises(UserError, match=r"data.batch_size_per_replica=32: .*64.*63"):
        _plan(63, 2)


@settings(max_examples=200)
@given(
    images=st.integers(1, 5000),
    ranks=st.integers(1, 8),
    each=st.integers(1, 4),
    batch=st.integers(1, 70),
)
def test_every_image_is_used_or_left_out(images: int, ranks: int, each: int, batch: int) -> None:
    config = Config(
        parallel=ParallelConfig(replicas=ranks * each),
        data=DataConfig(batch_size_per_replica=batch),
    )
    if images < ranks * each * batch:
        with pytest.raises(UserError):
            make_plan(config, images, ranks)
        return
    plan = make_plan(config, images, ranks)
    used = plan.steps_per_epoch * plan.world_size * plan.replicas_per_rank * batch
    assert used + plan.images_left_out_per_epoch == images
    assert 0 <= plan.images_left_out_per_epoch < plan.global_batch_size


def test_the_explanation_says_reference_effective_and_why() -> None:
    config = load_config(["optim.lr_scaling=sqrt", "optim.lr=0.02"])
    text = "\n".join(explain(config, make_plan(config, 50_000, 4)))
    assert f"{0.02 * math.sqrt(128 / 32):g}" in text
    for part in ("0.02 at batch 32", "0.04 at batch 128", "sqrt(128 / 32)", "4 of 32", "390"):
        assert part in text


@pytest.mark.parametrize(("batch", "side", "enough"), [(1, 4, False), (1, 5, True), (2, 4, True)])
def test_batchnorm_needs_two_values(batch: int, side: int, enough: bool) -> None:
    config = load_config([f"data.batch_size_per_replica={batch}", "model.widths=[2,2,2]"])
    model = resnet(config.model, 3, 0).train()
    images = torch.zeros(batch, 3, side, side)
    if enough:
        check_statistics(config, side, side)
        model(images)
    else:
        with pytest.raises(UserError, match=r"at least 2 with images of 4x4"):
            check_statistics(config, side, side)
        with pytest.raises(ValueError, match="more than 1 value"):
            model(images)


def test_a_schedule_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.epochs=1000000: 1,000,000,000 steps"):
        make_plan(load_config(["train.epochs=1000000", "data.batch_size_per_replica=1"]), 1000, 1)


def test_keys_that_do_nothing_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*pairs: str) -> list[str]:
        config = load_config(pairs)
        return [line for line in explain(config, make_plan(config, 50_000, 1)) if "nothing" in line]

    assert said() == said("optim.name=muon", "optim.muon_lr=0.2", "optim.momentum=0.8") == []
    assert said("schedule.name=step", "schedule.milestones=[3,5]") == []
    assert said("optim.muon_lr=0.2", "schedule.milestones=[3,5]") == [
        "optim.muon_lr=0.2: does nothing with optim.name=sgd",
        "schedule.milestones=[3,5]: does nothing with schedule.name=cosine",
    ]
    monkeypatch.setitem(OPTIMIZERS, "lion", "further:BuiltIn")
    for other in ("torch.optim:AdamW", "lion"):
        assert said(f"optim.name={other}", "optim.momentum=0.8", "optim.nesterov=true") == [
            f"optim.momentum=0.8: does nothing with optim.name={other}",
            f"optim.nesterov=True: does nothing with optim.name={other}",
        ]
    assert said("augment.cutmix_alpha=2", "distill.weight=0.2", "augment.mixup_alpha=1") == [
        "augment.cutmix_alpha=2.0: does nothing with augment.mix=mixup",
        "distill.weight=0.2: does nothing without distill.teachers",
    ]
    assert said("augment.mix=cutmix", "augment.mixup_alpha=1") == [
        "augment.mixup_alpha=1.0: does nothing with augment.mix=cutmix"
    ]
