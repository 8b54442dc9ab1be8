"""The same questions to several models, kept as a table with votes: a JSON file a comparison in the project, and one of its votes.

A job asks one model after the other, so that one card is enough for any number of them; an adapter and its base share one worker,
which switches the adapter for each answer. Talks to workers, loads nothing itself.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from core.chat.client import Endpoint, Reply, Worker, find_workers, read_worker, start_worker, stop_worker, stream_chat
from core.chat.models import ChatModel
from core.errors import DanluError, InputError, JobError
from core.files import read_json, write_json
from core.messages import message
from core.project import Project, open_project
from core.runs.directory import RunDirectory
from core.runs.job import Progress
from core.runs.launch import new_id, now_utc, start_job

KIND: Final = "compare"
MOST_MODELS: Final = 4
BASE_SUFFIX: Final = "@base"
_LOAD_SECONDS: Final = 900.0
_UNLOAD_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One model of a comparison."""

    label: str
    model: str
    adapter: str | None = None
    is_base: bool = False
    """The adapter's worker, asked without the adapter."""
    prompt_template: Mapping[str, Any] | None = None

    @property
    def source(self) -> tuple[str, str | None]:
        """Columns with the same source share a worker."""
        return self.model, self.adapter


@dataclass(kw_only=True)
class Comparison:
    """Questions by models; answers come in while the job runs."""

    id: str
    created_at: str
    questions: list[str]
    columns: list[Column]
    settings: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`"<question>:<column>"` → text, reason, usage."""
    votes: dict[str, int] = field(default_factory=dict)
    """`"<question>"` → the column that answered best."""

    def answer(self, question: int, column: int) -> dict[str, Any] | None:
        return self.answers.get(f"{question}:{column}")

    def wins(self) -> list[int]:
        """Votes each column got."""
        return [sum(vote == column for vote in self.votes.values()) for column in range(len(self.columns))]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        known = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        known["columns"] = [Column(**column) for column in value.get("columns", [])]
        return cls(**known)


def columns_of(models: Sequence[ChatModel]) -> list[Column]:
    """Columns for what was chosen; a base that an adapter beside it stands on shares the adapter's worker."""
    adapters = {model.path.resolve(): model for model in models if model.adapter is not None}
    columns = []
    for model in models:
        holder = adapters.get(model.path.resolve()) if model.kind == "base" else None
        source = holder or model
        columns.append(
            Column(
                label=model.name,
                model=str(source.path.absolute()),
                adapter=str(source.adapter.absolute()) if source.adapter else None,
                is_base=holder is not None,
                prompt_template=dict(source.prompt_template) if source.prompt_template else None,
            )
        )
    return columns


def start_comparison(
    project: Project, columns: Sequence[Column], questions: Sequence[str], settings: Mapping[str, Any], system: str = ""
) -> tuple[Comparison, RunDirectory]:
    """Save the empty table and start the job that fills it.

    Raises InputError `chat.compare_models` for fewer than two models or more than four, `chat.compare_questions` for none.
    """
    asked = [question.strip() for question in questions if question.strip()]
    if not 2 <= len(columns) <= MOST_MODELS:
        raise InputError("chat.compare_models", count=len(columns), most=MOST_MODELS)
    if not asked:
        raise InputError("chat.compare_questions")
    comparison = Comparison(
        id=new_id(KIND, _folder(project)), created_at=now_utc(), questions=asked, columns=list(columns),
        settings=dict(settings), system=system,
    )  # fmt: skip
    save_comparison(project, comparison)
    run = start_job(
        project, "core.chat.comparison:run_comparison", kind=KIND, title=" · ".join(each.label for each in columns),
        arguments={"project": str(project.root), "comparison_id": comparison.id},
    )  # fmt: skip
    return comparison, run


