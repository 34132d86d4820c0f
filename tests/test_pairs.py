"""Any tokenizer works with any generator: each pair learns a step, draws, and is the same when it is loaded again.

A new tokenizer or generator is one more line.
"""

import pytest
import torch
from diffusers import DiffusionPipeline
from factories import (
    tiny_autoregressive,
    tiny_detok,
    tiny_dit,
    tiny_dit_dh,
    tiny_dit_pipeline,
    tiny_drorae,
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_mar_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_identity_fae,
    tiny_kl,
    tiny_lightning_dit,
    tiny_maetok,
    tiny_mar,
    tiny_mmdit,
    tiny_rae,
    tiny_random_autoregressive,
    tiny_sit,
    tiny_starflow,
    tiny_text_encoder,
    tiny_text_starflow,
    tiny_text_starflow_pipeline,
)

from hf_fae.latents import latent_size
from hf_fae.training.autoregression import AutoregressiveObjective, MARObjective
from hf_fae.training.captions import CaptionEncoder
from hf_fae.training.conditions import TextCondition
from hf_fae.training.diffusion import DiffusionObjective
from hf_fae.training.generator_objectives import FlowMatchingObjective, STARFlowObjective
from hf_fae.training.randomness import ImageRandom


TOKENIZERS = {
    "FAE": tiny_fae,
    "features": tiny_identity_fae,
    "RAE": tiny_rae,
    "DRoRAE": tiny_drorae,
    "l-DeTok": tiny_detok,
    "MAETok": tiny_maetok,
    "AutoencoderKL": lambda: tiny_kl(sample_size=32),
}
GENERATORS = {
    "LightningDiT": (tiny_lightning_dit, tiny_fae_dit_pipeline, FlowMatchingObjective),
    "DiT": (tiny_dit, tiny_dit_pipeline, DiffusionObjective),
    "SiT": (tiny_sit, tiny_fae_dit_pipeline, FlowMatchingObjective),
    "DiT^DH": (tiny_dit_dh, tiny_fae_dit_pipeline, FlowMatchingObjective),
    "MAR": (tiny_mar, tiny_fae_mar_pipeline, MARObjective),
    "RasterAR": (tiny_autoregressive, tiny_fae_mar_pipeline, AutoregressiveObjective),
    "RandomAR": (tiny_random_autoregressive, tiny_fae_mar_pipeline, AutoregressiveObjective),
    "STARFlow": (tiny_starflow, tiny_fae_starflow_pipeline, STARFlowObjective),
    "STARFlow with text": (tiny_text_starflow, tiny_text_starflow_pipeline, STARFlowObjective),
    "MMDiT": (tiny_mmdit, tiny_fae_text_to_image_pipeline, FlowMatchingObjective),
}


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_pair(tokenizer, generator, tmp_path, caplog):
    vae = TOKENIZERS[tokenizer]()
    make, make_pipeline, objective = GENERATORS[generator]
    transformer = make(in_channels=vae.config.latent_channels, sample_size=list(latent_size(vae, 32, 32)))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted, condition = [1, "class 2"], None
    if transformer.config.get("caption_channels"):
        text_encoder, words = tiny_text_encoder()
        captions = CaptionEncoder(words, text_encoder, transformer.config.max_caption_length)
        wanted, condition = ["a cat", "dog"], TextCondition(transformer, captions)
    batch = {"pixel_values": images, "class_labels": torch.tensor([1, 2]), "captions": ["a cat", "dog"]}
    objective = objective(transformer, vae, condition=condition).train()
    objective(batch, ImageRandom(0, 0, "cpu"))["loss"].backward()
    assert all(parameter.grad is not None for parameter in transformer.parameters() if parameter.requires_grad)
    assert all(parameter.grad is None for parameter in vae.parameters())

    pipe = make_pipeline(vae=vae, transformer=transformer.eval())
    assert type(pipe).from_pipe(pipe).vae is vae
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert "Expected types" not in caplog.text
    drawn, again = (
        some(wanted, generator=torch.Generator().manual_seed(0), output_type="pt").images for some in (pipe, loaded)
    )
    assert drawn.shape == (2, 3, 32, 32)
    # Not to the bit: matrix products of weights that lie elsewhere in memory are rounded otherwise.
    torch.testing.assert_close(drawn, again, atol=1e-5, rtol=0)
