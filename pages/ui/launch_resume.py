"""Going on from a checkpoint, on the launch page: what there is, how to go on, what will happen, and the job that prepares it."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd
import streamlit as st

from core.checkpoints.inspect import CheckpointCard, inspect_checkpoint, newest_complete
from core.errors import DanluError
from core.files import read_json
from core.messages import Message
from core.project import Project
from core.runs.directory import RunDirectory, RunSpec
from core.runs.jobs import latest_job, project_checkpoints
from core.runs.origin import Preset, deepspeed_of
from core.runs.progress import recent_loss
from core.runs.resume import Mode
from core.runs.samples import read_answers
from core.runs.state import Phase, read_status
from core.runs.validation import best_among
from pages.ui import shell
from pages.ui.jobs import job_panel
from pages.ui.run_data import metrics_of
from pages.ui.text import gib, say, show_error, t, words

_WAYS = ("exact", "longer", "weights")
_JOB = "launch_reshape"


@dataclass(frozen=True, slots=True)
class Resume:
    """What was chosen; nothing: a new training."""

    checkpoint: Path | None = None
    mode: Mode = Mode.EXACT
    extra_epochs: float = 0
    deepspeed: Preset | None = None
    """The setting that its run used."""


def choose_resume(project: Project, runs: Sequence[RunDirectory]) -> Resume:
    """The checkpoint to go on from, of these runs, and the way to do it."""
    if not st.toggle(t("launch.resume"), key="launch_resume", help=t("launch.resume_help")):
        return Resume()
    cards = project_checkpoints(runs)
    usable = {str(card.path): card for card in cards if card.is_complete}
    card = _choose_card(project, cards, usable)
    if card is None:
        return Resume()
    way = st.segmented_control(
        t("resume.way"),
        _WAYS,
        format_func=lambda name: t(f"resume.ways.{name}"),
        default="exact" if card.has_optimizer else "weights",
        key="launch_way",
    )
    st.caption(t(f"resume.ways_help.{way or 'exact'}"))
    if way == "exact" and _is_at_end(card):
        st.warning(t("resume.at_end"), icon=":material/flag:")
    extra = (
        st.number_input(t("resume.extra_epochs"), 1, 1000, 1, key="launch_extra", help=t("resume.extra_epochs_help"))
        if way == "longer"
        else 0
    )
    preset = deepspeed_of(project, card)
    if preset is not None:
        st.caption(say(preset.why))
    return Resume(card.path, Mode.WEIGHTS if way == "weights" else Mode.EXACT, extra, preset)


def _choose_card(
    project: Project, cards: list[CheckpointCard], usable: dict[str, CheckpointCard]
) -> CheckpointCard | None:
    newest = newest_complete([card for card in cards if card.has_optimizer])
    best = best_among(card.path for card in cards)
    chosen = None
    if usable:
        default = list(usable).index(str(newest.path)) if newest else 0
        picked = st.selectbox(
            t("launch.checkpoint"),
            usable,
            index=default,
            key="launch_checkpoint",
            format_func=lambda path: _label(usable[path], best.get(Path(path))),
            help=t("launch.checkpoint_help"),
        )
        chosen = usable[picked]
    else:
        st.caption(t("launch.no_checkpoint"))
    with st.expander(t("resume.all", count=len(cards))):
        if cards:
            st.dataframe(_table(cards, best), hide_index=True, width="stretch")
        elsewhere = st.text_input(
            t("resume.elsewhere"),
            key="launch_elsewhere",
            placeholder="/…/iter_500.pth",
            help=t("resume.elsewhere_help"),
        )
    if elsewhere.strip():
        chosen = inspect_checkpoint(Path(elsewhere.strip()).expanduser())
        if chosen.problem is not None:
            show_error(chosen.problem)
            return None
    if chosen is not None:
        _card(project, chosen)
    return chosen


def _label(card: CheckpointCard, best_loss: float | None) -> str:
    label = f"{card.path.parent.name} / {card.name}"
    return label if best_loss is None else f"{label} · {t('resume.best', loss=f'{best_loss:.4f}')}"


def _card(project: Project, card: CheckpointCard) -> None:
    """What one checkpoint is: form, contents, place in the training."""
    with st.container(border=True):
        loss = recent_loss(metrics_of(RunDirectory(card.path.parent)), until=card.iteration or 0)
        free = shutil.disk_usage(project.root).free
        facts = (
            (t("resume.step"), "–" if card.iteration is None else f"{card.iteration:,}"),
            (t("runs.columns.loss"), "–" if loss is None else f"{loss:.4f}"),
            (t("resume.contents"), t("resume.adapter") if card.is_adapter else t("resume.full")),
            (t("resume.form"), _form(card)),
            (t("resume.size"), t("resume.size_of_free", size=gib(card.size_bytes), free=gib(free))),
        )
        for column, (label, value) in zip(st.columns([0.8, 1.7, 1.2, 1.7, 2]), facts, strict=True):
            column.caption(label)
            column.markdown(value)
        if answer := _answer_at(card):
            st.caption(t("resume.answer", answer=answer))


def show_plan(spec: RunSpec) -> None:
    """What will happen to the checkpoint, before the start."""
    resumed = spec.details.get("resumed_from")
    if resumed:
        lines = [f"- {say(Message.from_json(said))}" for said in resumed["happens"]]
        st.info("\n".join([f"**{t('resume.plan')}**", "", *lines]), icon=":material/route:")


def remember_job(run: RunDirectory) -> None:
    """The checkpoint is being written anew by a job; the page shows it and goes to the run at its end."""
    st.session_state[_JOB] = run.id
    st.rerun()


def show_job(project: Project) -> None:
    """The job that prepares a checkpoint, while there is one; then the way to the run it started."""
    job = latest_job(project, {"reshape"})
    if job is None:
        return
    is_ours = st.session_state.get(_JOB) == job.id
    status = read_status(job)
    if is_ours and status.phase is Phase.FINISHED:
        del st.session_state[_JOB]
        run_id = read_json(job.result_file)["run"]
        st.session_state["monitor_run"] = run_id
        st.switch_page(shell.PAGES["monitor"], query_params={"run": run_id})
    if is_ours or status.phase.is_active:
        job_panel(project, ("reshape",))


def _form(card: CheckpointCard) -> str:
    if not card.is_folder:
        return t("resume.plain")
    return t("resume.zero", stage=card.stage, ranks=card.world_size)


def _is_at_end(card: CheckpointCard) -> bool:
    """Whether the training that saved it had no step left, as it was planned."""
    total = metrics_of(RunDirectory(card.path.parent)).last("total_iterations")
    return total is not None and card.iteration is not None and card.iteration >= total


def _answer_at(card: CheckpointCard) -> str | None:
    """The last sample answer before the checkpoint, shortened."""
    samples = [s for s in read_answers(RunDirectory(card.path.parent)) if s.iteration <= (card.iteration or 0)]
    return samples[-1].answer.strip().replace("\n", " ")[:160] if samples else None


def _table(cards: list[CheckpointCard], best: dict[Path, float]) -> pd.DataFrame:
    columns = [
        t(f"resume.{name}") for name in ("run", "step", "validation", "contents", "form", "size", "saved", "state")
    ]
    rows = [
        (
            card.path.parent.name,
            card.iteration,
            t("resume.best", loss=f"{best[card.path]:.4f}") if card.path in best else "",
            "–" if card.is_adapter is None else t("resume.adapter") if card.is_adapter else t("resume.full"),
            _form(card) if card.stage is not None else "–",
            gib(card.size_bytes),
            datetime.fromtimestamp(card.modified_at),
            t("resume.complete") if card.problem is None else _why(card.problem),
        )
        for card in cards
    ]
    return pd.DataFrame(rows, columns=columns)


def _why(problem: DanluError) -> str:
    what, _ = words().explain(problem)
    return what
