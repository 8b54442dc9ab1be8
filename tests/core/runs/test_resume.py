"""Going on from a checkpoint: what fits, what is refused and why, what will happen. Nothing is trained here."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoints.inspect import inspect_checkpoint
from core.checkpoints.reshape import rescale_file
from core.checkpoints.shards import read_folder
from core.checkpoints.warm import write_weights
from core.checkpoints.weights import open_checkpoint
from core.config.deepspeed import find, save, xtuner_text
from core.config.source import ConfigSource
from core.errors import DanluError, InputError
from core.i18n import catalog
from core.messages import Message
from core.project import Project
from core.runs.carry_over import carry_over, write_checkpoint_for
from core.runs.directory import RunDirectory, RunSpec
from core.runs.job import SilentProgress
from core.runs.origin import deepspeed_of
from core.runs.request import TrainRequest
from core.runs.resume import Mode
from core.runs.train import is_written_anew, plan, write_source
from tests.core.checkpoints.crafted import write_checkpoint as write_full
from tests.models import HIDDEN, write_tiny_llama, write_tiny_qwen2
from tests.training import make_project, write_rows

RANK = 64
"""As the preset config says."""


@pytest.fixture
def made(tmp_path: Path) -> tuple[Project, Path, Path]:
    """A project, its config, and a plain checkpoint at iteration 8 of a run of two processes."""
    project, config = make_project(tmp_path / "p", write_tiny_qwen2)
    return project, config, write_run(project, config, cpu_processes=2)


def write_run(project: Project, config: Path, **request: Any) -> Path:
    """The directory of a run as it lies after a start with this config, with one checkpoint."""
    spec = plan(project, TrainRequest(config=config, name="first", **request))
    run = project.train / "first"
    (run / "source").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(spec.to_json()), encoding="utf-8")
    (run / "source" / config.name).write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
    return write_checkpoint(run / "iter_8.pth")


def write_checkpoint(file: Path) -> Path:
    """What mmengine saves of a LoRA run, with the schedule of 12 iterations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

    weight = torch.ones(RANK, HIDDEN)
    moments = {"step": torch.tensor(4.0), "exp_avg": weight * 2, "exp_avg_sq": weight * 3}
    cosine = {
        "T_max": 12, "eta_min": 0.0, "eta_min_ratio": None, "param_name": "lr", "begin": 0, "end": 12, "by_epoch": False,
        "base_values": [1e-4], "last_step": 8, "_global_step": 8, "_last_value": [2.5e-5],
    }  # fmt: skip
    states = {
        "state_dict": {"llm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": weight},
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 2.5e-5, "params": [0]}]},
        "param_schedulers": [cosine],
        "meta": {"iter": 8, "epoch": 0, "seed": 42},
        "message_hub": {"runtime_info": {"keep_ckpt_ids": [4, 8]}},
    }
    torch.save(states, file)
    return file


def resumed(project: Project, **request: Any) -> RunSpec:
    return plan(project, TrainRequest(**request))


def said(spec: RunSpec, language: str = "en") -> str:
    happens = spec.details["resumed_from"]["happens"]
    return " ".join(catalog(language).say(Message.from_json(value)) for value in happens)


def entries_of(project: Project, **request: Any) -> str:
    with pytest.raises(InputError) as caught:
        plan(project, TrainRequest(**request))
    assert caught.value.code in ("resume.other_training", "resume.other_weights")
    return str(caught.value.params["entries"])


def test_the_same_ranks_need_nothing_written(made: tuple[Project, Path, Path]) -> None:
    project, config, saved = made
    spec = resumed(project, config=config, resume=saved, cpu_processes=2)
    assert not is_written_anew(spec)
    assert spec.details["resume"] == str(saved)
    assert "iteration 8" in said(spec)


def test_other_ranks_keep_batch_saving_and_epochs(made: tuple[Project, Path, Path]) -> None:
    project, config, saved = made
    spec = resumed(project, config=config, resume=saved, cpu_processes=1, name="one")
    details = spec.details["resumed_from"]
    assert is_written_anew(spec)
    assert spec.details["resume"] == str(project.train / "one/iter_16.pth")
    frequencies = {"save_steps": 8, "evaluation_freq": 200, "validation_freq": 200}
    assert details["edits"] == {"accumulative_counts": 4, **frequencies}
    assert spec.details["accumulative_counts"] == 4
    for words in ("Written by 2 processes, you chose 1", "iteration 8 becomes 16", "from 2 to 4"):
        assert words in said(spec)
    assert "由 2 个进程写成" in said(spec, "zh")


