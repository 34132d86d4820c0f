"""What tokenizers minimise: the losses of images that all of them share, and those on a frozen encoder's features, of
FAE's stages (arXiv 2512.07829, sections 4.1 and 4.2) and of DRoRAE's phases (arXiv 2605.10780).
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..autoencoders.frozen_encoder import frozen_features
from ..losses.gan import AdversarialLoss
from ..utils.image_metrics import feature_cosine
from ..utils.randomness import ImageRandom
from .base import Objective, add_noise, check_not_negative, sample_posterior
from .reconstruction import Reconstruction, ReconstructionObjective


__all__ = ["FeatureObjective", "NoisyLatentObjective", "PixelObjective", "kl_divergence"]


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), the mean over all elements, in fp32."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


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
        check_not_negative(latent_noise=latent_noise)
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
        check_not_negative(latent_noise=latent_noise)
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
