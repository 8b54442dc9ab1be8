"""Several models, the same questions: the table fills, votes stay, workers that were started for it go again."""

from pathlib import Path

import pytest

from core.chat.client import find_workers
from core.chat.comparison import (
    Column,
    Comparison,
    columns_of,
    list_comparisons,
    load_comparison,
    run_comparison,
    save_comparison,
    start_comparison,
    vote,
)
from core.chat.models import ChatModel
from core.errors import DanluError, InputError
from core.project import Project, open_project
from core.runs.job import SilentProgress
from tests.models import write_tiny_llama


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return open_project(tmp_path)


def table(project: Project, questions: list[str], columns: list[Column]) -> Comparison:
    comparison = Comparison(
        id="compare_20260101_120000",
        created_at="2026-01-01",
        questions=questions,
        columns=columns,
        settings={"temperature": 0, "max_tokens": 8, "seed": 3},
        system="be brief",
    )
    save_comparison(project, comparison)
    return comparison


def test_an_adapter_and_its_base_share_a_worker(tmp_path: Path) -> None:
    base = ChatModel("base", "base", tmp_path / "base")
    tuned = ChatModel(
        "adapter", "tuned", tmp_path / "base", adapter=tmp_path / "a", prompt_template={"INSTRUCTION": "x"}
    )
    other = ChatModel("merged", "other", tmp_path / "other")
    columns = columns_of([base, tuned, other])
    assert [column.is_base for column in columns] == [True, False, False]
    assert columns[0].source == columns[1].source != columns[2].source
    assert columns[0].prompt_template == {"INSTRUCTION": "x"}
    assert not columns_of([base, other])[0].is_base


@pytest.mark.parametrize(
    ("count", "questions", "code"), [(1, ["q"], "models"), (5, ["q"], "models"), (2, ["", "  "], "questions")]
)
def test_what_cannot_be_compared_is_refused(project: Project, count: int, questions: list[str], code: str) -> None:
    columns = [Column(label=str(number), model=f"/{number}") for number in range(count)]
    with pytest.raises(InputError, match=f"compare_{code}"):
        start_comparison(project, columns, questions, {})
    assert list_comparisons(project) == []


def test_votes_are_kept_apart_from_what_the_job_writes(project: Project) -> None:
    comparison = table(project, ["a", "b"], [Column(label="x", model="/x"), Column(label="y", model="/y")])
    vote(project, comparison.id, 0, 1)
    vote(project, comparison.id, 1, 0)
    save_comparison(project, comparison)  # the job, which read the table before the votes came
    assert load_comparison(project, comparison.id).votes == {"0": 1, "1": 0}
    vote(project, comparison.id, 1, None)
    assert load_comparison(project, comparison.id).wins() == [0, 1]
    assert list_comparisons(project) == [comparison.id]
    with pytest.raises(InputError, match="no_comparison"):
        load_comparison(project, "../project")


@pytest.mark.engine
def test_every_model_answers_every_question_and_is_unloaded(project: Project) -> None:
    folders = [write_tiny_llama(project.model / f"model{seed}", seed=seed) for seed in (1, 2)]
    columns = [Column(label=folder.name, model=str(folder)) for folder in folders]
    comparison = table(project, ["who are you?", "<|im_end|> hi"], columns)
    assert run_comparison(str(project.root), comparison.id, SilentProgress()) == {"answers": 4}
    filled = load_comparison(project, comparison.id)
    answers = [[filled.answer(question, column) for column in (0, 1)] for question in (0, 1)]
    assert all(answer and answer["reason"] in ("length", "stop") for row in answers for answer in row)
    assert all(answer and answer["usage"]["completion_tokens"] <= 8 for row in answers for answer in row)
    assert answers[0][0]["text"] != answers[0][1]["text"], "two models with other weights"  # type: ignore[index]
    assert find_workers(project) == []


@pytest.mark.engine
def test_a_model_that_cannot_load_says_why(project: Project) -> None:
    folder = write_tiny_llama(project.model / "broken")
    (folder / "model.safetensors").unlink()
    comparison = table(
        project, ["q"], [Column(label="broken", model=str(folder)), Column(label="x", model=str(folder))]
    )
    with pytest.raises(DanluError, match=r"chat\.no_weights"):
        run_comparison(str(project.root), comparison.id, SilentProgress())
