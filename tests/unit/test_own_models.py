"""Nets of the user's own: built, held to the contract of a model, trained as by a plain loop."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_resnet.base.errors import UserError
from dist_resnet.base.generators import replica_seeds
from dist_resnet.base.randomness import step_keys
from dist_resnet.config.plan import explain, make_plan
from dist_resnet.config.schema import Config, ModelConfig
from dist_resnet.models.build import build_model
from dist_resnet.models.contract import Traits, checked_model
from dist_resnet.step.mode import told_of_net
from tests.helpers import nets
from tests.helpers.training import (
    BATCH,
    CLASSES,
    CPU,
    SIDE,
    STATISTICS,
    batch_of,
    own_config,
    rates,
    small_config,
    train_step,
)

PLAIN_IMAGES = ("augment.crop_padding=0", "augment.flip=false", "augment.mixup_alpha=0")


def check(config: Config, size: tuple[int, int] = (SIDE, SIDE)) -> tuple[nn.Module, Traits]:
    return checked_model(config, CLASSES, size, torch.float32, CPU)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("Plain", ""),
        ("by_n_classes", ""),
        ("by_classes", "model.args.width=4"),
        ("by_num_labels", ""),
        ("by_nclass", ""),
        ("by_keywords", ""),
        ("fixed", ""),
    ],
)
def test_the_number_of_classes_goes_where_the_signature_has_it(name: str, args: str) -> None:
    config = own_config(name, *([args] if args else []))
    model: Any = build_model(config.model, 5)
    assert model.head.out_features == 5
    if args:
        assert model.head.in_features == 4


@pytest.mark.parametrize(
    ("name", "pairs", "told"),
    [
        ("Plain", ["model.args.num_classes=3"], "is set by the training itself"),
        ("Plain", ["model.args.widht=3"], "did you mean width?"),
        ("by_classes", [], "needs the argument width"),
        ("Plane", [], "did you mean Plain?"),
        ("not_a_module", [], "gave a dict; it must return a torch.nn.Module"),
    ],
)
def test_what_cannot_be_built_is_told(name: str, pairs: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told.replace("?", r"\?")) as caught:
        build_model(own_config(name, *pairs).model, 5)
    assert "\n" not in str(caught.value)


def test_initial_weights_are_of_the_seed_and_the_generator_stays() -> None:
    config = own_config("Plain").model
    before = torch.get_rng_state()
    one, same, other = (build_model(config, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = build_model(config, 5, 1)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(one.state_dict()["head.weight"], other.state_dict()["head.weight"])


BAD = {
    "Tuple": r"forward gives a tuple; it must give the logits alone.*\(4, 5\)",
    "Narrow": r"forward gives a tensor of shape \(4, 6\); logits must be \(4, 5\)",
    "Integers": "torch.int64; logits must be floating point",
    "Detached": "its logits have no gradient",
    "PythonDraws": "forward draws from Python's random",
    "NumpyDraws": r"the module noise \(Noise\) draws from numpy.random",
    "OwnDraws": "generator changes with every forward pass but is no buffer",
    "GlobalDraws": r"the module noise \(GlobalNoise\) gives something else",
    "Attribute": "calls changes with every forward pass but is no buffer",
    "History": "mean changes with every forward pass but is no buffer",
    "Unsaved": "the buffer steps changes in training but is not saved",
    "NumpyCount": "calls changes with every forward pass but is no buffer",
    "Within": "kept changes with every forward pass but is no buffer",
    "Minimum": "the buffer low changes in training but starts at infinity",
    "Double": "the buffer total, of type float64, changes in training",
    "Growing": "the buffer bank changes its shape",
    "Attached": r"the buffer running changes outside of torch.no_grad\(\)",
    "EvaluationDraws": "draws random numbers in evaluation, too",
    "EvaluationMoves": "the buffer steps changes in evaluation",
    "Half": "head.weight is of type float16; parameters must be float32",
    "Lazy": "late.weight is not initialised",
    "Meta": "late.weight is on the device meta",
    "Frozen": "no parameter that requires a gradient",
    "Empty": "has no parameters",
    "Shared": "head.weight and copy share memory|copy and head.weight share memory",
    "Extra": "_extra_state of its state_dict is neither",
    "Unseeded": "head.bias starts otherwise when built again",
    "kept": "gave the same conv.weight twice",
    "Failing": r"raised ValueError: no luck with this \(.*nets.py:\d+\)",
    "Synchronised": "norm is a SyncBatchNorm",
    "Viewing": "raised RuntimeError: view size.*or set precision.channels_last=false",
    "NoBackward": "raised RuntimeError: one of the variables needed for gradient",
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_net_that_breaks_the_contract_is_told_in_one_line(name: str) -> None:
    with pytest.raises(
        UserError, match=f"^model.name=tests.helpers.nets:{name}: .*(?:{BAD[name]})"
    ) as e:
        check(own_config(name))
    assert "\n" not in str(e.value)


def test_a_net_for_the_other_layout_trains_in_it() -> None:
    step = train_step(own_config("Viewing", "precision.channels_last=false"), 2)
    step(batch_of(0, 2))
    assert step.state.traits == Traits()


def test_another_size_of_the_images_is_told() -> None:
    check(own_config("Whole"))
    with pytest.raises(UserError, match="raised RuntimeError: mat1 and mat2"):
        check(own_config("Whole"), (20, 20))


TRAITS = {
    "Plain": Traits(),
    "Grouped": Traits(),
    "Cache": Traits(),
    "Projected": Traits(False, "its seen is a buffer that the replicas average"),
    "LateDraws": Traits(False, "its passes follows one batch"),
    "Tied": Traits(),
    "Odd": Traits(),
    "Counting": Traits(True, "it draws random numbers", True),
    "Depth": Traits(True, "it draws random numbers", True),
    "Averaging": Traits(False, "its running follows one batch"),
    "Constant": Traits(False, "its factor is a buffer that the replicas average"),
    "Unused": Traits(False, "its calls follows one batch"),
    "Attention": Traits(True, "it draws random numbers", True),
    "Reparametrised": Traits(False, "its dense.parametrizations.weight.0._u follows one batch"),
    "Mixing": Traits(False, "its logits depend on the other images of a batch"),
}


@pytest.mark.parametrize("name", list(TRAITS))
def test_what_a_net_does_is_found_and_leaves_no_trace(name: str) -> None:
    config = own_config(name)
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    model, traits = check(config)
    assert traits == TRAITS[name]
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.random.get_state()[1].tolist() == generators[1]  # type: ignore[union-attr]
    fresh = build_model(config.model, CLASSES, config.seed)
    for key, tensor in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert vars(model).keys() == vars(fresh).keys()


class PlainOwn:
    """The training of a net by torch alone: copies for replicas, means by hand, torch's SGD."""

    def __init__(self, config: Config, model: nn.Module) -> None:
        self.config, self.model = config, copy.deepcopy(model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False)

    def step(self, step: int, replicas: int, draws: bool) -> None:
        batch = batch_of(step, replicas)
        copies = []
        for number in range(replicas):
            part = slice(number * BATCH, (number + 1) * BATCH)
            images = batch.images[part].float().flatten(2)
            images = (images - STATISTICS.mean) * STATISTICS.scale
            images = images.view(BATCH, SIDE, SIDE, 3).permute(0, 3, 1, 2)
            net = copy.deepcopy(self.model).train()
            if draws:
                torch.manual_seed(int(replica_seeds(step_keys(0, 30), range(9))[step, number]))
            F.cross_entropy(net(images), batch.labels[part]).backward()
            copies.append(net)
        for parameter, *others in zip(
            self.model.parameters(), *(net.parameters() for net in copies), strict=True
        ):
            if parameter.requires_grad:
                zero = torch.zeros_like(parameter)
                found = [zero if p.grad is None else p.grad for p in others]
                parameter.grad = torch.stack(found).mean(dim=0)
        for buffer, *all_of in zip(
            self.model.buffers(), *(net.buffers() for net in copies), strict=True
        ):
            moved = torch.stack([b.detach().double() - buffer.double() for b in all_of]).mean(0)
            if not buffer.is_floating_point():
                moved = moved.round()
            finite = torch.isfinite(buffer.double())
            buffer.copy_(torch.where(finite, buffer.double() + moved, buffer.double()))
        for group in self.optimizer.param_groups:
            group["lr"] = rates()[step]
        self.optimizer.step()


