"""What tokenizers minimise: the losses of images that all of them share, and those on a frozen encoder's features, of
FAE's stages (arXiv 2512.07829, sections 4.1 and 4.2) and of DRoRAE's phases (arXiv 2605.10780).
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..evaluation.reconstruction import feature_cosine
from .adversarial import AdversarialLoss
from .objectives import Objective, add_noise, sample_posterior
from .randomness import ImageRandom


__all__ = [
    "DRoRAEObjective",
    "FeatureObjective",
    "NoisyLatentObjective",
    "PixelObjective",
    "Reconstruction",
    "ReconstructionObjective",
    "add_decoder_noise",
    "frozen_features",
    "kl_divergence",
]


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), the mean over all elements, in fp32."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def add_decoder_noise(tokens: torch.Tensor, tau: float, random: ImageRandom) -> torch.Tensor:
    """Tokens (B, N, C) with the noise of RAE's decoder: sigma eps, sigma = tau u with one uniform u for each image.

    That is the law of RAE's code, which made its published decoders; arXiv 2510.11690 has |N(0, tau^2)| for sigma.
    """
    sigma = tau * random.uniform(len(tokens)).view(-1, 1, 1)
    return tokens + (sigma * random.normal(*tokens.shape)).to(tokens.dtype)


def frozen_features(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple[int, int]]:
    """The frozen encoder's raw features (B, N, C) and their grid: those in the batch, else of its pictures.

    Args:
        model: a tokenizer, which needs its encoder only if the batch has no "features" (B, C, h, w).
    """
    if "features" in batch:
        features = batch["features"]
        return features.flatten(2).transpose(1, 2), tuple(features.shape[2:])
    return model.extract_features(batch["pixel_values"])


def _check_noise(**noise):
    for name, value in noise.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")


class FeatureObjective(Objective):
    """Stage Ia: encoder and feature decoder as a VAE on frozen features, |x_hat - x|^2 + kl_weight * KL (eq. 4.1).

    Both terms are means over elements, of standardised features and of latents. The latent
    statistics of `model` are set back to identity: this stage is what defines the latents.

    Args:
        model: an `AutoencoderFAE` with its frozen encoder attached.
        kl_weight: beta of means; beta of sums is larger by feature width / latent channels.
    """

    def __init__(self, model: nn.Module, kl_weight: float = 1e-3):
        super().__init__(model, [model.encoder, model.feature_decoder])
        model.set_latent_statistics(torch.zeros_like(model.latents_mean), torch.ones_like(model.latents_std))
        self.kl_weight = kl_weight

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        features, grid = frozen_features(self.model, batch)
        posterior = self.model.encode_features(features, grid).latent_dist
        terms = _compare_features(self.model, sample_posterior(posterior, random), features)
        kl = kl_divergence(posterior.mean, posterior.logvar)
        return {"loss": terms["feature_mse"] + self.kl_weight * kl, "kl": kl, **terms}


class NoisyLatentObjective(Objective):
    """The feature decoder alone, on latents with noise: it learns to take off what a flow leaves on its samples.

    STARFlow (section 3.3) tunes the decoder of its tokenizer; for FAE the feature decoder does it, by the mean squared
    error of standardised features, so that one pixel decoder serves all. Encoder and latents stay as they are.

    Args:
        model: an `AutoencoderFAE` after stage Ia, with its frozen encoder attached.
        latent_noise: standard deviation of the noise on normalised latents, `noise_sigma` of the flow.
    """

    def __init__(self, model: nn.Module, latent_noise: float):
        _check_noise(latent_noise=latent_noise)
        super().__init__(model, [model.feature_decoder])
        self.latent_noise = latent_noise

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            features, grid = frozen_features(self.model, batch)
            latents = sample_posterior(self.model.encode_features(features, grid).latent_dist, random)
            latents = add_noise(latents, self.latent_noise, random)
        terms = _compare_features(self.model, latents, features)
        return {"loss": terms["feature_mse"], **terms}


def _compare_features(model, latents, features):
    """Squared error of standardised features and cosine of raw ones, of latents against the encoder's features."""
    reconstruction = model.decode_standardized(latents).float()
    mse = F.mse_loss(reconstruction, model.standardize_features(features).float())
    with torch.no_grad():
        cosine = feature_cosine(reconstruction * model.features_std + model.features_mean, features)
    return {"feature_mse": mse, "feature_cosine": cosine}


