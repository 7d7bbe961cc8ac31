"""FFCV's .beton files: written, checked and read back without it.

FFCV itself checks nothing when it opens a file: a damaged one gives wrong pixels, a hang or a
segmentation fault. So files are checked here, against the layout below, before FFCV may open them.

    header, 2 field descriptors, metadata (24 bytes a sample), zeros up to a page border,
    pages of raw pixels, allocation table (24 bytes a sample)
"""

import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from dist_resnet.base.errors import UserError
from dist_resnet.data.images import Split, progress, stored_images

VERSION = 2
RAW = 1  # FFCV's number for images stored as plain pixels
MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 31
HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4")]
    + [("num_samples", "<u8"), ("alloc_table_ptr", "<u8")]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
FIELDS = ((2, b"image"), (1, b"label"))  # type numbers of RGBImageField and IntField
IMAGE = [("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")]
METADATA = np.dtype([("image", IMAGE), ("padding", "V3"), ("label", "<i8")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
METADATA_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


def write_beton(path: Path, split: Split) -> None:
    """Write `split` as raw pixels (field `image`) and int64 labels (field `label`), durably.

    The bytes are those of FFCV's own writer, which waits for ever for a worker that has failed.
    Raises UserError where an image does not fit into FFCV's largest page, OSError where the disk
    does not take it.
    """
    count, height, width, _ = split.images.shape
    size = height * width * 3
    page = max(MIN_PAGE, 1 << (size - 1).bit_length())
    if page > MAX_PAGE:
        raise UserError(f"an image of {size:,} bytes is too large for FFCV; resize it")
    per_page = page // size  # no image lies across a border
    first = math.ceil((METADATA_START + count * METADATA.itemsize) / page) * page
    table_at = first + math.ceil(count / per_page) * page
    header = np.array((VERSION, len(FIELDS), page, count, table_at), HEADER)
    fields = np.array([(number, name, b"") for number, name in FIELDS], FIELD)
    metadata, table = np.zeros(count, METADATA), np.zeros(count, ALLOCATION)
    samples = np.arange(count)
    table["sample_id"], table["size"] = samples, size
    table["ptr"] = first + samples // per_page * page + samples % per_page * size
    image = metadata["image"]
    image["mode"], image["width"], image["height"] = RAW, width, height
    image["data_ptr"], metadata["label"] = table["ptr"], split.labels
    numbers = progress(range(count), f"writing {path.name}", count)
    with path.open("wb") as file:
        file.write(b"".join(part.tobytes() for part in (header, fields, metadata)))
        file.write(bytes(first - file.tell()))
        while chosen := list(itertools.islice(numbers, per_page)):
            pixels = np.ascontiguousarray(split.images[chosen[0] : chosen[-1] + 1])
            file.write(pixels.data)
            file.write(bytes(page - pixels.nbytes))
        file.write(table.tobytes())
        file.flush()
        os.fsync(file.fileno())


def check_beton(path: Path, num_samples: int, height: int, width: int, num_classes: int) -> None:
    """Raise UserError unless FFCV can safely read `path` and it holds what is claimed.

    That is `num_samples` raw images of `height` x `width` with labels in [0, num_classes). Pixels
    are not looked at.
    """
    split = read_back(path)
    found, labels = split.images.shape[:3], split.labels
    if found != (num_samples, height, width):
        raise _damaged(
            path,
            f"it holds {found[0]:,} images of {found[2]}x{found[1]}, "
            f"not {num_samples:,} of {width}x{height}",
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise _damaged(path, f"it has labels outside of 0 ... {num_classes - 1}")


def read_back(path: Path) -> Split:
    """The images and labels of a file, in order, read without FFCV: its images when asked for.

    Raises UserError where its structure is damaged.
    """
    try:
        header, metadata, table = _parse(path)
        _check_pixels(path, header, metadata, table)
        image = metadata["image"]
        pointers = image["data_ptr"].astype(np.int64)
        images = stored_images(path, pointers, int(image["height"][0]), int(image["width"][0]))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); prepare it again") from None
    return Split(images, metadata["label"].astype(np.int64))


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}; prepare the data set again")


def _parse(path: Path) -> tuple[Any, Any, Any]:
    """Header, metadata and allocation table. UserError where they contradict the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(METADATA_START)
        if len(start) < METADATA_START:
            raise _damaged(path, f"{size:,} bytes are too few for a .beton file")
        header = np.frombuffer(start, HEADER, 1)[0]
        fields = np.frombuffer(start, FIELD, len(FIELDS), HEADER.itemsize)
        if header["version"] != VERSION or header["num_fields"] != len(FIELDS):
            raise _damaged(path, "it does not begin like a .beton file of images and labels")
        if tuple((int(f["type_id"]), bytes(f["name"])) for f in fields) != FIELDS:
            raise _damaged(path, "its fields are not `image` and `label`")
        count, table_at = int(header["num_samples"]), int(header["alloc_table_ptr"])
        if count == 0:
            raise _damaged(path, "it holds no images")
        expected = table_at + count * ALLOCATION.itemsize
        if size != expected:
            raise _damaged(path, f"it has {size:,} bytes instead of {expected:,}")
        if METADATA_START + count * METADATA.itemsize > table_at:
            raise _damaged(path, "its metadata run into its allocation table")
        metadata = np.frombuffer(file.read(count * METADATA.itemsize), METADATA)
        file.seek(table_at)
        table = np.frombuffer(file.read(count * ALLOCATION.itemsize), ALLOCATION)
    return header, metadata, table


def _check_pixels(path: Path, header: Any, metadata: Any, table: Any) -> None:
    """Every sample has one allocation of the right size, inside the pages, shared with no other."""
    image, count = metadata["image"], len(metadata)
    height, width = int(image["height"][0]), int(image["width"][0])
    if (image["mode"] != RAW).any():
        raise _damaged(path, "its images are not stored as raw pixels")
    if (image["height"] != height).any() or (image["width"] != width).any():
        raise _damaged(path, f"not all of its images are {width}x{height}")
    if not np.array_equal(np.sort(table["sample_id"]), np.arange(count, dtype=np.uint64)):
        raise _damaged(path, "its allocation table does not list every sample once")
    by_sample = table[np.argsort(table["sample_id"])]
    if (by_sample["ptr"] != image["data_ptr"]).any():
        raise _damaged(path, "its metadata and its allocation table differ")
    if (table["size"] != height * width * 3).any():
        raise _damaged(path, "its allocations do not have the size of an image")
    page, size = int(header["page_size"]), height * width * 3
    first = METADATA_START + count * METADATA.itemsize
    starts = np.sort(table["ptr"])
    if page < size or int(starts[0]) < first:
        raise _damaged(path, "pixels lie where metadata should be")
    # Compared with the limit less the size: adding to a huge 64-bit pointer would wrap around.
    if int(starts[-1]) > int(header["alloc_table_ptr"]) - size:
        raise _damaged(path, "pixels lie behind the end of its pages")
    if (np.diff(starts) < size).any():
        raise _damaged(path, "images overlap")
