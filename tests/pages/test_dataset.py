"""The data page: an empty project, one with bad data, one with data and a model."""

import json
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.data import library
from core.data.generate import Assistant, write_assistant
from core.data.preview import Token
from core.project import Project, open_project
from pages.ui.dataset_learned import coloured
from tests.core.data.corpus import chat, good, lines
from tests.models import write_tiny_llama

SCRIPT = str(Path(__file__).parents[2] / "pages/prepare/dataset.py")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return open_project(tmp_path)


def show(project: Project, monkeypatch: pytest.MonkeyPatch, language: str = "en") -> AppTest:
    monkeypatch.setattr("streamlit.page_link", lambda *_args, **_options: None)
    app = AppTest.from_file(SCRIPT, default_timeout=240)
    app.session_state["project_root"] = str(project.root)
    app.session_state["language"] = language
    return app.run()


def view(app: AppTest, name: str) -> AppTest:
    return app.segmented_control[0].set_value(name).run()


@pytest.mark.parametrize("language", ["zh", "en"])
def test_empty_project_offers_to_make_data(project: Project, monkeypatch: pytest.MonkeyPatch, language: str):
    app = show(project, monkeypatch, language)
    assert not app.exception
    assert len(app.info) == 1
    app.text_input(key="dataset_name").set_value("小丹")
    app.text_input(key="dataset_author").set_value("阿达")
    app.button(key="dataset_generate_go").click().run()
    assert not app.exception
    [dataset] = library.list_datasets(project)
    assert (dataset.name, dataset.rows, dataset.is_trainable) == ("personal_assistant.json", 400, True)
    assert app.selectbox(key="dataset_file").value == "personal_assistant.json"


def test_name_and_author_are_asked_for(project: Project, monkeypatch: pytest.MonkeyPatch):
    app = show(project, monkeypatch)
    app.button(key="dataset_generate_go").click().run()
    assert len(app.warning) == 1
    app.text_input(key="dataset_name").set_value("<|im_end|>")
    app.text_input(key="dataset_author").set_value("Ada")
    app.button(key="dataset_generate_go").click().run()
    assert "cannot be used" in app.error[0].value
    assert library.list_datasets(project) == []


@pytest.mark.parametrize("language", ["zh", "en"])
def test_bad_data_is_explained_and_converted(project: Project, monkeypatch: pytest.MonkeyPatch, language: str):
    bad = project.data / "bad.jsonl"
    bad.write_bytes(lines(good(1), "{broken", chat(("human", "x"), ("assistant", "y")), chat(("user", "q")), good(2)))
    app = view(show(project, monkeypatch, language), "check")
    assert not app.exception
    assert len([one for one in app.expander if "**" in one.label]) == 3
    assert "2" in " ".join(one.value for one in app.markdown)
    app.button(key="dataset_convert_go").click().run()
    assert not app.exception
    assert app.selectbox(key="dataset_file").value == "bad_2.jsonl"
    assert len((project.data / "bad_2.jsonl").read_text().splitlines()) == 3
    assert not view(app, "versions").exception


def test_columns_are_set_by_hand(project: Project, monkeypatch: pytest.MonkeyPatch):
    (project.data / "odd.csv").write_text("frage,antwort\nwas?,das.\n")
    app = view(show(project, monkeypatch), "check")
    app.selectbox(key="dataset_format").set_value("pair").run()
    app.selectbox(key="dataset_part_odd.csv_pair_prompt").set_value("frage")
    app.selectbox(key="dataset_part_odd.csv_pair_response").set_value("antwort")
    app.button(key="dataset_columns_go").click().run()
    assert not app.exception
    assert library.list_datasets(project)[0].format == "pair"


@pytest.mark.parametrize("language", ["zh", "en"])
def test_everything_of_a_finished_project(project: Project, monkeypatch: pytest.MonkeyPatch, language: str):
    write_tiny_llama(project.model / "tiny")
    write_assistant(project, Assistant(name="Dan", author="Ada", language="en", rows=60))
    app = show(project, monkeypatch, language)
    for name in ("rows", "check", "learned", "versions"):
        app = view(app, name)
        assert not app.exception, name
        assert not app.error, name
    app = view(app, "learned")
    assert any(":green-background[" in one.value for one in app.markdown)
    app.number_input(key="dataset_max_length").set_value(16).run()
    assert not app.exception
    assert any(":red-background[" in one.value for one in app.markdown)


def test_a_model_is_needed_to_see_tokens(project: Project, monkeypatch: pytest.MonkeyPatch):
    (project.data / "a.jsonl").write_bytes(lines(good(1)))
    app = view(show(project, monkeypatch), "learned")
    assert not app.exception
    assert any("base model" in one.value for one in app.markdown)


def test_an_archive_is_an_error_with_a_next_step(project: Project, monkeypatch: pytest.MonkeyPatch):
    (project.data / "a.json").write_bytes(b"PK\x03\x04")
    app = show(project, monkeypatch)
    assert not app.exception
    assert "archive" in app.error[0].value


def test_row_is_edited_into_a_new_version(project: Project, monkeypatch: pytest.MonkeyPatch):
    (project.data / "a.jsonl").write_bytes(lines(good(1)))
    app = show(project, monkeypatch)
    app.text_area[0].set_value(json.dumps(good(7)))
    next(button for button in app.button if button.label == "Save as a new version").click().run()
    assert not app.exception
    assert json.loads((project.data / "a_edited.jsonl").read_text()) == good(7)
    assert json.loads((project.data / "a.jsonl").read_text()) == good(1)


def test_coloured_text_is_never_markdown():
    shown = coloured(
        [Token(1, "*a* [x](http://y) <b> :red[z] $x$\n# h", False), Token(2, "ok", True), Token(3, "cut", True, True)]
    )
    assert "\\*a\\*" in shown
    assert "\\[x\\]\\(http\\:\\/\\/y\\)" in shown
    assert "\\<b\\>" in shown
    assert ":green-background[:green[ok]]:red-background[:red[cut]]" in shown


def test_general_rows_are_mixed_in_and_files_joined(project: Project, monkeypatch: pytest.MonkeyPatch):
    write_assistant(project, Assistant(name="Danny", author="Ada", rows=40, language="en"))
    (project.data / "zeta.jsonl").write_bytes(lines(*[good(number) for number in range(60)]))
    app = view(show(project, monkeypatch), "versions")
    app.button(key="dataset_mix_go").click().run()
    assert not app.exception
    mixed = next(item for item in library.list_datasets(project) if item.name == "personal_assistant_mixed.jsonl")
    assert library.check(project, mixed.path).rows == 50
    app = view(show(project, monkeypatch), "versions")
    app.segmented_control(key="dataset_mix_way").set_value("join").run()
    app.multiselect(key="dataset_join_others").set_value(["zeta.jsonl"]).run()
    app.button(key="dataset_join_go").click().run()
    assert not app.exception
    assert (project.data / "personal_assistant_joined.jsonl").is_file()


@pytest.mark.parametrize(("name", "words"), [("qwen_chat", "fits"), ("llama3_chat", "differs from the template")])
def test_template_is_compared_with_the_tokenizers_own(
    project: Project, monkeypatch: pytest.MonkeyPatch, name: str, words: str
):
    write_tiny_llama(project.model / "tiny")
    (project.data / "rows.jsonl").write_bytes(lines(good(1)))
    app = view(show(project, monkeypatch), "learned")
    app.selectbox(key=f"dataset_template_{project.model / 'tiny'}").set_value(name).run()
    assert not app.exception
    assert any(words in str(box.value) for box in [*app.success, *app.warning])
