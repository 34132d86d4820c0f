"""Validation of a training run: metrics over the validation images, and sheets of images.

A validation is called by the loop with the step, under averaged weights, in eval mode and without gradients; it
returns numbers to log and PIL images to save.
"""

from collections.abc import Iterable

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..autoencoders.fae import AutoencoderFAE
from ..images import make_grid, to_pil
from ..latents import LatentAutoencoderMixin
from ..pipelines.latent_pipeline import LatentPipeline
from ..utils.image_metrics import feature_cosine, psnr
from ..utils.randomness import ImageRandom
from .base import Mean, add_noise
from .generator import GeneratorObjective
from .reconstruction import ReconstructionObjective


__all__ = [
    "FeatureValidation",
    "GeneratorValidation",
    "PixelDecoderValidation",
    "ReconstructionValidation",
    "TokenizerValidation",
]


def _with_progress(batches):
    """The batches, under a bar that counts their images and goes away at the end."""
    counts = [len(batch["row_ids"] if "row_ids" in batch else batch["pixel_values"]) for batch in batches]
    hidden = not PartialState().is_main_process
    with tqdm(total=sum(counts), desc="validation", unit="image", leave=False, disable=hidden) as bar:
        for batch, count in zip(batches, counts, strict=True):
            yield batch
            bar.update(count)


class BatchMeans:
    """Means of per-batch means, weighted by the size of each batch."""

    def __init__(self):
        self.count, self._sums = 0, {}

    def add(self, values: dict[str, torch.Tensor], size: int) -> None:
        """Scalars that are means over `size` images."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.item() * size
        self.count += size

    def compute(self) -> dict[str, float]:
        """Means over all images."""
        return {name: total / self.count for name, total in self._sums.items()}


class ReconstructionValidation:
    """Means over the validation images, and a sheet "reconstructions": the first images above their reconstructions.

    A subclass defines `reconstruct`.

    Args:
        model: the tokenizer.
        batches: of validation images, "pixel_values" (B, 3, H, W) in [-1, 1].
        grid_images: number of images on the sheet.
    """

    def __init__(self, model: LatentAutoencoderMixin | AutoencoderKL, batches: Iterable[dict], grid_images: int):
        self.model, self.batches, self.grid_images = model, list(batches), grid_images

    def reconstruct(self, images: torch.Tensor, first_image: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Reconstructions of images (B, 3, H, W), and scalars that are means over them.

        Args:
            first_image: number of the first image, counted over all batches.
        """
        raise NotImplementedError

    def __call__(self, step: int) -> dict:
        means, originals, reconstructions = BatchMeans(), [], []
        for batch in _with_progress(self.batches):
            images = batch["pixel_values"].to(self.model.device)
            reconstructed, values = self.reconstruct(images, first_image=means.count)
            means.add(values, len(images))
            missing = self.grid_images - len(originals)
            originals += to_pil(images[:missing]) if missing > 0 else []
            reconstructions += to_pil(reconstructed[:missing]) if missing > 0 else []
        sheet = make_grid(originals + reconstructions, columns=len(originals))
        return {**means.compute(), "reconstructions": sheet}


class TokenizerValidation(ReconstructionValidation):
    """PSNR and pixel distance of whole images through the tokenizer, as in use.

    Args:
        objective: whose model and pixel distance are used.
        batches, grid_images: as in `ReconstructionValidation`.
    """

    def __init__(self, objective: ReconstructionObjective, batches: Iterable[dict], grid_images: int):
        super().__init__(objective.model, batches, grid_images)
        self.objective = objective

    def reconstruct(self, images, first_image):
        decoded = self.model(images).sample
        distance = self.objective.compare_pixels(decoded, images)
        return decoded, {"psnr": psnr(decoded, images), "reconstruction": distance}


class PixelDecoderValidation(ReconstructionValidation):
    """PSNR of the whole FAE, with noise on its latents, and of its pixel decoder on the encoder's own features.

    Args:
        model, batches, grid_images: as in `ReconstructionValidation`.
        latent_noise: standard deviation of the noise on normalised latents.
        seed: of that noise.
    """

    def __init__(
        self, model: AutoencoderFAE, batches: Iterable[dict], grid_images: int, *, latent_noise: float, seed: int
    ):
        super().__init__(model, batches, grid_images)
        self.latent_noise, self.seed = latent_noise, seed

    def reconstruct(self, images, first_image):
        features, grid = self.model.extract_features(images)
        latents = self.model.encode_features(features, grid).latent_dist.mode()
        latents = add_noise(latents, self.latent_noise, ImageRandom(self.seed, first_image, images.device))
        decoded = self.model.decode(latents).sample
        from_features = self.model.decode_pixels(features, grid).sample
        return decoded, {"psnr": psnr(decoded, images), "psnr_of_encoder_features": psnr(from_features, images)}


class FeatureValidation:
    """Cosine and squared error of features reconstructed from the posterior modes, with noise if trained with it.

    Args:
        model: an FAE.
        batches: of validation images, "pixel_values" (B, 3, H, W) in [-1, 1].
        latent_noise: standard deviation of the noise on normalised latents.
        seed: of that noise.
    """

    def __init__(self, model: AutoencoderFAE, batches: Iterable[dict], *, latent_noise: float, seed: int):
        self.model, self.batches, self.latent_noise, self.seed = model, list(batches), latent_noise, seed

    def __call__(self, step: int) -> dict[str, float]:
        model, means = self.model, BatchMeans()
        for batch in _with_progress(self.batches):
            features, grid = model.extract_features(batch["pixel_values"].to(model.device))
            latents = model.encode_features(features, grid).latent_dist.mode()
            latents = add_noise(latents, self.latent_noise, ImageRandom(self.seed, means.count, model.device))
            decoded = model.decode_features(latents)
            error = F.mse_loss(model.standardize_features(decoded), model.standardize_features(features))
            means.add({"feature_cosine": feature_cosine(decoded, features), "feature_mse": error}, len(features))
        return means.compute()


class GeneratorValidation:
    """A sheet of samples and, where there are batches, the validation loss; with the same noise every time.

    Args:
        pipeline: generates the samples.
        objective: of the pipeline's generator; computes the loss and its other numbers.
        batches: of the validation split; empty if there is none.
        grid_images: number of samples, spread over the classes or captions.
        seed: of all noise.
        examples: batches whose captions a text-conditional pipeline generates; by default `batches`.
        arguments: further arguments of the pipeline's call.
    """

    def __init__(
        self,
        pipeline: LatentPipeline,
        objective: GeneratorObjective,
        batches: Iterable[dict],
        *,
        grid_images: int,
        seed: int,
        examples: list[dict] | None = None,
        **arguments,
    ):
        self.pipeline, self.objective, self.batches, self.seed = pipeline, objective, list(batches), seed
        pipeline.set_progress_bar_config(disable=True)
        examples = self.batches if examples is None else examples
        self.prompts, conditions = objective.condition.prompts(examples, grid_images)
        self.arguments = {**conditions, **arguments}

    def __call__(self, step: int) -> dict:
        generator = torch.Generator().manual_seed(self.seed)
        samples = self.pipeline(generator=generator, **self.arguments).images
        device, means = self.pipeline.device, BatchMeans()
        for batch in _with_progress(self.batches):
            batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
            losses = self.objective(batch, ImageRandom(self.seed, means.count, device))
            scalars = {name: value for name, value in losses.items() if not isinstance(value, Mean)}
            means.add(scalars, len(batch["row_ids"]))
        return {"samples": make_grid(samples, labels=self.prompts), "prompts": self.prompts, **means.compute()}
