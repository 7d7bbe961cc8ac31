"""Numbers of our Triton kernels against torch's operations, on CPU tensors.

Run by tests/unit/test_kernels.py in a process with TRITON_INTERPRET=1, which Triton reads when it
is imported.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from dist_resnet.augment import Augmenter, ChoiceDrawer, Choices, Normalisation
from dist_resnet.base.randomness import step_keys, turn_keys
from dist_resnet.config.schema import AugmentConfig
from dist_resnet.kernels import conv, images, norm_act, support, update
from dist_resnet.kernels.loss import loss_and_gradient
from dist_resnet.models import norm_act as models
from dist_resnet.models.resnet import resnet
from dist_resnet.step.loss import mixed_cross_entropy
from dist_resnet.step.measures import MEASURES, weighted_top1
from dist_resnet.step.replica_pass import KernelPass
from dist_resnet.step.totals import Totals
from dist_resnet.step.train_step import TrainStep
from tests.helpers.training import CPU, batch_of, small_config, train_step

# NumPy, which stands for the GPU, on what lies outside of a mask.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
KEY, TURN = step_keys(3, 5)[4], turn_keys(3, 5, 2)[4]


@triton.jit
def _counted(count, found):  # type: ignore[no-untyped-def]
    total = 0
    for _ in range(tl.load(count)):
        total += 1
    tl.store(found, total)


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> None:
    """That of Triton 3.6 makes no loop's bound of an array of NumPy 2.4."""
    try:
        _counted[(1,)](torch.tensor([3]), found := torch.zeros(1, dtype=torch.int64))
    except triton.runtime.errors.InterpreterError as error:
        pytest.skip(f"Triton {triton.__version__} interprets no loops here: {error}")
    assert found == 3


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32, so that nothing hides behind rounding; the C++ kernels for CPUs stand aside."""
    torch.manual_seed(0)
    assert support.usable(CPU)
    monkeypatch.setattr(conv, "TYPES", (torch.float32,))
    monkeypatch.setattr(models.native, "accepts", lambda *args: False)


def _image(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    for tensor in (norm.weight.data, norm.running_var):
        tensor.uniform_(0.5, 2)
    norm.bias.data.normal_()
    norm.running_mean.normal_()
    return norm


def _one_by_one(
    norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None, relu: bool, replicas: int
) -> Tensor:
    """Each replica through a BatchNorm of its own; afterwards `norm` holds the sums of theirs."""
    results, norms = [], []
    for number, part in enumerate(x.chunk(replicas)):
        own = copy.deepcopy(norm)
        own.weight, own.bias = norm.weight, norm.bias
        y = own(part)
        if shortcut is not None:
            y = y + shortcut.chunk(replicas)[number]
        results.append(F.relu(y) if relu else y)
        norms.append(own)
    norm.running_mean.copy_(sum(own.running_mean for own in norms))
    norm.running_var.copy_(sum(own.running_var for own in norms))
    return torch.cat(results)


def _close(found: Tensor | None, expected: Tensor | None, name: str) -> None:
    """To float32's rounding of sums of many values."""
    limit = 0.0 if expected is None else 1e-4 * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(
        found, expected, rtol=2e-4, atol=limit, msg=lambda text: f"{name}: {text}"
    )


def _compare(run: Callable[[bool], tuple[Tensor, dict[str, Tensor]]]) -> None:
    """`run(kernels)` gives a result and the leaves and statistics that its backward changes."""
    (y, mine), (z, theirs) = run(True), run(False)
    _close(y, z, "result")
    gradient = torch.randn_like(z)
    y.backward(gradient)
    z.backward(gradient)
    for name, tensor in theirs.items():
        _close(mine[name], tensor, name)
        _close(mine[name].grad, tensor.grad, f"gradient of {name}")


@pytest.mark.parametrize(
    ("count", "channels", "side", "replicas", "add", "relu"),
    [
        (8, 16, 32, 1, False, True),
        (6, 24, 8, 2, True, True),
        (4, 64, 8, 1, True, True),
        (9, 5, 7, 3, False, False),
        (2, 16, 4, 1, False, True),
    ],
)
def test_norm_act(
    count: int, channels: int, side: int, replicas: int, add: bool, relu: bool
) -> None:
    x, norm = 3 * _image(count, channels, side, side) + 20, _norm(channels)
    shortcut = _image(count, channels, side, side) if add else None

    def run(kernels: bool) -> tuple[Tensor, dict[str, Tensor]]:
        own, layer = x.clone().requires_grad_(), copy.deepcopy(norm)
        added = None if shortcut is None else shortcut.clone().requires_grad_()
        assert norm_act.accepts(own, added, replicas)
        way = norm_act.norm_act if kernels else _one_by_one
        y = way(layer, own, added, relu, replicas)
        leaves = {"x": own, **dict(layer.named_parameters()), **dict(layer.named_buffers())}
        del leaves["num_batches_tracked"]
        return y, leaves if added is None else {**leaves, "shortcut": added}

    _compare(run)


