"""Any tokenizer works with any generator: each pair trains a step, generates, and is the same once saved and loaded.

A new tokenizer or generator is one more line. The table of tested pairs in the README is written here.
"""

from functools import partial
from pathlib import Path

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
    tiny_raev2,
    tiny_raev2_dit,
    tiny_random_autoregressive,
    tiny_sit,
    tiny_starflow,
    tiny_text_raev2_dit,
    tiny_text_starflow,
    tiny_text_starflow_pipeline,
)

from hf_fae.data.captions import CaptionEncoder
from hf_fae.data.conditions import TextCondition
from hf_fae.latents import latent_size
from hf_fae.objectives.ddpm import DiffusionObjective
from hf_fae.objectives.flow_matching import FlowMatchingObjective
from hf_fae.objectives.mean_flow import MeanFlowObjective
from hf_fae.objectives.starflow import STARFlowObjective
from hf_fae.objectives.token_diffusion import AutoregressiveObjective, MARObjective
from hf_fae.utils.randomness import ImageRandom


TOKENIZERS = {
    "FAE": tiny_fae,
    "features": tiny_identity_fae,
    "RAE": tiny_rae,
    "DRoRAE": tiny_drorae,
    "RAEv2": tiny_raev2,
    "l-DeTok": tiny_detok,
    "MAETok": tiny_maetok,
    "AutoencoderKL": lambda: tiny_kl(sample_size=32),
}
GENERATORS = {
    "LightningDiT": (tiny_lightning_dit, tiny_fae_dit_pipeline, FlowMatchingObjective),
    "DiT": (tiny_dit, tiny_dit_pipeline, DiffusionObjective),
    "SiT": (tiny_sit, tiny_fae_dit_pipeline, FlowMatchingObjective),
    "DiT^DH": (tiny_dit_dh, tiny_fae_dit_pipeline, FlowMatchingObjective),
    "RAEv2's": (tiny_raev2_dit, tiny_fae_dit_pipeline, FlowMatchingObjective),
    "MeanFlow": (partial(tiny_lightning_dit, use_meanflow=True), tiny_fae_dit_pipeline, MeanFlowObjective),
    "MAR": (tiny_mar, tiny_fae_mar_pipeline, MARObjective),
    "RasterAR": (tiny_autoregressive, tiny_fae_mar_pipeline, AutoregressiveObjective),
    "RandomAR": (tiny_random_autoregressive, tiny_fae_mar_pipeline, AutoregressiveObjective),
    "STARFlow": (tiny_starflow, tiny_fae_starflow_pipeline, STARFlowObjective),
    "MMDiT": (tiny_mmdit, tiny_fae_text_to_image_pipeline, FlowMatchingObjective),
    "RAEv2's of texts": (tiny_text_raev2_dit, tiny_fae_text_to_image_pipeline, FlowMatchingObjective),
    "STARFlow of texts": (tiny_text_starflow, tiny_text_starflow_pipeline, STARFlowObjective),
}


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_pair(tokenizer, generator, tmp_path, caplog):
    vae = TOKENIZERS[tokenizer]()
    make, make_pipeline, make_objective = GENERATORS[generator]
    transformer = make(in_channels=vae.config.latent_channels, sample_size=list(latent_size(vae, 32, 32)))
    pipe = make_pipeline(vae=vae, transformer=transformer)
    condition, wanted = None, [1, "class 2"]
    if pipe.reads_text:
        captions = CaptionEncoder(pipe.tokenizer, pipe.text_encoder, transformer.config.max_caption_length)
        condition, wanted = TextCondition(transformer, captions), ["a cat", "dog"]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"pixel_values": images, "class_labels": torch.tensor([1, 2]), "captions": ["a cat", "dog"]}
    make_objective(transformer, vae, condition=condition).train()(batch, ImageRandom(0, 0, "cpu"))["loss"].backward()
    assert all(parameter.grad is not None for parameter in transformer.parameters() if parameter.requires_grad)
    assert all(parameter.grad is None for parameter in vae.parameters())

    transformer.eval()
    assert type(pipe).from_pipe(pipe).vae is vae
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert "Expected types" not in caplog.text
    generated, again = (
        some(wanted, generator=torch.Generator().manual_seed(0), output_type="pt").images for some in (pipe, loaded)
    )
    assert generated.shape == (2, 3, 32, 32)
    # Not bit-exact: rounding of matrix products depends on the alignment of the weights in memory.
    torch.testing.assert_close(generated, again, atol=1e-5, rtol=0)


# The README's table: row -> its tokenizers, column -> its generators, and where a pair was trained and measured.
ROWS = {
    "FAE": ["FAE"],
    "RAE, DRoRAE, RAEv2": ["RAE", "DRoRAE", "RAEv2"],
    "l-DeTok": ["l-DeTok"],
    "MAETok": ["MAETok"],
    "the encoder's own features": ["features"],
    "diffusers' autoencoders": ["AutoencoderKL"],
}
COLUMNS = {
    "DiT, SiT, LightningDiT": ["DiT", "SiT", "LightningDiT", "MeanFlow"],
    "DiT^DH": ["DiT^DH"],
    "RAEv2's": ["RAEv2's", "RAEv2's of texts"],
    "MMDiT": ["MMDiT"],
    "STARFlow": ["STARFlow", "STARFlow of texts"],
    "MAR": ["MAR"],
    "RasterAR, RandomAR": ["RasterAR", "RandomAR"],
}
EXPERIMENT = "docs/experiments/generators.md"
TRAINED = {
    **{
        (row, column): EXPERIMENT
        for row in ("FAE", "l-DeTok", "MAETok")
        for column in ("DiT, SiT, LightningDiT", "MAR", "RasterAR, RandomAR")
    },
    ("FAE", "DiT, SiT, LightningDiT"): "docs/experiments/emoji-256.md",
    ("FAE", "STARFlow"): "docs/experiments/emoji-256.md",
    ("FAE", "MMDiT"): "docs/experiments/text-to-image.md",
}


def readme_table() -> str:
    """Tokenizers x generators, each pair "tested" or with a link to where it was trained and measured."""

    def line(*cells):
        return f"| {' | '.join(cells)} |"

    lines = [line("latents of", *COLUMNS), "|---" * (1 + len(COLUMNS)) + "|"]
    for row in ROWS:
        cells = [f"[trained]({TRAINED[row, column]})" if (row, column) in TRAINED else "tested" for column in COLUMNS]
        lines.append(line(row, *cells))
    return "\n".join(lines)


def test_readme_has_the_table_of_what_is_tested():
    for groups, tested in ((ROWS, TOKENIZERS), (COLUMNS, GENERATORS)):
        assert sorted(name for group in groups.values() for name in group) == sorted(tested)
    table = readme_table()
    assert table in (Path(__file__).parents[1] / "README.md").read_text(), f"README.md must have this table:\n{table}"


def test_model_reference_names_the_classes_of_what_is_tested():
    page = (Path(__file__).parents[1] / "docs" / "models" / "index.md").read_text()
    for make in (*TOKENIZERS.values(), *(generator[0] for generator in GENERATORS.values())):
        assert f"`{type(make()).__name__}`" in page
