"""Optimizers of one's own: the same weights as in a plain loop, and nothing lost in a file."""

import copy
import enum
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_resnet.base.errors import UserError
from dist_resnet.config.builtins import OPTIMIZERS
from dist_resnet.config.load import load_config
from dist_resnet.config.schema import Config, ModelConfig
from dist_resnet.distributed.flat import FlatModel, flatten_model
from dist_resnet.models.resnet import resnet
from dist_resnet.optim.build import RunOptimizer, build_optimizer
from dist_resnet.optim.plain_values import plain, restored, tensors
from dist_resnet.step.captured import as_configured
from tests.helpers.jobs import ROOT
from tests.helpers.own_optimizers import Lion
from tests.helpers.training import batch_of, small_config, train_step

MODEL = ModelConfig(widths=[8, 10, 12])
OWN = "tests.helpers.own_optimizers"
ADAMW = "optim.name=torch.optim:AdamW"


def _flat(layout: torch.memory_format = torch.channels_last) -> FlatModel:
    return flatten_model(resnet(MODEL, 5, 1).to(memory_format=layout))


def _config(name: str, **args: Any) -> Config:
    pairs = [f"optim.args.{key}={value}" for key, value in args.items()]
    return load_config([f"optim.name={name}", "optim.lr=0.02", "optim.weight_decay=0.1", *pairs])


def _gradients(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def _advance(flat: FlatModel, optimizer: RunOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for p, gradient in zip(flat.model.parameters(), _gradients(flat.model, step), strict=True):
            assert p.grad is not None
            p.grad.copy_(gradient)
        optimizer.step(0.02 / (1 + step))


PLUGINS: dict[str, tuple[Config, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]]] = {
    "AdamW": (
        _config("torch.optim:AdamW", betas="[0.8, 0.95]"),
        lambda groups: torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95)),
    ),
    "RMSprop": (
        _config("torch.optim:RMSprop", momentum=0.9, centered="true"),
        lambda groups: torch.optim.RMSprop(groups, lr=0.02, momentum=0.9, centered=True),
    ),
    "Rprop": (_config("torch.optim:Rprop"), lambda groups: torch.optim.Rprop(groups, lr=0.02)),
    "fused": (
        _config("torch.optim:Adam", fused="true", amsgrad="true"),
        lambda groups: torch.optim.Adam(groups, lr=0.02, fused=True, amsgrad=True),
    ),
    "own": (_config(f"{OWN}:Lion"), lambda groups: Lion(groups, 0.02)),
}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", list(PLUGINS))
def test_the_weights_of_a_plain_loop(name: str, layout: torch.memory_format) -> None:
    config, make = PLUGINS[name]
    flat = _flat(layout)
    plain = copy.deepcopy(flat.model)
    ours = build_optimizer(flat, config)
    # Decay, where there is any, for whatever has more than one dimension.
    decay = {} if name == "Rprop" else {"weight_decay": 0.1}
    none = {} if name == "Rprop" else {"weight_decay": 0.0}
    theirs = make(
        [
            {"params": [p for p in plain.parameters() if p.ndim > 1], **decay},
            {"params": [p for p in plain.parameters() if p.ndim == 1], **none},
        ]
    )
    _advance(flat, ours, 0, 6)
    for step in range(6):
        for group in theirs.param_groups:
            group["lr"] = 0.02 / (1 + step)
        for p, gradient in zip(plain.parameters(), _gradients(plain, step), strict=True):
            p.grad = torch.empty_like(p).copy_(gradient)
        theirs.step()
    for (key, p), q in zip(flat.model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), key


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


class _Kind(enum.IntEnum):
    ONE = 1


class _Text(enum.StrEnum):
    A = "a"


