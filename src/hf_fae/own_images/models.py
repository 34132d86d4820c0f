"""The models that the stages are going to load, opened once before anything is written."""

from ..autoencoders.initialization import load_trained_fae
from ..data.captions import load_caption_encoder
from ..encoders import VisionEncoder
from .plan import Plan


__all__ = ["check_models"]


def check_models(plan: Plan) -> None:
    """Load the tokenizer, its frozen encoder and the text encoder, which also fetches them.

    Raises:
        ValueError, OSError: one of them cannot be loaded.
    """
    if plan.tokenizer is None:
        VisionEncoder.from_pretrained(plan.image_encoder)
    else:
        load_trained_fae(plan.tokenizer, plan.image_encoder, plan.resolution)
    if plan.text_encoder is not None:
        load_caption_encoder(plan.text_encoder)
