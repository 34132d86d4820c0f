"""MAETok's objective (arXiv 2502.03444): images and auxiliary targets from masked images; then the decoder alone.

    loss = reconstruction + sum over targets of weight * target loss on masked patches (eq. 8)

Stage 1 trains encoder, pixel decoder and auxiliary decoders while patches are masked. Stage 2 trains the pixel decoder
alone, while the mask ratio falls to 0.
"""

import math
from typing import Literal

import torch
from torch import nn

from ..utils.randomness import ImageRandom
from .masking import count_visible, truncated_normal_mask_ratio
from .reconstruction import Reconstruction, ReconstructionObjective
from .stages import check_stage


__all__ = ["MAETokObjective", "falling_mask_ratio", "select_patch_mask"]


def falling_mask_ratio(step: int, start: float, num_steps: int) -> float:
    """The mask ratio at a step of stage 2: it falls linearly from `start` to 0 at step `num_steps`."""
    return start * max(0.0, 1 - step / num_steps)


def select_patch_mask(scores: torch.Tensor, mask_ratio: float | torch.Tensor) -> torch.Tensor:
    """Masks (B, N), True for all but the ceil(N (1 - mask_ratio)) patches with the lowest scores.

    Args:
        scores: (B, N) uniform numbers.
        mask_ratio: one for all images, or one for each (B,).

    Raises:
        ValueError: `mask_ratio` is a number outside [0, 1).
    """
    ranks, num_patches = scores.argsort(dim=1).argsort(dim=1), scores.shape[1]
    if isinstance(mask_ratio, torch.Tensor):
        return ranks >= torch.ceil(num_patches * (1 - mask_ratio.double()) - 1e-6)[..., None]
    return ranks >= count_visible(num_patches, mask_ratio)


class MAETokObjective(ReconstructionObjective):
    """Reconstruction of masked images and of auxiliary targets; then the pixel decoder alone.

    The pixel distance is on the [-1, 1] scale and covers whole images; the losses of auxiliary targets cover masked
    patches. In eval mode nothing is masked.

    Args:
        model: an `AutoencoderMAETok` with an auxiliary decoder for each target; in stage 2 with none.
        stage: 1, or 2: the encoder stays unchanged, and the mask ratio falls.
        min_mask_ratio, max_mask_ratio, mask_std: of the mask ratio in stage 1, `truncated_normal_mask_ratio` with its
            centre at the maximum; 0, 0 for no masks.
        mask_scope: one ratio per `"batch"` of a process, or per `"image"`.
        mask_steps: stage 2: steps after which no patch is masked, see `falling_mask_ratio`.
        targets: modules of `maetok_targets`, by name.
        target_weights: of their losses, by name; None for 1 each.
        masked_targets: whether they cover masked patches alone.
        losses: as in `ReconstructionObjective`.

    Raises:
        ValueError: another choice, numbers out of range, or auxiliary decoders that do not fit the targets.
    """

    pixel_scale = 1.0

    def __init__(
        self,
        model: nn.Module,
        stage: Literal[1, 2] = 1,
        *,
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
        check_stage(stage)
        if stage == 2:  # which does not use it
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
        self.min_mask_ratio, self.max_mask_ratio, self.mask_std = min_mask_ratio, max_mask_ratio, mask_std
        self.targets, self.masked_targets = targets, masked_targets
        self.target_weights = dict.fromkeys(targets, 1.0) if target_weights is None else target_weights
        self.before_step(0)

    @property
    def last_layer_weight(self) -> nn.Parameter:
        return self.model.decoder.proj_out.weight

    def before_step(self, step: int) -> None:
        super().before_step(step)
        self.falling_ratio = falling_mask_ratio(step, self.max_mask_ratio, self.mask_steps)

    @torch.compiler.disable
    def sample_mask(self, count: int, random: ImageRandom) -> torch.Tensor:
        """The masked patches (B, N) of `count` images, bool."""
        scores = random.uniform(count, math.prod(self.model.grid))
        if self.stage == 2:
            return select_patch_mask(scores, self.falling_ratio)
        per_image = self.mask_scope == "image"
        uniform = random.uniform(count) if per_image else torch.tensor(random.shared_uniform())
        ratio = truncated_normal_mask_ratio(
            uniform, self.min_mask_ratio, self.max_mask_ratio, center=self.max_mask_ratio, std=self.mask_std
        )
        return select_patch_mask(scores, ratio if per_image else ratio.item())

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        images = batch["pixel_values"]
        mask = self.sample_mask(len(images), random) if self.training else None
        if not self.targets:
            return Reconstruction(self.model(images, mask).sample)
        output = self.model(images, mask, predict_targets=True)
        target_mask = mask if self.masked_targets else None
        terms = {}
        for name, target in self.targets.items():
            loss = target(output.predictions[name], batch, self.model.grid, target_mask)
            terms[f"auxiliary/{name}"] = (self.target_weights[name], loss)
        return Reconstruction(output.sample, terms=terms)
