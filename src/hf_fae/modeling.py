"""The base of every model here: diffusers' `ModelMixin` with strict loading and our model cards."""

import inspect

from diffusers import ConfigMixin, ModelMixin

from .hub import ModelCardMixin
from .utils.config_bounds import check_config
from .utils.hub_errors import hub_errors
from .utils.weights import check_dtypes, check_weights, read_dtypes


__all__ = ["StrictModelMixin"]


# What diffusers itself writes into configs: quantization, and the state of an `EMAModel`.
DIFFUSERS_KEYS = {
    "quantization_config",
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
}


class StrictModelMixin(ModelCardMixin, ModelMixin, ConfigMixin):
    """Strict loading: what does not fit raises at once, before anything is built where possible.

    diffusers only logs unknown config keys and missing or unexpected weights, and leaves missing weights on the meta
    device, which fails much later. Here they are errors, as are numbers of a config out of bounds
    (`utils/config_bounds.py`) and weights that are not finite floating-point numbers.
    """

    config_name = "config.json"

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        known = inspect.signature(cls.__init__).parameters
        # Keys of diffusers itself (`_class_name`, ...) are not checked.
        unknown = sorted(k for k in config_dict if k not in known and k[0] != "_" and k not in DIFFUSERS_KEYS)
        if unknown:
            raise ValueError(f"config of {cls.__name__} has unknown keys {unknown}; known keys are {list(known)[1:]}")
        return super().extract_init_dict(config_dict, **kwargs)

    def register_to_config(self, **kwargs):
        """As diffusers'. Its decorator calls this before `__init__`, with all arguments: here nothing is built yet.

        Raises:
            ValueError: an argument of another type, or a number out of bounds.
        """
        check_config(type(self), kwargs)
        super().register_to_config(**kwargs)

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, *args, **kwargs):
        if kwargs.get("hf_quantizer") is None:
            for path in resolved_model_file:
                if str(path).endswith(".safetensors"):
                    check_dtypes(model, read_dtypes(path), str(path))
        return super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, output_loading_info=False, **kwargs):
        """As diffusers' `ModelMixin.from_pretrained`.

        Raises:
            ValueError: the checkpoint has missing or unexpected weights, some that are not finite or no
                floating-point numbers, or its config has unknown keys or numbers out of bounds.
            OSError: missing files, or the Hub refuses, fails or does not answer.
        """
        place = str(pretrained_model_name_or_path)
        with hub_errors(place):
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys"):
            if info[kind]:
                raise ValueError(
                    f"the weights at {place!r} do not fit {cls.__name__}: "
                    f"{len(info[kind])} {kind.replace('_', ' ')}, for example {sorted(info[kind])[:3]}"
                )
        model.check_weights(place)
        return (model, info) if output_loading_info else model

    def check_weights(self, place: str) -> None:
        """Refuse weights that a model cannot compute with; `place` is where they come from, for messages.

        Raises:
            ValueError: some are not finite.
        """
        check_weights(self, place)
