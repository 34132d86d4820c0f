"""LoRA weights of a pipeline's transformer, and the new classes that come with them."""

import contextlib

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin, _fetch_state_dict


__all__ = ["TransformerLoraMixin"]

# The keys of a file: `transformer.<module>.lora_A.weight`, and `new_classes.<name>` for the embedding of a new class.
LAYERS, NEW_CLASSES = "transformer.", "new_classes."


class TransformerLoraMixin(LoraBaseMixin):
    """LoRA layers of `transformer`; if it has classes (`ClassLabelsMixin`), an adapter may add new ones.

    `set_adapters`, `disable_lora` and the rest are diffusers' and act on the layers alone: a new class stays until the
    adapter that added it is deleted or unloaded. If the adapter is fused by then, its classes stay permanently:
    `fuse_lora`, `unload_lora_weights`, `save_pretrained` save a pipeline with everything that was learned.
    """

    _lora_loadable_modules = ["transformer"]
    _lora_classes = {}  # adapter name -> names of the classes that it added; replaced, never changed in place

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict,
        *,
        weight_name: str = LORA_WEIGHT_NAME_SAFE,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        proxies: dict | None = None,
        metadata: dict | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict | None]:
        """The tensors of a LoRA file and the configuration of its layers.

        Args:
            pretrained_model_name_or_path_or_dict: Hub id, folder, or a state dict, which is returned unchanged.
            metadata: the configuration that belongs to a state dict.

        The others are as in `from_pretrained`.
        """
        return _fetch_state_dict(
            pretrained_model_name_or_path_or_dict,
            weight_name=weight_name,
            use_safetensors=True,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            force_download=force_download,
            proxies=proxies,
            token=token,
            revision=revision,
            subfolder=subfolder,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
            metadata=metadata,
        )

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict,
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = False,
        **kwargs,
    ) -> None:
        """Load LoRA layers into the transformer, and the new classes that were trained with them.

        Args:
            pretrained_model_name_or_path_or_dict: Hub id, folder, or state dict with the keys of such a file.
            adapter_name: name for `set_adapters`; a running number by default.
            hotswap: replace the layers and the classes of the adapter of this name.
            low_cpu_mem_usage: do not initialise the layers before loading them.
            kwargs: as `lora_state_dict` (`weight_name`, `revision`, `token`, ...).

        Raises:
            ValueError: the file has no LoRA layers, or some that do not fit this transformer; or a new class has
                another width, or a name that the pipeline already knows, or the pipeline is not class-conditional.

        The pipeline is then unchanged, except for an adapter that could not be hotswapped: diffusers deletes it.
        """
        state_dict, metadata = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        in_memory = isinstance(pretrained_model_name_or_path_or_dict, dict)
        source = "the state dict" if in_memory else repr(str(pretrained_model_name_or_path_or_dict))
        layers = {key: value for key, value in state_dict.items() if key.startswith(LAYERS)}
        if not layers:
            raise ValueError(f"{source} has no LoRA layers named '{LAYERS}*' to load")
        rows = {key.removeprefix(NEW_CLASSES): row for key, row in state_dict.items() if key.startswith(NEW_CLASSES)}
        replaced = self._lora_classes.get(adapter_name, []) if hotswap else []
        if rows and not hasattr(self.transformer, "class_embedding"):
            raise ValueError(f"{source} has new classes {list(rows)}, but this pipeline is not class-conditional")
        known = [name for name in rows if name in self.label2id and name not in replaced]
        if known:
            raise ValueError(f"{source} has new classes {known}, but the pipeline already knows these names")
        width = self.transformer.class_embedding.embedding_dim if rows else None
        misfits = {name: tuple(row.shape) for name, row in rows.items() if row.shape != (width,)}
        if misfits:
            raise ValueError(f"{source} must have new classes of shape ({width},) for this transformer, got {misfits}")

        _check_layers(self.transformer, layers, source)

        before = set(getattr(self.transformer, "peft_config", {}))
        with self._without_offloading():
            try:
                self.transformer.load_lora_adapter(
                    layers,
                    prefix=LAYERS.removesuffix("."),
                    adapter_name=adapter_name,
                    hotswap=hotswap,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    metadata=metadata,
                    _pipeline=self,
                )
            except Exception:
                self._remove_begun(before)
                raise
            if replaced:
                self.remove_classes(replaced)
            if rows:
                self.add_classes(rows)
        if not hotswap:
            (adapter_name,) = set(self.transformer.peft_config) - before
        self._lora_classes = {**self._lora_classes, adapter_name: list(rows)}

    def unload_lora_weights(self) -> None:
        """Remove all LoRA layers and their new classes: the original model, except for fused adapters."""
        fused = self._fused_adapters()
        super().unload_lora_weights()
        self._merged_adapters = set()
        self._forget_classes(list(self._lora_classes), fused)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove the LoRA layers and the new classes of these adapters; the class numbers after them decrease."""
        fused = self._fused_adapters()
        super().delete_adapters(adapter_names)
        self._forget_classes([adapter_names] if isinstance(adapter_names, str) else adapter_names, fused)

    def fuse_lora(self, components: list[str] | None = None, **kwargs) -> None:
        """As diffusers' `fuse_lora`; the transformer by default."""
        super().fuse_lora(components or self._lora_loadable_modules, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs) -> None:
        """As diffusers' `unfuse_lora`; the transformer by default."""
        super().unfuse_lora(components or self._lora_loadable_modules, **kwargs)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory,
        transformer_lora_layers: dict,
        transformer_lora_adapter_metadata: dict | None = None,
        new_classes: dict[str, torch.Tensor] | None = None,
        weight_name: str | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Save LoRA layers and the classes that were trained with them as one safetensors file.

        Args:
            save_directory: folder, created if needed.
            transformer_lora_layers: `peft.get_peft_model_state_dict(pipe.transformer)`.
            transformer_lora_adapter_metadata: `pipe.transformer.peft_config["default"].to_dict()`; without it the
                loader assumes that `lora_alpha` is the rank.
            new_classes: name -> embedding (dim,) of the classes that the pipeline did not have.
            weight_name: file name, by default `pytorch_lora_weights.safetensors`.
            is_main_process: other processes write nothing.
        """
        if not is_main_process:  # diffusers accepts the argument and writes all the same
            return
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={
                LAYERS.removesuffix("."): transformer_lora_layers,
                NEW_CLASSES.removesuffix("."): new_classes or {},
            },
            lora_metadata={LAYERS.removesuffix("."): transformer_lora_adapter_metadata},
            weight_name=weight_name,
            save_function=None,
            safe_serialization=True,
        )

    def _remove_begun(self, before):
        """Remove what a failed load left of its adapter; `before` are the earlier adapters."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapters = getattr(self.transformer, "peft_config", {})
        kept = before & set(adapters)  # without one that diffusers could not hotswap, and has deleted
        for name in set(adapters) - kept:
            del adapters[name]
        for name, module in list(self.transformer.named_modules()):
            if isinstance(module, BaseTunerLayer):
                for adapter in set(module.lora_A) - kept:
                    module.delete_adapter(adapter)
                if not module.lora_A:
                    self.transformer.set_submodule(name, module.base_layer)
        if not kept:
            self.transformer.unload_lora()
        if lost := [name for name in before - kept if name in self._lora_classes]:
            self._forget_classes(lost, fused=set())

    def _fused_adapters(self):
        return {name for module in self.transformer.modules() for name in getattr(module, "merged_adapters", ())}

    def _forget_classes(self, adapters, fused):
        """Remove the classes of `adapters`, which are gone; those of fused ones stay without an owner."""
        names = [name for adapter in adapters if adapter not in fused for name in self._lora_classes.get(adapter, [])]
        self._lora_classes = {key: value for key, value in self._lora_classes.items() if key not in adapters}
        if names:
            with self._without_offloading():
                self.remove_classes(names)

    @contextlib.contextmanager
    def _without_offloading(self):
        """Hooks that move weights keep the old class table: remove them while it changes."""
        model_offload, sequential_offload, group_offload = self._optionally_disable_offloading(self)
        try:
            yield
        finally:
            if model_offload:
                self.enable_model_cpu_offload()
            elif sequential_offload:
                self.enable_sequential_cpu_offload()
            elif group_offload:
                _maybe_remove_and_reapply_group_offloading(self.transformer)


