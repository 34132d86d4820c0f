"""The base of every model here: diffusers' `ModelMixin` with strict loading and our model cards."""

import inspect

from diffusers import ConfigMixin, ModelMixin

from .hub import ModelCardMixin


__all__ = ["StrictModelMixin"]


class StrictModelMixin(ModelCardMixin, ModelMixin, ConfigMixin):
    """Strict loading: unknown config keys and missing or unexpected weights raise at once.

    diffusers only logs them, and leaves missing weights on the meta device, which fails much later.
    """

    config_name = "config.json"

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        known = inspect.signature(cls.__init__).parameters
        # Keys of diffusers itself (`_class_name`, `quantization_config`, ...) are not checked.
        unknown = sorted(k for k in config_dict if k not in known and k[0] != "_" and k != "quantization_config")
        if unknown:
            raise ValueError(f"config of {cls.__name__} has unknown keys {unknown}; known keys are {list(known)[1:]}")
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, output_loading_info=False, **kwargs):
        """As diffusers' `ModelMixin.from_pretrained`.

        Raises:
            ValueError: the checkpoint has missing or unexpected weights, or its config has unknown keys.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys"):
            if info[kind]:
                raise ValueError(
                    f"the weights at {str(pretrained_model_name_or_path)!r} do not fit {cls.__name__}: "
                    f"{len(info[kind])} {kind.replace('_', ' ')}, for example {sorted(info[kind])[:3]}"
                )
        return (model, info) if output_loading_info else model
