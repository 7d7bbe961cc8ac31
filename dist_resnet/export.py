"""Write a trained model for other programs: python -m dist_resnet.export CHECKPOINT_OR_RUN
--format safetensors|onnx|torch_export [--output DIR] [--images PREPARED_DATASET]

The exported model takes RGB images, float32 (N, 3, H, W) in [0, 1], and gives logits (N, K); the
normalisation is inside (for safetensors: its two buffers). Before the file is put in place its
logits are compared with the checkpoint's: on the dataset's test images where --images names one.
Several formats go into one folder; what this command did not write there is never overwritten.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_resnet.card import check_place, write_card
from dist_resnet.cli import run_command
from dist_resnet.errors import EXIT_DONE, UserError
from dist_resnet.trained import Classifier, load

TOLERANCE = 1e-4
_NUM_IMAGES = 1000
_INSTALL = "pip install 'dist-resnet[export]'"


def main(arguments: Sequence[str]) -> int:
    """Export, compare, write."""
    options = _parse(arguments)
    # torch.export stores channels-last weights with a warning.
    model = load(options.model).to(memory_format=torch.contiguous_format)
    images, origin = _images(model, options.images)
    options.output.mkdir(parents=True, exist_ok=True)
    write, name = _WRITERS[options.format]
    check_place(options.output, name, model)
    path = Path(os.path.realpath(options.output / name))  # a link stays
    temporary = path.with_name(f".tmp.{os.getpid()}.{name}")
    try:
        with warnings.catch_warnings():
            # Of torch's exporters about themselves (2.11): nothing that a user could mend.
            warnings.filterwarnings("ignore", "(?s).*(treespec|buffer is not writable)")
            again = write(model, temporary)
        error = _compare(model, again, images)
        temporary.chmod(0o644)  # safetensors makes it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    compared = f"{error:.1e} on {len(images)} {origin}"
    write_card(options.output, name, model, compared)
    done = f"logits within {error:.1e} of the checkpoint's on {len(images)} {origin}"
    print(f"{options.output / name}: {done}")
    return EXIT_DONE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dist_resnet.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("--format", choices=sorted(_WRITERS), required=True)
    parser.add_argument("--output", type=Path, default=Path("export"), metavar="DIR")
    parser.add_argument("--images", type=Path, metavar="PREPARED_DATASET", help="data/<name>")
    return parser.parse_args(arguments)


def _images(model: Classifier, dataset: Path | None) -> tuple[Tensor, str]:
    """Images to compare on, float32 (N, 3, H, W) in [0, 1], and what they are."""
    height, width = model.image_size
    if dataset is None:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(_NUM_IMAGES, 3, height, width, generator=generator), "random images"
    from dist_resnet.data.beton import read_back
    from dist_resnet.data.dataset import Dataset

    found = Dataset.load(dataset)
    if (found.height, found.width) != model.image_size:
        raise UserError(f"{dataset}: its images are not {width}x{height}, as the model's are")
    pixels = read_back(found.test_path).images[:_NUM_IMAGES]
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2) / 255, "test images"


def _compare(model: Classifier, again: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Largest difference of a logit; refuses a file that predicts anything else."""
    with torch.inference_mode():
        wanted = model(images)
        got = torch.cat([again(part) for part in images.split(100)])
    error = float((wanted - got).abs().max())
    if error > TOLERANCE or not torch.equal(wanted.argmax(1), got.argmax(1)):
        raise UserError(
            f"the exported model differs from the checkpoint by {error:.1e}; not written"
        )
    return error


def _write_safetensors(model: Classifier, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        raise UserError(f"--format safetensors needs a package: {_INSTALL}") from None
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    facts = {
        "classes": json.dumps(model.classes),
        "image_size": json.dumps(model.image_size),
        "step": str(model.step),
    }
    save_file(tensors, path, metadata=facts)
    stored = load_file(path)

    def again(images: Tensor) -> Tensor:
        return torch.func.functional_call(model, stored, (images,))

    return again


def _write_onnx(model: Classifier, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError(f"--format onnx needs packages: {_INSTALL}") from None
    program = torch.onnx.export(
        model, (_example(model),), dynamo=True, dynamic_shapes=({0: _batch()},), verbose=False
    )
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def again(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return again


def _write_torch_export(model: Classifier, path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (_example(model),), dynamic_shapes=({0: _batch()},))
    with path.open("wb") as file:
        torch.export.save(program, file)
    with path.open("rb") as file:
        loaded = torch.export.load(file).module()
    return loaded


def _example(model: Classifier) -> Tensor:
    return torch.zeros(2, 3, *model.image_size)


def _batch() -> torch.export.Dim:
    return torch.export.Dim("batch", min=1)


_WRITERS = {
    "safetensors": (_write_safetensors, "model.safetensors"),
    "onnx": (_write_onnx, "model.onnx"),
    "torch_export": (_write_torch_export, "model.pt2"),
}


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
