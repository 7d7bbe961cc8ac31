"""FFCV's .beton files: written by FFCV, checked and read back without it.

FFCV itself checks nothing when it opens a file: a damaged one gives wrong pixels, a hang or a
segmentation fault. And its writer waits for ever for a worker process that has failed. So the
worker's function runs in this process, where an exception is an exception; and files are checked
here, against the layout below, before FFCV may open them.

    header, 2 field descriptors, metadata (24 bytes a sample), zeros up to a page border,
    pages of raw pixels, allocation table (24 bytes a sample)
"""

import contextlib
import importlib
import itertools
import os
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_resnet.base.errors import UserError
from dist_resnet.data.images import Split, StoredImages, progress

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


class _Damaged(Exception):
    """What is wrong with a file, in words that continue "damaged: "."""


def write_beton(path: Path, split: Split) -> None:
    """Write `split` as raw pixels (field `image`) and int64 labels (field `label`).

    The same split gives the same bytes. The file appears under its name only when it is complete,
    checked and on disk. Raises UserError where FFCV cannot be imported or an image does not fit
    into FFCV's largest page, OSError where the disk does not take it.
    """
    height, width = split.images.shape[1:3]
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        _write(temporary, split, f"writing {path.name}")
        check_beton(temporary, len(split), height, width, int(split.labels.max()) + 1)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, split: Split, what: str) -> None:
    ffcv_writer, ffcv_fields, ffcv_memory = _import_ffcv()
    sample_bytes = int(np.prod(split.images.shape[1:]))
    page = max(MIN_PAGE, 1 << (sample_bytes - 1).bit_length())
    if page > MAX_PAGE:
        raise UserError(f"an image of {sample_bytes:,} bytes is too large for FFCV; resize it")
    fields = {"image": ffcv_fields.RGBImageField(write_mode="raw"), "label": ffcv_fields.IntField()}
    writer = ffcv_writer.DatasetWriter(str(path), fields, page_size=page, num_workers=1)
    writer.num_samples = len(split)
    shared = ffcv_writer.shared_memory
    try:
        # Without workers the metadata need not be shared; and /dev/shm is small in containers.
        ffcv_writer.shared_memory = SimpleNamespace(
            SharedMemory=lambda create, size: SimpleNamespace(buf=bytearray(size))
        )
        writer.prepare()
    finally:
        ffcv_writer.shared_memory = shared
    samples = iter(progress(range(len(split)), what, len(split)))
    allocations: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
    ffcv_writer.worker_job_indexed_dataset(
        SimpleNamespace(get=lambda: [(i, i) for i in itertools.islice(samples, 256)] or None),
        writer.metadata_sm,
        writer.metadata_type,
        writer.fields,
        _Pages(ffcv_memory.MemoryAllocator(writer.fname, writer.data_region_start, page)),
        SimpleNamespace(value=0, get_lock=contextlib.nullcontext),  # samples done
        allocations,
        _Samples(split),
    )
    writer.finalize(allocations.get_nowait())


class _Pages:
    """FFCV's memory allocator, except for how it ends after an exception.

    FFCV's then writes its page once more: on a full disk that fails again and leaves the file open;
    after Ctrl-C it may trip an assertion, or wait for ever for a page that is already written.
    """

    def __init__(self, allocator: Any) -> None:
        self._allocator = allocator
        self.malloc = allocator.malloc
        self.set_current_sample = allocator.set_current_sample
        self.allocations = allocator.allocations

    def __enter__(self) -> None:
        self._allocator.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._allocator.flush_page()
        finally:
            self._allocator.fp.close()


class _Samples:
    """What FFCV's writer indexes: (image, label) pairs."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.split.images[index], int(self.split.labels[index])


def _import_ffcv() -> tuple[Any, Any, Any]:
    """FFCV's writer, fields and memory allocator."""
    from dist_resnet.data.ffcv_import import import_ffcv  # numba takes half a second

    try:
        import_ffcv()
        names = ("ffcv.writer", "ffcv.fields", "ffcv.memory_allocator")
        writer, fields, memory = (importlib.import_module(name) for name in names)
    except ImportError as error:
        raise UserError(f"cannot import ffcv ({error}); run `make setup`") from error
    return writer, fields, memory


