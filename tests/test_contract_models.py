"""What diffusers' common tests check of a model, for every model class of the package (`model_cases`)."""

import json
import pickle

import pytest
import torch
from diffusers import AutoModel
from diffusers.training_utils import EMAModel
from model_cases import CASES, ModelCase, run

from hf_fae.layers.positions import SinCosPositions


# Configs whose `forward` runs no layer or branch that another config of the same class does not run.
CONTAINED = {"AutoencoderFAE of features", "RAE", "SiT", "SiT, 1-D positions", "RandomAR"}


@pytest.fixture(params=CASES)
def case(request) -> ModelCase:
    return CASES[request.param]


@pytest.fixture
def model(case):
    return case.make()


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if k in ("pixel_values", "hidden_states") else v for k, v in inputs.items()}


def public(config) -> dict:
    return {key: value for key, value in config.items() if key[0] != "_"}


@pytest.mark.parametrize(
    "save_kwargs", [{}, {"variant": "fp16"}, {"max_shard_size": "30KB"}, {"variant": "fp16", "max_shard_size": "30KB"}]
)
def test_save_and_load_are_equal_to_the_bit(case, model, tmp_path, save_kwargs):
    model.save_pretrained(tmp_path, **save_kwargs)
    loaded, info = type(model).from_pretrained(tmp_path, variant=save_kwargs.get("variant"), output_loading_info=True)
    assert not any(info.values()), info
    assert public(loaded.config) == public(model.config)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(run(loaded, case.inputs(2)), run(model, case.inputs(2)))
    if "max_shard_size" in save_kwargs:
        assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1


def test_averages_of_diffusers_are_saved_and_loaded(case, model, tmp_path):
    if hasattr(model, "image_encoder"):
        model.image_encoder = None  # EMAModel builds the model from its config alone
    average = EMAModel(model.parameters(), decay=0.9, model_cls=type(model), model_config=model.config)
    average.optimization_step = 7
    average.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, type(model))
    assert (loaded.decay, loaded.optimization_step) == (0.9, 7)
    assert all(torch.equal(*pair) for pair in zip(loaded.shadow_params, average.shadow_params, strict=True))


def test_pickled_after_a_forward(case, model):
    expected = run(model, case.inputs(2))
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(copied, case.inputs(2)), expected) and torch.equal(run(model, case.inputs(2)), expected)


def test_auto_model_finds_the_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(str(tmp_path))) is type(model)


def test_config_survives_json(model):
    config = json.loads(model.to_json_string())
    assert public(type(model).from_config(config).config) == public(model.config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_and_buffers_survive_half_precision(case, model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    cast_model = case.make().to(dtype)
    assert loaded.dtype == cast_model.dtype == dtype
    for other in (loaded, cast_model):
        for reference, table in zip(tables(model), tables(other), strict=True):
            assert torch.equal(reference, table)
    cast_model.save_pretrained(tmp_path / "cast")
    resaved = type(model).from_pretrained(tmp_path / "cast")
    for name, buffer in model.named_buffers(recurse=False):
        for other in (loaded, cast_model, resaved):
            assert torch.equal(other.get_buffer(name), buffer)
    sample = run(loaded, cast(case.inputs(2), dtype))
    assert sample.dtype == dtype
    torch.testing.assert_close(sample.float(), run(model, case.inputs(2)), atol=0.1, rtol=0.1)


def tables(model):
    return [module.table for module in model.modules() if isinstance(module, SinCosPositions)]


def test_forward_is_deterministic_and_independent_of_the_batch(case, model):
    whole = run(model, case.inputs(3))
    assert torch.equal(whole, run(model, case.inputs(3)))
    for i in range(3):
        single = run(model, {key: value[i : i + 1] for key, value in case.inputs(3).items()})
        torch.testing.assert_close(single, whole[i : i + 1], atol=1e-5, rtol=1e-4)


def test_return_dict(case, model):
    with torch.no_grad():
        as_tuple = model(**case.inputs(2), return_dict=False)
        output = model(**case.inputs(2))
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(output)
    assert all(torch.equal(one, other) for one, other in zip(as_tuple, output.values()))


def gradients(model, inputs):
    model.train().zero_grad()
    if model.config.get("base_head_layer") is None:
        model(**inputs).sample.square().mean().backward()
    else:
        output = model(**inputs, output_base_sample=True)
        (output.sample.square().mean() + output.base_sample.square().mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing(case, model):
    plain = gradients(model, case.inputs(2))
    model.enable_gradient_checkpointing()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    calls = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            original = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *args, f=original: calls.append(1) or f(*args)
    checkpointed = gradients(model, case.inputs(2))
    assert calls, "no block was checkpointed"
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)


def test_one_step_moves_every_trainable_parameter_and_no_frozen_one(case, model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    gradients(model, case.inputs(3))
    optimizer.step()
    for name, parameter in model.named_parameters():
        # Attention is invariant to a bias of the keys, whose gradient is zero up to rounding.
        if not name.endswith("to_k.bias"):
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends_agree(case, model, backend):
    expected = run(model, case.inputs(2))
    model.set_attention_backend(backend)
    assert {processor._attention_backend.value for processor in model.attn_processors.values()} == {backend}
    torch.testing.assert_close(run(model, case.inputs(2)), expected, atol=1e-5, rtol=1e-4)


def test_fused_projections_agree(case, model):
    expected = run(model, case.inputs(2))
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, case.inputs(2)), expected, atol=1e-5, rtol=1e-4)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, case.inputs(2)), expected)


