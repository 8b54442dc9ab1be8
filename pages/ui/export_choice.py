"""What to deliver and how: run, checkpoint, options, and the plan with its start button."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from core.checkpoints.deliverables import Deliverable, delivery_name, delivery_targets, start_delivery
from core.checkpoints.gpu_blocks import CPU, CUDA
from core.checkpoints.inspect import CheckpointCard
from core.checkpoints.planner import plan_delivery
from core.errors import DanluError
from core.launchers.local import list_gpus
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.jobs import active_jobs, checkpoints_of
from core.runs.pace import ask_all
from core.runs.progress import recent_loss
from core.runs.validation import best_among
from pages.ui.audit import note
from pages.ui.run_data import metrics_of
from pages.ui.text import duration, gib, show_error, t

_DTYPES = ("keep", "BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Options:
    """What a person chose."""

    base_model: str | None
    dtype: str
    merge: bool
    verify: bool
    device: str


def choose_checkpoint(project: Project, runs: Sequence[RunDirectory]) -> CheckpointCard | None:
    """Run and checkpoint side by side; None if no run has a checkpoint."""
    del project
    found = {run.id: (run, cards) for run, cards in zip(runs, ask_all(checkpoints_of, runs), strict=True) if cards}
    if not found:
        return None
    wanted = st.query_params.get("run")
    if wanted in found and "export_run" not in st.session_state:
        st.session_state["export_run"] = wanted
    left, right = st.columns(2, gap="large")
    run_id = left.selectbox(t("export.run"), list(found), key="export_run", help=t("export.run_help"))
    run, cards = found[run_id]
    losses = _losses(run, cards)
    by_path = {str(card.path): card for card in cards}
    best = best_among(card.path for card in cards if card.is_complete)
    # The best one by validation loss, where there is one; else the newest that is whole.
    wanted_paths = [*best, *(card.path for card in cards if card.is_complete), cards[0].path]
    start = list(by_path).index(str(wanted_paths[0]))
    chosen = right.selectbox(
        t("export.checkpoint"),
        list(by_path),
        index=start,
        format_func=lambda path: _label(by_path[path], losses.get(path), best.get(Path(path))),
        key=f"export_checkpoint_{run_id}",
        help=t("export.checkpoint_help"),
    )
    card = by_path[chosen]
    if card.problem is None:
        st.caption(_summary(card))
    return card


def choose_options(card: CheckpointCard) -> Options:
    """How to deliver it."""
    st.subheader(t("export.options"))
    merge = verify = False
    device = CPU
    if card.is_adapter:
        merge = st.toggle(t("export.merge"), value=True, key="export_merge", help=t("export.merge_help"))
        verify = st.toggle(
            t("export.verify"), value=True, key="export_verify", disabled=not merge, help=t("export.verify_help")
        )
        device = choose_device("export_gpu", is_disabled=not merge)
    kind = "adapter" if card.is_adapter else "full"
    dtype = st.selectbox(
        t(f"export.dtype_{kind}"),
        _DTYPES,
        format_func=lambda name: t(f"export.dtypes.{name}", dtype=t(f"export.dtypes.{card.dtype}")),
        key="export_dtype",
        help=t("export.dtype_help"),
    )
    base = st.text_input(
        t("export.base"), key="export_base", placeholder=t("export.base_placeholder"), help=t("export.base_help")
    )
    return Options(base.strip() or None, dtype, merge, merge and verify, device)


def choose_device(key: str, *, is_disabled: bool = False) -> str:
    """Where a merge computes; without a GPU there is nothing to choose."""
    if not list_gpus():
        return CPU
    is_chosen = st.toggle(t("export.gpu"), key=key, disabled=is_disabled, help=t("export.gpu_help"))
    return CUDA if is_chosen and not is_disabled else CPU


def show_plan(project: Project, card: CheckpointCard, options: Options, delivered: Sequence[Deliverable]) -> None:
    """What it will need and where it goes; the button that starts it. `delivered`: what there is already."""
    st.subheader(t("export.plan"))
    name = delivery_name(project, card.path.parent, card.path)
    targets = delivery_targets(project, card, name, merge=options.merge)
    plan = plan_delivery(
        card,
        targets,
        base_model=options.base_model,
        dtype=options.dtype,
        merge=options.merge,
        verify=options.verify,
        device=options.device,
    )
    figures = (
        (t("export.memory"), gib(plan.ram_bytes), t("export.memory_help")),
        (t("export.disk"), gib(plan.disk_bytes), t("export.disk_help", free=gib(plan.free_bytes))),
        (t("export.time"), "≈ " + duration(plan.seconds), t("export.time_help")),
    )
    for column, (label, value, hint) in zip(st.columns(3), figures, strict=True):
        column.caption(label, help=hint)
        column.markdown(f"#### {value}")  # a metric's large digits do not fit into half a page
    lines = [t("export.target", path=_short(project, target)) for target in targets]
    base = str(plan.base or plan.recipe.base_model or t("export.unknown"))
    lines.append(t("export.from_base", path=base))
    lines.append(t("export.template", name=(plan.recipe.prompt_template or {}).get("name") or t("export.unknown")))
    st.caption("  \n".join(lines))
    if _is_delivered(delivered, card, targets):
        st.success(t("export.already_there"), icon=":material/check_circle:")
    elif plan.problem is not None:
        show_error(plan.problem)
    is_busy = bool(active_jobs(project, ("adapter", "merge")))
    label = (
        t("export.start_merge")
        if options.merge
        else t("export.start_adapter" if card.is_adapter else "export.start_full")
    )
    if st.button(label, key="export_start", type="primary", disabled=not plan.can_start or is_busy, width="stretch"):
        try:
            start_delivery(
                project,
                card.path,
                base_model=options.base_model,
                dtype=options.dtype,
                merge=options.merge,
                verify=options.verify,
                device=options.device,
            )
            note("export", f"{card.path.parent.name}/{card.name}")
        except DanluError as error:
            show_error(error)
        else:
            st.rerun()


def _is_delivered(delivered: Sequence[Deliverable], card: CheckpointCard, targets: Sequence[Path]) -> bool:
    """Whether the last target holds what came of this very checkpoint."""
    return any(
        (item.path, item.run, item.checkpoint) == (targets[-1], card.path.parent.name, card.name) for item in delivered
    )


def _label(card: CheckpointCard, loss: float | None, best_loss: float | None) -> str:
    parts = [card.name, gib(card.size_bytes)]
    if best_loss is not None:
        parts.insert(1, t("resume.best", loss=f"{best_loss:.4f}"))
    elif loss is not None:
        parts.insert(1, t("export.loss", loss=f"{loss:.4f}"))
    if not card.is_complete:
        parts.append(t("export.incomplete"))
    return " · ".join(parts)


def _summary(card: CheckpointCard) -> str:
    form = (
        t("export.form_zero", stage=card.stage, world_size=card.world_size)
        if card.is_folder
        else t("export.form_plain")
    )
    kind = t("export.kinds.adapter" if card.is_adapter else "export.kinds.full")
    return t(
        "export.summary",
        kind=kind,
        parameters=f"{(card.parameters or 0) / 1e6:,.2f}",
        dtype=t(f"export.dtypes.{card.dtype}"),
        form=form,
    )


def _losses(run: RunDirectory, cards: Sequence[CheckpointCard]) -> dict[str, float]:
    """The loss up to each checkpoint, where it is known."""
    metrics = metrics_of(run)
    losses = {str(card.path): recent_loss(metrics, until=card.iteration or 0) for card in cards}
    return {path: loss for path, loss in losses.items() if loss is not None}


def _short(project: Project, path: Path) -> str:
    return str(path.relative_to(project.root)) if path.is_relative_to(project.root) else str(path)
