"""What the launch page shows before the start: the findings of the config, and the exact command."""

import shlex
from functools import partial

import streamlit as st

from core.config.checks import check, gather
from core.config.edits import data_files, method_of
from core.config.findings import Edit, Finding, Severity
from core.config.library import change_config, read_config
from core.config.source import ConfigSource
from core.errors import DanluError
from core.project import Project
from core.runs.directory import RunSpec
from core.runs.train import TrainRequest, surroundings
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
    st.caption(t("launch.facts", method=t(f"launch.method.{method_of(source)}"), model=model, data=files))
    st.caption(t("launch.numbers", batch=batch, accumulation=accumulation, length=length, epochs=epochs))


def show_checks(project: Project, request: TrainRequest) -> bool:
    """Findings of the config, each with its fix; False if one of them would stop the training."""
    if error := st.session_state.pop("launch_error", None):
        show_error(error)
    source = ConfigSource(read_config(request.config))
    findings = check(source, gather(source, surroundings(project, request)))
    if not findings:
        st.success(t("launch.checked"), icon=":material/check_circle:")
        return True
    for number, finding in enumerate(findings):
        can_mend = finding.fix is not None or finding.choose is not None
        mends = partial(_mend, project, request) if can_mend else None
        finding_card(finding, key=f"launch_fix_{finding.code}_{number}", on_fix=mends, is_wide=True)
    st.page_link(shell.PAGES["config"], label=t("launch.mend"), icon=shell.ICONS["config"])
    return all(finding.severity != Severity.ERROR for finding in findings)


def _mend(project: Project, request: TrainRequest, finding: Finding) -> None:
    apply_change(project, request, edit=finding.fix, deepspeed=finding.choose)


def apply_change(project: Project, request: TrainRequest, *, edit: Edit | None, deepspeed: str | None) -> None:
    """Write an edit into the config, or make another DeepSpeed choice on this page. An error is shown on the next run."""
    if deepspeed is not None:
        for key in [key for key in st.session_state if str(key).startswith("launch_deepspeed_")]:
            st.session_state[key] = deepspeed
    if edit is None:
        return
    try:
        change_config(project, request.config.stem, edit)
        st.toast(t("budget.changed", name=request.config.stem), icon=":material/check_circle:")
    except DanluError as error:
        st.session_state["launch_error"] = error


def show_command(spec: RunSpec) -> None:
    with st.expander(t("launch.command"), icon=":material/terminal:"):
        if spec.details["total_iterations"]:
            st.caption(t("launch.iterations", count=f"{spec.details['total_iterations']:,}"))
        lines = [f"{name}={shlex.quote(value)} \\" for name, value in sorted(spec.env.items())]
        command = "\n".join([f"cd {shlex.quote(spec.cwd)}", *lines, shlex.join(spec.argv)])
        st.code(command, language="bash", wrap_lines=True)
