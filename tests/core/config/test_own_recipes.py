"""A person's own recipes: recorded from an edited config, shared as a file, applied to another one, and what a file may not hold."""

import json
from typing import Any

import pytest

from core.config import recipes
from core.config.own_recipes import delete_recipe, list_recipes, read_recipe, record, save_recipe, steps
from core.config.source import ConfigSource
from core.config.values import Code
from core.errors import ConflictError, InputError
from core.project import Project


@pytest.fixture
def edited(shipped: ConfigSource) -> ConfigSource:
    return (
        shipped.set("pretrained_model_name_or_path", "/my/model")
        .set("max_length", 777)
        .set("lr", 3e-4)
        .set("SYSTEM", 'Say "hi"')
        .set("prompt_template", Code("PROMPT_TEMPLATE.qwen_chat"))
        .set("model.lora.r", 16)
        .set("custom_hooks[EvaluateChatHook].max_new_tokens", 99)
    )


def test_from_one_config_to_another(
    project: Project, shipped: ConfigSource, edited: ConfigSource, made: ConfigSource
) -> None:
    recipe = record("我的 recipe", shipped, edited)
    assert {change.path for change in recipe.changes} == {
        "max_length",
        "lr",
        "SYSTEM",
        "prompt_template",
        "model.lora.r",
        "custom_hooks[EvaluateChatHook].max_new_tokens",
    }
    save_recipe(project, recipe)
    shared = read_recipe((project.private / "recipes" / "我的 recipe.json").read_bytes())
    assert shared == recipe == list_recipes(project)[0]
    applied = recipes.apply(made, steps(shared))
    wanted = {"max_length": 777, "lr": 3e-4, "SYSTEM": 'Say "hi"', "model.lora.r": 16}
    assert {path: applied.get(path) for path in wanted} == wanted
    assert applied.get("prompt_template") == Code("PROMPT_TEMPLATE.qwen_chat")
    assert applied.get("pretrained_model_name_or_path") == made.get("pretrained_model_name_or_path")
    delete_recipe(project, "我的 recipe")
    assert list_recipes(project) == []


def test_a_config_without_the_places_is_left_alone(shipped: ConfigSource, edited: ConfigSource) -> None:
    other = ConfigSource("lr = 1e-5\n")
    assert recipes.apply(other, steps(record("x", shipped, edited))).text == "lr = 0.0003\n".replace("0.0003", "3e-4")


def test_nothing_changed_is_no_recipe(shipped: ConfigSource) -> None:
    with pytest.raises(InputError, match=r"config\.empty_recipe"):
        record("x", shipped, shipped.set("pretrained_model_name_or_path", "/my/model"))


def test_another_recipe_is_not_overwritten(project: Project, shipped: ConfigSource, edited: ConfigSource) -> None:
    save_recipe(project, record("x", shipped, edited))
    save_recipe(project, record("x", shipped, edited))
    with pytest.raises(ConflictError, match=r"config\.recipe_exists"):
        save_recipe(project, record("x", shipped, edited.set("lr", 1e-3)))


def file_with(path: str = "lr", value: str = "1e-4", **options: Any) -> bytes:
    recipe = {"schema_version": 1, "name": "x", "edits": [{"path": path, "value": value}], **options}
    return json.dumps(recipe).encode()


@pytest.mark.parametrize(
    "value",
    [
        "__import__('os').system('x')",
        "print",
        "torch.load('x')",
        "torch.__dict__",
        "(lambda: 1)()",
        "[x for x in y]",
        "f'{1}'",
        "1 +",
        "os.path",
        "(" * 500,
    ],
)
def test_a_value_that_could_run_is_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"config\.bad_recipe"):
        read_recipe(file_with(value=value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"name": "x"}',
        file_with(path="train_dataloader.dataset"),
        file_with(path="../x"),
        file_with(name="../../etc/x"),
        file_with(schema_version=9),
        file_with(edits=[1]),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"config\.bad_recipe"):
        read_recipe(data)