def test_what_does_not_divide_is_refused(made: tuple[Project, Path, Path]) -> None:
    project, config, saved = made
    with pytest.raises(InputError, match="uneven_accumulation"):
        resumed(project, config=config, resume=saved, cpu_processes=3)


def test_another_lora_shape_model_or_data_is_named(made: tuple[Project, Path, Path]) -> None:
    project, config, saved = made
    text = config.read_text(encoding="utf-8")
    config.write_text(ConfigSource(text).set("model.lora.r", 8).text, encoding="utf-8")
    assert entries_of(project, config=config, resume=saved, cpu_processes=2) == "lora.r: 64 → 8"
    config.write_text(ConfigSource(text).set("max_length", 32).text, encoding="utf-8")
    assert entries_of(project, config=config, resume=saved, cpu_processes=2) == "max_length: 64 → 32"
    config.write_text(text, encoding="utf-8")
    write_rows(project.data / "rows.jsonl", 23)
    assert entries_of(project, config=config, resume=saved, cpu_processes=2).startswith("data: rows.jsonl (")
    write_tiny_llama(project.model / "other")
    config.write_text(text.replace("/tiny", "/other"), encoding="utf-8")
    assert "base_model: tiny → other" in entries_of(project, config=config, resume=saved, cpu_processes=2)


def test_a_config_that_only_the_checkpoint_knows_is_compared_too(made: tuple[Project, Path, Path]) -> None:
    """A run made by hand has no run.json: the config text inside the checkpoint is all there is."""
    project, config, saved = made
    import torch

    states = torch.load(saved, weights_only=False)
    text = config.read_text(encoding="utf-8")
    states["meta"]["cfg"] = ConfigSource(text).set("max_length", 128).text
    by_hand = project.train / "by_hand"
    by_hand.mkdir()
    torch.save(states, by_hand / "iter_8.pth")
    assert entries_of(project, config=config, resume=by_hand / "iter_8.pth") == "max_length: 128 → 64"


def test_changes_that_the_checkpoint_overrides_are_said(made: tuple[Project, Path, Path]) -> None:
    project, config, saved = made
    config.write_text(ConfigSource(config.read_text(encoding="utf-8")).set("lr", 1e-5).text, encoding="utf-8")
    assert "no effect: lr:" in said(resumed(project, config=config, resume=saved, cpu_processes=2))


def test_weights_alone_go_with_other_data(made: tuple[Project, Path, Path]) -> None:
    project, config, saved = made
    write_rows(project.data / "rows.jsonl", 23)
    spec = resumed(project, config=config, resume=saved, resume_mode=Mode.WEIGHTS, name="warm")
    assert spec.details["resume"] is None
    assert is_written_anew(spec)
    text = ConfigSource(config.read_text(encoding="utf-8")).set("model.lora.r", 8).text
    config.write_text(text, encoding="utf-8")
    assert "lora.r" in entries_of(project, config=config, resume=saved, resume_mode=Mode.WEIGHTS)


def test_more_epochs_stretch_the_schedule(made: tuple[Project, Path, Path], tmp_path: Path) -> None:
    project, config, saved = made
    spec = resumed(project, config=config, resume=saved, cpu_processes=2, extra_epochs=1)
    assert spec.details["resumed_from"]["edits"] == {"max_epochs": 2}
    assert "Planned for 1 epochs, now 2" in said(spec)
    from fractions import Fraction

    import torch

    rescale_file(saved, tmp_path / "longer.pth", 2, 2, stretch=Fraction(2), progress=SilentProgress())
    states = torch.load(tmp_path / "longer.pth", weights_only=False)
    assert (states["meta"]["iter"], states["param_schedulers"][0]["end"]) == (8, 24)
    assert states["optimizer"]["param_groups"][0]["lr"] == pytest.approx(7.5e-5)
    before = torch.load(saved, weights_only=False)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(before["optimizer"]["state"][0][key], states["optimizer"]["state"][0][key])


