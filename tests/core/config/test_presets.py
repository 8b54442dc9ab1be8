"""Our own configs for models XTuner ships none for: written from the model itself, readable by XTuner, nothing wrong with them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from core.config.checks import Surroundings, check, gather
from core.config.facts import DataFacts, Machine, ModelFacts, read_data, read_model
from core.config.load import load_values
from core.config.presets import Wishes, file_name, make
from core.config.source import ConfigSource
from core.errors import InputError
from core.project import Project
from tests.core.config.conftest import GPU
from tests.models import write_tiny_internlm2, write_tiny_llama, write_tiny_qwen2

WRITERS = {"qwen2": write_tiny_qwen2, "llama": write_tiny_llama, "internlm2": write_tiny_internlm2}
CPU = Machine(cpu_count=2)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_wrong_with_it(project: Project, many_rows: DataFacts, name: str, method: str) -> None:
    model = read_model(WRITERS[name](project.model / name))
    source = ConfigSource(make(model, many_rows, GPU, Wishes(method=method, max_length=64)))
    around = Surroundings(machine=GPU, deepspeed="deepspeed_zero2" if method == "full" else None)
    assert check(source, gather(source, around)) == []
    alone = check(source, gather(source, Surroundings(machine=GPU)))
    assert [finding.code for finding in alone] == (["full_without_deepspeed"] if method == "full" else [])
    assert "<<" not in source.text
    assert [number for number in range(1, 6) if f"PART {number}" in source.text] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "method", "machine"), [("qwen2", "qlora", GPU), ("internlm2", "lora", GPU), ("llama", "full", CPU)]
)
def test_mmengine_reads_it(project: Project, many_rows: DataFacts, name: str, method: str, machine: Machine) -> None:
    model = read_model(WRITERS[name](project.model / name))
    values = load_values(make(model, many_rows, machine, Wishes(method=method, max_length=64, accumulative_counts=2)))
    llm = values["model"]["llm"]
    assert llm["pretrained_model_name_or_path"] == str(model.path)
    assert ("quantization_config" in llm) is (method == "qlora")
    assert ("lora" in values["model"]) is (method != "full")
    assert llm["attn_implementation"] == "sdpa"
    assert values["train_dataloader"]["dataset"]["max_length"] == 64
    assert values["optim_wrapper"]["accumulative_counts"] == 2
    assert values["optim_wrapper"]["type"].endswith("OptimWrapper")
    assert ("Amp" in values["optim_wrapper"]["type"]) is (machine is GPU)
    if name == "internlm2":
        assert values["model"]["lora"]["target_modules"] == ["wqkv", "wo", "w1", "w2", "w3"]


CHATML = "{{ '<|im_start|>' + role }}"
LLAMA3 = "{{ '<|start_header_id|>' + role }}"


@pytest.mark.parametrize(
    ("model_type", "jinja", "template"),
    [
        ("qwen2", CHATML, "qwen_chat"),
        ("qwen3", CHATML, "qwen_chat"),
        ("llama", LLAMA3, "llama3_chat"),
        ("internlm2", CHATML, "internlm2_chat"),
        ("internlm3", CHATML, "internlm2_chat"),
        ("smollm3", CHATML, "qwen_chat"),
        ("some_new_family", CHATML, "qwen_chat"),
    ],
)
def test_families_without_a_config_of_xtuner(
    project: Project, many_rows: DataFacts, model_type: str, jinja: str, template: str
) -> None:
    folder = write_tiny_llama(project.model / "new")
    edit_json(folder / "config.json", lambda value: {**value, "model_type": model_type})
    edit_json(folder / "tokenizer_config.json", lambda value: {**value, "chat_template": jinja})
    source = ConfigSource(make(read_model(folder), many_rows, GPU, Wishes()))
    assert str(source.get("prompt_template")) == f"PROMPT_TEMPLATE.{template}"
    # Where the layers of a family are not known by name XTuner looks for them itself.
    assert source.has("model.lora.target_modules") is (model_type != "some_new_family")


def edit_json(file: Path, edit: Callable[[dict[str, object]], dict[str, object]]) -> None:
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))


def test_a_warm_up_only_where_it_lasts_a_step(qwen2: ModelFacts, rows: DataFacts, many_rows: DataFacts) -> None:
    wishes = Wishes(max_length=64)
    assert not ConfigSource(make(qwen2, rows, GPU, wishes)).has("param_scheduler[LinearLR]")
    assert ConfigSource(make(qwen2, many_rows, GPU, wishes)).has("param_scheduler[LinearLR]")


def test_precision_follows_the_machine(qwen2: ModelFacts, many_rows: DataFacts) -> None:
    old = replace(GPU, supports_bf16=False)
    machines = {"gpu": GPU, "old": old, "cpu": CPU}
    found = {name: ConfigSource(make(qwen2, many_rows, machine, Wishes())) for name, machine in machines.items()}
    assert {name: str(source.get("model.llm.torch_dtype")) for name, source in found.items()} == {
        "gpu": "torch.bfloat16",
        "old": "torch.float16",
        "cpu": "torch.float32",
    }
    assert found["old"].get("optim_wrapper.loss_scale") == "dynamic"
    assert not found["gpu"].has("optim_wrapper.loss_scale")
    assert found["cpu"].get("env_cfg.dist_cfg.backend") == "gloo"


def test_what_cannot_be_trained_is_refused(project: Project, qwen2: ModelFacts, many_rows: DataFacts) -> None:
    with pytest.raises(InputError, match=r"config\.quantized_base"):
        make(replace(qwen2, is_quantized=True), many_rows, GPU, Wishes())
    with pytest.raises(InputError, match=r"config\.no_causal_template"):
        make(replace(qwen2, template=None), many_rows, GPU, Wishes())
    file = project.data / "sharegpt.json"
    file.write_text('[{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}]')
    with pytest.raises(InputError, match=r"config\.needs_conversion"):
        make(qwen2, read_data(file), GPU, Wishes())


def test_names_are_as_xtuner_names_them(qwen2: ModelFacts, rows: DataFacts) -> None:
    assert file_name(qwen2, rows, "lora") == "tiny_qwen2_lora_rows"
    assert file_name(replace(qwen2, path=Path("/m/Qwen2.5-7B (新)")), None, "full") == "qwen2_5_7b_新_full_data"
