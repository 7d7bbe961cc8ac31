"""Write a trained model for other programs: python -m dist_resnet.export CHECKPOINT_OR_RUN
--format safetensors|onnx|torch_export [--output DIR] [--images PREPARED_DATASET]
[--checkpoint newest|best]

The exported model takes RGB images, float32 (N, 3, H, W) in [0, 1], and gives logits (N, K); the
normalisation is inside (for safetensors: its two buffers). Before the file is put in place its
logits are compared with the checkpoint's: on the dataset's test images where --images names one.
Several formats go into one folder; what this command did not write there is never overwritten.
"""

import argparse
import contextlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dist_resnet.base.cli import Parser, run_command
from dist_resnet.base.errors import EXIT_DONE, UserError, one_line
from dist_resnet.base.files import write_atomically
from dist_resnet.base.paths import user_path
from dist_resnet.base.terminal import forgive
from dist_resnet.runs.card import check_place, write_card
from dist_resnet.runs.trained import Classifier, load
from dist_resnet.runs.weights import CHECKPOINTS

TOLERANCE = 1e-4
_NUM_IMAGES = 1000
Logits = Callable[[Tensor], Tensor]
_INSTALL = "pip install 'dist-resnet[export]'"


def main(arguments: Sequence[str]) -> int:
    """Export, compare, write."""
    options = _parse(arguments)
    forgive()  # the result is a file
    # torch.export stores channels-last weights with a warning.
    model = load(options.model, options.checkpoint).to(memory_format=torch.contiguous_format)
    images, origin = _images(model, options.images)
    make, name = _WRITERS[options.format]
    path = options.output / name
    with _writing(path):
        options.output.mkdir(parents=True, exist_ok=True)
        check_place(options.output, name, model)
    # Whole in memory before anything is written: torch aborts the process where a disk is full.
    with _exporting(options.format), warnings.catch_warnings():
        # Of torch's exporters about themselves (2.11): nothing that a user could mend.
        warnings.filterwarnings("ignore", "(?s).*(treespec|buffer is not writable)")
        content, again = make(model)
        error = _compare(model, again, images)
    with _writing(path):
        write_atomically(path, content)
        write_card(options.output, name, model, f"{error:.1e} on {len(images)} {origin}")
    print(f"{path}: logits within {error:.1e} of the checkpoint's on {len(images)} {origin}")
    return EXIT_DONE


@contextlib.contextmanager
def _exporting(kind: str) -> Iterator[None]:
    """Turn what an exporter says of a net that is not ours into a line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--format {kind}: this net cannot be exported so: {one_line(error)}; it must take "
            "batches of any size: x.shape[0], not len(x)"
        ) from None


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path.parent}: is no folder; choose another --output") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written: {reason}; choose another --output") from None


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m dist_resnet.export", __doc__)
    parser.add_argument("model", type=user_path, metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("--format", choices=sorted(_WRITERS), required=True)
    parser.add_argument("--output", type=user_path, default="export", metavar="DIR")
    parser.add_argument("--images", type=user_path, metavar="PREPARED_DATASET", help="data/<name>")
    parser.add_argument(
        "--checkpoint", choices=CHECKPOINTS, default=CHECKPOINTS[0], help="of a run; default newest"
    )
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
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, "test images"


def _compare(model: Classifier, again: Logits, images: Tensor) -> float:
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


def _safetensors(model: Classifier) -> tuple[bytes, Logits]:
    try:
        from safetensors.torch import load, save
    except ImportError:
        raise UserError(f"--format safetensors needs a package: {_INSTALL}") from None
    # Clones, as tied weights share memory, which the format does not have.
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    facts = {
        "classes": json.dumps(model.classes),
        "image_size": json.dumps(model.image_size),
        "step": str(model.step),
    }
    content = save(tensors, metadata=facts | model.description)
    stored = load(content)

    def again(images: Tensor) -> Tensor:
        return torch.func.functional_call(model, stored, (images,), tie_weights=False)

    return content, again


def _onnx(model: Classifier) -> tuple[bytes, Logits]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError(f"--format onnx needs packages: {_INSTALL}") from None
    program = torch.onnx.export(
        model, (_example(model),), dynamo=True, dynamic_shapes=({0: _batch()},), verbose=False
    )
    assert program is not None
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def again(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return content, again


def _torch_export(model: Classifier) -> tuple[bytes, Logits]:
    program = torch.export.export(model, (_example(model),), dynamic_shapes=({0: _batch()},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue(), torch.export.load(io.BytesIO(buffer.getvalue())).module()


def _example(model: Classifier) -> Tensor:
    return torch.zeros(2, 3, *model.image_size)


def _batch() -> torch.export.Dim:
    return torch.export.Dim("batch", min=1)


_WRITERS = {
    "safetensors": (_safetensors, "model.safetensors"),
    "onnx": (_onnx, "model.onnx"),
    "torch_export": (_torch_export, "model.pt2"),
}


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
