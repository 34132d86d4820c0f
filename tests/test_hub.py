"""Pushing to and loading from a Hub, over HTTP on the loopback interface (`hub_server`), each client in a new process.

A client does several things and prints them as JSON for the tests.
"""

import json

import pytest


# A client's helpers: digests of outputs and states, and marks in the server's log between steps.
PRELUDE = """
import hashlib, json, os, urllib.error, urllib.request

def digest(*tensors):
    assert all(x.isfinite().all() for x in tensors)
    data = b"".join(str(x.dtype).encode() + x.detach().float().numpy().tobytes() for x in tensors)
    return hashlib.sha256(data).hexdigest()

def state_digest(model):
    return digest(*(tensor for _, tensor in sorted(model.state_dict().items())))

def mark(name):
    try:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mark/" + name)
    except urllib.error.HTTPError:
        pass
"""


def run(hub, code):
    """Runs `code` after the prelude and returns the JSON value that it printed last."""
    return json.loads(hub.run(PRELUDE + code).strip().splitlines()[-1])


# The server itself, against the libraries' own clients


def test_server_speaks_to_huggingface_hub(hub):
    seen = run(
        hub,
        """
from pathlib import Path
from huggingface_hub import (
    CommitOperationDelete, HfApi, ModelCard, create_repo, hf_hub_download, model_info, snapshot_download, upload_folder
)

api, repo, seen = HfApi(), "tester/basics", {}
seen["user"] = api.whoami()["name"]
create_repo(repo)
create_repo(repo, exist_ok=True)
Path("up/sub").mkdir(parents=True)
Path("up/README.md").write_text("---\\ntags: [small]\\n---\\nA card.")
Path("up/config.json").write_text("{}")
Path("up/sub/model.safetensors").write_bytes(b"first")
seen["first"] = upload_folder(repo_id=repo, folder_path="up").oid
seen["unchanged"] = upload_folder(repo_id=repo, folder_path="up").oid
Path("up/sub/model.safetensors").write_bytes(b"second")
seen["second"] = upload_folder(repo_id=repo, folder_path="up").oid
seen["snapshot"] = (Path(snapshot_download(repo)) / "sub/model.safetensors").read_text()
seen["old"] = Path(hf_hub_download(repo, "sub/model.safetensors", revision=seen["first"])).read_text()
seen["tags"] = ModelCard.load(repo).data.tags
seen["files"] = api.list_repo_files(repo)
seen["folder"] = [entry.path for entry in api.list_repo_tree(repo)]
seen["lfs"] = [file.rfilename for file in model_info(repo, files_metadata=True).siblings if file.lfs]
seen["refs"] = [branch.target_commit for branch in api.list_repo_refs(repo).branches]
api.create_commit(repo, [CommitOperationDelete("sub/")], commit_message="Delete a folder")
seen["rest"] = api.list_repo_files(repo)
seen["errors"] = []
for call in (
    lambda: hf_hub_download("tester/missing", "config.json"),
    lambda: model_info("tester/missing"),
    lambda: hf_hub_download(repo, "missing.json"),
    lambda: hf_hub_download(repo, "config.json", revision="v0"),
    lambda: create_repo("tester/anonymous", token=False),
    lambda: create_repo(repo),
):
    try:
        call()
    except Exception as error:
        seen["errors"].append([type(error).__name__, error.response.status_code])
print(json.dumps(seen))
""",
    )
    assert seen["user"] == "tester"
    assert seen["first"] == seen["unchanged"] != seen["second"]
    assert (seen["snapshot"], seen["old"], seen["tags"]) == ("second", "first", ["small"])
    assert seen["files"] == [".gitattributes", "README.md", "config.json", "sub/model.safetensors"]
    assert seen["folder"] == [".gitattributes", "README.md", "config.json", "sub"]
    assert seen["lfs"] == ["sub/model.safetensors"]
    assert seen["refs"] == [seen["second"]]
    assert seen["rest"] == [".gitattributes", "README.md", "config.json"]
    assert seen["errors"] == [
        ["RepositoryNotFoundError", 404],
        ["RepositoryNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["HfHubHTTPError", 401],
        ["HfHubHTTPError", 409],
    ]
    assert hub.files("tester/basics", seen["first"])["sub/model.safetensors"] == b"first"


def test_server_keeps_the_last_revision_when_an_upload_is_cut(hub):
    push = """
from pathlib import Path
from huggingface_hub import create_repo, upload_folder

create_repo("tester/cut", exist_ok=True)
Path("cut").mkdir(exist_ok=True)
for name in "ab":
    Path(f"cut/{name}.safetensors").write_bytes(os.urandom(2**20))
print(json.dumps(upload_folder(repo_id="tester/cut", folder_path="cut").oid))
"""
    first = run(hub, push)
    files = hub.files("tester/cut")
    for num_uploads in (1, 2):  # the second weight file, then the commit itself
        hub.fail_after(num_uploads)
        with pytest.raises(RuntimeError, match="Error while uploading|Server disconnected"):
            run(hub, push)
        hub.heal()
        assert hub.head("tester/cut") == first
        assert hub.files("tester/cut") == files
    assert run(hub, push) == hub.head("tester/cut") != first


def test_server_speaks_to_diffusers(hub):
    seen = run(
        hub,
        """
import torch
from diffusers import AutoencoderKL, AutoModel, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel

torch.manual_seed(0)
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=16)
transformer = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
    num_embeds_ada_norm=10, norm_num_groups=4,
)
pipe = DiTPipeline(transformer, vae, DDIMScheduler())
seen = {"pushed": [], "loaded": []}

def keep(key, model):
    seen[key].append(state_digest(model))

first = vae.push_to_hub("tester/vae").oid
keep("pushed", vae)
with torch.no_grad():
    vae.decoder.conv_out.bias.add_(1)
vae.push_to_hub("tester/vae")
keep("pushed", vae)
transformer.save_pretrained("tester-sharded", max_shard_size="4KB", push_to_hub=True, repo_id="tester/sharded")
keep("pushed", transformer)
pipe.push_to_hub("tester/dit", variant="fp16")
keep("pushed", pipe.transformer)

keep("loaded", AutoencoderKL.from_pretrained("tester/vae", revision=first))
keep("loaded", AutoModel.from_pretrained("tester/vae"))
keep("loaded", DiTTransformer2DModel.from_pretrained("tester/sharded"))
keep("loaded", DiffusionPipeline.from_pretrained("tester/dit", variant="fp16").transformer)
try:
    DiTPipeline.from_pretrained("tester/missing")
except Exception as error:
    seen["missing"] = type(error).__name__
print(json.dumps(seen))
""",
    )
    assert seen["loaded"] == seen["pushed"]
    assert seen["missing"] == "OSError"
    shards = [path for path in hub.downloads("tester/sharded") if path.endswith(".safetensors")]
    assert len(shards) > 2
    assert set(hub.downloads("tester/dit")) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }


