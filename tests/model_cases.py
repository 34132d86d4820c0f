"""A tiny model of every class, with inputs: what the contract of models is tested on. A new class is one line."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from factories import (
    tiny_autoregressive,
    tiny_detok,
    tiny_dit,
    tiny_dit_dh,
    tiny_drorae,
    tiny_fae,
    tiny_identity_fae,
    tiny_lightning_dit,
    tiny_maetok,
    tiny_mar,
    tiny_mmdit,
    tiny_rae,
    tiny_raev2,
    tiny_raev2_dit,
    tiny_random_autoregressive,
    tiny_released_maetok,
    tiny_sit,
    tiny_starflow,
    tiny_text_raev2_dit,
    tiny_text_starflow,
)
from torch import nn

from hf_fae import TokenGuidance
from hf_fae.generators.diffusion_head import head_scheduler


__all__ = ["CASES", "ModelCase", "run"]


@dataclass(frozen=True)
class ModelCase:
    """A tiny model and inputs of its `forward` for a batch size; `lora` where it takes adapters."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict]
    lora: bool = True

    def uses(self, model) -> list[Callable[[], torch.Tensor]]:
        """All that is called of a model: `forward`, and the other ways through a flow or an autoregressive one."""
        inputs = self.inputs(2)
        uses = [lambda: run(model, inputs)]
        if hasattr(model, "inverse"):
            uses += [lambda: model.inverse(**inputs), lambda: model.denoise(**inputs)]
        if hasattr(model, "generate"):
            uses.append(lambda: generate(model, **inputs))
        return uses


def images(batch_size: int) -> dict:
    return {"pixel_values": torch.rand(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1}


def corrupted_images(batch_size: int) -> dict:
    """Images of which 10 of 16 patches are left, with noise on their latents."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, batch_size, 4, 4, 4, generator=generator)
    return {
        **images(batch_size),
        "visible_patches": torch.rand(batch_size, 16, generator=generator).argsort(dim=1)[:, :10],
        "posterior_noise": noise[0],
        "latent_noise": noise[1],
        "noise_level": torch.linspace(0, 0.3, batch_size),
    }


def masked_images(batch_size: int) -> dict:
    mask = torch.rand(batch_size, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    return {**images(batch_size), "patch_mask": mask}


def noisy_intervals(batch_size: int) -> dict:
    inputs = noisy_latents(batch_size)
    return {**inputs, "timestep_r": inputs["timestep"] / 2}


def noisy_latents(batch_size: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch_size, 4, 4, 4, generator=generator),
        "timestep": torch.linspace(0, 1000, batch_size),
        "class_labels": torch.arange(batch_size) % 6,
    }


def noisy_tokens(batch_size: int, count: int = 16) -> dict:
    """The last tokens of an order in two draws, the first of which is nearly clean."""
    generator = torch.Generator().manual_seed(4)
    return {
        **latents(batch_size),
        "noisy_tokens": torch.randn(batch_size, 2, count, 4, generator=generator),
        "timestep": torch.tensor([0, 999])[None, :, None].expand(batch_size, 2, count),
        "order": torch.rand(batch_size, 16, generator=generator).argsort(1),
    }


def masked_tokens(batch_size: int) -> dict:
    return noisy_tokens(batch_size, 13)


def generate(model, hidden_states, class_labels, order, **others) -> torch.Tensor:
    """Guided latents, of which 14 of 16 tokens are kept."""
    return model.generate(
        hidden_states,
        torch.ones_like(hidden_states),
        order,
        class_labels,
        head_scheduler(),
        num_known=14,
        num_diffusion_steps=2,
        temperature=0.0,
        guidance=TokenGuidance(2.0),
        negative_class_labels=class_labels + 1,
    )


def latents(batch_size: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch_size, 4, 4, 4, generator=generator),
        "class_labels": torch.arange(batch_size) % 6,
    }


def captioned_latents(batch_size: int) -> dict:
    embeds = torch.randn(batch_size, 6, 24, generator=torch.Generator().manual_seed(2))
    return {"hidden_states": latents(batch_size)["hidden_states"], "encoder_hidden_states": embeds}


def noisy_captioned_latents(batch_size: int) -> dict:
    """Captions of 6 tokens, and fewer."""
    inputs = {**noisy_latents(batch_size), **captioned_latents(batch_size)}
    del inputs["class_labels"]
    lengths = 6 - torch.arange(batch_size)[:, None]
    return {**inputs, "encoder_attention_mask": torch.arange(6) < lengths}


CASES = {
    "AutoencoderFAE": ModelCase(tiny_fae, images, lora=False),
    "AutoencoderFAE of features": ModelCase(tiny_identity_fae, images, lora=False),
    "AutoencoderDRoRAE": ModelCase(tiny_drorae, images, lora=False),
    "RAE": ModelCase(tiny_rae, images, lora=False),
    "RAEv2": ModelCase(tiny_raev2, images, lora=False),
    "AutoencoderDeTok": ModelCase(tiny_detok, corrupted_images, lora=False),
    "AutoencoderMAETok": ModelCase(tiny_maetok, masked_images, lora=False),
    "released MAETok": ModelCase(tiny_released_maetok, masked_images, lora=False),
    "LightningDiT": ModelCase(tiny_lightning_dit, noisy_latents),
    "DiTDH": ModelCase(tiny_dit_dh, noisy_latents),
    "RAEv2's denoiser": ModelCase(tiny_raev2_dit, noisy_latents),
    "RAEv2's denoiser of texts": ModelCase(tiny_text_raev2_dit, noisy_captioned_latents),
    "RAEv2's denoiser without a head": ModelCase(partial(tiny_raev2_dit, head_num_layers=0), noisy_latents),
    "LightningDiT with a base head": ModelCase(partial(tiny_lightning_dit, base_head_layer=1), noisy_latents),
    "DiT": ModelCase(tiny_dit, noisy_latents),
    "LightningDiT of average velocities": ModelCase(partial(tiny_lightning_dit, use_meanflow=True), noisy_intervals),
    "SiT": ModelCase(tiny_sit, noisy_latents),
    "SiT, 1-D positions": ModelCase(partial(tiny_sit, pos_embed_type="sincos_1d"), noisy_latents),
    "LightningDiT, learned positions": ModelCase(partial(tiny_lightning_dit, pos_embed_type="learned"), noisy_latents),
    "MMDiT": ModelCase(tiny_mmdit, noisy_captioned_latents),
    "MAR": ModelCase(tiny_mar, masked_tokens),
    "RasterAR": ModelCase(tiny_autoregressive, noisy_tokens),
    "RandomAR": ModelCase(tiny_random_autoregressive, noisy_tokens),
    "STARFlow": ModelCase(tiny_starflow, latents),
    "STARFlow-text": ModelCase(tiny_text_starflow, captioned_latents),
}


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample
