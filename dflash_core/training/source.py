"""Joins a batch with what the target says of it, from the caches where it is known; knows no draft."""

from pathlib import Path

import torch

from dflash_core.training.data import Batch, PackedData
from dflash_core.training.features import ChoiceTable, FeatureStore, TargetReader
from dflash_core.training.objective import Inputs


class InputSource:
    """Features, the target's choices and, for distillation, its top logits of each batch.

    `top` is the number of highest logits, 0 for none.
    """

    def __init__(
        self, reader: TargetReader, data: PackedData, place: str, top: int, wants_choices: bool, device: torch.device,
        folder: Path,
    ) -> None:  # fmt: skip
        self.reader, self._top, self._wants_choices = reader, top, wants_choices
        self._choices = ChoiceTable(reader, data, device, folder if place == "disk" else None)
        self._store: FeatureStore | None = None
        if place != "online":
            width = len(reader.taps) * reader.target.hidden_size
            self._store = FeatureStore(place, data, width, reader.target.dtype, device, folder)

    def inputs(self, batch: Batch) -> Inputs:
        documents, layout, offset = batch.pack.documents, batch.layout, batch.offset[0]
        lacks_choices = self._wants_choices and not self._choices.known(documents)
        top = None
        if self._top or lacks_choices or self._store is None or not self._store.known(documents):
            features, hidden = self.reader.read(batch.tokens, layout.document, layout.position)
            if lacks_choices:
                self._choices.learn(documents, offset, hidden[0])
            if self._store is not None and not self._store.known(documents):
                self._store.learn(documents, offset, features[0])
            if self._top:
                top = self.reader.top(hidden[0], self._top)
        else:
            features = self._store.look_up(offset)[None]
        argmax = self._choices.look_up(offset)[None] if self._wants_choices else None
        return Inputs(features, batch.tokens, layout, argmax, top, batch.others)

    def flush(self) -> None:
        """Note on disk what the caches there hold by now."""
        for cache in (self._choices, self._store):
            if cache is not None:
                cache.flush()
