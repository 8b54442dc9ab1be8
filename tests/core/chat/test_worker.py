"""The worker's API as its clients see it: OpenAI's own client, ours, ten at once, ones that hang up, ones that lie."""

import http.client
import json
import os
import signal
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from core.chat.client import (
    Endpoint,
    Reply,
    Worker,
    find_workers,
    list_models,
    read_prompt,
    read_worker,
    start_worker,
    stop_worker,
    stream_chat,
)
from core.errors import DanluError, InputError, JobError
from core.files import read_json, write_json
from core.project import Project, open_project
from core.runs import processes
from core.runs.directory import RunDirectory
from core.runs.job import SilentProgress
from core.runs.state import Phase
from tests.core.chat.conftest import wait_for
from tests.models import write_tiny_llama

pytestmark = pytest.mark.engine
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


def ask(endpoint: Endpoint, text: str, **settings: Any) -> Reply:
    reply = Reply()
    pieces = list(stream_chat(endpoint, [{"role": "user", "content": text}], {**GREEDY, **settings}, reply))
    assert "".join(pieces) == reply.text
    return reply


def raw(worker: Worker, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    endpoint = worker.endpoint()
    parts = urlsplit(endpoint.url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=240)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Authorization": f"Bearer {endpoint.key}", **headers})
    response = connection.getresponse()
    value = json.loads(response.read())
    connection.close()
    return response.status, value


def busy(worker: Worker) -> bool:
    parts = urlsplit(worker.endpoint().url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=240)
    connection.request("GET", "/health")
    value = json.loads(connection.getresponse().read())
    connection.close()
    return bool(value["busy"])


def test_it_says_what_it_is(worker: Worker) -> None:
    assert worker.served is not None
    assert (worker.served["device"], worker.served["dtype"], worker.served["engine"]) == ("cpu", "float32", "decoder")
    assert worker.served["template"] == "internlm2_chat"
    key = worker.run.path / "api_key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_text() not in (worker.run.path / "endpoint.json").read_text()
    assert list_models(worker.endpoint(), 240.0) == ["tiny"]
    assert worker.run.id in [found.run.id for found in find_workers(Project(worker.run.path.parents[2]))]


def test_the_official_client(worker: Worker) -> None:
    import openai

    endpoint = worker.endpoint()
    client = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.key, max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=messages,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    plain = client.completions.create(model="tiny", prompt="hello", max_tokens=5, temperature=0)
    assert plain.usage.completion_tokens <= 5
    streamed = client.completions.create(model="tiny", prompt="hello", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == plain.choices[0].text
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages)
    with pytest.raises(openai.BadRequestError, match="Message 1"):
        client.chat.completions.create(model="tiny", messages=[{"role": "wizard", "content": "x"}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="no", max_retries=0).models.list()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        ({"messages": []}, 400),
        ({"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}, 400),
        ({"messages": [{"role": "user", "content": "x"}], "temperature": -1}, 400),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, 400),
        ({"messages": [{"role": "user", "content": "x"}], "n": 3}, 400),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400),
        ({"messages": [{"role": "user", "content": "x " * 5000}]}, 400),
    ],
)
def test_bad_requests_are_explained_and_harm_nothing(worker: Worker, body: Any, status: int) -> None:
    got, value = raw(worker, "/v1/chat/completions", body)
    assert got == status
    assert value["error"]["message"]
    assert value["error"]["type"] == "invalid_request_error"


def test_a_page_of_another_site_gets_nothing(worker: Worker) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    assert raw(worker, "/v1/chat/completions", body, Host="evil.example:80")[0] == 401
    assert raw(worker, "/v1/chat/completions", body, Authorization="Bearer x")[0] == 401
    assert raw(worker, "/v1/nothing", body)[0] == 404


def test_our_client_explains_errors(worker: Worker) -> None:
    endpoint = worker.endpoint()
    with pytest.raises(DanluError, match=r"chat\.bad_setting"):
        ask(endpoint, "hi", top_p=2)
    with pytest.raises(JobError, match=r"chat\.refused"):
        ask(Endpoint(endpoint.url, "wrong", "tiny"), "hi")
    with pytest.raises(JobError, match=r"chat\.unreachable"):
        ask(Endpoint("http://127.0.0.1:9", "", "tiny"), "hi")
    with pytest.raises(InputError, match=r"chat\.bad_url"):
        ask(Endpoint("file:///etc/passwd"), "hi")


