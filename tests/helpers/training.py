"""A small training set-up: what several tests train with, and the same loop in plain PyTorch."""

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_resnet.augment import Augmenter, ChoiceDrawer, Normalisation
from dist_resnet.base.randomness import step_keys
from dist_resnet.config.load import load_config
from dist_resnet.config.schema import Config
from dist_resnet.data.stream import Batch
from dist_resnet.models.norm_act import NormAct
from dist_resnet.models.resnet import ResNet, resnet
from dist_resnet.step.state import TrainState, build_state
from dist_resnet.step.train_step import TrainStep

CPU = torch.device("cpu")
CLASSES, SIDE, BATCH = 5, 16, 8
# From 0, in front of a ReLU: within what rounding moves a value. Those seen to cross were 2e-7 to
# 5e-7 away; the nearest value of a step is 5e-6 away, by the median.
CROSSED = 1e-6
STATISTICS = Normalisation.of((120.0, 127.0, 133.0), (70.0, 74.0, 71.0), SIDE, CPU)
SMALL = (
    "model.widths=[8,8,16]", f"data.batch_size_per_replica={BATCH}", "precision.dtype=fp32",
    "optim.lr=0.005", "optim.weight_decay=0.05",
)  # fmt: skip


def small_config(*pairs: str) -> Config:
    """The recipe with a tiny model and batch."""
    return load_config([*SMALL, *pairs])


def own_config(name: str, *pairs: str) -> Config:
    """As `small_config`, with a net of `helpers.nets`, or one named module:callable."""
    kept = [pair for pair in SMALL if not pair.startswith("model.")]
    name = name if ":" in name else f"tests.helpers.nets:{name}"
    return load_config([*kept, f"model.name={name}", *pairs])


def rates(steps: int = 30) -> list[float]:
    """A rate of its own for every step."""
    return [0.005 / (1 + 0.1 * step) for step in range(steps)]


def batch_of(step: int, replicas: int) -> Batch:
    """The global batch of one step, all replicas' one after the other."""
    generator = torch.Generator().manual_seed(1000 + step)
    count = replicas * BATCH
    return Batch(
        images=torch.randint(256, (count, SIDE, SIDE, 3), generator=generator).byte(),
        labels=torch.randint(CLASSES, (count,), generator=generator),
        samples=torch.randperm(10_000, generator=generator)[:count],
    )


def part_of(batch: Batch, rank: int, ranks: int) -> Batch:
    """One rank's share of a global batch."""
    size = len(batch.labels) // ranks
    part = slice(rank * size, (rank + 1) * size)
    return Batch(batch.images[part], batch.labels[part], batch.samples[part])


def train_step(
    config: Config,
    replicas: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    steps: int = 30,
) -> TrainStep:
    """Ours, at step 0; its state is `.state`."""
    state = build_state(config, CLASSES, dtype, device, (SIDE, SIDE))
    statistics = Normalisation(STATISTICS.mean.to(device), STATISTICS.scale.to(device))
    weights = class_weights(config)
    return TrainStep(
        config, state, rates(steps), replicas, dtype, statistics, (SIDE, SIDE), 3,
        class_weights=None if weights is None else weights.to(device),
    )  # fmt: skip


def class_weights(config: Config) -> Tensor | None:
    """float32 (K,): those that are given."""
    given = config.optim.class_weights
    return torch.tensor(given) if isinstance(given, list) else None


