"""LoRA fine-tuning of a published generator on a folder of pictures: of classes, known or new, or of captions.

    accelerate launch training_scripts/train_lora.py --config training_scripts/configs/lora/lora_folder.yaml \
        --pipeline user/fae-dinov2-g-xl-256 --dataset_name pictures --class_name my-dog

A class of the data that has the name of a class of the pipeline is trained as that one; any other becomes a new class.
A pipeline that reads texts takes the pictures' captions (--caption_column) or one for all of them (--instance_prompt).
`output_dir` gets `pytorch_lora_weights.safetensors`, one file with the LoRA layers and the new classes:
`pipe.load_lora_weights(output_dir)`, then `pipe("my-dog")`.
"""

from dataclasses import dataclass, field

from accelerate.utils import set_seed

from hf_fae.data.conditions import open_condition
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.loading import complete_text_encoder
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.generation import (
    GeneratorValidation,
    load_trained_pipeline,
    objective_of,
)
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.lora import add_lora, lora_weights
from hf_fae.training.tokenizer import complete_tokenizer
from hf_fae.utils.parsing import parse_arguments


@dataclass
class LoraArguments:
    """The generator, its classes or captions, the LoRA layers and their loss."""

    pipeline: str = field(metadata={"help": "Pipeline to fine-tune: Hub id or local folder."})
    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), where the pipeline comes without it."}
    )
    text_encoder: str | None = field(
        default=None, metadata={"help": "Text encoder (Hub id or folder), where the pipeline comes without it."}
    )
    instance_prompt: str | None = field(
        default=None, metadata={"help": "Caption of all pictures, where the data have no caption_column."}
    )
    class_name: str | None = field(
        default=None, metadata={"help": "Class of all pictures, where the data have no label_column."}
    )
    init_class: str | None = field(
        default=None, metadata={"help": "Class whose embedding new classes start from; none: the mean of all."}
    )
    rank: int = field(default=16, metadata={"help": "Rank of the LoRA layers."})
    lora_alpha: float = field(default=16, metadata={"help": "The LoRA layers are scaled by lora_alpha / rank."})
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Linear maps with LoRA: ends of their names; none: attention and feed-forward."},
    )
    label_dropout: float = field(
        default=0.1, metadata={"help": "Share of labels or captions replaced by the null class or the empty text."}
    )
    validation_inference_steps: int = field(default=50, metadata={"help": "Steps for the pictures of a validation."})
    grid_images: int = field(default=16, metadata={"help": "Pictures of a validation, of all classes or captions."})


def main(argv: list[str] | None = None) -> None:
    args, data_args, loop_args, config = parse_arguments(
        LoraArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    # All that can be wrong comes to light before the loop writes anything. Processes that load the same things at the
    # same time wait for each other at the locks of the Hub's and the data's caches.
    pipeline = load_trained_pipeline(args.pipeline)
    complete_text_encoder(pipeline, args.text_encoder)
    complete_tokenizer(pipeline.vae, args.image_encoder, data_args.resolution)
    images = ImageData(data_args, loop_args.seed)
    data, condition = open_condition(pipeline, images, args.class_name, args.init_class, args.instance_prompt)
    # A folder of one's own pictures often has nothing to validate on.
    default = DataArguments.validation_split
    validates = data_args.validation_split != default or images.has_split(default)
    validation_batches = list(data.validation_batches(loop_args.train_batch_size)) if validates else []
    examples = validation_batches or [next(data.batches(args.grid_images))]
    objective = objective_of(pipeline, condition, args.label_dropout)
    set_seed(loop_args.seed)
    add_lora(pipeline.transformer, args.rank, args.lora_alpha, args.target_modules, len(condition.new_classes))

    loop = TrainingLoop(loop_args, config)
    objective.to(loop.device)
    loop.print(condition.describe())

    validate = GeneratorValidation(
        pipeline,
        objective,
        validation_batches,
        args.grid_images,
        loop_args.seed,
        examples,
        **(
            {"num_inference_steps": args.validation_inference_steps}
            if pipeline.config.get("num_inference_steps")
            else {}
        ),
    )

    def save():
        pipeline.save_lora_weights(loop_args.output_dir, **lora_weights(pipeline.transformer, condition.new_classes))

    loop.run(objective, data, validate, save)


if __name__ == "__main__":
    main()