KEPT = {
    **{name: config for name, (config, _) in PLUGINS.items()},
    "every kind": _config(f"{OWN}:Hoarder"),
    "collections of collections": _config(f"{OWN}:Nester"),
    "NAdam": _config("torch.optim:NAdam"),
    "Adafactor": _config("torch.optim:Adafactor"),
    "capturable": _config("torch.optim:Adamax", foreach="true"),
    "sgd": load_config([]),
    "muon": load_config(["optim.name=muon"]),
}


@pytest.mark.parametrize("name", list(KEPT))
def test_all_that_it_keeps_comes_back(name: str) -> None:
    config = KEPT[name]
    first, again = _flat(), _flat()
    one = build_optimizer(first, config)
    _advance(first, one, 0, 3)
    saved = _through_a_file(one.state.state_dict())
    names = {key for key, _ in first.model.named_parameters()}
    assert saved["parameters"].keys() == names
    again.values.copy_(first.values)
    other = build_optimizer(again, config)
    other.state.load_state_dict(saved)
    kinds = [
        sorted(str((t.dtype, t.shape, t.stride())) for t in o.state.tensors()) for o in (one, other)
    ]
    assert kinds[0] == kinds[1]
    assert len(kinds[0]) > 0
    _advance(first, one, 3, 6)
    _advance(again, other, 3, 6)
    assert torch.equal(first.values, again.values)
    assert str(one.state.state_dict()) == str(other.state.state_dict())


def test_numbers_and_texts_of_other_types_are_saved_as_pythons() -> None:
    found = _through_a_file(
        plain({"a": [np.float64(1.5), True, None], "b": _Kind.ONE, "c": _Text.A})
    )
    assert found == {"a": [1.5, True, None], "b": 1, "c": "a"}
    assert [type(value) for value in (*found["a"][:2], found["b"])] == [float, bool, int]


def test_nested_tensors_come_back_on_their_devices() -> None:
    """`meta` in a GPU's place."""
    cpu, meta = torch.device("cpu"), torch.device("meta")
    saved = {"a": [torch.zeros(2), {"step": torch.zeros(())}], "b": (torch.zeros(1), 3)}
    fresh = restored(saved, None, meta)
    assert [t.device for t in tensors(fresh)] == [meta] * 3
    assert fresh["b"][1] == 3
    placed = {"a": [torch.zeros(2, device=meta), {"step": torch.zeros(())}]}
    by_torch = restored(saved, None, meta, placed)
    assert [t.device for t in tensors(by_torch)] == [meta, cpu, meta]
    held = {"a": [torch.ones(2), {"step": torch.ones((), dtype=torch.float64)}], "c": 1}
    into = restored(saved, held, meta)
    assert into is held
    assert held.keys() == {"a", "b"}
    assert [t.device for t in tensors(into)] == [cpu, cpu, meta]
    assert into["a"][1]["step"].dtype == torch.float32


def test_what_is_loaded_later_stays_where_it_was() -> None:
    """Our kernels and a CUDA graph hold the very tensors."""
    flat = _flat()
    optimizer = build_optimizer(flat, PLUGINS["AdamW"][0])
    _advance(flat, optimizer, 0, 2)
    saved, held = optimizer.state.state_dict(), optimizer.state.tensors()
    _advance(flat, optimizer, 2, 4)
    optimizer.state.load_state_dict(saved)
    assert [t.data_ptr() for t in optimizer.state.tensors()] == [t.data_ptr() for t in held]
    assert str(optimizer.state.state_dict()) == str(saved)


def test_a_group_keeps_its_share_of_the_rate() -> None:
    flat = _flat()
    optimizer = build_optimizer(flat, _config(f"{OWN}:two_rates"))
    flat.gradients.fill_(1.0)
    with torch.no_grad():
        flat.values.zero_()
    optimizer.step(0.8)
    for name, p in flat.model.named_parameters():
        assert torch.allclose(p, torch.tensor(-0.2 if p.ndim > 1 else -0.8)), name


