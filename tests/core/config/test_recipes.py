"""The guide's edits: on the very config the guide starts from, line by line, and on any other without doing harm."""

import pytest

from core.config import recipes
from core.config.facts import DataFacts, ModelFacts
from core.config.library import read_config
from core.config.load import load_values
from core.config.source import ConfigSource
from core.i18n import LANGUAGES, catalog
from core.xtuner.catalogue import configs, find


def test_chapter_1_4_is_what_training_reads(shipped: ConfigSource, internlm2: ModelFacts, rows: DataFacts) -> None:
    values = load_values(recipes.apply(shipped, recipes.guide_small(internlm2, rows)).text)
    dataset = values["train_dataloader"]["dataset"]
    assert values["model"]["llm"]["pretrained_model_name_or_path"] == str(internlm2.path)
    assert dataset["dataset"]["path"] == "json"
    assert dataset["dataset"]["data_files"] == {"train": str(rows.path)}
    assert dataset["dataset_map_fn"] == "xtuner.dataset.map_fns.openai_map_fn"
    assert (dataset["max_length"], dataset["map_num_proc"]) == (1024, 1)
    assert values["train_cfg"]["max_epochs"] == 2
    assert values["default_hooks"]["checkpoint"]["max_keep_ckpts"] == 3
    hook = next(one for one in values["custom_hooks"] if one["type"].endswith("EvaluateChatHook"))
    assert hook["every_n_iters"] == 300
    assert hook["evaluation_inputs"] == list(recipes.QUESTIONS)
    assert "alpaca_map_fn" not in read_imports(recipes.apply(shipped, recipes.guide_small(internlm2, rows)))


def read_imports(source: ConfigSource) -> str:
    return source.text.partition("PART 1")[0]


def test_chapters_2_4_and_3(internlm2: ModelFacts, rows: DataFacts) -> None:
    entry = find("internlm2_chat_20b_qlora_alpaca_e3")
    assert entry is not None
    source = recipes.apply(ConfigSource(read_config(entry.path)), recipes.guide_large(internlm2, rows))
    wanted = {"max_length": 4096, "batch_size": 4, "accumulative_counts": 16, "max_epochs": 50, "save_total_limit": 3}
    assert {name: source.effective(name) for name in wanted} == wanted
    assert source.effective("save_steps") % source.effective("accumulative_counts") == 0


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_each_step_is_explained_in_both_languages(
    recipe: str, shipped: ConfigSource, internlm2: ModelFacts, rows: DataFacts
) -> None:
    steps = recipes.RECIPES[recipe](internlm2, rows)
    shown = recipes.show(shipped, steps)
    assert len(shown) == len(steps)
    for language in LANGUAGES:
        words = [catalog(language).say(step.why) for step in shown]
        assert len(set(words)) == len(words)
        assert not [word for word in words if "config.recipe" in word or "{" in word]
    assert sum(bool(step.diff) for step in shown) > len(shown) // 2
    again = recipes.show(recipes.apply(shipped, steps), steps)
    assert not [step for step in again if step.diff]


def test_a_recipe_does_no_harm_to_any_config() -> None:
    """Without model and data it changes only variables that the config has; what parses still parses."""
    for entry in [entry for entry in configs() if entry.is_supervised][::23]:
        source = ConfigSource(read_config(entry.path))
        edited = recipes.apply(source, recipes.guide_small(None, None))
        assert edited.text.count("\n") >= source.text.count("\n") - 12, entry.name
        assert {line for line in source.text.splitlines() if line.startswith("#")} <= set(edited.text.splitlines())
