"""DeepSpeed's JSON: read with places, checked against what DeepSpeed knows and what the config says, kept under a name."""

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from core.config import deepspeed
from core.config.checks_of_deepspeed import check_setting, require_usable
from core.config.deepspeed import Setting, Zero, read_zero, zero_of, zero_of_choice
from core.config.deepspeed_keys import SECTIONS
from core.config.facts import DataFacts, Machine, ModelFacts
from core.config.findings import Context, Finding, Severity
from core.config.json_places import read_object
from core.config.memory.budget import read_budget
from core.config.memory.setup import Start
from core.config.presets import Wishes, make
from core.config.source import ConfigSource
from core.errors import ConflictError, DanluError, InputError
from core.i18n import LANGUAGES, catalog
from core.project import Project
from core.xtuner.command import DEEPSPEED_CHOICES
from tests.core.config.conftest import GPU

AUTO = {"enabled": "auto"}
PLACE = ("key", "line", "column")


@pytest.fixture
def made(qwen2: ModelFacts, rows: DataFacts) -> ConfigSource:
    """batch size 1, accumulation 16, clipping at 1."""
    return ConfigSource(make(qwen2, rows, GPU, Wishes(accumulative_counts=16)))


def text(zero: dict[str, Any] | None = None, **top: Any) -> str:
    plain = {"zero_optimization": {"stage": 2, **(zero or {})}, "fp16": AUTO, "bf16": AUTO, **top}
    return json.dumps(plain, indent=2)


def found(source: ConfigSource, written: str, context: Context | None = None) -> list[Finding]:
    setting = Setting("mine", written, read_object(written), is_own=True)
    findings = check_setting(setting, source, context or Context(machine=GPU, world_size=2))
    for finding in findings:
        for language in LANGUAGES:
            assert "{" not in catalog(language).say(finding.message), finding
            assert finding.message.key in catalog(language).sentences
    return findings


@pytest.mark.parametrize("name", DEEPSPEED_CHOICES)
def test_what_xtuner_brings_is_right(made: ConfigSource, name: str) -> None:
    assert found(made, deepspeed.xtuner_text(name)) == []
    zero = read_zero(read_object(deepspeed.xtuner_text(name)).values)
    assert zero == zero_of_choice(name)
    assert zero.choice == name


