"""labels.csv as spreadsheets, scripts and people write it: read right, or refused by row and column."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from recipes.vision.errors import DataError
from recipes.vision.sources.label_file import open_label_file
from recipes.vision.sources.sources import Source
from tests.support.recipes.image_trees import counts, downstream, picture, pretext

NAMES = [f"{i}.png" for i in range(6)] + [f"deep/{i}.png" for i in range(6, 12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve files, of which only opening the set needs to know that they are there."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in NAMES:
        (tmp_path / "images" / name).touch()
    return tmp_path / "images"


def opened(folder: Path, table: str | bytes) -> Source:
    content = table if isinstance(table, bytes) else table.encode()
    (folder / "labels.csv").write_bytes(content)
    return open_label_file(str(folder))


def refused(folder: Path, table: str | bytes) -> str:
    with pytest.raises(DataError) as raised:
        opened(folder, table)
    message = str(raised.value)
    assert str(folder / "labels.csv") in message
    assert "\n" not in message
    return message


def labels(source: Source) -> list[object]:
    assert source.labels is not None
    return source.labels.tolist()


TARGETS = [[0.5, -2.0], [1.25, 3.0], [1000.0, 0.0]]
PLAIN = "file,depth,größe\n0.png,0.5,-2\n1.png,1.25,3\ndeep/6.png,1e3,.0\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "table",
    [
        PLAIN,
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", ";").replace(".5", ",5").replace("1.25", "1,25").replace(".0\n", ",0\n"),
        PLAIN.replace("\n", ",,\n") + ",,,,\n,,,,\n",
        "\n\n" + PLAIN.replace("\n", "\n\n"),
        ",,\n" + PLAIN + "\n \n",
        PLAIN.replace("depth", '"depth"').replace("1.png", '"1.png"').replace("1e3", '" 1e3 "'),
        PLAIN.replace(",", " , "),
        PLAIN.replace("deep/6", "deep\\6"),
        PLAIN.replace("deep/6", ".\\deep\\6").replace("0.png", "./0.png"),
    ],
    ids=[
        "commas", "tabs", "semicolons", "decimal commas", "empty tail", "blank lines", "empty first row", "quotes",
        "blanks", "backslashes", "dots",
    ],
)  # fmt: skip
def test_spellings_of_one_table(table: str, end: str, encoding: str, folder: Path) -> None:
    source = opened(folder, table.replace("\n", end).encode(encoding))
    assert source.classes == ("depth", "größe")
    assert source.labels is not None
    assert source.labels.dtype == torch.float32
    assert labels(source) == TARGETS
    assert source.parts["train"].tolist() == [0, 1, 2]


def test_big_endian_utf_16_is_read(folder: Path) -> None:
    assert labels(opened(folder, b"\xfe\xff" + PLAIN.encode("utf-16-be"))) == TARGETS


def test_header_may_name_classes_with_the_other_delimiters(folder: Path) -> None:
    assert opened(folder, 'file;"a;b";c,d\n0.png;1;0\n').classes == ("a;b", "c,d")
    assert opened(folder, 'file,"a;b;c",d\n0.png,1,0\n').classes == ("a;b;c", "d")
    assert opened(folder, "file\ta b\tc;d\n0.png\t1\t0\n").classes == ("a b", "c;d")


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "mac-roman"])
def test_code_pages_are_refused_by_row(encoding: str, folder: Path) -> None:
    assert "row 1 holds a byte 0x" in refused(folder, PLAIN.encode(encoding))
    message = refused(folder, "file,kind\r\n0.png,a\r\n\r\n1.png,grün\r\n".encode(encoding))
    assert "row 4 holds a byte 0x" in message
    assert 'save it as "CSV UTF-8"' in message


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_without_its_mark_is_refused(encoding: str, folder: Path) -> None:
    for table in (PLAIN.replace("größe", "size"), PLAIN):
        message = refused(folder, table.encode(encoding))
        assert "row 1 holds a" in message
        assert 'save it as "CSV UTF-8"' in message


def test_utf_16_cut_short_is_refused(folder: Path) -> None:
    assert "row 4 holds a byte 0x0A that is not UTF-16" in refused(folder, PLAIN.encode("utf-16")[:-1])


@pytest.mark.parametrize(
    "first", ["0.png,1", "deep/6.png,0.5", "gone.JPG,cat", "deep\\7.png,1", '"0.png","dog"', "0.png;1", "a.tif\tx"]
)
def test_no_header_loses_no_image(first: str, folder: Path) -> None:
    message = refused(folder, f"{first}\n1.png,0\n2.png,1\n")
    assert "has no header: its first row names the image" in message
    assert "file,label" in message


def test_no_header_where_names_have_no_suffix(folder: Path) -> None:
    (folder / "0001").touch()
    assert "has no header" in refused(folder, "0001,1\n1.png,0\n")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("file,a,a", "columns 2 and 3 are both called 'a'"),
        ("file,a, a ", "columns 2 and 3 are both called 'a'"),
        ("file,file,a", "columns 1 and 2 are both called 'file'"),
        ("file,,a", "column 2 has no name"),
        (",a,b", "column 1 has no name"),
        ("file, ,b", "column 2 has no name"),
        ("file,split,a,SPLIT", "at most one called split"),
        ("file,split", "one column or more for the labels"),
        ("file", "needs a header"),
        (",,", "needs a header"),
        ("file|a", "separated by commas, semicolons or tabs"),
    ],
)
def test_headers_that_name_no_columns(header: str, said: str, folder: Path) -> None:
    width = header.count(",")
    rows = "".join(f"{name}{',1' * width}\n" for name in NAMES[:3])
    if header == ",,":
        rows = ""
    assert said in refused(folder, f"{header}\n{rows}")


def test_rows_are_numbered_as_in_the_file(folder: Path) -> None:
    assert "row 5 has 2 values, but the header has 3" in refused(folder, "file,a,b\n\n0.png,1,0\n\n1.png,1\n")
    assert "row 4 has 4 values" in refused(folder, "file,a,b\r\n\r\n0.png,1,0\r\n1.png,1,0,7\r\n")
    assert "row 6 names" in refused(folder, '\n\nfile,"a\nb"\n0.png,1\ngone.png,0\n')
    assert "in rows 2 and 5" in refused(folder, "file,a\n0.png,1\n,\n\n./0.png,1\n")
    assert "in rows 2 and 3" in refused(folder, "file,a\ndeep/6.png,1\ndeep\\6.png,1\n")
    assert "row 4, column 'b'" in refused(folder, "file,a,b\n0.png,1,2\n\n1.png,1,x\n")


def test_quotes_that_do_not_end(folder: Path) -> None:
    assert "row 3 cannot be read" in refused(folder, 'file,kind\n0.png,a\n1.png,"b\n2.png,a\n')
    assert "row 2 cannot be read" in refused(folder, 'file,kind\n"0.png,a\n1.png,b\n')


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0.png,1,\n", "row 2, column 'b': the value is missing"),
        ("0.png,1,0\n1.png,,0\n", "row 3, column 'a': the value is missing"),
        ("0.png,0.5,0\n1.png,1, \n", "row 3, column 'b': the value is missing"),
        ("0.png,0.5,0\n1.png,NaN,0\n", "row 3, column 'a': NaN stands for a missing value"),
        ("0.png,1,0\n1.png,1,n/a\n", "row 3, column 'b': n/a stands for a missing value"),
        ("0.png,1,0\n1.png,1,inf\n", "row 3, column 'b': inf is no finite number"),
        ("0.png,-Infinity,0\n", "row 2, column 'a': -Infinity is no finite number"),
        ("0.png,1,0\n1.png,3,1e39\n", "row 3, column 'b': 1e39 is no finite number in 32 bits"),
        ("0.png,1,1e400\n", "row 2, column 'b': 1e400 is no finite number"),
        ("0.png,1,1_000\n", "row 2, column 'b': '1_000' is no number"),
        ("0.png,1,0x1\n", "row 2, column 'b': '0x1' is no number"),
        ("0.png,1,cat\n", "row 2, column 'b': 'cat' is no number; for class names keep a single column"),
        ('0.png,1,"0,5"\n', "row 2, column 'b': 0,5 has a decimal comma"),
    ],
)
def test_values_that_are_no_targets(rows: str, said: str, folder: Path) -> None:
    assert said in refused(folder, "file,a,b\n" + rows)


@pytest.mark.parametrize("name", ["kind", "label", "Class", "LABEL", "a"])
def test_a_column_of_words_is_the_class(name: str, folder: Path) -> None:
    source = opened(folder, f"file,{name}\n0.png,dog\n1.png, cat \n2.png,10\n3.png,dog\n")
    assert source.classes == ("10", "cat", "dog")
    assert labels(source) == [2, 1, 0, 2]
    assert source.labels is not None
    assert source.labels.dtype == torch.int64


@pytest.mark.parametrize("name", ["label", "class", "Label", "CLASS"])
def test_whole_numbers_called_label_are_classes_in_their_order(name: str, folder: Path) -> None:
    source = opened(folder, f"file,{name}\n0.png,10\n1.png,9\n2.png,-1\n3.png,9\n")
    assert source.classes == ("-1", "9", "10")
    assert labels(source) == [2, 1, 0, 1]
    binary = opened(folder, f"file;{name}\n0.png;1\n1.png;0\n")
    assert (binary.classes, labels(binary)) == (("0", "1"), [1, 0])
    padded = opened(folder, f"file,{name}\n0.png,010\n1.png,007\n")
    assert (padded.classes, labels(padded)) == (("007", "010"), [1, 0])


def test_numbers_under_another_name_are_no_classes(folder: Path) -> None:
    binary = opened(folder, "file,red\n0.png,1\n1.png,0\n")
    assert (binary.classes, labels(binary)) == (("red",), [[True], [False]])
    assert labels(opened(folder, "file,count\n0.png,10\n1.png,9\n")) == [[10.0], [9.0]]
    # "none" is a word among words, and a missing value among numbers.
    assert opened(folder, "file,kind\n0.png,none\n1.png,cat\n").classes == ("cat", "none")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("file,label\n0.png,0.5\n1.png,0.7\n", "row 2, column 'label': 0.5 is neither the name of a class nor a whole"),
        ("file,label\n0.png,1\n1.png,2.0\n", "row 3, column 'label': 2.0 is neither"),
        ("file,a\n0.png,cat\n1.png,0.7\n", "row 3, column 'a': 0.7 is neither"),
        ("file,label\n0.png,1\n1.png,01\n", "the same number as"),
        ("file,label\n0.png,cat\n1.png,\n", "row 3, column 'label': the value is missing"),
        ("file,label\n0.png,cat\n1.png,nan\n", "row 3, column 'label': nan stands for a missing value"),
        ("file,label\n0.png,1\n1.png,NA\n", "row 3, column 'label': NA stands for a missing value"),
        ("file,depth\n0.png,0.5\n1.png,None\n", "row 3, column 'depth': None stands for a missing value"),
        ("file,label\n0.png,1\n1.png,inf\n", "row 3, column 'label': inf is neither"),
        ("file\tdepth\n0.png\t0,5\n1.png\t0,7\n", "row 2, column 'depth': 0,5 has a decimal comma"),
    ],
)
def test_values_that_are_no_classes(table: str, said: str, folder: Path) -> None:
    assert said in refused(folder, table)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone.png", r"row 2 names .*gone\.png, which is missing"),
        ("deep", "row 2 names .*deep, which is missing"),
        ("", "row 2 names no image"),
        ("../images/0.png", "which is not a path below the folder"),
        ("..\\images\\0.png", "which is not a path below the folder"),
        ("/etc/passwd", "which is not a path below the folder"),
        ("C:\\pictures\\0.png", "which is missing"),
        ("x" * 5000, "which is missing"),
    ],
)
def test_images_that_are_not_there(name: str, said: str, folder: Path) -> None:
    (folder / "labels.csv").write_text(f"file,a\n{name},1\n1.png,0\n")
    with pytest.raises(DataError, match=said):
        open_label_file(str(folder))


def test_a_backslash_that_belongs_to_the_name_is_kept(folder: Path) -> None:
    (folder / "deep\\6.png").touch()
    source = opened(folder, "file,a\ndeep\\6.png,1\ndeep/6.png,0\n")
    assert labels(source) == [[True], [False]]


@pytest.mark.parametrize(
    "words", [("train", "val", "test"), ("Training", "valid", "TEST"), (" train", "Dev", "testing ")]
)
@pytest.mark.parametrize("name", ["split", "Split"])
def test_a_column_of_parts(words: tuple[str, str, str], name: str, folder: Path) -> None:
    order = [0, 1, 2, 0, 0, 2]
    rows = "".join(f"{i}.png,{words[part]},{i % 2}\n" for i, part in enumerate(order))
    source = opened(folder, f"file,{name},label\n{rows}")
    assert {part: there.tolist() for part, there in source.parts.items()} == {
        "train": [0, 3, 4],
        "val": [1],
        "test": [2, 5],
    }
    assert (source.classes, labels(source)) == (("0", "1"), [0, 1, 0, 1, 0, 1])


def test_parts_that_are_none(folder: Path) -> None:
    assert "row 3, column 'split': 'extra' is neither" in refused(
        folder, "file,a,split\n0.png,1,train\n1.png,1,extra\n"
    )
    assert "row 2, column 'split': '' is neither" in refused(folder, "file,a,split\n0.png,1,\n1.png,1,train\n")
    assert "leaves no image to the train part" in refused(folder, "file,a,split\n0.png,1,val\n1.png,1,test\n")


def test_single_labels_are_split_capped_and_scored_as_class_folders_are(tmp_path: Path) -> None:
    rows = ["file;Label"]
    for i in range(40):
        picture(i).save(tmp_path / f"{i:02d}.png")
        rows.append(f"{i:02d}.png;{'cat' if i % 2 else 'dog'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    sets = downstream(f"folder:{tmp_path}")
    assert (sets.kind, sets.train.classes) == ("single-label", ("cat", "dog"))
    assert [counts(part) for part in (sets.train, sets.val, sets.test)] == [[12, 12], [3, 3], [5, 5]]
    assert counts(downstream(f"folder:{tmp_path}", labels_per_class=4).train) == [4, 4]
    fixed = [row + (";test" if i > 30 else ";train") if i else f"{row};split" for i, row in enumerate(rows)]
    (tmp_path / "labels.csv").write_text("\n".join(fixed))
    sets = downstream(f"folder:{tmp_path}")
    assert sorted(sets.indices["test"]) == list(range(30, 40))
    assert len(pretext(f"folder:{tmp_path}")) == 30


def test_one_class_is_refused(tmp_path: Path) -> None:
    for i in range(10):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,cat\n" for i in range(10)))
    with pytest.raises(DataError, match="has a single class, 'cat'"):
        downstream(f"folder:{tmp_path}")


def test_table_that_cannot_be_read(folder: Path) -> None:
    (folder / "labels.csv").mkdir()
    with pytest.raises(DataError, match=r"labels\.csv cannot be read \(Is a directory\)"):
        open_label_file(str(folder))


def test_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    (tmp_path / "set").mkdir()
    for i in range(12):
        picture(i).save(tmp_path / "set" / f"{i}.png")
    (tmp_path / "set" / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,{i % 2}\n" for i in range(12)))
    assert downstream("folder:~/set").train.classes == ("0", "1")
