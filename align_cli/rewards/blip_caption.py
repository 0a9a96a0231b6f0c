"""How likely the prompt is as BLIP's caption of the picture: CoMat's concept matching score.

Letters: B pictures, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration

from align_cli.cuts import Cut, cuts
from align_cli.errors import UserError, first_line
from align_cli.registry import WEIGHTS
from align_cli.rewards.base import Request, choose_preprocessing, rgb
from align_cli.rewards.bert import bert_tokenizer
from align_cli.rewards.captioning import UNSCORED, Captioner, scored, smoothed_losses
from align_cli.rewards.places import place, published_source
from align_cli.rewards.preprocess import Preprocess
from align_cli.rewards.weights import fill, read_json, read_tensors

SOURCES = {
    "blip-caption": "Salesforce/blip-image-captioning-large",
    "tiny-blip": str(WEIGHTS / "tiny-blip"),
}
"""Name of the reward -> hub id, or folder of the package. Source: CoMat, load_captionmodel.py."""
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
PREFIX = "a photography of"
"""What the caption begins with; not scored. Source: CoMat, caption_blip.py."""
LABEL_SMOOTHING = 0.1
"""Of the cross-entropy: hard-wired in transformers 4.31, which CoMat ran on; transformers 5 defaults to 0."""


def _stretch(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size), whatever the shape was; values may leave [0, 1]."""
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True, align_corners=False)


STRETCH = Preprocess("official: stretched to a square, bicubic antialiased", _stretch)


class BlipCaption(Captioner):
    """Minus the mean smoothed cross-entropy, in nats per token, of the prompt and its end as BLIP's caption.

    Source: CoMat, concept_mat_utils/caption_blip.py. Deviations: the mean is over a picture's own tokens
    (CoMat's, over those of the whole batch, is `batch_score`); pictures are not cropped (its training crops
    them at random); prompts are cut where the model has no more positions.
    """

    def __init__(
        self, model: BlipForConditionalGeneration, tokenizer: BertTokenizer, request: Request
    ) -> None:
        super().__init__(
            name=request.name,
            version=f"BLIP captioning, {model.config.vision_config.num_hidden_layers}-layer image tower",
            source=request.source or published_source(SOURCES[request.name]),
            preprocessing=STRETCH.words,
            scale=f"mean log-likelihood per token (nats), label smoothing {LABEL_SMOOTHING}",
            device=request.device,
            dtype=request.dtype,
        )
        self.model, self.tokenizer = model, tokenizer

    def token_losses(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `Captioner.token_losses`; the cross-entropy is smoothed."""
        ids_BL, mask_BL, labels_BL = self.tokens(prompts)
        logits_BLV = self.logits(images, prompts, ids_BL, mask_BL)
        return smoothed_losses(logits_BLV, labels_BL, LABEL_SMOOTHING), scored(labels_BL)

    def token_counts(self, prompts: Sequence[str]) -> Tensor:
        """See `Captioner.token_counts`."""
        return scored(self.tokens(prompts)[2])

    def logits(self, images: Tensor, prompts: Sequence[str], ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """(B, L, V) of the caption's tokens."""
        pixels = STRETCH(rgb(images, prompts).to(self.device), self.model.config.vision_config.image_size)
        seen = self.model.vision_model(pixel_values=pixels.to(self.dtype)).last_hidden_state
        out = self.model.text_decoder(input_ids=ids_BL, attention_mask=mask_BL, encoder_hidden_states=seen)
        return out.logits

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, mask and labels (`UNSCORED` for padding and for what stands before the prompt), each
        (B, L) int64. Position 0 stays [CLS].
        """
        text = self.tokenizer(
            [f"{PREFIX} {prompt.lower()}" for prompt in prompts],
            padding="longest",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.device)
        ids_BL, mask_BL = text["input_ids"], text["attention_mask"]
        labels_BL = ids_BL.masked_fill(mask_BL == 0, UNSCORED)
        labels_BL[:, : len(self.tokenizer(PREFIX)["input_ids"]) - 1] = UNSCORED
        return ids_BL, mask_BL, labels_BL

    @property
    def max_tokens(self) -> int:
        """Tokens that the decoder has positions for, prefix, [CLS] and [SEP] included."""
        return int(self.model.config.text_config.max_position_embeddings)

    def audit(self, prompts: Sequence[str]) -> list[Cut]:
        return cuts(self.tokenizer, self.max_tokens, prompts, before=f"{PREFIX} ")


def build_blip_caption(request: Request) -> BlipCaption:
    """BLIP from a hub id or a folder: config.json, weights, vocab.txt.

    Raises:
        UserError: another preprocessing than "official"; missing or misfitting files.
    """
    choose_preprocessing(request, {"official": STRETCH})
    where = place(request.name, request.source, SOURCES[request.name])
    config_file = where.find("config.json")
    if config_file is None:
        raise UserError(f"{request.name}: no configuration: {where.lacking('config.json')}")
    config = read_json(config_file, request.name)
    if config.get("model_type") != "blip":
        raise UserError(
            f"{request.name}: {config_file} is of a {config.get('model_type')} model, not of BLIP"
        )
    path = where.weights(FILES)
    state = read_tensors(path, request.name, where)
    tokenizer = bert_tokenizer(where)
    try:
        with torch.device("meta"):
            model = BlipForConditionalGeneration(BlipConfig.from_dict(config))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{request.name}: {config_file} is no configuration of BLIP: {first_line(error)}"
        ) from error
    fill_blip(model, state, f"{request.name}: {path}", request)
    return BlipCaption(model, tokenizer, request)


def fill_blip(
    model: BlipForConditionalGeneration, state: dict[str, Tensor], where: str, request: Request
) -> None:
    """The weights into a model on the meta device; those that files leave out because they are tied to others
    are filled in. UserError about `where` if they do not fit.
    """
    state = {key: x for key, x in state.items() if not key.endswith("position_ids")}
    head = "text_decoder.cls.predictions."
    for tied, to in (
        (f"{head}decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"),
        (f"{head}decoder.bias", f"{head}bias"),
        (f"{head}bias", f"{head}decoder.bias"),
    ):
        if tied not in state and to in state:
            state[tied] = state[to]
    fill(model, state, where, device=request.device, dtype=request.dtype)
