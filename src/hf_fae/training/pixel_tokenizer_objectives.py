"""What tokenizers minimise that encode pixels themselves: l-DeTok (arXiv 2507.15856) and MAETok (arXiv 2502.03444).

Both learn in two stages. In the first one everything learns while patches are hidden; in the second one the decoder
alone, on the latents of the frozen encoder.
"""

import math
from typing import Literal

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from .masking import (
    detok_mask_ratio,
    draw_patch_mask,
    draw_visible_patches,
    falling_mask_ratio,
    truncated_normal_mask_ratio,
)
from .randomness import ImageRandom
from .tokenizer_objectives import Reconstruction, ReconstructionObjective


__all__ = ["DeTokObjective", "MAETokObjective"]


class DeTokObjective(ReconstructionObjective):
    """l-DeTok: images from noisy latents of some of their patches, and KL; then the decoder alone.

    In training the latents are samples of the posterior, in both stages. In eval mode they are its modes, and nothing
    is hidden or noisy.

    Args:
        model: an `AutoencoderDeTok`, whose config has the noise.
        stage: 1, or 2: encoder and mask token stay as they are, nothing is hidden and there is no noise.
        max_mask_ratio: M of `detok_mask_ratio`. One ratio is drawn for each batch of a process.
        kl_weight: of the KL divergence, which is a sum over the latents of the visible patches and a mean over images.
        losses: as `ReconstructionObjective`.

    Raises:
        ValueError: another stage, or numbers out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Literal[1, 2] = 1,
        max_mask_ratio: float = 0.7,
        kl_weight: float = 1e-6,
        **losses,
    ):
        _check_stage(stage)
        if not 0 <= max_mask_ratio < 1:
            raise ValueError(f"max_mask_ratio must be in [0, 1), got {max_mask_ratio}")
        if not 0 <= kl_weight < math.inf:
            raise ValueError(f"kl_weight must be finite and not negative, got {kl_weight}")
        super().__init__(model, ["encoder", "decoder"] if stage == 1 else ["decoder"], **losses)
        self.stage, self.max_mask_ratio, self.kl_weight = stage, max_mask_ratio, kl_weight
        if stage == 2:  # which has no place for it
            model.decoder.mask_token.requires_grad_(False)

    @property
    def last_layer_weight(self) -> nn.Parameter:
        return self.model.decoder.conv_out.weight

    @torch.compiler.disable
    def draw_patches(self, count: int, random: ImageRandom) -> torch.Tensor:
        """Numbers (B, K) of the visible patches of `count` images; all of them, if none is hidden.

        So that the mask token has a gradient in every step, if only of 0: other processes may have hidden some.
        """
        ratio = detok_mask_ratio(torch.tensor(random.shared_uniform()), self.max_mask_ratio).item()
        return draw_visible_patches(random.uniform(count, math.prod(self.model.grid)), ratio)

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        images, model = batch["pixel_values"], self.model
        if not self.training:
            return Reconstruction(model(images).sample)
        shape = (len(images), model.config.latent_channels, *model.grid)
        if self.stage == 2:
            return Reconstruction(model(images, posterior_noise=random.normal(*shape)).sample)
        output = model(
            images,
            self.draw_patches(len(images), random),
            posterior_noise=random.normal(*shape),
            latent_noise=random.normal(*shape),
            noise_level=random.uniform(len(images)),
        )
        kl = DiagonalGaussianDistribution(output.moments.float()).kl().mean()
        return Reconstruction(output.sample, terms={"kl": (self.kl_weight, kl)})


class MAETokObjective(ReconstructionObjective):
    """MAETok: images, and what auxiliary decoders tell of them, from masked images; then the pixel decoder alone.

    The distance of pixels is on their [-1, 1] scale and covers whole images; the losses of auxiliary targets (eq. 8)
    are those of masked patches. In eval mode nothing is masked.

    Args:
        model: an `AutoencoderMAETok` with an auxiliary decoder for each target; in stage 2 with none.
        stage: 1, or 2: the encoder stays as it is, and the share of masked patches falls.
        min_mask_ratio, max_mask_ratio, mask_std: law of the share in stage 1, `truncated_normal_mask_ratio` with its
            centre at the maximum; 0, 0 for no masks.
        mask_scope: a share for each `"batch"` of a process, or for each `"image"`.
        mask_steps: stage 2: steps after which no patch is masked, see `falling_mask_ratio`.
        targets: modules of `auxiliary`, by name.
        target_weights: of their losses, by name; None for 1 each.
        masked_targets: whether these are of masked patches alone.
        losses: as `ReconstructionObjective`.

    Raises:
        ValueError: another choice, numbers out of range, or decoders that do not fit the targets.
    """

    pixel_scale = 1.0

    def __init__(
        self,
        model: nn.Module,
        stage: Literal[1, 2] = 1,
        min_mask_ratio: float = 0.4,
        max_mask_ratio: float = 0.6,
        mask_std: float = 0.25,
        mask_scope: Literal["batch", "image"] = "batch",
        mask_steps: int = 50_000,
        targets: nn.ModuleDict | None = None,
        target_weights: dict[str, float] | None = None,
        masked_targets: bool = True,
        **losses,
    ):
        _check_stage(stage)
        if stage == 2:  # which has no use for it
            min_mask_ratio = 0.0
        if not 0 <= min_mask_ratio <= max_mask_ratio < 1:
            raise ValueError(
                f"min_mask_ratio and max_mask_ratio must rise within [0, 1), got {min_mask_ratio} and {max_mask_ratio}"
            )
        if not 0 < mask_std < math.inf:
            raise ValueError(f"mask_std must be positive and finite, got {mask_std}")
        if mask_scope not in ("batch", "image"):
            raise ValueError(f"mask_scope must be 'batch' or 'image', got {mask_scope!r}")
        if mask_steps < 1:
            raise ValueError(f"mask_steps must be at least 1, got {mask_steps}")
        targets = nn.ModuleDict() if targets is None else targets
        if targets and stage == 2:
            raise ValueError(f"targets must be none in stage 2, got {sorted(targets)}")
        if targets.keys() != model.auxiliary_decoders.keys():
            raise ValueError(
                f"targets must be those of the auxiliary decoders, {sorted(model.auxiliary_decoders)}, "
                f"got {sorted(targets)}"
            )
        if targets and masked_targets and max_mask_ratio == 0:
            raise ValueError("masked_targets must be False where max_mask_ratio is 0, got True")
        parts = ["encoder", "decoder", "auxiliary_decoders"] if stage == 1 else ["decoder"]
        super().__init__(model, parts, **losses)
        self.stage, self.mask_scope, self.mask_steps = stage, mask_scope, mask_steps
        self.mask_law = (min_mask_ratio, max_mask_ratio, max_mask_ratio, mask_std)
        self.targets, self.masked_targets = targets, masked_targets
        self.target_weights = dict.fromkeys(targets, 1.0) if target_weights is None else target_weights
        self.before_step(0)

    @property
    def last_layer_weight(self) -> nn.Parameter:
        return self.model.decoder.proj_out.weight

    def before_step(self, step: int) -> None:
        super().before_step(step)
        self.falling_ratio = falling_mask_ratio(step, self.mask_law[1], self.mask_steps)

    @torch.compiler.disable
    def draw_mask(self, count: int, random: ImageRandom) -> torch.Tensor:
        """The masked patches (B, N) of `count` images, bool."""
        scores = random.uniform(count, math.prod(self.model.grid))
        if self.stage == 2:
            return draw_patch_mask(scores, self.falling_ratio)
        if self.mask_scope == "image":
            return draw_patch_mask(scores, truncated_normal_mask_ratio(random.uniform(count), *self.mask_law))
        ratio = truncated_normal_mask_ratio(torch.tensor(random.shared_uniform()), *self.mask_law)
        return draw_patch_mask(scores, ratio.item())

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        images = batch["pixel_values"]
        mask = self.draw_mask(len(images), random) if self.training else None
        if not self.targets:
            return Reconstruction(self.model(images, mask).sample)
        output = self.model(images, mask, predict_targets=True)
        where = mask if self.masked_targets else None
        terms = {}
        for name, target in self.targets.items():
            loss = target(output.predictions[name], batch, self.model.grid, where)
            terms[f"auxiliary/{name}"] = (self.target_weights[name], loss)
        return Reconstruction(output.sample, terms=terms)


def _check_stage(stage):
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 or 2, got {stage!r}")