GOOD = (
    "Plain",
    "Grouped",
    "Constant",
    "Counting",
    "Depth",
    "Averaging",
    "Tied",
    "Unused",
    "Odd",
    "Mixing",
    "Attention",
)
GOOD += ("Reparametrised",)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", GOOD)
def test_steps_are_those_of_a_plain_loop(name: str, replicas: int) -> None:
    config = own_config(name, *PLAIN_IMAGES)
    step = train_step(config, replicas)
    plain = PlainOwn(config, step.state.flat.model)
    for number in range(3):
        step(batch_of(number, replicas))
        plain.step(number, replicas, TRAITS[name].draws)
        found = step.state.flat.model.state_dict()
        for key, tensor in plain.model.state_dict().items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    if name == "Counting":
        assert int(found["steps"]) == 3 * BATCH


def test_a_net_that_draws_draws_for_every_step_and_replica_anew() -> None:
    keys = step_keys(0, 3)
    seeds = set(replica_seeds(keys, range(4))[:3].flatten().tolist())
    assert len(seeds) == 12


def test_a_mask_of_infinities_stays_and_is_not_averaged() -> None:
    step = train_step(own_config("Odd"), 2)
    before = step.state.flat.model.get_buffer("mask").clone()
    for number in range(2):
        step(batch_of(number, 2))
    assert torch.isinf(before).any()
    assert torch.equal(step.state.flat.model.get_buffer("mask"), before)
    assert bool(torch.isfinite(step.state.flat.exchange).all())


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_buffer_that_nothing_changes_keeps_its_bits(replicas: int) -> None:
    step = train_step(own_config("Constant", "parallel.reduction=fast"), replicas)
    factor = step.state.flat.model.get_buffer("factor")
    for number in range(3):
        step(batch_of(number, replicas))
    assert torch.equal(factor, torch.tensor(0.7))


