"""Two hundred and more damaged images, folders and published sets: a DataError that names the place, or the right data.

A case is made from its number alone, so that one that fails can be made again.
"""

import io
import os
import random
import shutil
import struct
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from recipes.bissl.commands.main import main
from recipes.vision.errors import DataError
from recipes.vision.pictures.decoding import decode
from recipes.vision.sources.published import stl10
from recipes.vision.sources.published.catalog import DATASETS
from tests.support.recipes.dataset_trees import cifar, scaled, small
from tests.support.recipes.image_trees import downstream, labelled, picture, pretext, tree

FORMATS = {"jpg": "JPEG", "png": "PNG", "bmp": "BMP", "webp": "WEBP"}


def encoded(suffix: str, image: Image.Image | None = None, **options: object) -> bytes:
    stored = io.BytesIO()
    (image or picture(7)).save(stored, FORMATS[suffix], **options)
    return stored.getvalue()


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The bytes cut short, flipped, overwritten, doubled, or none."""
    changed = bytearray(content)
    match draw.randrange(6):
        case 0:
            return content[: draw.randrange(len(content))]
        case 1:
            for _ in range(draw.randint(1, 8)):
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        case 2:
            at = draw.randrange(len(changed))
            changed[at : at + 8] = draw.randbytes(8)
        case 3:
            at = draw.randrange(len(changed))
            changed[at:at] = changed[: draw.randint(1, 40)]
        case 4:
            # Headers are where a decoder is told how much to expect.
            changed[draw.randrange(min(60, len(changed)))] = draw.choice((0, 1, 127, 255))
        case _:
            return b""
    return bytes(changed)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge(suffix: str, side: int = 50_000) -> bytes:
    """A header that promises side x side px, and nothing behind it."""
    if suffix == "png":
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    if suffix == "bmp":
        return struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54) + struct.pack(
            "<IiiHHIIiiII", 40, side, side, 1, 24, *[0] * 6
        )
    content = bytearray(encoded("jpg"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(content)


def outcome(read: Callable[[], object], named: str | None) -> str | None:
    """What is wrong with how reading ends; None for a result or a DataError of one line that names the place."""
    try:
        read()
    except DataError as error:
        message = str(error)
        wrong = "\n" in message or (named is not None and named not in message)
        return f"not one line that names {named}: {message}" if wrong else None
    except Exception:
        return traceback.format_exc(limit=-4)
    return None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tree(tmp_path / "images", {"cat": 4, "dog": 4})


@pytest.mark.parametrize("suffix", FORMATS)
def test_mutated_images(suffix: str, tmp_path: Path) -> None:
    whole, file, found = encoded(suffix), tmp_path / f"image.{suffix}", []
    for number in range(40):
        file.write_bytes(mutated(whole, random.Random(f"{suffix} {number}")))
        problem = outcome(lambda: decode(file.read_bytes(), file.name), file.name)
        if problem is not None:
            found.append(f"{number}: {problem}")
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_header_of_50000_px_costs_nothing(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = huge(suffix)

    def decoded(*arguments: object) -> None:
        raise AssertionError("nothing of such an image may be decoded")

    for step in ("load", "convert", "resize"):
        monkeypatch.setattr(Image.Image, step, decoded)
    with pytest.raises(DataError, match=rf"huge\.{suffix}.*(too large|50000 x 50000 px|damaged)"):
        decode(content, f"huge.{suffix}")


def odd_modes() -> dict[str, tuple[bytes, str, str | None]]:
    """name -> (content, suffix, mode as RGB that Pillow itself gives, or None where it is to be refused)."""
    base = picture(3)
    frames = [picture(3), picture(4)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 5000
    return {
        "palette": (encoded("png", base.quantize(7)), "png", "right"),
        "grey": (encoded("png", base.convert("L")), "png", "right"),
        "grey and alpha": (encoded("png", base.convert("LA")), "png", "right"),
        "alpha": (encoded("png", base.convert("RGBA")), "png", "right"),
        "one bit": (encoded("bmp", base.convert("1")), "bmp", "right"),
        "cmyk": (encoded("jpg", base.convert("CMYK")), "jpg", "right"),
        "animated png": (encoded("png", frames[0], save_all=True, append_images=frames[1:]), "png", "right"),
        "animated webp": (encoded("webp", frames[0], save_all=True, append_images=frames[1:]), "webp", "right"),
        "exif": (encoded("jpg", base, exif=exif), "jpg", "a quarter turn right"),
        "broken exif": (encoded("jpg", base, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), "jpg", "right"),
        "wrong suffix": (encoded("webp"), "jpg", "right"),
        "16 bits": (encoded("png", Image.fromarray(np.full((9, 9), 40_000, np.uint16))), "png", None),
        "text": (b"not an image", "png", None),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "png", None),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "png", None),
    }


@pytest.mark.parametrize("name", odd_modes())
def test_odd_kinds_of_images_are_right_or_refused(name: str) -> None:
    content, suffix, expected = odd_modes()[name]
    if expected is None:
        with pytest.raises(DataError, match=rf"odd\.{suffix}"):
            decode(content, f"odd.{suffix}")
        return
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB"))
    found = decode(content, f"odd.{suffix}").permute(1, 2, 0)
    np.testing.assert_array_equal(found, pixels if expected == "right" else np.rot90(pixels, -1))


def loop(folder: Path) -> None:
    (folder / "cat" / "again").symlink_to(folder)


def self_link(folder: Path) -> None:
    (folder / "cat" / "self").symlink_to("self")


FOLDERS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "link to the folder itself": (loop, "again"),
    "link to itself": (self_link, None),
    "image that links to itself": (lambda f: (f / "cat" / "self.png").symlink_to("self.png"), "self.png"),
    "image that links nowhere": (lambda f: (f / "cat" / "gone.png").symlink_to("nowhere.png"), "gone.png"),
    "folder named like an image": (lambda f: (f / "cat" / "x.png").mkdir(), None),
    "class named like an image": (lambda f: (f / "x.png").mkdir(), "x.png"),
    "empty class": (lambda f: (f / "empty").mkdir(), "empty"),
    "class of text": (lambda f: tree(f, {"text": 0}) and (f / "text" / "a.txt").write_text("a"), "text"),
    "one image a class": (lambda f: tree(f, {"rare": 1}), "rare"),
    "empty image": (lambda f: (f / "cat" / "z.png").touch(), "z.png"),
    "hidden mess": (lambda f: tree(f, {".cache": 2}), None),
    "file beside the classes": (lambda f: (f / "notes.png").write_text("x"), None),
    "nested": (lambda f: tree(f / "cat", {"a/b/c/d": 2}), None),
    "split without classes": (lambda f: tree(f, {"train": 3, "val": 3}), "cat"),
    "class of val that train lacks": (
        lambda f: (
            (shutil.move(f / "cat", f / "train" / "cat") if (f / "train").mkdir() else None)
            or (shutil.move(f / "cat", f / "train" / "cat") and shutil.move(f / "dog", f / "val" / "dog"))
        ),
        "dog",
    ),
    "markup in a name": (lambda f: (f / "cat").rename(f / "[red]<b>cat"), None),
    "control characters in a name": (lambda f: (f / "cat").rename(f / "c\x1b[2Jat\n"), None),
    "no class": (lambda f: (shutil.rmtree(f), f.mkdir()), "images"),
    "a file instead": (lambda f: (shutil.rmtree(f), f.write_text("x")), "images"),
    "nothing": (lambda f: shutil.rmtree(f), "images"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_odd_folders(name: str, folder: Path) -> None:
    change, named = FOLDERS[name]
    change(folder)
    for read in (downstream, pretext, labelled):
        problem = outcome(lambda read=read: read(f"folder:{folder}"), named)
        assert problem is None, problem
    if named is not None:
        with pytest.raises(DataError, match=named):
            downstream(f"folder:{folder}")


def test_a_folder_that_cannot_be_listed_is_named_not_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refusing(path: str) -> object:
        if Path(path).name == "inner":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    tree(folder / "cat", {"inner": 2})
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"inner cannot be listed \(Permission denied\)"):
        downstream(f"folder:{folder}")


HEADER = "file,a,b\n"
TABLES: dict[str, tuple[bytes, str | None]] = {
    name: (content if isinstance(content, bytes) else content.encode(), named)
    for name, content, named in [
        ("empty", "", "labels.csv"),
        ("header alone", HEADER, "labels.csv"),
        ("one column", "file\ncat/000.png\n", "labels.csv"),
        ("missing image", HEADER + "cat/000.png,0,1\ncat/x.png,1,0\n", "row 3"),
        ("above the folder", HEADER + "../images/cat/000.png,0,1\n", "row 2"),
        ("absolute", HEADER + "/etc/passwd,0,1\n", "row 2"),
        ("a folder", HEADER + "cat,0,1\n", "row 2"),
        ("no name", HEADER + ",0,1\n", "row 2"),
        ("long name", HEADER + "x" * 5000 + ",0,1\n", "row 2"),
        ("null in a name", HEADER + "a\0b.png,0,1\n", "row 2"),
        ("too few", HEADER + "cat/000.png,0\n", "row 2"),
        ("too many", HEADER + "cat/000.png,0,1,1\n", "row 2"),
        ("twice", HEADER + "cat/000.png,0,1\ncat/000.png,1,1\n", "twice"),
        ("twice by two names", HEADER + "cat/000.png,0,1\n./cat//000.png,1,1\n", "twice"),
        ("no number", HEADER + "cat/000.png,yes,no\n", "row 2"),
        ("not finite", HEADER + "cat/000.png,nan,1\ncat/001.png,1,2\n", "row 2, column 'a'"),
        ("infinite", HEADER + "cat/000.png,0.5,1\ncat/001.png,1,1e400\n", "row 3, column 'b'"),
        ("beyond float32", HEADER + "cat/000.png,0.5,1\ncat/001.png,1,1e39\n", "row 3, column 'b'"),
        ("not utf-8", b"file,a\n\xff\xfe,1\n", "labels.csv"),
        ("utf-16 without its mark", (HEADER + "cat/000.png,0,1\n").encode("utf-16-le"), "row 1"),
        ("utf-32", (HEADER + "cat/000.png,0,1\n").encode("utf-32"), "row 1"),
        ("binary", bytes(range(256)) * 9, "labels.csv"),
        ("open quote", HEADER + '"cat/000.png,0,1\n', "labels.csv"),
        ("long field", HEADER + "x" * 200_000 + ",0,1\n", "labels.csv"),
        ("bars", "file|a\ncat/000.png|1\n", "labels.csv"),
    ]
}


@pytest.mark.parametrize("name", TABLES)
def test_odd_label_tables(name: str, folder: Path) -> None:
    content, named = TABLES[name]
    (folder / "labels.csv").write_bytes(content)
    for read in (downstream, labelled):
        problem = outcome(lambda read=read: read(f"folder:{folder}"), named)
        assert problem is None, problem
        with pytest.raises(DataError):
            read(f"folder:{folder}")


def test_a_label_table_with_marks_quotes_and_blanks_is_read(folder: Path) -> None:
    rows = [f'"{name}/{i:03d}.png", {i % 2} ,1\r\n' for name in ("cat", "dog") for i in range(4)]
    (folder / "labels.csv").write_bytes(b"\xef\xbb\xbf" + b"file,a,b\r\n" + "".join(rows).encode())
    sets = downstream(f"folder:{folder}")
    assert sets.train.classes == ("a", "b")
    every = torch.cat([part.labels for part in (sets.train, sets.val, sets.test) if part.labels is not None])
    assert every.shape == (8, 2)
    assert every.sum(0).tolist() == [4, 8]


@pytest.mark.parametrize("name", ["cub200", "voc2007", "dtd", "pets"])
def test_mutated_lists_of_published_sets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every list, one image and one annotation, mutated; `data verify` says so or finds the set whole, and no other."""
    small(name, tmp_path, monkeypatch)
    lists = sorted(file for file in tmp_path.rglob("*") if file.suffix in (".txt", ".xml"))
    images = sorted(tmp_path.rglob("*.jpg"))
    draw, found = random.Random(name), []
    for number in range(10):
        file = images[draw.randrange(len(images))] if number == 9 else lists[draw.randrange(min(len(lists), 8))]
        whole = file.read_bytes()
        file.write_bytes(mutated(whole, draw))
        problem = outcome(lambda: downstream(name, tmp_path), None)
        if problem is not None:
            found.append(f"{number}, {file.name}: {problem}")
        if number > 7:
            assert main(["data", "verify", name, "--root", str(tmp_path)]) in (0, 2)
            assert "Traceback" not in capsys.readouterr().err
        file.write_bytes(whole)
    assert not found, "\n\n".join(found)