@dataclass
class Reconstruction:
    """What `ReconstructionObjective.reconstruct` gives.

    Attributes:
        images: (B, 3, H, W), about [-1, 1], with their graph.
        shown: others of that shape that the discriminator learns from; None for `images`.
        terms: further terms of the loss, name -> (weight, scalar).
    """

    images: torch.Tensor
    shown: torch.Tensor | None = None
    terms: dict[str, tuple[float, torch.Tensor]] = field(default_factory=dict)


class ReconstructionObjective(Objective):
    """What trainings on images share: the distance of pixels, of perception, and the game with a discriminator.

    A subclass says how images are reconstructed, by `reconstruct`, and by which layer in the end, `last_layer_weight`.

    Args:
        model: the tokenizer.
        trained: the names of its parts to train.
        reconstruction_loss: `"l2"` or `"l1"`.
        perceptual: a distance of images, with `perceptual_weight`; None for none.
        adversarial: the game with a discriminator, which is trained as well, at `discriminator_learning_rate` (by
            default the run's); None for none.
    """

    pixel_scale = 0.5  # distances are on the [0, 1] scale of pixels, as in the recipes of TiTok, RAE and l-DeTok

    def __init__(
        self,
        model: nn.Module,
        trained: list[str],
        reconstruction_loss: Literal["l2", "l1"] = "l2",
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        adversarial: AdversarialLoss | None = None,
        discriminator_learning_rate: float | None = None,
    ):
        if reconstruction_loss not in ("l2", "l1"):
            raise ValueError(f"reconstruction_loss must be 'l2' or 'l1', got {reconstruction_loss!r}")
        super().__init__(model, [getattr(model, name) for name in trained])
        self.trained = trained
        self.pixel_distance = F.mse_loss if reconstruction_loss == "l2" else F.l1_loss
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.adversarial, self.discriminator_learning_rate = adversarial, discriminator_learning_rate

    @property
    def last_layer_weight(self) -> nn.Parameter:
        """Of the layer that makes the images, for adaptive weights."""
        raise NotImplementedError

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        raise NotImplementedError

    def compare_pixels(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The distance of images from targets, both (B, 3, H, W) in [-1, 1]: a scalar in fp32."""
        return self.pixel_distance(images.float() * self.pixel_scale, targets.float() * self.pixel_scale)

    def parameter_groups(self) -> list[dict]:
        parts = [getattr(self.model, name) for name in self.trained]
        groups = [{"params": [p for part in parts for p in part.parameters() if p.requires_grad]}]
        if self.adversarial is not None:
            params = [p for p in self.adversarial.parameters() if p.requires_grad]
            groups.append(
                {"params": params, "learning_rate": self.discriminator_learning_rate, "name": "discriminator"}
            )
        return groups

    def before_step(self, step: int) -> None:
        if self.adversarial is not None:
            self.adversarial.before_step(step)

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        images = batch["pixel_values"]
        made = self.reconstruct(batch, random)
        decoded = made.images.float()
        reconstruction = self.compare_pixels(decoded, images)
        losses = {"loss": reconstruction, "reconstruction": reconstruction}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(decoded, images)
            losses["loss"] = reconstruction + self.perceptual_weight * losses["perceptual"]
        if self.adversarial is not None:
            game = self.adversarial(decoded, images, losses["loss"], self.last_layer_weight, random, made.shown)
            losses["loss"] = losses["loss"] + game.pop("loss")
            losses |= {f"adversarial/{name}": value for name, value in game.items()}
        for name, (weight, value) in made.terms.items():
            losses[name] = value
            losses["loss"] = losses["loss"] + weight * value
        return losses


class PixelObjective(ReconstructionObjective):
    """Stages Ib and II: the pixel decoder, on noisy original features or on those that the tokenizer gives back.

    Args:
        model: an `AutoencoderFAE` with its frozen encoder attached; stage II needs its stage Ia trained.
        stage: `"Ib"`: features + `noise_sigma` * eps, in the standardised scale (section 4.2); `"II"`: features
            decoded from a sample of the posterior.
        noise_sigma: fixed noise level of stage Ib (0.4 for DINOv2).
        latent_noise: stage II: noise on normalised latents, for a generator whose samples have it (STARFlow).
        reconstruction_loss, perceptual, perceptual_weight, adversarial, discriminator_learning_rate: as
            `ReconstructionObjective`.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Literal["Ib", "II"] = "Ib",
        noise_sigma: float = 0.4,
        reconstruction_loss: Literal["l2", "l1"] = "l2",
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.1,
        adversarial: AdversarialLoss | None = None,
        discriminator_learning_rate: float | None = None,
        latent_noise: float = 0.0,
    ):
        if stage not in ("Ib", "II"):
            raise ValueError(f"stage must be 'Ib' or 'II', got {stage!r}")
        _check_noise(latent_noise=latent_noise)
        if latent_noise and stage == "Ib":
            raise ValueError(f"latent_noise must be 0 in stage Ib, which decodes no latents, got {latent_noise}")
        super().__init__(
            model,
            ["pixel_decoder"],
            reconstruction_loss,
            perceptual,
            perceptual_weight,
            adversarial,
            discriminator_learning_rate,
        )
        self.stage, self.noise_sigma, self.latent_noise = stage, noise_sigma, latent_noise

    @property
    def last_layer_weight(self) -> nn.Parameter:
        return self.model.pixel_decoder.proj_out.weight

    @torch.no_grad()
    def decoder_input(self, features: torch.Tensor, grid: tuple[int, int], random: ImageRandom) -> torch.Tensor:
        """What the pixel decoder is trained on: standardised features (B, N, C)."""
        if self.stage == "Ib":
            standard = self.model.standardize_features(features)
            return standard + self.noise_sigma * random.normal(*standard.shape).to(standard.dtype)
        posterior = self.model.encode_features(features, grid).latent_dist
        latents = add_noise(sample_posterior(posterior, random), self.latent_noise, random)
        return self.model.decode_standardized(latents)

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        features, grid = frozen_features(self.model, batch)
        return Reconstruction(self.model.pixel_decoder(self.decoder_input(features, grid, random), grid))


