"""STARFlow's objective (arXiv 2506.06276, section 3): maximum likelihood of a normalizing flow on noisy latents.

loss = -log p(x + noise_sigma eps) / dim + latent_norm_weight * sum over blocks of mean |block input|^2
"""

import math

import torch
from torch import nn

from ..utils.randomness import ImageRandom
from .base import add_noise, check_not_negative
from .generator import GeneratorObjective


__all__ = ["STARFlowObjective"]


class STARFlowObjective(GeneratorObjective):
    """Negative log-likelihood of noisy latents, a mean over their elements.

    The loss leaves out the prior's constant. "bits_per_dim" is the negative log-likelihood of the noisy, normalised
    latents with this constant, in bits per element.

    Args:
        model: `STARFlowTransformer2DModel`; its `config.noise_sigma` is the noise.
        vae, label_dropout, condition: as in `GeneratorObjective`.
        latent_norm_weight: of the mean square of the block inputs, 1e-4 in the paper's code.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        vae: nn.Module,
        latent_norm_weight: float = 1e-4,
        label_dropout: float = 0.1,
        condition: nn.Module | None = None,
    ):
        check_not_negative(latent_norm_weight=latent_norm_weight)
        super().__init__(model, vae, label_dropout, condition)
        self.latent_norm_weight = latent_norm_weight

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        latents = self.latents(batch, random)
        noisy = add_noise(latents, self.model.config.noise_sigma, random)
        output = self.model(noisy, **self.conditioning(batch, random), output_block_inputs=True)
        nats_per_dim = -output.log_prob().mean() / latents[0].numel()
        latent_norm = torch.stack([tokens.square().mean() for tokens in output.block_inputs]).sum()
        nll = nats_per_dim - 0.5 * math.log(2 * math.pi)
        return {
            "loss": nll + self.latent_norm_weight * latent_norm,
            "bits_per_dim": nats_per_dim.detach() / math.log(2),
            "latent_norm": latent_norm.detach(),
        }
