"""Tokenised data is taken from the cache exactly when nothing that it was made of has changed."""

import copy
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import InputError, MachineError
from core.files import write_json
from core.project import Project
from core.runs.directory import RunDirectory
from tests.models import write_tiny_llama
from tests.training import make_project

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def load(config: Path) -> Any:
    from mmengine.config import Config

    return Config.fromfile(str(config))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Path]:
    return make_project(tmp_path_factory.mktemp("tokenised") / "p", write_tiny_llama)


@pytest.fixture
def details(place: tuple[Project, Path]) -> dict[str, Any]:
    return {
        "data": [{"sha256": "abc", "rows": 22}],
        "base_model": {"path": str(place[0].model / "tiny"), "is_local": True},
        "seed": 42,
        "versions": {"xtuner": "0.2.0", "transformers": "4.55.4", "datasets": "5.0.1", "torch": "2"},
    }


def key(place: tuple[Project, Path], details: dict[str, Any], **settings: Any) -> str | None:
    from core.xtuner.runtime.tokenised import use_cache

    config = load(place[1])
    for name, value in settings.items():
        config.train_dataloader.dataset[name] = value
    return config.train_dataloader.dataset["kept_in"] if use_cache(config, details, Path("/kept")) else None


def test_the_key_covers_what_the_data_is_made_of(place: tuple[Project, Path], details: dict[str, Any]) -> None:
    first = key(place, details)
    assert first is not None
    assert first == key(place, copy.deepcopy(details))
    assert first == key(place, {**details, "versions": {**details["versions"], "torch": "3"}})
    others = [
        key(place, {**details, "data": [{"sha256": "abd", "rows": 22}]}),
        key(place, {**details, "seed": 43}),
        key(place, {**details, "versions": {**details["versions"], "datasets": "5.1"}}),
        key(place, details, max_length=32),
        key(place, details, use_varlen_attn=True),
    ]
    tokenizer = place[0].model / "tiny/tokenizer_config.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace("2048", "4096"))
    others.append(key(place, details))
    tokenizer.write_text(text)
    assert len({first, *others}) == len(others) + 1
    assert first == key(place, details)


def test_what_is_not_known_is_not_kept(place: tuple[Project, Path], details: dict[str, Any]) -> None:
    assert key(place, {**details, "seed": None}) is None
    assert key(place, {**details, "data": [{"sha256": None, "rows": 1}]}) is None
    assert key(place, {**details, "base_model": {**details["base_model"], "is_local": False}}) is None


def test_kept_data_is_what_was_made(
    place: tuple[Project, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import xtuner.dataset
    from datasets import Dataset

    from core.xtuner.runtime.tokenised import build

    made = []

    def process(**options: Any) -> Any:
        made.append(options)
        found = Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]], "length": [2, 1]})
        found.length = found["length"]
        return found

    monkeypatch.setattr(xtuner.dataset, "process_hf_dataset", process)
    first = build(str(tmp_path / "kept/a"), max_length=8)
    second = build(str(tmp_path / "kept/a"), max_length=8)
    assert made == [{"max_length": 8}]
    assert list(first) == list(second)
    assert list(second.length) == [2, 1]
    for used_at, name in enumerate("abcdefgh", 1000):
        build(str(tmp_path / f"kept/{name}"), max_length=8)
        os.utime(tmp_path / "kept" / name, (used_at, used_at))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == list("cdefgh")


def test_a_full_disk_only_means_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from core.xtuner.runtime.tokenised import keep

    class Full:
        def save_to_disk(self, path: str) -> None:
            Path(path).mkdir(parents=True)
            raise OSError(28, "No space left on device")

    keep(Full(), tmp_path / "kept/a")
    assert not list((tmp_path / "kept").iterdir())
    assert "not kept" in capsys.readouterr().out


def test_shards_loaded_side_by_side_are_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = write_tiny_llama(tmp_path / "sharded", shards=3)
    one = AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", "true")
    other = AutoModelForCausalLM.from_pretrained(folder)
    weights = other.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


def ready(
    place: tuple[Project, Path], details: dict[str, Any], tmp_path: Path, **options: Any
) -> tuple[RunDirectory, list[Any]]:
    """A run's folder and the data set of the config, which is made into `tmp_path`/kept by what `options` change."""
    from core.xtuner.runtime.tokenised import use_cache

    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    config = load(place[1])
    for name, value in options.items():
        config.train_dataloader.dataset[name] = value
    return run, use_cache(config, details, tmp_path / "kept")