def _check_layers(transformer, layers, source):
    """Compare names and shapes of LoRA layers with the linear layers (or convolutions) that they extend.

    Raises:
        ValueError: naming the first key that does not fit.
    """
    modules = dict(transformer.named_modules())
    for key, value in layers.items():
        name, _, kind = key.removeprefix(LAYERS).rpartition(".lora_")
        module = modules.get(name)
        module = getattr(module, "base_layer", module)  # beneath another adapter
        if isinstance(module, torch.nn.Linear):  # whose weight may be packed
            shape = (module.out_features, module.in_features)
        else:
            shape = tuple(getattr(module, "weight", torch.empty(0)).shape)
        if len(shape) < 2:
            raise ValueError(f"{source} has {key!r}, but this transformer has no layer for it")
        if kind not in ("A.weight", "B.weight"):
            continue
        other = layers.get(f"{LAYERS}{name}.lora_{'B' if kind[0] == 'A' else 'A'}.weight")
        if other is None:
            raise ValueError(f"{source} has {key!r} without the other one of lora_A and lora_B")
        rank = (value if kind[0] == "A" else other).shape[:1]
        expected = (*rank, *shape[1:]) if kind[0] == "A" else (shape[0], *rank, *[1] * (len(shape) - 2))
        if tuple(value.shape) != expected:
            raise ValueError(f"{source} has {key!r} of shape {tuple(value.shape)}, where {expected} fits")