# hf_fae: one process pushes, another one loads; an "fae" holds its frozen encoder, a "decoder" does not

MODELS = """
import hf_fae, torch
from diffusers import AutoModel, DiffusionPipeline

def picture(pipe):
    generator = torch.Generator().manual_seed(1)
    return digest(pipe([1, 2], num_inference_steps=3, generator=generator, output_type="pt").images)

def drawn(pipe, prompt="a cat"):
    # Two of them: products with a single row depend on where a matrix lies in memory.
    return digest(pipe([prompt] * 2, generator=torch.Generator().manual_seed(1), output_type="pt").images)

@torch.no_grad()
def reconstruction(fae):
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).to(fae.dtype)
    return digest(fae(images).sample)

@torch.no_grad()
def decoded(fae):
    channels = fae.config.latent_channels
    return digest(fae.decode(torch.linspace(-2, 2, channels * 16).view(1, channels, 4, 4).to(fae.dtype)).sample)

seen = {}
"""


@pytest.fixture(scope="module")
def pushed(hub):
    return run(
        hub,
        MODELS
        + """
from huggingface_hub import create_repo, upload_folder
from factories import tiny_encoder, tiny_fae, tiny_fae_dit_pipeline, tiny_kl, tiny_starflow
from factories import tiny_fae_mar_pipeline, tiny_fae_starflow_pipeline, tiny_fae_text_to_image_pipeline
from factories import tiny_raev2, tiny_raev2_dit, tiny_text_starflow_pipeline

encoder = tiny_encoder()
create_repo("tester/encoder")
encoder.save_pretrained("encoder")
revision = upload_folder(repo_id="tester/encoder", folder_path="encoder").oid

fae = tiny_fae(image_encoder_id="tester/encoder", image_encoder_revision=revision)
pipe = tiny_fae_dit_pipeline(vae=fae)
seen |= {"reconstruction": reconstruction(fae), "decoded": decoded(fae), "picture": picture(pipe)}

fae.push_to_hub("tester/fae")
fae.save_pretrained("sharded", max_shard_size="20KB", push_to_hub=True, repo_id="tester/fae-sharded")
pipe.push_to_hub("tester/fae-pipeline")
fae.image_encoder = None
fae.push_to_hub("tester/decoder")
pipe.push_to_hub("tester/decoder-pipeline")
pipe.save_pretrained("pipeline", max_shard_size="20KB", push_to_hub=True, repo_id="tester/sharded-pipeline")

flow = tiny_fae_starflow_pipeline(vae=tiny_kl(), transformer=tiny_starflow(patch_size=2), guidance_scale=3.0)
text = tiny_text_starflow_pipeline(guidance_scale=3.0)
mmdit = tiny_fae_text_to_image_pipeline(guidance_scale=[(0.0, 0.9, 1.5)])
mar = tiny_fae_mar_pipeline(vae=tiny_kl(), guidance_scale=3.0)
seen |= {"flow": drawn(flow, "class 3"), "text": drawn(text), "mar": drawn(mar, "class 3"), "mmdit": drawn(mmdit)}
raev2 = tiny_fae_dit_pipeline(
    vae=tiny_raev2(), transformer=tiny_raev2_dit(in_channels=32), internal_guidance_scale=[(0.1, 1.0, 1.78)]
)
seen["raev2"] = drawn(raev2, "class 3")
raev2.push_to_hub("tester/raev2")
mmdit.push_to_hub("tester/mmdit")
mar.push_to_hub("tester/mar")
flow.push_to_hub("tester/flow")
text.push_to_hub("tester/text-flow")

fae.attach_encoder(encoder)
pipe.to(torch.float16)
seen |= {"fp16 reconstruction": reconstruction(fae), "fp16 picture": picture(pipe)}
pipe.push_to_hub("tester/fp16-pipeline", variant="fp16")

with torch.no_grad():
    encoder.float().model.embeddings.cls_token.add_(1)
encoder.save_pretrained("encoder")
upload_folder(repo_id="tester/encoder", folder_path="encoder")
print(json.dumps(seen))
""",
    )


