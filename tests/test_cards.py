"""Model cards: what they say, and how they get to the Hub (see `test_hub` for its clients)."""

import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from factories import (
    tiny_autoregressive,
    tiny_encoder,
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_mar_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_lightning_dit,
)
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from safetensors.torch import save_file
from test_hub import MODELS, run

from hf_fae.cards import (
    EVAL_RESULTS,
    Result,
    TrainingRun,
    address_card,
    is_generated,
    merge_metadata,
    render_card,
    write_card,
)
from hf_fae.hub import push_folder


RUN = TrainingRun(
    command=["train.py", "--output_dir", "/home/alice/my run", "--config=/home/alice/secret/c.yaml"],
    machine="2 processes (DDP) on cuda, in bf16",
    config={"learning_rate": 1e-4, "dataset_name": "tester/emoji", "output_dir": "~/my run", "fae": ["/a/b", "c/d"]},
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
    assert data.eval_results is None and data.datasets is None and "widget" not in data.to_dict()


def test_prompts_of_a_pipeline_that_reads_text(tmp_path):
    """The Hub's own snippet takes the first one of the metadata."""
    tiny_fae_text_to_image_pipeline().save_pretrained(tmp_path)
    card = ModelCard(render_card(tmp_path, TrainingRun(prompts=["red heart", "a cat's face"])))
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.widget == [{"text": "red heart"}, {"text": "a cat's face"}]
    assert "pipe('red heart')" in snippet(card.text)
    plain = ModelCard(render_card(tmp_path))
    assert plain.data.widget == [{"text": "a teddy bear"}] and "pipe('a teddy bear')" in snippet(plain.text)


def test_lora_of_a_pipeline_that_reads_text(tmp_path):
    pipeline, lora = tmp_path / "pipeline", tmp_path / "lora"
    tiny_fae_text_to_image_pipeline().save_pretrained(pipeline)
    lora.mkdir()
    save_file({}, lora / "pytorch_lora_weights.safetensors")
    card = ModelCard(render_card(lora, TrainingRun(base_model=str(pipeline), prompts=["my dog"])))
    assert card.data.pipeline_tag == "text-to-image" and card.data.widget == [{"text": "my dog"}]
    assert "pipe('my dog')" in snippet(card.text)


def test_metadata_of_a_lora(tmp_path):
    save_file({}, tmp_path / "pytorch_lora_weights.safetensors")
    data = ModelCard(render_card(tmp_path, TrainingRun(base_model="tester/fae-dit", license="mit"))).data
    assert data.tags == ["hf_fae", "lora"] and data.license == "mit"
    assert (data.base_model, data.base_model_relation) == ("tester/fae-dit", "adapter")


def test_base_model_in_a_folder_is_no_metadata(tmp_path):
    save_file({}, tmp_path / "pytorch_lora_weights.safetensors")
    card = ModelCard(render_card(tmp_path, TrainingRun(base_model=str(tmp_path))))
    assert card.data.base_model is None and "base_model_relation" not in card.data.to_dict()
    assert f'from_pretrained("{tmp_path.name}"' in snippet(card.text)


def test_new_classes_of_a_lora(tmp_path):
    tensors = {"new_classes.my-dog": torch.ones(2), "transformer.blocks.0.to_q.lora_A.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    card = ModelCard(render_card(tmp_path, TrainingRun(base_model="tester/fae-dit")))
    assert "pipe('my-dog')" in snippet(card.text)
    assert "They add classes: `my-dog`." in card.text


def test_dinov3_brings_its_licence(tmp_path):
    tiny_fae(image_encoder_config=tiny_encoder("dinov3_vit").config).save_config(tmp_path)
    data = ModelCard(render_card(tmp_path)).data
    assert (data.license, data.license_name) == ("other", "dinov3-license")
    assert data.license_link.startswith("https://ai.meta.com/")


def test_a_lora_inherits_the_licence_of_its_pipeline(tmp_path, monkeypatch):
    pipeline, lora, cache = (tmp_path / name for name in ("pipeline", "lora", "cache"))
    config = tiny_encoder("dinov3_vit").config
    tiny_fae_dit_pipeline(vae=tiny_fae(image_encoder_config=config)).save_pretrained(pipeline)
    lora.mkdir()
    save_file({}, lora / "pytorch_lora_weights.safetensors")
    assert ModelCard(render_card(lora, TrainingRun(base_model=str(pipeline)))).data.license_name == "dinov3-license"
    licensed = TrainingRun(base_model=str(pipeline), license="mit")
    assert ModelCard(render_card(lora, licensed)).data.license == "mit"
    # One on the Hub is known as far as it has been loaded here.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    run = TrainingRun(base_model="tester/dino")
    assert ModelCard(render_card(lora, run)).data.license is None
    repository = cache / "models--tester--dino"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("f" * 40)
    shutil.copytree(pipeline, repository / "snapshots" / ("f" * 40))
    assert ModelCard(render_card(lora, run)).data.license_name == "dinov3-license"


def test_numbers_of_any_type(folder):
    results = [Result("psnr", np.float32(14.5), "tester/emoji"), Result("count", torch.tensor(3), "tester/emoji")]
    data = ModelCard(render_card(folder, TrainingRun(results=results))).data
    assert [result.metric_value for result in data.eval_results] == [14.5, 3.0]


def test_body_shows_the_training(folder):
    text = ModelCard(render_card(folder, RUN)).text
    assert "\ntrain.py --output_dir 'my run' --config=c.yaml\n" in text
    assert "1,000 steps on 32,000 images" in text
    assert "Hardware: 2 processes (DDP) on cuda, in bf16." in text
    assert "| PSNR | 14.5 | tester/emoji | validation | samples 256, precision bf16 |" in text
    assert "| feature cosine | 0.75 | private |  |  |" in text
    assert "Data: `tester/emoji`, `private`." in text
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert yaml.safe_load(settings) == {**RUN.config, "output_dir": "my run", "fae": ["b", "c/d"]}
    assert "alice" not in text and "/data" not in text
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


@pytest.mark.parametrize(
    "text_encoder_id, line",
    [
        ("tester/text", "pipe.load_text_encoder()  # saved without its text encoder: fetches tester/text"),
        (None, 'pipe.load_text_encoder("PATH_OR_ID")  # saved without its text encoder'),
    ],
)
def test_missing_text_encoder_is_fetched_in_the_snippet(tmp_path, text_encoder_id, line):
    pipeline, lora = tmp_path / "pipeline", tmp_path / "lora"
    bare = {"text_encoder": None, "tokenizer": None, "text_encoder_id": text_encoder_id}
    tiny_fae_text_to_image_pipeline(**bare).save_pretrained(pipeline)
    lora.mkdir()
    save_file({}, lora / "pytorch_lora_weights.safetensors")
    for card in (render_card(pipeline), render_card(lora, TrainingRun(base_model=str(pipeline)))):
        assert line in snippet(card).splitlines()
    tiny_fae_text_to_image_pipeline(text_encoder_id=text_encoder_id).save_pretrained(pipeline)
    assert "load_text_encoder" not in snippet(render_card(pipeline))


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


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        pytest.param(lambda: tiny_fae_dit_pipeline(num_inference_steps=7), 7, id="denoiser"),
        pytest.param(lambda: tiny_fae_mar_pipeline(num_inference_steps=3), 3, id="mar"),
        pytest.param(lambda: tiny_fae_mar_pipeline(transformer=tiny_autoregressive()), None, id="raster"),
        pytest.param(tiny_fae_starflow_pipeline, None, id="flow"),
        pytest.param(lambda: tiny_fae_text_to_image_pipeline(num_inference_steps=9), 9, id="text"),
    ],
)
def test_steps_of_pipelines_that_have_some(tmp_path, make, steps):
    make().save_pretrained(tmp_path)
    card = render_card(tmp_path)
    assert re.findall(r"The default is (\d+) sampling steps", card) == ([str(steps)] if steps else [])


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