def test_one_rank_makes_the_data_and_the_others_only_read_it(
    place: tuple[Project, Path], details: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import xtuner.dataset
    from xtuner.registry import BUILDER

    from core.runs.job import Progress
    from core.xtuner.runtime.tokenising import make_ready

    run, datasets = ready(place, details, tmp_path)
    seen: list[tuple[float, float | None]] = []
    monkeypatch.setattr(Progress, "update", lambda _self, done, total, _message, **_unit: seen.append((done, total)))
    waiting = threading.Thread(target=make_ready, args=(datasets, run), kwargs={"rank": 1, "world_size": 2, "seed": 42})
    waiting.start()
    make_ready(datasets, run, rank=0, world_size=2, seed=42)
    waiting.join(600)
    assert not waiting.is_alive()
    assert (22, 22) in seen, "the rows of the file are counted"
    # What XTuner's runner makes of the same config: it seeds, then builds.
    options = {name: value for name, value in datasets[0].items() if name != "kept_in"}
    np.random.seed(42)
    expected = BUILDER.build({**options, "type": xtuner.dataset.process_hf_dataset})
    monkeypatch.setattr(xtuner.dataset, "process_hf_dataset", None)
    assert list(BUILDER.build(datasets[0])) == list(expected)
    make_ready(datasets, run, rank=0, world_size=2, seed=42)


def test_a_stop_while_tokenising_ends_every_rank_and_leaves_nothing(
    place: tuple[Project, Path], details: dict[str, Any], tmp_path: Path
) -> None:
    from core.xtuner.runtime.tokenising import Stopped, make_ready

    run, datasets = ready(place, details, tmp_path)
    run.stop_file.write_text("{}")
    for rank in (1, 0):
        with pytest.raises(Stopped):
            make_ready(datasets, run, rank=rank, world_size=2, seed=42)
    assert not list(tmp_path.glob("kept/*"))
    assert not run.progress_file.exists()


def test_a_failure_is_said_by_every_rank(place: tuple[Project, Path], details: dict[str, Any], tmp_path: Path) -> None:
    from core.xtuner.runtime.tokenising import make_ready

    run, datasets = ready(place, details, tmp_path, dataset_map_fn=lambda row: {"conversation": row["gone"]})
    with pytest.raises(InputError, match=r"train.tokenising_failed.*gone") as failed:
        make_ready(datasets, run, rank=0, world_size=2, seed=42)
    write_json(run.error_file, failed.value.to_json())
    with pytest.raises(InputError, match=r"train.tokenising_failed.*gone"):
        make_ready(datasets, run, rank=1, world_size=2, seed=42)


def test_ranks_cannot_share_what_the_disk_has_no_room_for(
    place: tuple[Project, Path], details: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.xtuner.runtime import tokenised, tokenising

    run, datasets = ready(place, details, tmp_path)
    monkeypatch.setattr(tokenising, "_make", lambda *_: "made")
    monkeypatch.setattr(tokenised, "keep", lambda *_: OSError(28, "No space left on device"))
    with pytest.raises(MachineError, match="tokenised_not_kept"):
        tokenising.make_ready(datasets, run, rank=0, world_size=2, seed=42)
    (tmp_path / "kept").mkdir()
    tokenising.make_ready(datasets, run, rank=0, world_size=1, seed=42)
    assert tokenised.build(**datasets[0]) == "made", "one process alone goes on with what it has"


def test_joined_data_sets_are_kept_one_by_one(place: tuple[Project, Path], details: dict[str, Any]) -> None:
    from core.xtuner.runtime.tokenised import use_cache

    config = load(place[1])
    one = config.train_dataloader.dataset.to_dict()
    config.train_dataloader.dataset = {"type": "xtuner.dataset.ConcatDataset", "datasets": [one, copy.deepcopy(one)]}
    first, second = use_cache(config, details, Path("/kept"))
    assert first["kept_in"] != second["kept_in"]
    assert config.train_dataloader.dataset["datasets"][1]["type"] == "core.xtuner.runtime.tokenised.build"