def test_a_new_built_in_is_one_line_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "lion", f"{OWN}:Lion")
    config = small_config("optim.name=lion", "optim.lr=0.002", "optim.weight_decay=0.02")
    step = train_step(config, 1)
    for number in range(3):
        step(batch_of(number, 1))
    optimizer = step.state.optimizer.optimizer
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0]
    own = train_step(small_config(f"optim.name={OWN}:Lion", *CONFIGURED), 1)
    for number in range(3):
        own(batch_of(number, 1))
    assert torch.equal(step.state.flat.values, own.state.flat.values)


CONFIGURED = ("optim.lr=0.002", "optim.weight_decay=0.02")
REFUSED = {
    "a closure": (["optim.name=torch.optim:LBFGS"], "needs a closure"),
    "no optimizer": ([f"optim.name={OWN}:nothing"], "gives a NoneType, which is no torch.optim"),
    "no class of that name": (["optim.name=torch.optim:AdamX"], "has no AdamX; did you mean Adam"),
    "sparse gradients": (
        ["optim.name=torch.optim:SparseAdam"],
        "SparseAdam does not support dense",
    ),
    "an unknown argument": (
        ["optim.name=torch.optim:AdamW", "optim.args.betaz=[0.9,0.99]"],
        r"optim\.args\.betaz: unknown argument of AdamW; did you mean betas\?",
    ),
    "our own argument": (
        ["optim.name=torch.optim:AdamW", "optim.args.lr=0.1"],
        r"optim\.args\.lr: is set by the training itself",
    ),
    "a bad value": (
        ["optim.name=torch.optim:AdamW", "optim.args.betas=[2,0.99]"],
        "raised ValueError: Invalid beta",
    ),
    "no rate": ([f"optim.name={OWN}:no_rate"], "no_rate takes no lr"),
    "a mistake in it": ([f"optim.name={OWN}:Broken"], r"raised KeyError.*own_optimizers.py:\d+"),
    "what no file holds": ([f"optim.name={OWN}:Opaque"], "keeps a Opaque in its state"),
    "other parameters": ([f"optim.name={OWN}:Stranger"], "none of the model's"),
    "other parameters' memory": ([f"optim.name={OWN}:Replacing"], "in a parameter's place; write"),
    "no gradients left": ([f"optim.name={OWN}:Forgetting"], "or None, in the place of a p.grad"),
    "other gradients": ([f"optim.name={OWN}:Regrading"], "in the place of a p.grad; leave"),
    "noise": ([f"optim.name={OWN}:Noisy"], "draws from torch's generator, which no checkpoint"),
    "chance": ([f"optim.name={OWN}:Gambling"], "draws from Python's random, which no checkpoint"),
    "an object that changes": (
        [f"optim.name={OWN}:Counting"],
        r"attribute count \(_Count\), which",
    ),
    "a table by parameter": ([f"optim.name={OWN}:ByParameter"], r"its attribute table \(dict\), "),
    "one within": ([f"optim.name={OWN}:Wrapping"], r"its attribute inner \(SGD\), which no"),
    "a generator": ([f"optim.name={OWN}:Generating"], r"its attribute generator \(Generator\)"),
    "only matrices": (["optim.name=torch.optim:Muon"], "raised ValueError: Muon only supports 2D"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_serve_is_refused_in_one_line(name: str) -> None:
    pairs, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        train_step(small_config(*pairs), 1)
    assert "\n" not in str(caught.value)
    assert "optim" in str(caught.value)


def test_objects_that_do_not_change_are_no_ones_concern() -> None:
    """A wrapper whose state is that of the one within, with a table by parameter."""
    config = _config(f"{OWN}:Wrapping", shared="true")
    flat = _flat()
    optimizer = build_optimizer(flat, config)
    _advance(flat, optimizer, 0, 2)
    assert (
        optimizer.state.state_dict()["parameters"].keys()
        == dict(flat.model.named_parameters()).keys()
    )


def test_fp16_needs_an_optimizer_that_skips_a_step() -> None:
    config = small_config("optim.name=torch.optim:AdamW", "precision.dtype=fp16")
    with pytest.raises(UserError, match=r"precision\.dtype=fp16: optim\.name=torch\.optim:AdamW"):
        train_step(config, 1, torch.float16)
    fused = small_config(
        "optim.name=torch.optim:AdamW", "optim.args.fused=true", "precision.dtype=fp16"
    )
    step = train_step(fused, 1, torch.float16)
    assert step.state.loss_scale is not None
    step.state.loss_scale.scale.fill_(2.0**127)
    before = step.state.flat.values.clone()
    step(batch_of(0, 1))
    assert torch.equal(step.state.flat.values, before)
    step.state.loss_scale.scale.fill_(8.0)
    step(batch_of(1, 1))
    assert not torch.equal(step.state.flat.values, before)


def test_no_graph_of_an_optimizer_that_cannot_be_captured() -> None:
    step = train_step(small_config(f"optim.name={OWN}:Lion"), 1)
    step.config = load_config(["train.step_mode=graph"])
    told: list[str] = []
    assert as_configured(step, told.append) is step
    assert "optim.name=tests.helpers.own_optimizers:Lion has no argument capturable" in told[0]


def test_weight_decay_that_nothing_does_is_said() -> None:
    assert build_optimizer(_flat(), _config("torch.optim:AdamW")).remarks == []
    assert build_optimizer(_flat(), load_config([])).remarks == []
    (line,) = build_optimizer(_flat(), _config("torch.optim:Rprop")).remarks
    assert line == "optim.weight_decay=0.1: torch.optim:Rprop has none"


@pytest.mark.parametrize("name", ["sgd", "muon", "torch.optim:SGD", "torch.optim:AdamW"])
def test_a_rate_of_their_own_for_all_biases(name: str) -> None:
    pairs = ["optim.lr=0.02", "optim.weight_decay=0.1", f"optim.name={name}"]
    one, other = _flat(), _flat()
    start = {key: p.clone() for key, p in one.model.named_parameters()}
    _advance(one, build_optimizer(one, load_config(pairs)), 0, 1)
    factor = load_config([*pairs, "optim.bias_lr_factor=16"])
    _advance(other, build_optimizer(other, factor), 0, 1)
    moved = dict(other.model.named_parameters())
    for key, p in one.model.named_parameters():
        times = 16 if key.endswith("bias") else 1
        torch.testing.assert_close(moved[key] - start[key], times * (p - start[key]), msg=key)
    assert sum(key.endswith("bias") for key in moved) == 22  # 21 of BatchNorm, the head's


@pytest.mark.parametrize("name", ["sgd", "muon", "torch.optim:AdamW"])
def test_what_it_keeps_of_biases_apart_comes_back(name: str) -> None:
    config = load_config([f"optim.name={name}", "optim.lr=0.02", "optim.bias_lr_factor=4"])
    first, again = _flat(), _flat()
    one, other = build_optimizer(first, config), build_optimizer(again, config)
    _advance(first, one, 0, 3)
    other.state.load_state_dict(_through_a_file(one.state.state_dict()))
    again.values.copy_(first.values)
    _advance(first, one, 3, 5)
    _advance(again, other, 3, 5)
    assert torch.equal(first.values, again.values)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["optim.name=sgd"], ["optim.name=muon"]),
        (["optim.name=muon"], ["optim.name=sgd"]),
        (["optim.name=sgd"], ["optim.name=sgd", "optim.bias_lr_factor=4"]),
        (["optim.name=muon", "optim.bias_lr_factor=4"], ["optim.name=sgd"]),
        ([ADAMW], [ADAMW, "optim.bias_lr_factor=4"]),
        ([ADAMW, "optim.bias_lr_factor=4"], [ADAMW]),
    ],
)  # fmt: skip
def test_a_fork_with_other_groups_keeps_what_is_kept_by_name(
    before: list[str], after: list[str]
) -> None:
    first = train_step(small_config(*before), 1)
    for number in range(2):
        first(batch_of(number, 1))
    saved = first.state.snapshot()
    other = train_step(small_config(*after), 1)
    other.state.restore(saved)
    kept = other.state.optimizer.state.state_dict()["parameters"]
    assert kept.keys() == saved.optimizer["parameters"].keys()
    for name, entries in saved.optimizer["parameters"].items():
        for key, value in entries.items():
            assert torch.equal(kept[name][key], value), (name, key)
    other(batch_of(2, 1))


