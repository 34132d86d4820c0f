"""diffusers' AutoencoderKL: a VAE of pixels, or VA-VAE, whose latents follow a frozen encoder (arXiv 2501.01423)."""

import torch
from diffusers import AutoencoderKL
from torch import nn

from ..losses.alignment import LatentAlignment
from ..losses.gan import adaptive_weight
from ..utils.randomness import ImageRandom
from .base import check_not_negative, sample_posterior
from .fae import kl_divergence
from .reconstruction import Reconstruction, ReconstructionObjective


__all__ = ["VAEObjective"]


class VAEObjective(ReconstructionObjective):
    """Reconstruction from a sample of the posterior, KL divergence and, for VA-VAE, alignment.

    Args:
        model: the VAE.
        kl_weight: of the KL divergence, the mean over the latents. Codes with sums, as VA-VAE's, have the same balance
            with their weight times the numbers of an image's latents over those of its pixels: 1e-6 is 4e-8 for 32
            channels at 1/16 of the sides.
        alignment: the alignment of latents, None for none; its projection is trained with the VAE.
        alignment_weight: VA-VAE's hyper-parameter (0.5, later 0.1). It multiplies the norm of the gradient of the
            reconstruction loss, relative to that of the alignment, in the weight of the encoder's last convolution.
        losses: as in `ReconstructionObjective`.

    Raises:
        ValueError: a negative weight, or as `ReconstructionObjective`.
    """

    def __init__(
        self,
        model: AutoencoderKL,
        kl_weight: float = 1e-4,
        alignment: LatentAlignment | None = None,
        alignment_weight: float = 0.1,
        **losses,
    ):
        check_not_negative(kl_weight=kl_weight, alignment_weight=alignment_weight)
        parts = ("encoder", "quant_conv", "post_quant_conv", "decoder")
        super().__init__(model, [part for part in parts if getattr(model, part) is not None], **losses)
        self.kl_weight, self.alignment, self.alignment_weight = kl_weight, alignment, alignment_weight

    @property
    def last_layer_weight(self) -> nn.Parameter:
        return self.model.decoder.conv_out.weight

    def parameter_groups(self) -> list[dict]:
        groups = super().parameter_groups()
        if self.alignment is not None:
            groups.append({"params": list(self.alignment.projection.parameters()), "name": "alignment"})
        return groups

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        posterior = self.model.encode(batch["pixel_values"]).latent_dist
        latents = sample_posterior(posterior, random)
        terms = {"kl": (self.kl_weight, kl_divergence(posterior.mean, posterior.logvar))}
        if self.alignment is not None:
            terms["alignment"] = (self.weigh_alignment, self.alignment(latents, batch["pixel_values"]))
        return Reconstruction(self.model.decode(latents).sample, terms=terms)

    def weigh_alignment(self, reconstruction_loss: torch.Tensor, alignment: torch.Tensor) -> torch.Tensor:
        """The weight of the alignment, by the gradients in the encoder's last convolution; VA-VAE's eps and clamp."""
        weight = self.model.encoder.conv_out.weight
        return self.alignment_weight * adaptive_weight(reconstruction_loss, alignment, weight, eps=1e-4, largest=1e8)
