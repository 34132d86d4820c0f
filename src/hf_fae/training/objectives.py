"""What is minimised: FAE's stages (arXiv 2512.07829, sections 4.1 and 4.2) and flow matching on a tokenizer's latents.

All randomness is drawn from the `ImageRandom` that comes with a batch, so that an image has the same noise on any
number of processes.
"""

from typing import Literal

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.nn import functional as F

from ..evaluation.reconstruction import feature_cosine
from ..latents import normalized_posterior
from .adversarial import AdversarialLoss
from .randomness import ImageRandom


__all__ = [
    "FeatureObjective",
    "FlowMatchingObjective",
    "Objective",
    "PixelObjective",
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


def shift_time(t: torch.Tensor, shift: float) -> torch.Tensor:
    """t' = t / (s + (1 - s) t) for noise times t and the papers' s <= 1: more noise the smaller s (section 5.3).

    The same as diffusers' `shift` = 1 / s.
    """
    return t / (shift + (1 - shift) * t)


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
            if parameters and not any(p.requires_grad for p in parameters):
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
        features, grid = self.model.extract_features(batch["pixel_values"])
        posterior = self.model.encode_features(features, grid).latent_dist
        reconstruction = self.model.decode_standardized(sample_posterior(posterior, random)).float()
        target = self.model.standardize_features(features)
        mse = F.mse_loss(reconstruction, target.float())
        kl = kl_divergence(posterior.mean, posterior.logvar)
        with torch.no_grad():
            raw = reconstruction * self.model.features_std + self.model.features_mean
            cosine = feature_cosine(raw, features)
        return {"loss": mse + self.kl_weight * kl, "feature_mse": mse, "kl": kl, "feature_cosine": cosine}


class PixelObjective(Objective):
    """Stages Ib and II: the pixel decoder, on noisy original features or on those that the tokenizer gives back.

    The reconstruction term is on the [0, 1] scale of pixels, as in the TiTok recipe that the paper follows.

    Args:
        model: an `AutoencoderFAE` with its frozen encoder attached; stage II needs its stage Ia trained.
        stage: `"Ib"`: features + `noise_sigma` * eps, in the standardised scale (section 4.2); `"II"`: features
            decoded from a sample of the posterior.
        noise_sigma: fixed noise level of stage Ib (0.4 for DINOv2).
        reconstruction_loss: `"l2"` or `"l1"`.
        perceptual: a distance of images, with `perceptual_weight`; None for none.
        adversarial: the game with a discriminator, which is trained as well, at `discriminator_learning_rate` (by
            default the run's); None for none.
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
    ):
        if stage not in ("Ib", "II"):
            raise ValueError(f"stage must be 'Ib' or 'II', got {stage!r}")
        if reconstruction_loss not in ("l2", "l1"):
            raise ValueError(f"reconstruction_loss must be 'l2' or 'l1', got {reconstruction_loss!r}")
        super().__init__(model, [model.pixel_decoder])
        self.stage, self.noise_sigma = stage, noise_sigma
        self.pixel_distance = F.mse_loss if reconstruction_loss == "l2" else F.l1_loss
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.adversarial, self.discriminator_learning_rate = adversarial, discriminator_learning_rate

    def parameter_groups(self) -> list[dict]:
        groups = [{"params": list(self.model.pixel_decoder.parameters())}]
        if self.adversarial is not None:
            params = [p for p in self.adversarial.parameters() if p.requires_grad]
            groups.append(
                {"params": params, "learning_rate": self.discriminator_learning_rate, "name": "discriminator"}
            )
        return groups

    def before_step(self, step: int) -> None:
        if self.adversarial is not None:
            self.adversarial.before_step(step)

    @torch.no_grad()
    def decoder_input(self, features: torch.Tensor, grid: tuple[int, int], random: ImageRandom) -> torch.Tensor:
        """What the pixel decoder is trained on: standardised features (B, N, C)."""
        if self.stage == "Ib":
            standard = self.model.standardize_features(features)
            return standard + self.noise_sigma * random.normal(*standard.shape).to(standard.dtype)
        posterior = self.model.encode_features(features, grid).latent_dist
        return self.model.decode_standardized(sample_posterior(posterior, random))

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        images = batch["pixel_values"]
        features, grid = self.model.extract_features(images)
        decoded = self.model.pixel_decoder(self.decoder_input(features, grid, random), grid).float()
        reconstruction = self.pixel_distance(decoded / 2, images.float() / 2)
        losses = {"loss": reconstruction, "reconstruction": reconstruction}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(decoded, images)
            losses["loss"] = reconstruction + self.perceptual_weight * losses["perceptual"]
        if self.adversarial is not None:
            last_layer = self.model.pixel_decoder.proj_out.weight
            game = self.adversarial(decoded, images, losses["loss"], last_layer, random)
            losses["loss"] = losses["loss"] + game.pop("loss")
            losses |= {f"adversarial/{name}": value for name, value in game.items()}
        return losses


class FlowMatchingObjective(Objective):
    """Flow matching of a class-conditional denoiser on a frozen tokenizer's latents (section 5).

    x_t = (1 - t) x + t eps, target eps - x, plain MSE; t is uniform, then shifted by `shift_time`; x is a sample of
    the posterior, normalised. A batch has images ("pixel_values"), or the posterior moments (B, 2C, h, w) of a latent
    cache ("moments"); then the tokenizer needs no encoder. The loss is logged by noise time as well.

    Args:
        model: `model(x_t, 1000 t, class_labels) -> .sample`, with `config.num_classes`, the null class.
        vae: the tokenizer.
        shift: s <= 1 of the time shift; 1 for none (paper: 0.4).
        label_dropout: share of labels that become the null class while training; none do in eval mode.
    """

    time_bins = 10

    def __init__(self, model: nn.Module, vae: nn.Module, shift: float = 1.0, label_dropout: float = 0.1):
        if not 0 < shift <= 1:
            raise ValueError(f"shift must be in (0, 1], the papers' s and not diffusers' 1 / s, got {shift}")
        super().__init__(model, [model])
        self.vae = vae.requires_grad_(False)
        self.shift, self.label_dropout = shift, label_dropout

    @torch.no_grad()
    def latents(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> torch.Tensor:
        """A sample (B, C, h, w) of the posterior of each image, normalised, in fp32."""
        if "moments" in batch:
            posterior = normalized_posterior(batch["moments"], self.vae.latents_mean, self.vae.latents_std)
        else:
            posterior = self.vae.encode_features(*self.vae.extract_features(batch["pixel_values"])).latent_dist
        return sample_posterior(posterior, random).float()

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        latents = self.latents(batch, random)
        t = shift_time(random.uniform(len(latents)), self.shift)
        noise = random.normal(*latents.shape)
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        labels = batch["class_labels"]
        if self.training:
            dropped = random.uniform(len(labels)) < self.label_dropout
            labels = labels.masked_fill(dropped, self.model.config.num_classes)
        velocity = self.model(noisy, 1000 * t, labels).sample
        losses = (velocity.float() - (noise - latents)).square().mean(dim=(1, 2, 3))
        return {"loss": losses.mean(), **self._by_time(losses.detach(), t)}

    def _by_time(self, losses: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sum and count of the losses in each interval of noise times."""
        bins = F.one_hot((t * self.time_bins).long().clamp_max(self.time_bins - 1), self.time_bins).to(losses.dtype)
        finite = torch.isfinite(losses)  # one image's NaN must not reach the other bins
        bins = bins * finite[:, None]
        table = torch.stack([torch.where(finite, losses, 0.0) @ bins, bins.sum(0)], dim=1)
        return {f"loss_t/{i / self.time_bins:.1f}": pair for i, pair in enumerate(table.unbind())}