@pytest.mark.parametrize(
    ("before", "after"),
    [("sgd", "sgd"), ("sgd", "muon"), ("torch.optim:AdamW", "torch.optim:AdamW")],
)
def test_what_a_fork_trains_anew_has_a_momentum_that_begins(before: str, after: str) -> None:
    frozen = "optim.freeze=[stem.*,stages.*]"
    first = train_step(small_config(f"optim.name={before}", frozen), 1)
    first(batch_of(0, 1))
    other = train_step(small_config(f"optim.name={after}"), 1)
    other.state.restore(first.state.snapshot())
    values = other.state.flat.values.clone()
    other(batch_of(1, 1))
    assert int((other.state.flat.values != values).sum()) > 0.9 * values.numel()
    assert other.state.optimizer.state.state_dict()["parameters"]


@pytest.mark.parametrize("name", ["sgd", "torch.optim:AdamW"])
def test_clipping_is_torchs(name: str) -> None:
    """In a step of training, where the gradient's norm is above and below the limit."""
    step = train_step(small_config(f"optim.name={name}"), 1)
    flat, plain = step.state.flat, copy.deepcopy(step.state.flat.model)
    step.average_over_replicas(batch_of(0, 1), step.keys[0])
    norm = float(torch.linalg.vector_norm(flat.gradients))
    for limit in (norm / 3, norm * 3):
        config = small_config(f"optim.name={name}", f"optim.clip_norm={limit}")
        clipped = train_step(config, 1)
        clipped.average_over_replicas(batch_of(0, 1), clipped.keys[0])
        for p, q in zip(plain.parameters(), clipped.state.flat.model.parameters(), strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone()
        nn.utils.clip_grad_norm_(plain.parameters(), limit)
        clipped.update(0.01, 0.0)
        for p, q in zip(plain.parameters(), clipped.state.flat.model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        assert float(clipped.state.flat.norm) == pytest.approx(norm)  # as it was
        (used,) = [float(torch.linalg.vector_norm(clipped.state.flat.gradients))]
        assert used == pytest.approx(min(norm, limit), rel=1e-4)


def test_clipping_under_a_loss_scale() -> None:
    config = small_config("precision.dtype=fp16", "optim.clip_norm=0.1", "optim.momentum=0")
    step = train_step(config, 1, torch.float16)
    assert step.state.loss_scale is not None
    step.state.loss_scale.scale.fill_(64.0)
    step(batch_of(0, 1))
    flat = step.state.flat
    assert float(torch.linalg.vector_norm(flat.gradients)) == pytest.approx(0.1, rel=1e-3)
    before = flat.values.clone()
    step.state.loss_scale.scale.fill_(2.0**127)
    step(batch_of(1, 1))
    assert torch.equal(step.state.flat.values, before)


def test_what_is_built_in_does_not_load_the_compiler() -> None:
    """It takes 2 s of every start."""
    code = (
        "import sys, torch; from dist_resnet.config.load import load_config;"
        "from dist_resnet.step.state import build_state; import dist_resnet.training.run;"
        "states = [build_state(load_config([f'optim.name={name}', 'model.widths=[4,4,4]']), 5,"
        " torch.float32, torch.device('cpu')) for name in ('sgd', 'muon')];"
        "[(s.optimizer.step(0.1), s.restore(s.snapshot())) for s in states];"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
