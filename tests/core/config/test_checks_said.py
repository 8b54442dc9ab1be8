"""What a finding says: its line, its numbers, what its fix puts in; and that each limit is where it is said to be."""

import ast
import dataclasses
import json
from typing import Any

import pytest

from core.config.checks import apply_fix, check
from core.config.edits import set_method
from core.config.facts import Machine, ModelFacts, read_data
from core.config.findings import Severity
from core.config.library import read_config
from core.config.source import ConfigSource
from core.config.validation import set_validation
from core.config.values import Code
from core.project import Project
from core.xtuner.catalogue import find
from tests.core.config.conftest import GPU
from tests.core.config.test_checks import (
    BROKEN,
    FLASH,
    HOOK,
    PLAIN_SAMPLER,
    SPLIT,
    TWO_CARDS,
    VARLEN,
    Edit,
    codes,
    context,
    many,
    sets,
)
from tests.training import write_rows

SAID: dict[str, tuple[str, dict[str, object], dict[str, Any] | None]] = {
    "map_num_proc": ("train_dataset.map_num_proc", {"value": 32, "best": 5, "rows": 4000}, None),
    "map_fn": (
        "train_dataset.dataset_map_fn",
        {"written": "alpaca_map_fn", "wanted": "openai_map_fn", "format": "messages"},
        None,
    ),
    "template_differs": ("prompt_template", {"name": "llama3_chat", "fits": "qwen_chat"}, None),
    "template_unknown": ("prompt_template", {"name": "nothing", "fits": "qwen_chat"}, None),
    "system_braces": ("SYSTEM", {}, {"SYSTEM": 'Answer as {{"a": 1}}'}),
    "long_answers": (HOOK, {"tokens": 600}, {f"{HOOK}.max_new_tokens": 128}),
    "save_steps": ("save_steps", {"steps": 500, "counts": 16, "rounded": 496}, {"save_steps": 496}),
    "no_optimizer_step": (
        "accumulative_counts",
        {"counts": 4000, "most": 46, "fewer": 1},
        {"accumulative_counts": 1},
    ),
    "varlen": ("use_varlen_attn", {}, None),
    "varlen_packing": ("use_varlen_attn", {}, {"pack_to_max_length": True}),
    "varlen_batch": ("batch_size", {"batch": 2, "counts": 8}, {"batch_size": 1, "accumulative_counts": 8}),
    "sequence_parallel": ("sequence_parallel_size", {"size": 4, "world_size": 2}, None),
    "sequence_parallel_sampler": ("sequence_parallel_size", {"size": 2}, {"sequence_parallel_size": 1}),
    "no_bf16": ("optim_wrapper.dtype", {}, {"optim_wrapper.dtype": "float16"}),
    "prefer_bf16": ("optim_wrapper.dtype", {}, None),
    "no_bitsandbytes": ("model.llm.quantization_config", {}, None),
    "qlora_on_cpu": ("model.llm.quantization_config", {}, None),
    "learning_rate": ("lr", {"rate": "0.2", "low": "2e-05", "high": "0.001", "usual": "0.0002"}, {"lr": 2e-4}),
    "too_long": ("max_length", {"length": 4096, "limit": 2048}, {"max_length": 2048}),
    "reserved_name": ("round", {"name": "round", "new": "round_"}, {"round_": 3}),
    "keep_all": ("save_total_limit", {}, {"save_total_limit": 3}),
    "model_missing": ("pretrained_model_name_or_path", {"path": "/gone/model", "offer": "tiny-qwen2"}, None),
    "model_from_hub": (
        "pretrained_model_name_or_path",
        {"path": "internlm/internlm2-chat-1_8b", "offer": "tiny-qwen2"},
        None,
    ),
    "data_missing": ("data_files", {"path": "/gone/rows.jsonl", "offer": "many.jsonl"}, None),
}
"""code of BROKEN: (path whose line is named, what the sentence is told, values after the fix; None: the good config again)"""


