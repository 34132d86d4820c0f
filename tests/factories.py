"""Tiny models with random weights, one factory a class: what tests, documentation and smoke runs build."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from hf_fae import (
    AutoencoderDeTok,
    AutoencoderDRoRAE,
    AutoencoderFAE,
    AutoencoderMAETok,
    AutoencoderRAEv2,
    AutoregressiveTransformer2DModel,
    DiTDHTransformer2DModel,
    FAEDiTPipeline,
    FAEMARPipeline,
    FAEStarFlowPipeline,
    FAETextToImagePipeline,
    LightningDiTTransformer2DModel,
    MARTransformer2DModel,
    MMDiTTransformer2DModel,
    RAEv2Transformer2DModel,
    STARFlowTransformer2DModel,
)
from hf_fae.encoders import VisionEncoder
from hf_fae.generators.diffusion_head import head_scheduler
from hf_fae.schedulers.learned_variance import learned_variance_scheduler


_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
_MLP = {"intermediate_size": 64}

TINY_VISION_CONFIGS = {
    "dinov2": {**_SIZES, "mlp_ratio": 2, "image_size": 56},  # as in the real one, not the size that images have
    "dinov2_with_registers": {**_SIZES, "mlp_ratio": 2, "num_register_tokens": 4},
    "dinov3_vit": {**_SIZES, **_MLP, "num_register_tokens": 4},
    "siglip": {**_SIZES, **_MLP, "model_type": "siglip_vision_model"},
    "siglip2": {**_SIZES, **_MLP, "model_type": "siglip2_vision_model", "num_patches": 16},
    "vit_mae": {**_SIZES, **_MLP},
    "clip": {**_SIZES, **_MLP, "model_type": "clip_vision_model"},
    "vit": {**_SIZES, **_MLP},
    "timm_wrapper": {
        "architecture": "vit_small_patch16_224",
        "num_classes": 0,
        "model_args": {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": 32, "reg_tokens": 2},
    },
}


def tiny_encoder(model_type: str = "dinov2", **config) -> VisionEncoder:
    """A frozen encoder for 32 px images: 4 x 4 tokens of width 32, 3 layers; `config` overrides the model's config."""
    model = {"model_type": model_type, **TINY_VISION_CONFIGS[model_type], **config}
    if model_type == "siglip2":
        del model["image_size"]  # NaFlex has none
    statistics = {"image_size": 32, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        encoder = VisionEncoder.from_config({"model": model, **statistics})
        for parameter in encoder.parameters():  # so that no gain is 1, no bias and no token is 0
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder


def _build(make, seed: int):
    """The model that `make` gives, its weights moved off their initial values: no gain is 1, no output layer is 0."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = make().eval()
        for name, parameter in model.named_parameters():
            if not name.startswith("image_encoder."):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model


def tiny_fae(with_encoder: bool = True, **config) -> AutoencoderFAE:
    """An FAE for 32 px images: latents (4, 4, 4), features of width 32, with statistics that are not the identity."""
    config = {
        "latent_channels": 4,
        "sample_size": 32,
        "patch_size": 8,
        "encoder_attention_head_dim": 32,
        "decoder_num_layers": 2,
        "decoder_attention_head_dim": 16,
        "pixel_hidden_size": 32,
        "pixel_num_layers": 2,
        "pixel_num_attention_heads": 2,
        **config,
    }
    vae = _build(lambda: AutoencoderFAE.from_encoder(tiny_encoder(), **config), seed=1)
    if not with_encoder:
        vae.image_encoder = None
    width = vae.config.feature_dim
    vae.set_feature_statistics(torch.linspace(-1, 1, width), torch.linspace(0.5, 2, width))
    return _with_statistics(vae)


def tiny_identity_fae(**config) -> AutoencoderFAE:
    """The FAE whose latents (32, 4, 4) are the features."""
    return tiny_fae(encoder_type="identity", latent_channels=32, decoder_num_layers=0, **config)


def tiny_lightning_dit(**config) -> LightningDiTTransformer2DModel:
    """A denoiser of latents (4, 4, 4) with 10 classes."""
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_classes": 10,
        **config,
    }
    return _build(lambda: LightningDiTTransformer2DModel(**config), seed=2)


def tiny_drorae(with_encoder: bool = True, **config) -> AutoencoderDRoRAE:
    """A DRoRAE for 32 px images on all three layers: latents (32, 4, 4), with statistics that are not the identity."""
    config = {
        "sample_size": 32,
        "patch_size": 8,
        "expert_hidden_size": 48,
        "decoder_hidden_size": 32,
        "decoder_num_layers": 2,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 40,
        **config,
    }
    vae = _build(lambda: AutoencoderDRoRAE.from_encoder(tiny_encoder("dinov2_with_registers"), **config), seed=9)
    if not with_encoder:
        vae.image_encoder = None
    mean = torch.linspace(-0.5, 0.5, vae.latents_mean.numel()).view(vae.latents_mean.shape)
    vae.set_latent_statistics(mean, mean + 1)
    return vae


def tiny_rae(**config) -> AutoencoderDRoRAE:
    """The same of the last layer alone."""
    return tiny_drorae(**{"fusion_type": "none", **config})


def tiny_raev2(with_encoder: bool = True, **config) -> AutoencoderRAEv2:
    """A RAEv2 for 32 px images on two of three layers of DINOv3: latents (32, 4, 4), with statistics."""
    config = {
        "layers": [0, 2],
        "sample_size": 32,
        "patch_size": 8,
        "decoder_hidden_size": 32,
        "decoder_num_layers": 2,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 40,
        **config,
    }
    vae = _build(lambda: AutoencoderRAEv2.from_encoder(tiny_encoder("dinov3_vit"), **config), seed=15)
    if not with_encoder:
        vae.image_encoder = None
    mean = torch.linspace(-0.5, 0.5, vae.latents_mean.numel()).view(vae.latents_mean.shape)
    vae.set_latent_statistics(mean, mean + 1)
    return vae


def tiny_detok(**config) -> AutoencoderDeTok:
    """An l-DeTok for 32 px images: latents (4, 4, 4), with statistics that are not the identity."""
    config = {
        "sample_size": 32,
        "patch_size": 8,
        "latent_channels": 4,
        "encoder_hidden_size": 32,
        "encoder_num_layers": 2,
        "encoder_num_attention_heads": 2,
        "decoder_hidden_size": 48,
        "decoder_num_layers": 2,
        "decoder_num_attention_heads": 3,
        **config,
    }
    return _with_statistics(_build(lambda: AutoencoderDeTok(**config), seed=10))


def tiny_maetok(**config) -> AutoencoderMAETok:
    """A MAETok for 32 px images of 4 x 4 patches: latents (4, 1, 6), with statistics that are not the identity."""
    config = {
        "sample_size": 32,
        "patch_size": 8,
        "num_latent_tokens": 6,
        "latent_channels": 4,
        "encoder_hidden_size": 32,
        "encoder_num_layers": 2,
        "encoder_num_attention_heads": 2,
        "decoder_hidden_size": 48,
        "decoder_num_layers": 2,
        "decoder_num_attention_heads": 3,
        "auxiliary_hidden_size": 16,
        "auxiliary_num_layers": 1,
        "auxiliary_num_attention_heads": 2,
        **config,
    }
    return _with_statistics(_build(lambda: AutoencoderMAETok(**config), seed=11))


def tiny_released_maetok(**config) -> AutoencoderMAETok:
    """The same as the published weights are: latents steer the decoder's blocks, rotary frequencies are learned."""
    return tiny_maetok(**{"decoder_type": "modulated", "rope_type": "learned", "rope_theta": 10.0, **config})


def _with_statistics(vae):
    channels = vae.config.latent_channels
    vae.set_latent_statistics(
        torch.linspace(-0.5, 0.5, channels)[:, None, None], torch.linspace(0.5, 1.5, channels)[:, None, None]
    )
    return vae


def tiny_dit_dh(**config) -> DiTDHTransformer2DModel:
    """The same with a head that is wider than the backbone."""
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "head_num_layers": 1,
        "head_num_attention_heads": 2,
        "head_attention_head_dim": 24,
        "num_classes": 10,
        **config,
    }
    return _build(lambda: DiTDHTransformer2DModel(**config), seed=8)


