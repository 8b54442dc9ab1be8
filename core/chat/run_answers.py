"""From a training's sample answer to a comparison of the checkpoint that gave it with its base. Starts a job, loads nothing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.chat.models import ChatModel
from core.checkpoints.deliverables import list_deliverables, start_delivery
from core.checkpoints.inspect import CheckpointCard, list_checkpoints
from core.errors import DanluError
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.jobs import active_jobs, find_run
from core.runs.samples import SampleAnswer, read_answers

_LINK: Final = re.compile(r"(?P<run>.+)/(?P<iteration>\d+)/(?P<number>\d+)")
JOB_KIND: Final = "adapter"


@dataclass(frozen=True, slots=True)
class AnswerLink:
    """A sample answer, the checkpoint nearest to it, and where that was delivered."""

    run: RunDirectory
    answer: SampleAnswer
    checkpoint: CheckpointCard
    delivered: Path | None
    """Adapter or whole model; None: not yet."""

    @property
    def is_ready(self) -> bool:
        """Whether one click is enough: it is there, or it is an adapter, which is taken out in seconds."""
        return self.delivered is not None or bool(self.checkpoint.is_adapter)

    def is_on_its_way(self, project: Project) -> bool:
        """Whether a job takes the adapter out of the checkpoint now."""
        jobs = active_jobs(project, (JOB_KIND,))
        wanted = self.checkpoint.path.resolve()
        return any(Path(job.spec().details["arguments"]["checkpoint"]).resolve() == wanted for job in jobs)

    def models(self, known: Sequence[ChatModel]) -> list[ChatModel]:
        """Of `known`, the base model and what was delivered; empty if that is not there."""
        mine = [model for model in known if self.delivered in (model.adapter, model.path)]
        if not mine or self.delivered is None:
            return []
        path = mine[0].path if mine[0].adapter else _trained_from(self.run)
        base = [each for each in known if each.kind == "base" and path and each.path.resolve() == path.resolve()]
        return [*base[:1], mine[0]]


def links(project: Project, run: RunDirectory, answers: Sequence[SampleAnswer]) -> list[AnswerLink | None]:
    """For each of `answers` its link; None where the run has no usable checkpoint, and for the base's own answer at step 0."""
    cards = [card for card in list_checkpoints(run.path) if card.is_complete and card.iteration is not None]
    mine = [item for item in list_deliverables(project) if item.run == run.path.name]
    made = [item for item in mine if item.kind in ("adapter", "full")]
    delivered = {item.checkpoint: item.path for item in made}
    found: list[AnswerLink | None] = []
    for answer in answers:
        nearest = min(cards, key=lambda card: abs((card.iteration or 0) - answer.iteration), default=None)
        is_base = answer.iteration == 0
        found.append(
            None if nearest is None or is_base else AnswerLink(run, answer, nearest, delivered.get(nearest.name))
        )
    return found


def address(link: AnswerLink) -> str:
    """For a page's address: which run, iteration and prompt."""
    return f"{link.run.id}/{link.answer.iteration}/{_prompts(link.run).index(link.answer.prompt)}"


def follow(project: Project, text: str) -> AnswerLink | None:
    """What `address` said, as it is on the disk now; None if there is no such run, answer or checkpoint."""
    found = _LINK.fullmatch(text)
    if not found:
        return None
    try:
        run = find_run(project, found["run"])
    except DanluError:
        return None
    prompts = _prompts(run)
    for answer in read_answers(run):
        if answer.iteration == int(found["iteration"]) and prompts.index(answer.prompt) == int(found["number"]):
            return links(project, run, [answer])[0]
    return None


def deliver(project: Project, link: AnswerLink) -> RunDirectory | None:
    """Start taking the adapter out of the checkpoint, unless it is there or on its way. The job, if one was started."""
    if link.delivered is not None or link.is_on_its_way(project):
        return None
    return start_delivery(project, link.checkpoint.path, base_model=None, dtype="keep", merge=False, verify=False)


def _prompts(run: RunDirectory) -> list[str]:
    return list(dict.fromkeys(answer.prompt for answer in read_answers(run)))


def _trained_from(run: RunDirectory) -> Path | None:
    """The base model that run.json names; None for a work dir made by hand."""
    try:
        path = (run.spec().details.get("base_model") or {}).get("path")
    except DanluError:
        return None
    return Path(path) if path else None
