"""The guide's chapter 1 by clicking only: an empty home, a real model, real training on the CPU, a server killed on the way."""

import re
import signal
import time

import pytest
from playwright.sync_api import expect

from core.checkpoints.deliverables import list_deliverables
from core.project import Project
from core.runs import processes
from core.runs.jobs import list_runs
from core.runs.metrics import MetricsReader
from core.runs.state import Phase, read_status
from pages.ui.shell import PAGES
from tests.e2e.conftest import PATIENCE_MILLISECONDS, Screen

ASSISTANT, AUTHOR, QUESTION = "Danlu", "Lin", "Who are you?"
SHIPPED = "internlm2_1_8b_qlora_alpaca_e3"
CONFIG = f"{SHIPPED}_copy"
MODEL = "SmolLM2-135M-Instruct"
ROWS, MAX_LENGTH = 140, 256
"""Two epochs of them are about 40 steps."""
STEPS_BEFORE_THE_CRASH = 4
pytestmark = pytest.mark.browser


@pytest.mark.timeout(3600)
def test_from_nothing_to_a_model_that_knows_its_name(screen: Screen):
    """40 LoRA steps of 256 tokens; in between the web server dies, and the training is stopped and resumed."""
    screen.open(lang="en")
    project = make_project(screen)
    for step in (check_environment, get_model, make_data, copy_config, edit_config):
        step(screen)
    launch(screen, project)
    survive_the_server(screen, project)
    stop_and_resume(screen, project)
    export(screen, project)
    chat(screen)
    look_in_chinese(screen)
    screen.click("chat_unload")


def make_project(screen: Screen) -> Project:
    screen.see("Welcome to Danlu")
    screen.shot("journey_01_welcome")
    screen.click("welcome_create_button")
    screen.see("Go on: Environment")
    screen.go("environment")
    screen.see("Not checked yet")
    return Project(screen.server.home / "ft")


def check_environment(screen: Screen) -> None:
    screen.click("environment_check")
    screen.see("Ready to train.", or_text="Can train; see the remarks")
    screen.shot("journey_02_environment")


def get_model(screen: Screen) -> None:
    screen.go("model")
    screen.click("model_embedded")
    screen.see("done in")
    screen.see(MODEL)
    screen.shot("journey_03_model")


def make_data(screen: Screen) -> None:
    screen.go("dataset")
    screen.fill("dataset_name", ASSISTANT)
    screen.fill("dataset_author", AUTHOR)
    screen.fill("dataset_rows", str(ROWS))
    screen.shot("journey_04_data_empty")
    screen.click("dataset_generate_go")
    screen.see("personal_assistant.json")
    screen.see(AUTHOR)
    screen.shot("journey_05_data")


def copy_config(screen: Screen) -> None:
    """The catalogue search of the guide finds three; the QLoRA one is copied."""
    screen.go("config")
    screen.tab("XTuner's own")
    screen.fill("config_search", "internlm2_1_8b")
    screen.see("3 found")
    screen.choose_row("config_table", SHIPPED)
    screen.shot("journey_06_catalogue")
    screen.click("config_copy")
    screen.see("No unsaved changes")


def edit_config(screen: Screen) -> None:
    """Model and data by list, the guide's edits as a recipe, the rest in the form; the changes are seen, then saved."""
    screen.choose(f"config_model_{CONFIG}", MODEL)
    screen.choose(f"config_data_{CONFIG}", "personal_assistant.json")
    screen.pick(f"config_method_{CONFIG}", "LoRA")
    screen.pick("config_view", "Guide")
    screen.choose("config_recipe", "chapter 1.4 of the guide")
    screen.see("+max_epochs = 2")
    screen.shot("journey_07_guide")
    screen.click("config_recipe_apply")
    screen.pick("config_view", "Form")
    for field, value in (
        ("max_length", str(MAX_LENGTH)),
        ("accumulative_counts", "1"),
        ("lr", "1e-3"),
        ("save_steps", "1000"),
        ("evaluation_freq", "20"),
        ("max_new_tokens", "24"),
        ("evaluation_inputs", QUESTION),
    ):
        screen.fill(f"config_field_{CONFIG}_{field}", value)
    screen.shot("journey_08_form")
    fixes = screen.page.locator("[class*='st-key-config_fix_']")
    while fixes.count():
        fixes.first.locator("button").click()
        screen.settle()
    screen.pick("config_view", "Changes")
    screen.see(f"max_length = {MAX_LENGTH}")
    screen.shot("journey_09_changes")
    screen.click("config_save")
    screen.see("No unsaved changes")