@pytest.mark.parametrize(
    ("count", "channels", "filters", "side", "size", "stride", "replicas", "add", "relu"),
    [
        (2, 3, 16, 8, 3, 1, 1, False, True),  # the stem
        (4, 16, 16, 8, 3, 1, 2, True, True),
        (4, 16, 32, 8, 3, 2, 1, False, True),
        (6, 16, 32, 7, 3, 2, 3, False, True),
        (4, 16, 32, 7, 1, 2, 2, False, False),  # a projection
        (2, 24, 48, 5, 3, 1, 1, True, True),
        (1, 16, 80, 13, 3, 1, 1, False, True),  # several programs along rows and filters
    ],
)
def test_conv_norm_act(
    count: int, channels: int, filters: int, side: int, size: int, stride: int, replicas: int,
    add: bool, relu: bool,
) -> None:  # fmt: skip
    layer = nn.Conv2d(channels, filters, size, stride, size // 2, bias=False)
    layer, norm = layer.to(memory_format=torch.channels_last), _norm(filters)
    x, out = _image(count, channels, side, side), -(-side // stride)
    shortcut = _image(count, filters, out, out) if add else None

    def run(kernels: bool) -> tuple[Tensor, dict[str, Tensor]]:
        own, weights, normal = x.clone().requires_grad_(), copy.deepcopy(layer), copy.deepcopy(norm)
        added = None if shortcut is None else shortcut.clone().requires_grad_()
        passed: Tensor = own
        if kernels:
            assert conv.accepts(weights, own, added, replicas)
            y, passed = conv.conv_norm_act(weights, normal, own, added, relu, replicas)
        else:
            y = _one_by_one(normal, weights(own), added, relu, replicas)
        # Whoever else uses x: its gradient is added within the kernel.
        y = y + (passed.square().sum() if channels == 16 else 0)
        leaves = {"x": own, "conv": weights.weight}
        leaves |= {"gamma": normal.weight, "beta": normal.bias}
        leaves |= {"mean": normal.running_mean, "variance": normal.running_var}
        return y, leaves if added is None else {**leaves, "shortcut": added}

    _compare(run)


@pytest.mark.parametrize(
    ("programs", "frozen", "wanted"),
    [(256, False, [(True, True)]), (2, False, [(True, False), (False, True)]),
     (2, True, [(False, True)])],
)  # fmt: skip
def test_gradients_of_several_tiles_a_program(
    programs: int, frozen: bool, wanted: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few programs, so that each has a loop to go round; one launch, or one a gradient."""
    monkeypatch.setattr(conv, "_PARTS", 1)
    monkeypatch.setattr(norm_act, "_PROGRAMS", programs)
    launched: list[tuple[object, object]] = []
    kernel = conv.kernels.conv_gradients

    class Noted:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(*arguments: object, **options: object) -> None:
                launched.append((options["INPUT"], options["WEIGHT"]))
                kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(conv.kernels, "conv_gradients", Noted())
    layer, norm = nn.Conv2d(16, 24, 3, padding=1, bias=False), _norm(24)
    layer = layer.to(memory_format=torch.channels_last)
    x, slopes = _image(3, 16, 13, 13).requires_grad_(not frozen), _image(3, 24, 13, 13)
    leaves = [t for t in (x, layer.weight) if t.requires_grad]
    expected = torch.autograd.grad(norm(layer(x)), leaves, slopes)
    y, _ = conv.conv_norm_act(layer, norm, x, None, False, 1)
    found = torch.autograd.grad(y, leaves, slopes)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert launched == wanted


def test_conv_norm_act_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """x of another type is cast, results are of the weight's. Triton interprets no bfloat16."""
    monkeypatch.undo()
    layer, norm = nn.Conv2d(16, 16, 3, padding=1, bias=False).half(), _norm(16)
    layer = layer.to(memory_format=torch.channels_last)
    x = _image(2, 16, 6, 6)
    expected = _one_by_one(copy.deepcopy(norm), layer(x.half()).float(), None, True, 1)
    y, passed = conv.conv_norm_act(layer, norm, x, None, True, 1)
    assert y.dtype == passed.dtype == torch.float16
    torch.testing.assert_close(y.float(), expected, rtol=0.01, atol=0.01)


def test_the_model() -> None:
    """Every layer by the kernels against every layer by torch's, with two replicas."""
    config = small_config("model.name=m6", "model.widths=[16,32,16]", "model.dropout=0")
    model = resnet(config.model, 5).to(memory_format=torch.channels_last)
    x = _image(2, 3, 8, 8)
    launched: list[bool] = []

    def run(kernels: bool) -> tuple[Tensor, dict[str, Tensor]]:
        own = copy.deepcopy(model)
        for module in own.modules():
            if isinstance(module, models.NormAct):
                module.fused, module.replicas = kernels, 2
        y = own(x)
        launched.append("_ConvNormAct" in _functions_of(y))
        return y, {**dict(own.named_parameters()), **dict(own.named_buffers())}

    _compare(run)
    assert launched == [True, False]


def _functions_of(y: Tensor) -> str:
    """Names of what the backward pass of `y` runs."""
    names, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and id(node) not in names:
            names |= {id(node), node.name()}
            todo += [parent for parent, _ in node.next_functions]
    return " ".join(str(name) for name in names)


CASES = [
    (1, 8, (32, 24), AugmentConfig(), 0.3, 64),  # an image by several programs
    (2, 70, (9, 7), AugmentConfig(cutout=4), 0.3, 10),  # partners by several programs
    (3, 5, (8, 8), AugmentConfig(mixup_alpha=0), 0.0, 1),
    (2, 16, (4, 6), AugmentConfig(crop_padding=0, flip=False), 0.5, 7),
    (2, 9, (6, 5), AugmentConfig(flip="alternating"), 0.0, 1),
]


@pytest.mark.parametrize(("replicas", "count", "size", "config", "dropout", "features"), CASES)
def test_choices_and_images(
    replicas: int, count: int, size: tuple[int, int], config: AugmentConfig, dropout: float,
    features: int,
) -> None:  # fmt: skip
    samples = torch.randperm(50_000)[: replicas * count]
    pixels = torch.randint(256, (replicas * count, *size, 3)).byte()
    statistics = Normalisation.of((120.0, 127.0, 133.0), (70.0, 74.0, 71.0), size[1], CPU)
    draw = ChoiceDrawer(config, size, dropout, features, CPU)
    own = KernelPass(config, 0.0, draw, statistics, replicas, torch.float32)
    made, chosen = own.inputs(pixels, samples, KEY, TURN)
    assert made.is_contiguous(memory_format=torch.channels_last)
    padding = 2 * config.crop_padding + 1 if config.crop_padding else 0
    integers, flip, lam, _ = images.draw_choices(
        KEY, samples, replicas, padding, size if config.cutout else (0, 0), draw.lam_table,
        draw.features, dropout,
    )  # fmt: skip
    for number in range(replicas):
        part = slice(number * count, (number + 1) * count)
        choices = draw.by_torch(KEY, samples[part], TURN)
        for row, name in enumerate(("top", "left", "cut_top", "cut_left", "partner")):
            expected = getattr(choices, name)
            if expected is not None:
                shift = number * count if name == "partner" else 0
                assert torch.equal(integers[row, part] - shift, expected), name
        if config.flip is True:
            assert torch.equal(flip[part], choices.flip)
        if choices.lam is not None:
            assert lam[number] == choices.lam
        assert (choices.keep is None) == (chosen.keep is None)
        if choices.keep is not None:
            assert torch.equal(chosen.keep[part], choices.keep)
        expected = Augmenter(config, statistics).by_torch(pixels[part], choices)
        torch.testing.assert_close(made[part], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("replicas", "count", "classes"),
    [(1, 32, 10), (2, 70, 7), (3, 5, 100), (1, 9, 1), (1, 3, 5000)],
)
def test_loss_top1_and_gradient(
    replicas: int, count: int, classes: int, smoothing: float, weighted: bool, mixed: bool
) -> None:
    total = replicas * count
    labels = torch.randint(classes, (total,))
    logits = (5 * torch.randn(total, classes)).requires_grad_()
    partners = [torch.randperm(count) for _ in range(replicas)]
    lam = torch.rand(replicas)
    scale = torch.tensor(64.0) if mixed else None
    weights = 0.2 + torch.rand(classes) if weighted else None
    places = torch.cat([own + number * count for number, own in enumerate(partners)])
    found, gradient = loss_and_gradient(
        logits.detach(), labels, (places, lam) if mixed else None, smoothing, scale, replicas,
        weights,
    )  # fmt: skip
    rows, losses = [], []
    for number in range(replicas):
        part = slice(number * count, (number + 1) * count)
        choices = Choices(*[None] * 8)
        if mixed:
            choices = Choices(*[None] * 5, partners[number], lam[number], None)
        own = mixed_cross_entropy(logits[part], labels[part], choices, smoothing, weights)
        losses.append(own)
        rows.append([losses[-1].detach(), weighted_top1(logits[part], labels[part], choices)])
    (torch.stack(losses).sum() * (1 if scale is None else scale)).backward()
    _close(found, torch.tensor(rows), "loss and top-1")
    _close(gradient, logits.grad, "gradient")


def test_a_logit_that_is_nan_makes_the_loss_nan() -> None:
    """Or divergence would go unseen."""
    logits = torch.randn(12, 10)
    logits[7, 3] = torch.nan
    found, _ = loss_and_gradient(logits, torch.arange(12) % 10, None, 0.0, None, 2)
    assert torch.isfinite(found[0]).all()
    assert found[1, 0].isnan()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_update_is_torchs_sgd(nesterov: bool, there: bool) -> None:
    """Rates as numbers and as tensors on the device."""
    count, statistics, decayed = 2500, 300, 2000
    values, exchange = torch.randn(count), torch.randn(count + statistics + 3)
    momentum, ema = torch.randn(count), torch.randn(count + statistics)
    first, second = (nn.Parameter(p.clone()) for p in (values[:decayed], values[decayed:]))
    optimizer = torch.optim.SGD(
        [{"params": [first], "weight_decay": 0.05}, {"params": [second], "weight_decay": 0.0}],
        lr=0.1, momentum=0.9, nesterov=nesterov,
    )  # fmt: skip
    for parameter, part in ((first, slice(0, decayed)), (second, slice(decayed, count))):
        parameter.grad = exchange[part].clone()
        optimizer.state[parameter]["momentum_buffer"] = momentum[part].clone()
    optimizer.step()
    expected = torch.cat([first, second]).detach()
    average = torch.lerp(ema, torch.cat([expected, exchange[count : count + statistics]]), 0.2)
    buffers = torch.cat([optimizer.state[p]["momentum_buffer"] for p in (first, second)])
    rate, weight = (torch.tensor(0.1), torch.tensor(0.2)) if there else (0.1, 0.2)
    squares = update.update(
        values, exchange, momentum, ema, decayed, rate, weight, 0.9, 0.05, nesterov
    )
    for found, tensor in ((values, expected), (ema, average), (momentum, buffers)):
        torch.testing.assert_close(found, tensor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares.sum().sqrt(), exchange[:count].norm())


def test_account_is_totals_add() -> None:
    ours, theirs = Totals(CPU), Totals(CPU)
    for loss in (1.5, 2.0, float("nan"), 1.0):
        row, squares = torch.tensor([loss, 0.3, 0.0, 0.0, 1.0]), torch.rand(5)
        update.account(squares, row, *ours.tensors)
        # To rounding: NumPy, which interprets the kernel, and torch add up in orders of their own.
        torch.testing.assert_close(row[3], squares.sum().sqrt())
        theirs.add(row)
        for found, expected in zip(ours.tensors, theirs.tensors, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)
    assert ours.bad_step() == theirs.bad_step() == 2


RECIPES = {
    "average": ("train.ema_decay=0.9", "augment.cutout=4", "optim.label_smoothing=0.1"),
    "no mixup": ("augment.mixup_alpha=0", "model.dropout=0", "optim.nesterov=true"),
}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_whole_step(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas, twice, from equal states: all kernels together against none of them."""
    monkeypatch.setattr(conv, "accepts", lambda *args: False)  # seen above; slow to interpret
    smoothing = small_config(*RECIPES[recipe]).optim.label_smoothing
    measures = {
        "loss": lambda logits, labels, own: mixed_cross_entropy(logits, labels, own, smoothing),
        "top1": weighted_top1,
        "top1 by torch": weighted_top1,
    }
    for name in list(MEASURES):
        monkeypatch.delitem(MEASURES, name)
    for name, measure in measures.items():
        monkeypatch.setitem(MEASURES, name, measure)
    states = []
    for mode, usable in (("fused", True), ("eager", False)):
        monkeypatch.setattr(support, "usable", lambda device, usable=usable: usable)
        small = "model.name=m6", "model.widths=[4,4,8]", f"train.step_mode={mode}"
        step: TrainStep = train_step(small_config(*small, *RECIPES[recipe]), 2)
        assert isinstance(step.replica_pass, KernelPass) == usable
        for number in range(2):
            step(batch_of(number, 2))
        states.append(step.state.tensors())
        means = step.state.totals.means(Totals.EPOCH)
        found = means.measures
        assert list(found) == list(measures)
        assert found["top1"] == pytest.approx(found["top1 by torch"], abs=1e-6)
        assert found["loss"] == pytest.approx(means.loss, rel=1e-5)
        assert 0 < found["top1"] < 1
    assert step.group == 2
    for found, expected in zip(*states, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
