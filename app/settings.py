"""How the reader wants replies made: one checked value, its presets, its JSON; refuses to know widgets and models."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dflash_core import DFlashError, SamplingParams


class SettingsError(DFlashError):
    """A setting from outside has the wrong kind."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The sidebar in one value. `seed` None draws a fresh one, `block_size` None takes the draft's."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    seed: int | None = None
    drafting: bool = True
    block_size: int | None = None
    acceptance: str = "match"

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Settings":
        """Settings from widgets, a browser or a caller of the API; unknown keys are ignored. Raises `DFlashError`."""
        known = {field.name: raw[field.name] for field in fields(cls) if field.name in raw}
        try:
            settings = cls(**{key: _KINDS[key](value) for key, value in known.items()})
        except (TypeError, ValueError, OverflowError) as error:
            raise SettingsError("A setting is not usable.", f"{error}.", "Reset the settings or choose a preset.") from error
        settings.params()
        return settings

    def params(self) -> SamplingParams:
        """What `decode` takes. Raises `PromptError` for a value out of range."""
        chosen = asdict(self)
        del chosen["drafting"]
        return SamplingParams(**chosen)

    def capped(self, max_new_tokens: int) -> "Settings":
        return replace(self, max_new_tokens=min(self.max_new_tokens, max_new_tokens))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def _whole_or_none(value: Any) -> int | None:
    return None if value is None or not str(value).strip() else _whole(value)


_KINDS = {
    "temperature": float, "top_p": float, "top_k": _whole, "max_new_tokens": _whole, "seed": _whole_or_none,
    "drafting": bool, "block_size": _whole_or_none, "acceptance": str,
}  # fmt: skip

CUSTOM = "Custom"
PRESETS: dict[str, dict[str, float]] = {
    "Exact": {"temperature": 0.0, "top_p": 1.0, "top_k": 0},
    "Balanced": {"temperature": 0.7, "top_p": 0.9, "top_k": 0},
    "Creative": {"temperature": 1.0, "top_p": 0.95, "top_k": 50},
}


def preset_of(temperature: float, top_p: float, top_k: int) -> str:
    """The preset these values are, or Custom."""
    values = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    return next((name for name, preset in PRESETS.items() if preset == values), CUSTOM)
