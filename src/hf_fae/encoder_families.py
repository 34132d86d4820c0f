"""The vision models of transformers and timm that `VisionEncoder` runs: what differs between them, as a table."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput


__all__ = ["FAMILIES", "Family", "configure", "find_family", "timm_norm"]


def _run(model, pixels, grid, output_hidden_states, **kwargs) -> BaseModelOutput:
    return model(pixels, output_hidden_states=output_hidden_states, **kwargs)


def _run_interpolated(*args, **kwargs) -> BaseModelOutput:
    return _run(*args, interpolate_pos_encoding=True, **kwargs)


def _run_clip(model, *args) -> BaseModelOutput:
    outputs = _run_interpolated(model, *args)
    # CLIP itself applies its final norm to the class token alone.
    outputs.last_hidden_state = model.post_layernorm(outputs.last_hidden_state)
    return outputs


def _run_mae(model, pixels, grid, output_hidden_states) -> BaseModelOutput:
    # MAE sorts its tokens by this noise, even where it masks none: increasing noise keeps their order.
    noise = torch.arange(grid[0] * grid[1], device=pixels.device).expand(len(pixels), -1)
    return _run_interpolated(model, pixels, grid, output_hidden_states, noise=noise)


def _run_naflex(model, pixels, grid, output_hidden_states) -> BaseModelOutput:
    (h, w), p = grid, model.config.patch_size
    patches = pixels[..., : h * p, : w * p].unflatten(3, (w, p)).unflatten(2, (h, p))  # (B, 3, h, p, w, p)
    patches = patches.permute((0, 2, 4, 3, 5, 1)).flatten(3).flatten(1, 2)  # (B, h * w, p * p * 3)
    shapes = torch.tensor([grid] * len(pixels))
    # All images have one size, so nothing is padded and no mask is needed.
    return _run(model, patches, grid, output_hidden_states, pixel_attention_mask=None, spatial_shapes=shapes)


def _run_timm(model, pixels, grid, output_hidden_states) -> BaseModelOutput:
    # timm's own intermediates leave out the embeddings: hooks record all states.
    vit, states, hooks = model.timm_model, [], []
    if output_hidden_states:
        hooks.append(vit.blocks[0].register_forward_pre_hook(lambda block, args: states.append(args[0])))
        hooks.extend(block.register_forward_hook(lambda block, args, out: states.append(out)) for block in vit.blocks)
    try:
        tokens = model(pixels, do_pooling=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    tokens = tokens if timm_norm(vit) is vit.norm else vit.fc_norm(tokens)
    return BaseModelOutput(last_hidden_state=tokens, hidden_states=tuple(states))


def timm_norm(vit: nn.Module) -> nn.Module:
    """The final norm, which models that average their tokens apply after averaging."""
    return vit.fc_norm if isinstance(vit.norm, nn.Identity) else vit.norm


def _timm_settings(config: PreTrainedConfig) -> dict[str, Any]:
    from timm.models import is_model_in_modules

    if not is_model_in_modules(config.architecture, ("vision_transformer", "deit", "eva")):
        raise ValueError(f"the timm architecture {config.architecture!r} is not a plain vision transformer")
    # No classifier is built: its thousand label names are left out.
    return {"model_args": {**(config.model_args or {}), "dynamic_img_size": True}, "num_labels": 0}


def _no_settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {}


def _mae_settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {"mask_ratio": 0.0}


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` are configured and called.

    Attributes:
        class_tokens: tokens before the patches, without registers, which the model's config counts.
        run: (model, pixels (B, 3, H, W), grid, output_hidden_states) -> tokens with their prefix.
        settings: changes of the model's config.
        model_kwargs: arguments of the model's constructor.
    """

    class_tokens: int = 0
    run: Callable[..., BaseModelOutput] = _run
    settings: Callable[[PreTrainedConfig], dict[str, Any]] = _no_settings
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def reads_patches(self) -> bool:
        """Whether the model reads flattened patches of any number (NaFlex) instead of images."""
        return self.run is _run_naflex


FAMILIES = {
    "dinov2": Family(class_tokens=1),
    "dinov2_with_registers": Family(class_tokens=1),
    "dinov3_vit": Family(class_tokens=1),
    "siglip": Family(run=_run_interpolated),
    "siglip2": Family(run=_run_naflex),
    "vit_mae": Family(class_tokens=1, run=_run_mae, settings=_mae_settings),
    "clip": Family(class_tokens=1, run=_run_clip),
    "vit": Family(class_tokens=1, run=_run_interpolated, model_kwargs={"add_pooling_layer": False}),
    "timm_wrapper": Family(run=_run_timm, settings=_timm_settings),
}


def find_family(model_type: str | None) -> Family:
    """The family of a `model_type` of transformers.

    Raises:
        ValueError: an unsupported one.
    """
    name = str(model_type).removesuffix("_vision_model")
    if name not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not a supported encoder: use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def configure(config: PreTrainedConfig) -> tuple[PreTrainedConfig, Family]:
    """The vision tower's config (an image-text model nests it) with its family's settings, and that family.

    Raises:
        ValueError: an unsupported model type, or an architecture of timm that is no plain vision transformer.
    """
    config = getattr(config, "vision_config", config)
    family = find_family(config.model_type)
    config.update(family.settings(config))
    return config, family
