"""Map-style Datasets by their names: images and labels of every kind, parts, arguments, seeds, and what is refused."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.vision.errors import DataError
from recipes.vision.pictures.own_dataset import OwnDataset, OwnImages, OwnItem, to_picture
from recipes.vision.sources.foreign.map_style import open_map_style
from recipes.vision.sources.loading import load_downstream, load_pretext
from recipes.vision.sources.sources import Source
from tests.support.recipes.encoded_pictures import ON_ITS_SIDE, by_pillow, encoded, request
from tests.support.recipes.image_trees import picture, tree

NUMBERS = itertools.count()

HEAD = """
import random
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

def drawn(index):
    pixels = np.random.default_rng(index).integers(0, 256, (4 + index % 3, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels)

class Base(Dataset):
    count = 6
    reads = 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        type(self).reads += 1
        return drawn(index), self.given(index)

    def given(self, index):
        return index % 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module of Datasets, each time under another name, and gives that name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        name = f"datasets_of_ones_own_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(HEAD + source)
        return name

    return write


def pictures(source: Source) -> OwnImages:
    assert isinstance(source.images, OwnImages)
    return source.images


def labels(source: Source) -> Any:
    assert source.labels is not None
    return source.labels.tolist()


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
GREY = PIXELS[:, :, :1]
CHANNELS_FIRST = torch.from_numpy(PIXELS).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("value", "channels"),
    [
        (Image.fromarray(PIXELS), 3),
        (CHANNELS_FIRST, 3),
        (CHANNELS_FIRST.contiguous(), 3),
        (CHANNELS_FIRST.float() / 255, 3),
        (CHANNELS_FIRST.double() / 255, 3),
        (CHANNELS_FIRST.float().requires_grad_() / 255, 3),
        (PIXELS, 3),
        (np.asfortranarray(PIXELS), 3),
        (PIXELS[::-1][::-1], 3),
        (PIXELS.astype(np.float32) / 255, 3),
        (PIXELS / 255, 3),
        (CHANNELS_FIRST[:1], 1),
        (CHANNELS_FIRST[0], 1),
        (CHANNELS_FIRST[0].float() / 255, 1),
        (GREY, 1),
        (GREY[:, :, 0], 1),
        (GREY[:, :, 0] / 255, 1),
    ],
)
def test_images_of_every_kind_are_the_same_pixels(value: Any, channels: int) -> None:
    found = to_picture(value, "it")
    assert found.dtype == torch.uint8
    assert torch.equal(found, CHANNELS_FIRST[:channels])
    assert type(found) is torch.Tensor


def test_torchvisions_own_tensors_and_conversions_come_back_as_they_were() -> None:
    from torchvision import tv_tensors
    from torchvision.transforms import ToTensor
    from torchvision.transforms.v2.functional import to_dtype, to_image

    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for value in (ToTensor()(image), to_image(image), to_dtype(to_image(image), torch.float32, scale=True)):
        found = to_picture(value, "it")
        assert found.flatten().tolist() == list(range(256))
        assert not isinstance(found, tv_tensors.TVTensor)


def test_pil_images_are_upright_opaque_and_of_three_channels() -> None:
    import io

    turned = encoded(1, "JPEG", exif_turn=ON_ITS_SIDE)
    assert torch.equal(to_picture(Image.open(io.BytesIO(turned)), "it"), by_pillow(turned))
    clear = Image.new("RGBA", (2, 3), (10, 20, 30, 0))
    assert to_picture(clear, "it").unique().tolist() == [255]
    for mode in ("L", "1", "P", "CMYK", "LA"):
        assert to_picture(picture(0, 5, 7).convert(mode), "it").shape == (3, 7, 5)


