"""The curves of `python -m benchmarks.train loss` as a picture: `python -m benchmarks.training.plot LOSSES.json PICTURE.svg`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_WINDOW: Final = 10
_NAMES: Final = {
    "stock_7": "stock, seed 7",
    "stock_8": "stock, seed 8",
    "stock_9": "stock, seed 9",
    "fast": "speed layer, as stock",
    "fast_apart": "speed layer, samples apart",
}


def steps(losses: Sequence[float], per_step: int = 2) -> list[float]:
    """The mean of each optimizer step's micro-steps."""
    return [sum(losses[at : at + per_step]) / per_step for at in range(0, len(losses) - per_step + 1, per_step)]


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over the last `_WINDOW` values."""
    return [sum(values[max(0, at - _WINDOW + 1) : at + 1]) / min(at + 1, _WINDOW) for at in range(len(values))]


def draw(losses: dict[str, list[float]], picture: Path) -> None:
    """All 200 steps above, and how far each curve is from the first seed of stock below."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "danlu"
    from matplotlib import pyplot

    curves = {name: smooth(steps(losses[name])) for name in _NAMES if name in losses}
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1))
    for name, values in curves.items():
        style = {"linewidth": 1.8} if name.startswith("fast") else {"linewidth": 1.0, "linestyle": "--"}
        above.plot(values, label=_NAMES[name], **style)
        below.plot([one - other for one, other in zip(values, curves["stock_7"], strict=True)], **style)
    above.set_ylabel("loss")
    above.legend(frameon=False)
    below.set_ylabel("less stock, seed 7")
    below.set_xlabel(f"optimizer step (mean of the last {_WINDOW})")
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


def main(argv: Sequence[str]) -> int:
    source, picture = argv
    draw(json.loads(Path(source).read_text(encoding="utf-8")), Path(picture))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
