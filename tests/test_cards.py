"""Model cards: what they say, and how they get to the Hub (see `test_hub` for its clients)."""

import re

import pytest
import torch
import yaml
from factories import tiny_encoder, tiny_fae, tiny_fae_dit_pipeline, tiny_lightning_dit
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from safetensors.torch import save_file
from test_hub import MODELS, run

from hf_fae.cards import EVAL_RESULTS, Result, TrainingRun, is_generated, render_card, write_card
from hf_fae.hub import push_folder


RUN = TrainingRun(
    command=["accelerate", "launch", "train.py", "--output_dir", "my run"],
    config={"learning_rate": 1e-4, "dataset_name": "tester/emoji"},
    datasets=["tester/emoji", "/data/private"],
    step=1000,
    images_seen=32000,
    results=[
        Result("PSNR", 14.5, "tester/emoji", "validation", {"samples": 256, "precision": "bf16"}),
        Result("feature cosine", 0.75, "/data/private"),
    ],
)


@pytest.fixture
def folder(tmp_path):
    """A tokenizer's folder, as far as its card is concerned."""
    tiny_fae(image_encoder_id="tester/encoder").save_config(tmp_path)
    return tmp_path


def snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]


# What cards say


def test_metadata_of_a_tokenizer(folder):
    data = ModelCard(render_card(folder, RUN, "tester/fae")).data
    assert (data.library_name, data.pipeline_tag, data.tags) == ("diffusers", "image-feature-extraction", ["hf_fae"])
    assert (data.base_model, data.datasets, data.license) == ("tester/encoder", ["tester/emoji"], None)
    (result,) = data.eval_results  # the other one is on data that the Hub does not have
    assert (result.dataset_type, result.dataset_split) == ("tester/emoji", "validation")
    assert (result.metric_type, result.metric_value) == ("psnr", 14.5)
    assert result.metric_args == {"samples": 256, "precision": "bf16"}


def test_metadata_of_a_pipeline(tmp_path):
    tiny_fae_dit_pipeline(vae=tiny_fae(image_encoder_id="tester/encoder")).save_pretrained(tmp_path)
    data = ModelCard(render_card(tmp_path)).data
    assert (data.pipeline_tag, data.base_model) == ("unconditional-image-generation", "tester/encoder")
    assert data.eval_results is None and data.datasets is None


def test_metadata_of_a_lora(tmp_path):
    save_file({}, tmp_path / "pytorch_lora_weights.safetensors")
    data = ModelCard(render_card(tmp_path, TrainingRun(base_model="tester/fae-dit", license="mit"))).data
    assert data.tags == ["hf_fae", "lora"] and data.license == "mit"
    assert (data.base_model, data.base_model_relation) == ("tester/fae-dit", "adapter")


def test_base_model_in_a_folder_is_no_metadata(tmp_path):
    save_file({}, tmp_path / "pytorch_lora_weights.safetensors")
    card = ModelCard(render_card(tmp_path, TrainingRun(base_model=str(tmp_path))))
    assert card.data.base_model is None and "base_model_relation" not in card.data.to_dict()
    assert f'from_pretrained("{tmp_path}"' in snippet(card.text)


