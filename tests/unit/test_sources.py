"""Named sources: CIFAR against a local server with a tiny archive, digits, synthetic images."""

import hashlib
import pickle
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_resnet.base.errors import UserError
from dist_resnet.config.builtins import DATASETS
from dist_resnet.data.sources import embedded
from dist_resnet.data.sources.embedded import load_cifar, load_digits, load_synthetic
from dist_resnet.data.sources.table import SOURCES

NAMES = ["airplane", "automobile", "bird"]


def _batch(seed: int, number: int, key: str = "labels") -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (number, 3072), dtype=np.uint8)
    return {"data": data, key: rng.integers(0, 3, number).tolist()}


def _fake(kind: Any, content: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The extracted files of a `kind`, to whose checksums torchvision then holds them."""
    base = root / kind.base_folder
    base.mkdir(parents=True)
    sums = {}
    for name, value in content.items():
        (base / name).write_bytes(pickle.dumps(value))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    for of in ("train_list", "test_list"):
        listed = [[name, sums[name]] for name, _ in getattr(kind, of) if name in sums]
        monkeypatch.setattr(kind, of, listed)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums[kind.meta["filename"]]})
    return base


@pytest.fixture
def fake_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the archive and the extracted files of a CIFAR-10 of 7 + 2 images."""
    from torchvision.datasets import CIFAR10

    root = tmp_path / "site"
    content = {
        "data_batch_1": _batch(1, 4),
        "data_batch_2": _batch(2, 3),
        "test_batch": _batch(3, 2),
        "batches.meta": {"label_names": NAMES},
    }
    base = _fake(CIFAR10, content, root, monkeypatch)
    archive = root / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return root


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(fake_cifar: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from torchvision.datasets import CIFAR10

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(fake_cifar)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}"
    monkeypatch.setattr(CIFAR10, "url", url)
    yield url
    server.shutdown()
    thread.join()
    server.server_close()


def _assert_is_the_fake(image_set: Any) -> None:
    assert image_set.classes == tuple(NAMES)
    expected = [_batch(1, 4), _batch(2, 3)]
    planes = np.concatenate([batch["data"] for batch in expected]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(image_set.train.images, planes.transpose(0, 2, 3, 1))
    assert image_set.train.labels.tolist() == expected[0]["labels"] + expected[1]["labels"]
    assert image_set.test.labels.tolist() == _batch(3, 2)["labels"]
    assert image_set.train.labels.dtype == np.int64
    image_set.validate()


def test_cifar_is_downloaded(site: str, tmp_path: Path, capsys: Any) -> None:
    _assert_is_the_fake(load_cifar("cifar10", None, tmp_path / "new"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"downloading {site} ...\n"


@pytest.mark.parametrize("form", ["root", "extracted", "archive", "root with archive only"])
def test_cifar_from_disk_in_each_form(fake_cifar: Path, tmp_path: Path, form: str) -> None:
    given = fake_cifar
    if form == "extracted":
        given = fake_cifar / "cifar-10-batches-py"
    elif form == "archive":
        given = fake_cifar / "cifar-10-python.tar.gz"
    elif form == "root with archive only":
        (fake_cifar / "cifar-10-batches-py").rename(tmp_path / "elsewhere")
    _assert_is_the_fake(load_cifar("cifar10", given, tmp_path / "extracted"))


def test_cifar100_by_its_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    names = [f"class {i}" for i in range(100)]
    coarse = {"coarse_labels": [19] * 5}
    content = {
        "train": _batch(1, 5, "fine_labels") | coarse,
        "test": _batch(2, 3, "fine_labels") | coarse,
        "meta": {"fine_label_names": names, "coarse_label_names": ["animal"] * 20},
    }
    content["train"]["fine_labels"][0] = 99
    _fake(CIFAR100, content, tmp_path / "site", monkeypatch)
    image_set = load_cifar("cifar100", tmp_path / "site", tmp_path / "new")
    assert image_set.classes == tuple(names)
    assert image_set.train.labels.tolist() == content["train"]["fine_labels"]
    assert image_set.test.labels.tolist() == content["test"]["fine_labels"]
    image_set.validate()


def test_damaged_cifar_on_disk(fake_cifar: Path, tmp_path: Path) -> None:
    (fake_cifar / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"x")
    with pytest.raises(UserError, match="incomplete or damaged"):
        load_cifar("cifar10", fake_cifar, tmp_path / "new")
    archive = fake_cifar / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(UserError, match="MD5"):
        load_cifar("cifar10", archive, tmp_path / "new")
    with pytest.raises(UserError, match="holds neither"):
        load_cifar("cifar100", tmp_path / "nothing", tmp_path / "new")


def test_damaged_download_is_one_line(site: str, fake_cifar: Path, tmp_path: Path) -> None:
    archive = fake_cifar / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot download") as caught:
        load_cifar("cifar10", None, tmp_path / "new")
    assert "\n" not in str(caught.value)


def test_server_without_the_file(site: str, fake_cifar: Path, tmp_path: Path) -> None:
    (fake_cifar / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(UserError, match="404"):
        load_cifar("cifar10", None, tmp_path / "new")


@pytest.mark.parametrize("silence", ["no name", "no answer"])
def test_no_network(
    fake_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silence: str
) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(embedded, "NETWORK_SECONDS", 0.5)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Quiet) as server:  # listens, never serves
        hosts = {"no name": "name.invalid", "no answer": f"127.0.0.1:{server.server_port}"}
        monkeypatch.setattr(CIFAR10, "url", f"http://{hosts[silence]}/cifar-10-python.tar.gz")
        with pytest.raises(UserError, match=r"check the network.*--input") as caught:
            load_cifar("cifar10", None, tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert 2 * embedded.NETWORK_SECONDS < 20


def test_what_a_training_prepares_is_a_source_of_the_size_that_is_told() -> None:
    assert DATASETS.keys() <= SOURCES.keys()
    digits = load_digits()
    assert DATASETS["digits"] == digits.train.images.shape[:3]
    assert DATASETS["cifar10"] == DATASETS["cifar100"] == (50_000, 32, 32)
    # Its size is an option's, so it is told by nobody.
    assert DATASETS["synthetic"] is None


def test_digits_are_those_of_scikit_learn_with_a_fixed_split() -> None:
    from sklearn.datasets import load_digits as original

    image_set = load_digits()
    image_set.validate()
    assert image_set.classes == tuple("0123456789")
    assert len(image_set.train) == 1437
    assert len(image_set.test) == 360
    assert image_set.train.images.shape[1:] == (32, 32, 3)
    counts = np.bincount(original().target)
    np.testing.assert_allclose(np.bincount(image_set.test.labels), counts / 5, atol=1)
    np.testing.assert_array_equal(
        np.bincount(image_set.train.labels) + np.bincount(image_set.test.labels), counts
    )
    assert (
        hashlib.sha256(image_set.test.labels.tobytes()).hexdigest().startswith("89df99af78caf580")
    )
    # Averages over 4x4 blocks give the 8x8 originals back, but for interpolation at edges.
    both = np.concatenate([image_set.train.images, image_set.test.images])
    assert (both[..., 0] == both[..., 2]).all()
    mean = original().images.mean() * 255 / 16
    assert both.mean() == pytest.approx(mean, rel=0.02)


def test_synthetic_is_deterministic_balanced_and_learnable() -> None:
    image_set = load_synthetic(train=400, test=103, classes=7, size=20, seed=5)
    image_set.validate()
    assert image_set.train.images.shape == (400, 20, 20, 3)
    assert np.ptp(np.bincount(image_set.test.labels)) <= 1
    again = load_synthetic(train=400, test=103, classes=7, size=20, seed=5)
    np.testing.assert_array_equal(image_set.train.images, again.train.images)
    other = load_synthetic(train=400, test=103, classes=7, size=20, seed=6)
    assert (image_set.train.images[:] != other.train.images[:]).mean() > 0.9
    assert not (image_set.train.images[:103] == image_set.test.images[:]).all(axis=(1, 2, 3)).any()
    flat = image_set.train.images[:].reshape(400, -1).astype(float)
    centres = np.stack([flat[image_set.train.labels == k].mean(0) for k in range(7)])
    test = image_set.test.images[:].reshape(103, 1, -1).astype(float)
    nearest = ((test - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == image_set.test.labels).mean() == 1.0


def test_synthetic_bytes_are_frozen() -> None:
    image_set = load_synthetic(train=10, test=5, classes=3, size=8, seed=0)
    digest = hashlib.sha256(
        image_set.train.images[:].tobytes() + image_set.test.images[:].tobytes()
    )
    assert digest.hexdigest().startswith("961a24bf41e909ff")


def test_synthetic_is_fast() -> None:
    start = time.process_time()
    load_synthetic(train=50_000, test=10).train.images[:]
    assert time.process_time() - start < 30


@pytest.mark.parametrize(
    "wrong", [{"train": 0}, {"test": -1}, {"classes": 0}, {"size": 70_000}, {"seed": -1}]
)
def test_synthetic_refuses_impossible_numbers(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}: give"):
        load_synthetic(**{"train": 5, "test": 5, **wrong})