def run_comparison(project: str, comparison_id: str, progress: Progress) -> dict[str, Any]:
    """Ask every model every question that has no answer yet. A job function; stops between answers."""
    opened = open_project(Path(project))
    comparison = load_comparison(opened, comparison_id)
    total, done = len(comparison.questions) * len(comparison.columns), len(comparison.answers)
    for source in dict.fromkeys(column.source for column in comparison.columns):
        columns = [at for at, column in enumerate(comparison.columns) if column.source == source]
        progress.update(done, total, message("chat.progress.comparing", name=comparison.columns[columns[0]].label))
        worker, is_ours = _ready_worker(opened, comparison.columns[columns[0]], progress)
        try:
            for question in range(len(comparison.questions)):
                for column in columns:
                    progress.check()
                    label = comparison.columns[column].label
                    progress.update(done, total, message("chat.progress.asking", name=label, number=question + 1))
                    reply = _ask(worker, comparison, question, column)
                    kept = {"text": reply.text, "reason": reply.reason, "usage": reply.usage}
                    comparison.answers[f"{question}:{column}"] = kept
                    save_comparison(opened, comparison)
                    done += 1
        finally:
            if is_ours:
                _unload(worker)
    return {"answers": done}


def vote(project: Project, comparison_id: str, question: int, column: int | None) -> None:
    """Say which answer was best; None takes the vote back."""
    comparison = load_comparison(project, comparison_id)
    comparison.votes.pop(str(question), None)
    if column is not None:
        comparison.votes[str(question)] = column
    write_json(_votes_file(project, comparison.id), comparison.votes)


def save_comparison(project: Project, comparison: Comparison) -> None:
    """Write all but the votes, which the job must never overwrite."""
    write_json(_folder(project) / f"{comparison.id}.json", {**comparison.to_json(), "votes": {}})


def load_comparison(project: Project, comparison_id: str) -> Comparison:
    """Raises InputError `chat.no_comparison` if there is none of that id, or its file is broken."""
    file = _folder(project) / f"{Path(comparison_id).name}.json"
    if not file.is_file():
        raise InputError("chat.no_comparison", id=comparison_id)
    try:
        comparison = Comparison.from_json(read_json(file))
        votes = _votes_file(project, comparison.id)
        comparison.votes = dict(read_json(votes)) if votes.is_file() else {}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InputError("chat.no_comparison", id=comparison_id) from error
    return comparison


def list_comparisons(project: Project) -> list[str]:
    """Ids, newest first."""
    return sorted((file.stem for file in _folder(project).glob(f"{KIND}_*.json")), reverse=True)


def _folder(project: Project) -> Path:
    return project.chat / "comparisons"


def _votes_file(project: Project, comparison_id: str) -> Path:
    return _folder(project) / f"votes_{Path(comparison_id).name}.json"


def _ask(worker: Worker, comparison: Comparison, question: int, column: int) -> Reply:
    endpoint = worker.endpoint()
    if comparison.columns[column].is_base:
        endpoint = Endpoint(endpoint.url, endpoint.key, endpoint.model + BASE_SUFFIX)
    head = [{"role": "system", "content": comparison.system}] if comparison.system else []
    reply = Reply()
    for _ in stream_chat(
        endpoint, [*head, {"role": "user", "content": comparison.questions[question]}], comparison.settings, reply
    ):
        pass
    return reply


def _ready_worker(project: Project, column: Column, progress: Progress) -> tuple[Worker, bool]:
    """The worker that serves `column`, and whether it was started for this. Raises the worker's own error if it cannot load."""
    found = next((each for each in find_workers(project) if _serves(each, column)), None)
    run = found.run if found else start_worker(
        project, Path(column.model), name=column.label, adapter=Path(column.adapter) if column.adapter else None,
        prompt_template=column.prompt_template,
    )  # fmt: skip
    deadline = time.monotonic() + _LOAD_SECONDS
    try:
        while time.monotonic() < deadline:
            progress.check()
            worker = read_worker(run)
            if worker.served is not None:
                return worker, found is None
            if not worker.status.phase.is_active:
                break
            time.sleep(_LOOK_SECONDS)
    except DanluError:
        if found is None:
            stop_worker(run)
        raise
    stop_worker(run)
    if run.error_file.exists():
        raise DanluError.from_json(read_json(run.error_file))
    raise JobError("chat.worker_ended", name=column.label, path=str(run.log_file))


def _unload(worker: Worker) -> None:
    """End it and wait: the next model may need its memory."""
    stop_worker(worker.run)
    deadline = time.monotonic() + _UNLOAD_SECONDS
    while read_worker(worker.run).status.phase.is_active and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)


def _serves(worker: Worker, column: Column) -> bool:
    return (worker.details.get("model"), worker.details.get("adapter")) == column.source
