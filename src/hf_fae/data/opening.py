"""What a generator's training opens for its data: images or cached latents, a text encoder, a pipeline to continue."""

from dataclasses import MISSING, fields

from ..loading import complete_text_encoder, load_trained_pipeline
from ..pipelines.latent_pipeline import LatentPipeline
from ..schedulers.euler_maruyama import FlowMatchEulerMaruyamaScheduler
from .captions import CAPTION_LENGTH, CaptionEncoder, load_caption_encoder
from .images import ImageData
from .latent_cache import CachedLatents, is_latent_cache
from .protocol import GeneratorData
from .source import DataArguments


__all__ = [
    "check_pipeline_arguments",
    "latent_sample_size",
    "open_caption_encoder",
    "open_pipeline",
    "open_training_data",
]

# What `--denoiser` of the training scripts calls a class.
DENOISERS = {
    "DiTDHTransformer2DModel": "dit_dh",
    "LightningDiTTransformer2DModel": "lightningdit",
    "MMDiTTransformer2DModel": "mmdit",
    "RAEv2Transformer2DModel": "raev2",
}


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


def check_pipeline_arguments(args, pipeline: LatentPipeline, **others) -> None:
    """Refuse arguments of a new pipeline that have no effect on the one that training continues from.

    Args:
        args: dataclass of a script's arguments. One that differs from its default must have the pipeline's value.
        others: further arguments that have no effect, with the values that they may have.

    Raises:
        ValueError: such an argument has another value.
    """
    values = {**_pipeline_values(pipeline), **others}
    for argument in fields(args):
        if argument.name not in values:
            continue
        given, value = getattr(args, argument.name), values[argument.name]
        default = argument.default if argument.default_factory is MISSING else argument.default_factory()
        same = abs(given - value) < 1e-6 if isinstance(given, float) and isinstance(value, float) else given == value
        if given != default and not same:
            raise ValueError(
                f"{argument.name} has no effect on pipeline {args.pipeline!r}, which has {value!r}, got {given!r}"
            )


def _pipeline_values(pipeline):
    """What a pipeline has in place of the arguments of a new one."""
    transformer, scheduler = pipeline.transformer, getattr(pipeline, "scheduler", None)
    settings = {name: value for name, value in pipeline.config.items() if name not in pipeline.components}
    values = {**transformer.config, **settings, "guidance_scale": pipeline.guidance_scale}
    if "encoder_num_layers" in values:  # MAR
        values["num_layers"] = values["encoder_num_layers"]
    values["model"] = values.get("order", "mar")
    values["denoiser"] = DENOISERS.get(type(transformer).__name__)
    intervals = pipeline.config.guidance_scale.get("intervals") or [(0.0, 0.9, 1.0)]
    values["guidance_t_high"] = intervals[0][1]
    if scheduler is not None:
        values["timestep_spacing"] = scheduler.config.get("timestep_spacing")
        values["shift"] = 1 / scheduler.config.get("shift", 1.0)
        values["sampler"] = "sde" if isinstance(scheduler, FlowMatchEulerMaruyamaScheduler) else "ode"
    return values
