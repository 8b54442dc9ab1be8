"""The chat page: which model is chosen, comparisons and their votes, a server of another program that is not there."""

import pytest

from core.chat.comparison import Column, Comparison, load_comparison, save_comparison
from core.project import Project, open_project
from tests.models import write_tiny_llama
from tests.pages.conftest import Visit


@pytest.fixture
def project(tmp_path) -> Project:  # type: ignore[no-untyped-def]
    opened = open_project(tmp_path)
    for name in ("one", "two"):
        write_tiny_llama(opened.final_model / name, layers=1)
    write_tiny_llama(opened.model / "base", layers=1)
    return opened


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_comparison_is_read_and_voted_on(project: Project, visit: Visit, language: str) -> None:
    columns = [Column(label="one", model="/one"), Column(label="two", model="/two")]
    comparison = Comparison(
        id="compare_20260101_120000", created_at="2026-01-01", questions=["who?", "why?"], columns=columns,
        answers={"0:0": {"text": "me ![x](http://evil.example/a)", "reason": "stop"}, "0:1": {"text": "you", "reason": "length"}},
    )  # fmt: skip
    save_comparison(project, comparison)
    app = visit(project, "chat", language)
    app.segmented_control(key="chat_view").set_value("compare").run()
    assert not app.exception
    words = " ".join(markdown.value for markdown in app.markdown)
    assert "you" in words
    assert "![" not in words
    app.button(key=f"chat_vote_{comparison.id}_0_1").click().run()
    assert load_comparison(project, comparison.id).votes == {"0": 1}
    app.button(key=f"chat_vote_{comparison.id}_0_1").click().run()
    assert load_comparison(project, comparison.id).votes == {}


def test_one_model_is_no_comparison(project: Project, visit: Visit) -> None:
    app = visit(project, "chat")
    app.segmented_control(key="chat_view").set_value("compare").run()
    app.text_area(key="chat_compare_questions").set_value("who?").run()
    choice = app.multiselect(key="chat_compare_models")
    choice.select(choice.options[0]).run()
    assert app.button(key="chat_compare_run").disabled
    choice = app.multiselect(key="chat_compare_models")
    choice.select(choice.options[1]).run()
    assert not app.button(key="chat_compare_run").disabled


def test_a_server_that_is_not_there_is_an_error_with_a_next_step(project: Project, visit: Visit) -> None:
    app = visit(project, "chat")
    app.selectbox(key="chat_model").set_value("server").run()
    for url, said in (("http://127.0.0.1:9", "cannot be reached"), ("file:///etc/passwd", "is not the address")):
        app.text_input(key="chat_server_url").set_value(url).run()
        app.button(key="chat_server_connect").click().run()
        assert not app.exception
        assert said in app.error[0].value


def test_without_a_model_another_server_can_still_be_used(tmp_path, visit: Visit) -> None:  # type: ignore[no-untyped-def]
    app = visit(open_project(tmp_path), "chat")
    assert app.selectbox(key="chat_model").value == "server"
    assert app.text_input(key="chat_server_url").value == ""


def test_an_engine_that_is_gone_when_it_is_started_says_so(
    project: Project, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pages.ui.chat_server.installed_engines", lambda: ["vllm"])
    app = visit(project, "chat")
    app.selectbox(key="chat_model").set_value("server").run()
    assert app.selectbox(key="chat_server_folder").options[0] in ("one", "two")
    app.button(key="chat_server_start").click().run()
    assert not app.exception
    assert "vllm" in app.error[0].value