@pytest.mark.parametrize("name", ["Counting", "Averaging", "Unused", "Tied", "Odd"])
def test_a_state_is_restored_whole(name: str) -> None:
    config = own_config(name, "train.ema_decay=0.9")
    whole, first = train_step(config, 2), train_step(config, 2)
    for number in range(5):
        whole(batch_of(number, 2))
        if number < 3:
            first(batch_of(number, 2))
    again = train_step(config, 2)
    torch.rand(7)
    again.state.restore(first.state.snapshot())
    for number in (3, 4):
        again(batch_of(number, 2))
    expected, found = whole.state.snapshot(), again.state.snapshot()
    for one, other in ((expected.model, found.model), (expected.ema, found.ema)):
        assert one is not None
        assert other is not None
        for key, tensor in one.items():
            assert torch.equal(tensor, other[key]), key


def test_replicas_are_side_by_side_where_that_changes_nothing() -> None:
    assert train_step(own_config("Grouped"), 4).group == 4
    assert train_step(own_config("Averaging"), 4).group == 1
    assert train_step(own_config("Counting"), 4).group == 1
    on_every_rank = train_step(own_config("Grouped"), 4)
    alone = train_step(own_config("Grouped", "parallel.reduction=exact"), 4)
    for number in range(2):
        on_every_rank(batch_of(number, 4))
        alone(batch_of(number, 4))
    torch.testing.assert_close(on_every_rank.state.flat.values, alone.state.flat.values)


def test_frozen_parameters_stay_and_are_not_exchanged() -> None:
    # In channels last torch 2.11 crashes where the input of GroupNorm takes no gradient.
    freeze = "optim.freeze=[conv.*,norm.bias]"
    config = own_config("Grouped", freeze, "precision.channels_last=false")
    step = train_step(config, 2)
    flat, model = step.state.flat, step.state.flat.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert flat.values.numel() == 8 + 8 * CLASSES + CLASSES
    assert flat.num_parameters == sum(p.numel() for p in model.parameters())
    for number in range(2):
        step(batch_of(number, 2))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"norm.weight", "head.weight", "head.bias"}
    step.state.restore(step.state.snapshot())


