"""The errors a person is meant to read; it refuses to know about bugs, which stay ordinary exceptions."""


class DFlashError(Exception):
    """Something the user can mend. The message is one sentence each of what is wrong, what was found, what to do."""

    def __init__(self, wrong: str, found: str = "", do: str = "") -> None:
        self.wrong, self.found, self.do = wrong, found, do
        super().__init__(" ".join(part for part in (wrong, found, do) if part))


class LoadError(DFlashError):
    """A model, a draft or a tokenizer cannot be used as asked."""


class PromptError(DFlashError):
    """The text or the settings of one run cannot be decoded."""


class DecodeError(DFlashError):
    """A run broke in the middle: not-a-number logits or no memory left."""


class TrainingError(DFlashError):
    """A training or data-generation run cannot start or go on."""
