"""Class labels by number or by name, in all class-conditional pipelines."""

import difflib

import numpy as np
import torch

from ..utils.whole_numbers import whole_number


__all__ = ["ClassLabelsMixin"]


class ClassLabelsMixin:
    """Adds `id2label` to a pipeline with a `transformer` that has `config.num_classes` classes."""

    def register_labels(self, id2label: dict[int, str] | None) -> None:
        """Save `id2label` with the pipeline. In "tench, Tinca tinca" each synonym is a name.

        Raises:
            ValueError: a key that is no class of the transformer.
        """
        if id2label is not None:
            if not isinstance(id2label, dict) or not all(isinstance(name, str) for name in id2label.values()):
                raise ValueError(f"id2label must be a dict of class ids and names, got {id2label!r}")
            # JSON has turned the keys of a loaded pipeline into strings.
            id2label = {int(key): name for key, name in id2label.items()}
        if id2label and self.transformer is not None:
            num_classes = self.transformer.config.num_classes or 0  # None for text-conditional ones
            for key in id2label:
                if not 0 <= key < num_classes:
                    raise ValueError(f"id2label must have keys below {num_classes}, got {key}")
        self.id2label = id2label or {}
        self.register_to_config(id2label=id2label)  # after the attribute, which diffusers also writes to the config
        self.label2id = {}
        # ImageNet has some names twice ("crane", "maillot"): the first class keeps the name. Whole names win over
        # synonyms.
        for key, names in self.id2label.items():
            self.label2id.setdefault(names, key)
        for key, names in self.id2label.items():
            for synonym in names.split(","):
                self.label2id.setdefault(synonym.strip(), key)

    def add_classes(self, rows: dict[str, torch.Tensor]) -> None:
        """Add new classes to the transformer; the null class stays the last one.

        Args:
            rows: name -> embedding (dim,) of each new class.

        Raises:
            ValueError: a known name, or an embedding of another shape.
        """
        known = [name for name in rows if name in self.label2id]
        if known:
            raise ValueError(f"rows must name new classes, but the pipeline already knows {known}")
        ids = self.transformer.add_classes(torch.stack(list(rows.values())))
        self.register_labels({**self.id2label, **dict(zip(ids, rows, strict=True))})

    def remove_classes(self, names: list[str]) -> None:
        """Remove classes from the transformer; the numbers of the classes after them decrease.

        Raises:
            ValueError: an unknown name.
        """
        removed = set(self.label_ids(names, "names"))
        kept = [class_id for class_id in range(self.transformer.config.num_classes) if class_id not in removed]
        self.transformer.remove_classes(sorted(removed))
        labels = {new: self.id2label[old] for new, old in enumerate(kept) if old in self.id2label}
        self.register_labels(labels or None)

    def prepare_labels(
        self,
        class_labels: int | str | list[int | str] | np.ndarray | torch.Tensor,
        negative_class_labels: int | str | list[int | str] | None = None,
        num_images_per_prompt: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Class ids (images,) to generate, and those to guide away from: by default the null class.

        Raises:
            ValueError: an unknown class, or a number of negative ones that is neither one nor one per label.
        """
        label_ids = self.label_ids(class_labels, "class_labels")
        labels = torch.tensor(label_ids, device=self._execution_device)
        if negative_class_labels is None:
            negative_labels = torch.full_like(labels, self.transformer.config.num_classes)
        else:
            negative_ids = self.label_ids(negative_class_labels, "negative_class_labels")
            if len(negative_ids) not in (1, len(label_ids)):
                raise ValueError(
                    f"negative_class_labels must be one class or {len(label_ids)} as class_labels, "
                    f"got {len(negative_ids)}"
                )
            negative_labels = torch.tensor(negative_ids, device=self._execution_device).expand(len(label_ids))
        return tuple(ids.repeat_interleave(num_images_per_prompt) for ids in (labels, negative_labels))

    def label_ids(self, class_labels: int | str | list[int | str] | torch.Tensor, name: str) -> list[int]:
        """Class ids of numbers, names or a list of either; errors call the argument `name`.

        Raises:
            ValueError: an unknown name, a number out of range, something that is neither, or an empty list.
        """
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.tolist()
        labels = list(class_labels) if isinstance(class_labels, (list, tuple)) else [class_labels]
        if not labels:
            raise ValueError(f"{name} must name at least one class, got {class_labels!r}")
        return [self._label_id(label, name) for label in labels]

    def _label_id(self, label: int | str, name: str) -> int:
        num_classes = self.transformer.config.num_classes
        if isinstance(label, str):
            if label in self.label2id:
                return self.label2id[label]
            if not self.label2id:
                raise ValueError(f"{name} must be numbers, as this pipeline has no id2label; got {label!r}")
            close = difflib.get_close_matches(label, self.label2id, n=3)
            raise ValueError(
                f"{name} has the unknown name {label!r}; "
                + (f"did you mean {' or '.join(map(repr, close))}?" if close else "see `pipe.id2label` for all names")
            )
        class_id = whole_number(label)
        if class_id is None:
            raise ValueError(f"{name} must be numbers or names of classes, got {label!r}")
        if not 0 <= class_id < num_classes:
            raise ValueError(f"{name} must be from 0 to {num_classes - 1}, got {class_id}")
        return class_id
