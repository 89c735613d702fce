"""What files may not do: run code, name code, leave their folder, cost memory by a header, or become markup."""

import hashlib
import io
import json
import pickle
import re
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from rich.console import Console
from safetensors.torch import save
from torchvision.datasets import CIFAR10

from bilevel.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from recipes.bissl.commands.main import main
from recipes.bissl.outcome.console_table import comparison_lines, results_table
from recipes.bissl.outcome.report import write_report
from recipes.bissl.outcome.summary import ArmResult, assemble
from recipes.bissl.training.costs import read_stage
from recipes.experiment.artifacts import INFO, WEIGHTS, ArtifactError
from recipes.experiment.errors import ConfigError
from recipes.experiment.terminal import printable
from recipes.vision.errors import DataError
from recipes.vision.networks.weight_files import read_weights
from recipes.vision.sources.image_cache import read_cache
from recipes.vision.sources.published.archives import unpack
from recipes.vision.sources.published.catalog import DATASETS
from tests.support.recipes.dataset_trees import cifar, scaled
from tests.support.recipes.image_trees import downstream, picture, pretext, tree
from tests.support.recipes.small_runs import files, refused, small_config


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm.txt"),))


@pytest.fixture(autouse=True)
def standing_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder to stand in, in which the payload leaves nothing, and from which nothing is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    assert not (tmp_path / "harm.txt").exists()
    sys.modules.pop("planted", None)


