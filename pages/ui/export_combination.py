"""Several delivered adapters, each with a weight, become one model: choice of adapters, method and name, and the start."""

from collections.abc import Sequence

import streamlit as st

from core.checkpoints.combination import METHODS, SUM, combination_targets, start_combination
from core.checkpoints.deliverables import Deliverable
from core.errors import DanluError
from core.project import Project
from core.runs.jobs import active_jobs
from pages.ui.audit import note
from pages.ui.export_choice import choose_device
from pages.ui.text import show_error, t


def combination_panel(project: Project, delivered: Sequence[Deliverable]) -> None:
    """Closed until it is wanted; not there with fewer than two adapters."""
    adapters = {item.name: item for item in delivered if item.kind == "adapter"}
    if len(adapters) < 2:
        return
    with st.expander(t("export.combine"), icon=":material/join:", key="export_combination"):
        st.caption(t("export.combine_intro"))
        left, right = st.columns(2, gap="large")
        with left:
            chosen = st.multiselect(
                t("export.combine_adapters"),
                list(adapters),
                default=list(adapters)[:2],
                key="export_combine_adapters",
                help=t("export.combine_adapters_help"),
            )
            weights = [_weight(name, len(chosen)) for name in chosen]
        with right:
            _choose_method(project, [adapters[name] for name in chosen], weights)


def _weight(name: str, count: int) -> float:
    return float(
        st.number_input(
            t("export.combine_weight", name=name),
            value=round(1 / count, 2),
            min_value=-10.0,
            max_value=10.0,
            step=0.05,
            key=f"export_combine_weight_{name}",
            help=t("export.combine_weight_help"),
        )
    )


def _choose_method(project: Project, chosen: Sequence[Deliverable], weights: Sequence[float]) -> None:
    method = st.selectbox(
        t("export.combine_method"),
        METHODS,
        format_func=lambda name: t(f"export.combine_methods.{name}"),
        key="export_combine_method",
        help=t("export.combine_method_help"),
    )
    density = 0.5
    if method != SUM:
        density = st.slider(
            t("export.combine_density"),
            0.05,
            0.95,
            0.5,
            0.05,
            key="export_combine_density",
            help=t("export.combine_density_help"),
        )
    name = st.text_input(
        t("export.combine_name"),
        value="_".join(["combined", *(item.name for item in chosen)]),
        key="export_combine_name",
        help=t("export.combine_name_help"),
    )
    verify = st.toggle(t("export.verify"), value=True, key="export_combine_verify", help=t("export.verify_help"))
    device = choose_device("export_combine_gpu")
    places = combination_targets(project, name.strip() or "…", method)
    st.caption("  \n".join(t("export.target", path=str(place.relative_to(project.root))) for place in places))
    is_blocked = len(chosen) < 2 or bool(active_jobs(project, ("adapter", "merge")))
    if st.button(t("export.combine_start"), key="export_combine_start", disabled=is_blocked, width="stretch"):
        try:
            paths = [item.path for item in chosen]
            options = {"method": method, "density": density, "verify": verify, "device": device}
            start_combination(project, paths, weights, name, **options)
        except DanluError as error:
            show_error(error)
        else:
            note("start", f"merge {name.strip()}")
            st.rerun()
