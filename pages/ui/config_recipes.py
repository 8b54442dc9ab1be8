"""Recipes on the config page: the guide's and one's own, shown line by line, applied, kept, shared as files."""

import json
from pathlib import Path

import streamlit as st

from core.config import edits, library, own_recipes, recipes
from core.config.facts import DataFacts, ModelFacts, read_data, read_model
from core.config.own_recipes import OwnRecipe
from core.config.source import ConfigSource
from core.errors import DanluError, InputError
from core.project import Project
from pages.ui.config_draft import change, remember_error
from pages.ui.text import say, show_error, t


def guide_view(project: Project, name: str, source: ConfigSource) -> None:
    """The guide's edits line by line, with what each would change here."""
    own = {recipe.name: recipe for recipe in own_recipes.list_recipes(project)}
    recipe = st.selectbox(
        t("config.choose_recipe"),
        [*recipes.RECIPES, *own],
        format_func=lambda key: t(f"config.recipes.{key}") if key in recipes.RECIPES else key,
        key="config_recipe",
        help=t("config.choose_recipe_help"),
    )
    model, data = _own(source)
    steps = own_recipes.steps(own[recipe]) if recipe in own else recipes.RECIPES[recipe](model, data)
    if recipe in recipes.RECIPES and (model is None or data is None):
        st.caption(t("config.recipe_needs"))
    st.button(
        t("config.recipe_apply"),
        type="primary",
        icon=":material/playlist_add_check:",
        key="config_recipe_apply",
        on_click=lambda: change(project, name, lambda old: recipes.apply(old, steps)),
    )
    with st.expander(t("config.own_recipes"), icon=":material/bookmark:"):
        _keep(project, name, source)
        if recipe in own:
            _share(project, own[recipe])
        _take_in(project)
    for step in recipes.show(source, steps):
        st.markdown(say(step.why))
        if step.diff:
            lines = [line for line in step.diff.splitlines() if not line.startswith(("---", "+++", "@@"))]
            st.code("\n".join(lines), language="diff")
        else:
            st.caption(t("config.recipe_nothing"))


def _own(source: ConfigSource) -> tuple[ModelFacts | None, DataFacts | None]:
    """Facts of the local model and data file the config names now."""
    model_path, files = source.get("pretrained_model_name_or_path", None), edits.data_files(source)
    try:
        model = read_model(Path(model_path)) if isinstance(model_path, str) else None
    except InputError:
        model = None
    try:
        data = read_data(Path(files[0])) if files else None
    except InputError:
        data = None
    return model, data


def _keep(project: Project, name: str, source: ConfigSource) -> None:
    """What differs here from XTuner's original, or from the file, becomes a recipe."""
    st.caption(t("config.own_recipes_note"))
    with st.container(horizontal=True, vertical_alignment="bottom"):
        label = st.text_input(
            t("config.own_recipe_name"), key="config_own_name", placeholder=name, help=t("config.own_recipe_name_help")
        )
        st.button(
            t("config.own_recipe_keep"),
            icon=":material/bookmark_add:",
            key="config_own_keep",
            on_click=lambda: _record(project, name, source, (label or name).strip()),
        )


def _record(project: Project, name: str, source: ConfigSource, label: str) -> None:
    try:
        before = library.original(name) or library.open_draft(project, name).saved_text
        own_recipes.save_recipe(project, own_recipes.record(label, ConfigSource(before), source))
        st.toast(t("config.own_recipe_kept", name=label), icon=":material/check_circle:")
    except DanluError as error:
        remember_error(error)


def _share(project: Project, recipe: OwnRecipe) -> None:
    with st.container(horizontal=True):
        st.download_button(
            t("config.own_recipe_download"),
            json.dumps(recipe.to_json(), ensure_ascii=False, indent=2),
            file_name=f"{recipe.name}.json",
            mime="application/json",
            icon=":material/download:",
            key="config_own_download",
        )
        st.button(
            t("config.own_recipe_delete"),
            icon=":material/delete:",
            key="config_own_delete",
            on_click=lambda: own_recipes.delete_recipe(project, recipe.name),
        )


def _take_in(project: Project) -> None:
    file = st.file_uploader(
        t("config.own_recipe_upload"),
        type=["json"],
        max_upload_size=1,
        key="config_own_upload",
        help=t("config.own_recipe_upload_help"),
    )
    if file is None:
        return
    try:
        recipe = own_recipes.read_recipe(file.getvalue())
        known = recipe in own_recipes.list_recipes(project)
        own_recipes.save_recipe(project, recipe)
    except DanluError as error:
        show_error(error)
        return
    st.caption(t("config.own_recipe_kept", name=recipe.name))
    if not known:
        st.rerun()