def test_a_card_is_addressed_to_where_it_goes(folder):
    card = address_card(render_card(folder, RUN), "tester/fae")
    assert card == render_card(folder, RUN, "tester/fae")
    save_file({}, folder / "pytorch_lora_weights.safetensors")
    (folder / "config.json").unlink()
    run = TrainingRun(base_model="tester/fae-dit")
    assert address_card(render_card(folder, run), "tester/lora") == render_card(folder, run, "tester/lora")


def test_metadata_of_two(folder):
    card = render_card(folder, TrainingRun(license="other", datasets=["tester/emoji"]))
    merged = merge_metadata(card, {"license": "mit", "tags": ["art", "hf_fae"], "datasets": ["a/b"], "language": "en"})
    assert is_generated(merged)
    expected = ModelCard(card).data.to_dict() | {"license": "mit", "language": "en"}
    expected |= {"tags": ["hf_fae", "art"], "datasets": ["tester/emoji", "a/b"]}
    assert ModelCard(merged).data.to_dict() == expected
    (one, _), (other, _) = (ModelCard(text).text.split("<!--") for text in (merged, card))
    assert one == other
    assert not is_generated(merge_metadata(card.replace("## Limits", "## Mine"), {"license": "mit"}))


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
FORM = "---\nlicense: cc-by-4.0\n---\n"


