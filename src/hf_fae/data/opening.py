"""What a generator's training opens for its data: images or cached latents, a text encoder, a pipeline to continue."""

from ..loading import complete_text_encoder, load_trained_pipeline
from ..pipelines.latent_pipeline import LatentPipeline
from .captions import CAPTION_LENGTH, CaptionEncoder, load_caption_encoder
from .images import ImageData
from .latent_cache import CachedLatents, is_latent_cache
from .protocol import GeneratorData
from .source import DataArguments


__all__ = ["latent_sample_size", "open_caption_encoder", "open_pipeline", "open_training_data"]


def open_training_data(args: DataArguments, seed: int) -> GeneratorData:
    """The cached latents or the images that `dataset_name` names."""
    if is_latent_cache(args.dataset_name):
        return CachedLatents.from_arguments(args, seed)
    return ImageData(args, seed)


def latent_sample_size(data: GeneratorData, vae) -> int | list[int]:
    """The latents' size as a generator's `sample_size`: their side, or [height, width] if they are not square."""
    height, width = data.latent_size(vae)
    return height if height == width else [height, width]


def open_caption_encoder(data: GeneratorData, path: str | None, max_length: int | None = None) -> CaptionEncoder:
    """The text encoder of a new generator, in fp32.

    Args:
        path: Hub id or folder; by default the one that has embedded the captions of the latent cache.
        max_length: tokens of a caption; by default as in the latent cache, else `CAPTION_LENGTH`.

    Raises:
        ValueError: no text encoder is named for captions that none has embedded, or `max_length` is not positive.
    """
    cached = data.text_encoder or {"source": None, "max_length": CAPTION_LENGTH}
    path = path or cached["source"]
    if path is None:
        raise ValueError("text_encoder must name what reads the captions, got None")
    return load_caption_encoder(path, cached["max_length"] if max_length is None else max_length)


def open_pipeline(
    data: GeneratorData,
    path: str,
    pipeline_class: type[LatentPipeline],
    *,
    vae: str | None = None,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
) -> LatentPipeline:
    """The pipeline to continue training from, whose own tokenizer must fit the data.

    Args:
        path: Hub id or folder.
        pipeline_class: the required class.
        vae: must be None: the pipeline has a tokenizer.
        image_encoder: as in `GeneratorData.load_tokenizer`.
        text_encoder: as in `loading.complete_text_encoder`.

    Raises:
        ValueError: a pipeline of another class, or components that do not fit the data.
    """
    if vae is not None:
        raise ValueError(f"vae must be None with pipeline, which has its own tokenizer, got {vae!r}")
    pipeline = load_trained_pipeline(path, pipeline_class)
    complete_text_encoder(pipeline, text_encoder)
    data.prepare_tokenizer(pipeline.vae, image_encoder)
    return pipeline
