"""STARFlow's objective (arXiv 2506.06276, section 3): maximum likelihood of a flow on noisy latents."""

import math

import torch
from torch import nn

from ..utils.randomness import ImageRandom
from .base import add_noise
from .generator import GeneratorObjective


__all__ = ["STARFlowObjective"]


class STARFlowObjective(GeneratorObjective):
    """Maximum likelihood of a flow on noisy latents (STARFlow, arXiv 2506.06276, section 3).

    The loss is the mean over elements of -log p(x + noise_sigma * eps), without the prior's constant, plus
    `latent_norm_weight` times the mean square of what each block reads, summed over blocks. "bits_per_dim" is the
    negative log-likelihood of the noisy, normalised latents with its constant, in bits for each of their elements.

    Args:
        model: `STARFlowTransformer2DModel`; its `config.noise_sigma` is the noise.
        vae, label_dropout, condition: as `GeneratorObjective`.
        latent_norm_weight: 1e-4 in the paper's code.
    """

    def __init__(
        self,
        model: nn.Module,
        vae: nn.Module,
        latent_norm_weight: float = 1e-4,
        label_dropout: float = 0.1,
        condition: nn.Module | None = None,
    ):
        if not 0 <= latent_norm_weight < math.inf:
            raise ValueError(f"latent_norm_weight must be finite and not negative, got {latent_norm_weight}")
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
