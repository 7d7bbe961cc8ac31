"""A prepared data set on disk: `train.beton`, `test.beton` and what `dataset.json` says of them."""

import hashlib
import json
import os
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dist_resnet
from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import printable
from dist_resnet.data.beton import check_beton
from dist_resnet.data.content import Channels, channel_statistics, fingerprint
from dist_resnet.data.decoding import AS_STORED, FITS, Reading, stored_reading
from dist_resnet.data.images import ImageSet

DESCRIPTION = "dataset.json"
TRAIN, TEST = "train.beton", "test.beton"
# Of RGB in 0..1, as torchvision's reference training has them.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Dataset:
    """What `dataset.json` says, and where it lies.

    `mean` and `std`: per channel (R, G, B) over all training pixels, on the scale 0 ... 255; a
    channel that never varies has std 0. `fingerprint`: SHA-256 of pixels, labels and class names,
    independent of how they are stored. `files`: name -> {"bytes": int, "sha256": str}.
    `reading`: how image files became these pixels.
    """

    folder: Path
    name: str
    source: str
    classes: tuple[str, ...]
    num_train: int
    num_test: int
    height: int
    width: int
    mean: Channels
    std: Channels
    fingerprint: str
    files: dict[str, dict[str, Any]]
    created_by: dict[str, str]
    reading: Reading = AS_STORED

    @property
    def train_path(self) -> Path:
        return self.folder / TRAIN

    @property
    def test_path(self) -> Path:
        return self.folder / TEST

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether something was prepared at `folder`; `load` tells whether it is intact."""
        return (folder / DESCRIPTION).is_file()

    @staticmethod
    def load(folder: Path, verify: bool = True) -> "Dataset":
        """Read the description at `folder`; `verify` compares structure and SHA-256 of both files.

        Raises UserError, with the command that mends it, where anything is missing or damaged.
        """
        for _ in range(5):
            before = _stamp(folder)
            try:
                dataset = _read_description(folder)
                if verify:
                    dataset.check_files()
            except UserError:
                if before == _stamp(folder):
                    raise
            else:
                if before == _stamp(folder):
                    return dataset
            # It was replaced meanwhile: description and files may belong to different data sets.
        raise UserError(f"{folder} keeps being replaced; start when its preparation is over")

    def check_not_replaced(self) -> None:
        """Raise UserError if another data set took this one's place since it was loaded.

        For whoever has just opened both files by their paths: from then on they are safe.
        """
        if _read_description(self.folder) != self:
            raise UserError(f"{self.folder} was replaced while it was opened; start again")

    def check_files(self) -> None:
        """Raise UserError unless both .beton files are what the description says."""
        for path, count in ((self.train_path, self.num_train), (self.test_path, self.num_test)):
            try:
                check_beton(path, count, self.height, self.width, len(self.classes))
                intact = file_facts(path) == self.files[path.name]
            except UserError as error:
                reason = str(error).split("; prepare")[0]
                raise UserError(f"{reason}; to mend it: {self.prepare_command}") from None
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}); check it") from None
            if not intact:
                raise UserError(
                    f"{path} is damaged: its SHA-256 is not the one in {DESCRIPTION}; "
                    f"to mend it: {self.prepare_command}"
                )

    def channel_scale(self, chosen: list[Any] | str) -> tuple[Channels, Channels]:
        """Mean and standard deviation that images are normalised by, of each channel, 0 to 255.

        `chosen`: `data.normalisation`: "dataset", "imagenet", or both for RGB in 0..1.
        """
        if chosen == "dataset":
            return self.mean, self.std
        mean, std = IMAGENET if isinstance(chosen, str) else chosen
        (a, b, c), (x, y, z) = ([255.0 * value for value in values] for values in (mean, std))
        return (a, b, c), (x, y, z)

    @property
    def prepare_command(self) -> str:
        """The command that prepares this data set again."""
        fit, bits = self.reading.fit, self.reading.bits
        sized = "" if fit == FITS[0] else f" --resize {self.height} --fit {fit}"
        deep = "" if bits == 16 else f" --bits {bits}"
        details = {"folder": f" --train PATH --test PATH{sized}{deep}", "synthetic": " ..."}
        return (
            f"python -m dist_resnet.data.prepare {self.source}{details.get(self.source, '')} "
            f"--output {shlex.quote(str(self.folder.parent))} "
            f"--name {shlex.quote(self.folder.name)}"
        )


def _stamp(folder: Path) -> tuple[int, int, int] | None:
    """What changes when the folder is replaced by another."""
    try:
        facts = (folder / DESCRIPTION).stat()
    except OSError:
        time.sleep(0.05)  # without an atomic exchange the folder is away for a moment
        return None
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns


def _read_description(folder: Path) -> Dataset:
    path = folder / DESCRIPTION
    remedy = f"prepare it: python -m dist_resnet.data.prepare --help; looked for {path}"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no data set {folder.name!r}; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check it") from None
    except ValueError:
        raise UserError(f"{path} is not JSON; prepare the data set again") from None
    try:
        return Dataset(folder=folder, **_checked(raw))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); prepare the data set again") from None


def _checked(raw: Any) -> dict[str, Any]:
    """The fields of Dataset except `folder`, or KeyError, TypeError, ValueError."""
    kinds: dict[str, type] = {
        **dict.fromkeys(("name", "source", "fingerprint"), str),
        **dict.fromkeys(("num_train", "num_test", "height", "width"), int),
        **dict.fromkeys(("classes", "mean", "std"), list),
        **dict.fromkeys(("files", "created_by"), dict),
    }
    if not isinstance(raw, dict):
        raise TypeError("it is no JSON object")
    for key, kind in kinds.items():
        if key not in raw:
            raise KeyError(f"{key} is missing")
        if not isinstance(raw[key], kind) or (kind is int and not 0 < raw[key] < 1 << 40):
            raise ValueError(f"{key} is {raw[key]!r}")
    if not raw["classes"] or not all(isinstance(name, str) for name in raw["classes"]):
        raise ValueError("classes are no names")
    for key in ("mean", "std"):
        raw[key] = tuple(float(value) for value in raw[key])
        if len(raw[key]) != 3 or not all(0 <= value <= 255 for value in raw[key]):
            raise ValueError(f"{key} is not three numbers in 0 ... 255")
    for name in (TRAIN, TEST):
        if set(raw["files"].get(name, ())) != {"bytes", "sha256"}:
            raise ValueError(f"files lacks {name}")
    return {
        **{key: raw[key] for key in kinds},
        "classes": tuple(map(printable, raw["classes"])),
        "reading": stored_reading(raw.get("reading")),
    }


def describe(folder: Path, image_set: ImageSet, name: str, source: str) -> Dataset:
    """Write `dataset.json` into `folder`, next to both .beton files of `image_set`."""
    mean, std = channel_statistics(image_set.train.images)
    height, width = image_set.train.images.shape[1:3]
    dataset = Dataset(
        folder=folder,
        name=name,
        source=source,
        classes=image_set.classes,
        num_train=len(image_set.train),
        num_test=len(image_set.test),
        height=height,
        width=width,
        mean=mean,
        std=std,
        fingerprint=fingerprint(image_set),
        files={file: file_facts(folder / file) for file in (TRAIN, TEST)},
        created_by={"dist_resnet": dist_resnet.__version__, "numpy": np.__version__},
        reading=image_set.reading,
    )
    content = asdict(dataset)
    del content["folder"]
    with (folder / DESCRIPTION).open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return dataset


def file_facts(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as they stand in `Dataset.files`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
