"""Which of somebody's tensors belongs to which of a net's: by name, by order, or as told."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dist_resnet.base.errors import UserError
from dist_resnet.config.keys import nearest
from dist_resnet.config.schema import ModelConfig

_WRAPPERS = ("network.", "module.", "model.")
_NORMALISATION = {"mean": (1, 3, 1, 1), "scale": (1, 3, 1, 1)}  # of our own exports
_COUNTER = "num_batches_tracked"  # that ours lack
_SHOWN = 3


@dataclass(frozen=True)
class Start:
    """Weights to begin with."""

    file: str
    sha256: str
    """Of the file."""
    tensors: dict[str, Tensor]
    held_out_seen: bool = False
    """Whether they may have been trained on images that the run holds out."""

    def normalisation(self, net: nn.Module) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation of a channel, of values from 0 to 255, in our own exports.

        None where the file has none, or they are tensors of the net itself.
        """
        kept = {name: self.tensors.get(name) for name in _NORMALISATION.keys() - net.state_dict()}
        mean, scale = kept.get("mean"), kept.get("scale")
        if mean is None or scale is None or {mean.shape, scale.shape} != {(1, 3, 1, 1)}:
            return None
        return (mean.flatten() * 255).tolist(), (255 / scale.flatten()).tolist()

    def identity(self) -> dict[str, str]:
        """What a run remembers of it."""
        return {"file": self.file, "sha256": self.sha256}


def start_from(
    model: nn.Module, start: Start, config: ModelConfig, classes: int
) -> tuple[str, list[str]]:
    """Copy the weights into `model`, which tells `classes` apart.

    The last layer stays as it is where it has another number of classes.

    Returns:
        What the reader should know of it, and the names of what stayed.

    Raises:
        UserError: they are not those of this net.
    """
    own = model.state_dict()
    try:
        found, new = matched(own, start.tensors, config.init_map, classes)
    except UserError as error:
        raise UserError(f"model.init={config.init}: {error}") from None
    for name, tensor in found.items():
        own[name].copy_(tensor)
    text = f"starting weights: {start.file} (SHA-256 {start.sha256[:16]})"
    if new:
        layer = new[0].rpartition(".")[0]
        text += f"; {layer} is new, for {own[new[0]].shape[0]} classes"
    return text, new


def matched(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    how: Mapping[str, str] | str,
    classes: int,
) -> tuple[dict[str, Tensor], list[str]]:
    """The given tensors by the net's names, and names of a last layer that stays new.

    Args:
        how: names (the same, but for wrappers before them); order (each takes the next one of its
            last name and shape); or {a prefix of theirs: ours}, the longest that fits.
        classes: outputs of the net's last layer.

    Raises:
        UserError: tensors that are left over, missing or of another shape.
    """
    given = {
        name: tensor
        for name, tensor in given.items()
        if name in own
        or not (_NORMALISATION.get(name) == tuple(tensor.shape) or name.endswith(_COUNTER))
    }
    wanted = [name for name in own if not name.endswith(_COUNTER) or name in given]
    if how == "order":
        pairs = _by_order(own, given, wanted)
    elif isinstance(how, str):
        pairs = _by_name(own, given)
    else:
        pairs = _by_prefix(own, given, how)
    missing = [name for name in wanted if name not in pairs]
    extra = given.keys() - set(pairs.values())
    if missing or extra:
        parts = [f"it lacks {_listed(missing)}"] * bool(missing)
        parts += [f"it has {_listed(sorted(extra))} besides"] * bool(extra)
        hint = "; is it another model, or does it take model.init_map=order?" * (how == "names")
        raise UserError(" and ".join(parts) + hint)
    wrong = [name for name, other in pairs.items() if own[name].shape != given[other].shape]
    if wrong and not _is_last_layer(wrong, own, {n: given[pairs[n]] for n in wrong}, classes):
        first = wrong[0]
        shapes = tuple(given[pairs[first]].shape), tuple(own[first].shape)
        raise UserError(f"{pairs[first]} is of shape {shapes[0]}, and {first} of {shapes[1]}")
    return {name: given[other] for name, other in pairs.items() if name not in wrong}, wrong


def natural(names: Iterable[str]) -> list[str]:
    """In the order of people, layer2 before layer10: of files that keep none."""

    def parts(name: str) -> list[tuple[int, str]]:
        return [(len(p), p) if p.isdigit() else (0, p) for p in re.split(r"([0-9]+)", name)]

    return sorted(names, key=parts)


def _by_name(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, str]:
    pairs = {name: name for name in own if name in given}
    inner = {_unwrapped(name): name for name in given if name not in pairs}
    for name in own:
        if name not in pairs and (other := inner.get(_unwrapped(name))) is not None:
            pairs[name] = other
    return pairs


def _unwrapped(name: str) -> str:
    while wrapper := next((w for w in _WRAPPERS if name.startswith(w)), ""):
        name = name.removeprefix(wrapper)
    return name


def _by_order(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], wanted: list[str]
) -> dict[str, str]:
    pairs, left, last = {}, list(given), []
    for name in wanted:
        kind = _leaf(name), own[name].shape
        found = next((other for other in left if (_leaf(other), given[other].shape) == kind), None)
        if found is None:
            last.append(name)
        else:
            pairs[name] = found
            left.remove(found)
    # What is over on both sides may be a last layer of other classes.
    for name in last:
        kind = _leaf(name), own[name].shape[1:]
        like = [n for n in left if (_leaf(n), given[n].shape[1:]) == kind]
        if len(like) == 1:
            pairs[name] = like[0]
            left.remove(like[0])
    return pairs


def _by_prefix(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], told: Mapping[str, str]
) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for other in given:
        fitting = [p for p in told if other == p or other.startswith(f"{p}.")]
        prefix = max(fitting, key=len, default="")
        name = told[prefix] + other.removeprefix(prefix) if fitting else other
        if name not in own:
            hint = nearest(name, list(own))
            line = f"{other} would be {name}, which the net does not have"
            raise UserError(f"model.init_map: {line}{hint and f'; did you mean {hint}?'}")
        if name in pairs:
            raise UserError(f"model.init_map: both {pairs[name]} and {other} would be {name}")
        pairs[name] = other
    unused = [p for p in told if not any(o == p or o.startswith(f"{p}.") for o in given)]
    if unused:
        hint = nearest(unused[0], sorted({name.rpartition(".")[0] for name in given}))
        raise UserError(
            f"model.init_map: it has nothing of {unused[0]}{hint and f'; did you mean {hint}?'}"
        )
    return pairs


def _is_last_layer(
    wrong: list[str], own: Mapping[str, Tensor], given: Mapping[str, Tensor], classes: int
) -> bool:
    """Whether all are of one layer with an output a class, and differ in their number only."""
    (layer, *others) = {name.rpartition(".")[0] for name in wrong}
    return (
        bool(layer)
        and not others
        and all(
            own[n].ndim and len(own[n]) == classes and own[n].shape[1:] == given[n].shape[1:]
            for n in wrong
        )
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
