"""Class folders and archives: what Pillow wrote is what is read; hostile and broken ones refuse."""

import io
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dist_resnet.base.errors import UserError
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.decoding import Decoder, Reading
from dist_resnet.data.images import ImageSet
from dist_resnet.data.sources import folder
from dist_resnet.data.tolerance import Tolerance


def load_folder(train: Path, test: Path, resize: int | None = None, **options: Any) -> ImageSet:
    with tempfile.TemporaryDirectory() as scratch:  # its open file outlives it
        return folder.load_folder(train, test, Path(scratch), resize, **options)


def decode_image(data: bytes, where: str) -> np.ndarray:
    return Decoder()(data, where)


def _encoded(
    array: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: Any
) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def _random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _tree() -> dict[str, bytes]:
    """Names and contents of two classes with two images each, written in no order."""
    names = ("b/2.png", "a/x.png", "b/1.png", "a/y.png")
    return {name: _encoded(_random(i, 8, 8, 3)) for i, name in enumerate(names)}


def _write_tree(root: Path, tree: dict[str, bytes]) -> Path:
    for name, data in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def _pack(path: Path, tree: dict[str, bytes], top: str = "") -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in tree.items():
                archive.writestr(top + name, data)
        return path
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in tree.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return _write_tree(tmp_path / "good", _tree())


