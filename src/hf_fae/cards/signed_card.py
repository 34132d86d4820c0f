"""Generated cards end in a hash of their text: edited ones are recognised and kept."""

import hashlib
import re
from typing import Any

import yaml
from huggingface_hub import ModelCard


__all__ = ["address_card", "is_generated", "merge_metadata", "sign"]

# Published cards end in it, so it never changes.
FOOTER = "<!-- Written by hf_fae, which replaces this card with every push until someone edits it: "


def sign(text: str) -> str:
    """A card with its hash at the end."""
    text = text.rstrip() + "\n\n"
    return f"{text}{FOOTER}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_generated(card: str) -> bool:
    """Whether a card was generated here and not edited since: the hash at its end is that of its text."""
    text = card.replace("\r\n", "\n")
    body, footer, _ = text.rpartition(FOOTER)
    return bool(footer) and sign(body).rstrip() == text.rstrip()


def address_card(card: str, repo_id: str) -> str:
    """A generated card with the name of `repo_id`, whose snippet loads it."""
    body = card.replace("\r\n", "\n").rpartition(FOOTER)[0]
    loaders = ("load_lora_weights", "from_pretrained")  # in a LoRA's snippet, from_pretrained loads its base model
    source = next(match for name in loaders if (match := re.search(rf'\b{name}\("(.*?)"', body)))
    body = body[: source.start(1)] + repo_id + body[source.end(1) :]
    name = repo_id.split("/")[-1]
    body = re.sub(r"^# .*", f"# {name}", body, count=1, flags=re.MULTILINE)
    return sign(re.sub(r"^(model-index:\n- name: ).*", rf"\g<1>{name}", body, count=1, flags=re.MULTILINE))


def merge_metadata(card: str, metadata: dict[str, Any]) -> str:
    """A card with more in its YAML head: lists are joined, other values of `metadata` replace those of the card."""
    signed = is_generated(card)
    ours = ModelCard(card.rpartition(FOOTER)[0] if signed else card)
    merged = ours.data.to_dict()
    if "license" in metadata:  # name and link of the licence belong to it
        merged = {key: value for key, value in merged.items() if not key.startswith("license")}
    for key, value in metadata.items():
        if isinstance(value, list) and isinstance(merged.get(key), list):
            value = [*merged[key], *(item for item in value if item not in merged[key])]
        merged[key] = value
    head = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True).strip()
    text = f"---\n{head}\n---\n{ours.text}"
    return sign(text) if signed else text
