"""Optimizers that somebody could have written, good ones and bad ones."""

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