def test_layerwise_casting(case, model):
    expected = run(model, case.inputs(2))
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {p.dtype for p in model.parameters()}
    assert torch.float8_e4m3fn in stored
    sample = run(model, case.inputs(2))
    assert sample.isfinite().all() and (sample - expected).norm() < 0.2 * expected.norm()


def test_group_offload(case, model):
    expected = run(model, case.inputs(2))
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(run(model, case.inputs(2)), expected)


@pytest.mark.parametrize("kwargs", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}])
def test_group_offload_to_another_place(case, model, monkeypatch, kwargs):
    """Weights that are offloaded are NaN: whatever uses them without asking for them shows it. No GPU is needed."""
    uses = case.uses(model)
    expected = [use() for use in uses]
    weights_elsewhere(monkeypatch)
    cpu = torch.device("cpu")
    kwargs = {"num_blocks_per_group": 1, **kwargs} if kwargs["offload_type"] == "block_level" else kwargs
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, **kwargs)
    assert all(p.isnan().any() for name, p in model.named_parameters() if not name.startswith("image_encoder."))
    for use, result in zip(uses, expected, strict=True):
        assert torch.equal(use(), result)


def weights_elsewhere(monkeypatch):
    """diffusers' groups of weights, onloading and offloading as if to another device."""
    from diffusers.hooks.group_offloading import ModuleGroup

    real = {}

    def tensors(group):
        for module in group.modules:
            yield from (*module.parameters(), *module.buffers())
        yield from (*group.parameters, *group.buffers)

    def onload(group):
        for tensor in tensors(group):
            if id(tensor) in real:
                tensor.data = real.pop(id(tensor))

    def offload(group):
        for tensor in tensors(group):
            if id(tensor) not in real:
                real[id(tensor)] = tensor.data
                tensor.data = torch.full_like(tensor.data, float("nan"))

    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    monkeypatch.setattr(ModuleGroup, "offload_", offload)


def test_output_is_rebuilt_by_accelerate(case, model):
    """As by a model that is prepared for mixed precision, or offloaded layer by layer."""
    from accelerate.utils import convert_outputs_to_fp32

    with torch.no_grad():
        expected = model(**case.inputs(2))
        converted = convert_outputs_to_fp32(model.forward)(**case.inputs(2))
    assert type(converted) is type(expected) and torch.equal(converted.sample, expected.sample)


@pytest.mark.parametrize("case", [name for name in CASES if name not in CONTAINED], indirect=True)
def test_compiles_to_a_full_graph(case, model):
    torch._dynamo.reset()
    expected = run(model, case.inputs(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, case.inputs(2)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name not in CONTAINED], indirect=True)
def test_repeated_blocks_compile_with_inductor(case, model):
    torch._dynamo.reset()
    expected = run(model, case.inputs(2))
    model.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(run(model, case.inputs(2)), expected, atol=1e-4, rtol=1e-3)


def test_lora_is_added_saved_and_loaded(case, model, tmp_path):
    if not case.lora:
        assert not hasattr(model, "add_adapter")
        return
    from peft import LoraConfig

    expected = run(model, case.inputs(2))
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    adapted = run(model, case.inputs(2))
    assert not torch.allclose(adapted, expected, atol=1e-3)
    model.save_lora_adapter(tmp_path)

    fresh = case.make()
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(fresh, case.inputs(2)), adapted)
    fresh_scaled_to_zero = fresh(**case.inputs(2), attention_kwargs={"scale": 0.0}).sample
    torch.testing.assert_close(fresh_scaled_to_zero, expected)
    fresh.unload_lora()
    assert torch.equal(run(fresh, case.inputs(2)), expected)


def test_is_built_on_the_meta_device(case):
    example = case.make()
    with torch.device("meta"):
        model = type(example).from_config(example.config)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_leaves_the_meta_device_whole(case):
    model = case.make()
    with torch.device("meta"):
        other = type(model).from_config(model.config)
    other = other.to_empty(device="cpu")
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "image_encoder" not in key})
    for reference, table in zip(tables(model), tables(other), strict=True):
        assert torch.equal(reference, table)


def test_checkpoint_that_does_not_fit_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = next(tmp_path.glob("*.safetensors"))
    tensors, whole = load_file(weights), weights.read_bytes()
    name = next(key for key in tensors if key.endswith("proj_out.weight"))

    save_file({key: value for key, value in tensors.items() if key != name}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 missing keys, for example .*{name}"):
        type(model).from_pretrained(tmp_path)

    save_file(tensors | {"foreign.weight": torch.zeros(1)}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected keys, for example .*foreign.weight"):
        type(model).from_pretrained(tmp_path)

    save_file(tensors | {name: torch.zeros(3, 3)}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"expected shape .*\(3, 3\)|\[3, 3\]"):
        type(model).from_pretrained(tmp_path)

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises((OSError, ValueError), match=weights.name):
        type(model).from_pretrained(tmp_path)


def test_config_with_unknown_keys_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layer": 3}))
    with pytest.raises(ValueError, match=r"unknown keys \['num_layer'\]"):
        type(model).from_pretrained(tmp_path)
