"""Three updates that prove a training: the cut config, read by mmengine and really trained."""

from pathlib import Path

import pytest

from core.config.dry_run import UPDATES, dry_config, write_dry_run
from core.config.library import read_config
from core.config.load import load_values
from core.config.source import ConfigSource
from core.errors import InputError
from core.runs.request import TrainRequest
from core.xtuner.catalogue import configs
from tests.models import write_tiny_qwen2
from tests.training import make_project, train


def test_training_reads_three_updates(shipped: ConfigSource) -> None:
    values = load_values(dry_config(shipped).text)
    assert values["train_cfg"]["max_iters"] == UPDATES * 16
    assert "max_epochs" not in values["train_cfg"]
    assert values["default_hooks"]["checkpoint"]["save_last"] is False
    assert not [hook for hook in values["custom_hooks"] if hook["type"].endswith("EvaluateChatHook")]
    assert values["train_dataloader"]["dataset"]["max_length"] == 2048


def test_every_config_of_xtuner_can_be_cut() -> None:
    sources = [ConfigSource(read_config(entry.path)) for entry in configs() if entry.is_supervised][::9]
    by_epochs = [source for source in sources if source.has("train_cfg.max_epochs")]
    assert len(by_epochs) > 50
    for source in by_epochs:
        cut = dry_config(source)
        assert cut.get("train_cfg.max_iters") >= UPDATES
        assert not cut.has("train_cfg.max_epochs")
    for source in sources:
        if source not in by_epochs:
            with pytest.raises(InputError, match=r"config\.no_train_loop"):
                dry_config(source)


@pytest.mark.engine
def test_it_trains_three_updates_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    project, config = make_project(tmp_path / "p", write_tiny_qwen2, accumulative_counts=1)
    before = config.read_text()
    trained = train(project, TrainRequest(config=write_dry_run(project, config), name="dry_run"))
    assert trained.status.phase.value == "finished", trained.log[-2000:]
    assert [line["iteration"] for line in trained.lines] == [1, 2, 3]
    assert trained.samples == []
    assert not list(trained.run.path.glob("iter_*"))
    assert config.read_text() == before
    assert [file.name for file in project.config.iterdir()] == ["tiny.py"]
