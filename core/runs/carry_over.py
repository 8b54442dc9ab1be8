"""Writes the checkpoint that a new run goes on from, then starts the run. A job: it goes on when the browser is closed."""

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

from core.checkpoints.reshape import rescale_file, reshape
from core.checkpoints.warm import write_model, write_weights
from core.messages import message
from core.project import Project
from core.runs.directory import RunSpec
from core.runs.job import Progress
from core.runs.launch import launch
from core.runs.request import TrainRequest
from core.runs.resume import Mode
from core.runs.train import make_folder, plan, write_source
from core.runs.watch import inherit_rules


def carry_over(project: str, request: dict[str, Any], *, progress: Progress) -> dict[str, Any]:
    """Write the request's checkpoint for its ranks, stage, epochs or mode into the new run's folder and start the run.

    Returns {"run": id, …}. Raises what `core.runs.train.plan` raises, and what writing raises; then no folder is left.
    """
    place, wanted = Project(Path(project)), TrainRequest.from_json(request)
    progress.update(0, None, message("resume.checking"))
    spec = plan(place, wanted)
    run = make_folder(place, spec)
    try:
        written = write_checkpoint_for(spec, run.path, progress)
        write_source(run, spec, wanted)
        inherit_rules(place.private, run)
        progress.check()
        launch(place.train, spec)
    finally:
        if not run.spec_file.exists():
            shutil.rmtree(run.path, ignore_errors=True)
    return {"run": spec.id, **written}


def write_checkpoint_for(spec: RunSpec, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write what the run `spec` begins with into its `folder`. Returns what was compared. Raises what writing raises."""
    resumed = spec.details["resumed_from"]
    source, target = Path(resumed["checkpoint"]), folder / resumed["written_name"]
    if resumed["mode"] == Mode.WEIGHTS and resumed["is_adapter"]:
        return {"tensors": write_weights(source, target, progress=progress)}
    if resumed["mode"] == Mode.WEIGHTS:
        base_model = spec.details["base_model"]["path"]
        return {"tensors": write_model(source, target, base_model=base_model, progress=progress)}
    old, new = resumed["from_world_size"], resumed["to_world_size"]
    stretch = Fraction(resumed["to_epochs"]) / Fraction(resumed["from_epochs"]) if resumed["to_epochs"] else Fraction(1)
    if resumed["from_stage"] == resumed["to_stage"] == 0:
        rescale_file(source, target, old, new, stretch=stretch, progress=progress)
        return {}
    result = reshape(
        str(source),
        str(target),
        new,
        stage=resumed["to_stage"],
        from_world_size=old,
        accumulative_counts=resumed["from_accumulation"],
        stretch=stretch,
        progress=progress,
    )
    return {"tensors": result["tensors_verified"], "digest": result["digest"]}
