"""What is minimised: FAE's stages (arXiv 2512.07829, sections 4.1 and 4.2), DRoRAE's phases (arXiv 2605.10780), and
generators on a tokenizer's latents.

All randomness is drawn from the `ImageRandom` that comes with a batch, so that an image has the same noise on any
number of processes.
"""

import math
from typing import Literal

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.nn import functional as F

from ..evaluation.reconstruction import feature_cosine
from ..latents import LatentAutoencoderMixin, encode_images, latent_statistics, normalized_posterior
from .adversarial import AdversarialLoss
from .randomness import ImageRandom


__all__ = [
    "DRoRAEObjective",
    "FeatureObjective",
    "FlowMatchingObjective",
    "GeneratorObjective",
    "NoisyLatentObjective",
    "Objective",
    "PixelObjective",
    "ReconstructionObjective",
    "STARFlowObjective",
    "add_decoder_noise",
    "add_noise",
    "dimension_shift",
    "frozen_features",
    "kl_divergence",
    "sample_posterior",
    "shift_time",
]


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)), the mean over all elements, in fp32."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def sample_posterior(posterior: DiagonalGaussianDistribution, random: ImageRandom) -> torch.Tensor:
    """A sample of the posterior of each image, with the images' own noise."""
    return posterior.mean + posterior.std * random.normal(*posterior.mean.shape).to(posterior.mean.dtype)


def add_noise(latents: torch.Tensor, sigma: float, random: ImageRandom) -> torch.Tensor:
    """Latents with Gaussian noise of standard deviation `sigma`, as a flow that was trained so draws them."""
    return latents + sigma * random.normal(*latents.shape).to(latents.dtype) if sigma else latents


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


def shift_time(t: torch.Tensor, shift: float) -> torch.Tensor:
    """t' = t / (s + (1 - s) t) for noise times t and the papers' s <= 1: more noise the smaller s (section 5.3).

    The same as diffusers' `shift` = 1 / s.
    """
    return t / (shift + (1 - shift) * t)


def dimension_shift(*shape: int) -> float:
    """The papers' s for latents of a shape (C, h, w): s = sqrt(4096 / (C h w)), 0.144 for RAE's 768 x 16 x 16.

    The more numbers, the more noise it takes to hide them (RAE, arXiv 2510.11690, section 4; a = 1 / s there). Never
    above 1, for fewer than 4096 numbers.
    """
    return min(1.0, math.sqrt(4096 / math.prod(shape)))


