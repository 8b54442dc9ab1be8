"""A figure has one name and one value, wherever it stands."""

import pytest

from core.i18n import catalog
from core.project import Project
from core.runs.directory import RunDirectory
from core.runs.metrics import MetricsReader
from core.runs.progress import recent_loss
from tests.pages.conftest import Visit


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_loss_of_a_run(stages: dict[str, Project], visit: Visit, language: str) -> None:
    project = stages["finished"]
    metrics = MetricsReader(RunDirectory(project.train / "done").metrics_file).refresh()
    loss, name = recent_loss(metrics), catalog(language).text("runs.columns.loss")
    assert loss is not None
    assert loss != pytest.approx(metrics["loss"][-1], rel=0.1), "or the test could not tell the mean from the last step"
    head = visit(project, "monitor", language)
    (line,) = [text for text in head.markdown if name in text.value]
    assert f"{name} &nbsp;**{loss:.4f}**" in line.value
    assert line.help, "says what the value is"
    assert visit(project, "runs", language).dataframe[0].value["loss"].tolist() == [loss]
    (checkpoint,) = visit(project, "export", language).selectbox(key="export_checkpoint_done").options
    assert f"{loss:.4f}" in checkpoint
