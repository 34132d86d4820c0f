"""The web demo: generate from a class or a text, reconstruct an image, compare its patches.

`hf-fae demo`, `python -m hf_fae.app`, or a Hugging Face Space whose `app.py` is a copy of `__main__.py`.
"""

from .events import Demo
from .page import build, main
from .served_models import Models, default_models


__all__ = ["Demo", "Models", "build", "default_models", "main"]