def tiny_sit(**config) -> LightningDiTTransformer2DModel:
    """The same denoiser with the switches of SiT."""
    return tiny_lightning_dit(**{"norm_type": "layer_norm", "ff_type": "gelu", "use_rope": False, **config})


def tiny_dit(**config) -> LightningDiTTransformer2DModel:
    """The same with DiT's prediction of the noise and its variance."""
    return tiny_sit(prediction_type="epsilon", **config)


def tiny_raev2_dit(**config) -> RAEv2Transformer2DModel:
    """A denoiser of latents (4, 4, 4) with 10 classes that predicts x, with a base head behind its first block."""
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "head_num_layers": 1,
        "head_num_attention_heads": 2,
        "head_attention_head_dim": 24,
        "num_classes": 10,
        "num_time_tokens": 2,
        "num_class_tokens": 3,
        "base_head_layer": 1,
        **config,
    }
    return _build(lambda: RAEv2Transformer2DModel(**config), seed=16)


def tiny_text_raev2_dit(**config) -> RAEv2Transformer2DModel:
    """The same denoiser on captions of up to 6 tokens of width 24."""
    return tiny_raev2_dit(**{"num_classes": None, "caption_channels": 24, "max_caption_length": 6, **config})


def tiny_mmdit(**config) -> MMDiTTransformer2DModel:
    """A denoiser of latents (4, 4, 4) with captions of up to 6 tokens of width 24."""
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_channels": 24,
        "max_caption_length": 6,
        **config,
    }
    return _build(lambda: MMDiTTransformer2DModel(**config), seed=14)


