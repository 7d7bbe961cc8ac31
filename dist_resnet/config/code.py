"""The code that a run is a function of: this package's, and what its configuration's names bring.

A run that goes on with other code of a plug-in would end in weights that no code explains: it is
refused, unless run.allow_code_change=true, and then recorded.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import PACKAGE
from dist_resnet.config.load import trajectory_hash
from dist_resnet.config.plugin_code import code_of
from dist_resnet.config.plugins import is_plugin
from dist_resnet.config.schema import Config

OURS = "dist_resnet"
# A run that goes on with another torch says so already, as the built-in parts do.
_TOLD_ELSEWHERE = (OURS, "torch")
_SHOWN = 3


def plugins_of(config: Config) -> list[tuple[str, str]]:
    """(key, name) of every plug-in that decides what the weights are.

    Not data.source: the images themselves are known by their fingerprint.
    """
    extra = [entry["name"] if isinstance(entry, dict) else entry for entry in config.augment.extra]
    named = [("model.name", config.model.name), ("optim.name", config.optim.name)]
    named += [("augment.extra", name) for name in extra]
    return [(key, name) for key, name in named if is_plugin(name)]


def code_of_run(config: Config, teachers: Iterable[Config] = ()) -> dict[str, str]:
    """SHA-256 of this package's sources, and what `plugin_code.code_of` tells of each plug-in.

    Args:
        teachers: configurations of the nets that are learnt from.

    Raises:
        UserError: a name that leads nowhere.
    """
    nets = [("distill.teachers", net.model.name) for net in teachers if is_plugin(net.model.name)]
    return {OURS: own_hash(), **code_of([*plugins_of(config), *nets])}


def own_hash() -> str:
    """SHA-256 over the names and contents of this package's source files."""
    root, digest = PACKAGE, hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def changed_code(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Files and packages of plug-ins that differ; of an older checkpoint nothing is known."""
    names = sorted(before.keys() | now.keys()) if before else []
    return [
        name for name in names if before.get(name) != now.get(name) and name not in _TOLD_ELSEWHERE
    ]


def told_of_code(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line where a run goes on with other code of this package, which is not refused."""
    if not before or before.get(OURS) == now.get(OURS):
        return []
    return ["continued by another version of dist_resnet than the checkpoint's: bits may differ"]


def told_of_net_code(before: Mapping[str, str], name: str) -> list[str]:
    """A line where the net `name` of a checkpoint with the code `before` has other code now."""
    now = code_of([("model.name", name)]) if before and is_plugin(name) else {}
    changed = [file for file in changed_code(before, now) if file in now]
    if not changed:
        return []
    return [
        f"model.name={name}: its code has changed since the checkpoint: {_listed(changed)}; "
        "what it gives may differ"
    ]


def run_hash(config: Config, code: Mapping[str, str]) -> str:
    """16 hexadecimal digits that two runs share when configuration and plug-ins are the same."""
    own = {name: value for name, value in code.items() if name != OURS}
    text = json.dumps([trajectory_hash(config), own], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_code(before: Mapping[str, str], now: Mapping[str, str], allowed: bool) -> list[str]:
    """What changed since a checkpoint's `before`, where that is allowed.

    Raises:
        UserError: it is not; the line names the files.
    """
    changed = changed_code(before, now)
    if changed and not allowed:
        raise UserError(
            f"the run's code or a teacher has changed since its checkpoint: {_listed(changed)}; "
            "put it back (a teacher: name its checkpoint), choose another run.name, or go on with "
            "it all the same: run.allow_code_change=true"
        )
    return changed


def _listed(files: list[str]) -> str:
    return ", ".join(files[:_SHOWN]) + (", ..." if len(files) > _SHOWN else "")