@pytest.mark.parametrize(
    ("value", "came"),
    [
        (CHANNELS_FIRST.float(), r"torch.float32 \[3, 6, 4\] from \d+ to 2\d\d: leave out its normalisation"),
        (CHANNELS_FIRST / 127.5 - 1, r"torch.float32 \[3, 6, 4\] from -\d.* to "),
        (CHANNELS_FIRST.float() * float("nan"), r"torch.float32 \[3, 6, 4\] from nan"),
        (CHANNELS_FIRST.long(), r"torch.int64 \[3, 6, 4\]"),
        (CHANNELS_FIRST > 9, r"torch.bool \[3, 6, 4\]"),
        (torch.from_numpy(PIXELS), r"a tensor of torch.uint8 \[6, 4, 3\]"),
        (CHANNELS_FIRST[None], r"a tensor of torch.uint8 \[1, 3, 6, 4\]"),
        (CHANNELS_FIRST[:2], r"a tensor of torch.uint8 \[2, 6, 4\]"),
        (torch.empty(3, 0, 4, dtype=torch.uint8), r"a tensor of torch.uint8 \[3, 0, 4\]"),
        (PIXELS.transpose(2, 0, 1), r"an array of torch.uint8 \[3, 6, 4\]|an array of uint8 \[3, 6, 4\]"),
        (PIXELS.astype(np.int32), r"an array of int32 \[6, 4, 3\]"),
        (PIXELS.astype(np.uint16), r"an array of uint16 \[6, 4, 3\]"),
        (PIXELS > 9, r"an array of bool \[6, 4, 3\]"),
        (Image.fromarray(PIXELS[:, :, 0].astype(np.uint16)), r"more than 8 bits a channel \(mode I;16\)"),
        (Image.fromarray(PIXELS[:, :, 0] / np.float32(255)), r"more than 8 bits a channel \(mode F\)"),
        ({"image": PIXELS}, r"not a dict"),
        ("photo.png", r"not a str"),
        (None, r"not a NoneType"),
    ],
)
def test_images_of_other_kinds_are_refused_with_what_came(value: Any, came: str) -> None:
    with pytest.raises(DataError, match=f"^it .*({came})"):
        to_picture(value, "it")