@pytest.fixture(scope="module")
def pushed(hub):
    return run(
        hub,
        MODELS
        + f"EDITED = {EDITED!r}\nFORM = {FORM!r}\n"
        + """
from pathlib import Path
from factories import tiny_fae, tiny_fae_dit_pipeline
from huggingface_hub import CommitOperationAdd, HfApi, create_commit, create_repo, upload_file
from huggingface_hub.errors import HfHubHTTPError
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
    ".env", "nohup.out", "credentials.json", "pictures/me.png", "vae/notes.md", "damaged_rows.json",
):
    path = Path("run", name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"1")
write_card("run", with_results, "tester/card-pipeline")
push_folder("run", "tester/card-pipeline", commit_message="The result")
seen["picture"] = picture(pipe)

# Weights in shards, with an encoder and older pictures; then in one file, without.
def save_run(folder, tokenizer, step, **kwargs):
    tokenizer.save_pretrained(folder, **kwargs)
    Path(folder, "validation").mkdir()
    Path(folder, "validation", f"samples-{step:07d}.png").write_bytes(b"1")
    write_card(folder, TrainingRun(step=step))
    return push_folder(folder, "tester/anew").oid

seen["sharded"] = save_run("sharded", tiny_fae(with_encoder=True), 5, max_shard_size="20KB")
create_commit("tester/anew", [CommitOperationAdd("mine.safetensors", b"1")], commit_message="Something else")
fae.push_to_hub("tester/anew", variant="fp16")
fae.image_encoder = None
save_run("unsharded", fae, 10)
seen["unsharded"] = state_digest(fae)
seen["reloaded"] = state_digest(AutoModel.from_pretrained("tester/anew"))
seen["folder's snippet"] = Path("unsharded", "README.md").read_text().split('from_pretrained("')[1].split('"')[0]

# A repository of the web form, with a licence.
create_repo("tester/form")
upload_file(path_or_fileobj=FORM.encode(), path_in_repo="README.md", repo_id="tester/form")
seen["form"] = [push_folder("unsharded", "tester/form").oid, push_folder("unsharded", "tester/form").oid]

# Someone edits the card while the weights are on their way.
def edit_and_download(*args, **kwargs):
    path = download(*args, **kwargs)
    upload_file(path_or_fileobj=EDITED.encode(), path_in_repo="README.md", repo_id="tester/race")
    return path

push_folder("unsharded", "tester/race")
download, HfApi.hf_hub_download = HfApi.hf_hub_download, edit_and_download
try:
    push_folder("unsharded", "tester/race")
except HfHubHTTPError as error:
    seen["race"] = error.response.status_code
HfApi.hf_hub_download = download

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


def test_new_weights_are_in_force(hub, pushed):
    before, now = hub.files("tester/anew", pushed["sharded"]), hub.files("tester/anew")
    assert "diffusion_pytorch_model.safetensors.index.json" in before and "image_encoder.d/config.json" in before
    assert pushed["reloaded"] == pushed["unsharded"]
    weights = {path for path in now if "safetensors" in path}
    plain, fp16 = (f"diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp16"))
    assert weights == {plain, fp16, "mine.safetensors"}  # the other variant and what is not ours stay
    assert {path for path in now if "/" in path} == {"validation/samples-0000010.png"}


def test_the_snippet_loads_the_repository(hub, pushed):
    assert pushed["folder's snippet"] == "unsharded"
    card = hub.files("tester/anew")["README.md"].decode()
    assert is_generated(card) and 'from_pretrained("tester/anew")' in card and "\n# anew\n" in card


def test_a_card_of_metadata_alone_gets_a_body(hub, pushed):
    for commit in pushed["form"]:
        card = hub.files("tester/form", commit)["README.md"].decode()
        assert is_generated(card) and ModelCard(card).data.license == "cc-by-4.0"
        assert ModelCard(card).data.library_name == "diffusers" and "10 steps" in card


def test_an_edit_in_the_meantime_is_not_lost(hub, pushed):
    assert pushed["race"] == 412
    assert hub.files("tester/race")["README.md"].decode() == EDITED


def test_edited_card_is_kept(hub, pushed):
    card = ModelCard(hub.files("tester/edited")["README.md"].decode())
    assert card.text == ModelCard(EDITED).text
    assert card.data.to_dict() == {"license": "mit", "library_name": "diffusers"}


def test_the_result_is_pushed_in_one_commit_without_checkpoints(hub, pushed):
    files = set(hub.files("tester/card-pipeline"))
    assert {"model_index.json", "README.md", "config.yaml", "log.jsonl", EVAL_RESULTS} < files
    assert {path for path in files if path.startswith("validation/")} == {"validation/samples-0000010.png"}
    folders = {"vae", "transformer", "scheduler", "validation", ".eval_results"}
    assert {path.split("/")[0] for path in files if "/" in path} == folders
    top = {"README.md", "model_index.json", "config.yaml", "log.jsonl", "damaged_rows.json", ".gitattributes"}
    assert {path for path in files if "/" not in path} == top and "vae/notes.md" not in files
    assert b"validation/samples-0000010.png" in hub.files("tester/card-pipeline")["README.md"]
    commits = [request for request in hub.requests if "card-lora/commit/" in request.path]
    assert len(commits) == 1


def test_lora_is_described_for_the_hubs_page(hub, pushed):
    data = ModelCard(hub.files("tester/card-lora")["README.md"].decode()).data
    assert (data.base_model, data.base_model_relation) == ("tester/card-pipeline", "adapter")
