"""How likely the prompt is as GIT's caption of the picture.

Letters: B pictures, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, GitForCausalLM

from align_cli.cuts import Cut, cuts
from align_cli.errors import UserError
from align_cli.rewards.base import Request, choose_preprocessing, rgb
from align_cli.rewards.captioning import UNSCORED, Captioner, scored, smoothed_losses
from align_cli.rewards.pretrained import pretrained
from align_cli.rewards.twin import TensorTwin, twin_of

HUB = "microsoft/git-large-coco"


class GitCaption(Captioner):
    """Minus the mean cross-entropy, in nats per token, of the prompt and its end as GIT's caption.

    Source: Wang et al. 2022 (GIT): the loss it was trained with, after [CLS]. CoMat compares BLIP, GIT and
    LLaVA and publishes code for BLIP alone, so that its other choices for GIT are not known: nothing stands
    before the prompt, and nothing is smoothed here. Prompts are cut where the model has no more positions.
    """

    def __init__(self, model: GitForCausalLM, processor: Any, twin: TensorTwin, request: Request) -> None:
        super().__init__(
            name=request.name,
            version=f"GIT, {model.config.vision_config.num_hidden_layers}-layer image tower",
            source=request.source or HUB,
            preprocessing=f"official: the model's own ({type(processor.image_processor).__name__})",
            scale="mean log-likelihood per token (nats)",
            device=request.device,
            dtype=request.dtype,
        )
        self.model, self.tokenizer, self.twin = model, processor.tokenizer, twin
        self.max_tokens = int(model.config.max_position_embeddings)

    def token_losses(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `Captioner.token_losses`."""
        ids_BL, mask_BL, labels_BL = self.tokens(prompts)
        pixels = self.twin(rgb(images, prompts).to(self.device).float(), clamp=False).to(self.dtype)
        out = self.model(input_ids=ids_BL, attention_mask=mask_BL, pixel_values=pixels, use_cache=False)
        text_BLV = out.logits[:, -ids_BL.shape[1] :]  # before them are those of the picture
        return smoothed_losses(text_BLV, labels_BL, 0.0), scored(labels_BL)

    def token_counts(self, prompts: Sequence[str]) -> Tensor:
        """See `Captioner.token_counts`."""
        return scored(self.tokens(prompts)[2])

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, mask and labels (`UNSCORED` for padding), each (B, L) int64, from [CLS] to [SEP]."""
        text = self.tokenizer(
            list(prompts),
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.device)
        ids_BL, mask_BL = text["input_ids"], text["attention_mask"]
        return ids_BL, mask_BL, ids_BL.masked_fill(mask_BL == 0, UNSCORED)

    def audit(self, prompts: Sequence[str]) -> list[Cut]:
        return cuts(self.tokenizer, self.max_tokens, prompts)


def build_git_caption(request: Request) -> GitCaption:
    """GIT from a hub id or a folder of transformers.

    Raises:
        UserError: another preprocessing than "official"; not there; another model than GIT.
    """
    choose_preprocessing(request, {"official": None})
    model, processor = pretrained(
        request, request.source or HUB, AutoModelForCausalLM, "a GIT model of transformers"
    )
    if not isinstance(model, GitForCausalLM):
        raise UserError(
            f"{request.name}: {request.source} is of a {model.config.model_type} model, not of GIT"
        )
    return GitCaption(model, processor, twin_of(processor.image_processor, request), request)
