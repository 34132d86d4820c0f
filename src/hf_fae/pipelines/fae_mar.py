"""Class-conditional generation and inpainting, token by token, on any tokenizer's latents."""

import dataclasses
import math
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from ..generators.autoregressive import AutoregressiveTransformer2DModel
from ..generators.mar import MARTransformer2DModel
from ..guidance import TokenGuidance
from ..layers.positions import grid_size
from ..schedulers.learned_variance import check_num_steps, check_scheduler
from .calls import separate_call
from .class_labels import ClassLabelsMixin
from .image_inputs import ImageInput, ImageInputMixin
from .latent_pipeline import LatentPipeline, Tokenizer


__all__ = ["FAEMARPipeline"]


class FAEMARPipeline(ImageInputMixin, LatentPipeline, ClassLabelsMixin):
    """Images of a class: `transformer` generates the tokens of latents in steps -> `vae` -> images.

    Inpainting keeps the tokens of an image outside of a mask: of any mask for MAR and RandomAR, of the last rows for
    RasterAR.

    Args:
        vae: any tokenizer, such as `AutoencoderDeTok`, or diffusers' `AutoencoderKL`. Only inpainting needs a frozen
            encoder.
        transformer: `MARTransformer2DModel`, or `AutoregressiveTransformer2DModel` (RasterAR, RandomAR).
        scheduler: `head_scheduler()`, or another `DDPMScheduler` with `variance_type="learned_range"` and
            `clip_sample=False`, whose betas the diffusion head was trained with.
        id2label: names of the classes, `{id: name}`.
        guidance_scale, num_inference_steps, num_diffusion_steps, temperature: defaults of calls, saved with the
            pipeline: the settings that belong to the weights. The scale in a form of `TokenGuidance.of`.

    Raises:
        ValueError: incompatible components, or a setting that they do not support.
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
        """That of the current or latest call."""
        return self._guidance

    @property
    def guidance_scale(self) -> float:
        """The scale that guidance rises to."""
        return self._guidance.scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance.is_active

    @torch.no_grad()
    @separate_call
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        height: int | None = None,
        width: int | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
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
        """Generate images.

        Args:
            class_labels: class ids, names from `id2label`, or a list of either.
            height, width: of the images in pixels; only those of training are supported.
            image: images to inpaint, one or one for each output, of the size of the outputs.
            mask_image: what to generate anew, white in images and 1 in tensors (images or 1, height, width): every
                token with such a pixel. Its size is that of the images or of the grid of tokens; for 1-D tokenizers
                (MAETok), of the grid of tokens alone.
            image_latents: latents instead of `image` (images or 1, C, H, W), as the tokenizer's `encode` returns them.
            num_inference_steps: for MAR, steps in which tokens are generated; None for one token a step. By default
                the pipeline's own.
            num_diffusion_steps: evaluations of the diffusion head for each token; by default the pipeline's own.
            guidance_scale: the scale that guidance rises to, see `TokenGuidance`; by default the pipeline's own.
            temperature: factor of the noise that the diffusion head adds; by default the pipeline's own.
            negative_class_labels: guide away from these classes (one, or one for each label), instead of from the
                unconditional prediction.
            num_images_per_prompt: images for each label, in the order of the labels.
            generator: of all random numbers; a list has one for each image, which makes images independent of their
                batch.
            latents: noise (images, C, H, W) from which the diffusion head starts at each token.
            output_type: `"pil"`, `"np"` (B, H, W, 3) in [0, 1], `"pt"` (B, 3, H, W) in [0, 1], or `"latent"`.
            return_dict: return an `ImagePipelineOutput` instead of a tuple.
            attention_kwargs: passed to the transformer; `{"scale": s}` scales LoRA layers.
            callback_on_step_end: called as `(pipe, step, left, tensors)` after each step, `left` being the number of
                unknown tokens; the tensors that it returns replace the current ones. Latents are zero at unknown
                tokens.
            callback_on_step_end_tensor_inputs: names of these tensors; `"latents"`.

        Returns:
            `.images`.

        Raises:
            ValueError: an invalid argument; the message names it and its value.
        """
        config = self.config
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        diffusion_steps = config.num_diffusion_steps if num_diffusion_steps is None else num_diffusion_steps
        temperature = config.temperature if temperature is None else temperature
        counts = {"num_images_per_prompt": num_images_per_prompt, "num_diffusion_steps": diffusion_steps}
        counts |= {} if steps is None else {"num_inference_steps": steps}
        height, width, num_images_per_prompt, diffusion_steps, *given = self.check_inputs(
            height,
            width,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            generator=generator,
            latents=latents,
            **counts,
        )
        steps = given[0] if given else None
        self.check_settings(steps, diffusion_steps, temperature)
        guidance = TokenGuidance.of(config.guidance_scale if guidance_scale is None else guidance_scale)
        self.record(_guidance=guidance)
        labels, negative_labels = self.prepare_labels(class_labels, negative_class_labels, num_images_per_prompt)
        generator = self.prepare_generator(len(labels), generator)
        noise = self.prepare_latents(len(labels), height, width, generator, latents)
        known_latents, is_unknown = self.prepare_known(len(labels), image, mask_image, image_latents)
        order, num_known = self.prepare_order(is_unknown, generator)
        counts = self.transformer.tokens_per_step(order.shape[1] - num_known, steps)
        self.record(_num_timesteps=len(counts))

        with self.progress_bar(total=len(counts)) as progress_bar:

            def on_step(step, latents):
                left = sum(counts[step + 1 :])
                latents = self.call_back(callback_on_step_end, step, left, latents, callback_on_step_end_tensor_inputs)
                progress_bar.update()
                return latents, self.interrupt

            latents = self.transformer.generate(
                known_latents,
                noise,
                order,
                labels,
                self.scheduler,
                num_known=num_known,
                num_inference_steps=steps,
                num_diffusion_steps=diffusion_steps,
                temperature=temperature,
                guidance=guidance,
                negative_class_labels=negative_labels,
                generator=generator,
                on_step=on_step,
                attention_kwargs=attention_kwargs,
            )

        images = self.decode(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_settings(self, num_inference_steps: int | None, num_diffusion_steps: int, temperature: float) -> None:
        """Refuse settings that transformer and scheduler do not support.

        Raises:
            ValueError: an unsupported setting.
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
            ValueError: also for images of another size than in training, as positions are learned.
        """
        for name, side, own in zip(("height", "width"), (height, width), self.image_size):
            if side not in (None, own):
                raise ValueError(f"{name} must be {own}, as the transformer's positions are learned, got {side}")
        return super().prepare_latents(batch_size, height, width, generator, latents)

    def prepare_known(
        self,
        batch_size: int,
        image: ImageInput | None,
        mask_image: ImageInput | None,
        image_latents: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (batch_size, C, H, W) in fp32, and which of their tokens to generate, (batch_size, N) bool.

        Raises:
            ValueError: an image without a mask or a mask without an image, both image and latents, or another shape.
        """
        config = self.transformer.config
        shape = (batch_size, config.in_channels, *grid_size(config.sample_size))
        if mask_image is None:
            for name, value in (("image", image), ("image_latents", image_latents)):
                if value is not None:
                    raise ValueError(f"{name} must come with a mask_image, which marks what to generate, got none")
            empty = torch.zeros(shape, device=self._execution_device)
            return empty, empty.new_ones(batch_size, self.transformer.num_tokens, dtype=torch.bool)
        latents = self.prepare_image_latents(shape, self.image_size, image, image_latents)
        return latents, self.prepare_mask(batch_size, mask_image)

    def prepare_mask(self, batch_size, mask_image):
        """As in the base, (batch_size, N) of the transformer's tokens.

        Raises:
            ValueError: also for unequal numbers of tokens to generate, or none.
        """
        is_unknown = super().prepare_mask(batch_size, mask_image)
        counts = is_unknown.sum(1).tolist()
        if len(set(counts)) > 1 or counts[0] == 0:
            raise ValueError(f"mask_image must mark equally many tokens in all images, at least one, got {counts}")
        return is_unknown

    def prepare_order(
        self, is_unknown: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> tuple[torch.Tensor, int]:
        """Orders (B, N) of the tokens, known tokens first, and the number of these.

        Raises:
            ValueError: a transformer of raster order, and a known token behind an unknown one.
        """
        scores = randn_tensor(is_unknown.shape, generator=generator, device=is_unknown.device, dtype=torch.float32)
        order = self.transformer.sample_order(scores)
        known_first = order.gather(1, is_unknown.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
        if self.transformer.config.get("order") == "raster" and not torch.equal(order, known_first):
            raise ValueError(
                "mask_image must mark the last tokens, row by row, for a transformer of raster order, "
                f"got other ones among {is_unknown.shape[1]}"
            )
        return known_first, is_unknown.shape[1] - int(is_unknown[0].sum())