class DRoRAEObjective(ReconstructionObjective):
    """The phases of DRoRAE (section 3.3): the decoder behind a frozen fusion, or the fusion before a frozen decoder.

    Phases 1 (which is RAE) and 3 differ by the fusion of `model`: none, or a trained one. While training, the decoder
    sees noise on the unnormalised latents; the discriminator learns from what it makes of them without noise, as in
    RAE's code.

    Args:
        model: an `AutoencoderDRoRAE` with its frozen encoder attached.
        trained: `"decoder"` (phases 1 and 3) or `"fusion"` (phase 2).
        decoder_noise: tau, see `add_decoder_noise`; 0 for none.
        reconstruction_loss, perceptual, perceptual_weight, adversarial, discriminator_learning_rate: as
            `ReconstructionObjective`.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Literal["decoder", "fusion"] = "decoder",
        decoder_noise: float = 0.8,
        reconstruction_loss: Literal["l2", "l1"] = "l1",
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        adversarial: AdversarialLoss | None = None,
        discriminator_learning_rate: float | None = None,
    ):
        if trained not in ("decoder", "fusion"):
            raise ValueError(f"trained must be 'decoder' or 'fusion', got {trained!r}")
        _check_noise(decoder_noise=decoder_noise)
        if trained == "fusion" and (model.fusion is None or model.config.fusion_weight == 0):
            config = model.config
            raise ValueError(
                "trained must be 'decoder' for a tokenizer whose latents no experts take part in, got 'fusion' with "
                f"fusion_type {config.fusion_type!r} and fusion_weight {config.fusion_weight}"
            )
        super().__init__(
            model,
            [trained],
            reconstruction_loss,
            perceptual,
            perceptual_weight,
            adversarial,
            discriminator_learning_rate,
        )
        self.trains_fusion, self.decoder_noise = trained == "fusion", decoder_noise
        if adversarial is not None and adversarial.adaptive:
            # Adaptive weights are taken from its gradient. In phase 2 no optimiser has it, so that it stays as it is.
            self.last_layer_weight.requires_grad_(True)

    @property
    def last_layer_weight(self) -> nn.Parameter:
        return self.model.decoder.proj_out.weight

    def before_step(self, step: int) -> None:
        super().before_step(step)
        if self.trains_fusion:
            self.last_layer_weight.grad = None  # which no optimiser clears

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        features, _ = self.model.extract_features(batch["pixel_values"])
        with torch.set_grad_enabled(self.trains_fusion and torch.is_grad_enabled()):
            tokens = self.model.fuse(features)
        if not self.training or self.decoder_noise == 0:
            return Reconstruction(self.model.decode_tokens(tokens))
        decoded = self.model.decode_tokens(add_decoder_noise(tokens, self.decoder_noise, random))
        shown = None
        if self.adversarial is not None and self.adversarial.discriminator_learns:
            with torch.no_grad():
                shown = self.model.decode_tokens(tokens)
        return Reconstruction(decoded, shown)
