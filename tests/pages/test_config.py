"""The config page: its views, one's own recipes, comparison with another config, and taking a config away."""

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.config import deepspeed
from core.config.library import add_config, open_draft
from core.config.own_recipes import list_recipes
from core.config.source import ConfigSource
from core.config.validation import read_validation
from core.project import Project
from tests.models import write_tiny_qwen2
from tests.training import make_project

SCRIPT = str(Path(__file__).parents[2] / "pages/prepare/config.py")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path / "p", write_tiny_qwen2)[0]


def show(project: Project, view: str, language: str = "en") -> AppTest:
    app = AppTest.from_file(SCRIPT, default_timeout=240)
    app.session_state["project_root"] = str(project.root)
    app.session_state["language"] = language
    app.session_state["config_view"] = view
    app.session_state["config_name"] = app.session_state["config_open"] = "tiny"
    app.run()
    assert not app.exception
    return app


def draft(project: Project) -> ConfigSource:
    return ConfigSource(open_draft(project, "tiny").text)


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("view", ["form", "guide", "source", "changes"])
def test_every_view_opens(project: Project, view: str, language: str) -> None:
    app = show(project, view, language)
    assert not app.error
    assert "xtuner train" in "\n".join(code.value for code in app.code)


def test_the_form_writes_into_the_draft(project: Project) -> None:
    app = show(project, "form")
    app.text_input(key="config_field_tiny_lr").input("3e-4").run()
    app.text_area(key="config_field_tiny_lora_targets").input("q_proj\nv_proj").run()
    assert (draft(project).get("lr"), draft(project).get("model.lora.target_modules")) == (3e-4, ["q_proj", "v_proj"])
    app.text_area(key="config_field_tiny_lora_targets").input("").run()
    assert draft(project).get("model.lora.target_modules") is None
    app.text_input(key="config_field_tiny_lr").input("fast").run()
    assert any("fast" in error.value for error in app.error)
    assert draft(project).get("lr") == 3e-4


def test_a_part_is_held_out_and_validated_on(project: Project) -> None:
    app = show(project, "form")
    assert not any(box.key == "config_field_tiny_validation_freq" for box in app.text_input)
    app.number_input(key="config_hold_out_tiny").set_value(30).run()
    app.button(key="config_hold_out_do_tiny").click().run()
    assert not app.exception
    validation = read_validation(draft(project))
    assert validation is not None
    assert [Path(file).name for file in validation.files] == ["rows_validation.jsonl"]
    assert draft(project).get("data_files") == [str(project.data / "rows_train.jsonl")]
    app.text_input(key="config_field_tiny_early_stop_patience").input("3").run()
    app.selectbox(key="config_field_tiny_optim_type").select("Adam").run()
    app.text_input(key="config_field_tiny_beta2").input("0.95").run()
    source = draft(project)
    assert (source.get("early_stop_patience"), source.get("betas")) == (3, (0.9, 0.95))
    assert "from torch.optim import Adam\n" in source.text
    app.selectbox(key="config_validation_tiny").select("").run()
    assert read_validation(draft(project)) is None


def test_what_does_not_parse_is_shown_with_its_place_and_the_last_good_version_stays(project: Project) -> None:
    app = show(project, "source")
    good = open_draft(project, "tiny").text
    app.text_area(key="config_source_tiny").input(good + "\nlr = = 1\n").run()
    line = good.count("\n") + 2
    assert any(f"line {line}" in error.value.lower() for error in app.error)
    assert open_draft(project, "tiny").text == good
    app.button(key="config_drop_broken").click().run()
    assert not app.error


def test_own_changes_become_a_recipe_for_another_config(project: Project) -> None:
    app = show(project, "form")
    app.text_input(key="config_field_tiny_lr").input("3e-4").run()
    app = show(project, "guide")
    app.text_input(key="config_own_name").input("mine").run()
    app.button(key="config_own_keep").click().run()
    assert not app.error
    assert [recipe.name for recipe in list_recipes(project)] == ["mine"]
    add_config(project, "other", open_draft(project, "tiny").saved_text)
    app = show(project, "guide")
    app.selectbox(key="config_name").select("other").run()
    app.selectbox(key="config_recipe").select("mine").run()
    app.button(key="config_recipe_apply").click().run()
    assert not app.exception
    assert ConfigSource(open_draft(project, "other").text).get("lr") == 3e-4


def test_nothing_to_keep_is_said(project: Project) -> None:
    app = show(project, "guide")
    app.button(key="config_own_keep").click().run()
    assert any("nothing to keep" in error.value for error in app.error)


def test_another_config_is_compared_by_meaning(project: Project) -> None:
    other = ConfigSource(open_draft(project, "tiny").text).set("lr", 1e-5)
    add_config(project, "other", "# another comment\n" + other.text)
    app = show(project, "changes")
    app.segmented_control(key="config_against_tiny").set_value("against_other").run()
    assert not app.exception
    assert app.dataframe[0].value.values.tolist() == [["optim_wrapper.optimizer.lr", "0.0002", "1e-5"]]


def test_a_name_that_cannot_be_is_said_above_the_config_that_stays_open(project: Project) -> None:
    app = show(project, "form")
    app.text_input(key="config_save_as_tiny").input("a b").run()
    app.button(key="config_save_as_do").click().run()
    assert any('"a b" cannot be the name' in error.value for error in app.error)
    assert app.text_input(key="config_field_tiny_lr").value
    app.text_input(key="config_save_as_tiny").input("better").run()
    app.button(key="config_save_as_do").click().run()
    assert not app.error
    assert app.selectbox(key="config_name").value == "better"


def test_the_export_knows_the_projects_own_deepspeed_settings(project: Project) -> None:
    deepspeed.save(project, "small", '{"zero_optimization": {"stage": 2}}')
    app = show(project, "form")
    app.selectbox(key="config_export_deepspeed").set_value("small").run()
    assert not app.exception
    assert "--deepspeed config/deepspeed/small.json" in app.code[0].value


def test_a_file_from_elsewhere_is_taken_in_even_if_it_does_not_parse(project: Project) -> None:
    app = show(project, "form")
    app.toggle(key="config_is_adding").set_value(True).run()
    assert app.button(key="config_file_take").disabled
    app.file_uploader(key="config_file").upload("theirs.py", b"lr = = 1\n").run()
    app.button(key="config_file_take").click().run()
    assert not app.exception
    assert app.selectbox(key="config_name").value == "theirs"
    assert any("line 1" in error.value.lower() for error in app.error)
    assert (project.config / "theirs.py").read_bytes() == b"lr = = 1\n"


def test_the_catalogue_says_what_does_not_work_here_and_why(project: Project) -> None:
    app = show(project, "form")
    app.toggle(key="config_is_adding").set_value(True).run()
    assert "Works" not in app.dataframe[0].value.columns, "of configs that all work nobody needs to read it"
    app.checkbox(key="config_only_loadable").uncheck().run()
    states = app.dataframe[0].value["Works"]
    assert (states == "✓").any()
    assert states[states != "✓"].str.fullmatch("✗ .{10,}").all()
    app.text_input(key="config_search").input("Qwen1.5-0.5B alpaca").run()
    assert set(app.dataframe[0].value["Name"].str[:11]) == {"qwen1_5_0_5"}
