"""Faults of the Hub, through every way to load: the message has the real cause and what to do."""

import functools
from pathlib import Path
from typing import NamedTuple

from hub_server import HubError, LocalHub

from .case import Case, assert_sentence


__all__ = ["CASES"]

# What a user runs. Each prints the error that it ends with.
LOADERS = {
    "pipeline": "hf_fae.FAEDiTPipeline.from_pretrained('u/m')",
    "any pipeline": "hf_fae.loading.open_pipeline('--model', 'u/m')",
    "tokenizer": "hf_fae.AutoencoderFAE.from_pretrained('u/m', image_encoder=None)",
    "revision": "hf_fae.AutoencoderFAE.from_pretrained('u/m', revision='v2', image_encoder=None)",
    "generator": "hf_fae.LightningDiTTransformer2DModel.from_pretrained('u/m')",
    "encoder": "hf_fae.encoders.VisionEncoder.from_pretrained('u/m')",
    "text encoder": "hf_fae.text.load_text_encoder('u/m')",
    "published weights": "hf_fae.load_published('dit-xl-2-256')",
    "hf-fae reconstruct": "hf_fae.loading.open_tokenizer('u/m')",
    "hf-fae generate": "hf_fae.cli.main(['generate', '--model', 'u/m', '--class', '0', '--output', 'x.png'])",
}
CLIENT = """
import hf_fae, hf_fae.cli, hf_fae.encoders, hf_fae.loading, hf_fae.text
from diffusers.utils import logging
logging.set_verbosity(logging.CRITICAL)
import contextlib, io
said = io.StringIO()
try:
    with contextlib.redirect_stderr(said):
        {call}
except (ValueError, OSError) as error:
    print(error)
except SystemExit:
    print(said.getvalue().strip().splitlines()[-1])
"""


class Fault(NamedTuple):
    """What the server answers, what a message must say of it, and what the client's environment has."""

    answer: HubError | None
    says: tuple[str, ...]
    environment: dict[str, str] = {}


FAULTS = {
    "401": Fault(HubError(401, "Invalid username or password."), ("refuses the access token", "hf auth login")),
    "gated": Fault(HubError(403, "Access is restricted", "GatedRepo"), ("is gated", "request access")),
    "403": Fault(HubError(403, "Forbidden"), ("lacks the permission",)),
    "404": Fault(HubError(404, "Not found", "RepoNotFound"), ("no such repository", "check the name")),
    "revision": Fault(HubError(404, "Invalid rev id: v2", "RevisionNotFound"), ("no such revision",)),
    "429": Fault(HubError(429, "Too many requests"), ("refuses more requests",)),
    "500": Fault(HubError(500, "Internal error"), ("answers with an error (500)", "try again later")),
    "no network": Fault(None, ("cannot be reached", "check the network"), {"HF_ENDPOINT": "http://127.0.0.1:9"}),
    "offline": Fault(None, ("HF_HUB_OFFLINE", "hf download"), {"HF_HUB_OFFLINE": "1"}),
}


class FaultyHub(LocalHub):
    """Answers every question about a repository with `fault`."""

    fault: HubError | None = None

    def repository(self, repo_id, repo_type="model"):
        if self.fault is not None:
            raise self.fault
        return super().repository(repo_id, repo_type)


def _case(loader: str, fault: str) -> Case:
    return Case(f"{loader}, {fault}", functools.partial(_run, loader, FAULTS[fault]))


def _run(loader: str, fault: Fault, folder: Path) -> None:
    with FaultyHub(folder) as hub:
        hub.fault = fault.answer
        hub.processes.environment |= fault.environment  # before the libraries are imported
        said = hub.run(CLIENT.format(call=LOADERS[loader]))
    assert_sentence(said, *fault.says)
    assert "outgoing traffic" not in said and "fully cached" not in said


CASES = [
    _case("any pipeline", "401"),
    _case("hf-fae reconstruct", "gated"),
    _case("encoder", "500"),
    _case("text encoder", "gated"),
    _case("tokenizer", "401"),
    _case("generator", "404"),
    _case("pipeline", "500"),
    _case("revision", "revision"),
    _case("published weights", "429"),
    _case("hf-fae generate", "no network"),
    _case("tokenizer", "offline"),
    _case("encoder", "403"),
    _case("published weights", "no network"),
]
