"""FAE's objectives (arXiv 2512.07829, section 4), on the features x of a frozen encoder.

Stage Ia trains the encoder and the feature decoder, stages Ib and II the pixel decoder. `NoisyLatentObjective` tunes
the feature decoder for the noisy samples of a STARFlow.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..autoencoders.frozen_encoder import frozen_features
from ..utils.image_metrics import feature_cosine
from ..utils.randomness import ImageRandom
from .base import Objective, add_noise, check_not_negative, sample_posterior
from .reconstruction import Reconstruction, ReconstructionObjective


__all__ = ["FeatureObjective", "NoisyLatentObjective", "PixelObjective", "kl_divergence"]


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), the mean over all elements, in fp32."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def compare_features(model: nn.Module, latents: torch.Tensor, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Errors of the features (B, N, C) decoded from latents (B, C', h, w) by an FAE.

    Returns:
        "feature_mse" of standardised features, and "feature_cosine" of raw ones, without a graph.
    """
    reconstruction = model.decode_standardized(latents).float()
    mse = F.mse_loss(reconstruction, model.standardize_features(features).float())
    with torch.no_grad():
        cosine = feature_cosine(reconstruction * model.features_std + model.features_mean, features)
    return {"feature_mse": mse, "feature_cosine": cosine}


class FeatureObjective(Objective):
    """Stage Ia: encoder and feature decoder as a VAE on frozen features, |x_hat - x|^2 + kl_weight * KL (eq. 4.1).

    Both terms are means over elements, of standardised features and of latents. The latent statistics of `model` are
    reset to identity: this stage defines the latents.

    Args:
        model: an `AutoencoderFAE` with its frozen encoder attached.
        kl_weight: beta for means; beta for sums is larger by feature width / latent channels.
    """

    def __init__(self, model: nn.Module, kl_weight: float = 1e-3):
        super().__init__(model, [model.encoder, model.feature_decoder])
        model.set_latent_statistics(torch.zeros_like(model.latents_mean), torch.ones_like(model.latents_std))
        self.kl_weight = kl_weight

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        features, grid = frozen_features(self.model, batch)
        posterior = self.model.encode_features(features, grid).latent_dist
        terms = compare_features(self.model, sample_posterior(posterior, random), features)
        kl = kl_divergence(posterior.mean, posterior.logvar)
        return {"loss": terms["feature_mse"] + self.kl_weight * kl, "kl": kl, **terms}


class NoisyLatentObjective(Objective):
    """The feature decoder alone, on noisy latents: it learns to remove the noise that a flow leaves on its samples.

    STARFlow (arXiv 2506.06276, section 3.3) tunes the decoder of its tokenizer. In an FAE the feature decoder is
    tuned, by the mean squared error of standardised features, so that one pixel decoder serves all. Encoder and
    latents stay unchanged.

    Args:
        model: an `AutoencoderFAE` after stage Ia, with its frozen encoder attached.
        latent_noise: standard deviation of the noise on normalised latents, `noise_sigma` of the flow.

    Raises:
        ValueError: `latent_noise` is out of range.
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
        terms = compare_features(self.model, latents, features)
        return {"loss": terms["feature_mse"], **terms}


class PixelObjective(ReconstructionObjective):
    """Stages Ib and II: the pixel decoder, on noisy original features or on features decoded from latents.

    Args:
        model: an `AutoencoderFAE` with its frozen encoder attached; stage II requires a trained stage Ia.
        stage: `"Ib"`: features + `noise_sigma` * eps, in the standardised scale (section 4.2); `"II"`: features
            decoded from a sample of the posterior.
        noise_sigma: fixed noise level of stage Ib (0.4 for DINOv2).
        latent_noise: stage II: noise on normalised latents, for a generator with noisy samples (STARFlow).
        perceptual_weight: of TiTok's recipe.
        losses: as in `ReconstructionObjective`.

    Raises:
        ValueError: another choice, numbers out of range, or `latent_noise` in stage Ib.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Literal["Ib", "II"] = "Ib",
        noise_sigma: float = 0.4,
        latent_noise: float = 0.0,
        perceptual_weight: float = 1.1,
        **losses,
    ):
        if stage not in ("Ib", "II"):
            raise ValueError(f"stage must be 'Ib' or 'II', got {stage!r}")
        check_not_negative(latent_noise=latent_noise)
        if latent_noise and stage == "Ib":
            raise ValueError(f"latent_noise must be 0 in stage Ib, which decodes no latents, got {latent_noise}")
        super().__init__(model, ["pixel_decoder"], perceptual_weight=perceptual_weight, **losses)
        self.stage, self.noise_sigma, self.latent_noise = stage, noise_sigma, latent_noise

    @property
    def last_layer_weight(self) -> nn.Parameter:
        return self.model.pixel_decoder.proj_out.weight

    @torch.no_grad()
    def decoder_input(self, features: torch.Tensor, grid: tuple[int, int], random: ImageRandom) -> torch.Tensor:
        """The standardised features (B, N, C) that the pixel decoder is trained on."""
        if self.stage == "Ib":
            standard = self.model.standardize_features(features)
            return standard + self.noise_sigma * random.normal(*standard.shape).to(standard.dtype)
        posterior = self.model.encode_features(features, grid).latent_dist
        latents = add_noise(sample_posterior(posterior, random), self.latent_noise, random)
        return self.model.decode_standardized(latents)

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        features, grid = frozen_features(self.model, batch)
        return Reconstruction(self.model.pixel_decoder(self.decoder_input(features, grid, random), grid))