def test_a_plain_file_goes_on_with_deepspeed_and_back(made: tuple[Project, Path, Path]) -> None:
    """Bit for bit into a folder of two ranks, which goes on without DeepSpeed on one."""
    import torch

    project, config, saved = made
    options: dict[str, Any] = {"config": config, "cpu_processes": 2, "name": "zero", "deepspeed": "deepspeed_zero2"}
    spec = resumed(project, resume=saved, **options)
    assert is_written_anew(spec)
    assert "Saved without DeepSpeed, goes on with ZeRO-2" in said(spec)
    assert "保存时没有使用 DeepSpeed，现在用 ZeRO-2 继续" in said(spec, "zh")
    folder = write_from(spec, project)
    card = inspect_checkpoint(folder)
    assert (card.stage, card.world_size, card.iteration, card.is_adapter, card.problem) == (2, 2, 8, True, None)
    (folder.parent / "run.json").write_text(json.dumps(spec.to_json()), encoding="utf-8")
    spec = resumed(project, config=config, resume=folder, cpu_processes=1, name="plain")
    assert "Saved with ZeRO-2, goes on without DeepSpeed" in said(spec)
    before = torch.load(saved, weights_only=False)
    after = torch.load(write_from(spec, project), weights_only=False)
    assert (before["meta"]["iter"], after["meta"]["iter"]) == (8, 16)
    (name,) = before["state_dict"]
    assert after["optimizer"]["param_groups"][0]["param_names"] == [name]
    assert torch.equal(before["state_dict"][name], after["state_dict"][name])
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(before["optimizer"]["state"][0][key], after["optimizer"]["state"][0][key])


def write_from(spec: RunSpec, project: Project) -> Path:
    """The checkpoint that a new run would go on from, written as the job does."""
    folder = project.train / spec.id
    folder.mkdir()
    write_checkpoint_for(spec, folder, SilentProgress())
    return Path(spec.details["resume"])


def write_zero_run(project: Project, config: Path, saved: Path, *, deepspeed: str) -> Path:
    """A run of two processes that went on from `saved` with this setting: its folder as it lies, with its ZeRO checkpoint."""
    request = TrainRequest(config=config, resume=saved, cpu_processes=2, name="zero", deepspeed=deepspeed)
    spec = plan(project, request)
    folder = write_from(spec, project)
    write_source(RunDirectory(folder.parent), spec, request)
    (folder.parent / "run.json").write_text(json.dumps(spec.to_json()), encoding="utf-8")
    return folder


def test_the_deepspeed_setting_of_the_run_itself_is_offered(made: tuple[Project, Path, Path]) -> None:
    """Its name while it says the same; after that another of the same text, or the run's own copy; the stage if there is none."""
    project, config, saved = made
    text = xtuner_text("deepspeed_zero2").replace('"overlap_comm": true', '"overlap_comm": false')
    kept = save(project, "mine", text)
    card = inspect_checkpoint(write_zero_run(project, config, saved, deepspeed="mine"))

    def offered() -> tuple[str, str]:
        preset = deepspeed_of(project, card)
        assert preset is not None
        assert find(project, preset.name).zero.stage == 2
        return preset.name, catalog("en").say(preset.why)

    assert offered() == ("mine", "DeepSpeed: goes on with `mine`, the very setting that run zero used.")
    kept.write_text(text.replace('"stage": 2', '"stage": 1'), encoding="utf-8")
    copy = "zero/source/deepspeed.json"
    assert offered()[0] == copy
    assert "the run's own copy is chosen" in offered()[1]
    spec = resumed(project, config=config, resume=card.path, cpu_processes=2, deepspeed=copy)
    assert spec.details["deepspeed_config"] == {"name": copy, "is_own": True, "text": text}
    assert not find(project, copy).is_saved
    save(project, "again", text)
    assert offered()[0] == "again"
    (project.config / "deepspeed/again.json").unlink()
    kept.unlink()
    assert offered()[0] == copy
    (project.train / copy).unlink()
    assert offered()[0] == "deepspeed_zero2"
    assert "its checkpoint is ZeRO-2" in offered()[1].replace("Its", "its")
    assert deepspeed_of(project, inspect_checkpoint(saved)) is None


def test_an_optimizer_that_no_weight_fits_is_refused_before_the_start(made: tuple[Project, Path, Path]) -> None:
    import torch

    project, config, saved = made
    states = torch.load(saved, weights_only=False)
    states["optimizer"]["state"][1] = states["optimizer"]["state"][0]
    torch.save(states, saved)
    with pytest.raises(InputError, match="unnamed_state"):
        resumed(project, config=config, resume=saved, deepspeed="deepspeed_zero2", cpu_processes=2)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("1 + 1",))