@pytest.fixture(scope="module")
def loaded(hub, pushed):
    return run(
        hub,
        MODELS
        + """
def load(cls, repo, step, **kwargs):
    \"\"\"Loads with an empty cache of its own, after a mark in the server's log.\"\"\"
    mark(step)
    try:
        return cls.from_pretrained(repo, cache_dir="cache-" + step, **kwargs)
    finally:
        mark("end")

def keep(step, function, *args, **kwargs):
    try:
        seen[step] = function(load(*args, step=step, **kwargs))
    except Exception as error:
        seen[step] = f"{type(error).__name__}: {error}"

def first_load(fae):
    mark("load_encoder")
    fae.load_encoder(cache_dir="cache-encoder")
    mark("end")
    return reconstruction(fae)

def source(encoder):
    heads = {"encoder_attention_head_dim": 32, "decoder_attention_head_dim": 16}
    config = hf_fae.AutoencoderFAE.from_encoder(encoder, **heads).config
    return [config.image_encoder_id, config.image_encoder_revision]

half = {"variant": "fp16", "dtype": torch.float16}
keep("published", picture, DiffusionPipeline, "tester/fae-pipeline")
keep("pipeline", picture, hf_fae.FAEDiTPipeline, "tester/fae-pipeline")
keep("pipeline-encoder", lambda pipe: reconstruction(pipe.vae), DiffusionPipeline, "tester/fae-pipeline")
keep("decoder-pipeline", picture, DiffusionPipeline, "tester/decoder-pipeline")
keep("sharded-pipeline", picture, DiffusionPipeline, "tester/sharded-pipeline")
keep("fp16-pipeline", picture, DiffusionPipeline, "tester/fp16-pipeline", **half)
keep("fp16-encoder", lambda pipe: reconstruction(pipe.vae), DiffusionPipeline, "tester/fp16-pipeline", **half)
keep("flow", lambda pipe: drawn(pipe, "class 3"), DiffusionPipeline, "tester/flow")
keep("mar", lambda pipe: drawn(pipe, "class 3"), DiffusionPipeline, "tester/mar")
keep("text", drawn, DiffusionPipeline, "tester/text-flow")
keep("raev2", lambda pipe: drawn(pipe, "class 3"), DiffusionPipeline, "tester/raev2")
keep("mmdit", drawn, DiffusionPipeline, "tester/mmdit")
keep("mmdit-class", drawn, hf_fae.FAETextToImagePipeline, "tester/mmdit")
keep("mmdit-snippet", lambda pipe: pipe("a teddy bear").images[0].size, DiffusionPipeline, "tester/mmdit")
keep("fae", reconstruction, hf_fae.AutoencoderFAE, "tester/fae")
keep("fae-left-out", decoded, hf_fae.AutoencoderFAE, "tester/fae", image_encoder=None)
keep("fae-sharded", reconstruction, hf_fae.AutoencoderFAE, "tester/fae-sharded")
keep("fae-auto", reconstruction, AutoModel, "tester/fae")
keep("fae-in-pipeline", reconstruction, hf_fae.AutoencoderFAE, "tester/fae-pipeline", subfolder="vae")
keep("decoder", decoded, hf_fae.AutoencoderFAE, "tester/decoder")
keep("decoder-encode", reconstruction, hf_fae.AutoencoderFAE, "tester/decoder")
keep("decoder-load-encoder", first_load, hf_fae.AutoencoderFAE, "tester/decoder")
keep("fresh", source, hf_fae.VisionEncoder, "tester/encoder")
keep("missing", decoded, hf_fae.AutoencoderFAE, "tester/missing")
print(json.dumps(seen))
""",
    )


