"""Model cards: what a saved folder says about itself, and what its training adds.

`render_card` reads the saved configs, so a card always agrees with the saved files; [`TrainingRun`] adds what no
config states. Unknown facts are left out. The templates are in `model_cards/`, one for each kind of folder.
"""

from .folder_facts import ORIGIN, latest_images
from .hub_metadata import EVAL_RESULTS, write_eval_results
from .rendering import render_card, write_card
from .signed_card import address_card, is_generated, merge_metadata
from .training_run import Result, TrainingRun


__all__ = [
    "EVAL_RESULTS",
    "ORIGIN",
    "Result",
    "TrainingRun",
    "address_card",
    "is_generated",
    "latest_images",
    "merge_metadata",
    "render_card",
    "write_card",
    "write_eval_results",
]
