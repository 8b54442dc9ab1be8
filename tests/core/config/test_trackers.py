"""A config that reports to a service: what is written, that mmengine builds it, and that no key or address gets into it."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from core.config.source import ConfigSource
from core.config.trackers import TRACKERS, read_trackers, set_trackers

PLAIN = ConfigSource("visualizer = None\nlr = 1e-4\n")
OURS = [tracker.key for tracker in TRACKERS if "." not in tracker.backend]


def test_what_was_chosen_is_read_again_and_taken_back() -> None:
    assert read_trackers(PLAIN).trackers == ()
    for keys, is_offline in ((["wandb"], True), (["mlflow", "tensorboard"], False), (["swanlab", "wandb"], False)):
        edited = set_trackers(PLAIN, keys, is_offline=is_offline)
        choice = read_trackers(edited)
        assert {tracker.key for tracker in choice.trackers} == set(keys)
        assert (choice.is_offline, choice.is_own) == (is_offline, False)
        assert edited.text.endswith("lr = 1e-4\n")
        assert set_trackers(edited, [], is_offline=False).text == PLAIN.text


@pytest.mark.parametrize(
    "value",
    ['dict(type="Visualizer", vis_backends=[dict(type="AimVisBackend")])', "dict(type=MyVisualizer)", "MY_VISUALIZER"],
)
def test_a_visualizer_of_ones_own_is_left_alone(value: str) -> None:
    choice = read_trackers(ConfigSource(f"visualizer = {value}\n"))
    assert choice.is_own
    assert choice.trackers == ()


def test_a_config_without_the_key_cannot_take_one() -> None:
    assert read_trackers(ConfigSource("lr = 1\n")).trackers == ()


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")
def test_mmengine_knows_the_backends_and_takes_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each backend that mmengine has. Their packages are not needed for that; the local one is built in earnest."""
    from mmengine.config import Config
    from mmengine.registry import VISBACKENDS, VISUALIZERS, DefaultScope

    from core.xtuner.runtime.trackers import MLflowBackend, name_run

    file = tmp_path / "config.py"
    file.write_text(set_trackers(PLAIN, OURS, is_offline=True).text)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ada:secret@mlflow.example")
    config = Config.fromfile(str(file))
    name_run(config, "run-7")
    given = {}
    for backend in config.visualizer.vis_backends:
        options: dict[str, Any] = dict(backend)
        kind = VISBACKENDS.get(options.pop("type"))
        inspect.signature(kind).bind(save_dir="x", **options)
        given[kind.__name__] = options
    assert given["WandbVisBackend"] == {"init_kwargs": {"name": "run-7", "project": "danlu", "mode": "offline"}}
    assert given["MLflowBackend"] == {"exp_name": "danlu", "run_name": "run-7"}
    assert "secret" not in config.pretty_text
    started = MLflowBackend(save_dir=str(tmp_path / "mlflow"), **given["MLflowBackend"])
    with pytest.raises(ImportError, match="mlflow"):
        started._init_env()
    assert started._tracking_uri == "https://ada:secret@mlflow.example"

    file.write_text('visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])\n')
    with DefaultScope.overwrite_default_scope("mmengine"):
        visualizer = VISUALIZERS.build(
            {**Config.fromfile(str(file)).visualizer, "name": "one", "save_dir": str(tmp_path)}
        )
    visualizer.add_scalar("loss", 1.5, step=3)
    assert '"loss": 1.5' in (tmp_path / "vis_data" / "scalars.json").read_text()


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")
def test_a_backend_of_another_package_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SwanLab's backend lies in its own package: stood in for by a module with the same path."""
    from mmengine.registry import VISBACKENDS

    folder = tmp_path / "swanlab" / "integration"
    folder.mkdir(parents=True)
    (folder / "mmengine.py").write_text(
        "class SwanlabVisBackend:\n    def __init__(self, **options):\n        self.options = options\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tracker = next(tracker for tracker in TRACKERS if tracker.key == "swanlab")
    built = VISBACKENDS.build({"type": tracker.backend, "init_kwargs": {"mode": "offline"}, "save_dir": "x"})
    assert built.options == {"init_kwargs": {"mode": "offline"}, "save_dir": "x"}
