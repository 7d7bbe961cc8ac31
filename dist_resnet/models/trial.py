"""Forward passes of a net that is thrown away afterwards: what they change, and what they draw.

Shapes: N images of one replica, two replicas' side by side; K classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dist_resnet.base.errors import UserError
from dist_resnet.base.generators import default_states, foreign_states, seeded
from dist_resnet.config.plugins import calling
from dist_resnet.distributed.counters import INTEGERS
from dist_resnet.distributed.flat import has_mean
from dist_resnet.models.norm_act import NormAct
from dist_resnet.models.noted import attributes, first_to_differ, first_to_move, same_bits

_SEED = 1


def broken(name: str, text: str) -> UserError:
    """How the net `name` breaks the contract, for the reader."""
    return UserError(f"model.name={name}: {text}")


class Trial:
    """Tries one net."""

    def __init__(
        self, name: str, model: nn.Module, images: Tensor, classes: int, precision: torch.dtype
    ) -> None:
        """`name`: of the net. `images`: of two replicas, float32 (2 N, 3, H, W)."""
        self.name, self.model, self.images, self.classes = name, model, images, classes
        self.one = images[: len(images) // 2]
        self.device, self.precision = images.device, precision
        self.drew = False
        self.drew_on_cpu = False
        """Whether the last forward pass drew from the default generators, and from the CPU's."""
        self.start = [
            (f"{path}.{key}" if path else key, module._buffers, key, buffer, buffer.clone())
            for path, module in model.named_modules()
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]

    def run(self) -> tuple[bool, str, bool]:
        """Whether it draws, why replicas cannot be side by side, and whether the CPU draws.

        Raises:
            UserError: it breaks the contract.
        """
        keys, foreign = self.model.state_dict().keys(), foreign_states()
        first = self.forward()
        draws, draws_on_cpu = self.drew, self.drew_on_cpu
        moved, held = self._moved_buffers(), attributes(self.model)
        self._check_result(first)
        if self.model.state_dict().keys() != keys:
            extra = min(self.model.state_dict().keys() ^ keys)
            raise self._error(f"{extra} of its state_dict comes or goes with a forward pass")
        self._check_foreign(foreign)
        self._check_buffers(moved)
        second = self.forward()
        self._check_repeated(first, second, held)
        self._check_backward()
        self._check_evaluation()
        return draws, self._why_alone(draws, moved), draws_on_cpu

    def forward(
        self, images: Tensor | None = None, training: bool = True, whole: bool = False
    ) -> Any:
        """What the net gives, from the same buffers and seed whenever it is called.

        Args:
            images: None: one replica's.
            whole: in float32, whatever the training computes in.
        """
        with torch.no_grad():
            for _, holder, key, buffer, value in self.start:
                holder[key] = buffer
                if not same_bits(buffer, value):
                    buffer.copy_(value)
        self.model.train(training)
        lower = self.precision != torch.float32 and not whole
        autocast = torch.autocast(self.device.type, self.precision, enabled=lower)
        try:
            with seeded(_SEED, self.device), calling("model.name", self.name), autocast:
                before = default_states(self.device)
                found = self.model(self.one if images is None else images)
                after = default_states(self.device)
                self.drew, self.drew_on_cpu = after != before, after[0] != before[0]
        except UserError as error:
            if "view size is not compatible" not in str(error):
                raise
            raise UserError(f"{error}; or set precision.channels_last=false") from None
        return found

    def _error(self, text: str) -> UserError:
        return broken(self.name, text)

    def _check_result(self, found: Any) -> None:
        count = len(self.one)
        wanted = f"({count}, {self.classes}) for {count} images"
        if not isinstance(found, Tensor):
            raise self._error(
                f"forward gives a {type(found).__name__}; it must give the logits alone, a tensor "
                f"of shape {wanted}"
            )
        shape = tuple(found.shape)
        if shape != (count, self.classes):
            raise self._error(f"forward gives a tensor of shape {shape}; logits must be {wanted}")
        if not found.is_floating_point():
            raise self._error(f"forward gives {found.dtype}; logits must be floating point")
        if not found.requires_grad:
            raise self._error("its logits have no gradient; leave out no_grad and detach")

    def _check_foreign(self, before: dict[str, str]) -> None:
        moved = [name for name, state in foreign_states().items() if state != before[name]]
        if moved:
            where = first_to_move(self.model, self.forward, lambda: foreign_states()[moved[0]])
            raise self._error(
                f"{where} draws from {moved[0]}; draw from torch's default generator, which is set "
                "for every step"
            )

    def _moved_buffers(self) -> dict[str, Tensor]:
        """Buffers that the last forward pass changed or replaced: their first values, by name."""
        moved = {}
        for name, holder, key, buffer, value in self.start:
            found = holder[key]
            if found is None or found.shape != value.shape or found.dtype != value.dtype:
                raise self._error(f"the buffer {name} changes its shape or type in forward")
            if buffer.requires_grad:
                raise self._error(f"the buffer {name} changes outside of torch.no_grad()")
            if found is not buffer or not same_bits(found, value):
                moved[name] = value
        return moved

    def _check_buffers(self, moved: dict[str, Tensor]) -> None:
        saved = self.model.state_dict()
        for name, value in moved.items():
            if name not in saved:
                raise self._error(
                    f"the buffer {name} changes in training but is not saved; register it "
                    "without persistent=False"
                )
            if value.dtype not in (torch.float32, *INTEGERS):
                kind = str(value.dtype).removeprefix("torch.")
                raise self._error(
                    f"the buffer {name}, of type {kind}, changes in training; make it float32 or "
                    "an integer, of which the replicas' mean is taken"
                )
            if value.dtype == torch.float32 and not has_mean(value):
                raise self._error(
                    f"the buffer {name} changes in training but starts at infinity, NaN or above "
                    "1e30, of which there is no mean; start it at a finite value"
                )

    def _check_repeated(self, first: Tensor, second: Tensor, held: dict[str, Any]) -> None:
        """The second pass, from the same state and seed, was like the first."""
        for name, value in attributes(self.model).items():
            if held.get(name) != value:
                raise self._error(
                    f"{name} changes with every forward pass but is no buffer: a continued run "
                    "would not have it; use register_buffer, and torch's default generator"
                )
        same = same_bits(first, second)
        if self.device.type != "cpu":  # some of a GPU's kernels sum in any order
            same = bool((first - second).abs().max() <= 0.05 * first.abs().max())
        if not same:
            where = first_to_differ(self.model, self.forward)
            raise self._error(
                f"{where} gives something else when it runs again from the same state and seed; "
                "draw from torch's default generator, and keep state in buffers"
            )

    def _check_backward(self) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        logits = self.forward()
        with calling("model.name", self.name):
            torch.autograd.grad(logits.float().square().sum(), parameters, allow_unused=True)

    def _check_evaluation(self) -> None:
        foreign = foreign_states()
        with torch.no_grad():
            found = self.forward(training=False)
        if self.drew or foreign != foreign_states():
            raise self._error(
                "draws random numbers in evaluation, too; give training=self.training to "
                "functions such as dropout"
            )
        if not isinstance(found, Tensor) or found.shape != (len(self.one), self.classes):
            raise self._error("forward gives something else than logits in evaluation mode")
        if moved := self._moved_buffers():
            raise self._error(f"the buffer {min(moved)} changes in evaluation; ask self.training")

    def _why_alone(self, draws: bool, moved: dict[str, Tensor]) -> str:
        if draws:
            return "it draws random numbers"
        # Such a pass gives one value of a buffer, not the sum over replicas that NormAct leaves.
        for name, _, _, _, value in self.start:
            if isinstance(self.model.get_submodule(name.rpartition(".")[0]), NormAct):
                continue
            if name in moved:
                return f"its {name} follows one batch"
            if has_mean(value):
                return f"its {name} is a buffer that the replicas average"
        parts = [self.forward(part, whole=True).detach() for part in self.images.chunk(2)]
        for module in self.model.modules():
            if isinstance(module, NormAct):
                module.replicas = 2
        both, wanted = self.forward(self.images, whole=True).detach(), torch.cat(parts)
        near = (both - wanted).abs().max() <= 1e-3 * wanted.abs().max()
        return "" if bool(near) else "its logits depend on the other images of a batch"