@pytest.mark.parametrize(
    ("code", "edit", "around"),
    [pytest.param(code, edit, around, id=code) for code, _, edit, around in BROKEN if code in SAID],
)
def test_a_finding_names_its_line_and_its_numbers_and_the_fix_puts_in_the_right_ones(
    made: ConfigSource, project: Project, code: str, edit: Edit, around: dict[str, Any]
) -> None:
    place, params, values = SAID[code]
    broken = edit(made)
    offered = {"models": [project.model / "tiny-qwen2"], "data_files": [project.data / "many.jsonl"]}
    finding = codes(broken, **{**offered, **around})[code]
    assert finding.line is not None
    assert finding.line == broken.line_of(place)
    assert finding.message.params == params
    mended = apply_fix(broken, finding)
    if values is None:
        assert ast.dump(ast.parse(mended.text)) == ast.dump(ast.parse(made.text))  # long paths are broken into lines
    else:
        assert {path: mended.get(path) for path in values} == values


SAMPLER = sets("train_dataloader.sampler.type", Code("SequenceParallelSampler"))
PROCESSES = "train_dataset.map_num_proc"
MODEL = "pretrained_model_name_or_path"
OFFLOAD = {"deepspeed": "deepspeed_zero2_offload", "machine": dataclasses.replace(GPU, deepspeed_version="0.16.2")}
OLD_CARD = {"machine": dataclasses.replace(GPU, supports_bf16=False)}
HALF = many(sets("optim_wrapper.dtype", "float16"), sets("model.llm.torch_dtype", Code("torch.float16")))


def window(counts: int, epochs: int) -> Edit:
    """At this length an epoch of the rows has at most 46 micro-steps."""
    return many(sets("max_length", 8192), sets("max_epochs", epochs), sets("accumulative_counts", counts))


LIMITS: list[tuple[str, Edit, Edit, dict[str, Any]]] = [
    ("long_answers", sets(f"{HOOK}.max_new_tokens", 256), sets(f"{HOOK}.max_new_tokens", 257), {}),
    ("learning_rate", sets("lr", 1e-3), sets("lr", 1.1e-3), {}),
    ("learning_rate", sets("lr", 2e-5), sets("lr", 1.9e-5), {}),
    ("too_long", sets("max_length", 2048), sets("max_length", 2049), {}),
    ("too_long", many(sets("max_length", 4096), sets("model.max_position_embeddings", 4096)), sets("max_length", 4096), {}),
    ("map_num_proc", sets(PROCESSES, 5), sets(PROCESSES, 6), {}),
    ("map_num_proc", sets(PROCESSES, 5), lambda one: one.delete(PROCESSES), {}),
    ("map_num_proc", many(sets(PROCESSES, 6), sets("pack_to_max_length", False)), sets(PROCESSES, 6), {}),
    ("keep_all", sets("save_total_limit", 1), sets("save_total_limit", 0), {}),
    ("save_steps", sets("save_steps", 0), sets("save_steps", 2), {}),
    ("no_optimizer_step", window(46, 1), window(47, 1), {}),
    ("no_optimizer_step", window(92, 2), window(93, 2), {}),
    ("varlen_batch", VARLEN, many(VARLEN, sets("batch_size", 2)), {"machine": FLASH}),
    ("sequence_parallel", sets("sequence_parallel_size", 2), sets("sequence_parallel_size", 3), TWO_CARDS),
    ("sequence_parallel", sets("sequence_parallel_size", 1), sets("sequence_parallel_size", 2), {"machine": GPU, "world_size": 2}),
    ("sequence_parallel_sampler", SPLIT, many(SPLIT, PLAIN_SAMPLER), TWO_CARDS),
    ("sequence_parallel_sampler", many(SPLIT, SAMPLER), many(SPLIT, PLAIN_SAMPLER), TWO_CARDS),
    ("system_braces", sets("SYSTEM", 'Answer as {{"a": 1}}'), sets("SYSTEM", "An open {"), {}),
    ("system_braces", sets("SYSTEM", "No braces."), sets("SYSTEM", "A closed }"), {}),
    ("model_missing", sets(MODEL, "owner/name"), sets(MODEL, "a/b/c"), {}),
    ("model_missing", sets(MODEL, "name"), sets(MODEL, "./name"), {}),
    ("model_from_hub", sets(MODEL, "~/name"), sets(MODEL, "owner/name"), {}),
    ("offload_drops", sets("accumulative_counts", 2), sets("accumulative_counts", 3), OFFLOAD),
    ("template_unknown", sets("prompt_template", Code("made_by(1)")), sets("prompt_template", Code("PROMPT_TEMPLATE.none")), {}),
    ("template_unknown", sets("prompt_template", {"INSTRUCTION": "{input}"}), sets("prompt_template", Code("PROMPT_TEMPLATE.none")), {}),
    ("no_bf16", HALF, sets("optim_wrapper.dtype", "float16"), OLD_CARD),
]  # fmt: skip
"""(code, an edit that is just right yet, one that is not any more, what differs around both)"""


