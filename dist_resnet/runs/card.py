"""The README.md of a folder of exported files, which also remembers what was written there.

Its first line, which Markdown does not show, holds the checksums: what differs from them is
somebody else's and is not overwritten.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.base.files import write_atomically
from dist_resnet.runs.trained import Classifier
from dist_resnet.step.state import weights_sha256

NAME = "README.md"
_LOADABLE = "model.safetensors"
_LOADED = f"\n`dist_resnet.load` takes `{_LOADABLE}`, which says what net it is of.\n"
_BEGIN, _END = "<!-- dist_resnet.export ", " -->\n"


def identity(model: Classifier) -> str:
    """Sixteen hexadecimal digits that two models share when their weights are the same."""
    return weights_sha256(model.state_dict())[:16]


def check_place(folder: Path, name: str, model: Classifier) -> None:
    """Ask whether `name` of `model` may be written into `folder`.

    Raises:
        UserError: it or the card is not what was exported there, or other files are of other
            weights.
    """
    card, known = folder / NAME, _entries(folder)
    remedy = "choose another --output, or move it away"
    if os.path.lexists(card) and known is None:
        raise UserError(f"{card}: not written by this command, or changed since; {remedy}")
    for other, entry in (known or {}).items():
        if other != name and entry["model"] != identity(model) and (folder / other).exists():
            raise UserError(f"{folder / other}: exported from another checkpoint; {remedy}")
    path = folder / name
    if path.exists() and (known or {}).get(name, {}).get("sha256") != _checksum(path):
        raise UserError(f"{path}: not written by this command, or changed since; {remedy}")


def write_card(folder: Path, name: str, model: Classifier, compared: str) -> None:
    """Write the card of all files that were exported to `folder`, `name` being the newest.

    Args:
        compared: how that file was compared with the checkpoint.
    """
    known = {k: entry for k, entry in (_entries(folder) or {}).items() if (folder / k).exists()}
    own = {"sha256": _checksum(folder / name), "model": identity(model), "compared": compared}
    known[name] = own
    text = _text(model, known)
    facts = {"files": known, "card": hashlib.sha256(text.encode()).hexdigest()}
    line = f"{_BEGIN}{json.dumps(facts)}{_END}"
    write_atomically(folder / NAME, (line + text).encode())


def _entries(folder: Path) -> dict[str, dict[str, str]] | None:
    """What the card remembers, by file; None: there is none, or it is not as it was written."""
    try:
        content = (folder / NAME).read_text(encoding="utf-8")
        first, mark, text = content.partition(_END)
        facts: dict[str, Any] = json.loads(first.removeprefix(_BEGIN)) if mark else {}
        if facts["card"] != hashlib.sha256(text.encode()).hexdigest():
            return None
        return dict(facts["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if path.is_file() else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _text(model: Classifier, files: dict[str, dict[str, str]]) -> str:
    height, width = model.image_size
    listed = "\n".join(f"- `{name}`: {entry['compared']}" for name, entry in sorted(files.items()))
    return f"""# {", ".join(sorted(files))}

A classifier of {width}x{height} RGB images, trained by dist_resnet for {model.step:,} steps.

- input: float32 (N, 3, {height}, {width}), RGB in [0, 1]; normalisation is part of the model
- output: logits, float32 (N, {len(model.classes)})
- classes: {", ".join(model.classes)}

Compared with the checkpoint, by the largest difference of a logit:

{listed}
{_LOADED if model.description and _LOADABLE in files else ""}"""