def test_new_classes_of_a_lora(tmp_path):
    tensors = {"new_classes.my-dog": torch.ones(2), "transformer.blocks.0.to_q.lora_A.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    card = ModelCard(render_card(tmp_path, TrainingRun(base_model="tester/fae-dit")))
    assert "pipe('my-dog')" in snippet(card.text)
    assert "classes of their own: `my-dog`." in card.text


def test_dinov3_brings_its_licence(tmp_path):
    tiny_fae(image_encoder_config=tiny_encoder("dinov3_vit").config).save_config(tmp_path)
    data = ModelCard(render_card(tmp_path)).data
    assert (data.license, data.license_name) == ("other", "dinov3-license")
    assert data.license_link.startswith("https://ai.meta.com/")


def test_body_shows_the_training(folder):
    text = ModelCard(render_card(folder, RUN)).text
    assert "accelerate launch train.py --output_dir 'my run'" in text
    assert "1,000 steps on 32,000 images" in text
    assert "| PSNR | 14.5 | tester/emoji | validation | samples 256, precision bf16 |" in text
    assert "| feature cosine | 0.75 | /data/private |  |  |" in text
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert yaml.safe_load(settings) == RUN.config
    assert "https://arxiv.org/abs/2512.07829" in text


def test_what_is_not_known_is_not_said(folder):
    text = ModelCard(render_card(folder)).text
    headings = re.findall(r"^#+ .*", text, flags=re.MULTILINE)
    assert headings == [f"# {folder.name}", "## Limits"]
    assert "None" not in text


def test_missing_encoder_is_fetched_in_the_snippet(folder):
    assert "vae.load_encoder()  # " in snippet(render_card(folder))
    (folder / "image_encoder.d").mkdir()
    assert "load_encoder" not in snippet(render_card(folder))


def test_newest_pictures_of_the_run(folder):
    (folder / "validation").mkdir()
    for name in ("samples-0000200.png", "samples-0001000.png", "pairs-0000200.png"):
        (folder / "validation" / name).touch()
    pictures = re.findall(r"!\[(.*)\]\((.*)\)", render_card(folder, RUN))
    assert sorted(pictures) == [
        ("pairs", "validation/pairs-0000200.png"),
        ("samples", "validation/samples-0001000.png"),
    ]
    assert "![" not in render_card(folder)


def test_generator_alone(tmp_path):
    tiny_lightning_dit().save_pretrained(tmp_path)
    card = render_card(tmp_path)
    namespace = {}
    exec(snippet(card), namespace)
    assert namespace["transformer"].config.num_classes == 10


# Files


def test_results_on_the_hub_get_a_file_of_their_own(folder):
    write_card(folder, RUN)
    (entry,) = parse_eval_result_entries(yaml.safe_load((folder / EVAL_RESULTS).read_text()))
    assert entry == EvalResultEntry("tester/emoji", "psnr", 14.5, notes="samples 256, precision bf16")
    write_card(folder)
    assert not (folder / EVAL_RESULTS).exists()


def test_only_an_edited_card_is_kept(folder):
    readme = folder / "README.md"
    write_card(folder)
    assert is_generated(readme.read_text()) and is_generated(readme.read_text().replace("\n", "\r\n"))
    write_card(folder, RUN)
    assert "## Results" in readme.read_text()
    edited = readme.read_text().replace("## Limits", "## Mine")
    readme.write_text(edited)
    write_card(folder)
    assert readme.read_text() == edited


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="folder must hold a saved pipeline, .* got .*nothing"):
        write_card(tmp_path / "nothing")
    save_file({}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="must name the base_model"):
        write_card(tmp_path, TrainingRun())
    with pytest.raises(ValueError, match="folder must be a folder that exists, got .*missing"):
        push_folder(tmp_path / "missing", "tester/missing")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]


# On the Hub: one process pushes; in another one a push is cut off, and everything is loaded

EDITED = "---\nlicense: mit\n---\nWritten by hand.\n"


@pytest.fixture(scope="module")
def pushed(hub):
    return run(
        hub,
        MODELS
        + f"EDITED = {EDITED!r}\n"
        + """
from pathlib import Path
from factories import tiny_fae, tiny_fae_dit_pipeline
from huggingface_hub import upload_file
from peft import LoraConfig, get_peft_model_state_dict
from hf_fae.cards import Result, TrainingRun, write_card
from hf_fae.hub import push_folder

with_results = TrainingRun(step=7, results=[Result("psnr", 14.5, "tester/emoji")])

fae = tiny_fae()
fae.save_pretrained("fae-run")
write_card("fae-run", with_results, "tester/card-fae")
seen["first"] = push_folder("fae-run", "tester/card-fae").oid
with torch.no_grad():
    fae.pixel_decoder.proj_out.bias.add_(1)
fae.push_to_hub("tester/card-fae")
seen["reconstruction"] = reconstruction(fae)

pipe = tiny_fae_dit_pipeline()
pipe.save_pretrained("run")
for name in (
    "checkpoint-5/optimizer.bin", ".checkpoint-6/model.safetensors", "tensorboard/events.out.tfevents.1",
    "config.yaml", "log.jsonl", "validation/samples-0000005.png", "validation/samples-0000010.png",
):
    path = Path("run", name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"1")
write_card("run", with_results, "tester/card-pipeline")
push_folder("run", "tester/card-pipeline", commit_message="The result")
seen["picture"] = picture(pipe)

pipe.save_pretrained("saved", push_to_hub=True, repo_id="tester/edited")
upload_file(path_or_fileobj=EDITED.encode(), path_in_repo="README.md", repo_id="tester/edited")
pipe.push_to_hub("tester/edited")

pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
pipe.save_lora_weights(
    "lora",
    transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
    transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
)
write_card("lora", TrainingRun(base_model="tester/card-pipeline"), "tester/card-lora")
push_folder("lora", "tester/card-lora")
seen["lora"] = picture(pipe)
print(json.dumps(seen))
""",
    )