@pytest.mark.parametrize(("code", "right", "wrong", "around"), LIMITS, ids=[case[0] for case in LIMITS])
def test_each_limit_is_where_it_is_said_to_be(
    made: ConfigSource, code: str, right: Edit, wrong: Edit, around: dict[str, Any]
) -> None:
    assert code not in codes(right(made), **around)
    assert code in codes(wrong(made), **around)


@pytest.mark.parametrize(
    ("name", "is_found"),
    [("PagedAdamW8bit", True), ("PagedAdamW32bit", True), ("AdamW8bit", True), ("AdamW", False), ("SGD", False)],
)
def test_optimizers_of_bitsandbytes_need_it_and_a_gpu(made: ConfigSource, name: str, is_found: bool) -> None:
    source = made.set("optim_type", Code(name))
    assert "optimizer" not in codes(source)
    for machine in (dataclasses.replace(GPU, has_bitsandbytes=False), Machine(has_bitsandbytes=True)):
        findings = codes(source, machine=machine)
        assert ("optimizer" in findings) is is_found
        if is_found:
            assert findings["optimizer"].message.params == {"name": name}
            assert findings["optimizer"].line == source.line_of("optim_type")
            assert apply_fix(source, findings["optimizer"]).get("optim_type") == Code("AdamW")


@pytest.mark.parametrize(
    ("method", "keep", "has_best", "free_gib", "needed_gib", "fewer"),
    [
        ("lora", 2, False, 9.0, None, None),
        ("lora", 2, False, 8.5, 9.0, 1),
        ("lora", 2, False, 5.5, 9.0, None),
        ("lora", 1, False, 5.5, 6.0, None),
        ("lora", 3, False, 12.0, None, None),
        ("lora", 3, True, 14.5, 15.0, 2),
        ("lora", -1, False, 8.5, 9.0, 1),
        ("lora", 0, True, 11.5, 12.0, 1),
        ("qlora", 2, False, 23.0, 24.0, 1),
        ("full", 2, False, 479.0, 480.0, 1),
    ],
)
def test_room_for_the_checkpoints(
    made: ConfigSource,
    qwen2: ModelFacts,
    project: Project,
    method: Any,
    keep: int,
    has_best: bool,
    free_gib: float,
    needed_gib: float | None,
    fewer: int | None,
) -> None:
    """Of 20 GiB of weights: a checkpoint has 3 GiB with LoRA, 8 with QLoRA, 160 with every weight; one more is there for a while."""
    source = set_method(made, method).set("save_total_limit", keep)
    if has_best:
        source = set_validation(source, read_data(write_rows(project.data / "held_out.jsonl", 40)))
        assert needed_gib is not None
        without = source.set("save_best", False)
    machine = dataclasses.replace(GPU, free_bytes=int(free_gib * 2**30))
    around = dataclasses.replace(
        context(source, machine=machine), model=dataclasses.replace(qwen2, weight_bytes=20 * 2**30)
    )
    findings = {one.code: one for one in check(source, around)}
    if needed_gib is None:
        assert "disk" not in findings
        return
    finding = findings["disk"]
    assert finding.line == source.line_of("save_total_limit")
    said = {name: finding.message.params[name] for name in ("keep", "needed_gib", "free_gib")}
    assert said == {"keep": keep if keep > 0 else 2, "needed_gib": needed_gib, "free_gib": free_gib}
    assert (finding.fix is None) is (fewer is None)
    if fewer is not None:
        assert apply_fix(source, finding).get("save_total_limit") == fewer
    if has_best:
        assert "disk" not in {one.code for one in check(without, around)}


