"""Optimizers that somebody could have written, good ones and bad ones."""

import random
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, "Symbolic discovery of optimization algorithms"."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                kept = self.state[p]
                average = kept.setdefault("average", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.lerp(p.grad, average, first).sign(), alpha=-group["lr"])
                average.lerp_(p.grad, 1 - second)


class Hoarder(torch.optim.Optimizer):
    """Keeps state of every kind, each of which its next update depends on."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, bits: int = 8) -> None:
        super().__init__(groups, {"lr": lr, "seen": 0})
        self.bits = bits
        self.calls = 0
        self.scale = torch.ones((), dtype=torch.float64)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.calls += 1
        self.scale *= 1.01
        common = self.state.setdefault("common", {"total": torch.zeros(2), "names": []})
        common["total"] += self.calls
        common["names"].append(f"step {self.calls}")
        for group in self.param_groups:
            group["seen"] += 1
            for p in group["params"]:
                kept = self.state[p]
                if not kept:
                    kept["count"], kept["share"], kept["nothing"] = 0, 0.5, None
                    kept["half"] = torch.zeros_like(p, dtype=torch.bfloat16)
                    kept["signs"] = torch.zeros_like(p, dtype=torch.int8)
                    kept["wide"] = torch.zeros((3, 2), dtype=torch.float64)
                    kept["history"] = [torch.zeros(1)]
                kept["count"] += 1
                kept["share"] *= 0.9
                kept["half"] += p.grad.to(torch.bfloat16)
                kept["signs"] += p.grad.sign().to(torch.int8)
                kept["wide"] += p.grad.mean().double() / 3
                kept["history"] = [*kept["history"], p.grad.mean().view(1)][-2:]
                move = kept["half"].float() * kept["share"] + kept["signs"] / (9 + kept["count"])
                move = move + kept["wide"].sum().float() + torch.cat(kept["history"]).sum()
                factor = group["seen"] / (50 + self.calls) + float(self.scale)
                p -= group["lr"] * factor * (move + common["total"].sum() / 1e4)


class Nester(torch.optim.Optimizer):
    """Keeps state in collections of collections, made at the first step or before."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "history": {"means": []}})
        self.sums: dict[str, list[Any]] = defaultdict(list)
        self.shared = [torch.zeros((), dtype=torch.float64)]
        self.inner = {"shared": self.shared[0]}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.inner["shared"] += 0.1
        self.sums["all"].append((self.shared[0].clone(), "text"))
        listed = self.state.setdefault("listed", [torch.zeros(2, dtype=torch.float64)])
        listed[0] += 1 / 3
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.state[p]
                if not kept:
                    kept["wide"] = [torch.zeros_like(p, dtype=torch.float64)]
                    kept["deep"] = {"pair": (torch.zeros(1, dtype=torch.int64), {"x": [1.0]})}
                kept["wide"][0] += p.grad.double() / 3
                count, other = kept["deep"]["pair"]
                count += 1
                other["x"].append(other["x"][-1] / 3)
                p -= group["lr"] * (kept["wide"][0] * other["x"][-1] * self.shared[0]).float()
            group["history"]["means"].append(p.grad.mean())


def two_rates(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """A rate of its own for a group."""
    return torch.optim.SGD([{**groups[0], "lr": lr / 4}, groups[1]], lr=lr)


def no_rate(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1)


def nothing(groups: list[dict[str, Any]], lr: float) -> None:
    """Forgets to return it."""


class Opaque(Lion):
    """Keeps what no file can hold."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p]["made by"] = self


class Broken(Lion):
    """Has a mistake in its update."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        found: dict[str, Tensor] = {}
        found["missing"].zero_()


class Stranger(Lion):
    """Updates what is no part of the model."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        copies = [{"params": [torch.nn.Parameter(torch.ones(3))]}]
        super().__init__(copies, lr)
        self.param_groups[0]["params"][0].grad = torch.ones(3)


class Replacing(Lion):
    """Puts its result where the parameter was."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data = p.data - self.param_groups[0]["lr"] * p.grad


class Forgetting(Lion):
    """Frees the gradients when they have been used."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        self.zero_grad()


class Regrading(Lion):
    """Normalises the gradients, into new tensors."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.grad = p.grad / (p.grad.norm() + 1e-6)
        super().step()


class Noisy(Lion):
    """Langevin's."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        for p in self.param_groups[0]["params"]:
            p.add_(torch.randn_like(p), alpha=1e-3)


class Gambling(Lion):
    """Skips steps at random."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if random.random() < 2:
            super().step()


class _Count:
    def __init__(self) -> None:
        self.steps = [0]


class Counting(Lion):
    """Counts in an object of its own."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, lr)
        self.count = _Count()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.count.steps[0] += 1
        super().step()


class ByParameter(Lion):
    """Keeps its state in a table beside `self.state`."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, lr)
        self.table: dict[Tensor, Tensor] = {}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        for p in self.param_groups[0]["params"]:
            self.table[p] = torch.ones(())


class Wrapping(Lion):
    """Has one within, whose state nobody sees."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, shared: bool = False) -> None:
        super().__init__(groups, lr)
        self.inner = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.order = {p: number for number, p in enumerate(self.param_groups[0]["params"])}
        if shared:
            self.inner.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.inner.step()


class Generating(Lion):
    """Draws from a generator of its own."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, lr)
        self.generator = torch.Generator().manual_seed(0)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        torch.rand(1, generator=self.generator)
