"""What the libraries underneath print while a command runs."""

__all__ = ["quieten_libraries"]


def quieten_libraries() -> None:
    """Let diffusers and transformers report errors alone, and no progress of loading."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
