"""LoRA fine-tuning of a published generator on a folder of images, with known or new classes or with captions.

    accelerate launch training_scripts/train_lora.py --config training_scripts/configs/lora/lora_folder.yaml \
        --pipeline user/fae-dinov2-g-xl-256 --dataset_name images --class_name my-dog

A class of the data with the name of one of the pipeline's classes is trained as that class; any other becomes a new
one. A text-conditional pipeline uses the captions of the images (--caption_column) or one for all (--instance_prompt).
`output_dir` gets `pytorch_lora_weights.safetensors`, one file with the LoRA layers and the new classes:
`pipe.load_lora_weights(output_dir)`, then `pipe("my-dog")`.
"""

from dataclasses import dataclass, field

from accelerate.utils import set_seed

from hf_fae.autoencoders.initialization import complete_tokenizer
from hf_fae.data.conditions import prepare_condition
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.generators.lora_layers import add_lora, lora_weights
from hf_fae.loading import complete_text_encoder, load_trained_pipeline
from hf_fae.objectives.from_pipeline import objective_of
from hf_fae.objectives.validation import GeneratorValidation
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class LoraArguments:
    """The generator, its classes or captions, the LoRA layers and their loss."""

    pipeline: str = field(metadata={"help": "Pipeline to fine-tune: Hub id or local folder."})
    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), for a pipeline saved without it."}
    )
    text_encoder: str | None = field(
        default=None, metadata={"help": "Text encoder (Hub id or folder), for a pipeline saved without it."}
    )
    instance_prompt: str | None = field(
        default=None, metadata={"help": "Caption of all images, for data without caption_column."}
    )
    class_name: str | None = field(
        default=None, metadata={"help": "Class of all images, for data without label_column."}
    )
    init_class: str | None = field(
        default=None, metadata={"help": "Class from whose embedding new classes start; none: the mean of all."}
    )
    rank: int = field(default=16, metadata={"help": "Rank of the LoRA layers."})
    lora_alpha: float = field(default=16, metadata={"help": "The LoRA layers are scaled by lora_alpha / rank."})
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Linear layers with LoRA, by the ends of their names; none: attention and feed-forward."},
    )
    label_dropout: float = field(
        default=0.1, metadata={"help": "Share of labels or captions replaced by the null class or the empty text."}
    )
    validation_inference_steps: int = field(default=50, metadata={"help": "Steps of validation samples."})
    grid_images: int = field(default=16, metadata={"help": "Samples per validation, spread over classes or captions."})


def main(argv: list[str] | None = None) -> None:
    args, data_args, loop_args, config = parse_arguments(
        LoraArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    # All errors of the arguments are raised before the loop writes anything. Processes that load the same files at the
    # same time wait for each other at the locks of the Hub's and the data's caches.
    pipeline = load_trained_pipeline(args.pipeline)
    complete_text_encoder(pipeline, args.text_encoder)
    complete_tokenizer(pipeline.vae, args.image_encoder, data_args.resolution)
    images = ImageData(data_args, loop_args.seed)
    data, condition = prepare_condition(pipeline, images, args.class_name, args.init_class, args.instance_prompt)
    # A user's own folder of images often has no validation split.
    default = DataArguments.validation_split
    validates = data_args.validation_split != default or images.has_split(default)
    validation_batches = list(data.validation_batches(loop_args.train_batch_size)) if validates else []
    examples = validation_batches or [next(data.batches(args.grid_images))]
    objective = objective_of(pipeline, condition, args.label_dropout)
    set_seed(loop_args.seed)
    add_lora(pipeline.transformer, args.rank, args.lora_alpha, args.target_modules, len(condition.new_classes))

    loop = TrainingLoop(loop_args, config)
    loop.print(condition.describe())
    objective.to(loop.device)
    has_steps = pipeline.config.get("num_inference_steps") is not None
    validation = GeneratorValidation(
        pipeline,
        objective,
        validation_batches,
        grid_images=args.grid_images,
        seed=loop_args.seed,
        examples=examples,
        **({"num_inference_steps": args.validation_inference_steps} if has_steps else {}),
    )

    def save():
        pipeline.save_lora_weights(loop_args.output_dir, **lora_weights(pipeline.transformer, condition.new_classes))

    loop.run(objective, data, validation, save)


if __name__ == "__main__":
    run(main)