@pytest.mark.parametrize(
    "keeps",
    [
        "self.targets = [i % 3 for i in range(6)]",
        "self.targets = tuple(i % 3 for i in range(6))",
        "self.targets = torch.arange(6) % 3",
        "self.labels = np.arange(6) % 3",
        "self._labels = list(np.arange(6, dtype=np.uint8) % 3)",
        "self._labels = [torch.tensor(i % 3) for i in range(6)]",
        "self.samples = [(f'{i}.png', i % 3) for i in range(6)]",
        "self.imgs = [(f'{i}.png', i % 3) for i in range(6)]",
        "self.labels, self.targets = ['zero', 'one', 'two'], [i % 3 for i in range(6)]",
        "self.label = lambda index: index % 3",
    ],
)
def test_labels_kept_beside_the_images_are_taken_without_reading_them(
    module: Any, keeps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = module(f"class Own(Base):\n    def __init__(self):\n        {keeps}")
    source = open_map_style(f"{name}:Own", request())
    assert (source.classes, labels(source)) == (("0", "1", "2"), [0, 1, 2, 0, 1, 2])
    assert sys.modules[name].Own.reads <= 4
    assert capsys.readouterr().err == ""


def test_labels_that_come_with_the_images_alone_are_read_once_and_said(
    module: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    name = module("class Own(Base):\n    count = 40")
    for purpose in ("downstream", "pretext", "downstream"):
        source = open_map_style(f"{name}:Own", request(purpose))
        assert labels(source) == [index % 3 for index in range(40)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}:Own keeps no labels")
    assert "all 40 items are read once" in line
    assert sys.modules[name].Own.reads < 50


@pytest.mark.parametrize(
    ("given", "declared", "classes", "expected"),
    [
        ("index % 3", "['x', 'y', 'z', 'never']", ("x", "y", "z", "never"), [0, 1, 2, 0, 1, 2]),
        ("index % 3", "[('tench', 'Tinca'), ('eel',), ('cod',)]", ("tench, Tinca", "eel", "cod"), [0, 1, 2, 0, 1, 2]),
        ("7 + 3 * (index % 2)", "None", ("7", "10"), [0, 1, 0, 1, 0, 1]),
        ("torch.tensor(index % 2)", "None", ("0", "1"), [0, 1, 0, 1, 0, 1]),
        ("np.int64(index % 2)", "[]", ("0", "1"), [0, 1, 0, 1, 0, 1]),
        ("'ab'[index % 2]", "None", ("a", "b"), [0, 1, 0, 1, 0, 1]),
        ("'ab'[index % 2]", "['b', 'a']", ("b", "a"), [1, 0, 1, 0, 1, 0]),
        ("index % 2 == 0", "None", ("False", "True"), [1, 0, 1, 0, 1, 0]),
        ("index / 2", "None", ("0",), [[0.0], [0.5], [1.0], [1.5], [2.0], [2.5]]),
        ("torch.tensor(index / 2)", "['age']", ("age",), [[0.0], [0.5], [1.0], [1.5], [2.0], [2.5]]),
        ("[index / 2, 1]", "['age', 'one']", ("age", "one"), [[i / 2, 1.0] for i in range(6)]),
        ("np.array([index, 0.5])", "None", ("0", "1"), [[float(i), 0.5] for i in range(6)]),
        ("torch.tensor([index > 2, True])", "['big', 'any']", ("big", "any"), [[i > 2, True] for i in range(6)]),
        ("[index > 2, True]", "None", ("0", "1"), [[i > 2, True] for i in range(6)]),
    ],
)
def test_labels_of_every_kind(module: Any, given: str, declared: str, classes: tuple[str, ...], expected: Any) -> None:
    name = module(f"class Own(Base):\n    classes = {declared}\n    def given(self, index):\n        return {given}")
    source = open_map_style(f"{name}:Own", request())
    assert (source.classes, labels(source)) == (classes, expected)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def given(self, index): return [0, 1]", r"labels must be .*, not int and list, such as \[0, 1\]"),
        ("def given(self, index): return [0.5] * (1 + index)", r"labels must be .*, not list"),
        ("def given(self, index): return {'a': 1}", r"labels must be .*, not dict"),
        ("def given(self, index): return index if index % 2 else 'x'", r"labels must be .*, not int and str"),
        ("def given(self, index): return np.zeros((2, 2))", r"labels must be .*, not list"),
        ("classes = ['a', 'b']", r"image 2 has label 2, but the labels of 2 classes run from 0 to 1"),
        ("classes = ['a']\n    def given(self, index): return 'ab'[index % 2]", r"the label 'b', which is not among"),
        ("targets = [1] * 6", r"item 0 comes with the label 0, but its list of labels says 1"),
        ("targets = [0] * 6", r"item 5 comes with the label 2, but its list of labels says 0"),
        ("def given(self, index): return -1 if index == 4 else 0", r"image 4 of its train part has no label"),
        ("def given(self, index): return None if index == 4 else 0", r"image 4 of its train part has no label"),
        (
            "def __getitem__(self, i): return (drawn(i), 1) if i < 3 else drawn(i)",
            r"item 3 has no label, but item 0 has",
        ),
        ("def __getitem__(self, index): return 3", r"the image of item 0 must be a PIL image.*not a int"),
        ("def __getitem__(self, index): return ()", r"the image of item 0 must be a PIL image.*not a tuple"),
        ("def __getitem__(self, index): return {}['photo']", r"item 0 raises KeyError: 'photo'"),
        ("def __init__(self): raise RuntimeError('no disk')", r"making it raises RuntimeError: no disk"),
        ("def __init__(self, root): pass", r"making it raises TypeError: .*root"),
        ("count = 0", r"has no items"),
        ("parts = [1, 2]", r"its parts must be a dictionary of names and indices, not list"),
        ("parts = {'train': [0, 6]}", r"its parts have indices outside 0 to 5"),
        ("parts = {'train': [0, -1]}", r"its parts have indices outside 0 to 5"),
        ("parts = {'train': [0, 1], 'test': [1, 2]}", r"its parts have an item in common"),
        ("parts = {'train': [0, 1], 'test': []}", r"its test part is empty"),
        ("parts = {'train': [0, 1], 'bonus': [2]}", r"the split 'bonus' is none that is known"),
        ("parts = {'val': [0, 1], 'test': [2]}", r"parts val and test, but none to train on"),
        ("parts = {'train': [0, 3], 'test': [1, 2]}", r"its test part has the class '1', which train does not have"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_named(module: Any, body: str, message: str) -> None:
    name = module(f"class Own(Base):\n    {body}")
    with pytest.raises(DataError, match=message) as raised:
        open_map_style(f"{name}:Own", request())
    assert f"{name}:Own" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Own:Missing", r"there is no module 'Own'"),
        ("{module}:Missing", r"has no 'Missing'; its classes: .*Base"),
        ("{module}:Plain", r"gives a Plain: it must be a Dataset with __len__ and __getitem__, or have pretext\(\)"),
        ("{module}:Stream", r"gives a Stream: .*not one that is iterated"),
        ("{module}:number", r"gives a int: it must be a Dataset"),
        ("{module}:made?count=3", r"it is no class or function, and takes no arguments"),
        ("{module}:Base?colour=red", r"making it raises TypeError: .*"),
        ("{module}:Base?count", r"is not of the form 'module:Class'"),
    ],
)
def test_names_that_lead_to_no_dataset(module: Any, name: str, message: str) -> None:
    written = module(
        "class Plain: pass\n"
        "class Stream(IterableDataset):\n    def __iter__(self): return iter([drawn(0)])\n"
        "class Sized(Stream):\n    def __len__(self): return 3\n"
        "number = 3\nmade = Base()\n"
    )
    with pytest.raises(DataError, match=message):
        load_downstream(name.format(module=written), root=".", download=False)


def test_classes_functions_and_instances_with_arguments(module: Any, tmp_path: Path) -> None:
    name = module("""
class Own(Base):
    def __init__(self, count=6, tags=(), train=True, root="", share=None):
        self.count, self.given = count, lambda index: repr((tags, train, root, share))

def build(first):
    return Subset(Base(), [5, first, 3])

made = Base()
""")
    arguments = 'count=4&tags=["a", 1]&train=false&root=/a/b c+d=e.f&share=0.5'
    source = open_map_style(f"{name}:Own?{arguments}", request())
    assert len(pictures(source)) == 4
    assert source.classes == ("(['a', 1], False, '/a/b c+d=e.f', 0.5)",)
    function = open_map_style(f"{name}:build?first=0", request())
    assert labels(function) == [1, 0, 0]
    assert function.classes == ("0", "2")
    assert torch.equal(pictures(function).at(0), pictures(open_map_style(f"{name}:made", request())).at(5))
    folder = tree(tmp_path / "tree", {"a": 3, "b": 2})
    of_torchvision = open_map_style(f"torchvision.datasets:ImageFolder?root={folder}", request())
    assert (of_torchvision.classes, labels(of_torchvision)) == (("a", "b"), [0, 0, 0, 1, 1])
    assert torch.equal(pictures(of_torchvision).at(3), by_pillow((folder / "b" / "000.png").read_bytes()))
    fake = open_map_style("torchvision.datasets:FakeData?size=9&image_size=[3, 6, 7]&num_classes=2", request())
    assert pictures(fake).at(8).shape == (3, 6, 7)
    assert len(labels(fake)) == 9


def test_a_subset_keeps_labels_and_classes_of_its_dataset(module: Any) -> None:
    name = module("""
class Own(Base):
    classes = ["x", "y", "z"]
    targets = [index % 3 for index in range(6)]

def build():
    return Subset(Subset(Own(), [5, 4, 2, 1]), [2, 0, 1])
""")
    source = open_map_style(f"{name}:build", request())
    assert (source.classes, labels(source)) == (("x", "y", "z"), [2, 2, 1])
    assert sys.modules[name].Own.reads <= 4


def test_parts_of_a_dataset(module: Any) -> None:
    for begin in ("parts =", "def parts(self): return"):
        name = module(
            f"class Own(Base):\n    {begin} {{'train': [5, 4, 3], 'valid': torch.tensor([2]), 'test': range(0, 2)}}"
        )
        source = open_map_style(f"{name}:Own", request())
        assert {part: len(positions) for part, positions in source.parts.items()} == {"train": 3, "val": 1, "test": 2}
        assert labels(source) == [2, 1, 0, 2, 0, 1]
        assert [item.index for item in pictures(source).items(range(6))] == [5, 4, 3, 2, 0, 1]
        assert pictures(source).subset(source.parts["test"]).items([1])[0].index == 1
        pretext = open_map_style(f"{name}:Own", request("pretext"))
        assert pretext.labels is None
        assert pictures(pretext).subset(pretext.parts["unlabelled"]).indices.tolist() == [5, 4, 3, 2]


def test_unlabelled_parts_are_for_the_pretext_task_alone(module: Any) -> None:
    name = module("""
class Own(Base):
    parts = {"train": [0, 1, 2], "unlabeled": [3, 4, 5]}
    def given(self, index):
        return -1 if index > 2 else index
class Bare(Base):
    def __getitem__(self, index):
        return drawn(index)
""")
    assert labels(open_map_style(f"{name}:Own", request())) == [0, 1, 2]
    pretext = open_map_style(f"{name}:Own", request("pretext"))
    assert pictures(pretext).subset(pretext.parts["unlabelled"]).indices.tolist() == [3, 4, 5]
    bare = open_map_style(f"{name}:Bare", request("pretext"))
    assert (bare.labels, bare.parts["unlabelled"].tolist()) == (None, list(range(6)))
    with pytest.raises(DataError, match="needs labels"):
        load_downstream(f"{name}:Bare", root=".", download=False)


RANDOM = """
class Own(Base):
    def __init__(self):
        self.shift = (random.random(), np.random.rand(), float(torch.rand(())))
        self.unpicklable = lambda: None
    def __getitem__(self, index):
        draws = [random.random(), np.random.rand(), float(torch.rand(())), *self.shift]
        return np.array([[int(255 * draw) for draw in draws]], dtype=np.uint8), 0
"""


def test_a_dataset_that_draws_gives_the_same_each_time_and_disturbs_no_generator(module: Any) -> None:
    name = module(RANDOM)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    images = pictures(open_map_style(f"{name}:Own", request()))
    first = [images.at(position) for position in range(6)]
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), before[2])
    random.seed(4)
    torch.manual_seed(4)
    assert all(torch.equal(images.at(position), first[position]) for position in reversed(range(6)))
    assert torch.equal(images.subset(torch.tensor([4])).at(0), first[4])
    drawn = [tuple(image.flatten().tolist()) for image in first]
    assert all(len({row[column] for row in drawn}) == 6 for column in range(3))
    assert all(len({row[column] for row in drawn}) == 1 for column in range(3, 6))


