import pytest
import torch
from factories import tiny_fae, tiny_rae

from hf_fae.autoencoders.initialization import add_fusion, load_rae, read_fusion_type


@pytest.fixture(scope="module")
def fae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fae")
    tiny_fae().save_pretrained(folder)
    return folder


class TestFusion:
    def test_keeps_encoder_and_decoder(self):
        rae = tiny_rae()
        model = add_fusion(rae, fusion_weight=0.3, expert_hidden_size=40)
        assert model.image_encoder is rae.image_encoder and model.config.fusion_layers == 3
        assert (model.config.fusion_weight, model.config.expert_hidden_size) == (0.3, 40)
        theirs = rae.decoder.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in model.decoder.state_dict().items())
        assert add_fusion(rae, 2).config.fusion_layers == 2
        with pytest.raises(ValueError, match="fusion_layers must be at most 3, the layers of the encoder, got 4"):
            add_fusion(rae, 4)

    def test_reading(self, tmp_path, fae):
        tiny_rae().save_pretrained(tmp_path / "rae")
        assert read_fusion_type(tmp_path / "rae") == "none"
        model = load_rae(str(tmp_path / "rae"), None, 32)
        assert model.image_encoder is not None and model.dtype == torch.float32
        with pytest.raises(ValueError, match="resolution must be that of the tokenizer, 32, got 64"):
            load_rae(str(tmp_path / "rae"), None, 64)
        with pytest.raises(ValueError, match="tokenizer must be an AutoencoderDRoRAE or .* got AutoencoderFAE in"):
            read_fusion_type(fae)
