"""Reading the weights that model.init names: of a run, of a checkpoint or of a safetensors file."""

import hashlib
from pathlib import Path

from dist_resnet.distributed import from_main, on_main
from dist_resnet.errors import UserError, first_line
from dist_resnet.models.matching import Start, natural
from dist_resnet.paths import user_path
from dist_resnet.schema import ModelConfig
from dist_resnet.weights import evaluated_tensors, find_weights

SAFETENSORS = ".safetensors"


def read_start(config: ModelConfig) -> Start | None:
    """The configured starting weights, as rank 0 reads them; None: random ones.

    Raises:
        UserError: on all ranks, where there are none.
    """
    found: list[Start] = []
    if config.init is None:
        return None
    path = user_path(config.init)
    on_main(lambda: found.append(_read(path)))
    return from_main(found[0] if found else None)


def _read(path: Path) -> Start:
    try:
        if path.suffix == SAFETENSORS:
            return _safetensors(path)
        file, saved = find_weights(path)
    except UserError as error:
        raise UserError(f"model.init={path}: {str(error).removeprefix(f'{path}: ')}") from None
    with file.open("rb") as content:
        checksum = hashlib.file_digest(content, "sha256").hexdigest()
    return Start(str(file), checksum, evaluated_tensors(saved))


def _safetensors(path: Path) -> Start:
    try:
        from safetensors.torch import load
    except ImportError:
        raise UserError("needs a package: pip install 'dist-resnet[export]'") from None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    try:
        tensors = load(content)
    except Exception as error:  # its own, from Rust
        raise UserError(f"not a safetensors file, or damaged: {first_line(error)}") from None
    ordered = {name: tensors[name] for name in natural(tensors)}  # the file keeps no order
    return Start(str(path), hashlib.sha256(content).hexdigest(), ordered)
