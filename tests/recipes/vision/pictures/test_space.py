"""Memory that pictures take once they are decoded, and what is there of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.vision.errors import DataError
from recipes.vision.pictures import space
from recipes.vision.pictures.files import FileImages
from recipes.vision.pictures.memory import ArrayImages, packed, read_all
from recipes.vision.sources.file_table import FileTable
from recipes.vision.sources.loading import load_downstream, load_pretext
from tests.support.recipes.image_trees import picture, tree


def test_decoded_bytes_come_from_the_sizes_of_pictures(tmp_path: Path) -> None:
    for number in range(10):
        picture(number, 30, 20).save(tmp_path / f"{number}.jpg")
    images = FileImages(FileTable.of(tmp_path, [f"{number}.jpg" for number in range(10)]))
    assert space.decoded_bytes(images) == read_all(images).nbytes == 10 * 30 * 20 * 3
    assert space.decoded_bytes(ArrayImages(torch.zeros(4, 1, 5, 5, dtype=torch.uint8))) == 100
    (tmp_path / "3.jpg").write_bytes(b"no picture")
    assert space.decoded_bytes(images) == 10 * 30 * 20 * 3


def test_only_a_few_files_are_looked_at(tmp_path: Path) -> None:
    picture(0, 8, 8).save(tmp_path / "x.png")
    assert space.decoded_bytes(FileImages(FileTable.of(tmp_path, ["x.png"] * 100_000))) == 100_000 * 8 * 8 * 3


@pytest.mark.parametrize(
    ("groups", "line", "left"),
    [
        ({"memory.max": "max", "memory.current": "5"}, "0::/", None),
        ({"memory.max": "1000", "memory.current": "400", "memory.stat": "anon 1\ninactive_file 100\n"}, "0::/", 700),
        ({"memory.max": "1000", "memory.current": "400", "memory.stat": "anon 1\n"}, "0::/of/the/host", 600),
        (
            {
                "memory/memory.limit_in_bytes": "900",
                "memory/memory.usage_in_bytes": "1000",
                "memory/memory.stat": "total_inactive_file 50\n",
            },
            "9:cpu,memory:/",
            0,
        ),
        (
            {
                "job/memory.max": "500",
                "job/memory.current": "100",
                "job/memory.stat": "anon 1\n",
                "memory.max": "450",
                "memory.current": "100",
                "memory.stat": "anon 1\n",
            },
            "0::/job/step",
            350,
        ),
    ],
)
def test_the_smallest_limit_of_a_control_group_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: dict[str, str], line: str, left: int | None
) -> None:
    for name, content in groups.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(content + "\n")
    (tmp_path / "own").write_text(f"1:name=systemd:/\n{line}\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8 kB\n")
    monkeypatch.setattr(space, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(space, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(space, "MEMINFO", tmp_path / "meminfo")
    assert space.available_memory() == (8192 if left is None else left)
    monkeypatch.setattr(space, "MEMINFO", tmp_path / "nowhere")
    assert space.available_memory() == left


@pytest.mark.parametrize("storage", ["memory", "auto"])
@pytest.mark.parametrize("load", [load_pretext, load_downstream])
def test_what_does_not_fit_is_refused_with_size_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any, storage: str
) -> None:
    root = tree(tmp_path / "images", {"a": 40, "b": 40})
    options: dict[str, Any] = {"root": tmp_path, "download": False}
    monkeypatch.setattr(space, "available_memory", lambda: 10_000)
    with pytest.raises(DataError, match=r"images take about .* kB .* 10 kB are there; set data.storage to stream"):
        load(f"folder:{root}", storage=storage, **options)
    load(f"folder:{root}", storage="stream", **options)
    monkeypatch.setattr(space, "available_memory", lambda: None)
    load(f"folder:{root}", storage=storage, **options)


def test_packed_pictures_are_what_was_packed() -> None:
    pictures = [torch.full((3, 2, size), size, dtype=torch.uint8) for size in (1, 4, 2)]
    held = packed(pictures)
    assert all(torch.equal(held.at(position), one) for position, one in enumerate(pictures))
    assert len(packed([])) == 0
    # A picture that lies in memory otherwise than by rows.
    turned = torch.arange(12, dtype=torch.uint8).view(2, 2, 3).permute(2, 0, 1)
    assert torch.equal(packed([turned]).at(0), turned)