@pytest.mark.parametrize(
    ("method", "weights", "around", "is_found"),
    [
        ("full", "float16", {}, True),
        ("full", "bfloat16", {}, True),
        ("full", "float32", {}, False),
        ("lora", "float16", {}, False),
        ("full", "float16", {"machine": Machine()}, False),
        ("full", "float16", {"deepspeed": "deepspeed_zero2"}, False),
    ],
)
def test_which_weights_the_gradient_scaler_refuses(
    made: ConfigSource, method: Any, weights: str, around: dict[str, Any], is_found: bool
) -> None:
    source = set_method(made, method).set("model.llm.torch_dtype", Code(f"torch.{weights}"))
    findings = codes(source, **around)
    assert ("half_full" in findings) is is_found
    if is_found:
        assert findings["half_full"].message.params == {"weights": weights}
        assert findings["half_full"].line == source.line_of("model.llm.torch_dtype")
    assert "half_full" not in codes(source.set("optim_wrapper.type", Code("OptimWrapper")), **around)


def test_the_usual_rate_is_that_of_the_method(made: ConfigSource) -> None:
    full = set_method(made, "full")
    for rate, is_found in ((1e-6, False), (9e-7, True), (1e-4, False), (1.1e-4, True)):
        source = full.set("lr", rate)
        findings = codes(source)
        assert ("learning_rate" in findings) is is_found, rate
        if is_found:
            assert apply_fix(source, findings["learning_rate"]).get("lr") == 2e-5


def test_fewer_micro_steps_a_step_are_a_tenth_of_the_fewest(made: ConfigSource) -> None:
    source = many(sets("max_length", 4096), sets("max_epochs", 5), sets("accumulative_counts", 500))(made)
    finding = codes(source)["no_optimizer_step"]
    assert finding.message.params == {"counts": 500, "most": 465, "fewer": 11}
    assert apply_fix(source, finding).get("accumulative_counts") == 11


def test_steps_between_checkpoints_are_one_window_at_least(made: ConfigSource) -> None:
    source = made.set("accumulative_counts", 16).set("save_steps", 5)
    assert apply_fix(source, codes(source)["save_steps"]).get("save_steps") == 16


def test_one_pack_a_micro_batch_keeps_the_texts_of_a_step(made: ConfigSource) -> None:
    """XTuner multiplies the accumulation by the size of sequence parallelism: the fix must not do it once more."""
    source = many(VARLEN, sets("batch_size", 2), sets("sequence_parallel_size", 2))(made)
    mended = apply_fix(source, codes(source, **TWO_CARDS)["varlen_batch"])
    assert mended.get("batch_size") == 1
    assert mended.effective("accumulative_counts") == 2 * source.effective("accumulative_counts")


def test_tokenising_processes_are_no_more_than_cores(made: ConfigSource) -> None:
    three = dataclasses.replace(GPU, cpu_count=3)
    finding = codes(made, machine=three)["map_num_proc"]
    assert finding.message.params == {"value": 5, "best": 3, "rows": 4000}
    assert apply_fix(made, finding).get("train_dataset.map_num_proc") == 3