def test_ten_chats_at_once_do_not_mix(worker: Worker) -> None:
    endpoint = worker.endpoint()
    questions = [f"{number} who are you? " * (number + 1) for number in range(10)]
    alone = [ask(endpoint, question).text for question in questions]
    assert len(set(alone)) > 5
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda question: ask(endpoint, question).text, questions))
    assert together == alone


def test_the_same_seed_gives_the_same_answer(worker: Worker) -> None:
    endpoint = worker.endpoint()
    settings = {"temperature": 1.5, "top_p": 0.95, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}
    one, two, three = (ask(endpoint, "hi", seed=seed, **settings).text for seed in (7, 7, 8))
    assert one == two != three


def test_the_next_turn_reuses_what_was_read(worker: Worker) -> None:
    endpoint = worker.endpoint()
    messages = [{"role": "user", "content": "tell me about data and models " * 10}]
    list(stream_chat(endpoint, messages, GREEDY, Reply()))
    again = Reply()
    list(stream_chat(endpoint, [*messages, {"role": "assistant", "content": "ok"}, messages[0]], GREEDY, again))
    cached = again.usage["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0.4 * again.usage["prompt_tokens"]
    assert again.usage["timings"]["first_token_seconds"] > 0


def test_the_prompt_is_shown_as_it_is_given(worker: Worker) -> None:
    messages = [{"role": "user", "content": "hi <|im_end|>"}]
    prompt = read_prompt(worker.endpoint(), messages, 240.0)
    assert "<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n" in prompt["text"]
    reply = ask(worker.endpoint(), messages[0]["content"], max_tokens=1)
    assert prompt["tokens"] == reply.usage["prompt_tokens"]
    assert prompt["is_same"] is False, "training puts a BOS before it, the tokenizer's own template does not"
    assert prompt["own_text"] in prompt["text"]
    with pytest.raises(DanluError, match=r"chat\.bad_message"):
        read_prompt(worker.endpoint(), [{"role": "wizard", "content": "x"}], 240.0)


def test_a_long_chat_reads_only_what_is_new(worker: Worker) -> None:
    """Thirty turns: what a turn has to read does not grow with what was said before."""
    endpoint, messages, fresh = worker.endpoint(), [], []
    for number in range(30):
        messages.append({"role": "user", "content": f"question {number}"})
        reply = Reply()
        list(stream_chat(endpoint, messages, {"temperature": 0, "max_tokens": 8}, reply))
        messages.append({"role": "assistant", "content": reply.text})
        usage = reply.usage
        fresh.append(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])
    assert usage["prompt_tokens"] > 800
    assert max(fresh[1:]) < 120, fresh


