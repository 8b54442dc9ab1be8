"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, on the device the logits are on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from core.errors import InputError

_CANDIDATES: Final = 256
"""Largest logits looked at first: sorting a whole vocabulary costs more than the rest of a small model's step."""
_LIMITS: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0.0, 5.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.1, 10.0),
    "top_k": (0, 1_000_000),
    "max_tokens": (1, 1_000_000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one answer is chosen. `temperature` 0 takes the most probable token each time."""

    max_tokens: int | None = None
    """Tokens of the answer at most; None: as many as fit."""
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    ignore_eos: bool = False
    """Go on to `max_tokens` whatever comes: for measurements."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Sampling":
        """Of a request's fields; those that are missing or null keep their default. Raises InputError `chat.bad_setting`."""
        given: dict[str, Any] = {}
        for name, (low, high) in _LIMITS.items():
            number = value.get(name)
            if number is None:
                continue
            is_whole = name in ("top_k", "max_tokens")
            if isinstance(number, bool) or not isinstance(number, int if is_whole else int | float):
                raise InputError("chat.bad_setting", name=name, value=str(number), low=low, high=high)
            if not low <= number <= high:
                raise InputError("chat.bad_setting", name=name, value=number, low=low, high=high)
            given[name] = number if is_whole else float(number)
        seed = value.get("seed")
        if seed is not None:
            if not isinstance(seed, int) or isinstance(seed, bool):
                raise InputError("chat.bad_setting", name="seed", value=str(seed), low=-(2**63), high=2**63 - 1)
            given["seed"] = seed
        return cls(**given, stop=_stop_words(value.get("stop")), ignore_eos=bool(value.get("ignore_eos")))


def _stop_words(value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise InputError("chat.bad_stop", value=str(value))
    return tuple(word for word in words if word)


class Sampler:
    """Chooses the tokens of one answer. Same seed, settings and logits: same tokens, on the host or in `sample_rows`."""

    def __init__(
        self, sampling: Sampling, vocabulary: int, prompt: list[int], device: torch.device, longest: int
    ) -> None:
        """`longest`: most tokens the answer can have."""
        self.sampling = sampling
        random = torch.Generator()
        if sampling.seed is None:
            random.seed()
        else:
            random.manual_seed(sampling.seed % 2**63)
        self.points = torch.rand(longest, generator=random)
        """(longest,) One number in [0, 1) for each token of the answer, so that no other answer changes this one."""
        self.count = 0
        """Tokens chosen."""
        self.seen: torch.Tensor | None = None
        """(vocabulary,) True for tokens of the prompt and the answer; None: no penalty asks for it."""
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, device=device)] = True

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is all that is asked for."""
        return self.sampling.temperature == 0.0 and self.seen is None

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def choose(self, logits: torch.Tensor) -> int:
        """The next token for `logits` (vocabulary,)."""
        self.count += 1
        if self.is_greedy:
            return int(logits.argmax())
        logits = logits.float()
        if self.seen is not None:
            penalty = self.sampling.repetition_penalty
            logits = torch.where(self.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        token = int(logits.argmax()) if self.sampling.temperature == 0.0 else self._sample(logits)
        if self.seen is not None:
            self.seen[token] = True
        return token

    def _sample(self, logits: torch.Tensor) -> int:
        settings = self.sampling
        logits = logits / settings.temperature
        count = logits.shape[0]
        if 0 < settings.top_k < count:
            values, tokens = logits.topk(settings.top_k)
            probabilities = values.softmax(-1)
        else:
            values, tokens = logits.topk(min(_CANDIDATES, count))
            probabilities = (values - logits.logsumexp(-1)).exp()
            enough_mass = float(probabilities.sum()) >= settings.top_p < 1.0
            enough_height = settings.min_p > 0.0 and float(probabilities[-1] / probabilities[0]) < settings.min_p
            if not (enough_mass or enough_height) and len(values) < count:
                values, tokens = logits.sort(descending=True)
                probabilities = values.softmax(-1)
        probabilities = _cut(probabilities, settings)
        point = self.points[self.count - 1].to(logits.device) * probabilities.sum()
        place = int(torch.searchsorted(probabilities.cumsum(-1), point, right=True))
        return int(tokens[min(place, len(tokens) - 1)])


def _cut(probabilities: torch.Tensor, settings: Sampling) -> torch.Tensor:
    """Zero for what top-p (arXiv 1904.09751) and min-p (arXiv 2407.01082) leave out; the first always stays."""
    if settings.top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities
        kept = before < settings.top_p
        kept[0] = True
        probabilities = probabilities * kept
    if settings.min_p > 0.0:
        probabilities = probabilities * (probabilities >= settings.min_p * probabilities.max())
    return probabilities


SETTINGS: Final = 5
"""Columns of `sample_rows`' settings."""


def settings_row(sampling: Sampling) -> list[float]:
    """temperature, top_p, top_k, min_p, repetition_penalty as `sample_rows` reads them; what is off never cuts."""
    return [
        sampling.temperature,
        sampling.top_p if sampling.top_p < 1.0 else 2.0,
        float(sampling.top_k or 2**31),
        sampling.min_p,
        sampling.repetition_penalty,
    ]


def sample_rows(logits: torch.Tensor, settings: torch.Tensor, seen: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Next tokens (rows,) for logits (rows, vocabulary), without a look at any value on the host: can be captured as a graph.

    settings (rows, SETTINGS), seen (rows, vocabulary) bool, points (rows,) in [0, 1).
    """
    temperature, top_p, top_k, min_p, penalty = settings[:, :, None].unbind(1)
    logits = logits.float()
    logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    values, tokens = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = (values / temperature.clamp(min=1e-4)).softmax(-1)
    probabilities = probabilities * (torch.arange(logits.shape[-1], device=logits.device) < top_k)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = before < top_p
    kept[:, 0] = True
    probabilities = probabilities * kept * (probabilities >= min_p * probabilities[:, :1])
    totals = probabilities.cumsum(-1)
    place = (totals <= points[:, None] * totals[:, -1:]).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    place = torch.where(temperature == 0.0, 0, place)
    return tokens.gather(-1, place)[:, 0]
