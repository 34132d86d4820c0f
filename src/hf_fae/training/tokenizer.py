"""The trained tokenizer that a later stage builds on."""

from ..autoencoders.fae import AutoencoderFAE


__all__ = ["check_resolution", "load_trained_fae"]


def load_trained_fae(path: str, image_encoder: str | None, resolution: int) -> AutoencoderFAE:
    """An FAE in fp32 with its frozen encoder.

    Args:
        path: Hub id or folder.
        image_encoder: Hub id or folder of the encoder, where the FAE comes without it.
        resolution: side of the training pictures.

    Raises:
        ValueError: the FAE was trained on pictures of another size.
    """
    model = AutoencoderFAE.from_pretrained(path)
    check_resolution(model, resolution)
    if model.image_encoder is None:
        model.load_encoder(image_encoder)
    return model.float()


def check_resolution(vae: AutoencoderFAE, resolution: int) -> None:
    """Refuse pictures of another size than the tokenizer was trained on.

    Raises:
        ValueError: they are.
    """
    if vae.config.sample_size != resolution:
        raise ValueError(f"resolution must be that of the tokenizer, {vae.config.sample_size}, got {resolution}")
