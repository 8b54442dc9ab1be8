"""The dialog that starts an export with 4-bit weights, and what is shown of one that was made."""

from pathlib import Path
from typing import Any

import streamlit as st

from core.checkpoints.deliverables import Deliverable
from core.checkpoints.serving import serve_commands
from core.data.library import Dataset, list_datasets
from core.errors import DanluError
from core.launchers.local import idle_gpu
from core.project import Project
from core.quantize.environment import PACKAGE, Environment, delete, find_environment, pinned_version
from core.quantize.plan import METHODS, QuantizationPlan, plan_quantization
from core.quantize.start import KIND, LENGTHS, ROWS, quantized_target, start_quantization
from core.runs.jobs import active_jobs
from pages.ui.audit import note
from pages.ui.text import gib, show_error, t


@st.dialog(":material/grid_4x4: AWQ · GPTQ", width="medium")
def quantize_dialog(project: Project, item: Deliverable) -> None:
    """Method, data, what it will need, and the environment that does it."""
    st.markdown(t("quantize.intro"))
    method = st.radio(
        t("quantize.method"),
        METHODS,
        format_func=str.upper,
        captions=[t(f"quantize.methods.{name}") for name in METHODS],
        key="quantize_method",
        horizontal=True,
    )
    data, rows, length = _choose_data(list_datasets(project))
    target = quantized_target(project, item.path, method)
    plan = plan_quantization(item.path, target)
    _show_plan(project, target, plan)
    environment = find_environment()
    may_install = _show_environment(environment)
    is_busy = bool(active_jobs(project, (KIND,)))
    if is_busy:
        st.caption(t("quantize.is_busy"))
    can_start = plan.can_start and data is not None and (environment.is_ready or may_install) and not is_busy
    label = t("quantize.start", method=method.upper())
    is_clicked = st.button(label, key="quantize_start", type="primary", width="stretch", disabled=not can_start)
    if is_clicked and data is not None:
        try:
            start_quantization(
                project, item.path, method, data=data, rows=rows, max_length=length, may_install=may_install
            )
        except DanluError as error:
            show_error(error)
        else:
            note("export", f"{item.name} {method}")
            st.rerun()


def _choose_data(datasets: list[Dataset]) -> tuple[Path | None, int, int]:
    """Data set, rows and tokens of a row."""
    usable = {item.name: item.path for item in datasets if item.is_trainable}
    left, middle, right = st.columns([2, 1, 1])
    name = left.selectbox(t("quantize.data"), list(usable), key="quantize_data", help=t("quantize.data_help"))
    rows = middle.number_input(
        t("quantize.rows"), *ROWS, value=128, step=16, key="quantize_rows", help=t("quantize.rows_help")
    )
    length = right.selectbox(
        t("quantize.length"), LENGTHS, index=1, key="quantize_length", help=t("quantize.length_help")
    )
    if not usable:
        st.warning(t("quantize.no_data"), icon=":material/database_off:")
    return usable.get(str(name)), int(rows), length


def _show_plan(project: Project, target: Path, plan: QuantizationPlan) -> None:
    if plan.problem is not None:
        show_error(plan.problem)
        return
    lines = [
        t("export.target", path=str(target.relative_to(project.root))),
        t("quantize.plan", matrices=plan.matrices, group=plan.group_size, size=gib(plan.target_bytes)),
        t("quantize.needs", memory=gib(plan.ram_bytes), free=gib(plan.free_bytes)),
        t("quantize.on_gpu" if idle_gpu() else "quantize.on_cpu"),
    ]
    if len(serve_commands("", group_size=plan.group_size)) == 1:
        lines.append(t("quantize.small_group", group=plan.group_size))
    st.caption("  \n".join(lines))


def _show_environment(environment: Environment) -> bool:
    """The environment that is there, with a way to delete it; else the question whether to build it. True: build it."""
    if error := st.session_state.pop("quantize_error", None):
        show_error(DanluError.from_json(error))
    words = {"package": PACKAGE, "version": pinned_version(), "size": gib(environment.disk_bytes)}
    if not environment.is_ready:
        return st.checkbox(t("quantize.install", **words), key="quantize_install", help=t("quantize.install_help"))
    left, right = st.columns([4, 1], vertical_alignment="center")
    left.caption(t("quantize.installed", **words))
    right.button(
        t("quantize.delete"),
        key="quantize_delete",
        help=str(environment.folder),
        width="stretch",
        on_click=_delete,
        args=(environment.folder.name,),
    )
    return False


def _delete(name: str) -> None:
    """A callback: what went wrong is shown by the dialog that is drawn after it."""
    try:
        delete()
        note("delete", name)
    except DanluError as error:
        st.session_state["quantize_error"] = error.to_json()


def show_quantized(folder: Path, figures: dict[str, Any]) -> None:
    """What it was calibrated on, what the rounding cost, and how to serve it."""
    lines = [
        t(
            "quantize.made",
            method=str(figures["method"]).upper(),
            matrices=figures["matrices"],
            group=figures["group_size"],
        ),
        t("quantize.calibrated", data=figures["data"], rows=figures["rows"], tokens=figures["tokens"]),
        t(
            "quantize.weight_error",
            error=figures["weight_error"],
            worst=figures["worst_error"],
            name=figures["worst_name"],
        ),
    ]
    if figures.get("loss_before") is not None:
        lines.append(
            t(
                "quantize.loss",
                rows=figures["held_out_rows"],
                before=figures["loss_before"],
                after=figures["loss_after"],
            )
        )
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines.append(t("quantize.versions", versions=versions, device=figures["device"]))
    st.markdown("  \n".join(lines))
    st.caption(t("quantize.serve"))
    st.code("\n".join(serve_commands(str(folder), group_size=figures["group_size"])), language="bash")