def planted_zip() -> bytes:
    """A file of torch.save whose table of objects was exchanged by hand for the payload's."""
    whole, changed = io.BytesIO(), io.BytesIO()
    torch.save({"conv1.weight": torch.ones(2)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(changed, "w") as new:
        for item in old.infolist():
            planted = item.filename.endswith("data.pkl")
            new.writestr(item, pickle.dumps(Payload(), 2) if planted else old.read(item))
    return changed.getvalue()


def saved(value: object, **options: Any) -> bytes:
    stored = io.BytesIO()
    torch.save(value, stored, **options)
    return stored.getvalue()


PLANTED: dict[str, bytes] = {
    "object beside weights": saved({"state_dict": {"conv1.weight": torch.ones(2)}, "extra": Payload()}),
    "old format": saved({"conv1.weight": Payload()}, _use_new_zipfile_serialization=False),
    "zip edited by hand": planted_zip(),
    "plain pickle": pickle.dumps(Payload()),
    "plain pickle, protocol 0": pickle.dumps({"state_dict": Payload()}, 0),
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("name", ["w.pt", "w.ckpt", "w", "w.safetensors"])
def test_planted_weights_are_refused_unrun(kind: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(name).write_bytes(PLANTED[kind])
    with pytest.raises(ConfigError, match=name):
        read_weights(Path(name))
    assert name in refused(capsys, "--init-backbone", name, "--output-dir", "run")
    assert not Path("run").exists()


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_checkpoint_is_refused_unrun(kind: str) -> None:
    """Its manifest is right: whoever plants a payload can count its bytes too."""
    content = PLANTED[kind]
    path = save_checkpoint("steps", 7, {"x": torch.ones(1)})
    path.write_bytes(content)
    manifest = {"step": 7, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=path.name):
        load_checkpoint("steps")


def artifact(folder: Path, content: bytes, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(content)
    facts = {"format": 1, "stage": "pretext", "key": "k", "sha256": hashlib.sha256(content).hexdigest()}
    facts |= {"pretext_steps": 1, "label_steps": 0, "seconds": 1.0, **changes}
    (folder / INFO).write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_artifact_is_refused_unrun(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = artifact(Path("a"), PLANTED[kind])
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_stage(folder).tensors()
    assert "a/weights.safetensors" in refused(capsys, "head", "--from", "a")
    assert "a/weights.safetensors" in refused(capsys, "--init-backbone", "a")


@pytest.mark.parametrize("name", ["stage", "key", "sha256", "pretext_steps", "label_steps", "seconds"])
@pytest.mark.parametrize("value", [None, [], {"a": []}, "<b>"])
def test_facts_of_another_type_are_refused(name: str, value: Any) -> None:
    folder = artifact(Path("a"), save({"backbone.x": torch.ones(1)}), **{name: value})
    if isinstance(value, str) and name in ("stage", "key", "sha256"):
        value = 3
        facts = json.loads((folder / INFO).read_text())
        (folder / INFO).write_text(json.dumps(facts | {name: value}))
    with pytest.raises(ArtifactError, match=rf"a/artifact\.json is damaged: {name} is"):
        read_stage(folder)


def test_facts_nested_without_end_are_refused() -> None:
    folder = artifact(Path("a"), b"")
    (folder / INFO).write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match=r"artifact\.json cannot be read"):
        read_stage(folder)


def test_planted_cifar_batch_and_image_cache_are_refused_unrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "cifar10", scaled("cifar10", {"train": 50, "test": 10}, 10))
    cifar(Path(), CIFAR10, 10)
    (Path(CIFAR10.base_folder) / "data_batch_3").write_bytes(pickle.dumps({"data": Payload(), "labels": []}))
    with pytest.raises(DataError, match="data_batch_3"):
        downstream("cifar10", Path())
    Path("cache").mkdir()
    Path("cache/sets.json").write_text(json.dumps({"train": {"count": 1}, "val": {"count": 1}}))
    for name in ("train-images", "train-labels", "val-images", "val-labels"):
        Path(f"cache/{name}.npy").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DataError, match="image cache"):
        read_cache(Path("cache"))


NAMES = [
    "../out.txt",
    "a/../../out.txt",
    "/planted-by-a-test/out.txt",
    "..\\out.txt",
    "C:\\out.txt",
    "//host/share/out.txt",
    "a/..",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tgz"])
def test_archives_stay_in_their_folder(name: str, suffix: str) -> None:
    Path("in").mkdir()
    archive = Path("in", f"planted{suffix}")
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as stored:
            stored.writestr(name, b"out")
    else:
        with tarfile.open(archive, "w:gz" if suffix.endswith("gz") else "w") as stored:
            member = tarfile.TarInfo(name)
            member.size = 3
            stored.addfile(member, io.BytesIO(b"out"))
    before = files(Path())
    with pytest.raises(DataError, match="outside its folder"):
        unpack(archive, Path("in/to"))
    assert files(Path()) == before
    assert not Path("/planted-by-a-test").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_of_archives_are_not_made(kind: bytes) -> None:
    """A link first, and a file to be written through it next."""
    Path("secret").mkdir()
    with tarfile.open("planted.tar", "w") as stored:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = kind, "../secret"
        stored.addfile(link)
        through = tarfile.TarInfo("link/x.txt")
        through.size = 1
        stored.addfile(through, io.BytesIO(b"x"))
    with pytest.raises(DataError, match="link or device"):
        unpack(Path("planted.tar"), Path("to"))
    assert not list(Path("secret").iterdir())


def plant_module() -> None:
    Path("planted.py").write_text("from pathlib import Path\nPath('imported.txt').touch()\nclass Task: pass\n")


def test_names_of_code_in_checkpoints_artifacts_and_data_are_not_imported(capsys: pytest.CaptureFixture[str]) -> None:
    plant_module()
    name, state = "planted:Task", {"backbone.x": torch.ones(1)}
    weights = save(state, metadata={"backbone": name, "task": name})
    folder = artifact(Path("a"), weights, stage=name, task=name, backbone=name, initial_weights={"file": name})
    assert read_stage(folder).tensors()
    assert read_weights(folder).tables
    Path("w.pt").write_bytes(saved({"state_dict": state, "task": name, "hyper_parameters": {"_target_": name}}))
    assert read_weights(Path("w.pt")).tables
    save_checkpoint("steps", 1, {"task": name, "state": state})
    found = load_checkpoint("steps")
    assert found is not None
    assert found[1]["task"] == name
    data = tree(Path("data"), {name: 5, "other": 5})
    assert name in downstream(f"folder:{data}").train.classes
    (data / "labels.csv").write_text(f"file,{name}\n" + "".join(f"{name}/00{i}.png,{i % 2}\n" for i in range(5)))
    assert pretext(f"folder:{data}").classes == (name,)
    assert name in refused(capsys, "head", "--from", "a")
    assert not Path("imported.txt").exists()
    assert "planted" not in sys.modules


@pytest.mark.parametrize("place", ["option", "config file"])
def test_only_the_command_line_and_a_config_file_name_code(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    plant_module()
    Path("c.json").write_text('{"pretext": {"task": "planted:Task"}}')
    given = ["--pretext.task", "planted:Task"] if place == "option" else ["--config", "c.json"]
    assert "is not a subclass of PretextTask" in refused(capsys, *given, "--dry-run")
    assert Path("imported.txt").exists()


HOSTILE = "</code></pre><script>alert(1)</script><img src=x onerror=alert(1)>`|$\\input{x}%&\x1b[2J[bold]"


class Tags(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}


def harmless(page: str) -> None:
    tags = Tags(page)
    assert not tags.seen & {"script", "img", "iframe", "object", "link"}
    assert not {name for name in tags.attributes if name.startswith("on")}


def hostile_results() -> dict[str, Any]:
    scores = {"top1": [50.0, 51.0]}
    arms = {name: ArmResult(scores, 3, 4, 5.0) for name in ("bissl", "baseline", HOSTILE)}
    found = assemble(HOSTILE, range(2), "finetune", "top1", arms, {HOSTILE: HOSTILE}, higher_is_better={"top1": True})
    return {**found, "notes": [HOSTILE]}


def hostile_run(folder: Path) -> Path:
    folder.mkdir()
    changes = {"data": {"downstream": f"folder:{HOSTILE}", "pretext": f"folder:{HOSTILE}"}}
    config = json.loads(small_config().model_dump_json())
    config = {**config, "data": {**config["data"], **changes["data"]}}
    (folder / "config.json").write_text(json.dumps({**config, "classes": [HOSTILE]}))
    (folder / "results.json").write_text(json.dumps(hostile_results()))
    event = {"stage": "finetune", "variant": HOSTILE, "seed": 0, "event": "epoch", "step": 1, HOSTILE: HOSTILE}
    (folder / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    return folder


def test_hostile_names_are_words_in_the_report_and_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    run = hostile_run(Path("run"))
    report = write_report(run).read_text()
    harmless(report)
    assert "&lt;script&gt;" in report
    assert main(["table", str(run), "--to", "tables"]) == 0
    harmless(Path("tables/table.html").read_text())
    harmless(MarkdownIt("commonmark", {"html": True}).enable("table").render(Path("tables/table.md").read_text()))
    latex = Path("tables/table.tex").read_text()
    outside = "\n".join(line for line in latex.splitlines() if not line.startswith("%"))
    assert r"\input" not in outside
    assert r"\textbackslash{}input\{x\}\%\&" in outside
    commands = set(re.findall(r"\\[a-zA-Z]+", outside))
    known = "begin end item caption hline textbackslash textasciitilde textasciicircum pm"
    assert commands <= {f"\\{name}" for name in known.split()}
    assert not re.search(r"(?<!\\)%", outside)
    assert "\x1b" not in capsys.readouterr().out


def test_hostile_names_are_words_in_the_model_card() -> None:
    run = hostile_run(Path("run"))
    config = json.loads((run / "config.json").read_text())
    del config["classes"]
    (run / "config.json").write_text(json.dumps(config))
    weights = save({"backbone.x": torch.ones(1)})
    facts = {
        "variant": HOSTILE,
        "seed": 0,
        "test": {HOSTILE: 1.0},
        "initial_weights": {"file": HOSTILE, "sha256": HOSTILE},
    }
    artifact(run / "checkpoints" / "finetune-k", weights, stage="finetune", **facts)
    argument = str(run / "checkpoints" / "finetune-k")
    assert main(["export", argument, "--to", "out", "--licence", HOSTILE]) == 0
    card = Path("out/MODEL_CARD.md").read_text()
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(card)
    harmless(rendered)
    assert rendered.count("&lt;script&gt;") >= 6


def test_names_are_no_commands_for_the_console() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        console.print(results_table(hostile_results()))
    assert "[bold]" in shown.getvalue()
    assert "\x1b[2J" not in shown.getvalue()
    lines = "\n".join(comparison_lines(hostile_results()))
    assert printable(lines).count(r"\x1b[2J[bold]") == lines.count("\x1b")
    assert printable("a\tb\nü\x07\x9b") == "a\tb\nü\\x07\\x9b"


def test_file_names_are_no_commands_for_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    folder = tree(Path("data"), {"c\x1b]0;x\x07at": 20, "[/dog]": 20})
    (folder / "c\x1b]0;x\x07at" / "000.png").write_bytes(b"x")
    message = refused(capsys, "--data.downstream", "folder:data", "--data.pretext", "folder:data")
    assert r"c\x1b]0;x\x07at/000.png" in message
    assert "\x1b" not in message


def test_a_picture_of_50000_px_is_refused_by_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    folder = tree(Path("data"), {"a": 30, "b": 30})
    small = ["--downstream.batch-size=4", "--pretext.batch-size=4"]
    picture(0).resize((10, 10)).save(folder / "a" / "000.bmp")
    content = bytearray((folder / "a" / "000.bmp").read_bytes())
    content[18:26] = (50_000).to_bytes(4, "little") * 2
    (folder / "a" / "000.bmp").write_bytes(content)
    message = refused(capsys, *small, "--data.downstream", "folder:data", "--data.pretext", "folder:data")
    assert re.search(r"000\.bmp .*(50000 x 50000 px|too large)", message)