@pytest.fixture(scope="module")
def loaded(hub, pushed):
    head = hub.head("tester/card-pipeline")
    hub.fail_after(1)  # the weights arrive, the commit does not
    try:
        seen = run(
            hub,
            MODELS
            + """
import re
from pathlib import Path
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from hf_fae.hub import push_folder

path = "run/transformer/diffusion_pytorch_model.safetensors"
save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
try:
    push_folder("run", "tester/card-pipeline")
except Exception as error:
    seen["cut"] = type(error).__name__

pipe = DiffusionPipeline.from_pretrained("tester/card-pipeline")
seen["picture"] = picture(pipe)
pipe.load_lora_weights("tester/card-lora")
seen["lora"] = picture(pipe)
seen["reconstruction"] = reconstruction(AutoModel.from_pretrained("tester/card-fae"))

for name in ("fae", "pipeline", "lora"):
    card = Path(hf_hub_download(f"tester/card-{name}", "README.md")).read_text()
    namespace = {}
    exec(re.search(r"```python\\n(.*?)```", card, flags=re.DOTALL)[1], namespace)
    seen[f"{name} snippet"] = list(namespace["images"].shape) if name == "fae" else namespace["image"].size
print(json.dumps(seen))
""",
        )
    finally:
        hub.heal()
    assert hub.head("tester/card-pipeline") == head
    return seen


@pytest.mark.parametrize("result", ["reconstruction", "picture", "lora"])
def test_loaded_gives_what_was_pushed(pushed, loaded, result):
    assert loaded[result] == pushed[result]


def test_lora_changes_the_picture(pushed):
    assert pushed["lora"] != pushed["picture"]


def test_cut_push_leaves_the_revision_before(pushed, loaded):
    assert "cut" in loaded  # and what was loaded after it is what was pushed before


def test_snippets_run(loaded):
    assert loaded["fae snippet"] == [1, 3, 32, 32]
    assert loaded["pipeline snippet"] == loaded["lora snippet"] == [32, 32]


def test_own_card_follows_the_weights(hub, pushed):
    first, now = hub.files("tester/card-fae", pushed["first"]), hub.files("tester/card-fae")
    assert b"## Results" in first["README.md"] and EVAL_RESULTS in first
    assert is_generated(now["README.md"].decode()) and b"## Results" not in now["README.md"]
    assert EVAL_RESULTS not in now
    assert ModelCard(now["README.md"].decode()).data.pipeline_tag == "image-feature-extraction"


def test_edited_card_is_kept(hub, pushed):
    card = ModelCard(hub.files("tester/edited")["README.md"].decode())
    assert card.text == ModelCard(EDITED).text
    assert card.data.to_dict() == {"license": "mit", "library_name": "diffusers"}


def test_the_result_is_pushed_in_one_commit_without_checkpoints(hub, pushed):
    files = set(hub.files("tester/card-pipeline"))
    assert {"model_index.json", "README.md", "config.yaml", "log.jsonl", EVAL_RESULTS} < files
    assert {path for path in files if path.startswith("validation/")} == {"validation/samples-0000010.png"}
    assert not [path for path in files if "checkpoint" in path or "tensorboard" in path]
    assert b"validation/samples-0000010.png" in hub.files("tester/card-pipeline")["README.md"]
    commits = [request for request in hub.requests if "card-lora/commit/" in request.path]
    assert len(commits) == 1


def test_lora_is_described_for_the_hubs_page(hub, pushed):
    data = ModelCard(hub.files("tester/card-lora")["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation) == ("tester/card-pipeline", "adapter")
