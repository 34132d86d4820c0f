"""Push a saved folder to the Hub in one commit, with its model card."""

import json
import re
import shutil
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from .cards import EVAL_RESULTS, ORIGIN, address_card, is_generated, latest_images, merge_metadata, render_card


__all__ = ["ModelCardMixin", "push_folder"]

# All that is pushed; other files in a run's folder (checkpoints, tracker logs, an `.env`) are not.
TOP_LEVEL = [
    "README.md",
    EVAL_RESULTS,
    ORIGIN,
    "model_index.json",
    "config.json",
    "*.safetensors",
    "*.safetensors.index*.json",
    "config.yaml",
    "log.jsonl",
    "damaged_rows.json",
]
COMPONENT = ["*.json", "*.safetensors", "*.txt"]
ENCODER = "image_encoder.d"
# One set of weights is one file, or shards and an index; the groups leave out what tells these files apart.
WEIGHTS = re.compile(r"(.*?)(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[^/]+)?\.json)?")
VALIDATION_IMAGE = re.compile(r"validation/[^/]+-\d+\.png")


class ModelCardMixin:
    """`push_to_hub` and `save_pretrained(push_to_hub=True)` of a diffusers class, with the cards of this package."""

    def _upload_folder(
        self, working_dir, repo_id, token=None, commit_message=None, create_pr=False, subfolder=None
    ) -> CommitInfo:
        """Both of diffusers' ways to push call this last: the folder is complete, and holds diffusers' own card."""
        if subfolder is not None:  # a part of another repository, which has no card of its own
            options = {"commit_message": commit_message, "create_pr": create_pr, "subfolder": subfolder}
            return super()._upload_folder(working_dir, repo_id, token=token, **options)
        origin = Path(self.config.get("_name_or_path") or "", ORIGIN)  # of published weights, which keep their licence
        if origin.is_file():
            shutil.copy(origin, working_dir)
        Path(working_dir, "README.md").write_text(render_card(working_dir, repo_id=repo_id), encoding="utf-8")
        Path(working_dir, EVAL_RESULTS).unlink(missing_ok=True)  # results of earlier weights
        commit_message = commit_message or f"Upload {type(self).__name__}"
        return push_folder(working_dir, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a saved folder in one commit: an interrupted push leaves the repository unchanged.

    The files that our classes save are pushed, and from a run's folder also `config.yaml`, `log.jsonl`,
    `damaged_rows.json` and the newest validation images; nothing else is. The same commit deletes files that would be
    loaded or shown with the new weights but belong to others: other shards of the same weights, a frozen encoder that
    the folder does not have, results and images of other weights. Another `variant` of the weights stays.

    A generated card gets `repo_id` into its snippet. An edited card on the Hub is kept; if it is metadata alone, as
    the Hub's web form writes it, these are merged into the generated card.

    Args:
        folder: a saved folder with the card of [`write_card`].
        repo_id: repository, created if it does not exist.
        private: whether a new repository is private.
        token: by default the one of `hf auth login`.
        create_pr: open a pull request instead of committing.

    Raises:
        ValueError: the folder does not exist.
        HfHubHTTPError: among others, the repository has got a commit in the meantime.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder must be a folder that exists, got {str(folder)!r}")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    info = api.model_info(repo_id)
    on_hub = {file.rfilename for file in info.siblings}
    contents = {path.relative_to(folder).as_posix(): path for path in _files_to_push(folder)}
    if (card := _card(folder, api, repo_id, info.sha if "README.md" in on_hub else None)) is not None:
        contents["README.md"] = card.encode()
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    operations += [CommitOperationDelete(name) for name in sorted(_outdated(on_hub, contents.keys(), card or ""))]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or f"Upload {folder.name}",
        create_pr=create_pr,
        parent_commit=info.sha,  # the card that was read is the one that is replaced
    )


def _files_to_push(folder: Path) -> list[Path]:
    index = folder / "model_index.json"
    config = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    parts = [name for name, value in config.items() if isinstance(value, list)]
    parts += [f"{part}/{ENCODER}" for part in parts] + [ENCODER]
    patterns = TOP_LEVEL + [f"{part}/{pattern}" for part in parts for pattern in COMPONENT]
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(paths.union(latest_images(folder)))


def _outdated(on_hub: set[str], pushed: set[str], card: str) -> set[str]:
    """Files on the Hub that would pass for a part of what is pushed, and images that the card does not show."""
    weights = {_weights_name(name) for name in pushed} - {None}
    models = {name.removesuffix("config.json") for name in pushed if re.fullmatch(r"(.*/)?config\.json", name)}
    encoders = tuple(f"{model}{ENCODER}/" for model in models if f"{model}{ENCODER}/config.json" not in pushed)
    return {
        name
        for name in on_hub - pushed
        if _weights_name(name) in weights
        or name.startswith(encoders)
        or name == EVAL_RESULTS
        or (VALIDATION_IMAGE.fullmatch(name) and name not in card)
    }


def _weights_name(path: str) -> str | None:
    """The name that all files of the same weights share, such as `vae/diffusion_pytorch_model.fp16`; else None."""
    match = WEIGHTS.fullmatch(path)
    return match and match[1] + (match[4] or "")


def _card(folder: Path, api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The card to push: that of the folder, or an edited one on the Hub; None where there is neither.

    Args:
        revision: commit of the card on the Hub, None without one.
    """
    path = folder / "README.md"
    ours = path.read_text(encoding="utf-8") if path.is_file() else None
    generated = ours is not None and is_generated(ours)
    if generated:
        ours = address_card(ours, repo_id)
    if revision is None:
        return ours
    theirs = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_bytes().decode()
    card = ModelCard(theirs)
    if is_generated(theirs):
        # The web form may have set the licence before an earlier push.
        licence = {key: value for key, value in card.data.to_dict().items() if key.startswith("license")}
        keeps = generated and licence and ModelCard(ours).data.license is None
        return merge_metadata(ours, licence) if keeps else ours
    if ours is not None and not card.text.strip():
        return merge_metadata(ours, card.data.to_dict())
    if card.data.library_name is not None:
        return theirs
    card.data.library_name = "diffusers"  # as diffusers sets it
    return str(card)
