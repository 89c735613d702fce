"""The command `features`: batch statistics, scores against scikit-learn, embedding, picture, report, refusals."""

import base64
import io
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from recipes.bissl.commands import features
from recipes.bissl.outcome.features.embedding import tsne
from recipes.bissl.outcome.features.extraction import BATCHES, LabelledFeatures, refresh_batch_norm
from recipes.bissl.outcome.features.scatter import ScatterPanel, _styles, scatter_png
from recipes.bissl.outcome.features.scores import feature_scores, linear_probe, silhouette
from recipes.bissl.outcome.report import write_report
from recipes.experiment.artifacts import ArtifactError
from recipes.experiment.errors import ConfigError
from recipes.vision.errors import DataError
from recipes.vision.networks.backbones import build_backbone
from tests.support.recipes.small_runs import batches_of, execute, files, small_config, small_pipeline


def blobs(count: int, *, classes: int = 4, spread: float = 1.5, seed: int = 0) -> LabelledFeatures:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(99).normal(scale=2.0, size=(classes, 6))
    return LabelledFeatures(centres[labels] + generator.normal(scale=spread, size=(count, 6)), labels)


def silhouette_by_hand(points: np.ndarray, labels: np.ndarray) -> float:
    values = []
    for i, point in enumerate(points):
        distances = np.sqrt(((points - point) ** 2).sum(axis=1))
        own = (labels == labels[i]) & (np.arange(len(points)) != i)
        a = distances[own].mean()
        b = min(distances[labels == c].mean() for c in set(labels.tolist()) - {int(labels[i])})
        values.append((b - a) / max(a, b))
    return float(np.mean(values))


def small_norms() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 5),
        nn.BatchNorm1d(5, momentum=0.1),
        nn.Dropout(0.5),
        nn.BatchNorm1d(5, momentum=0.3, affine=False),
        nn.BatchNorm1d(5, track_running_stats=False),
    ).double()


def test_refreshed_statistics_are_means_over_the_batches() -> None:
    network = small_norms()
    first, second = network[1], network[3]
    assert isinstance(first, nn.BatchNorm1d)
    assert isinstance(second, nn.BatchNorm1d)
    nn.init.normal_(first.weight)
    assert first.running_mean is not None
    first.running_mean.fill_(1e6)
    batches = [torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) + i for i in range(4)]
    assert refresh_batch_norm(network, iter(batches)) == 2
    linear = network[0]
    assert isinstance(linear, nn.Linear)
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    outputs = [batch.numpy() @ weight.T + bias for batch in batches]
    means, variances = [y.mean(axis=0) for y in outputs], [y.var(axis=0, ddof=1) for y in outputs]
    np.testing.assert_allclose(first.running_mean.numpy(), np.mean(means, axis=0), rtol=1e-10)
    assert first.running_var is not None
    np.testing.assert_allclose(first.running_var.numpy(), np.mean(variances, axis=0), rtol=1e-10)
    # The second layer sees what the first makes with each batch's own statistics, and no dropout.
    gamma, beta = first.weight.detach().numpy(), first.bias.detach().numpy()
    inner = [gamma * (y - y.mean(axis=0)) / np.sqrt(y.var(axis=0) + first.eps) + beta for y in outputs]
    assert second.running_mean is not None
    assert second.running_var is not None
    np.testing.assert_allclose(
        second.running_mean.numpy(), np.mean([z.mean(axis=0) for z in inner], axis=0), atol=1e-10
    )
    expected = np.mean([z.var(axis=0, ddof=1) for z in inner], axis=0)
    np.testing.assert_allclose(second.running_var.numpy(), expected, rtol=1e-10)
    assert (first.momentum, second.momentum) == (0.1, 0.3)
    assert not any(module.training for module in network.modules())


def test_without_batch_norm_nothing_is_computed() -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    batches = iter([torch.zeros(2, 3)])
    assert refresh_batch_norm(network, batches) == 0
    assert next(batches).shape == (2, 3)
    assert not network.training


def test_scores_equal_scikit_learns() -> None:
    train, shown = blobs(120), blobs(200, seed=1)
    neighbours = KNeighborsClassifier(20, metric="cosine").fit(train.features, train.labels)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train.features, train.labels)
    scores = feature_scores(train, shown)
    expected = 100 * neighbours.score(shown.features, shown.labels)
    assert 40 < expected < 95
    assert scores["knn_top1"] == pytest.approx(expected)
    assert scores["linear_top1"] == pytest.approx(100 * probe.score(shown.features, shown.labels))


def test_few_training_images_have_fewer_neighbours() -> None:
    train, shown = blobs(12), blobs(40, seed=1)
    expected = KNeighborsClassifier(3, metric="cosine").fit(train.features, train.labels)
    assert feature_scores(train, shown)["knn_top1"] == pytest.approx(100 * expected.score(shown.features, shown.labels))


