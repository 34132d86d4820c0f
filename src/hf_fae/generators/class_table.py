"""The class embeddings of a class-conditional generator; the null class is the last row of the table."""

import torch
from torch import nn


__all__ = ["ClassTableMixin"]


class ClassTableMixin:
    """Adds and removes classes of a generator with `class_embedding` and `config.num_classes`."""

    def add_classes(self, rows: torch.Tensor) -> list[int]:
        """Add classes to the model; the null class stays the last row of the table.

        Args:
            rows: (n, dim), the embeddings of the new classes.

        Returns:
            Their class ids, which start at the old `config.num_classes`.

        Raises:
            ValueError: rows of another shape.
        """
        table, first = self.class_embedding.weight, self.config.num_classes
        if rows.ndim != 2 or rows.shape[1] != table.shape[1]:
            raise ValueError(f"rows must have shape (classes, {table.shape[1]}), got {tuple(rows.shape)}")
        self._set_class_table(torch.cat([table[:first], rows.to(table), table[first:]]))
        return list(range(first, first + len(rows)))

    def remove_classes(self, class_ids: list[int]) -> None:
        """Remove classes from the table; later rows, including the null class, move up.

        Raises:
            ValueError: an id that names no class.
        """
        num_classes = self.config.num_classes
        unknown = sorted(set(class_ids) - set(range(num_classes)))
        if unknown:
            raise ValueError(f"class_ids must be from 0 to {num_classes - 1}, got {unknown}")
        self._set_class_table(
            self.class_embedding.weight[[row for row in range(num_classes + 1) if row not in set(class_ids)]]
        )

    def _set_class_table(self, table):
        trained = self.class_embedding.weight.requires_grad
        self.class_embedding.weight = nn.Parameter(table.detach(), requires_grad=trained)
        self.class_embedding.num_embeddings = len(table)
        self.register_to_config(num_classes=len(table) - 1)
