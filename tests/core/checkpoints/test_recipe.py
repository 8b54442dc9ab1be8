"""What a checkpoint was trained with, read from text that is never executed."""

from pathlib import Path

import pytest

from core.checkpoints.recipe import parse_config, read_recipe

CONFIG = """
from mmengine.dataset import DefaultSampler
pretrained_model_name_or_path = '/models/internlm2'
rank = 16
model = dict(
    llm=dict(pretrained_model_name_or_path=pretrained_model_name_or_path, trust_remote_code=True, torch_dtype=torch.float16),
    lora=dict(type=LoraConfig, r=rank, lora_alpha=32, target_modules=['wqkv', 'wo'], init_lora_weights='gaussian'),
)
prompt_template = PROMPT_TEMPLATE.internlm2_chat
SYSTEM = SYSTEM_TEMPLATE.alpaca
"""


def test_values_names_and_calls_are_read(tmp_path: Path) -> None:
    recipe = read_recipe(tmp_path / "run" / "iter_500.pth", {"cfg": CONFIG})
    assert recipe.lora == {"r": 16, "lora_alpha": 32, "target_modules": ["wqkv", "wo"], "init_lora_weights": "gaussian"}
    assert (recipe.base_model, recipe.trust_remote_code, recipe.run) == ("/models/internlm2", True, "run")
    assert recipe.prompt_template is not None
    assert "<|im_start|>user" in recipe.prompt_template["INSTRUCTION"]
    assert recipe.system
    assert "Below is an instruction" in recipe.system


def test_a_config_beside_the_checkpoint_serves_where_it_holds_none(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(CONFIG)
    (tmp_path / "zero_to_fp32.py").write_text("model = dict(lora=dict(r=1))")
    recipe = read_recipe(tmp_path / "iter_500.pth", {})
    assert recipe.lora is not None
    assert recipe.lora["r"] == 16
    assert read_recipe(tmp_path / "elsewhere" / "iter_1.pth", {}).lora is None


@pytest.mark.parametrize(
    "text", ["model = ", "model = dict(lora=3)", "model = [", "", "x = __import__('os').system('touch ran')"]
)
def test_text_that_is_no_config_is_not_run_and_gives_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(tmp_path / "run" / "iter_1.pth", {"cfg": text})
    assert (recipe.lora, recipe.base_model) == (None, None)
    assert not (tmp_path / "ran").exists()


def test_what_would_have_to_be_computed_stays_text() -> None:
    assert parse_config("a = 1 + 2\nb = f(3)\nc = a\nd = (a, {'k': b})") == {
        "a": "1 + 2",
        "b": "f(3)",
        "c": "1 + 2",
        "d": ["1 + 2", {"k": "f(3)"}],
    }
