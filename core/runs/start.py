"""A start as its checks see it: the config, where it will train, and what model and data say. Read once; judged elsewhere."""

from dataclasses import dataclass, replace

from core.config import deepspeed
from core.config.checks import Surroundings, gather
from core.config.facts import read_machine
from core.config.findings import Context
from core.config.library import read_config
from core.config.source import ConfigSource
from core.project import Project
from core.runs.request import TrainRequest


@dataclass(frozen=True, slots=True)
class Start:
    """What a page shows and judges before a request becomes a run."""

    request: TrainRequest
    source: ConfigSource
    around: Surroundings
    context: Context


def read_start(project: Project, request: TrainRequest) -> Start:
    """Raises InputError for a config that cannot be read, or a DeepSpeed setting that is not there."""
    source, around = ConfigSource(read_config(request.config)), surroundings(project, request)
    return Start(request, source, around, gather(source, around))


def surroundings(project: Project, request: TrainRequest) -> Surroundings:
    """What the config's checks need to know of where it will train."""
    machine = replace(read_machine(project), gpu_count=request.gpu_count)
    setting = deepspeed.find(project, request.deepspeed) if request.deepspeed else None
    choice = setting.zero.choice if setting else None
    return Surroundings(machine, request.world_size, choice, setting, root=project.root)
