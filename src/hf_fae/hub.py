"""Pushing to the Hub: one commit for a folder, with its model card."""

from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects

from .cards import EVAL_RESULTS, is_generated, latest_pictures, render_card


__all__ = ["ModelCardMixin", "push_folder"]

# What a training leaves in its folder and nobody needs who loads the result: checkpoints (with the optimiser's state),
# half-written files, trackers' logs.
NOT_PUSHED = ["checkpoint-*", ".checkpoint-*", "*.part", "tensorboard/*", "wandb/*", ".git/*", ".cache/*"]


class ModelCardMixin:
    """Gives `push_to_hub` and `save_pretrained(push_to_hub=True)` of a diffusers class the cards of this package."""

    def _upload_folder(
        self, working_dir, repo_id, token=None, commit_message=None, create_pr=False, subfolder=None
    ) -> CommitInfo:
        """Where both of diffusers' ways to push end: the folder is complete, and holds diffusers' own card."""
        if subfolder is not None:  # a part of someone's repository, which has no card of its own
            return super()._upload_folder(working_dir, repo_id, token, commit_message, create_pr, subfolder)
        Path(working_dir, "README.md").write_text(render_card(working_dir, repo_id=repo_id), encoding="utf-8")
        Path(working_dir, EVAL_RESULTS).unlink(missing_ok=True)  # of what was saved there before
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
    """Upload a saved folder in one commit: cut off in the middle, the repository stays as it was.

    Of a training's folder, the result, `config.yaml`, `log.jsonl` and the newest validation pictures are pushed;
    checkpoints and trackers' logs are not. A card on the Hub that someone has edited is kept.

    Args:
        folder: as saved, with the card of [`write_card`].
        repo_id: repository, made if need be.
        private: of a new repository.
        token: by default the one of `hf auth login`.
        create_pr: open a pull request instead of committing.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder must be a folder that exists, got {str(folder)!r}")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    on_hub = set(api.list_repo_files(repo_id))
    contents = _files_to_push(folder)
    if "README.md" in on_hub and (card := _edited_card(api, repo_id)):
        contents["README.md"] = card.encode()
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    if EVAL_RESULTS in on_hub and EVAL_RESULTS not in contents:  # the results of other weights
        operations.append(CommitOperationDelete(EVAL_RESULTS))
    return api.create_commit(
        repo_id, operations, commit_message=commit_message or f"Upload {folder.name}", create_pr=create_pr
    )


def _files_to_push(folder: Path) -> dict[str, Path | bytes]:
    """Path in the repository -> file."""
    old_pictures = set((folder / "validation").glob("*-*.png")) - set(latest_pictures(folder))
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in old_pictures]
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: files[name] for name in filter_repo_objects(files, ignore_patterns=NOT_PUSHED)}


def _edited_card(api: HfApi, repo_id: str) -> str | None:
    """The card on the Hub with `library_name` filled in, as diffusers does it; None if it is ours to replace."""
    text = Path(api.hf_hub_download(repo_id, "README.md")).read_bytes().decode()
    if is_generated(text):
        return None
    card = ModelCard(text)
    if card.data.library_name is not None:
        return text
    card.data.library_name = "diffusers"
    return str(card)