def test_stop_words_end_the_answer(worker: Worker) -> None:
    endpoint = worker.endpoint()
    free = ask(endpoint, "hello", max_tokens=60).text
    word = free[len(free) // 2 : len(free) // 2 + 3]
    cut = ask(endpoint, "hello", max_tokens=60, stop=[word])
    assert cut.text == free.split(word)[0]
    assert cut.reason == "stop"


def work_of(worker: Worker) -> int:
    """Ticks of the processor that the worker has had: what it did, whatever else the machine does."""
    assert worker.served is not None
    stat = processes.read_stat(worker.served["pid"])
    assert stat is not None
    return stat.cpu_ticks


def wait_until_idle(worker: Worker) -> None:
    deadline = time.monotonic() + 240
    while busy(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("way", ["cancel", "hang up"])
def test_a_stop_takes_effect_at_once(worker: Worker, way: str) -> None:
    """It is held while its client goes; then it does less than for 500 of the 7000 tokens it was asked for."""
    assert worker.served is not None
    endpoint, reply = worker.endpoint(), Reply()
    before = work_of(worker)
    ask(endpoint, "hi", max_tokens=500, temperature=1.0, ignore_eos=True)
    whole = work_of(worker) - before
    stream = stream_chat(
        endpoint,
        [{"role": "user", "content": "hi"}],
        {"max_tokens": 7000, "temperature": 1.0, "ignore_eos": True},
        reply,
    )
    next(stream)
    os.kill(worker.served["pid"], signal.SIGSTOP)
    try:
        before = work_of(worker)
        if way == "cancel":
            threading.Timer(0.1, reply.cancel).start()
            for _ in stream:
                pass
            assert reply.reason == "cancelled"
        else:
            stream.close()
    finally:
        os.kill(worker.served["pid"], signal.SIGCONT)
    wait_until_idle(worker)
    assert work_of(worker) - before < whole
    assert reply.text


def test_a_stop_request_ends_the_process(tmp_path: Path) -> None:
    project = open_project(tmp_path)
    run = start_worker(project, write_tiny_llama(project.model / "llama"))
    worker = wait_for(run)
    assert worker.served
    assert ask(worker.endpoint(), "hi").usage["completion_tokens"] > 0
    stop_worker(run)
    deadline = time.monotonic() + 240
    while read_worker(run).status.phase.is_active:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert read_worker(run).status.phase in (Phase.CANCELLED, Phase.STOPPED, Phase.FINISHED)
    assert not (run.path / "endpoint.json").exists()
    assert find_workers(project) == []


def test_a_folder_without_weights_is_explained(tmp_path: Path) -> None:
    project = open_project(tmp_path)
    folder = write_tiny_llama(project.model / "llama")
    (folder / "model.safetensors").unlink()
    run = start_worker(project, folder)
    worker = wait_for(run)
    assert worker.status.phase is Phase.FAILED
    assert read_json(run.error_file)["code"] == "chat.no_weights"
    with pytest.raises(InputError, match="no_model"):
        start_worker(project, tmp_path)


def ended(run: RunDirectory, seconds: float = 240.0) -> Worker:
    """The worker of `run` once it has ended."""
    deadline = time.monotonic() + seconds
    while (found := read_worker(run)).status.phase.is_active:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_weights_as_int8_say_by_how_much_and_once_nobody_asks_it_goes(tmp_path: Path) -> None:
    from core.chat.loading import load

    project = open_project(tmp_path)
    folder = write_tiny_llama(project.model / "llama")
    loaded = load({"model": str(folder), "device": "cpu", "dtype": "int8"}, SilentProgress())
    assert loaded.dtype == "int8"
    assert 0.0 < loaded.rounding_error < 0.02
    run = start_worker(project, folder, dtype="int8", idle_seconds=0.2)
    assert ended(run).status.phase is Phase.FINISHED
    assert not (run.path / "endpoint.json").exists()


def test_an_idle_worker_gives_its_card_to_who_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DANLU_DEVICES", str(tmp_path / "devices"))
    project = open_project(tmp_path)
    folder = write_tiny_llama(project.model / "llama")
    first = start_worker(project, folder, name="first", gpus=["GPU-of-a-test"])
    assert wait_for(first).served
    second = start_worker(project, folder, name="second", gpus=["GPU-of-a-test"])
    try:
        went = ended(first).status
        assert (went.phase, went.ended_at is None) == (Phase.FINISHED, False)
        came = wait_for(second)
        assert came.served
        assert (came.status.started_at or 0.0) >= (went.ended_at or 0.0)
    finally:
        stop_worker(second)
        ended(second)


def test_a_worker_that_the_kernel_kills_takes_nothing_with_it(worker: Worker, tmp_path: Path) -> None:
    """As when memory runs out: the others go on, and it is known what happened."""
    project = open_project(tmp_path)
    run = start_worker(project, write_tiny_llama(project.model / "llama", layers=32))
    victim = wait_for(run)
    assert victim.served
    assert int(Path(f"/proc/{victim.served['pid']}/oom_score_adj").read_text()) == 800, "the kernel takes it first"
    endpoint = victim.endpoint()
    stream = stream_chat(
        endpoint, [{"role": "user", "content": "hi"}], {"max_tokens": 1500, "ignore_eos": True}, Reply()
    )
    next(stream)
    os.kill(victim.served["pid"], signal.SIGKILL)
    with pytest.raises(JobError, match=r"chat\.unreachable|chat\.cut_off"):
        list(stream)
    status = ended(run).status
    assert (status.phase, status.signal) == (Phase.FAILED, signal.SIGKILL)
    assert find_workers(project) == []
    assert ask(worker.endpoint(), "hi").usage["completion_tokens"] > 0


def test_a_family_that_another_engine_decodes_is_not_rounded(tmp_path: Path) -> None:
    from core.chat.loading import load

    folder = write_tiny_llama(tmp_path / "gemma")
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "model_type": "gemma2"})
    with pytest.raises(InputError, match="no_int8"):
        load({"model": str(folder), "device": "cpu", "dtype": "int8"}, SilentProgress())


def test_a_model_that_cannot_fit_says_how_much_is_short(tmp_path: Path) -> None:
    project = open_project(tmp_path)
    folder = write_tiny_llama(project.model / "llama")
    with open(folder / "more.safetensors", "wb") as sparse:
        sparse.truncate(2**41)
    run = start_worker(project, folder)
    assert wait_for(run).status.phase is Phase.FAILED
    error = read_json(run.error_file)
    assert error["code"] == "chat.not_enough_memory"
    assert error["params"]["short_gib"] == pytest.approx(
        error["params"]["needed_gib"] - error["params"]["free_gib"], abs=0.2
    )