def launch(screen: Screen, project: Project) -> None:
    screen.go("launch")
    screen.see("Start training")
    screen.shot("journey_10_launch")
    screen.fill("launch_name", "first")
    screen.click("launch_start")
    hold_at(project, "first", STEPS_BEFORE_THE_CRASH)


def survive_the_server(screen: Screen, project: Project) -> None:
    """kill -9 of the web server: the training goes on, and the new server shows all of it."""
    screen.see("Gradient norm")
    screen.shot("journey_11_monitor")
    screen.server.kill()
    before = steps_of(project, "first")
    let_go(project, "first")
    hold_at(project, "first", before + 2)
    screen.server.start()
    screen.open("monitor", run="first", lang="en")
    screen.see("Gradient norm")
    assert shown_steps(screen) >= before + 2
    screen.shot("journey_12_monitor_after_kill")


def stop_and_resume(screen: Screen, project: Project) -> None:
    """The stop button of the restarted server saves a checkpoint; a second run goes on from it to the end."""
    screen.click("monitor_stop_save")
    let_go(project, "first")
    screen.see("Stopped")
    done = steps_of(project, "first")
    screen.go("launch")
    screen.toggle("launch_resume")
    screen.fill("launch_name", "second")
    screen.shot("journey_13_resume")
    screen.click("launch_start")
    hold_at(project, "second", done + 1)
    screen.see("Gradient norm")
    listen(screen)
    let_go(project, "second")
    screen.see("Finished")
    screen.page.wait_for_function("window.told.includes('second: Finished')")
    screen.shot("journey_14_finished")
    run = next(run for run in list_runs(project) if run.id == "second")
    assert read_status(run).phase is Phase.FINISHED
    metrics = MetricsReader(run.metrics_file).refresh()
    assert metrics["iteration"][0] == done + 1
    assert metrics["iteration"][-1] == metrics.last("total_iterations")


def hold_at(project: Project, run: str, step: int) -> None:
    """Let the run's processes stand still once it has made so many steps: what is looked at meanwhile is neither late nor early."""
    deadline = time.monotonic() + PATIENCE_MILLISECONDS / 1000
    while steps_of(project, run) < step:
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
    signal_all(project, run, signal.SIGSTOP)


def let_go(project: Project, run: str) -> None:
    signal_all(project, run, signal.SIGCONT)


def signal_all(project: Project, run: str, number: signal.Signals) -> None:
    processes.send([stat.pid for stat in processes.marked(str(project.train / run))], number)


def listen(screen: Screen) -> None:
    """Ask for notices of the browser with a click, note what they say, and let the page believe that it is not in front."""
    screen.page.context.grant_permissions(["notifications"], origin=screen.server.url)
    screen.key("monitor_notices").locator("button").click()
    screen.page.evaluate(
        """() => {
            const Real = window.Notification;
            window.told = [];
            window.Notification = class extends Real {
                constructor(title, options) { super(title, options); window.told.push(title); }
            };
            Object.defineProperty(document, "hidden", { get: () => true });
        }"""
    )


def export(screen: Screen, project: Project) -> None:
    screen.go("export")
    screen.choose("export_run", "second")
    screen.click("export_start")
    screen.see("verified")
    screen.shot("journey_15_export")
    kinds = {item.kind: item.is_verified for item in list_deliverables(project)}
    assert kinds["merged"] is True
    assert "adapter" in kinds


def chat(screen: Screen) -> None:
    """The merged model, asked greedily, says who trained it."""
    screen.page.locator("[class*='st-key-export_chat_final_model']").first.locator("button").click()
    screen.settle()
    expect(screen.key("chat_model").locator("input")).to_have_value(re.compile("^Merged · "))
    screen.click("chat_load")
    screen.see("up to")
    screen.least("chat_temperature")
    screen.say("chat_input", QUESTION)
    screen.see(re.compile("tokens/s"))
    screen.shot("journey_16_chat")
    answer = screen.page.get_by_test_id("stChatMessage").last.inner_text()
    assert ASSISTANT in answer
    assert AUTHOR in answer


def look_in_chinese(screen: Screen) -> None:
    """Every page once more, for the screenshots."""
    screen.pick("language", "中文")
    for page in PAGES:
        screen.go(page)
        screen.shot(f"journey_zh_{page}")


def steps_of(project: Project, run: str) -> int:
    """Last iteration that the run's metrics have."""
    metrics = MetricsReader(project.train / run / "metrics.jsonl").refresh()
    return int(metrics["iteration"][-1]) if len(metrics) else 0


def shown_steps(screen: Screen) -> int:
    """The iteration in the head of the monitor."""
    found = re.search(r"Iteration\s+(\d+) / \d+", screen.text())
    assert found is not None, screen.text()
    return int(found[1])
