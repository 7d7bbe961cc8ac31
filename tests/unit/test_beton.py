"""Our view of .beton files against FFCV's own reader and writer, and against damage."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_resnet.base.errors import UserError
from dist_resnet.data.beton import (
    HEADER,
    METADATA,
    METADATA_START,
    check_beton,
    read_back,
    write_beton,
)
from dist_resnet.data.images import Split
from dist_resnet.data.sources.embedded import load_synthetic

# What FFCV itself reads, and what its own writer writes; apart, for its threads and warnings.
FFCV_PROGRAM = """
import sys
import numpy as np, torch
import dist_resnet.data.prepare, dist_resnet.data.stream

torch.set_num_threads(2)
assert "ffcv" not in sys.modules
import dist_resnet.data.ffcv_loader
assert "ffcv" in sys.modules and torch.get_num_threads() == 2

from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter

def read(path):
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(path, batch_size=7, num_workers=1, os_cache=True, drop_last=False,
                    order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    batches = [(images.copy(), labels.copy()) for images, labels in loader]
    return [np.concatenate(parts) for parts in zip(*batches)]

for path in sys.argv[1:]:
    images, labels = read(path)
    np.savez(path + ".npz", images=images, labels=labels[:, 0])
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    page = 1 << max(21, (images[0].nbytes - 1).bit_length())
    writer = DatasetWriter(path + ".own", fields, page_size=page, num_workers=1)
    writer.from_indexed_dataset(list(zip(images, labels[:, 0])))
"""


def _split(number: int, height: int, width: int, classes: int = 5) -> Split:
    rng = np.random.default_rng(number)
    images = rng.integers(0, 256, (number, height, width, 3), dtype=np.uint8)
    return Split(images, rng.integers(0, classes, number))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """20 images of 8x6, labels below 5."""
    write_beton(tmp_path / "small.beton", _split(20, 8, 6))
    return tmp_path / "small.beton"


def _check(path: Path) -> None:
    check_beton(path, 20, 8, 6, 5)


def _refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        _check(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(UserError):
        read_back(path)
    return str(caught.value)


@pytest.mark.timeout(400)  # FFCV compiles its code for each file
def test_ffcv_reads_what_was_written_writes_the_same_and_leaves_torch_its_threads(
    tmp_path: Path,
) -> None:
    # One page, several pages with a rest, an image that fills a page of its own, a single image.
    splits = {
        "one": _split(30, 8, 6),
        "several": _split(1500, 32, 32),
        "large": _split(3, 900, 1000),
        "single": _split(1, 1, 1),
    }
    paths = {name: tmp_path / f"{name}.beton" for name in splits}
    for name, split in splits.items():
        write_beton(paths[name], split)
    command = [sys.executable, "-c", FFCV_PROGRAM, *map(str, paths.values())]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    for name, split in splits.items():
        height, width = split.images.shape[1:3]
        check_beton(paths[name], len(split), height, width, 5)
        ours, theirs = read_back(paths[name]), np.load(f"{paths[name]}.npz")
        for images, labels in ((ours.images, ours.labels), (theirs["images"], theirs["labels"])):
            np.testing.assert_array_equal(images, split.images)
            np.testing.assert_array_equal(labels, split.labels)
        assert Path(f"{paths[name]}.own").read_bytes() == paths[name].read_bytes()


def _damage(path: Path, at: int, value: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value)


def test_a_good_file_passes_and_claims_are_compared(small: Path) -> None:
    _check(small)
    for claim, word in (
        ((19, 8, 6, 5), "holds 20 images of 6x8, not 19"),
        ((20, 6, 8, 5), "of 6x8, not 20 of 8x6"),
        ((20, 8, 6, 2), "labels"),
    ):
        with pytest.raises(UserError, match=word):
            check_beton(small, *claim)


@pytest.mark.parametrize("keep", [0, 1, 24, 2000, 0.01, 0.5, 0.9, -24, -1])
def test_truncated_files(small: Path, keep: float) -> None:
    content = small.read_bytes()
    size = len(content)
    end = int(size * keep) if isinstance(keep, float) else keep % size if keep < 0 else keep
    small.write_bytes(content[:end])
    assert "damaged" in _refusal(small)


def test_files_that_are_something_else(small: Path) -> None:
    size = small.stat().st_size
    small.write_text("image,label\n" * 1000)
    assert "does not begin like" in _refusal(small)
    small.write_bytes(bytes(size))
    assert "does not begin like" in _refusal(small)
    small.write_bytes(np.random.default_rng(0).bytes(size))
    assert "does not begin like" in _refusal(small)
    small.unlink()
    assert "cannot be read" in _refusal(small)
    small.mkdir()
    assert "cannot be read" in _refusal(small)


def test_appended_bytes(small: Path) -> None:
    with small.open("ab") as file:
        file.write(b"x")
    assert "bytes instead of" in _refusal(small)


def test_each_contradiction_is_found(small: Path) -> None:
    content = small.read_bytes()
    table = int(np.frombuffer(content, HEADER, 1)["alloc_table_ptr"][0])
    huge = (2**64 - 1).to_bytes(8, "little")
    second = METADATA_START + METADATA.itemsize
    cases: dict[str, list[tuple[int, bytes]]] = {
        "fields": [(24 + 1, b"x")],
        "raw": [(second, b"\0")],
        "images are": [(second + 1, b"\7")],
        "differ": [(second + 5, huge)],
        "every sample once": [(table, (1).to_bytes(8, "little"))],
        "size of an image": [(table + 16, (145).to_bytes(8, "little"))],
        "behind the end": [(second + 5, huge), (table + 24 + 8, huge)],
        "metadata should be": [(second + 5, bytes(8)), (table + 24 + 8, bytes(8))],
        "overlap": [(second + 5, content[table + 8 : table + 16])]
        + [(table + 24 + 8, content[table + 8 : table + 16])],
        "holds no images": [(8, bytes(8))],
    }
    for word, changes in cases.items():
        small.write_bytes(content)
        for at, value in changes:
            _damage(small, at, value)
        assert word in _refusal(small), word
    small.write_bytes(content)
    for label in (-1, 5):
        _damage(small, second + 16, label.to_bytes(8, "little", signed=True))
        with pytest.raises(UserError, match="labels outside"):
            _check(small)


def test_random_damage_never_does_anything_else(small: Path) -> None:
    content = np.frombuffer(small.read_bytes(), np.uint8)
    table = int(np.frombuffer(content[:24].tobytes(), HEADER)["alloc_table_ptr"][0])
    metadata_end = METADATA_START + 20 * METADATA.itemsize
    places = np.r_[0:60, METADATA_START:metadata_end, table : len(content)]
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = content.copy()
        chosen = rng.choice(places, rng.integers(1, 4))
        changed[chosen] = rng.integers(0, 256, len(chosen), dtype=np.uint8)
        small.write_bytes(changed.tobytes())
        try:
            _check(small)
            read_back(small)
        except UserError:
            refused += 1
    assert refused > 200


def test_images_beyond_ffcv_are_refused(tmp_path: Path) -> None:
    images = np.broadcast_to(np.uint8(0), (1, 40_000, 40_000, 3))  # takes no memory
    with pytest.raises(UserError, match="too large for FFCV"):
        write_beton(tmp_path / "x.beton", Split(images, np.zeros(1, np.int64)))
    assert list(tmp_path.iterdir()) == []


SLICES = [slice(None), slice(3, 9), slice(-4, None), slice(None, None, 3), slice(9, 2, -2)]


@pytest.mark.parametrize(
    "index", [0, 7, -1, np.int64(5), *SLICES, slice(None, None, -1), slice(5, 5)]
)
def test_images_that_are_read_when_asked_for_are_indexed_as_arrays(
    tmp_path: Path, index: Any
) -> None:
    split = _split(20, 8, 6)
    write_beton(tmp_path / "x.beton", split)
    lazy = load_synthetic(20, 1, classes=3, size=5, seed=2).train.images
    for images, whole in (
        (read_back(tmp_path / "x.beton").images, split.images),
        (lazy, np.asarray(lazy)),
    ):
        np.testing.assert_array_equal(images[index], whole[index])
        assert images.shape == whole.shape
    with pytest.raises(IndexError):
        lazy[20]


def test_a_file_that_shrinks_while_it_is_read_is_one_line(small: Path) -> None:
    images = read_back(small).images
    os.truncate(small, 5000)
    with pytest.raises(UserError, match="has become shorter"):
        images[:]
