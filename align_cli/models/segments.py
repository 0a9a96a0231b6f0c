"""Long prompts for denoisers that read CLIP: sentence by sentence, the tokens of all one after the other.

Source: LongAlign tools.py, caption2embed. Deviations: pad* is made anew for every call (there once per
process, so that it outlives its encoder); sentences that lie wholly beyond `length` are not encoded; whatever
`more` reads gets whole prompts.

Letters: B prompts, S sentences of all prompts, L tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align_cli.cuts import Cut, segment_cuts
from align_cli.errors import UserError
from align_cli.models.base import TextCond
from align_cli.sentences import SPLITTERS

if TYPE_CHECKING:
    from align_cli.models.frozen import FrozenModel

LENGTH = 240
"""Tokens of a prompt that are kept. Source: the official scripts."""
_UNUSED = 17
"""First positions of the empty text that are no part of pad*: 60 of 77 are averaged."""

More = Callable[[list[str]], Tensor]
"""Whole prompts -> (B, L2, D)."""


@dataclass(frozen=True)
class Tower:
    """A CLIP text encoder. name: in the pipeline. limit: tokens it reads, start and end included. states:
    token ids (S, L) -> what the denoiser reads of them (S, L, D), without attention mask.
    """

    name: str
    tokenizer: Any
    limit: int
    states: Callable[[Tensor], Tensor]

    @property
    def dropped(self) -> list[int]:
        """Ids of the tokens that are not kept: padding and end."""
        return [int(self.tokenizer.pad_token_id), int(self.tokenizer.eos_token_id)]

    def ids(self, texts: Sequence[str]) -> Tensor:
        """(S, L) int64, all texts in one call: truncated to `limit`, padded to the longest."""
        found: Tensor = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.limit, return_tensors="pt"
        )["input_ids"]
        return found

    def filler(self) -> Tensor:
        """pad*, (D,): the mean of the last 60 of the 77 states of the empty text.

        Of an encoder with another limit n it is the last n - 17, and at least the last half.
        """
        ids = self.tokenizer([""], padding="max_length", max_length=self.limit, return_tensors="pt")
        window = max(self.limit - _UNUSED, (self.limit + 1) // 2)
        return self.states(ids["input_ids"])[0, -window:].mean(0)


class SegmentReader:
    """What the denoiser is told of prompts that are read sentence by sentence.

        [begin s_1 ; begin s_2 ; ... ; pad* ...] cut or filled to `length`, and below it what `more` says

    Every sentence is encoded by itself. Its begin token is kept, end and padding go, and with them a token
    whose id is that of the padding ("!" in SD2.x).
    SDXL: both towers' states side by side, of the tokens of the first tokenizer: the second has the same
    vocabulary, but takes every "!" for padding, and would shift all that follows. The pooled text is that of
    the plain reading of the whole prompt.
    """

    def __init__(
        self,
        model: FrozenModel,
        *,
        length: int = LENGTH,
        splitter: str = "official",
        more: More | None = None,
        audit_more: Callable[[Sequence[str]], dict[str, list[Cut]]] | None = None,
    ) -> None:
        """
        Args:
            length: tokens of the CLIP part. splitter: a name of `sentences.SPLITTERS`.
            more: further rows, concatenated below on the token axis. audit_more: what it reads of prompts.
        Raises:
            UserError: a family that reads long prompts by itself (SD3); towers with different vocabularies.
        """
        first, *others = model.towers()
        for tower in others:
            if tower.tokenizer.get_vocab() != first.tokenizer.get_vocab():
                raise UserError(
                    f"model.text segments does not apply to {model.model_id}: the tokenizers of {first.name} "
                    f"and {tower.name} have different vocabularies; give --text plain"
                )
        self.model, self.length, self.splitter = model, length, splitter
        self.more, self.audit_more = more, audit_more
        self.split = SPLITTERS[splitter]

    @property
    def limit(self) -> int:
        """Tokens of a prompt that are kept."""
        return self.length

    def words(self) -> str:
        """How it reads, in one line."""
        more = ", with more rows" if self.more is not None else ""
        return f"segments, {self.length} tokens, splitter {self.splitter}{more}"

    # ------------------------------------------------------------ encoding

    def encode(self, prompts: list[str]) -> TextCond:
        """tokens (B, length, D), with `more` (B, length + L2, D); pooled (B, P) or None."""
        model = self.model
        with model.text_at_work():
            tokens = model.here(encode_segments(model.towers(), list(map(self.split, prompts)), self.length))
            if self.more is not None:
                tokens = torch.cat([tokens, model.here(self.more(prompts))], dim=1)
            return TextCond(tokens, model.pooled_text(prompts))

    def uncond(self, batch: int) -> TextCond:
        """The encoding of the empty prompt, or as many zeros where the model has them, `batch` rows."""
        empty = self.encode([""])
        tokens, pooled = empty.tokens, empty.pooled
        if self.model.zeros_for_empty:
            tokens, pooled = torch.zeros_like(tokens), None if pooled is None else torch.zeros_like(pooled)
        return TextCond(tokens.expand(batch, -1, -1), None if pooled is None else pooled.expand(batch, -1))

    # ------------------------------------------------------------ what is cut

    def count(self, prompt: str) -> int:
        """Tokens of the prompt that would be kept, were there no limits."""
        return self._cuts([prompt])[0].tokens

    def audit(self, prompts: Sequence[str]) -> dict[str, list[Cut]]:
        """What is read of the prompts: name of the encoder in the pipeline -> one per prompt."""
        cuts = self._cuts(prompts)  # the towers read the same tokens
        more = {} if self.audit_more is None else self.audit_more(prompts)
        return {tower.name: cuts for tower in self.model.towers()} | more

    def _cuts(self, prompts: Sequence[str]) -> list[Cut]:
        tower = self.model.towers()[0]
        dropped = tower.dropped
        return segment_cuts(tower.tokenizer, tower.limit, self.length, prompts, self.split, dropped)


def encode_segments(towers: Sequence[Tower], parts: Sequence[Sequence[str]], length: int) -> Tensor:
    """Prompts as lists of their sentences -> (B, length, D), the towers' states side by side on D."""
    ids = towers[0].ids([sentence for own in parts for sentence in own])
    keep = ~torch.isin(ids, torch.tensor(towers[0].dropped))
    # of each prompt: the tokens before every sentence; those that begin beyond the length are not encoded
    ends = list(accumulate(map(len, parts), initial=0))
    counts = keep.sum(1)
    before = torch.cat([counts[a:b].cumsum(0) - counts[a:b] for a, b in pairwise(ends)])
    used = before < length
    longest = int((keep[used] * torch.arange(1, keep.shape[1] + 1)).max()) + 1  # with the end
    states = torch.cat([tower.states(ids[used, :longest]) for tower in towers], dim=-1)
    filler = torch.cat([tower.filler() for tower in towers]).to(states.dtype)
    keep = keep[used, :longest].to(states.device)
    first = list(accumulate((int(used[a:b].sum()) for a, b in pairwise(ends)), initial=0))
    rows = []
    for a, b in pairwise(first):
        own = states[a:b][keep[a:b]][:length]
        rows.append(torch.cat([own, filler.expand(length - len(own), -1)]))
    return torch.stack(rows)