def test_a_constant_feature_does_not_disturb_the_probe() -> None:
    train, shown = blobs(60), blobs(60, seed=1)
    padded = [LabelledFeatures(np.pad(part.features, ((0, 0), (0, 1))), part.labels) for part in (train, shown)]
    assert linear_probe(*padded) == linear_probe(train, shown)


def test_silhouette_is_the_definition_or_none() -> None:
    shown = blobs(50)
    assert silhouette(shown.features, shown.labels) == pytest.approx(silhouette_by_hand(shown.features, shown.labels))
    assert silhouette(shown.features, np.zeros(50, dtype=np.int64)) is None
    assert silhouette(shown.features, np.arange(50)) is None


def test_tsne_is_repeatable_and_keeps_groups_together() -> None:
    shown = blobs(90, classes=3, spread=0.1)
    first, second = (tsne(shown.features, perplexity=10, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (90, 2)
    assert silhouette_by_hand(first, shown.labels) > 0.7


@pytest.mark.parametrize("perplexity", [0.5, 31.0, float("nan")])
def test_a_perplexity_out_of_range_is_refused(perplexity: float) -> None:
    with pytest.raises(ConfigError, match="--perplexity: must be between 1 and a third of the points, 90"):
        tsne(blobs(90).features, perplexity=perplexity)


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ConfigError, match="not finite"):
        tsne(np.full((90, 3), np.nan))


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = blobs(90)
    for module in ("sklearn.manifold", "sklearn.linear_model", "sklearn.metrics", "openTSNE"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"bilevel\[demo\]"):
        tsne(shown.features)
    with pytest.raises(ConfigError, match=r"bilevel\[opentsne\]"):
        tsne(shown.features, method="opentsne")
    with pytest.raises(ConfigError, match=r"bilevel\[demo\]"):
        linear_probe(shown, shown)
    with pytest.raises(ConfigError, match=r"bilevel\[demo\]"):
        silhouette(shown.features, shown.labels)


def test_twenty_classes_look_different_and_more_have_their_own_colours() -> None:
    named = _styles(20)
    assert len({(style["color"], style["marker"]) for style in named}) == 20
    pairs = pairwise(named)
    assert all(a["color"] != b["color"] and a["marker"] != b["marker"] for a, b in pairs)
    assert len({style["color"] for style in _styles(102)}) == 102


@pytest.mark.parametrize("classes", [3, 20, 102])
def test_the_picture_is_repeatable_and_not_empty(classes: int) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(200) % classes
    panels = [ScatterPanel(f"$x_{i}", generator.normal(size=(200, 2)) + 50 * i, "note") for i in range(2)]
    names = [f"{'long' * 9} ${i}" for i in range(classes)]
    first, second = (scatter_png(panels, labels, names, "caption " * 30) for _ in range(2))
    assert first == second
    pixels = image.imread(io.BytesIO(first))
    halves = np.array_split(pixels[..., :3], 2, axis=1)
    assert all(0.02 < float((half.min(axis=-1) < 0.9).mean()) < 0.5 for half in halves)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "run"
    assert execute("--output-dir", str(folder), "--arms", '["bissl", "baseline", "scratch"]', "--seeds=1") == 0
    return folder


@pytest.fixture
def finished(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def own_features(folder: Path, prefix: str, key: str) -> tuple[LabelledFeatures, LabelledFeatures]:
    """Features of train and test images of an artifact, with statistics of all training images at once."""
    batches = batches_of(small_pipeline(folder, small_config()))
    settings, sets = batches.settings, batches.data.downstream
    tensors = load_file(folder / "checkpoints" / f"{prefix}-{key}" / "weights.safetensors")
    backbone = build_backbone(settings.model.backbone)
    own = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    backbone.load_state_dict(own)
    task = settings.downstream_task(sets.train.classes)
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    found = []
    with torch.no_grad():
        # 30 images are fewer than a batch: every batch is the whole set, so that one pass at momentum 1 is the mean.
        for norm in norms:
            norm.momentum = 1.0
        backbone.train()
        backbone(torch.cat([rows.inputs for rows, _ in batches.evaluation(sets.train, task)]))
        backbone.eval()
        for images in (sets.train, sets.test):
            outputs = [backbone(rows.inputs) for rows, _ in batches.evaluation(images, task)]
            assert images.labels is not None
            found.append(LabelledFeatures(torch.cat(outputs).double().numpy(), images.labels.numpy()))
    return found[0], found[1]


def test_a_finished_run_end_to_end(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(finished / "checkpoints")
    assert features.main([str(finished), "--perplexity", "20"]) == 0
    assert "k-NN" in capsys.readouterr().out
    assert files(finished / "checkpoints") == before
    record = json.loads((finished / "features.json").read_text())
    assert list(record["arms"]) == ["baseline", "bissl"]
    assert (record["images"], record["points"], record["train_images"]) == (449, 449, 30)
    for arm, stage in (("baseline", "pretext"), ("bissl", "bissl")):
        entry = record["arms"][arm]
        assert entry["stage"] == stage
        train, shown = own_features(finished, stage, entry["key"])
        neighbours = KNeighborsClassifier(3, metric="cosine").fit(train.features, train.labels)
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train.features, train.labels)
        # Rounding may turn single images of 449.
        expected = {
            "knn_top1": 100 * neighbours.score(shown.features, shown.labels),
            "linear_top1": 100 * probe.score(shown.features, shown.labels),
        }
        for name, value in expected.items():
            assert entry["scores"][name] == pytest.approx(value, abs=0.7)
        by_hand = silhouette_by_hand(shown.features, shown.labels)
        assert entry["scores"]["silhouette_features"] == pytest.approx(by_hand, abs=1e-3)
        assert -1 < entry["scores"]["silhouette_embedding"] < 1
    # The longer of the two pretext artifacts is the baseline's.
    artifacts = [json.loads(path.read_text()) for path in (finished / "checkpoints").glob("pretext-*/artifact.json")]
    longest = max(artifacts, key=lambda info: info["pretext_steps"])
    assert record["arms"]["baseline"]["key"] == longest["key"]
    report = (finished / "report.html").read_text()
    assert base64.b64encode((finished / "features.png").read_bytes()).decode() in report
    assert f"{record['arms']['bissl']['scores']['knn_top1']:.3g}" in report
    assert "img-src data:" in report
    assert "Features before fine-tuning" in report
    with pytest.raises(ConfigError, match="already; replace them with --overwrite"):
        features.main([str(finished)])


def test_another_folder_leaves_the_run_alone(finished: Path, tmp_path: Path) -> None:
    before = files(finished)
    options = ["--max-points", "60", "--perplexity", "5", "--arms", "bissl", "--to", str(tmp_path / "new" / "x")]
    assert features.main([str(finished), *options]) == 0
    assert files(finished) == before
    record = json.loads((tmp_path / "new" / "x" / "features.json").read_text())
    assert (record["images"], record["points"], list(record["arms"])) == (449, 60, ["bissl"])
    assert (tmp_path / "new" / "x" / "features.png").read_bytes().startswith(b"\x89PNG")


REFUSED: dict[str, tuple[list[str], type[Exception], str]] = {
    "unknown arm": (
        ["--arms", "bissl,other"],
        ConfigError,
        "--arms: the run has bissl, baseline, scratch, not 'other'",
    ),
    "random weights": (["--arms", "scratch"], ConfigError, "scratch has random weights before fine-tuning"),
    "unknown seed": (["--seed", "7"], ConfigError, "--seed: stages before fine-tuning were made for 0, not 7"),
    "two points": (["--max-points", "2"], ConfigError, "--max-points: must be at least 3"),
    "no stages": (["--artifacts", "nowhere"], ArtifactError, "nowhere holds no finished pretext artifact of this run"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_bad_options_leave_nothing_behind(case: str, finished: Path) -> None:
    options, error, message = REFUSED[case]
    before = files(finished)
    with pytest.raises(error) as caught:
        features.main([str(finished), *options])
    assert message in str(caught.value)
    assert files(finished) == before


def test_no_run_and_a_damaged_stage_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json of a run"):
        features.main([str(tmp_path / "none")])
    next(finished.glob("checkpoints/bissl-*/weights.safetensors")).write_bytes(b"x")
    with pytest.raises(ArtifactError, match="is damaged"):
        features.main([str(finished), "--arms", "bissl"])


def test_several_classes_an_image_are_refused() -> None:
    sets = SimpleNamespace(kind="multi-label", train=SimpleNamespace(name="photos"))
    pipeline: Any = SimpleNamespace(config=None, data=SimpleNamespace(downstream=sets))
    with pytest.raises(DataError, match="photos: has multi-label labels"):
        features.show_features(pipeline, ["bissl"], features.Options("test", "sklearn", 30.0, 100, 0))


@pytest.mark.parametrize(("name", "content"), [("features.json", b"{}"), ("features.png", b"GIF")])
def test_a_damaged_record_is_named_in_the_report(name: str, content: bytes, tmp_path: Path) -> None:
    arms = {"bissl": {"stage": "bissl", "key": "0", "scores": {"knn_top1": None}}}
    values = {"dataset": "<b>x</b>", "split": "test", "seed": 0, "method": "sklearn", "perplexity": 5.0, "classes": 3}
    values |= {"train_images": 9, "images": 9, "points": 9, "batch_norm": "", "definitions": {"knn_top1": "<i>"}}
    (tmp_path / "features.json").write_text(json.dumps({**values, "arms": arms}))
    (tmp_path / "features.png").write_bytes(b"\x89PNG")
    text = write_report(tmp_path).read_text()
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "<b>" not in text
    assert "<i>" not in text
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        write_report(tmp_path)


def test_the_number_of_batches_is_the_papers() -> None:
    assert BATCHES == 100
