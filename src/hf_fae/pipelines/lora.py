"""LoRA weights of a pipeline's transformer."""

from diffusers.loaders.lora_base import LoraBaseMixin


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
        self.transformer.load_lora_adapter(
            pretrained_model_name_or_path_or_dict,
            prefix="transformer",
            adapter_name=adapter_name,
            _pipeline=self,
            **kwargs,
        )
        if not getattr(self.transformer, "peft_config", None):
            raise ValueError(
                f"{pretrained_model_name_or_path_or_dict!r} has no LoRA layers named 'transformer.*' to load"
            )

    @classmethod
    def save_lora_weights(cls, save_directory, transformer_lora_layers: dict, **kwargs) -> None:
        """Save LoRA layers (`peft.get_peft_model_state_dict(pipe.transformer)`) as safetensors."""
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={"transformer": transformer_lora_layers},
            lora_metadata={"transformer": None},
            **{"is_main_process": True, "weight_name": None, "save_function": None, "safe_serialization": True} | kwargs,
        )
