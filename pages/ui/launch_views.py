"""What the launch page shows before the start: the findings of the config, and the exact command."""

import shlex
from functools import partial

import streamlit as st

from core.config.checks import check, fix_all
from core.config.edits import data_files, method_of
from core.config.findings import Edit, Finding
from core.config.library import change_config
from core.config.source import ConfigSource
from core.config.validation import read_validation
from core.errors import DanluError
from core.project import Project
from core.runs.directory import RunSpec
from core.runs.request import TrainRequest
from core.runs.start import Start
from pages.ui import shell
from pages.ui.findings import finding_card
from pages.ui.text import show_error, t


def facts(source: ConfigSource) -> None:
    """What a config trains, in two lines."""
    model = str(source.get("model.llm.pretrained_model_name_or_path", "")).rstrip("/").rpartition("/")[2] or "—"
    files = ", ".join(file.rpartition("/")[2] for file in data_files(source)) or "—"
    batch, accumulation, length, epochs = (
        source.effective(name, "—") for name in ("batch_size", "accumulative_counts", "max_length", "max_epochs")
    )
    trained = t("launch.facts", method=t(f"launch.method.{method_of(source)}"), model=model, data=files)
    numbers = t("launch.numbers", batch=batch, accumulation=accumulation, length=length, epochs=epochs)
    validated = _validated(source)
    st.caption("  \n".join([trained, numbers, *([validated] if validated else [])]))


def _validated(source: ConfigSource) -> str | None:
    """How it is validated, and when it ends early."""
    validation = read_validation(source)
    if validation is None:
        return None
    names = ", ".join(file.rpartition("/")[2] for file in validation.files)
    said = t("launch.validated", data=names, every=f"{validation.every:,}")
    return f"{said} · {t('launch.early', patience=validation.patience)}" if validation.patience else said


def show_checks(project: Project, start: Start) -> list[Finding]:
    """What the checks found, worst first, each with its fix."""
    if error := st.session_state.pop("launch_error", None):
        show_error(error)
    findings = check(start.source, start.context)
    if not findings:
        st.success(t("launch.checked"), icon=":material/check_circle:")
        return []
    if (fixable := sum(finding.fix is not None for finding in findings)) > 1:
        st.button(
            t("config.fix_all", count=fixable), key="launch_fix_all", icon=":material/auto_fix_high:",
            on_click=partial(_mend_all, project, start),
        )  # fmt: skip
    for number, finding in enumerate(findings):
        can_mend = finding.fix is not None or finding.choose is not None
        mends = partial(_mend, project, start.request) if can_mend else None
        finding_card(finding, key=f"launch_fix_{finding.code}_{number}", on_fix=mends, is_wide=True)
    st.page_link(shell.PAGES["config"], label=t("launch.mend"), icon=shell.ICONS["config"])
    return findings


def _mend(project: Project, request: TrainRequest, finding: Finding) -> None:
    apply_change(project, request, edit=finding.fix, deepspeed=finding.choose)


def _mend_all(project: Project, start: Start) -> None:
    apply_change(project, start.request, edit=partial(fix_all, around=start.around), deepspeed=None)


def apply_change(project: Project, request: TrainRequest, *, edit: Edit | None, deepspeed: str | None) -> None:
    """Write an edit into the config, or make another DeepSpeed choice on this page. An error is shown on the next run."""
    if deepspeed is not None:
        choose_deepspeed_again(deepspeed)
    if edit is None:
        return
    try:
        change_config(project, request.config.stem, edit)
        st.toast(t("budget.changed", name=request.config.stem), icon=":material/check_circle:")
    except DanluError as error:
        st.session_state["launch_error"] = error


def choose_deepspeed_again(name: str) -> None:
    """Another DeepSpeed choice, from a callback. Its box has one key for each checkpoint."""
    for key in [key for key in st.session_state if str(key).startswith("launch_deepspeed_")]:
        st.session_state[key] = name


def show_command(spec: RunSpec) -> None:
    if spec.details["total_iterations"]:
        st.caption(t("launch.iterations", count=f"{spec.details['total_iterations']:,}"))
    lines = [f"{name}={shlex.quote(value)} \\" for name, value in sorted(spec.env.items())]
    command = "\n".join([f"cd {shlex.quote(spec.cwd)}", *lines, shlex.join(spec.argv)])
    st.code(command, language="bash", wrap_lines=True)