def test_another_process_makes_an_instance_of_its_own_and_the_same_pictures(module: Any) -> None:
    images = pictures(open_map_style(f"{module(RANDOM)}:Own", request()))
    items = images.items([3, 0])
    assert len(pickle.dumps(items)) < 500
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.map(OwnItem.picture, items)
    assert all(torch.equal(picture, item.picture()) for picture, item in zip(there, items, strict=True))


def test_threads_that_read_at_once_do_not_disturb_each_other(module: Any) -> None:
    name = module(
        RANDOM.replace("draws =", "time.sleep(0.001); draws =").replace("class Own", "import time\nclass Own")
    )
    images = pictures(open_map_style(f"{name}:Own", request()))
    alone = [item.picture() for item in images.items(range(6))]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(OwnItem.picture, images.items([*range(6)] * 5)))
    assert all(torch.equal(picture, alone[at % 6]) for at, picture in enumerate(together))


def test_labels_that_nobody_wants_are_left_alone(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    name = module(
        "class Own(Base):\n    def given(self, index): return {'no': 'label'}\n"
        "    parts = {'train': [1, 2], 'test': [3]}"
    )
    source = open_map_style(f"{name}:Own", request("pretext"), labelled=False)
    assert (source.labels, source.parts["unlabelled"].tolist()) == (None, [0, 1])
    name = module("class Own(Base):\n    count = 40")
    assert open_map_style(f"{name}:Own", request("pretext"), labelled=False).labels is None
    assert sys.modules[name].Own.reads == 1
    assert capsys.readouterr().err == ""


def test_an_item_that_raises_later_is_named_and_leaves_the_generators_alone(module: Any) -> None:
    name = module(
        "class Own(Base):\n    def __getitem__(self, i):\n        random.seed(0)\n"
        "        return drawn(i), [0, 1][i % 2] if i < 4 else drawn(i).nothing\n"
        "    targets = [0, 1] * 3\n    parts = {'train': [0, 1, 2, 4, 3]}"
    )
    images = pictures(open_map_style(f"{name}:Own", request()))
    state = random.getstate()
    with pytest.raises(DataError, match=rf"{name}:Own: item 4 raises AttributeError: .*nothing"):
        images.at(3)
    assert random.getstate() == state
    dataset = OwnDataset("it", f"{name}:Base", "{}")
    assert OwnItem(dataset, 2).picture().shape == (3, 6, 5)


def test_a_run_takes_a_dataset_by_its_name(module: Any) -> None:
    name = module("class Own(Base):\n    count = 30\n    targets = [index % 3 for index in range(30)]")
    options: dict[str, Any] = dict(root=".", download=False)
    sets = load_downstream(f"{name}:Own", **options)
    assert (len(sets.train), len(sets.val), len(sets.test)) == (18, 4, 8)
    assert len(load_pretext(f"{name}:Own", **options)) == 22