@pytest.mark.parametrize("step", ["published", "pipeline", "decoder-pipeline", "sharded-pipeline"])
def test_pipeline_draws_what_the_pusher_drew(pushed, loaded, step):
    assert loaded[step] == pushed["picture"]


@pytest.mark.parametrize("step", ["flow", "text", "mar", "mmdit", "raev2"])
def test_generator_draws_what_the_pusher_drew(pushed, loaded, step):
    """Of classes on diffusers' own autoencoder, and of texts; with the guidance of the checkpoint."""
    assert loaded[step] == pushed[step]


@pytest.mark.parametrize(("repo", "paper"), [("text-flow", "2506.06276"), ("mmdit", "2403.03206")])
def test_card_of_a_pipeline_that_reads_text(hub, pushed, loaded, repo, paper):
    card = hub.files(f"tester/{repo}")["README.md"].decode()
    assert 'pipe("a teddy bear")' in card.replace("'", '"') and "pipeline_tag: text-to-image" in card
    assert "widget:\n- text: a teddy bear\n" in card
    assert paper in card and "generates images from texts" in card
    assert loaded["mmdit-class"] == pushed["mmdit"] and loaded["mmdit-snippet"] == [32, 32]


def test_pipeline_in_fp16(hub, pushed, loaded):
    assert loaded["fp16-pipeline"] == pushed["fp16 picture"]
    assert loaded["fp16-encoder"] == pushed["fp16 reconstruction"]
    weights = [path for path in hub.downloads("tester/fp16-pipeline") if path.endswith(".safetensors")]
    assert weights and all(".fp16." in path for path in weights)


def test_pipeline_is_recorded_under_the_public_name(hub, pushed):
    index = json.loads(hub.files("tester/fae-pipeline")["model_index.json"])
    assert index["vae"] == ["hf_fae", "AutoencoderFAE"]
    assert index["transformer"] == ["hf_fae", "LightningDiTTransformer2DModel"]


def test_sharded_pipeline_is_sharded(hub, pushed):
    files = hub.files("tester/sharded-pipeline")
    for component in ("vae", "transformer"):
        shards = [path for path in files if path.startswith(f"{component}/") and path.endswith(".safetensors")]
        assert len(shards) > 1


@pytest.mark.parametrize("step", ["fae", "fae-auto", "fae-sharded", "fae-in-pipeline", "pipeline-encoder"])
def test_autoencoder_with_its_encoder(pushed, loaded, step):
    assert loaded[step] == pushed["reconstruction"]


def test_encoder_that_is_left_out_is_not_fetched(hub, pushed, loaded):
    assert loaded["fae-left-out"] == pushed["decoded"]
    own_files = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert set(hub.downloads("tester/fae", since="fae-left-out")) == own_files
    assert set(hub.downloads("tester/fae", since="fae")) > own_files


def test_checkpoint_without_encoder(hub, pushed, loaded):
    assert loaded["decoder"] == pushed["decoded"]
    assert sorted(hub.downloads("tester/decoder", since="decoder")) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert loaded["decoder-encode"].startswith("ValueError: image_encoder is None")
    assert "'tester/encoder'" in loaded["decoder-encode"]
    assert hub.downloads("tester/encoder", since="decoder") == []


def test_load_encoder_fetches_the_recorded_revision(hub, pushed, loaded):
    revision = json.loads(hub.files("tester/decoder")["config.json"])["image_encoder_revision"]
    assert revision != hub.head("tester/encoder")
    assert loaded["decoder-load-encoder"] == pushed["reconstruction"]
    assert set(hub.downloads("tester/encoder", since="load_encoder")) == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


def test_fresh_tokenizer_records_where_its_encoder_comes_from(hub, loaded):
    assert loaded["fresh"] == ["tester/encoder", hub.head("tester/encoder")]


def test_missing_repository_is_named(loaded):
    assert loaded["missing"].startswith("OSError: ")
    assert "tester/missing" in loaded["missing"]
