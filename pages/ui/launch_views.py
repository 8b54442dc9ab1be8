"""What the launch page shows before the start: the findings of the config, and the exact command."""

import shlex
from typing import Final

import streamlit as st

from core.config.checks import check, gather
from core.config.edits import data_files, method_of
from core.config.findings import Severity
from core.config.library import read_config
from core.config.source import ConfigSource
from core.project import Project
from core.runs.directory import RunSpec
from core.runs.train import TrainRequest, surroundings
from pages.ui import shell
from pages.ui.text import say, t

_ICONS: Final = {Severity.ERROR: "🔴", Severity.WARNING: "🟡", Severity.ADVICE: "🔵"}


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
    """Findings of the config; False if one of them would stop the training."""
    source = ConfigSource(read_config(request.config))
    findings = check(source, gather(source, surroundings(project, request)))
    if not findings:
        st.success(t("launch.checked"), icon=":material/check_circle:")
        return True
    for finding in findings:
        st.markdown(f"{_ICONS[finding.severity]} {say(finding.message)}")
    st.page_link(shell.PAGES["config"], label=t("launch.mend"), icon=shell.ICONS["config"])
    return all(finding.severity != Severity.ERROR for finding in findings)


def show_command(spec: RunSpec) -> None:
    with st.expander(t("launch.command"), icon=":material/terminal:"):
        if spec.details["total_iterations"]:
            st.caption(t("launch.iterations", count=f"{spec.details['total_iterations']:,}"))
        lines = [f"{name}={shlex.quote(value)} \\" for name, value in sorted(spec.env.items())]
        command = "\n".join([f"cd {shlex.quote(spec.cwd)}", *lines, shlex.join(spec.argv)])
        st.code(command, language="bash", wrap_lines=True)