def tiny_starflow(**config) -> STARFlowTransformer2DModel:
    """A flow of latents (4, 4, 4) with 10 classes: four blocks, the last of them two layers deep."""
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "num_layers": [1, 1, 1, 2],
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "num_classes": 10,
        **config,
    }
    return _build(lambda: STARFlowTransformer2DModel(**config), seed=3)


def tiny_text_starflow(**config) -> STARFlowTransformer2DModel:
    """The same flow on captions of up to 6 tokens of width 24."""
    return tiny_starflow(**{"num_classes": None, "caption_channels": 24, "max_caption_length": 6, **config})


def tiny_mar(**config) -> MARTransformer2DModel:
    """A masked autoregressive model of latents (4, 4, 4) with 10 classes, without dropout."""
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "encoder_num_layers": 1,
        "decoder_num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_buffer_tokens": 3,
        "head_num_layers": 2,
        "head_hidden_size": 24,
        "num_classes": 10,
        "dropout": 0.0,
        **config,
    }
    return _build(lambda: MARTransformer2DModel(**config), seed=12)


def tiny_autoregressive(**config) -> AutoregressiveTransformer2DModel:
    """A causal model of the same latents in raster order."""
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "head_num_layers": 2,
        "head_hidden_size": 24,
        "num_classes": 10,
        **config,
    }
    return _build(lambda: AutoregressiveTransformer2DModel(**config), seed=13)


def tiny_random_autoregressive(**config) -> AutoregressiveTransformer2DModel:
    """The same in random order."""
    return tiny_autoregressive(order="random", **config)


def tiny_text_encoder():
    """A text encoder of width 24 and a tokenizer for words of lower-case letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    encoder = _build(lambda: BertModel(config, add_pooling_layer=False), seed=4)
    return encoder, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def tiny_kl(**config) -> AutoencoderKL:
    """diffusers' own autoencoder for 32 px images: latents (4, 4, 4), with a shift and a scaling factor."""
    config = {
        "block_out_channels": [8] * 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 32,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return AutoencoderKL(**config).eval()


def tiny_fae_starflow_pipeline(with_encoder: bool = False, **kwargs) -> FAEStarFlowPipeline:
    """A pipeline of the tiny models that draws 32 px images of "class 0" to "class 9" in 4 blocks."""
    kwargs = {
        "vae": tiny_fae(with_encoder),
        "transformer": tiny_starflow(),
        "text_encoder": None,
        "tokenizer": None,
        "id2label": {index: f"class {index}" for index in range(10)},
        **kwargs,
    }
    pipe = FAEStarFlowPipeline(**kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_text_starflow_pipeline(**kwargs) -> FAEStarFlowPipeline:
    """The same for texts."""
    text_encoder, tokenizer = tiny_text_encoder()
    kwargs = {
        "transformer": tiny_text_starflow(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "id2label": None,
        **kwargs,
    }
    return tiny_fae_starflow_pipeline(**kwargs)


def tiny_fae_text_to_image_pipeline(with_encoder: bool = False, **kwargs) -> FAETextToImagePipeline:
    """A pipeline of the tiny models that draws 32 px images of texts of up to 6 letters in 4 steps."""
    text_encoder, tokenizer = tiny_text_encoder()
    kwargs = {
        "vae": tiny_fae(with_encoder),
        "transformer": tiny_mmdit(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "num_inference_steps": 4,
        **kwargs,
    }
    pipe = FAETextToImagePipeline(**kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_fae_dit_pipeline(with_encoder: bool = False, **kwargs) -> FAEDiTPipeline:
    """A pipeline of the tiny models that draws 32 px images of "class 0" to "class 9" in 4 steps."""
    kwargs = {
        "vae": tiny_fae(with_encoder),
        "transformer": tiny_lightning_dit(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "id2label": {index: f"class {index}" for index in range(10)},
        "num_inference_steps": 4,
        **kwargs,
    }
    pipe = FAEDiTPipeline(**kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_dit_pipeline(**kwargs) -> FAEDiTPipeline:
    """The same with a DiT."""
    scheduler = learned_variance_scheduler("linear")
    return tiny_fae_dit_pipeline(**{"transformer": tiny_dit(), "scheduler": scheduler, **kwargs})


def tiny_fae_mar_pipeline(with_encoder: bool = False, **kwargs) -> FAEMARPipeline:
    """A pipeline of the tiny models that draws 32 px images of "class 0" to "class 9", a MAR in 4 steps."""
    kwargs = {
        "vae": tiny_fae(with_encoder),
        "transformer": tiny_mar(),
        "scheduler": head_scheduler(),
        "id2label": {index: f"class {index}" for index in range(10)},
        "num_diffusion_steps": 3,
        **kwargs,
    }
    if isinstance(kwargs["transformer"], MARTransformer2DModel):
        kwargs = {"num_inference_steps": 4, **kwargs}
    pipe = FAEMARPipeline(**kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe
