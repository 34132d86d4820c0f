"""The trained part of a LoRA fine-tuning: low-rank layers, and the embeddings of new classes."""

import torch
from torch import nn
from torch.nn.utils import parametrize


__all__ = ["LORA_TARGETS", "add_lora", "lora_weights"]

# The linear layers of attention and feed-forward, by the ends of their names; then those of an MMDiT's text stream.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
TEXT_TARGETS = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2"]


class _NewRows(nn.Module):
    """A class table whose last rows before the null class are a separate parameter; all others are frozen."""

    def __init__(self, table, count):
        super().__init__()
        self.rows = nn.Parameter(table[-1 - count : -1].detach().clone())

    def forward(self, table):
        return torch.cat([table[: -1 - len(self.rows)], self.rows, table[-1:]])


def add_lora(
    transformer: nn.Module,
    rank: int,
    lora_alpha: float,
    target_modules: list[str] | None = None,
    new_classes: int = 0,
) -> None:
    """Freeze `transformer` except for new LoRA layers and the embeddings of its last classes.

    Args:
        transformer: a generator; for new classes one with `class_embedding`, the null class last.
        rank, lora_alpha: of the layers, which add lora_alpha / rank * B A to a weight.
        target_modules: ends of the names of linear layers; by default those of attention and feed-forward.
        new_classes: number of trained embeddings.

    Raises:
        ValueError: `rank` is not positive, or a target is no linear layer of `transformer`.
    """
    from peft import LoraConfig

    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    linear = [f".{name}" for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]

    def is_there(target):
        return any(name.endswith(f".{target}") for name in linear)

    if target_modules is None:
        target_modules = [target for target in LORA_TARGETS + TEXT_TARGETS if is_there(target)]
    for target in target_modules:
        if not is_there(target):
            raise ValueError(
                f"target_modules must be ends of the names of linear layers, such as {LORA_TARGETS}, got {target!r}"
            )
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=target_modules))
    if new_classes:
        embedding = transformer.class_embedding
        parametrize.register_parametrization(embedding, "weight", _NewRows(embedding.weight, new_classes))


def lora_weights(transformer: nn.Module, new_classes: list[str]) -> dict:
    """The weights that `add_lora` made trainable, as arguments of `save_lora_weights`.

    Args:
        new_classes: names of the last classes of `transformer`.
    """
    from peft import get_peft_model_state_dict

    rows = []
    if new_classes:
        num_classes = transformer.config.num_classes
        rows = transformer.class_embedding.weight[num_classes - len(new_classes) : num_classes].detach()
    metadata = transformer.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, whose order changes from run to run
    return {
        "transformer_lora_layers": get_peft_model_state_dict(transformer),
        "transformer_lora_adapter_metadata": metadata,
        "new_classes": {name: row.clone() for name, row in zip(new_classes, rows, strict=True)},
    }