@dataclass
class PlainLoop:
    """One model, torch.optim.SGD, and a loop over replicas: nothing flat, nothing fused.

    Only the augmented images and the random choices come from the code under test.
    """

    config: Config
    model: nn.Module = field(init=False)
    optimizer: torch.optim.SGD = field(init=False)
    losses: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    nearest: float = math.inf
    """How near a value of the last step came to 0 in front of a ReLU."""
    crossed: int = 0
    """Steps in which one lay on the other side for us."""

    def __post_init__(self) -> None:
        config = self.config
        self.model = resnet(config.model, CLASSES, config.seed)
        if config.precision.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = plain_optimizer(self.model, config)

        def note(norm: nn.Module, inputs: tuple[Tensor | None, ...]) -> None:
            assert isinstance(norm, NormAct)
            values, *shortcuts = (tensor for tensor in inputs if tensor is not None)
            scaled = F.batch_norm(values, None, None, norm.weight, norm.bias, True, eps=norm.eps)
            nearest = sum(shortcuts, scaled).detach().abs().min().item()
            self.nearest = min(self.nearest, nearest)

        for module in self.model.modules():
            if isinstance(module, NormAct) and module.relu:
                module.register_forward_pre_hook(note)  # a function: copies of the model share it

    def step(self, step: int, batch: Batch) -> None:
        """Each replica on a copy of the model; gradients and statistics averaged by hand."""
        copies, losses, top1 = [], [], []
        self.nearest = math.inf
        for start in range(0, len(batch.labels), BATCH):
            replica = copy.deepcopy(self.model)
            part = part_of(batch, start // BATCH, len(batch.labels) // BATCH)
            loss, share = forward(self.config, replica, step, part)
            loss.backward()
            copies.append(replica)
            losses.append(float(loss.detach()))
            top1.append(share)
        for parameter, *others in zip(
            self.model.parameters(), *(c.parameters() for c in copies), strict=True
        ):
            gradients = [p.grad for p in others if p.grad is not None]
            parameter.grad = torch.stack(gradients).mean(dim=0)
        for buffer, *others in zip(
            self.model.buffers(), *(c.buffers() for c in copies), strict=True
        ):
            buffer.copy_(torch.stack(others).mean(dim=0))
        for group in self.optimizer.param_groups:
            group["lr"] = rates()[step]
        squares = [p.grad.square().sum() for p in self.model.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))
        self.optimizer.step()
        self.losses.append(sum(losses) / len(losses))
        self.top1.append(sum(top1) / len(top1))


def plain_optimizer(model: nn.Module, config: Config) -> torch.optim.SGD:
    """torch's SGD, one tensor at a time; decay for what has more than one dimension."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": decayed, "weight_decay": config.optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        groups, lr=0.1, momentum=config.optim.momentum, nesterov=config.optim.nesterov,
        foreach=False, fused=False,
    )  # fmt: skip


def forward(config: Config, model: nn.Module, step: int, batch: Batch) -> tuple[Tensor, float]:
    """Loss and lambda-weighted accuracy of one replica's batch, written out."""
    settings = config.augment
    features = config.model.widths[2]
    draw = ChoiceDrawer(settings, (SIDE, SIDE), config.model.dropout, features, CPU)
    choices = draw(step_keys(config.seed, step + 1)[step], batch.samples)
    images = Augmenter(settings, STATISTICS)(batch.images, choices)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    assert isinstance(inner, ResNet)
    inner.dropout.eval()  # its factors are multiplied by here
    handle = inner.head.register_forward_pre_hook(
        lambda _module, inputs: inputs if choices.keep is None else (inputs[0] * choices.keep,)
    )
    logits = model(images)
    handle.remove()
    targets, guesses = F.one_hot(batch.labels, CLASSES).float(), logits.argmax(dim=1)
    hits = (guesses == batch.labels).float()
    if choices.partner is not None and choices.lam is not None:
        lam = choices.lam
        targets = lam * targets + (1 - lam) * targets[choices.partner]
        hits = lam * hits + (1 - lam) * (guesses == batch.labels[choices.partner]).float()
    smoothing, weights = config.optim.label_smoothing, class_weights(config)
    wanted = targets if weights is None or choices.partner is not None else batch.labels
    loss = F.cross_entropy(logits, wanted, weights, label_smoothing=smoothing)
    return loss, float(hits.mean())


def assert_same_step(state: TrainState, plain: PlainLoop) -> None:
    """After a step that both took from the same weights: parameters and running statistics agree.

    `plain` then goes on from ours: rounding would grow a hundredfold in every step in which it
    moves a value to the other side of a ReLU. In which, the processor decides: two such steps are
    let through, if a value was as near, and `plain` goes on with our momentum.
    """
    found, expected = state.flat.model.state_dict(), plain.model.state_dict()
    assert found.keys() == expected.keys()
    try:
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-6, atol=1e-6,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip
    except AssertionError:
        plain.crossed += 1
        if plain.nearest > CROSSED or plain.crossed > 2:
            raise
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-3)
        take_momentum(plain.optimizer, plain.model, state)
    plain.model.load_state_dict(found)


def take_momentum(optimizer: torch.optim.SGD, model: nn.Module, state: TrainState) -> None:
    """Let torch's optimizer go on with the momentum of ours."""
    kept = vars(state.snapshot())["optimizer"]["parameters"]
    for name, parameter in model.named_parameters():
        if name in kept and "momentum_buffer" in kept[name]:
            own = torch.empty_like(parameter).copy_(kept[name]["momentum_buffer"])
            optimizer.state[parameter]["momentum_buffer"] = own