def test_mutated_cifar_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "cifar10", scaled("cifar10", {"train": 50, "test": 10}, 10))
    cifar(tmp_path, CIFAR10, 10)
    file, found = tmp_path / CIFAR10.base_folder / "data_batch_2", []
    whole = file.read_bytes()
    for number in range(40):
        draw = random.Random(f"cifar {number}")
        # The first bytes are opcodes and headers; behind them are pixels, which nothing can check.
        file.write_bytes(mutated(whole[:400], draw) + whole[400:])
        problem = outcome(lambda: downstream("cifar10", tmp_path), None)
        if problem is not None:
            found.append(f"{number}: {problem}")
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("damage", ["short", "long", "empty", "folder", "label 0", "label 11"])
def test_mutated_stl10(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stl10, "STL10_COUNTS", {"train": 20, "test": 20, "unlabeled": 0})
    monkeypatch.setitem(DATASETS, "stl10", scaled("stl10", {"train": 20, "test": 20}, 10))
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(random.Random(split).randbytes(20 * 3 * 96 * 96))
        (folder / f"{split}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(20)))
    assert len(downstream("stl10", tmp_path).test) == 20
    file = folder / ("test_y.bin" if damage.startswith("label") else "train_X.bin")
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        label = bytes([int(damage.split()[-1])]) if damage.startswith("label") else b""
        changed = {"short": content[:-1], "long": content + b"x", "empty": b""}
        file.write_bytes(changed.get(damage, content[:-1] + label))
    with pytest.raises(DataError, match="stl10" if damage.startswith("label") else "train_X.bin") as raised:
        downstream("stl10", tmp_path)
    assert "\n" not in str(raised.value)
