"""The way from checkpoint to delivered folder: names, targets, plan, what is refused, the list, the zip, the trash."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.checkpoints.adapter import export_adapter, peft_name
from core.checkpoints.companions import to_jinja
from core.checkpoints.deliverables import (
    deliver,
    delivery_name,
    delivery_targets,
    discard,
    list_deliverables,
    start_delivery,
    zip_folder,
)
from core.checkpoints.full import export_full
from core.checkpoints.handover import start_gguf, start_upload
from core.checkpoints.inspect import inspect_checkpoint
from core.checkpoints.planner import plan_delivery
from core.checkpoints.staging import staging_folder
from core.checkpoints.verify import verify_merge
from core.errors import ConflictError, DanluError, InputError, JobError
from core.files import write_json
from core.models.inspect import fingerprint
from core.project import Project, open_project
from core.runs.directory import RunDirectory, RunSpec
from core.runs.job import SilentProgress
from core.xtuner.templates import PromptTemplate, render
from tests.core.checkpoints.crafted import TEMPLATE, digest, write_checkpoint
from tests.models import write_tiny_llama

pytestmark = pytest.mark.engine


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "p").mkdir()
    made = open_project(tmp_path / "p")
    write_tiny_llama(made.model / "tiny", dtype="bfloat16", shards=2)
    write_checkpoint(made.train / "first" / "iter_4.pth", made.model / "tiny")
    return made


def checkpoint(project: Project, run: str = "first") -> Path:
    return project.train / run / "iter_4.pth"


def run(project: Project, **options: Any) -> dict[str, Any]:
    arguments = {"verify": False, **options}
    return deliver(str(project.root), str(checkpoint(project)), "iter_4", progress=SilentProgress(), **arguments)


def code_of(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(DanluError) as caught:
        call(*arguments, **{"progress": SilentProgress(), **options})
    return caught.value.code


def test_a_delivery_has_the_guide_s_names_and_says_where_it_is_from(project: Project) -> None:
    run(project)
    adapter, merged = project.huggingface / "iter_4", project.final_model / "iter_4"
    assert {file.name for file in adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "danlu.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for folder, kind in ((adapter, "adapter"), (merged, "merged")):
        found = json.loads((folder / "danlu.json").read_text())
        assert (found["kind"], found["run"], found["checkpoint"]) == (kind, "first", "iter_4")
        assert (found["prompt_template"], found["system"]) == (TEMPLATE, "You are Danlu.")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["chat_template"] == to_jinja(PromptTemplate.from_json(TEMPLATE), bos="<s>", eos="</s>")
    kinds = [(item.kind, item.size_bytes > 0, item.is_verified) for item in list_deliverables(project)]
    assert sorted(kinds) == [("adapter", True, False), ("merged", True, False)]


def test_chat_template_gives_the_text_of_the_training(project: Project) -> None:
    from transformers import AutoTokenizer

    run(project, merge=False)
    tokenizer = AutoTokenizer.from_pretrained(str(project.huggingface / "iter_4"))
    messages = [
        {"role": "system", "content": "You {are} Danlu."},
        {"role": "user", "content": "Who?\n{{ 1 }}"},
        {"role": "assistant", "content": "I."},
        {"role": "user", "content": "你好"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pieces = render(PromptTemplate.from_json(TEMPLATE), messages, add_generation_prompt=True)
    assert text == "<s>" + "".join(piece for piece, _ in pieces)


def test_verification_finds_a_changed_byte_and_says_so_in_the_card(project: Project) -> None:
    run(project)
    merged = project.final_model / "iter_4"
    figures = verify_merge(str(merged), method="layers", progress=SilentProgress())
    assert figures["passed"]
    assert "✅ Passed" in (merged / "README.md").read_text()
    assert all(len(value) == 64 for value in figures["sha256"].values())
    file = sorted(merged.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(JobError) as caught:
        verify_merge(str(merged), method="layers", progress=SilentProgress())
    assert caught.value.code == "checkpoints.verify_failed"
    assert "❌ Failed" in (merged / "README.md").read_text()
    assert not [item for item in list_deliverables(project) if item.is_verified]
    assert code_of(verify_merge, str(project.huggingface / "iter_4")) == "checkpoints.not_merged"


def test_another_run_s_same_iteration_gets_the_run_s_name(project: Project) -> None:
    run(project, merge=False)
    assert delivery_name(project, project.train / "first", checkpoint(project)) == "iter_4"
    assert delivery_name(project, project.train / "second", checkpoint(project, "second")) == "second_iter_4"


def test_an_adapter_that_is_there_is_used_and_a_model_is_not_overwritten(project: Project) -> None:
    run(project, merge=False)
    before = digest(project.huggingface)
    card = inspect_checkpoint(checkpoint(project))
    assert delivery_targets(project, card, "iter_4", merge=True) == [project.final_model / "iter_4"]
    run(project)
    assert digest(project.huggingface) == before
    with pytest.raises(ConflictError):
        run(project)


def test_a_full_fine_tune_goes_to_final_model(project: Project) -> None:
    write_checkpoint(checkpoint(project), project.model / "tiny", is_full=True)
    result = run(project, dtype="BF16")
    assert result["adapter"] is None
    (item,) = list_deliverables(project)
    assert (item.kind, item.dtype, item.path) == ("full", "bfloat16", project.final_model / "iter_4")
    config = json.loads((item.path / "config.json").read_text())
    assert (config["torch_dtype"], config["use_cache"]) == ("bfloat16", True)
    assert not list(project.huggingface.glob("*"))


def test_wrong_kind_of_checkpoint_and_values_are_refused(project: Project, tmp_path: Path) -> None:
    lora, base = checkpoint(project), project.model / "tiny"
    target = str(tmp_path / "out")
    assert code_of(export_full, str(lora), target) == "checkpoints.adapter_not_full"
    assert code_of(export_adapter, str(lora), target, dtype="F8") == "checkpoints.bad_dtype"
    full = write_checkpoint(tmp_path / "full/iter_4.pth", base, is_full=True)
    assert code_of(export_adapter, str(full), target) == "checkpoints.full_not_adapter"
    assert code_of(export_full, str(full), target, base_model=str(tmp_path / "gone")) == "checkpoints.no_base"
    other = write_checkpoint(tmp_path / "rank/iter_4.pth", base, r=16)
    assert code_of(export_adapter, str(other), target) == "checkpoints.rank_differs"
    assert not Path(target).exists()
    with pytest.raises(InputError) as caught:
        peft_name("visual_encoder.weight")
    assert caught.value.code == "checkpoints.not_language_model"


def test_nan_in_a_checkpoint_is_found_before_anything_appears(project: Project, tmp_path: Path) -> None:
    import torch

    file = checkpoint(project)
    content = torch.load(file, weights_only=False)
    name = next(iter(content["state_dict"]))
    content["state_dict"][name][0, 0] = float("nan")
    torch.save(content, file)
    assert code_of(export_adapter, str(file), str(tmp_path / "out")) == "checkpoints.not_finite"
    content["state_dict"][name][0, 0] = 1e6
    torch.save(content, file)
    assert code_of(export_adapter, str(file), str(tmp_path / "out"), dtype="F16") == "checkpoints.not_finite"
    assert not list(tmp_path.glob("*out*"))


def test_plan_tells_sizes_and_problems_without_writing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    card = inspect_checkpoint(checkpoint(project))
    targets = delivery_targets(project, card, "iter_4", merge=True)

    def planned(**options: Any) -> Any:
        chosen = {"base_model": None, "dtype": "keep", "merge": True, "verify": True, **options}
        return plan_delivery(card, targets, **chosen)

    plan = planned()
    assert plan.can_start
    run(project)
    made = {item.kind: item.path for item in list_deliverables(project)}
    assert plan.adapter_bytes == pytest.approx((made["adapter"] / "adapter_model.safetensors").stat().st_size, rel=0.1)
    assert plan.merged_bytes == sum(file.stat().st_size for file in made["merged"].glob("*.safetensors"))
    assert planned().problem.code == "files.exists"
    shutil.rmtree(project.final_model / "iter_4")
    shutil.rmtree(project.huggingface / "iter_4")
    assert planned(base_model=str(project.root)).problem.code == "checkpoints.no_base"
    with monkeypatch.context() as patch:
        patch.setattr("core.checkpoints.planner.os.access", lambda *_: False)
        assert planned().problem.code == "checkpoints.read_only"
    assert planned(device="cuda").ram_bytes > plan.ram_bytes
    usage = type("usage", (), {"free": plan.disk_bytes - 1})
    monkeypatch.setattr("core.checkpoints.planner.shutil.disk_usage", lambda _: usage)
    assert planned().problem.code == "files.no_space"
    left = staging_folder(project.final_model / "iter_4")
    left.mkdir()
    (left / "part").write_bytes(b"x")
    assert planned().problem is None, "a killed merge's bytes are there already"
    shutil.rmtree(left)
    monkeypatch.undo()
    smaller = write_tiny_llama(project.model / "smaller", dtype="bfloat16", layers=1)
    assert planned(base_model=str(smaller)).problem.code == "checkpoints.unused_keys"
    (project.model / "tiny" / "model-00001-of-00002.safetensors").unlink()
    assert planned().problem.code == "checkpoints.missing_shard"
    assert not list(project.final_model.iterdir())


def test_a_base_that_is_damaged_leaves_no_adapter_behind_either(project: Project) -> None:
    file = project.model / "tiny" / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError) as caught:
        run(project)
    assert caught.value.code == "checkpoints.truncated"
    assert not [*project.huggingface.iterdir(), *project.final_model.iterdir()]
    run(project, merge=False)
    assert run(project, merge=False)["adapter"] == str(project.huggingface / "iter_4"), "made once, used again"


def test_another_base_than_the_trained_one_is_refused_though_it_fits(project: Project) -> None:
    base = project.model / "tiny"
    details = {"base_model": {"path": str(base), "fingerprint": fingerprint(base)}}
    spec = RunSpec(id="first", kind="train", title="", argv=[], cwd="/", created_at="", details=details)
    write_json(RunDirectory(project.train / "first").spec_file, spec.to_json())
    other = write_tiny_llama(project.model / "other", dtype="float32", seed=5)
    with pytest.raises(InputError) as caught:
        run(project, base_model=str(other))
    assert caught.value.code == "checkpoints.other_base"
    assert not list(project.final_model.iterdir())
    run(project, base_model=str(base))
    described = json.loads((project.final_model / "iter_4/danlu.json").read_text())
    assert described["base_model"] == details["base_model"]


def test_zip_holds_the_folder_and_trash_keeps_what_was_removed(project: Project) -> None:
    run(project, merge=False)
    folder = project.huggingface / "iter_4"
    with zipfile.ZipFile(io.BytesIO(zip_folder(folder))) as archive:
        names = {f"iter_4/{file.name}" for file in folder.iterdir()}
        assert set(archive.namelist()) == names
        assert archive.read("iter_4/adapter_config.json") == (folder / "adapter_config.json").read_bytes()
    kept = discard(project, folder)
    assert (kept / "adapter_model.safetensors").is_file()
    assert not list_deliverables(project)
    with pytest.raises(InputError):
        discard(project, project.model / "tiny")


def test_jobs_take_only_what_lies_in_the_project(project: Project, tmp_path: Path) -> None:
    run(project)
    item = next(item for item in list_deliverables(project) if item.kind == "merged")
    outside = write_checkpoint(tmp_path / "elsewhere/iter_4.pth", project.model / "tiny")
    with pytest.raises(InputError) as caught:
        start_delivery(project, outside, base_model=None, dtype="keep", merge=False, verify=False)
    assert caught.value.code == "files.outside"
    with pytest.raises(InputError):
        start_gguf(project, project.model / "tiny", "f16")
    with pytest.raises(InputError):
        start_gguf(project, item.path, "q1")
    with pytest.raises(InputError):
        start_upload(project, item, "no repository", is_private=True, base_model=None)
    (project.final_model / "iter_4-f16").mkdir()
    with pytest.raises(ConflictError):
        start_gguf(project, item.path, "f16")
    assert not project.jobs.exists() or not list(project.jobs.iterdir())


def test_gguf_of_a_delivered_model_is_listed_with_its_origin(project: Project) -> None:
    from core.checkpoints.gguf_export import export_gguf

    run(project)
    target = project.final_model / "iter_4-q8_0"
    export_gguf(str(project.final_model / "iter_4"), str(target), kind="q8_0", progress=SilentProgress())
    item = next(item for item in list_deliverables(project) if item.kind == "gguf")
    assert (item.path, item.run, item.dtype, item.is_model) == (target, "first", "q8_0", False)
    assert "ollama create iter_4-q8_0" in (target / "README.md").read_text()
    assert 'SYSTEM """You are Danlu."""' in (target / "Modelfile").read_text()


def test_adapter_in_every_type(project: Project, tmp_path: Path) -> None:
    from core.checkpoints.shards import read_shard
    from core.checkpoints.tensors import widen

    found = {}
    for dtype in ("keep", "F32", "F16", "BF16"):
        export_adapter(str(checkpoint(project)), str(tmp_path / dtype), dtype=dtype, progress=SilentProgress())
        tensors = read_shard(tmp_path / dtype / "adapter_model.safetensors").tensors
        found[dtype] = {name: widen(tensor.read(), tensor.dtype) for name, tensor in tensors.items()}
        assert {tensor.dtype for tensor in tensors.values()} == {"F32" if dtype == "keep" else dtype}
    for name, value in found["keep"].items():
        assert np.array_equal(found["F32"][name], value)
        assert np.allclose(found["F16"][name], value, rtol=2**-11, atol=1e-7)
        assert np.allclose(found["BF16"][name], value, rtol=2**-8)