@pytest.mark.parametrize(
    ("zero", "top", "code", "key"),
    [
        ({"overlap_com": True}, {}, "unknown_key_near", "zero_optimization.overlap_com"),
        ({"cpu_offload": True}, {}, "unknown_key_near", "zero_optimization.cpu_offload"),
        ({"qqq": 1}, {}, "unknown_key", "zero_optimization.qqq"),
        ({"offload_optimizer": {"devise": "cpu"}}, {}, "unknown_key_near", "zero_optimization.offload_optimizer.devise"),
        ({}, {"gradient_cliping": 1.0}, "ignored_key_near", "gradient_cliping"),
        ({}, {"//": "a note"}, "ignored_key", "//"),
        ({"stage": 4}, {}, "stage", "zero_optimization.stage"),
        ({"stage": 0}, {}, "stage", "zero_optimization.stage"),
        ({"stage": "2"}, {}, "kind", "zero_optimization.stage"),
        ({"reduce_bucket_size": 1.5}, {}, "kind", "zero_optimization.reduce_bucket_size"),
        ({"reduce_bucket_size": float("inf")}, {}, "kind", "zero_optimization.reduce_bucket_size"),
        ({"reduce_bucket_size": "auto"}, {}, "auto_is_default", "zero_optimization.reduce_bucket_size"),
        ({}, {"train_batch_size": "auto"}, "auto_stays", "train_batch_size"),
        ({"offload_optimizer": {"device": "gpu"}}, {}, "kind", "zero_optimization.offload_optimizer.device"),
        ({"offload_optimizer": {"device": "cpu"}}, {}, "needs_own_optimizer", "zero_optimization.offload_optimizer"),
        ({"offload_param": {"device": "cpu"}}, {}, "parameters_need_stage_3", "zero_optimization.offload_param"),
        (
            {"stage": 3, "offload_param": {"device": "nvme"}}, {}, "nvme_path", "zero_optimization.offload_param",
        ),
        ({"round_robin_gradients": True}, {}, "round_robin", "zero_optimization.round_robin_gradients"),
        ({}, {"gradient_accumulation_steps": 4}, "other_number", "gradient_accumulation_steps"),
        ({}, {"train_micro_batch_size_per_gpu": 2}, "other_number", "train_micro_batch_size_per_gpu"),
        ({}, {"gradient_clipping": 0.5}, "other_number", "gradient_clipping"),
        ({}, {"train_batch_size": 16}, "train_batch", "train_batch_size"),
        ({}, {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "two_dtypes", "bf16"),
        ({}, {"fp16": {"enabled": False}, "bf16": {"enabled": False}}, "float32", "bf16"),
        ({}, {"fp16": {"enabled": True}}, "other_dtype", "fp16"),
        ({}, {"optimizer": {"type": "Adam"}}, "optimizer_ignored", "optimizer"),
        ({}, {"scheduler": {"type": "WarmupLR"}}, "second_schedule", "scheduler"),
        ({}, {"amp": {"enabled": True}}, "amp", "amp"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(
    made: ConfigSource, zero: dict[str, Any], top: dict[str, Any], code: str, key: str
) -> None:
    written = text(zero, **top)
    findings = [finding for finding in found(made, written) if finding.code == f"deepspeed_{code}"]
    assert [finding.message.params["key"] for finding in findings] == [key]
    line = findings[0].message.params["line"]
    assert f'"{key.rpartition(".")[2]}"' in written.splitlines()[line - 1]


@pytest.mark.parametrize(
    ("zero", "top", "code", "severity", "params"),
    [
        ({"overlap_com": True}, {}, "unknown_key_near", "error", {"near": "overlap_comm"}),
        ({"cpu_offload": True}, {}, "unknown_key_near", "error", {"near": "offload_optimizer"}),
        ({"qqq": 1}, {}, "unknown_key", "error", {"near": ""}),
        ({}, {"gradient_cliping": 1.0}, "ignored_key_near", "warning", {"near": "gradient_clipping"}),
        ({}, {"//": "a note"}, "ignored_key", "warning", {"near": ""}),
        ({"stage": 4}, {}, "stage", "error", {"value": "4"}),
        ({"stage": None}, {}, "stage", "error", {"value": "–"}),
        ({"stage": "2"}, {}, "kind", "error", {"value": "2", "kind": "int"}),
        ({"stage": True}, {}, "kind", "error", {"value": "True", "kind": "int"}),
        ({"overlap_comm": 1}, {}, "kind", "error", {"value": "1", "kind": "bool"}),
        ({"reduce_bucket_size": 1.5}, {}, "kind", "error", {"value": "1.5", "kind": "int"}),
        ({"offload_optimizer": {"device": "gpu"}}, {}, "kind", "error", {"value": "gpu", "kind": "none / cpu / nvme"}),
        ({}, {"communication_data_type": 16}, "kind", "error", {"value": "16", "kind": "text"}),
        ({}, {"steps_per_print": "x" * 40}, "kind", "error", {"value": "x" * 40, "kind": "int"}),
        ({}, {"steps_per_print": "x" * 41}, "kind", "error", {"value": "x" * 39 + "…", "kind": "int"}),
        ({}, {"fp16": 3}, "kind", "error", {"value": "3", "kind": "object"}),
        ({"reduce_bucket_size": "auto"}, {}, "auto_is_default", "warning", {}),
        ({}, {"train_batch_size": "auto"}, "auto_stays", "error", {}),
        ({"offload_param": {"device": "cpu"}}, {}, "parameters_need_stage_3", "error", {"stage": 2}),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, "nvme_path", "error", {"name": "offload_param"}),
        ({"offload_optimizer": {"device": "nvme"}}, {}, "nvme_path", "error", {"name": "offload_optimizer"}),
        ({}, {"gradient_accumulation_steps": 4}, "other_number", "warning", {"value": "4", "used": "16"}),
        ({}, {"train_micro_batch_size_per_gpu": 2}, "other_number", "warning", {"value": "2", "used": "1"}),
        ({}, {"gradient_clipping": 0.5}, "other_number", "warning", {"value": "0.5", "used": "1"}),
        ({}, {"train_batch_size": 16}, "train_batch", "error", {"value": 16, "expected": 32, "batch": 1, "counts": 16, "ranks": 2}),
        ({}, {"fp16": {"enabled": True}}, "other_dtype", "warning", {"used": "float16", "configured": "bfloat16"}),
        ({}, {"optimizer": {"type": "Adam"}}, "optimizer_ignored", "warning", {}),
        ({}, {"scheduler": {"type": "WarmupLR"}}, "second_schedule", "error", {}),
        ({}, {"amp": {"enabled": True}}, "amp", "error", {}),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_values(
    made: ConfigSource, zero: dict[str, Any], top: dict[str, Any], code: str, severity: str, params: dict[str, object]
) -> None:
    (finding,) = (one for one in found(made, text(zero, **top)) if one.code == f"deepspeed_{code}")
    assert finding.severity == severity
    assert {name: value for name, value in finding.message.params.items() if name not in PLACE} == params


@pytest.mark.parametrize(
    ("zero", "top"),
    [
        ({"stage": 1}, {}),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, {}),
        ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}, {}),
        ({"offload_param": {"device": "none"}}, {}),
        ({"offload_param": None}, {}),
        ({"offload_optimizer": {"device": "none"}}, {}),
        ({"offload_optimizer": {"device": "cpu"}}, {"zero_force_ds_cpu_optimizer": False}),
        ({"round_robin_gradients": False}, {}),
        ({"reduce_bucket_size": 5e8}, {}),
        ({}, {"gradient_clipping": "auto"}),
        ({}, {"gradient_clipping": 1.0}),
        ({}, {"train_batch_size": 32}),
        ({}, {"fp16": {"enabled": False}, "bf16": {"enabled": True}}),
        ({}, {"optimizer": {}, "scheduler": {}}),
        ({}, {"amp": {"enabled": False}}),
        ({}, {"communication_data_type": "fp16"}),
    ],
)
def test_what_is_right_is_not_spoken_of(made: ConfigSource, zero: dict[str, Any], top: dict[str, Any]) -> None:
    assert found(made, text(zero, **top)) == []


def test_the_numbers_are_those_the_config_trains_with(made: ConfigSource) -> None:
    """Batch times accumulation times ranks; clipping where the config has it, else XTuner's own 1."""
    source = made.set("batch_size", 2).set("accumulative_counts", 3).set("max_norm", 0.3)
    numbers = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "gradient_clipping": 0.3}
    assert found(source, text(train_batch_size=12, **numbers)) == []
    (whole,) = found(source, text(train_batch_size=6, **numbers))
    assert whole.message.params["expected"] == 12
    silent = ConfigSource("optim_wrapper = dict()\n")
    assert found(silent, text(gradient_clipping=1, gradient_accumulation_steps=1, train_batch_size=2)) == []
    own = ConfigSource("optim_wrapper = dict(clip_grad=dict(max_norm=0.5))\n")
    assert found(own, text(gradient_clipping=0.5)) == []
    assert [one.message.params["used"] for one in found(own, text(gradient_clipping=1))] == ["0.5"]


def test_precision_where_the_config_has_the_other_one(made: ConfigSource) -> None:
    brain = text(fp16={"enabled": False}, bf16={"enabled": True})
    (finding,) = found(made.set("optim_wrapper.dtype", "float16"), brain)
    assert (finding.code, finding.severity) == ("deepspeed_other_dtype", Severity.WARNING)
    said = {name: finding.message.params[name] for name in ("key", "used", "configured")}
    assert said == {"key": "bf16", "used": "bfloat16", "configured": "float16"}
    half = text(fp16={"enabled": True}, bf16={"enabled": False})
    assert found(made.set("optim_wrapper.dtype", "float16"), half) == []
    nothing = text(fp16={"enabled": False}, bf16={"enabled": False})
    assert found(made, nothing, Context(machine=Machine())) == []
    assert found(made, brain, Context(machine=Machine(supports_bf16=False))) == []


def test_a_refusal_counts_the_errors_and_names_the_first(made: ConfigSource) -> None:
    broken = text({"overlap_com": True, "stage": 7}, steps=1)
    around = Context(machine=GPU, setting=Setting("mine", broken, read_object(broken), is_own=True))
    with pytest.raises(InputError) as error:
        require_usable(made, around)
    expected = {"name": "mine", "count": 2, "key": "zero_optimization.stage", "line": 3}
    assert (error.value.code, error.value.params) == ("deepspeed.has_errors", expected)
    require_usable(made, dataclasses.replace(around, setting=None))
    warned = text(notes=1)
    require_usable(made, Context(machine=GPU, setting=Setting("mine", warned, read_object(warned), is_own=True)))


def test_numbers_that_agree_and_those_of_another_machine(made: ConfigSource) -> None:
    same = {"gradient_accumulation_steps": 16, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1}
    assert found(made, text({"reduce_bucket_size": 5e7}, train_batch_size=32, **same)) == []
    old = dataclasses.replace(GPU, supports_bf16=False)
    brain = text(fp16={"enabled": False}, bf16={"enabled": True})
    assert "deepspeed_no_bfloat16" in [one.code for one in found(made, brain, Context(machine=old))]


def test_a_start_that_cannot_be_is_refused(made: ConfigSource) -> None:
    broken = text({"stage": 7})
    around = Context(machine=GPU, setting=Setting("mine", broken, read_object(broken), is_own=True))
    with pytest.raises(InputError, match=r"has_errors.*zero_optimization.stage"):
        require_usable(made, around)
    for stage in (1, 2):
        offload = text({"stage": stage, "offload_optimizer": {"device": "cpu"}}, zero_force_ds_cpu_optimizer=False)
        setting = Setting("mine", offload, read_object(offload), is_own=True)
        machine = dataclasses.replace(GPU, deepspeed_version="0.16.2")
        around = Context(machine=machine, deepspeed=setting.zero.choice, setting=setting)
        with pytest.raises(InputError, match="drops_batches"):
            require_usable(made, around)
        require_usable(made, dataclasses.replace(around, machine=GPU))


def test_the_worst_comes_first(made: ConfigSource) -> None:
    findings = found(made, text({"stage": 9, "overlap_com": 1}, notes=1, gradient_accumulation_steps=3))
    assert [finding.severity for finding in findings] == [Severity.ERROR] * 2 + [Severity.WARNING] * 2


@pytest.mark.parametrize(
    ("written", "code", "line", "column"),
    [
        ('{\n  "a": 1,\n}', "broken_json", 3, 1),
        ('{"a": 1 "b": 2}', "broken_json", 1, 9),
        ("", "broken_json", 1, 1),
        ("[" * 100_000, "broken_json", 1, 1),
        ('{"a": ' + "9" * 5000 + "}", "broken_json", 1, 1),
        ('{\n"a": 1,\n"a": 2}', "key_twice", 3, None),
        ("[1]", "no_object", None, None),
    ],
)
def test_what_is_no_json_object_is_said_with_its_place(
    written: str, code: str, line: int | None, column: int | None
) -> None:
    with pytest.raises(InputError) as error:
        read_object(written)
    assert error.value.code == f"deepspeed.{code}"
    assert (error.value.params.get("line"), error.value.params.get("column")) == (line, column)


KEYS = some.text(alphabet='ab"\\ü:{}[], \n', min_size=1, max_size=4)
VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.text(alphabet='x"\\:{},[]', max_size=4),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@given(some.dictionaries(KEYS, VALUES, max_size=4), some.sampled_from([None, 0, 2]))
def test_every_key_is_found_where_it_stands(value: dict[str, Any], indent: int | None) -> None:
    written = json.dumps(value, indent=indent, ensure_ascii=False)
    read = read_object(written)
    assert read.values == value
    lines = written.split("\n")
    for path, (line, column) in read.places.items():
        key, _ = json.JSONDecoder().raw_decode(lines[line - 1], column - 1)
        assert path.endswith(key)


def test_the_keys_are_those_of_the_installed_deepspeed() -> None:
    """Read from its source: importing it takes seconds."""
    found = importlib.util.find_spec("deepspeed")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "runtime"
    models = {
        "zero_optimization": ("zero/config.py", "DeepSpeedZeroConfig"),
        "zero_optimization.offload_optimizer": ("zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
        "zero_optimization.offload_param": ("zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
        "fp16": ("precision_config.py", "DeepSpeedFP16Config"),
        "bf16": ("precision_config.py", "DeepSpeedBF16Config"),
    }
    for section, (file, name) in models.items():
        module = ast.parse((folder / file).read_text(encoding="utf-8"))
        model = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name)
        fields = {n.target.id for n in model.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        aliases = {
            word.value.value
            for word in ast.walk(model)
            if isinstance(word, ast.keyword) and word.arg == "alias" and isinstance(word.value, ast.Constant)
        }
        assert set(SECTIONS[section]) <= fields | aliases, section


def test_own_settings_are_kept_under_a_name(project: Project) -> None:
    first = text({"stage": 1})
    path = deepspeed.save(project, "mine", first)
    assert path == project.config / "deepspeed/mine.json"
    assert deepspeed.list_own(project) == ["mine"]
    assert deepspeed.find(project, "mine").text == first
    assert deepspeed.find(project, "mine").zero == Zero(stage=1, overlaps=False)
    with pytest.raises(ConflictError, match="name_taken"):
        deepspeed.save(project, "mine", first)
    deepspeed.save(project, "mine", text(), before=first)
    with pytest.raises(ConflictError, match="changed_on_disk"):
        deepspeed.save(project, "mine", first, before=first)
    deepspeed.remove(project, "mine")
    assert deepspeed.list_own(project) == []
    kept = [file.read_text() for file in sorted((project.private / "versions").iterdir())]
    assert sorted(kept) == sorted([first, text()])
    with pytest.raises(InputError, match="unknown_deepspeed"):
        deepspeed.find(project, "mine")


@pytest.mark.parametrize("name", ["", "none", "deepspeed_zero2", "../config/tiny", "a/b", ".hidden", "x" * 65])
def test_a_name_is_a_plain_file_name_of_ones_own(project: Project, name: str) -> None:
    with pytest.raises(DanluError, match=r"bad_name|name_of_xtuner"):
        deepspeed.save(project, name, text())
    if name not in ("none", "deepspeed_zero2"):
        with pytest.raises(DanluError, match="bad_name"):
            deepspeed.find(project, name)


def test_the_memory_budget_reads_the_json(made: ConfigSource) -> None:
    def budget(zero: dict[str, Any]) -> int:
        details = {"deepspeed": "deepspeed_zero2", "deepspeed_config": {"text": text(zero)}}
        start = Start(world_size=2, deepspeed="deepspeed_zero2", zero=zero_of(details))
        return read_budget(made, start).allocated_bytes

    overlapping = budget({"overlap_comm": True})
    assert overlapping == read_budget(made, Start(world_size=2, deepspeed="deepspeed_zero2")).allocated_bytes
    assert overlapping - budget({"overlap_comm": False}) == 1_000_000_000
    assert overlapping - budget({"overlap_comm": True, "reduce_bucket_size": 5e7}) == 1_800_000_000
    whole = budget({"stage": 3, "overlap_comm": True})
    assert budget({"stage": 3, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}}) < whole
