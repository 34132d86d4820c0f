"""Contract 1: the frozen vision encoder, images (B, 3, H, W) in [-1, 1] -> patch tokens (B, N, C) on a grid (h, w).

`encoder_families` has what differs between the libraries' models; everything else is shared.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, ModelOutput, cached_file
from transformers.utils.hub import extract_commit_hash

from .encoder_families import configure, find_family, timm_norm
from .utils.config_bounds import check_numbers
from .utils.hub_errors import hub_errors
from .utils.weights import check_weights


__all__ = ["VisionEncoder", "VisionEncoderOutput"]


@dataclass
class VisionEncoderOutput(ModelOutput):
    """Patch tokens without class and register tokens, in the encoder's dtype, row by row.

    Attributes:
        last_hidden_state: (B, N, C), after the final norm.
        hidden_states: `num_hidden_layers + 1` tensors (B, N, C), the embeddings first, all before the final norm.
        grid: (h, w) with h * w = N.
        pooler_output: (B, D), the model's own representation of the whole image (DINOv2 and CLIP: their class token,
            SigLIP: its attention head); None for models without one.
    """

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    grid: tuple[int, int] | None = None
    pooler_output: torch.Tensor | None = None


def _pair(size: int | list[int] | tuple[int, int] | dict[str, int]) -> tuple[int, int]:
    """(height, width) of a side, a pair or an image processor's dict."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _parse_config(model_dict: dict[str, Any]) -> PreTrainedConfig:
    find_family(model_dict.get("model_type"))  # a better error than that of the mapping
    check_numbers(model_dict, "image_encoder_config")
    return CONFIG_MAPPING[model_dict["model_type"]].from_dict(model_dict)


def _read_statistics(path: str, config: PreTrainedConfig, **hub_kwargs) -> dict[str, Any]:
    """Input size, mean and std as the checkpoint states them: no default suits every encoder."""
    from transformers import ImageProcessingMixin  # imports torchvision

    if config.model_type == "timm_wrapper":
        file, source = "pretrained_cfg in config.json", getattr(config, "pretrained_cfg", {})
        size, mean, std = source.get("input_size", [])[1:], source.get("mean"), source.get("std")
    else:
        file = IMAGE_PROCESSOR_NAME
        try:
            source, _ = ImageProcessingMixin.get_image_processor_dict(path, **hub_kwargs)
        except OSError as error:
            raise OSError(f"{path!r} has no {file}, which gives the encoder's image mean and std") from error
        size = source.get("crop_size") if source.get("do_center_crop", True) else None
        size, mean, std = size or source.get("size"), source.get("image_mean"), source.get("image_std")
        if size is None and "max_num_patches" in source:  # NaFlex: the largest square
            size = int(source["max_num_patches"] ** 0.5) * config.patch_size
    if not (size and mean and std):
        raise ValueError(f"{file} of {path!r} must give size, mean and std, got {size}, {mean} and {std}")
    return {"image_size": _pair(size), "image_mean": mean, "image_std": std}


def _without_hooks(module: nn.Module) -> nn.Module:
    """The module with the same tensors, as it was before its first forward: transformers then adds its hooks again."""
    copied = copy.copy(module)
    copied._modules = {name: child and _without_hooks(child) for name, child in module._modules.items()}
    copied._forward_hooks = type(module._forward_hooks)()
    copied.__dict__.pop("_output_capturing_hooks_installed", None)
    return copied


