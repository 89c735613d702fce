"""Tasks of one's own, named on the command line and run through all stages."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from recipes.bissl.settings.config import Config
from recipes.experiment.errors import ConfigError
from recipes.vision.networks.backbones import build_backbone
from tests.support.paths import ROOT
from tests.support.recipes.small_runs import of_stage, part, run_all, small_config, small_pipeline


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a file of tasks in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    shutil.copy(ROOT / "tests" / "support" / "recipes" / "plugin_tasks.py", tmp_path / "my_tasks.py")
    return tmp_path


def test_tasks_of_ones_own_run_through_all_stages(plugins: Path) -> None:
    tasks = "--pretext.task", "my_tasks:Colour", "--downstream.task", "my_tasks:Brightness"
    options = "--pretext.options", '{"noise": 0.2}', "--downstream.eval-batch-size", "200"
    config = small_config(*tasks, *options)
    assert config.pretext.options == {"noise": 0.2}
    assert config.downstream.options == {}
    assert small_config("--config", saved(plugins, config)) == config
    pipeline = small_pipeline(plugins, config)
    made = run_all(pipeline)
    for before, after in (("pretext", "head"), ("head", "bissl")):
        old, new = part(made[before], "heads"), part(made[after], "heads")
        moved = {key for key in old if not torch.equal(old[key], new[key])}
        assert moved == (set() if after == "head" else set(old))
    info = made["finetune"].info
    assert info["higher_is_better"] == {"error": False}
    lines = of_stage(plugins, "finetune", "epoch")
    assert info["best"]["error"] == min(line["val_error"] for line in lines)
    assert all(line["knn_top1"] is None for line in of_stage(plugins, "pretext", "monitor"))
    # The mean over the images of an uneven last batch, by hand.
    task = config.downstream_task(pipeline.data.downstream.train.classes)
    backbone = build_backbone(config.model.backbone)
    regression = task.build(backbone)
    made["finetune"].load_into({"backbone": backbone, "head": regression})
    images = pipeline.data.downstream.test.images.stacked().expand(-1, 3, -1, -1) / 255
    with torch.no_grad():
        errors = regression.eval()(backbone.eval()(images)).squeeze(1) - images.mean(dim=(1, 2, 3))
    assert info["test"]["error"] == pytest.approx(float(errors.abs().mean()), rel=1e-4)
    assert info["test"]["loss"] == pytest.approx(float(errors.square().mean()), rel=1e-4)


def saved(folder: Path, config: Config) -> str:
    (folder / "saved.json").write_text(config.model_dump_json())
    return str(folder / "saved.json")


@pytest.mark.parametrize(
    ("option", "task", "message"),
    [
        ("pretext", "my_tasks:Nothing", "module 'my_tasks' has no 'Nothing'; its classes: .*Brightness, .*Colour"),
        ("pretext", "my_tasks:Brightness", "'my_tasks:Brightness' is not a subclass of PretextTask"),
        ("downstream", "my_tasks:not_a_class", "'my_tasks:not_a_class' is not a subclass of DownstreamTask"),
        ("pretext", "my_tasks:Unfinished", "'my_tasks:Unfinished' does not define loss, which PretextTask asks for"),
    ],
)
def test_wrong_plug_ins(plugins: Path, option: str, task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{option}.task: .*{message}"):
        small_config(f"--{option}.task", task)
    with pytest.raises(ConfigError, match=r"pretext.options.sound: unknown field"):
        small_config("--pretext.task", "my_tasks:Colour", "--pretext.options", '{"sound": 0.2}')


def test_one_view_that_stands_alone_is_refused_by_name(plugins: Path) -> None:
    (plugins / "one_view.py").write_text(
        "from bilevel.recipes.bissl.tasks import PretextTask\n"
        "from bilevel.recipes.vision.views.view_policy import ViewPolicy\n"
        "class OneView(PretextTask):\n"
        "    def build(self, backbone): ...\n"
        "    def random_views(self): return ViewPolicy(size=8)\n"
        "    def loss(self, backbone, heads, batch): ...\n"
    )
    with pytest.raises(ConfigError, match=r"random_views must return a tuple of ViewPolicy, such as \(view,\)"):
        small_config("--pretext.task", "one_view:OneView")
