"""What the person who starts Danlu can set, from environment variables `DANLU_*`. Imports no other room."""

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Read once at start; every field has a default that works."""

    model_config = ConfigDict(frozen=True)

    home: Path = Field(default_factory=lambda: Path.home() / "danlu")
    """Folder that holds the projects, one sub-folder each (`DANLU_HOME`)."""
    shared_models: Path | None = None
    """A folder of base models shared on this machine, such as InternStudio's `share/new_models` (`DANLU_SHARED_MODELS`)."""
    python: Path | None = None
    """Python that trains, when it is not the one that runs the app (`DANLU_PYTHON`)."""


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from `DANLU_<FIELD>` variables; empty ones count as not set. Raises pydantic.ValidationError on a wrong value."""
    environ = (
        os.environ if environ is None else environ
    )  # looked up now: datasets puts a copy of it in its place when it is imported
    given = {name: value for name in Settings.model_fields if (value := environ.get(f"DANLU_{name.upper()}"))}
    return Settings.model_validate(
        {name: str(Path(value).expanduser()) if "/" in value else value for name, value in given.items()}
    )