def test_rows_that_need_no_map_function_have_none(made: ConfigSource, project: Project) -> None:
    file = project.data / "native.json"
    file.write_text(json.dumps([{"conversation": [{"input": "hi", "output": "hello"}]}] * 3))
    source = made.set("data_files", [str(file)])
    finding = codes(source)["map_fn"]
    assert (finding.message.params["written"], finding.message.params["wanted"]) == ("openai_map_fn", "None")
    mended = apply_fix(source, finding)
    assert mended.get("train_dataset.dataset_map_fn") is None
    assert "map_fn" not in codes(mended)
    back = mended.set("data_files", made.get("data_files"))
    assert codes(back)["map_fn"].message.params["written"] == "None"


def test_without_anything_to_offer_there_is_no_fix(made: ConfigSource) -> None:
    for path, value, code in (
        ("data_files", ["/gone/rows.jsonl"], "data_missing"),
        ("pretrained_model_name_or_path", "/gone/model", "model_missing"),
        ("pretrained_model_name_or_path", "owner/name", "model_from_hub"),
    ):
        finding = codes(made.set(path, value))[code]
        assert (finding.fix, finding.message.params["offer"]) == (None, "")


def test_lines_and_numbers_of_what_is_only_said(made: ConfigSource, project: Project, qwen2: ModelFacts) -> None:
    file = project.data / "sharegpt.json"
    file.write_text('[{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]')
    source = made.set("data_files", [str(file)])
    finding = codes(source)["data_needs_conversion"]
    assert finding.message.params == {"path": str(file), "format": "sharegpt"}
    assert finding.line == source.line_of("train_dataset.dataset_map_fn")
    assert finding.line is not None
    silent = made.set("evaluation_inputs", [])
    assert codes(silent)["no_questions"].line == silent.line_of(f"{HOOK}.evaluation_inputs")
    odd = made.set("prompt_template", Code("PROMPT_TEMPLATE.minicpm")).set("SYSTEM", "You are a poet.")
    finding = codes(odd)["system_unsupported"]
    assert (finding.line, finding.message.params) == (odd.line_of("SYSTEM"), {"template": "minicpm"})
    hub = made.set("train_dataset.dataset.path", "tatsu-lab/alpaca").delete("train_dataset.dataset.data_files")
    finding = codes(hub, data_files=[project.data / "many.jsonl"])["data_from_hub"]
    assert finding.line == hub.line_of("train_dataset.dataset.path")
    assert finding.message.params == {"name": "tatsu-lab/alpaca", "offer": "many.jsonl"}
    relative = made.set("data_files", ["data/many.jsonl"])
    finding = codes(relative, root=project.root)["relative_path"]
    assert (finding.line, finding.message.params) == (relative.line_of("data_files[0]"), {"path": "many.jsonl"})
    four_bit = set_method(made, "qlora")
    finding = codes(four_bit, deepspeed="deepspeed_zero3")["qlora_zero3"]
    assert finding.line == four_bit.line_of("model.llm.quantization_config")
    assert finding.message.params == {"deepspeed": "deepspeed_zero3"}
    finding = codes(made, **OFFLOAD)["offload_drops"]
    assert finding.message.params == {"version": "0.16.2", "counts": 4}
    tokenizer = qwen2.path / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "bos_token": "<|im_start|>"}))
    assert codes(made)["bos_twice"].message.params == {"bos": "<|im_start|>"}


def test_what_cannot_be_read_is_not_offered(made: ConfigSource, project: Project) -> None:
    file = project.data / "sharegpt.json"
    file.write_text('[{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]')
    finding = codes(made.set("data_files", ["/gone/rows.jsonl"]), data_files=[file])["data_missing"]
    assert (finding.fix, finding.message.params["offer"]) == (None, "")


def test_warm_up_counts_the_fewest_iterations(made: ConfigSource) -> None:
    """At this length 46 to 11 iterations an epoch: a share of three epochs that is none of the fewest, and one that is."""
    long = made.set("max_length", 8192).set("max_epochs", 3)
    assert "warmup_zero" not in codes(long.set("warmup_ratio", 0.04))
    source = long.set("warmup_ratio", 0.02)
    finding = codes(source)["warmup_zero"]
    assert finding.line == source.line_of("param_scheduler[LinearLR]")
    assert finding.message.params == {"low": 11, "high": 46}


