"""Each check with a config that is right and one that is wrong, and its fix: after it the finding is gone."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.config.checks import Surroundings, apply_fix, check, fix_all, gather
from core.config.edits import set_method
from core.config.facts import DataFacts, Machine, ModelFacts, read_data, read_model
from core.config.findings import Context, Finding, Severity
from core.config.source import ConfigSource
from core.config.values import Code
from core.project import Project
from tests.core.config.conftest import GPU
from tests.models import write_tiny_internlm2
from tests.training import write_rows

Edit = Callable[[ConfigSource], ConfigSource]
HOOK = "custom_hooks[EvaluateChatHook]"
FLASH = dataclasses.replace(GPU, has_flash_attention=True)


def context(source: ConfigSource, **around: Any) -> Context:
    return gather(source, Surroundings(**{"machine": GPU, **around}))


def codes(source: ConfigSource, **around: Any) -> dict[str, Finding]:
    return {finding.code: finding for finding in check(source, context(source, **around))}


def test_our_own_config_has_nothing_wrong(made: ConfigSource) -> None:
    assert codes(made) == {}


def sets(path: str, value: Any) -> Edit:
    return lambda source: source.set(path, value)


def many(*edits: Edit) -> Edit:
    def edit(source: ConfigSource) -> ConfigSource:
        for one in edits:
            source = one(source)
        return source

    return edit


NF4 = sets("model.llm.quantization_config", {"type": Code("BitsAndBytesConfig"), "load_in_4bit": True})
VARLEN = sets("use_varlen_attn", True)
SPLIT = sets("sequence_parallel_size", 2)
PLAIN_SAMPLER = sets("train_dataloader.sampler.type", Code("DefaultSampler"))
TWO_CARDS = {"machine": FLASH, "world_size": 2}
HASTY = many(
    sets("accumulative_counts", 4000), sets("save_steps", 4000), sets("max_epochs", 1), sets("max_length", 8192)
)
BROKEN: list[tuple[str, Severity, Edit, dict[str, Any]]] = [
    ("map_num_proc", Severity.WARNING, sets("train_dataset.map_num_proc", 32), {}),
    ("map_fn", Severity.ERROR, sets("train_dataset.dataset_map_fn", Code("alpaca_map_fn")), {}),
    ("template_differs", Severity.WARNING, sets("prompt_template", Code("PROMPT_TEMPLATE.llama3_chat")), {}),
    ("template_unknown", Severity.ERROR, sets("prompt_template", Code("PROMPT_TEMPLATE.nothing")), {}),
    ("system_braces", Severity.ERROR, sets("SYSTEM", 'Answer as {"a": 1}'), {}),
    ("long_answers", Severity.ADVICE, sets(f"{HOOK}.max_new_tokens", 600), {}),
    ("save_steps", Severity.WARNING, many(sets("accumulative_counts", 16), sets("save_steps", 500)), {}),
    ("no_optimizer_step", Severity.ERROR, HASTY, {}),
    ("varlen", Severity.ERROR, VARLEN, {}),
    ("varlen_packing", Severity.ERROR, many(VARLEN, sets("pack_to_max_length", False)), {"machine": FLASH}),
    ("varlen_batch", Severity.ERROR, many(VARLEN, sets("batch_size", 2)), {"machine": FLASH}),
    ("sequence_parallel", Severity.ERROR, sets("sequence_parallel_size", 4), TWO_CARDS),
    ("sequence_parallel_sampler", Severity.ERROR, many(SPLIT, PLAIN_SAMPLER), {**TWO_CARDS, "deepspeed": "deepspeed_zero2"}),
    ("no_bf16", Severity.ERROR, sets("max_epochs", 3), {"machine": dataclasses.replace(GPU, supports_bf16=False)}),
    ("prefer_bf16", Severity.ADVICE, sets("optim_wrapper.dtype", "float16"), {}),
    ("no_bitsandbytes", Severity.ERROR, NF4, {"machine": dataclasses.replace(GPU, has_bitsandbytes=False)}),
    ("qlora_on_cpu", Severity.WARNING, NF4, {"machine": Machine(has_bitsandbytes=True)}),
    ("learning_rate", Severity.WARNING, sets("lr", 0.2), {}),
    ("too_long", Severity.WARNING, sets("max_length", 4096), {}),
    ("reserved_name", Severity.ERROR, lambda source: ConfigSource(source.text + "round = 3\nlast = round\n"), {}),
    ("byte_order_mark", Severity.ERROR, lambda source: ConfigSource("\ufeff" + source.text), {}),
    ("keep_all", Severity.ADVICE, sets("save_total_limit", -1), {}),
    ("model_missing", Severity.ERROR, sets("pretrained_model_name_or_path", "/gone/model"), {}),
    ("model_from_hub", Severity.ERROR, sets("pretrained_model_name_or_path", "internlm/internlm2-chat-1_8b"), {}),
    ("data_missing", Severity.ERROR, sets("data_files", ["/gone/rows.jsonl"]), {}),
]  # fmt: skip
"""(code, severity, what breaks our own good config, what differs around it)"""


@pytest.mark.parametrize(("code", "severity", "edit", "around"), BROKEN, ids=[case[0] for case in BROKEN])
def test_what_is_wrong_is_found_and_mended(
    made: ConfigSource, project: Project, code: str, severity: Severity, edit: Edit, around: dict[str, Any]
) -> None:
    offered = {"models": [project.model / "tiny-qwen2"], "data_files": [project.data / "many.jsonl"]}
    around = {**offered, **around}
    broken = edit(made)
    found = codes(broken, **around)
    assert code in found
    assert found[code].severity is severity
    assert code not in codes(made, **{**offered, "machine": GPU})
    mended = apply_fix(broken, found[code])
    assert code not in codes(mended, **around)
    assert ConfigSource(mended.text).text == mended.text


def test_trained_weights_in_half_precision(made: ConfigSource) -> None:
    half = set_method(made, "full").set("lr", 2e-5)
    found = codes(half)["half_full"]
    assert found.severity is Severity.ERROR
    assert apply_fix(half, found).get("model.llm.torch_dtype") == Code("torch.float32")
    assert "half_full" not in codes(apply_fix(half, found))
    assert "half_full" not in codes(half, deepspeed="deepspeed_zero2")
    assert "half_full" not in codes(made)


def test_a_change_of_precision_reaches_every_dtype(made: ConfigSource) -> None:
    """float16 needs a gradient scaler, bfloat16 none."""
    kinds = ("model.llm.torch_dtype", "model.llm.quantization_config.bnb_4bit_compute_dtype")
    narrow = many(
        NF4,
        *(sets(kind, Code("torch.float16")) for kind in kinds),
        sets("optim_wrapper.dtype", "float16"),
        sets("optim_wrapper.loss_scale", "dynamic"),
    )(made)
    wide = apply_fix(narrow, codes(narrow)["prefer_bf16"])
    assert [wide.get(kind) for kind in kinds] == [Code("torch.bfloat16")] * 2
    assert wide.get("optim_wrapper.dtype") == "bfloat16"
    assert not wide.has("optim_wrapper.loss_scale")
    scaled = wide.set("optim_wrapper.loss_scale", "dynamic")
    old_card = dataclasses.replace(GPU, supports_bf16=False)
    back = apply_fix(scaled, codes(scaled, machine=old_card)["no_bf16"])
    assert [back.get(kind) for kind in kinds] == [Code("torch.float16")] * 2
    assert back.get("optim_wrapper.dtype") == "float16"
    assert back.get("optim_wrapper.loss_scale") == "dynamic"


def test_warm_up_of_no_iteration(made: ConfigSource, rows: DataFacts) -> None:
    """Twenty-two rows are a few iterations: 3 % of them are none."""
    small = made.set("data_files", [str(rows.path)]).set("max_length", 512)
    found = codes(small)["warmup_zero"]
    mended = apply_fix(small, found)
    assert "warmup_zero" not in codes(mended)
    assert not mended.has("param_scheduler[LinearLR]")
    assert mended.get("param_scheduler[CosineAnnealingLR].begin") == 0


def test_data_that_needs_conversion_has_no_quick_fix(made: ConfigSource, project: Project) -> None:
    file = project.data / "sharegpt.json"
    file.write_text('[{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]')
    found = codes(made.set("data_files", [str(file)]))["data_needs_conversion"]
    assert found.severity is Severity.ERROR
    assert found.fix is None


def test_eager_internlm2(internlm2: ModelFacts, many_rows: DataFacts) -> None:
    from core.config.presets import Wishes, make

    source = ConfigSource(make(internlm2, many_rows, GPU, Wishes(max_length=64)))
    assert "eager_attention" not in codes(source)
    silent = source.delete("model.llm.attn_implementation")
    found = codes(silent)["eager_attention"]
    assert apply_fix(silent, found).get("model.llm.attn_implementation") == "sdpa"
    assert "eager_attention" not in codes(silent, machine=FLASH)


def test_a_tokenizer_without_bos(made: ConfigSource, qwen2: ModelFacts) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = qwen2.path / name
        file.write_text(file.read_text().replace('"bos_token": "<s>",', ""))
    assert codes(made)["bos_missing"].severity is Severity.ERROR


def test_a_system_text_the_template_has_no_place_for(made: ConfigSource) -> None:
    odd = made.set("prompt_template", Code("PROMPT_TEMPLATE.minicpm")).set("SYSTEM", "You are a poet.")
    found = codes(odd)["system_unsupported"]
    assert apply_fix(odd, found).get("SYSTEM") == ""
    assert "system_unsupported" not in codes(made.set("SYSTEM", "You are a poet."))


def test_relative_paths_begin_in_the_project(made: ConfigSource, project: Project) -> None:
    relative = made.set("data_files", ["data/many.jsonl"]).set("pretrained_model_name_or_path", "model/tiny-qwen2")
    assert {"data_missing", "model_from_hub"} <= codes(relative).keys()
    found = [one for one in check(relative, context(relative, root=project.root)) if one.code == "relative_path"]
    assert [one.severity for one in found] == [Severity.WARNING] * 2
    for one in found:
        relative = apply_fix(relative, one)
    assert relative.text == made.text
    full = str(project.data / "many.jsonl")
    for written, wanted in (("'data/many.jsonl'", full), ("dict(train='data/many.jsonl')", {"train": full})):
        other = ConfigSource(made.text.replace("data_files=data_files", f"data_files={written}"))
        mended = apply_fix(other, codes(other, root=project.root)["relative_path"])
        assert mended.get("train_dataset.dataset.data_files") == wanted


def test_a_folder_that_is_no_model(made: ConfigSource, project: Project) -> None:
    around = {"models": [project.model / "tiny-qwen2"]}
    broken = made.set("pretrained_model_name_or_path", str(project.data))
    found = codes(broken, **around)["model_without_config"]
    assert found.severity is Severity.ERROR
    assert apply_fix(broken, found).text == made.text


def test_data_of_the_hub(made: ConfigSource, project: Project) -> None:
    broken = made.set("train_dataset.dataset.path", "tatsu-lab/alpaca").delete("train_dataset.dataset.data_files")
    around = {"data_files": [project.data / "many.jsonl"]}
    found = codes(broken, **around)["data_from_hub"]
    assert found.severity is Severity.ERROR
    mended = apply_fix(broken, found)
    assert mended.get("train_dataset.dataset.data_files") == {"train": str(project.data / "many.jsonl")}
    assert "data_from_hub" not in codes(mended, **around)


def test_a_data_set_of_another_kind_is_said(made: ConfigSource) -> None:
    foreign = made.set("train_dataset", {"type": Code("load_intern_repo_tokenized_dataset"), "folder": "/data"})
    assert codes(foreign)["foreign_dataset"].severity is Severity.ADVICE


def test_nothing_is_asked_while_training(made: ConfigSource) -> None:
    assert codes(made.set("evaluation_inputs", []))["no_questions"].severity is Severity.ADVICE


def test_a_model_that_is_quantised_already(made: ConfigSource, qwen2: ModelFacts) -> None:
    file = qwen2.path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"bits": 4}}))
    broken = NF4(made)
    found = codes(broken)["quantized_twice"]
    assert found.severity is Severity.ERROR
    assert "quantized_twice" not in codes(apply_fix(broken, found))


def test_a_start_mark_that_comes_twice(made: ConfigSource, qwen2: ModelFacts) -> None:
    """SmolLM2's bos_token is ChatML's own `<|im_start|>`."""
    assert "bos_twice" not in codes(made)
    file = qwen2.path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": "<|im_start|>"}))
    assert codes(made)["bos_twice"].severity is Severity.ADVICE


def test_names_and_packages(made: ConfigSource) -> None:
    unbound = ConfigSource(made.text + "x = openai_map_fn\ny = default_map_fn\nz = nowhere\n")
    found = [finding for finding in check(unbound, context(unbound)) if finding.code == "unknown_name"]
    assert [(finding.message.params["name"], finding.fix is not None) for finding in found] == [
        ("default_map_fn", True),
        ("nowhere", False),
    ]
    mended = apply_fix(unbound, found[0])
    assert "default_map_fn" in mended.text.partition("PART 1")[0]
    missing = ConfigSource("from no_such_package.deep import thing\n" + made.text)
    assert codes(missing)["package_missing"].message.params["package"] == "no_such_package"


def test_renaming_reaches_every_use(made: ConfigSource) -> None:
    source = ConfigSource(made.text + "input = 3\nlast = dict(input=input, text='input')\n")
    mended = apply_fix(source, codes(source)["reserved_name"])
    assert mended.text.endswith("input_ = 3\nlast = dict(input=input_, text='input')\n")


def test_disk_too_small_for_the_checkpoints(made: ConfigSource, qwen2: ModelFacts) -> None:
    one = qwen2.weight_bytes * 0.15
    machine = dataclasses.replace(GPU, free_bytes=int(one * 3.5))
    broken = made.set("save_total_limit", 20)
    found = codes(broken, machine=machine)["disk"]
    assert apply_fix(broken, found).get("save_total_limit") == 2
    assert "disk" not in codes(apply_fix(broken, found), machine=machine)


@pytest.mark.parametrize(
    ("code", "deepspeed", "choice", "method", "options"),
    [
        ("qlora_zero3", "deepspeed_zero3", "deepspeed_zero2", "qlora", {}),
        ("full_without_deepspeed", None, "deepspeed_zero2", "full", {}),
        ("no_deepspeed", "deepspeed_zero2", "none", "lora", {"deepspeed_version": None}),
        ("offload_drops", "deepspeed_zero2_offload", "deepspeed_zero2", "lora", {"deepspeed_version": "0.16.2"}),
    ],
)
def test_what_another_start_mends(
    made: ConfigSource, code: str, deepspeed: str | None, choice: str, method: str, options: dict[str, Any]
) -> None:
    source = set_method(made, method).set("lr", 2e-5 if method == "full" else 2e-4)
    machine = dataclasses.replace(GPU, **options)
    found = codes(source, deepspeed=deepspeed, machine=machine)[code]
    assert (found.choose, found.fix) == (choice, None)
    assert found.fix_message is not None
    assert code not in codes(source, deepspeed=None if choice == "none" else choice, machine=machine)


def test_offload_is_right_again_from_deepspeed_0_19(made: ConfigSource) -> None:
    for version, is_wrong in (("0.15.1", False), ("0.15.2", True), ("0.18.9+cu121", True), ("0.19.6", False)):
        machine = dataclasses.replace(GPU, deepspeed_version=version)
        found = codes(made, deepspeed="deepspeed_zero2_offload", machine=machine)
        assert ("offload_drops" in found) is is_wrong, version
        assert "offload_drops" not in codes(made, deepspeed="deepspeed_zero3_offload", machine=machine)


def test_sequence_parallelism_asks_for_deepspeed(made: ConfigSource) -> None:
    source = made.set("sequence_parallel_size", 2)
    found = codes(source, machine=FLASH, world_size=2)
    assert found["sequence_parallel_deepspeed"].choose == "deepspeed_zero2"


def test_fix_all_mends_the_guides_config_at_once(shipped: ConfigSource, project: Project) -> None:
    """XTuner's config as shipped, on this machine: hub model, hub data, float16, too many processes."""
    model = read_model(write_tiny_internlm2(project.model / "tiny-internlm2"))
    data = read_data(write_rows(project.data / "rows.jsonl", 3000))
    around = Surroundings(machine=GPU, models=[model.path], data_files=[data.path])
    before = check(shipped, gather(shipped, around))
    mended = fix_all(shipped, around)
    after = check(mended, gather(mended, around))
    assert len([finding for finding in before if finding.fix]) >= 3
    assert [finding.code for finding in after if finding.fix] == []
    assert mended.get("pretrained_model_name_or_path") == str(model.path)
    assert Path(mended.get("alpaca_en_path")) == data.path