class Objective(nn.Module):
    """What the loop trains: `forward(batch, random)` returns a dict of tensors, "loss" and whatever is worth logging.

    Scalars are logged as their mean over steps and processes; a tensor of two numbers is a sum and a count, logged as
    their quotient over an interval.

    Args:
        model: what is trained; all of it is frozen but the named parts, and what is frozen stays in eval mode.
        trained: modules of `model` to train.
    """

    def __init__(self, model: nn.Module, trained: list[nn.Module]):
        super().__init__()
        self.model = model.requires_grad_(False)
        for part in trained:
            part.requires_grad_(True)

    @property
    def _no_split_modules(self) -> list[str]:
        """The blocks that FSDP2 shards one by one."""
        return getattr(self.model, "_no_split_modules", None) or []

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def parameter_groups(self) -> list[dict]:
        """Groups for the optimiser, each clipped by itself; the first one is what is averaged and saved.

        A group is a dict with "params", optionally "learning_rate" (by default the run's) and "name", under which its
        gradient norm is logged.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def before_step(self, step: int) -> None:
        """Called before every optimiser step with its number, from 0."""

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if module is not self and parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self


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


class ReconstructionObjective(Objective):
    """What trainings of decoders share: the distance of pixels, of perception, and the game with a discriminator.

    The distance of pixels is on their [0, 1] scale, as in the recipes of TiTok and RAE. A subclass says how images are
    reconstructed, by `reconstruct`, and by which layer in the end, `last_layer_weight`.

    Args:
        model: the tokenizer.
        trained: the name of its part to train.
        reconstruction_loss: `"l2"` or `"l1"`.
        perceptual: a distance of images, with `perceptual_weight`; None for none.
        adversarial: the game with a discriminator, which is trained as well, at `discriminator_learning_rate` (by
            default the run's); None for none.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: str,
        reconstruction_loss: Literal["l2", "l1"],
        perceptual: nn.Module | None,
        perceptual_weight: float,
        adversarial: AdversarialLoss | None,
        discriminator_learning_rate: float | None,
    ):
        if reconstruction_loss not in ("l2", "l1"):
            raise ValueError(f"reconstruction_loss must be 'l2' or 'l1', got {reconstruction_loss!r}")
        super().__init__(model, [getattr(model, trained)])
        self.trained = trained
        self.pixel_distance = F.mse_loss if reconstruction_loss == "l2" else F.l1_loss
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.adversarial, self.discriminator_learning_rate = adversarial, discriminator_learning_rate

    @property
    def last_layer_weight(self) -> nn.Parameter:
        """Of the layer that makes the images, for adaptive weights."""
        raise NotImplementedError

    def reconstruct(
        self, batch: dict[str, torch.Tensor], random: ImageRandom
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images (B, 3, H, W), about [-1, 1], with their graph; and others that the discriminator sees, if any."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict]:
        groups = [{"params": list(getattr(self.model, self.trained).parameters())}]
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
        decoded, shown = self.reconstruct(batch, random)
        decoded = decoded.float()
        reconstruction = self.pixel_distance(decoded / 2, images.float() / 2)
        losses = {"loss": reconstruction, "reconstruction": reconstruction}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(decoded, images)
            losses["loss"] = reconstruction + self.perceptual_weight * losses["perceptual"]
        if self.adversarial is not None:
            game = self.adversarial(decoded, images, losses["loss"], self.last_layer_weight, random, shown)
            losses["loss"] = losses["loss"] + game.pop("loss")
            losses |= {f"adversarial/{name}": value for name, value in game.items()}
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
            "pixel_decoder",
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

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> tuple[torch.Tensor, None]:
        features, grid = frozen_features(self.model, batch)
        return self.model.pixel_decoder(self.decoder_input(features, grid, random), grid), None


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
            trained,
            reconstruction_loss,
            perceptual,
            perceptual_weight,
            adversarial,
            discriminator_learning_rate,
        )
        self.decoder_noise = decoder_noise
        if adversarial is not None and adversarial.adaptive:
            # Adaptive weights are taken from its gradient. In phase 2 no optimiser has it, so that it stays as it is.
            self.last_layer_weight.requires_grad_(True)

    @property
    def last_layer_weight(self) -> nn.Parameter:
        return self.model.decoder.proj_out.weight

    def before_step(self, step: int) -> None:
        super().before_step(step)
        if self.trained == "fusion":
            self.last_layer_weight.grad = None  # which no optimiser clears

    def reconstruct(
        self, batch: dict[str, torch.Tensor], random: ImageRandom
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        features, _ = self.model.extract_features(batch["pixel_values"])
        with torch.set_grad_enabled(self.trained == "fusion" and torch.is_grad_enabled()):
            tokens = self.model.fuse(features)
        if not self.training or self.decoder_noise == 0:
            return self.model.decode_tokens(tokens), None
        decoded = self.model.decode_tokens(add_decoder_noise(tokens, self.decoder_noise, random))
        shown = None
        if self.adversarial is not None and self.adversarial.discriminator_learns:
            with torch.no_grad():
                shown = self.model.decode_tokens(tokens)
        return decoded, shown


class GeneratorObjective(Objective):
    """What generators of latents share: a frozen tokenizer, and labels of which some are dropped.

    A batch has images ("pixel_values"), or the posterior moments (B, 2C, h, w) of a latent cache ("moments"); then the
    tokenizer needs no encoder. Labels are "class_labels".

    Args:
        model: a class-conditional generator with `config.num_classes`, the null class.
        vae: the tokenizer, or diffusers' `AutoencoderKL`.
        label_dropout: share of labels that become the null class while training; none do in eval mode.
    """

    def __init__(self, model: nn.Module, vae: nn.Module, label_dropout: float = 0.1):
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must be from 0 to 1, got {label_dropout}")
        super().__init__(model, [model])
        self.vae = vae.requires_grad_(False)
        self.label_dropout = label_dropout

    @torch.no_grad()
    def latents(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> torch.Tensor:
        """A sample (B, C, h, w) of the posterior of each image, normalised, in fp32."""
        if "moments" in batch:
            posterior = normalized_posterior(batch["moments"], *latent_statistics(self.vae))
        elif isinstance(self.vae, LatentAutoencoderMixin):  # `encode` would wait for the device to look for NaN
            posterior = self.vae.posterior(batch["pixel_values"])
        else:
            posterior = encode_images(self.vae, batch["pixel_values"])
        return sample_posterior(posterior, random).float()

    def labels(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> torch.Tensor:
        """Class labels (B,), some of them dropped while training."""
        labels = batch["class_labels"]
        if not self.training:
            return labels
        return labels.masked_fill(random.uniform(len(labels)) < self.label_dropout, self.model.config.num_classes)


class FlowMatchingObjective(GeneratorObjective):
    """Flow matching of a class-conditional denoiser on a frozen tokenizer's latents (FAE, section 5).

    x_t = (1 - t) x + t eps, target eps - x, plain MSE; t is uniform, then shifted by `shift_time`; x is a sample of
    the posterior, normalised. The loss is logged by noise time as well.

    Args:
        model: `model(x_t, 1000 t, class_labels) -> .sample`, with `config.num_classes`, the null class.
        vae, label_dropout: as `GeneratorObjective`.
        shift: s <= 1 of the time shift; 1 for none (paper: 0.4).
    """

    time_bins = 10

    def __init__(self, model: nn.Module, vae: nn.Module, shift: float = 1.0, label_dropout: float = 0.1):
        if not 0 < shift <= 1:
            raise ValueError(f"shift must be in (0, 1], the papers' s and not diffusers' 1 / s, got {shift}")
        super().__init__(model, vae, label_dropout)
        self.shift = shift

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        latents = self.latents(batch, random)
        t = shift_time(random.uniform(len(latents)), self.shift)
        noise = random.normal(*latents.shape)
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        velocity = self.model(noisy, 1000 * t, self.labels(batch, random)).sample
        losses = (velocity.float() - (noise - latents)).square().mean(dim=(1, 2, 3))
        return {"loss": losses.mean(), **self._by_time(losses.detach(), t)}

    def _by_time(self, losses: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sum and count of the losses in each interval of noise times."""
        bins = F.one_hot((t * self.time_bins).long().clamp_max(self.time_bins - 1), self.time_bins).to(losses.dtype)
        finite = torch.isfinite(losses)  # one image's NaN must not reach the other bins
        bins = bins * finite[:, None]
        table = torch.stack([torch.where(finite, losses, 0.0) @ bins, bins.sum(0)], dim=1)
        return {f"loss_t/{i / self.time_bins:.1f}": pair for i, pair in enumerate(table.unbind())}


class STARFlowObjective(GeneratorObjective):
    """Maximum likelihood of a flow on noisy latents (STARFlow, arXiv 2506.06276, section 3).

    The loss is the mean over elements of -log p(x + noise_sigma * eps), without the prior's constant, plus
    `latent_norm_weight` times the mean square of what each block reads, summed over blocks. "bits_per_dim" is the
    negative log-likelihood of the noisy, normalised latents with its constant, in bits for each of their elements.

    Args:
        model: `STARFlowTransformer2DModel` with classes; its `config.noise_sigma` is the noise.
        vae, label_dropout: as `GeneratorObjective`.
        latent_norm_weight: 1e-4 in the paper's code.
    """

    def __init__(self, model: nn.Module, vae: nn.Module, latent_norm_weight: float = 1e-4, label_dropout: float = 0.1):
        if not 0 <= latent_norm_weight < math.inf:
            raise ValueError(f"latent_norm_weight must be finite and not negative, got {latent_norm_weight}")
        super().__init__(model, vae, label_dropout)
        self.latent_norm_weight = latent_norm_weight

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        latents = self.latents(batch, random)
        noisy = add_noise(latents, self.model.config.noise_sigma, random)
        output = self.model(noisy, self.labels(batch, random), output_block_inputs=True)
        nats_per_dim = -output.log_prob().mean() / latents[0].numel()
        latent_norm = torch.stack([tokens.square().mean() for tokens in output.block_inputs]).sum()
        nll = nats_per_dim - 0.5 * math.log(2 * math.pi)
        return {
            "loss": nll + self.latent_norm_weight * latent_norm,
            "bits_per_dim": nats_per_dim.detach() / math.log(2),
            "latent_norm": latent_norm.detach(),
        }