def check_beton(path: Path, num_samples: int, height: int, width: int, num_classes: int) -> None:
    """Raise UserError unless FFCV can safely read `path` and it holds what is claimed.

    That is `num_samples` raw images of `height` x `width` with labels in [0, num_classes). Pixels
    are not looked at.
    """
    try:
        header, metadata, table = _parse(path)
        if len(metadata) != num_samples:
            raise _Damaged(f"it holds {len(metadata):,} images, not {num_samples:,}")
        _check_pixels(header, metadata, table, height, width)
        labels = metadata["label"]
        if labels.min() < 0 or labels.max() >= num_classes:
            raise _Damaged(f"it has labels outside of 0 ... {num_classes - 1}")
    except _Damaged as error:
        raise UserError(f"{path} is damaged: {error}; prepare the data set again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); prepare it again") from None


def _parse(path: Path) -> tuple[Any, Any, Any]:
    """Header, metadata and allocation table. _Damaged where they contradict the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(METADATA_START)
        if len(start) < METADATA_START:
            raise _Damaged(f"{size:,} bytes are too few for a .beton file")
        header = np.frombuffer(start, HEADER, 1)[0]
        fields = np.frombuffer(start, FIELD, len(FIELDS), HEADER.itemsize)
        if header["version"] != VERSION or header["num_fields"] != len(FIELDS):
            raise _Damaged("it does not begin like a .beton file of images and labels")
        if tuple((int(f["type_id"]), bytes(f["name"])) for f in fields) != FIELDS:
            raise _Damaged("its fields are not `image` and `label`")
        count, table_at = int(header["num_samples"]), int(header["alloc_table_ptr"])
        if table_at == 0:
            raise _Damaged("it was not written to its end")
        if count == 0:
            raise _Damaged("it holds no images")
        expected = table_at + count * ALLOCATION.itemsize
        if size != expected:
            raise _Damaged(f"it has {size:,} bytes instead of {expected:,}")
        if METADATA_START + count * METADATA.itemsize > table_at:
            raise _Damaged("its metadata run into its allocation table")
        metadata = np.frombuffer(file.read(count * METADATA.itemsize), METADATA)
        file.seek(table_at)
        table = np.frombuffer(file.read(count * ALLOCATION.itemsize), ALLOCATION)
    return header, metadata, table


def _check_pixels(header: Any, metadata: Any, table: Any, height: int, width: int) -> None:
    """Every sample has one allocation of the right size, inside the pages, shared with no other."""
    image, count = metadata["image"], len(metadata)
    if (image["mode"] != RAW).any():
        raise _Damaged("its images are not stored as raw pixels")
    if (image["height"] != height).any() or (image["width"] != width).any():
        raise _Damaged(f"not all of its images are {width}x{height}")
    if not np.array_equal(np.sort(table["sample_id"]), np.arange(count, dtype=np.uint64)):
        raise _Damaged("its allocation table does not list every sample once")
    by_sample = table[np.argsort(table["sample_id"])]
    if (by_sample["ptr"] != image["data_ptr"]).any():
        raise _Damaged("its metadata and its allocation table differ")
    if (table["size"] != height * width * 3).any():
        raise _Damaged("its allocations do not have the size of an image")
    page, size = int(header["page_size"]), height * width * 3
    first = METADATA_START + count * METADATA.itemsize
    starts = np.sort(table["ptr"])
    if page < size or int(starts[0]) < first:
        raise _Damaged("pixels lie where metadata should be")
    # Compared with the limit less the size: adding to a huge 64-bit pointer would wrap around.
    if int(starts[-1]) > int(header["alloc_table_ptr"]) - size:
        raise _Damaged("pixels lie behind the end of its pages")
    if (np.diff(starts) < size).any():
        raise _Damaged("images overlap")


def read_back(path: Path) -> Split:
    """The images and labels of a file, in order, read without FFCV: its images when asked for.

    Raises UserError where its structure is damaged; see `check_beton`.
    """
    try:
        header, metadata, table = _parse(path)
        height, width = (int(metadata["image"][key][0]) for key in ("height", "width"))
        _check_pixels(header, metadata, table, height, width)
        pointers = metadata["image"]["data_ptr"].astype(np.int64)
        images = StoredImages(path, pointers, height, width)
    except _Damaged as error:
        raise UserError(f"{path} is damaged: {error}; prepare the data set again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); prepare it again") from None
    return Split(images, metadata["label"].astype(np.int64))