def test_a_checkpoint_with_foreign_code_is_not_loaded(made: tuple[Project, Path, Path]) -> None:
    project, config, saved = made
    with zipfile.ZipFile(saved) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    entries[name] = pickle.dumps({"state_dict": {}, "meta": Evil()}, protocol=2)
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    with pytest.raises(InputError, match="unsafe") as caught:
        resumed(project, config=config, resume=saved, cpu_processes=2)
    assert "eval" in str(caught.value.params["name"])


def test_a_refused_request_leaves_no_folder(made: tuple[Project, Path, Path]) -> None:
    project, config, saved = made
    request = TrainRequest(config=config, resume=saved, cpu_processes=1, name="one")
    saved.write_bytes(saved.read_bytes()[:-200])
    with pytest.raises(DanluError):
        carry_over(str(project.root), request.to_json(), progress=SilentProgress())
    assert not (project.train / "one").exists()


def test_a_request_survives_the_way_through_json(made: tuple[Project, Path, Path]) -> None:
    _, config, saved = made
    request = TrainRequest(config=config, resume=saved, gpus=("0", "1"), resume_mode=Mode.WEIGHTS, extra_epochs=2)
    assert TrainRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_carrying_over_makes_a_run_that_has_all_it_needs(
    made: tuple[Project, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    project, config, saved = made
    launched: list[RunSpec] = []
    monkeypatch.setattr("core.runs.carry_over.launch", lambda _parent, spec: launched.append(spec))
    monkeypatch.setattr("shutil.rmtree", lambda *_args, **_options: None)  # No run.json: nothing was really launched.
    request = TrainRequest(config=config, resume=saved, cpu_processes=1, name="one")
    assert carry_over(str(project.root), request.to_json(), progress=SilentProgress()) == {"run": "one"}
    source = ConfigSource((project.train / "one/source/tiny.py").read_text(encoding="utf-8"))
    assert source.get("accumulative_counts") == 4
    import torch

    states = torch.load(launched[0].details["resume"], weights_only=False)
    assert (states["meta"]["iter"], states["param_schedulers"][0]["end"]) == (16, 24)


def test_weights_are_taken_out_as_they_are(made: tuple[Project, Path, Path], tmp_path: Path) -> None:
    _, _, saved = made
    import torch

    target = tmp_path / "weights.pth"
    assert write_weights(saved, target, progress=SilentProgress()) == 1
    before, after = torch.load(saved, weights_only=False), torch.load(target)
    assert after.keys() == {"state_dict", "meta"}
    for name, tensor in before["state_dict"].items():
        assert torch.equal(tensor, after["state_dict"][name])


def test_a_full_fine_tune_begins_with_the_weights_of_another(tmp_path: Path) -> None:
    """Its weights are written as a model, which takes the base model's place in the new run's config."""
    project, config = make_project(tmp_path / "p", write_tiny_llama, method="full")
    base = project.model / "tiny"
    saved = write_full(project.train / "first" / "iter_4.pth", base, is_full=True)
    spec = resumed(project, config=config, resume=saved, resume_mode=Mode.WEIGHTS, name="warm")
    model = project.train / "warm" / "warm_start"
    assert spec.details["resume"] is None
    assert spec.details["base_model"]["path"] == str(base)
    assert "as a whole model" in said(spec)
    assert "作为完整模型" in said(spec, "zh")
    model.parent.mkdir()
    write_checkpoint_for(spec, model.parent, SilentProgress())
    write_source(RunDirectory(model.parent), spec, TrainRequest(config=config, resume=saved, resume_mode=Mode.WEIGHTS))
    source = ConfigSource((model.parent / "source/tiny.py").read_text(encoding="utf-8"))
    assert source.effective("model.llm.pretrained_model_name_or_path") == str(model)
    trained = {name: tensor.read() for name, tensor in open_checkpoint(saved).weights.items()}
    written = {name: tensor for shard in read_folder(model) for name, tensor in shard.tensors.items()}
    assert {f"llm.{name}" for name in written} == trained.keys()
    assert all(np.array_equal(tensor.read(), trained[f"llm.{name}"]) for name, tensor in written.items())
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {file.name for file in model.iterdir()}
