"""The layout of the page, and the server."""

import os
from pathlib import Path

import gradio as gr

from ..evaluation.inputs.spaces import SPACES
from ..evaluation.reports.sheets import TITLES
from .events import MAX_IMAGES, MAX_SCALE, MAX_SEED, MAX_STEPS, MAX_TEXT, Demo
from .served_models import Models, default_models


__all__ = ["build", "main"]

MAX_UPLOAD = "32mb"
UPLOAD_SECONDS = 3600  # how long uploads and images stay on the server's disk


def build(models: list[str], image_encoder: str | None = None, text_encoder: str | None = None) -> gr.Blocks:
    """The page.

    Args:
        models: folders or Hub ids of pipelines; the first one is opened with the page.
        image_encoder, text_encoder: as for `Models`.
    """
    demo = Demo(Models(image_encoder, text_encoder))
    # Models are not thread-safe: events that need one run one after the other.
    one_at_a_time = {"concurrency_id": "models", "concurrency_limit": 1}
    with gr.Blocks(title="hf_fae", analytics_enabled=False, delete_cache=(UPLOAD_SECONDS, UPLOAD_SECONDS)) as page:
        gr.Markdown(
            "# Image generation in the feature space of a frozen encoder\n"
            "A tokenizer ([FAE](https://arxiv.org/abs/2512.07829)) compresses the features of a vision encoder into "
            "compact latents and decodes them to features and images. A generator samples new latents."
        )
        with gr.Row():
            model = gr.Dropdown(_choices(models), label="Generator", value=models[0])
            about = gr.Markdown(min_height=40)
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=1):
                # The server never learns the choices that the page gets with the model, and would refuse all values.
                label = gr.Dropdown([], label="Class", allow_custom_value=True)
                prompt = gr.Textbox("teddy bear", label="Text", visible=False, max_length=MAX_TEXT)
                count = gr.Slider(1, MAX_IMAGES, value=4, step=1, label="Images")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                steps = gr.Slider(1, MAX_STEPS, value=50, step=1, label="Steps")
                scale = gr.Slider(0, MAX_SCALE, value=1, step=0.1, label="Guidance")
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=2):
                gallery = gr.Gallery(show_label=False, height="max-content", format="png", elem_id="gallery")
        with gr.Tab("Reconstruct"):
            with gr.Row():
                reconstruct_upload = _upload()
                scores = gr.Markdown("Upload an image to compare it with its reconstruction from latents.")
            with gr.Row():
                original, reconstruction = _image("Image, cropped"), _image("Reconstruction")
        with gr.Tab("Patch similarity"):
            with gr.Row():
                patches_upload = _upload()
                colours = gr.Markdown("Upload an image and click a patch to see which other patches are similar.")
            with gr.Row():
                clicked = _image("Click here", elem_id="clicked")
                heat_maps = [_image(TITLES[space].capitalize()) for space in SPACES]
            patches = gr.State()

        settings = [about, label, prompt, steps, scale, button]
        gr.on([page.load, model.change], demo.choose, model, settings, show_progress_on=about, **one_at_a_time)
        button.click(demo.generate, [model, label, prompt, count, seed, steps, scale], gallery, **one_at_a_time)
        for upload, event, state, images, text in (
            (reconstruct_upload, demo.reconstruct, [], [original, reconstruction], scores),
            (patches_upload, demo.open_patches, [patches], [clicked, *heat_maps], colours),
        ):
            outputs = [*state, *images, text]
            triggers = [upload.upload, model.change]
            gr.on(triggers, event, [model, upload], outputs, show_progress_on=images, **one_at_a_time)
        clicked.select(demo.click_patch, patches, [clicked, *heat_maps, colours], show_progress="hidden")
    return page


def _choices(models):
    """(name, value) of each model: folders by their last part, if these differ."""
    names = [Path(model).resolve().name if os.path.isdir(model) else model for model in models]
    return list(zip(names if len(set(names)) == len(names) else models, models, strict=True))


def _upload():
    # `gr.Image` fails on files that are not images without an error that could be shown.
    return gr.File(label="An image", file_types=["image"], type="binary", height=130)


def _image(title, **kwargs):
    """An image below its title; gradio's own label would cover a corner of it."""
    with gr.Column(min_width=200):
        gr.Markdown(f"**{title}**")
        return gr.Image(show_label=False, format="png", interactive=False, buttons=[], **kwargs)


def main(
    models: list[str] | None = None,
    image_encoder: str | None = None,
    text_encoder: str | None = None,
    host: str | None = None,
    port: int | None = None,
) -> None:
    """Serve the page until interrupted.

    Args:
        models, image_encoder, text_encoder: as for `build`; by default `default_models()`.
        host, port: by default those of the variables GRADIO_SERVER_NAME and GRADIO_SERVER_PORT, as in a Space, else
            the loopback address and the first free port from 7860.

    Raises:
        ValueError: there are no models, or no such port.
        OSError: the port is taken.
    """
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"port must be from 1 to 65535, got {port}")
    page = build(models or default_models(), image_encoder, text_encoder)
    # gradio's own fonts lack half of their bold letters
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(server_name=host, server_port=port, max_file_size=MAX_UPLOAD, theme=theme, footer_links=["api"])