@pytest.mark.parametrize("mode", ["fused", "eager"])
def test_a_built_in_net_can_be_frozen_in_part(mode: str) -> None:
    config = small_config("optim.freeze=[stem.*,bn.*,stages.0.*]", f"train.step_mode={mode}")
    step = train_step(config, 2)
    before = {n: p.clone() for n, p in step.state.flat.model.named_parameters()}
    for number in range(2):
        step(batch_of(number, 2))
    for name, p in step.state.flat.model.named_parameters():
        frozen = name.startswith(("stem.", "bn.", "stages.0."))
        assert torch.equal(p, before[name]) == frozen, name


def test_only_biases_can_be_trained() -> None:
    step = train_step(own_config("Plain", "optim.freeze=['*weight']"), 2)
    step(batch_of(0, 2))
    assert step.state.flat.num_decayed == 0


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        ("[haed.*]", "optim.freeze=haed.*: matches no parameter; there is"),
        ("['*']", "no parameter is left to train"),
    ],
)
def test_a_pattern_that_freezes_nothing_or_all_is_told(patterns: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        check(own_config("Plain", f"optim.freeze={patterns}"))
    assert told in str(caught.value)


def test_the_momentum_of_batchnorm_is_set_in_any_net() -> None:
    for config in (
        own_config("Averaging", "model.bn_momentum=0.25").model,
        ModelConfig(bn_momentum=0.25),
    ):
        norms = [m for m in build_model(config, 5).modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert all(norm.momentum == 0.25 for norm in norms)
    assert build_model(own_config("Averaging").model, 5).get_submodule("norm").momentum is None


@pytest.mark.parametrize(("name", "there"), [("Plain", False), ("Averaging", True)])
def test_the_momentum_of_no_batchnorm_is_told_to_do_nothing(name: str, there: bool) -> None:
    config = own_config(name, "model.bn_momentum=0.25")
    told = told_of_net(config.model, train_step(config, 1).state, 1)
    line = "model.bn_momentum=0.25: does nothing with a net without BatchNorm"
    assert (line in told) != there


@pytest.mark.parametrize(
    "pair", ["model.dropout=0.1", "model.widths=[8,8,8]", "model.shortcut=pad"]
)
def test_keys_of_the_built_in_nets_are_told_to_do_nothing(pair: str) -> None:
    config = own_config("Plain", pair, "parallel.replicas=1")
    told = explain(config, make_plan(config, 100, 1))
    key = pair.partition("=")[0]
    assert [line for line in told if line.startswith(key) and "does nothing with a net of" in line]


def test_torchvisions_resnet18_trains_as_by_a_plain_loop() -> None:
    pytest.importorskip("torchvision")
    config = own_config("torchvision.models:resnet18", *PLAIN_IMAGES)
    step = train_step(config, 2)
    assert step.state.traits == Traits(False, "its bn1.running_mean follows one batch")
    plain = PlainOwn(config, step.state.flat.model)
    step(batch_of(0, 2))
    plain.step(0, 2, False)
    for key, tensor in plain.model.state_dict().items():
        found = step.state.flat.model.state_dict()[key]
        torch.testing.assert_close(found, tensor, rtol=1e-3, atol=1e-4, msg=key)
    assert int(step.state.flat.model.state_dict()["bn1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_nets_of_timm_train(name: str) -> None:
    timm = pytest.importorskip("timm")
    size = "img_size: 16, patch_size: 4, drop_path_rate: 0.2" if name.startswith("vit") else ""
    config = own_config("timm:create_model", f"model.args={{model_name: {name}, {size}}}")
    step = train_step(config, 2)
    assert timm
    assert step.state.traits.alone
    before = step.state.flat.values.clone()
    step(batch_of(0, 2))
    assert not torch.equal(before, step.state.flat.values)


def test_a_parameters_dimensions_decide_about_weight_decay() -> None:
    flat = train_step(own_config("Odd"), 1).state.flat
    decayed = {n for n, p in flat.named_parameters() if p.storage_offset() < flat.num_decayed}
    assert decayed == {"conv.weight", "head.weight", "turned", "cube"}


def test_the_same_images_give_the_same_logits_on_every_evaluation() -> None:
    model = train_step(own_config("Counting"), 1).state.flat.model.eval()
    images: Tensor = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
    assert isinstance(model, nets.Counting)
    assert int(model.steps) == 0
