"""The chat page: which model is chosen, comparisons and their votes, a server of another program that is not there."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from core.chat.comparison import Column, Comparison, load_comparison, save_comparison
from core.chat.conversation import list_conversations, load_conversation, new_conversation, save_conversation
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


@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_sample_answer_of_a_run_opens_a_comparison(stages: dict[str, Project], visit: Visit, language: str) -> None:
    app = visit(stages["finished"], "monitor", language)
    app.segmented_control(key="monitor_view").set_value("samples").run()
    assert not app.exception
    app.button(key="monitor_compare_8").click().run()
    assert not app.exception
    assert app.text_area(key="chat_compare_questions").value == "Who are you?"
    kinds = [identity.split(":")[0] for identity in app.multiselect(key="chat_compare_models").value]
    assert kinds == ["base", "adapter"]
    assert not app.button(key="chat_compare_run").disabled


def test_what_was_filled_in_from_an_address_can_be_changed(stages: dict[str, Project], visit: Visit) -> None:
    app = visit(stages["finished"], "chat")
    app.query_params["answer"] = "done/8/0"
    app.run()
    assert app.text_area(key="chat_compare_questions").value == "Who are you?"
    app.text_area(key="chat_compare_questions").set_value("Why?").run()
    assert app.text_area(key="chat_compare_questions").value == "Why?"


def test_the_best_answers_become_a_new_version_of_a_data_set(project: Project, visit: Visit) -> None:
    columns = [Column(label="one", model="/one"), Column(label="two", model="/two")]
    comparison = Comparison(
        id="compare_20260101_120000", created_at="2026-01-01", questions=["who?"], columns=columns,
        answers={"0:0": {"text": "me"}, "0:1": {"text": "<b>you</b>"}},
    )  # fmt: skip
    save_comparison(project, comparison)
    base = project.data / "own.jsonl"
    base.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
    before = base.read_bytes()
    app = visit(project, "chat")
    app.segmented_control(key="chat_view").set_value("compare").run()
    assert app.button(key="chat_compare_export").disabled
    app.button(key=f"chat_vote_{comparison.id}_0_1").click().run()
    app.button(key="chat_compare_export").click().run()
    assert not app.exception
    app.selectbox(key="chat_export_base").set_value("own.jsonl").run()
    assert any("<b>you</b>" in code.value for code in app.code)
    app.button(key="chat_export_go").click().run()
    assert not app.exception
    rows = (project.data / "own_chat.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2
    assert base.read_bytes() == before


def test_chosen_answers_of_a_conversation_become_rows(project: Project, visit: Visit) -> None:
    conversation = new_conversation("be brief")
    for question in ("one?", "two?"):
        conversation.ask(question)
        conversation.begin_answer("m").content = f"answer to {question}"
    save_conversation(project, conversation)
    app = visit(project, "chat")
    app.button(key=f"chat_open_{conversation.id}").click().run()
    app.button(key="chat_export").click().run()
    app.segmented_control(key="chat_export_way").set_value("answers").run()
    assert app.multiselect(key="chat_export_answers").value == [3]
    app.button(key="chat_export_go").click().run()
    assert not app.exception
    [row] = (project.data / "chat_samples.jsonl").read_text(encoding="utf-8").splitlines()
    said = [message["content"] for message in json.loads(row)["messages"]]
    assert said == ["be brief", "one?", "answer to one?", "two?", "answer to two?"], "with the system prompt it had"


class Parrot(BaseHTTPRequestHandler):
    """Another program's server: its answer is the questions of the conversation, so that one of another tab would show."""

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = " ".join(message["content"] for message in body["messages"] if message["role"] == "user")
        choices = [{"index": 0, "delta": {"content": said}, "finish_reason": "stop"}]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"data: {json.dumps({'choices': choices})}\n\n".encode())


def test_tabs_do_not_mix_conversations(project: Project, visit: Visit) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Parrot)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    tabs = []
    try:
        for number in range(5):
            app = visit(project, "chat")
            app.session_state["chat_model"] = "server"
            app.session_state["chat_server_url"] = url
            app.session_state["chat_server_models"] = (url, ["parrot"])
            app.run()
            tabs.append((f"tab{number}", app))
        for turn in ("a", "b"):
            for name, app in tabs:
                app.chat_input(key="chat_input").set_value(f"{name}{turn}").run()
                assert not app.exception
    finally:
        server.shutdown()
        server.server_close()
    saved = [load_conversation(project, identity).turns for identity, _ in list_conversations(project)]
    said = sorted([turn.content for turn in turns] for turns in saved)
    assert said == [[f"{name}a", f"{name}a", f"{name}b", f"{name}a {name}b"] for name, _ in tabs]


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
