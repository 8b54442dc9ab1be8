"""The table of pages: where each script lies, its icon, its section. Draws nothing."""

from typing import Final

PAGES: Final = {
    "start": "pages/start/start.py",
    "environment": "pages/prepare/environment.py",
    "model": "pages/prepare/model.py",
    "dataset": "pages/prepare/dataset.py",
    "config": "pages/prepare/config.py",
    "launch": "pages/train/launch.py",
    "monitor": "pages/train/monitor.py",
    "runs": "pages/train/runs.py",
    "export": "pages/deliver/export.py",
    "chat": "pages/deliver/chat.py",
}
"""Page name → script, as the sidebar lists them. The name is the URL, the key of its words and the prefix of its widget keys."""
GUIDE: Final = "pages/start/guide.py"
"""The user guide: beside the journey, not a step of it."""
ICONS: Final = {
    "start": ":material/home:",
    "environment": ":material/health_and_safety:",
    "model": ":material/deployed_code:",
    "dataset": ":material/dataset:",
    "config": ":material/tune:",
    "launch": ":material/rocket_launch:",
    "monitor": ":material/monitoring:",
    "runs": ":material/history:",
    "export": ":material/merge:",
    "chat": ":material/forum:",
}
SECTIONS: Final = {
    "start": ("start",),
    "prepare": ("environment", "model", "dataset", "config"),
    "train": ("launch", "monitor", "runs"),
    "deliver": ("export", "chat"),
}
