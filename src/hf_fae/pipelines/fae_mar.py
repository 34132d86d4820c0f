"""Class-conditional images from a model that draws token by token, on any tokenizer's latents; inpainting as well."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch.nn import functional as F

from ..generators.autoregressive import AutoregressiveTransformer2DModel
from ..generators.mar import MARTransformer2DModel
from ..guidance import TokenGuidance
from ..latents import check_finite, encode_images, latent_size
from ..layers.positions import grid_size
from ..schedulers.learned_variance import check_num_steps, check_scheduler
from .class_labels import ClassLabelsMixin
from .latent_pipeline import LatentPipeline, Tokenizer


__all__ = ["FAEMARPipeline"]


class FAEMARPipeline(LatentPipeline, ClassLabelsMixin):
    """Images of a class: the tokens of latents, drawn in steps by `transformer` -> `vae` -> pictures.

    A picture can be given whose tokens are kept outside of a mask, in any place for MAR and RandomAR, and at the top
    for RasterAR.

    Args:
        vae: any tokenizer, such as `AutoencoderDeTok`, or diffusers' `AutoencoderKL`. A frozen encoder is needed only
            to keep tokens of pictures.
        transformer: `MARTransformer2DModel`, or `AutoregressiveTransformer2DModel` (RasterAR, RandomAR).
        scheduler: the `DDPMScheduler` that the diffusion head was trained with; with
            `variance_type="learned_range"`, `clip_sample=False`, and `timestep_spacing="linspace"` as in the papers.
        id2label: names of the classes, `{id: name}`.
        guidance_scale, num_inference_steps, num_diffusion_steps, temperature: what calls use by default, saved with
            the pipeline: the settings that go with the weights. The scale in a form of `TokenGuidance.of`.

    Raises:
        ValueError: components that do not go together, or a setting that they cannot draw with.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        vae: Tokenizer,
        transformer: MARTransformer2DModel | AutoregressiveTransformer2DModel,
        scheduler: DDPMScheduler,
        id2label: dict | None = None,
        guidance_scale: float | dict = 1.0,
        num_inference_steps: int | None = None,
        num_diffusion_steps: int = 100,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.init_components()
        if scheduler is not None:
            check_scheduler(scheduler)
        self.check_settings(num_inference_steps, num_diffusion_steps, temperature)
        self.register_labels(id2label)
        self._guidance = TokenGuidance.of(guidance_scale)
        self.register_to_config(
            guidance_scale=dataclasses.asdict(self._guidance),
            num_inference_steps=num_inference_steps,
            num_diffusion_steps=num_diffusion_steps,
            temperature=temperature,
        )

    @property
    def guidance(self) -> TokenGuidance:
        """Of the running or latest call."""
        return self._guidance

    @property
    def guidance_scale(self) -> float:
        """The scale towards the end."""
        return self._guidance.scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance.is_active

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        height: int | None = None,
        width: int | None = None,
        image: Image.Image | np.ndarray | torch.Tensor | list | None = None,
        mask_image: Image.Image | np.ndarray | torch.Tensor | list | None = None,
        image_latents: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        num_diffusion_steps: int | None = None,
        guidance_scale: float | dict | TokenGuidance | None = None,
        temperature: float | None = None,
        negative_class_labels: int | str | list[int | str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        callback_on_step_end: Callable[["FAEMARPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            class_labels: class ids, names from `id2label`, or a list of either.
            height, width: of the images in pixels, which can only be those of training.
            image: pictures of which tokens are kept, one or one for each image, of the size of the images.
            mask_image: what is drawn anew, white in pictures and 1 in tensors (images or 1, height, width): every
                token that has such a pixel. Its size is that of the images or that of the tokens; of a tokenizer
                whose tokens lie on no grid of the picture (MAETok), only the latter.
            image_latents: instead of `image` (images or 1, C, H, W), as the tokenizer's `encode` gives them.
            num_inference_steps: for MAR, steps in which the tokens are drawn; with None, one token a step. By default
                the pipeline's own.
            num_diffusion_steps: evaluations of the diffusion head for each token; by default the pipeline's own.
            guidance_scale: the scale that guidance rises to, see `TokenGuidance`; by default the pipeline's own.
            temperature: factor of the noise that the diffusion head adds; by default the pipeline's own.
            negative_class_labels: guide away from these classes (one, or one for each label), instead of from the
                unconditional prediction.
            num_images_per_prompt: images for each label; those of a label follow each other.
            generator: of all random numbers; with a list, one for each image, an image is the same in any batch.
            latents: from these instead of noise (images, C, H, W) the diffusion head starts at each token.
            output_type: `"pil"`, `"np"` (B, H, W, 3) in [0, 1], `"pt"` (B, 3, H, W) in [0, 1], or `"latent"`.
            return_dict: return an `ImagePipelineOutput` instead of a tuple.
            attention_kwargs: handed to the transformer; `{"scale": s}` scales LoRA layers.
            callback_on_step_end: called as `(pipe, step, left, tensors)` after each step, `left` being how many tokens
                are still to be drawn; what it returns replaces the tensors. Latents are zero where no token is yet.
            callback_on_step_end_tensor_inputs: names of these tensors; `"latents"`.

        Returns:
            `.images`.

        Raises:
            ValueError: an argument that does not fit; the message names it and its value.
        """
        config = self.config
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        diffusion_steps = config.num_diffusion_steps if num_diffusion_steps is None else num_diffusion_steps
        temperature = config.temperature if temperature is None else temperature
        self.check_inputs(
            height,
            width,
            output_type,
            callback_on_step_end_tensor_inputs,
            num_images_per_prompt=num_images_per_prompt,
        )
        self.check_settings(steps, diffusion_steps, temperature)
        guidance = self._guidance = TokenGuidance.of(
            config.guidance_scale if guidance_scale is None else guidance_scale
        )
        self._interrupt = False
        labels, negative_labels = self.prepare_labels(class_labels, negative_class_labels, num_images_per_prompt)
        generator = self.prepare_generator(len(labels), generator)
        noise = self.prepare_latents(len(labels), height, width, generator, latents)
        kept, is_drawn = self.prepare_kept(len(labels), image, mask_image, image_latents)
        order, num_known = self.prepare_order(is_drawn, generator)
        counts = self.transformer.tokens_per_step(order.shape[1] - num_known, steps)
        self._num_timesteps = len(counts)

        with self.progress_bar(total=self._num_timesteps) as progress_bar:

            def on_step(step, drawn):
                left = sum(counts[step + 1 :])
                drawn = self.call_back(callback_on_step_end, step, left, drawn, callback_on_step_end_tensor_inputs)
                progress_bar.update()
                return drawn, self.interrupt

            drawn = self.transformer.generate(
                kept,
                noise,
                order,
                labels,
                self.scheduler,
                num_known,
                steps,
                diffusion_steps,
                temperature,
                guidance,
                negative_labels,
                generator,
                on_step,
                attention_kwargs=attention_kwargs,
            )

        images = self.decode(drawn, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_settings(self, num_inference_steps: int | None, num_diffusion_steps: int, temperature: float) -> None:
        """Refuse what transformer and scheduler cannot draw with.

        Raises:
            ValueError: a setting that does not fit.
        """
        if self.transformer is not None:
            self.transformer.tokens_per_step(1, num_inference_steps)
        if self.scheduler is not None:
            check_num_steps(self.scheduler, num_diffusion_steps)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {temperature}")

    def prepare_latents(self, batch_size, height, width, generator=None, latents=None):
        """As in the base.

        Raises:
            ValueError: also for images of another size than those of training, as positions are learned.
        """
        for name, side, own in zip(("height", "width"), (height, width), self.image_size):
            if side not in (None, own):
                raise ValueError(f"{name} must be {own}, as the transformer has learned its positions, got {side}")
        return super().prepare_latents(batch_size, height, width, generator, latents)

    def prepare_kept(
        self,
        batch_size: int,
        image: Image.Image | np.ndarray | torch.Tensor | list | None,
        mask_image: Image.Image | np.ndarray | torch.Tensor | list | None,
        image_latents: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (batch_size, C, H, W) in fp32, and which of their tokens are to be drawn, (batch_size, N) bool.

        Raises:
            ValueError: a picture without a mask or the other way round, both or neither of a picture and its latents,
                or something of another shape.
        """
        config = self.transformer.config
        shape = (config.in_channels, *grid_size(config.sample_size))
        if mask_image is None:
            for name, value in (("image", image), ("image_latents", image_latents)):
                if value is not None:
                    raise ValueError(f"{name} must come with a mask_image, which says what is drawn anew, got none")
            empty = torch.zeros(batch_size, *shape, device=self._execution_device)
            return empty, empty.new_ones(batch_size, self.transformer.num_tokens, dtype=torch.bool)
        if (image is None) == (image_latents is None):
            both = "neither" if image is None else "both"
            raise ValueError(f"mask_image must come with either image or image_latents, got {both}")
        name = "image_latents"
        if image is not None:
            name, image_latents = "latents of image", self.encode_image(image)
        if image_latents.shape[1:] != shape or len(image_latents) not in (1, batch_size):
            raise ValueError(
                f"{name} must have shape (1 or {batch_size}, {', '.join(map(str, shape))}), "
                f"got {tuple(image_latents.shape)}"
            )
        check_finite(name, image_latents)
        image_latents = image_latents.to(self._execution_device, torch.float32).expand(batch_size, -1, -1, -1)
        return image_latents, self.prepare_mask(batch_size, mask_image)

    def encode_image(self, image: Image.Image | np.ndarray | torch.Tensor | list) -> torch.Tensor:
        """Latents of pictures, the means of their posteriors.

        Raises:
            ValueError: no tokenizer, or pictures of another size than those that are drawn.
        """
        if self.vae is None:
            raise ValueError("image cannot be read by a pipeline without vae: pass image_latents instead")
        pixel_values = self.image_processor.preprocess(image)
        if tuple(pixel_values.shape[2:]) != self.image_size:
            sides = " x ".join(map(str, self.image_size))
            got = " x ".join(map(str, pixel_values.shape[2:]))
            raise ValueError(f"image must be {sides} (height x width) as what is drawn, got {got}")
        return encode_images(self.vae, pixel_values.to(self._execution_device, self.vae.dtype)).mean

    def prepare_mask(
        self, batch_size: int, mask_image: Image.Image | np.ndarray | torch.Tensor | list
    ) -> torch.Tensor:
        """Which tokens are to be drawn, (batch_size, N) bool: those with a pixel of at least 1/2.

        Raises:
            ValueError: something else, masks of another size or number, or with unequal numbers of tokens.
        """
        grid, masks = self.transformer.grid, _to_planes(mask_image)
        sizes = [grid]
        if self.vae is not None:
            size = self.image_size
            if latent_size(self.vae, *size) == tuple(side // self.vae_scale_factor for side in size):
                sizes.append(size)
        if tuple(masks.shape[1:]) not in sizes or len(masks) not in (1, batch_size):
            allowed = " or ".join(str(size) for size in sizes)
            raise ValueError(
                f"mask_image must be 1 or {batch_size} of (height, width) {allowed}, got {tuple(masks.shape)}"
            )
        check_finite("mask_image", masks)
        is_drawn = F.adaptive_max_pool2d(masks[:, None], grid).flatten(1) >= 0.5
        counts = is_drawn.sum(1).tolist()
        if len(set(counts)) > 1 or counts[0] == 0:
            raise ValueError(f"mask_image must mark as many tokens in each picture, and some at all, got {counts}")
        return is_drawn.to(self._execution_device).expand(batch_size, -1)

    def prepare_order(
        self, is_drawn: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> tuple[torch.Tensor, int]:
        """Orders (B, N) of the tokens, the kept ones first, and how many these are.

        Raises:
            ValueError: tokens that are kept in raster order do not lie before all others.
        """
        scores = randn_tensor(is_drawn.shape, generator=generator, device=is_drawn.device, dtype=torch.float32)
        order = self.transformer.draw_order(scores)
        kept_first = order.gather(1, is_drawn.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
        if self.transformer.config.get("order") == "raster" and not torch.equal(order, kept_first):
            raise ValueError(
                "mask_image must mark the last tokens, row by row, for a transformer of raster order, "
                f"got other ones among {is_drawn.shape[1]}"
            )
        return kept_first, is_drawn.shape[1] - int(is_drawn[0].sum())


def _to_planes(masks):
    """Masks (n, height, width) in fp32 of a picture, an array or a tensor, or of a list of these."""
    planes = []
    for mask in masks if isinstance(masks, (list, tuple)) else [masks]:
        if isinstance(mask, Image.Image):
            mask = np.array(mask.convert("L"), dtype=np.float32) / 255
        if not isinstance(mask, (np.ndarray, torch.Tensor)):
            raise ValueError(f"mask_image must be pictures, arrays or tensors, got a {type(mask).__name__}")
        planes.append(torch.atleast_2d(torch.as_tensor(mask)).float()[None].flatten(0, -3))
    sizes = sorted({tuple(plane.shape[1:]) for plane in planes})
    if len(sizes) != 1:
        raise ValueError(f"mask_image must have masks of one (height, width), got {sizes}")
    return torch.cat(planes)
