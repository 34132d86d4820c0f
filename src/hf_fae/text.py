"""Text conditions of generators: embeddings of a frozen text encoder, and their mask."""

import torch
import transformers
from diffusers.utils import logging
from transformers import (
    AutoConfig,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from .utils.config_bounds import check_numbers
from .utils.hub_errors import hub_errors
from .utils.weights import check_weights


__all__ = ["encode_text", "load_text_encoder"]

logger = logging.get_logger(__name__)


def load_text_encoder(
    path: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the text encoder from a Hub id or a folder.

    T5, BERT, MiniLM, ..., or the text tower of CLIP or SigLIP.

    Raises:
        ValueError: the checkpoint lacks weights of the encoder; its pooler is not used and may be missing.
        OSError: files are missing.
    """
    with hub_errors(path):
        check_numbers(PreTrainedConfig.get_config_dict(path)[0], f"the config of {path!r}")
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
            model_class = AutoModelForTextEncoding
        else:
            text_config = getattr(config, "text_config", config)
            model_class = getattr(transformers, type(text_config).__name__.replace("Config", "Model"))
        model, info = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # transformers only warns and leaves these random
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        raise ValueError(f"{path!r} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    check_weights(model, path)
    return tokenizer, model


@torch.no_grad()
def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    texts: list[str],
    max_length: int,
    device: torch.device | None = None,
    warns: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token embeddings of texts from a frozen text encoder (STARFlow, arXiv 2506.06276, appendix B.1).

    Args:
        tokenizer, text_encoder: any transformers model with a `last_hidden_state`: Flan-T5's encoder, the text models
            of CLIP and SigLIP, BERT, MiniLM, ... SigLIP reads lower-case texts together with their padding to 64
            tokens, as in its training.
        texts: of any length; truncated to `max_length` tokens, and to the encoder's maximum.
        max_length: number of tokens that texts are padded to.
        device: where the encoder computes; by default that of its weights, which is wrong while it is offloaded.
        warns: log which texts are truncated.

    Returns:
        Embeddings (texts, max_length, hidden_size) in the encoder's dtype, zero after the end of each text, and a bool
        mask (texts, max_length) that is true up to there. An empty text has no token if the tokenizer adds none.
    """
    config = text_encoder.config
    reads_padding = config.model_type.startswith("siglip")
    if reads_padding:
        texts = [text.lower() for text in texts]
    # CLIP's 77 positions and SigLIP's 64 are fewer than most generators accept.
    places = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tokenizer.model_max_length))
    length = min(max_length, places)
    if warns:
        cut = [text for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True) if len(ids) > length]
        if cut:
            logger.warning(f"these texts are read up to their token {length} only: {cut}")
    options = {"padding": "max_length", "padding_side": "right", "truncation": True, "return_attention_mask": True}
    read = places if reads_padding else length
    inputs = tokenizer(texts, max_length=read, return_tensors="pt", **options).to(device or text_encoder.device)
    mask = inputs.attention_mask[:, :length].bool()
    attention = {} if reads_padding else {"attention_mask": inputs.attention_mask}
    embeds = text_encoder(input_ids=inputs.input_ids, **attention).last_hidden_state[:, :length]
    behind = max_length - length
    embeds = torch.nn.functional.pad(embeds.masked_fill(~mask[..., None], 0), (0, 0, 0, behind))
    return embeds, torch.nn.functional.pad(mask, (0, behind))
