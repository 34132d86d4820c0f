"""LoRA weights of a pipeline's transformer."""

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin


__all__ = ["TransformerLoraMixin"]


class TransformerLoraMixin(LoraBaseMixin):
    """`load_lora_weights` and `save_lora_weights`; `set_adapters`, `fuse_lora` and the rest are diffusers'."""

    _lora_loadable_modules = ["transformer"]

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, **kwargs
    ) -> None:
        """Load LoRA layers into the transformer.

        Args:
            pretrained_model_name_or_path_or_dict: Hub id, folder, or state dict with keys `transformer.*.lora_*`.
            adapter_name: name for `set_adapters`; a running number by default.
            kwargs: as diffusers' `load_lora_adapter` (`weight_name`, `revision`, `token`, ...).

        Raises:
            ValueError: the file has no LoRA layers for this transformer.
        """
        kwargs.setdefault("weight_name", LORA_WEIGHT_NAME_SAFE)
        before = set(getattr(self.transformer, "peft_config", {}))
        self.transformer.load_lora_adapter(
            pretrained_model_name_or_path_or_dict,
            prefix="transformer",
            adapter_name=adapter_name,
            _pipeline=self,
            **kwargs,
        )
        if set(getattr(self.transformer, "peft_config", {})) == before:
            raise ValueError(
                f"{pretrained_model_name_or_path_or_dict!r} has no LoRA layers named 'transformer.*' to load"
            )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory,
        transformer_lora_layers: dict,
        transformer_lora_adapter_metadata: dict | None = None,
        weight_name: str | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Save LoRA layers as safetensors.

        Args:
            save_directory: folder, made if need be.
            transformer_lora_layers: `peft.get_peft_model_state_dict(pipe.transformer)`.
            transformer_lora_adapter_metadata: `pipe.transformer.peft_config["default"].to_dict()`; without it the
                loader has to assume that `lora_alpha` is the rank.
            weight_name: file name, by default `pytorch_lora_weights.safetensors`.
            is_main_process: other processes write nothing.
        """
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={"transformer": transformer_lora_layers},
            lora_metadata={"transformer": transformer_lora_adapter_metadata},
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=None,
            safe_serialization=True,
        )