def test_disk_of_checkpoints_without_end_is_said_for_two(made: ConfigSource, qwen2: ModelFacts) -> None:
    source = made.set("save_total_limit", -1)
    machine = dataclasses.replace(GPU, free_bytes=8 * 2**30)
    around = dataclasses.replace(
        context(source, machine=machine), model=dataclasses.replace(qwen2, weight_bytes=20 * 2**30)
    )
    (finding,) = (one for one in check(source, around) if one.code == "disk")
    assert finding.message.params["keep"] == 2


@pytest.mark.parametrize("name", ["internlm2_chat_1_8b_qlora_alpaca_e3", "llama3_8b_instruct_full_alpaca_e3"])
def test_xtuners_own_configs_bring_the_sampler_of_sequence_parallelism(name: str) -> None:
    """They choose it by the size: 203 of its configs would be refused with sequence parallelism otherwise."""
    entry = find(name)
    assert entry is not None
    source = SPLIT(ConfigSource(read_config(entry.path)))
    assert "sequence_parallel_sampler" not in codes(source, **TWO_CARDS)
    finding = codes(PLAIN_SAMPLER(source), **TWO_CARDS)["sequence_parallel_sampler"]
    assert finding.line == source.line_of("sequence_parallel_size")


def test_names_and_packages_are_said_with_their_lines(made: ConfigSource) -> None:
    last = len(made.text.splitlines())
    unbound = ConfigSource(made.text + "x = nowhere\ny = [nowhere for one in x]\nz = (lambda own: own)(len(x))\n")
    found = [one for one in check(unbound, context(unbound)) if one.code == "unknown_name"]
    assert [(one.line, one.severity, one.message.params) for one in found] == [
        (last + 1, Severity.ERROR, {"name": "nowhere"})
    ]
    missing = ConfigSource("import json\nfrom no_such_package.deep import thing\nfrom . import near\n" + made.text)
    finding = codes(missing)["package_missing"]
    assert (finding.line, finding.severity, finding.fix) == (2, Severity.ERROR, None)
    marked = ConfigSource("\ufeff" + made.text)
    finding = codes(marked)["byte_order_mark"]
    assert (finding.line, apply_fix(marked, finding).text) == (1, made.text)


def test_both_names_of_the_chat_hook_are_reserved(made: ConfigSource) -> None:
    taken = ConfigSource(made.text + "input = 1\nround = 2\n")
    found = [one for one in check(taken, context(taken)) if one.code == "reserved_name"]
    assert [(one.line, one.message.params) for one in found] == [
        (taken.line_of(name), {"name": name, "new": f"{name}_"}) for name in ("input", "round")
    ]


def test_what_a_config_leaves_out_is_taken_as_training_takes_it(made: ConfigSource) -> None:
    """One text a batch, no accumulation, packing on, one rank a text: nothing of it is held against a config that says nothing."""
    around = {"machine": dataclasses.replace(FLASH, deepspeed_version="0.16.2"), "world_size": 3}
    for written, wanted in (("", set()), ("accumulative_counts = 4\nuse_varlen_attn = True\n", {"offload_drops"})):
        findings = codes(ConfigSource(written), deepspeed="deepspeed_zero2_offload", **around)
        assert findings.keys() - {"foreign_dataset"} == wanted


def test_a_folder_without_a_model_is_named_beside_what_is_offered(made: ConfigSource, project: Project) -> None:
    source = made.set("pretrained_model_name_or_path", str(project.data))
    finding = codes(source, models=[project.model / "tiny-qwen2"])["model_without_config"]
    assert finding.line == source.line_of("pretrained_model_name_or_path")
    assert finding.message.params == {"path": str(project.data), "offer": "tiny-qwen2"}
