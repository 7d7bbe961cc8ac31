"""Targets, loss and accuracy against torch's cross-entropy and loops."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_resnet.augment import ChoiceDrawer, Choices, Normalisation
from dist_resnet.config.schema import AugmentConfig
from dist_resnet.step.loss import mixed_cross_entropy, mixed_targets
from dist_resnet.step.measures import weighted_top1
from dist_resnet.step.replica_pass import KernelPass

K, N = 10, 33


def _choices(partner: Tensor | None, lam: float | None) -> Choices:
    weight = None if lam is None else torch.tensor(lam)
    return Choices(None, None, None, None, None, partner, weight, None)


def _case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(N, K, generator=generator)
    labels = torch.randint(K, (N,), generator=generator)
    return logits, labels, torch.randperm(N, generator=generator)


@pytest.mark.parametrize("lam", [0.0, 0.2, 0.731, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_targets_are_their_formula(lam: float, smoothing: float) -> None:
    _, labels, partner = _case(0)
    found = mixed_targets(labels, _choices(partner, lam), K, smoothing)
    assert torch.allclose(found.sum(dim=1), torch.ones(N), atol=1e-6)

    def smooth(label: int) -> list[float]:
        return [(1 - smoothing) * (k == label) + smoothing / K for k in range(K)]

    for i in range(N):
        a, b = smooth(int(labels[i])), smooth(int(labels[partner[i]]))
        expected = [lam * x + (1 - lam) * y for x, y in zip(a, b, strict=True)]
        assert found[i].tolist() == pytest.approx(expected, abs=1e-6)


def test_without_mixup_targets_are_one_hot() -> None:
    _, labels, _ = _case(1)
    found = mixed_targets(labels, _choices(None, None), K, 0.0)
    assert torch.equal(found, F.one_hot(labels, K).float())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_loss_is_torchs_label_smoothing(smoothing: float) -> None:
    logits, labels, partner = _case(2)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    for choices in (_choices(None, None), _choices(partner, 1.0)):
        found = mixed_cross_entropy(logits, labels, choices, smoothing)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_under_mixup_is_the_mix_of_losses(smoothing: float) -> None:
    logits, labels, partner = _case(3)
    own = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    other = F.cross_entropy(logits, labels[partner], label_smoothing=smoothing)
    found = mixed_cross_entropy(logits, labels, _choices(partner, 0.3), smoothing)
    torch.testing.assert_close(found, 0.3 * own + 0.7 * other)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lam", [None, 0.3])
def test_class_weights_are_torchs(lam: float | None, smoothing: float) -> None:
    """Without mixup divided by the labels' weights, with it by the number of images."""
    logits, labels, partner = _case(5)
    weights = torch.rand(K) + 0.2
    choices = _choices(None if lam is None else partner, lam)
    found = mixed_cross_entropy(logits, labels, choices, smoothing, weights)
    log_p = torch.log_softmax(logits.double(), 1)
    total, divisor = 0.0, 0.0
    for i in range(N):
        shares = {int(labels[i]): 1.0} if lam is None else {}
        if lam is not None:
            for label, share in ((labels[i], lam), (labels[partner[i]], 1 - lam)):
                shares[int(label)] = shares.get(int(label), 0.0) + share
        for k in range(K):
            target = (1 - smoothing) * shares.get(k, 0.0) + smoothing / K
            total -= float(weights[k] * target * log_p[i, k])
        divisor += float(weights[labels[i]]) if lam is None else 1.0
    assert float(found) == pytest.approx(total / divisor, rel=1e-5)
    if lam is None:
        torchs = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
        assert torch.equal(found, torchs)
    else:
        one_hot = torch.eye(K)
        mixed = lam * one_hot[labels] + (1 - lam) * one_hot[labels[partner]]
        torchs = F.cross_entropy(logits, mixed, weight=weights, label_smoothing=smoothing)
        torch.testing.assert_close(found, torchs)


@pytest.mark.parametrize("lam", [None, 0.4])
def test_gradient_is_softmax_minus_target(lam: float | None) -> None:
    logits, labels, partner = _case(4)
    logits.requires_grad_()
    choices = _choices(None if lam is None else partner, lam)
    mixed_cross_entropy(logits, labels, choices, 0.1).backward()
    expected = (torch.softmax(logits.detach(), 1) - mixed_targets(labels, choices, K, 0.1)) / N
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("lam", [None, 1.0])
def test_loss_is_finite_and_in_float32_for_huge_and_half_logits(lam: float | None) -> None:
    _, labels, partner = _case(5)
    choices = _choices(None if lam is None else partner, lam)
    huge = torch.full((N, K), -1e4).scatter(1, labels.unsqueeze(1), 1e4)
    assert mixed_cross_entropy(huge, labels, choices, 0.0) == 0
    assert torch.isfinite(mixed_cross_entropy(-huge, labels, choices, 0.0))
    logits = _case(5)[0].bfloat16()
    found = mixed_cross_entropy(logits, labels, choices, 0.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(logits.float(), labels))


@pytest.mark.parametrize("lam", [None, 0.0, 0.25, 1.0])
def test_weighted_accuracy_by_a_loop(lam: float | None) -> None:
    logits, labels, partner = _case(6)
    found = weighted_top1(logits, labels, _choices(None if lam is None else partner, lam))
    expected = 0.0
    for i in range(N):
        guess = max(range(K), key=logits[i].tolist().__getitem__)
        weight, own, other = 1.0 if lam is None else lam, int(labels[i]), int(labels[partner[i]])
        expected += weight * (guess == own) + (1 - weight) * (guess == other)
    assert float(found) == pytest.approx(expected / N, abs=1e-6)
    assert 0 < expected < N


def test_the_pass_that_kernels_are_held_to_weighs_alike() -> None:
    weights, host = torch.rand(K), torch.device("cpu")
    draw = ChoiceDrawer(AugmentConfig(), (8, 8), 0.0, 4, host)
    statistics = Normalisation.of((120.0,) * 3, (60.0,) * 3, 8, host)
    own = KernelPass(AugmentConfig(), 0.1, draw, statistics, 2, torch.float32, weights)
    assert own.by_torch().weights is weights
