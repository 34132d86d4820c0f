"""LoRA files with new classes: what they add to a pipeline, and that it goes away again."""

import pytest
import torch
from factories import tiny_fae_dit_pipeline
from peft import LoraConfig, get_peft_model_state_dict


WIDTH = 32


def draw(pipe, class_labels="class 3"):
    return pipe(class_labels, generator=torch.Generator().manual_seed(0), output_type="pt", guidance_scale=2.0).images


def table(pipe):
    return pipe.transformer.class_embedding.weight.detach().clone()


def state(pipe):
    """All that a pipeline is made of: weights, configurations, names."""
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    configs = ({k: v for k, v in part.config.items() if k[0] != "_"} for part in (pipe.transformer, pipe))
    return weights, *configs, pipe.id2label, pipe.label2id


def assert_same(state, other):
    assert state[1:] == other[1:]
    assert state[0].keys() == other[0].keys()
    assert all(torch.equal(value, other[0][name]) for name, value in state[0].items())


def row(number):
    return torch.linspace(-1, 1, WIDTH) * number


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Three files: `pets` with two new classes, `car` with one, `style` with none."""
    folders = {}
    classes = {"pets": {"my-dog": row(1), "my.cat, Tom": row(2)}, "car": {"my-car": row(3)}, "style": {}}
    for seed, (name, new_classes) in enumerate(classes.items()):
        pipe = tiny_fae_dit_pipeline()
        torch.manual_seed(seed)
        pipe.transformer.add_adapter(
            LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v", "ff.net.2"], init_lora_weights=False)
        )
        folders[name] = tmp_path_factory.mktemp(name)
        pipe.save_lora_weights(
            folders[name],
            transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
            transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
            new_classes=new_classes,
        )
    return folders


@pytest.fixture
def pipe():
    return tiny_fae_dit_pipeline()


def test_new_classes_come_before_the_null_class(pipe, loras):
    before = table(pipe)
    pipe.load_lora_weights(loras["pets"])
    assert pipe.transformer.config.num_classes == 12
    assert torch.equal(table(pipe), torch.stack([*before[:10], row(1), row(2), before[10]]))
    assert pipe.id2label[9] == "class 9" and pipe.id2label[10] == "my-dog" and pipe.id2label[11] == "my.cat, Tom"
    assert pipe.config.id2label == pipe.id2label
    dog, cat = draw(pipe, ["my-dog"]), draw(pipe, "Tom")
    assert torch.equal(dog, draw(pipe, 10)) and torch.equal(cat, draw(pipe, 11)) and not torch.equal(dog, cat)


def test_unload_restores_everything(pipe, loras):
    before, images = state(pipe), draw(pipe)
    pipe.load_lora_weights(loras["pets"])
    pipe.load_lora_weights(loras["car"])
    assert not torch.equal(draw(pipe), images)
    pipe.unload_lora_weights()
    assert_same(state(pipe), before)
    assert torch.equal(draw(pipe), images)
    pipe.load_lora_weights(loras["pets"])  # and it can be loaded again
    assert pipe.label2id["my-dog"] == 10


def test_a_pipeline_without_names(loras):
    pipe = tiny_fae_dit_pipeline(id2label=None)
    before = state(pipe)
    pipe.load_lora_weights(loras["car"])
    assert pipe.id2label == {10: "my-car"}
    pipe.unload_lora_weights()
    assert_same(state(pipe), before)


def test_two_adapters(pipe, loras):
    pipe.load_lora_weights(loras["pets"], adapter_name="pets")
    only_pets = draw(pipe, ["my-dog", "class 3"])
    pipe.load_lora_weights(loras["car"], adapter_name="car")
    assert pipe.label2id["my-car"] == 12
    assert pipe.get_list_adapters() == {"transformer": ["pets", "car"]}
    pipe.set_adapters("car")
    car = draw(pipe, "my-car")
    # Another active adapter leaves the classes where they are.
    pipe.set_adapters("pets")
    assert torch.equal(draw(pipe, ["my-dog", "class 3"]), only_pets)
    pipe.set_adapters(["pets", "car"], [1.0, 0.5])
    draw(pipe, ["my-dog", "my-car"])

    # The classes behind those of a deleted adapter move up, and keep their names and pictures.
    pipe.delete_adapters("pets")
    assert pipe.transformer.config.num_classes == 11 and pipe.label2id["my-car"] == 10
    pipe.set_adapters("car")
    assert torch.equal(draw(pipe, "my-car"), car)
    with pytest.raises(ValueError, match="unknown name 'my-dog'"):
        draw(pipe, "my-dog")


def test_hotswap_replaces_classes(pipe, loras):
    pipe.load_lora_weights(loras["pets"], adapter_name="mine")
    pipe.load_lora_weights(loras["car"], adapter_name="mine", hotswap=True)
    fresh = tiny_fae_dit_pipeline()
    fresh.load_lora_weights(loras["car"], adapter_name="mine")
    assert_same(state(pipe), state(fresh))


def test_without_new_classes(pipe, loras):
    before = table(pipe)
    pipe.load_lora_weights(loras["style"])
    assert torch.equal(table(pipe), before) and pipe.transformer.config.num_classes == 10
    assert pipe.id2label == tiny_fae_dit_pipeline().id2label


def test_fused_adapters_keep_their_classes(pipe, loras, tmp_path):
    pipe.load_lora_weights(loras["pets"], adapter_name="pets")
    pipe.load_lora_weights(loras["car"], adapter_name="car")
    pipe.set_adapters("pets")
    dog = draw(pipe, "my-dog")
    pipe.fuse_lora(adapter_names=["pets"])
    pipe.unload_lora_weights()
    assert "my-dog" in pipe.label2id and "my-car" not in pipe.label2id
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(loaded, "my-dog"), dog, atol=1e-4, rtol=1e-4)
    assert loaded.transformer.config.num_classes == 12

    # They are the pipeline's own now: another adapter of the same name does not take them along.
    pipe.load_lora_weights(loras["car"], adapter_name="pets")
    pipe.unload_lora_weights()
    assert_same(state(pipe), state(loaded))


def test_unfused_adapters_do_not(pipe, loras):
    pipe.load_lora_weights(loras["pets"])
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert pipe.transformer.config.num_classes == 10


def test_group_offload(pipe, loras):
    pipe.load_lora_weights(loras["pets"])
    expected = draw(pipe, ["my-dog", 3])
    pipe.unload_lora_weights()
    plain = draw(pipe)
    cpu = torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    pipe.load_lora_weights(loras["pets"])
    assert torch.equal(draw(pipe, ["my-dog", 3]), expected)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offload moves models to a GPU")
@pytest.mark.parametrize("enable", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload(pipe, loras, enable):
    pipe.load_lora_weights(loras["pets"])
    expected = draw(pipe, ["my-dog", 3])
    pipe.unload_lora_weights()
    plain = draw(pipe)
    getattr(pipe, enable)()
    pipe.load_lora_weights(loras["pets"])
    torch.testing.assert_close(draw(pipe, ["my-dog", 3]), expected, atol=1e-3, rtol=1e-3)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), plain, atol=1e-3, rtol=1e-3)


def test_rows_take_the_dtype_of_the_table(pipe, loras):
    pipe.to(dtype=torch.bfloat16)
    pipe.load_lora_weights(loras["pets"])
    assert torch.equal(table(pipe)[10], row(1).bfloat16())


def test_from_a_state_dict(pipe, loras):
    state_dict, metadata = pipe.lora_state_dict(loras["pets"])
    assert torch.equal(state_dict["new_classes.my.cat, Tom"], row(2))
    pipe.load_lora_weights(state_dict, metadata=metadata)
    fresh = tiny_fae_dit_pipeline()
    fresh.load_lora_weights(loras["pets"])
    assert torch.equal(draw(pipe, "Tom"), draw(fresh, "Tom"))


def test_other_processes_write_nothing(pipe, tmp_path):
    pipe.save_lora_weights(tmp_path, {}, new_classes={"my-dog": row(1)}, is_main_process=False)
    assert not any(tmp_path.iterdir())


def test_what_does_not_fit_changes_nothing(pipe, loras):
    pipe.load_lora_weights(loras["pets"])
    before = state(pipe)
    with pytest.raises(ValueError, match=r"has new classes \['my-dog', .*but the pipeline already knows"):
        pipe.load_lora_weights(loras["pets"], adapter_name="again")
    state_dict, _ = pipe.lora_state_dict(loras["car"])
    with pytest.raises(ValueError, match=r"new classes of shape \(32,\) .*'my-car': \(7,\)"):
        pipe.load_lora_weights({**state_dict, "new_classes.my-car": torch.zeros(7)})
    with pytest.raises(ValueError, match="the state dict has no LoRA layers"):
        pipe.load_lora_weights({"new_classes.my-car": row(3)})
    assert_same(state(pipe), before)


@pytest.mark.parametrize("others", [[], ["style", "car"]])
def test_layers_that_do_not_fit_change_nothing(pipe, loras, others):
    for name in others:
        pipe.load_lora_weights(loras[name], adapter_name=name)
    before, image = state(pipe), draw(pipe)
    layers, _ = pipe.lora_state_dict(loras["pets"])
    key = "transformer.blocks.1.attn.to_q.lora_A.weight"
    for changed, message in (
        ({key: torch.zeros(2, WIDTH + 8)}, rf"'{key}' of shape \(2, 40\), where \(2, 32\) fits"),
        ({key: torch.zeros(3, WIDTH)}, r"lora_B.weight' of shape \(32, 2\), where \(32, 3\) fits"),
        ({key.replace("blocks.1", "blocks.77"): torch.zeros(2, WIDTH)}, "blocks.77.* no layer for it"),
        ({key.replace("to_q", "norm_q"): torch.zeros(2, WIDTH)}, "norm_q.* no layer for it"),
        ({key.replace("to_q", "to_k"): torch.zeros(2, WIDTH)}, "to_k.* without the other one"),
        ({"transformer.blocks.1.attn.to_q.weight": torch.zeros(WIDTH, WIDTH)}, "to_q.weight.* no layer for it"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights({**layers, **changed})
    assert_same(state(pipe), before)
    assert torch.equal(draw(pipe), image)


@pytest.mark.parametrize("others", [[], ["style", "car"]])
def test_a_load_that_fails_on_the_way_is_undone(pipe, loras, others):
    for name in others:
        pipe.load_lora_weights(loras[name], adapter_name=name)
    before, adapters = state(pipe), pipe.get_list_adapters()
    layers, metadata = pipe.lora_state_dict(loras["pets"])
    layers["transformer.blocks.1.attn.to_k.lora_A.weight"] = torch.zeros(2, WIDTH)
    layers["transformer.blocks.1.attn.to_k.lora_B.weight"] = torch.zeros(WIDTH, 2)
    wrong = {**metadata, "transformer.r": 5}  # the layers are made for another rank than that of the weights
    with pytest.raises(RuntimeError, match="size mismatch"):
        pipe.load_lora_weights(layers, metadata=wrong)
    assert_same(state(pipe), before)
    assert pipe.get_list_adapters() == adapters
    pipe.load_lora_weights(loras["pets"])
    assert len(draw(pipe, "my-dog")) == 1


def test_a_hotswap_that_fails_takes_the_classes_along(pipe, loras):
    before = state(pipe)
    pipe.load_lora_weights(loras["pets"], adapter_name="mine")
    layers, metadata = pipe.lora_state_dict(loras["car"])
    wrong = {**metadata, "transformer.use_rslora": True}
    with pytest.raises(ValueError, match="use_rslora"):
        pipe.load_lora_weights(layers, metadata=wrong, adapter_name="mine", hotswap=True)
    assert_same(state(pipe), before)


def test_classes_of_a_pipeline(pipe):
    before = state(pipe)
    pipe.add_classes({"one": row(1), "two": row(2)})
    assert (pipe.label2id["one"], pipe.label2id["two"]) == (10, 11)
    with pytest.raises(ValueError, match=r"already knows \['class 4', 'two'\]"):
        pipe.add_classes({"class 4": row(1), "two": row(2), "three": row(3)})
    with pytest.raises(ValueError, match=r"rows must have shape \(classes, 32\), got \(1, 5\)"):
        pipe.add_classes({"three": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"class_ids must be from 0 to 11, got \[12\]"):
        pipe.transformer.remove_classes([3, 12])
    pipe.remove_classes(["class 4", "one"])
    assert pipe.id2label[4] == "class 5" and pipe.label2id["two"] == 9 and len(pipe.id2label) == 10
    assert torch.equal(table(pipe)[9:], torch.stack([row(2), before[0]["class_embedding.weight"][10]]))