class VisionEncoder(nn.Module):
    """A frozen vision model of transformers or timm that turns images into patch tokens.

    It resizes (bicubic, antialias off), normalises with the encoder's own statistics, runs the model in the model's
    dtype and removes class and register tokens. It stays in eval mode, and a call builds no autograd graph; only
    `compute_features` passes gradients to the images.

    Args:
        model: one of the `encoder_families.FAMILIES`; of an image-text model the vision tower is used.
        image_size: default input size in pixels, a side or (height, width).
        image_mean, image_std: three values each, for images in [0, 1].

    Attributes:
        hidden_size (C), num_hidden_layers, patch_size, num_prefix_tokens (class and register tokens).
        repo_id, revision: Hub id and commit of its source; None for folders and random weights.

    Raises:
        ValueError: unsupported model type, patches that are not square, or a timm model of fixed input size.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_size: int | list[int] | tuple[int, int],
        image_mean: list[float],
        image_std: list[float],
    ):
        super().__init__()
        model = getattr(model, "vision_model", model)
        config, family = configure(model.config)
        self.model = model.requires_grad_(False)
        self.image_size = _pair(image_size)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self._family = family
        if config.model_type == "timm_wrapper":
            vit = model.timm_model
            norm, patch_size = timm_norm(vit), vit.patch_embed.patch_size
            if not (vit.dynamic_img_size and isinstance(norm, nn.LayerNorm)):
                raise ValueError(
                    f"the timm model {config.architecture!r} must have dynamic_img_size=True and end in a LayerNorm, "
                    f"got {vit.dynamic_img_size} and {type(norm).__name__}"
                )
            self.hidden_size, self.num_hidden_layers = vit.num_features, len(vit.blocks)
            self.num_prefix_tokens, self.layer_norm_eps = vit.num_prefix_tokens, norm.eps
            statistics = {"input_size": [3, *self.image_size], "mean": self.image_mean, "std": self.image_std}
            config.update({"pretrained_cfg": {**getattr(config, "pretrained_cfg", {}), **statistics}})
        else:
            self.hidden_size, self.num_hidden_layers = config.hidden_size, config.num_hidden_layers
            self.num_prefix_tokens = family.class_tokens + getattr(config, "num_register_tokens", 0)
            self.layer_norm_eps, patch_size = config.layer_norm_eps, config.patch_size
        self.patch_size, patch_width = _pair(patch_size)
        if self.patch_size != patch_width:
            raise ValueError(f"patch_size of the model must be square, got {patch_size}")
        self.repo_id = self.revision = None
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        config: dict[str, Any] | None = None,
        **hub_kwargs,
    ) -> "VisionEncoder":
        """Loads a Hub id or a folder in transformers' or timm's own format; of an image-text model the vision tower.

        Args:
            dtype: None keeps the checkpoint's own.
            config: the value of the property `config`, for a folder that holds nothing but weights.
            hub_kwargs: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`, `force_download`, `proxies`.

        Raises:
            ValueError: unsupported model type, or statistics or weights that the checkpoint lacks.
            OSError: missing files, the preprocessor config included.
        """
        path = str(pretrained_model_name_or_path)
        with hub_errors(path):
            if config is None:
                # Checked as it is written: some classes already allocate as much as their numbers say.
                check_numbers(PreTrainedConfig.get_config_dict(path, **hub_kwargs)[0], f"the config of {path!r}")
                model_config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub_kwargs)
                model_config, family = configure(model_config)
                statistics = _read_statistics(path, model_config, **hub_kwargs)
            else:
                statistics = {key: value for key, value in config.items() if key != "model"}
                model_config, family = configure(_parse_config(config["model"]))
            load_kwargs = {"dtype": dtype or "auto", "variant": variant, **family.model_kwargs, **hub_kwargs}
            model, info = AutoModel.from_pretrained(
                path, config=model_config, output_loading_info=True, trust_remote_code=False, **load_kwargs
            )
        # transformers only warns, and leaves them random.
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{path!r} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
        check_weights(model, path)
        encoder = cls(model, **statistics)
        if not Path(path).is_dir():
            encoder.repo_id = path
            encoder.revision = extract_commit_hash(cached_file(path, CONFIG_NAME, **hub_kwargs), None)
        return encoder

    def save_pretrained(
        self, save_directory: str | Path, *, variant: str | None = None, max_shard_size: int | str = "10GB"
    ) -> None:
        """Writes a folder in transformers' own format, the preprocessor config included."""
        self.model.save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size)
        height, width = self.image_size
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
        }
        if self._family.reads_patches:
            num_patches = (height // self.patch_size) * (width // self.patch_size)
            processor |= {"image_processor_type": "Siglip2ImageProcessor"}
            processor |= {"patch_size": self.patch_size, "max_num_patches": num_patches}
        Path(save_directory, IMAGE_PROCESSOR_NAME).write_text(json.dumps(processor, indent=2) + "\n")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VisionEncoder":
        """An encoder with random weights from a value of the property `config`, also under `torch.device("meta")`.

        Args:
            config: `{"model": config of a transformers vision model, "image_size", "image_mean", "image_std"}`.
        """
        statistics = dict(config)
        model_dict = statistics.pop("model")
        model_config, family = configure(_parse_config(model_dict))
        model = AutoModel.from_config(model_config, trust_remote_code=False, **family.model_kwargs)
        return cls(model, **statistics)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able; `from_config` builds the same architecture from it."""
        return {
            "model": json.loads(self.model.config.to_json_string()),
            "image_size": list(self.image_size),
            "image_mean": self.image_mean,
            "image_std": self.image_std,
        }

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __getstate__(self):
        """For pickling: without the hooks by which transformers records hidden states, which are local functions."""
        return {**self.__dict__, "_modules": {**self._modules, "model": _without_hooks(self.model)}}

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stays in eval mode, also when a parent module goes into training mode."""
        return super().train(False)

    def preprocess(self, pixel_values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(B, 3, *size) in the encoder's dtype: images in [-1, 1], resized and normalised in fp32."""
        pixels = pixel_values.float()
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=False)
        mean, std = pixels.new_tensor([self.image_mean, self.image_std]).view(2, 3, 1, 1)
        return ((pixels / 2 + 0.5 - mean) / std).to(self.dtype)

    @torch.no_grad()
    def forward(
        self,
        pixel_values: torch.Tensor,
        grid: tuple[int, int] | None = None,
        output_hidden_states: bool = False,
        final_norm: str = "affine",
    ) -> VisionEncoderOutput:
        """`compute_features`, without a graph."""
        return self.compute_features(pixel_values, grid, output_hidden_states, final_norm)

    def compute_features(
        self,
        pixel_values: torch.Tensor,
        grid: tuple[int, int] | None = None,
        output_hidden_states: bool = False,
        final_norm: str = "affine",
    ) -> VisionEncoderOutput:
        """Patch tokens of images of any size, differentiable.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1], any floating dtype.
            grid: (h, w) of the tokens: images are resized to (h * patch_size, w * patch_size) and positions
                interpolated. None: the encoder's own input size.
            output_hidden_states: also return the tokens between the layers.
            final_norm: "affine" for the model's own final norm (FAE), "plain" for that norm without gain and bias
                (RAE, DRoRAE).

        Raises:
            ValueError: pixel values of another shape or not floating, a grid that is not two positive integers, or an
                unknown `final_norm`.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must have the shape (B, 3, H, W), got {tuple(pixel_values.shape)}")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be floating and in [-1, 1], got {pixel_values.dtype}")
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise ValueError(f"grid must be two positive integers (h, w), got {grid}")
        if final_norm not in ("affine", "plain"):
            raise ValueError(f"final_norm must be 'affine' or 'plain', got {final_norm!r}")

        p, plain = self.patch_size, final_norm == "plain"
        size = self.image_size if grid is None else (grid[0] * p, grid[1] * p)
        grid = (size[0] // p, size[1] // p)
        outputs = self._family.run(
            self.model, self.preprocess(pixel_values, size), grid, output_hidden_states or plain
        )

        tokens, states = outputs.last_hidden_state, outputs.hidden_states
        if plain:
            tokens = F.layer_norm(states[-1], (self.hidden_size,), eps=self.layer_norm_eps)
        return VisionEncoderOutput(
            last_hidden_state=tokens[:, self.num_prefix_tokens :],
            hidden_states=tuple(s[:, self.num_prefix_tokens :] for s in states) if output_hidden_states else None,
            grid=grid,
            pooler_output=getattr(outputs, "pooler_output", None),
        )