def _refusal(train: Path, test: Path, resize: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_folder(train, test, resize)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("top", ["", "train/", "./", "./outer/train/"])
@pytest.mark.parametrize(
    "name", ["folder", "t.tar", "t.tar.gz", "t.tgz", "t.tar.xz", "t.tar.bz2", "t.zip", "noname"]
)
def test_every_container_gives_the_same_images(
    tmp_path: Path, good: Path, name: str, top: str
) -> None:
    if name == "folder":
        path = _write_tree(tmp_path / "other", {top + key: data for key, data in _tree().items()})
    else:
        path = _pack(tmp_path / name, _tree(), top)
    image_set = load_folder(path, good)
    assert image_set.classes == ("a", "b")
    assert image_set.train.labels.tolist() == [0, 0, 1, 1]
    expected = np.stack([_random(seed, 8, 8, 3) for seed in (1, 3, 2, 0)])  # a/x a/y b/1 b/2
    np.testing.assert_array_equal(image_set.train.images, expected)
    np.testing.assert_array_equal(image_set.test.images, expected)
    image_set.validate()


def test_modes_become_rgb() -> None:
    rgb = _random(0, 9, 7, 3)
    grey = _random(1, 9, 7)

    def decoded(data: bytes) -> np.ndarray:
        image = decode_image(data, "x")
        assert image.dtype == np.uint8
        assert image.shape == (9, 7, 3)
        return image

    np.testing.assert_array_equal(decoded(_encoded(rgb)), rgb)
    np.testing.assert_array_equal(decoded(_encoded(grey)), np.stack([grey] * 3, -1))
    bits = np.where(grey > 127, 255, 0).astype(np.uint8)
    np.testing.assert_array_equal(decoded(_encoded(bits, mode="1")), np.stack([bits] * 3, -1))
    palette = Image.fromarray(rgb).quantize(256)
    np.testing.assert_array_equal(
        decoded(_encoded(np.asarray(palette.convert("RGB")))), np.asarray(palette.convert("RGB"))
    )
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    np.testing.assert_array_equal(decoded(buffer.getvalue()), np.asarray(palette.convert("RGB")))
    cmyk = np.zeros((9, 7, 4), np.uint8)
    cmyk[..., 1] = 255  # full magenta ink absorbs green
    buffer = io.BytesIO()
    Image.fromarray(cmyk, "CMYK").save(buffer, "TIFF")
    assert decoded(buffer.getvalue())[0, 0].tolist() == [255, 0, 255]


def test_alpha_is_composited_on_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (200, 0, 0, 0)  # hidden red
    rgba[1, 0] = (0, 0, 0, 51)  # a fifth black
    expected = [[[10, 20, 30], [255] * 3], [[204] * 3, [255] * 3]]
    assert decode_image(_encoded(rgba), "x").tolist() == expected
    grey_alpha = np.dstack(
        [np.full((2, 2), 100, np.uint8), np.array([[255, 0], [0, 255]], np.uint8)]
    )
    assert decode_image(_encoded(grey_alpha), "x")[..., 0].tolist() == [[100, 255], [255, 100]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 200, 0, 0])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        buffer = io.BytesIO()
        palette.save(buffer, kind, transparency=1)
        assert decode_image(buffer.getvalue(), "x").tolist() == [[[1, 2, 3], [255] * 3]]
    keyed = _encoded(np.array([[[9, 9, 9], [1, 2, 3]]], np.uint8), transparency=(1, 2, 3))
    assert decode_image(keyed, "x").tolist() == [[[9, 9, 9], [255] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    deep = np.array([[0, 255, 256, 257], [32768, 65279, 65280, 65535]], np.uint16)
    expected = [[0, 0, 1, 1], [128, 254, 255, 255]]
    image = decode_image(_encoded(deep, kind), "x")
    assert image[..., 0].tolist() == expected
    assert (image[..., 0] == image[..., 1]).all()


def test_depths_without_an_agreed_range_are_refused() -> None:
    for array in (np.ones((2, 2), np.float32), np.full((2, 2), 1 << 20, np.int32)):
        with pytest.raises(UserError, match="8 bits a channel"):
            decode_image(_encoded(array, "TIFF"), "x.tif")


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    rgb = _random(3, 6, 4, 3)
    np.testing.assert_array_equal(decode_image(_encoded(rgb, exif=exif), "x"), rgb[::-1, ::-1])


def test_resize_equals_pillow(tmp_path: Path) -> None:
    tree = {f"a/{i}.png": _encoded(_random(i, 20 + i, 30, 3)) for i in range(3)}
    root = _write_tree(tmp_path / "r", tree)
    image_set = load_folder(root, root, 16)
    original = Image.fromarray(_random(2, 22, 30, 3)).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(image_set.train.images[2], np.asarray(original))
    message = _refusal(root, root)
    assert "a/1.png" in message
    assert "30x21" in message
    assert "30x20" in message
    assert "--resize" in message
    assert "between 1 and 4096" in _refusal(root, root, 0)


def test_test_images_must_have_the_size_of_training_images(tmp_path: Path, good: Path) -> None:
    other = _write_tree(tmp_path / "o", {"a/1.png": _encoded(_random(0, 9, 9, 3))})
    assert "a/1.png" in _refusal(good, other)


def test_litter_is_ignored_and_other_files_are_counted(
    tmp_path: Path, good: Path, capsys: Any
) -> None:
    litter = (".DS_Store", "a/.DS_Store", "a/Thumbs.db", ".git/config", "__MACOSX/a/._x.png")
    tree = _tree() | dict.fromkeys(litter, b"?")
    assert len(load_folder(_write_tree(tmp_path / "l", tree), good).train) == 4
    assert "skipped" not in capsys.readouterr().err
    _write_tree(tmp_path / "l", {"a/notes.txt": b"?", "README": b"?"})
    assert len(load_folder(tmp_path / "l", _pack(tmp_path / "l.zip", tree)).train) == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 1
    assert "skipped 2 files" in lines[0]


def test_class_differences_are_named(tmp_path: Path, good: Path) -> None:
    tree = _tree()
    tree["c/1.png"] = tree.pop("a/x.png")
    del tree["a/y.png"]
    message = _refusal(good, _write_tree(tmp_path / "other", tree))
    assert f"only in {good}: a" in message
    assert f"only in {tmp_path / 'other'}: c" in message


@pytest.mark.parametrize("packed", [False, True])
def test_broken_contents_are_named(tmp_path: Path, good: Path, packed: bool) -> None:
    jpeg = _encoded(_random(0, 64, 64, 3), "JPEG")
    broken = {
        "truncated": ("b/cut.jpg", jpeg[: len(jpeg) // 2], "b/cut.jpg"),
        "text": ("b/text.png", b"hello", "b/text.png"),
        "empty": ("b/empty.png", b"", "b/empty.png"),
        "bad sum": ("b/crc.png", _encoded(_random(0, 8, 8, 3))[:-30] + b"?" * 30, "b/crc.png"),
        "no images": ("c/notes.txt", b"", "c in "),
        "loose": ("loose.png", _encoded(_random(0, 8, 8, 3)), "loose.png"),
    }
    for name, (file, data, expected) in broken.items():
        tree = _tree() | {file: data}
        root = tmp_path / name
        path = _pack(root.with_suffix(".tar"), tree) if packed else _write_tree(root, tree)
        assert expected in _refusal(path, good), name
        assert expected in _refusal(good, path), name


def test_empty_class_folder_is_named(tmp_path: Path, good: Path) -> None:
    empty = _write_tree(tmp_path / "e", {f"train/{key}": data for key, data in _tree().items()})
    (empty / "train" / "zebra").mkdir()
    assert "train/zebra" in _refusal(empty, good)
    with tarfile.open(tmp_path / "e.tar", "w") as tar:
        tar.add(empty, ".")
    assert "train/zebra" in _refusal(tmp_path / "e.tar", good)


def test_folder_of_splits_gets_a_hint(tmp_path: Path, good: Path) -> None:
    tree = {f"{split}/{k}": v for split in ("train", "test") for k, v in _tree().items()}
    root = _write_tree(tmp_path / "s", tree)
    assert f"--train {root}/train --test {root}/test" in _refusal(root, good)


def test_paths_that_hold_no_images(tmp_path: Path, good: Path) -> None:
    assert "does not exist" in _refusal(tmp_path / "nowhere", good)
    (tmp_path / "empty").mkdir()
    assert "has no images" in _refusal(tmp_path / "empty", good)
    (tmp_path / "text.tar").write_text("hello" * 1000)
    assert "intact" in _refusal(tmp_path / "text.tar", good)
    (tmp_path / "nothing.tar.xz").touch()
    assert "intact" in _refusal(tmp_path / "nothing.tar.xz", good)
    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe.png" in _refusal(tmp_path / "pipe.png", good)
    _write_tree(tmp_path / "p", _tree())
    os.mkfifo(tmp_path / "p" / "a" / "pipe.png")
    assert "not a regular file" in _refusal(tmp_path / "p", good)


def test_links_in_a_folder(tmp_path: Path, good: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in "ab":
        (linked / name).symlink_to(good / name)
    assert len(load_folder(linked, good).train) == 4
    (good / "a" / "loop").symlink_to(good / "a")
    assert "loop of symbolic links" in _refusal(good, good)
    (good / "a" / "loop").unlink()
    (good / "a" / "gone.png").symlink_to(good / "nowhere")
    assert "gone.png" in _refusal(good, good)


@pytest.mark.parametrize("name", ["t.tar", "t.tar.gz", "t.tar.xz", "t.tar.bz2", "t.zip"])
def test_damaged_archives(tmp_path: Path, good: Path, name: str) -> None:
    whole = _pack(tmp_path / name, _tree()).read_bytes()
    path = tmp_path / f"damaged-{name}"
    # Four members of 1,024 bytes each, then zeros: without compression only these cuts show.
    cuts = (512, 1024, 1536, 2048, 4096) if name == "t.tar" else (len(whole) // 2, len(whole) - 9)
    for cut in cuts:
        path.write_bytes(whole[:cut])
        _refusal(path, good)
    flipped = bytearray(whole)
    flipped[len(whole) // 4] ^= 255
    path.write_bytes(flipped)
    _refusal(path, good)


def test_damaged_header_inside_a_tar(tmp_path: Path, good: Path) -> None:
    data = bytearray(_pack(tmp_path / "t.tar", _tree()).read_bytes())
    third = [at for at in range(0, len(data), 512) if data[at : at + 2] in (b"a/", b"b/")][2]
    data[third + 150] ^= 1
    (tmp_path / "t.tar").write_bytes(data)
    assert "header is damaged" in _refusal(tmp_path / "t.tar", good)


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [
        ("../evil.png", tarfile.REGTYPE, 0),
        ("a/../../evil.png", tarfile.REGTYPE, 0),
        ("/etc/evil.png", tarfile.REGTYPE, 0),
        ("a/link.png", tarfile.SYMTYPE, 0),
        ("a/hard.png", tarfile.LNKTYPE, 0),
        ("a/device.png", tarfile.CHRTYPE, 0),
        ("a/pipe.png", tarfile.FIFOTYPE, 0),
        ("a/huge.png", tarfile.REGTYPE, 1 << 40),
    ],
)
def test_hostile_tar_members(tmp_path: Path, good: Path, name: str, kind: bytes, size: int) -> None:
    path = _pack(tmp_path / "t.tar", _tree())
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, "/etc/passwd"
    path.write_bytes(info.tobuf() + path.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    assert repr(name) in _refusal(path, good)
    assert sorted(tmp_path.rglob("*")) == before


def test_hostile_zip_members(tmp_path: Path, good: Path) -> None:
    link = zipfile.ZipInfo("a/link.png")
    link.external_attr = 0o120777 << 16
    for name in ("../evil.png", "a\\..\\..\\evil.png", "/etc/evil.png", link):
        path = _pack(tmp_path / "t.zip", _tree())
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"/etc/passwd")
        assert "archive member" in _refusal(path, good)
    path = _pack(tmp_path / "t.zip", _tree())
    data = path.read_bytes()
    path.write_bytes(
        data.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
    )
    assert "encrypted" in _refusal(path, good)


def test_repeated_member_is_refused(tmp_path: Path, good: Path) -> None:
    path = _pack(tmp_path / "t.tar", _tree())
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("a/x.png")
        tar.addfile(info, io.BytesIO())
    assert "a/x.png" in _refusal(path, good)


def test_decompression_bomb(tmp_path: Path, good: Path) -> None:
    for side in (10_000, 20_000):  # Pillow itself only warns about the first
        header = _encoded(np.zeros((8, 8), np.uint8))
        sized = header[:16] + struct.pack(">II", side, side) + header[24:29]
        sized += struct.pack(">I", zlib.crc32(sized[12:29])) + header[33:]
        bomb = _write_tree(tmp_path / str(side), _tree() | {"a/bomb.png": sized})
        assert "a/bomb.png" in _refusal(bomb, good)


def test_a_disguised_format_never_reaches_another_program(tmp_path: Path, good: Path) -> None:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    root = _write_tree(tmp_path / "eps", _tree() | {"a/evil.png": script})
    assert "a/evil.png" in _refusal(root, good)


@pytest.mark.slow
def test_real_cifar10_is_in_the_original_order_of_classes(cifar10: Dataset) -> None:
    """Prepared by `load_folder`, once for all tests."""
    train, test = read_back(cifar10.train_path), read_back(cifar10.test_path)
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    assert " ".join(cifar10.classes) == names
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    flat = np.asarray(train.images[:]).reshape(-1, 3)
    np.testing.assert_allclose(flat.mean(0), (125.307, 122.950, 113.865), atol=1e-3)
    np.testing.assert_allclose(flat.std(0), (62.993, 62.089, 66.705), atol=1e-3)


_XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    b'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"%b</rdf:RDF>'
    b"</x:xmpmeta>"
)


@pytest.mark.parametrize(
    "spelling",
    [
        b' tiff:Orientation="6"/>',
        b" tiff:Orientation='6'/>",
        b" tiff:Orientation = '6' />",
        b"><tiff:Orientation>6</tiff:Orientation></rdf:Description>",
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_orientation_that_stands_in_the_xmp_alone(kind: str, spelling: bytes) -> None:
    """6: the camera was turned to the left, so the picture is turned to the right."""
    rgb = np.zeros((16, 32, 3), np.uint8)
    rgb[:, :16] = (250, 0, 0)
    xmp = _XMP.replace(b"%b", spelling)
    options: dict[str, Any] = {"xmp": xmp}
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options = {"pnginfo": info}
    elif kind == "WEBP":
        options["lossless"] = True
    elif kind == "TIFF":
        options = {"tiffinfo": {700: xmp}}
    image = decode_image(_encoded(rgb, kind, **options), "x").astype(int)
    assert image.shape == (32, 16, 3)
    assert np.abs(image - np.rot90(rgb, -1)).mean() < 8


def test_exif_wins_over_xmp() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    rgb = _random(3, 16, 8, 3)
    data = _encoded(rgb, exif=exif, xmp=_XMP.replace(b"%b", b' tiff:Orientation="6"/>'))
    np.testing.assert_array_equal(decode_image(data, "x"), rgb[::-1, ::-1])


def test_resizing_that_keeps_the_aspect(tmp_path: Path) -> None:
    """A wide image: its middle, or all of it between black bars."""
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20], wide[:, 20:40], wide[:, 40:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    root = _write_tree(tmp_path / "w", {"a/0.png": _encoded(wide)})

    def read(fit: str) -> np.ndarray:
        found = load_folder(root, root, 12, reading=Reading(fit))
        assert found.reading.fit == fit
        return found.train.images[0]

    crop, pad, stretched = read("crop"), read("pad"), read("stretch")
    assert crop.shape == pad.shape == stretched.shape == (12, 12, 3)
    np.testing.assert_array_equal(crop[:, 1:-1], np.broadcast_to(wide[0, 30], (12, 10, 3)))
    assert pad[:4].max() == pad[8:].max() == 0
    np.testing.assert_array_equal(pad[5, [1, 6, 10]], wide[0, [5, 30, 55]])
    np.testing.assert_array_equal(stretched[:, 1], np.broadcast_to(wide[0, 5], (12, 3)))


def test_fewer_bits_than_sixteen(tmp_path: Path) -> None:
    deep = np.array([[0, 15, 16, 4095]], np.uint16)
    root = _write_tree(tmp_path / "w", {"a/0.png": _encoded(deep)})
    assert load_folder(root, root).train.images[0][0, :, 0].tolist() == [0, 0, 0, 15]
    found = load_folder(root, root, reading=Reading(bits=12))
    assert found.train.images[0][0, :, 0].tolist() == [0, 0, 1, 255]


def test_classes_missing_from_the_test_set(tmp_path: Path, good: Path) -> None:
    for tree in ({"b/1.png": _tree()["b/1.png"]}, {"b/deep/1.png": _tree()["b/1.png"]}):
        test = _write_tree(tmp_path / str(len(str(tree))), tree)
        with pytest.raises(UserError, match=r"only in .*good: a; add images, or give --allow-mis"):
            load_folder(good, test)
        found = load_folder(good, test, tolerance=Tolerance(missing=True))
        assert found.classes == ("a", "b")
        assert found.test.labels.tolist() == [1]
        found.validate()


def test_names_that_read_alike_are_refused(tmp_path: Path, good: Path) -> None:
    for name in (os.fsdecode(b"\xe9"), "\\xe9"):
        _write_tree(tmp_path / "t", {f"{name}/1.png": _tree()["b/1.png"]})
    assert "two names read" in _refusal(tmp_path / "t", good)


def test_names_are_the_same_in_every_locale(tmp_path: Path) -> None:
    _write_tree(tmp_path / "t", {f"{name}/1.png": _tree()["b/1.png"] for name in ("é", "a")})
    _pack(tmp_path / "t.tar", {f"{name}/1.png": _tree()["b/1.png"] for name in ("é", "a")})
    program = (
        "import sys, pathlib; from dist_resnet.data.sources.folder import load_folder\n"
        "train, test, scratch = map(pathlib.Path, sys.argv[1:])\n"
        "print(ascii(load_folder(train, test, scratch).classes))"
    )
    command = [sys.executable, "-c", program, tmp_path / "t", tmp_path / "t.tar", tmp_path]
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for environment in ({}, locale):
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        assert done.stdout.strip() == r"('a', '\xe9')", done.stderr
