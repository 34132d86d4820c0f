"""The scripts behind docs/experiments/drorae.md: scaling, cost, diffusers' RAE and ours, the experiment on emoji."""

import json
import os
from pathlib import Path

import pytest
import yaml
from factories import tiny_encoder, tiny_rae
from PIL import Image


ROOT = Path(__file__).parents[1]
# What makes any run of train_drorae.py tiny.
TINY = ["--config", str(ROOT / "tests" / "configs" / "smoke_drorae.yaml"), "--mixed_precision", "no"]
TINY += ["--max_train_steps", "1", "--report_to", "none"]


@pytest.fixture
def pictures(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    (tmp_path / "pictures").mkdir()
    for split, count in (("train", 8), ("validation", 4)):
        columns = {
            "image": [Image.effect_noise((32, 32), 20 + number).convert("RGB") for number in range(count)],
            "base": [str(number) for number in range(count)],
        }
        features = Features({"image": ImageFeature(), "base": Value("string")})
        path = tmp_path / "pictures" / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(tmp_path / "pictures")


class TestScaling:
    @pytest.mark.parametrize(
        "part, measure, slope, intercept, r2",  # rae_drorae spec, section 1
        [
            (slice(0, 8), "log10 of parameters", -0.0564, 0.919, 0.861),
            (slice(8, 20), "layers", -6.17e-3, 0.562, 0.484),
            (slice(0, 20), "log10 of parameters", -0.0582, 0.945, 0.58),
        ],
    )
    def test_fits_of_the_papers_points(self, script, part, measure, slope, intercept, r2):
        scaling = script("fusion_scaling")
        line = scaling.fit(scaling.paper_points()[part])[measure]
        assert line["slope"] == pytest.approx(slope, rel=2e-3)
        assert line["intercept"] == pytest.approx(intercept, abs=1e-3)
        assert line["r2"] == pytest.approx(r2, abs=2e-3)

    @pytest.mark.parametrize(
        "width, layers, count",
        [(3072, 12, 56_779_788), (1536, 12, 28_449_804), (128, 12, 2_480_652), (3072, 6, 28_362_246)],
    )
    def test_parameters_are_those_of_the_papers_formula(self, script, width, layers, count):
        assert script("fusion_scaling").fusion_parameters(width, layers) == count

    def test_layers_are_no_measure_where_widths_vary_too(self, script):
        scaling = script("fusion_scaling")
        assert scaling.fit(scaling.paper_points()).keys() == {"log10 of parameters"}
        assert scaling.fit(scaling.paper_points()[:1]) == {}  # a point is no line

    def test_what_is_written(self, script, tmp_path, capsys):
        script("fusion_scaling").main(["--paper", "--output", str(tmp_path)])
        assert "rfid = -0.05637 x log10 of parameters + 0.9194, R2 0.861" in capsys.readouterr().out
        written = json.loads((tmp_path / "paper-widths" / "results.json").read_text())
        assert written["metric"] == "rfid" and len(written["points"]) == 8
        assert "| 3072 | 12 | 56.78 M | 0.4710 |" in (tmp_path / "paper-widths" / "results.md").read_text()
        with Image.open(tmp_path / "paper-all" / "results.png") as plot:
            assert plot.width > 100

    @pytest.mark.parametrize("flags", [[], ["rae"], ["--data", "pictures"]])
    def test_needs_a_tokenizer_and_pictures(self, script, flags, capsys):
        with pytest.raises(SystemExit):
            script("fusion_scaling").main(flags)
        assert "a tokenizer and --data are needed, or --paper" in capsys.readouterr().err

    @pytest.mark.slow
    def test_sweep(self, script, tmp_path, pictures):
        tiny_rae().save_pretrained(tmp_path / "rae")
        flags = [str(tmp_path / "rae"), "--data", pictures, "--hidden-sizes", "8", "24"]
        flags += ["--output", str(tmp_path / "out"), "--flags", *TINY]
        script("fusion_scaling").main(flags)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [(point["hidden_size"], point["layers"]) for point in results["points"]] == [(8, 3), (24, 3)]
        expected = script("fusion_scaling").fusion_parameters(24, 3, 32)
        assert results["points"][1]["parameters"] == expected and len(results["points"][1]["values"]) == 1
        assert results["fits"]["log10 of parameters"]["slope"] != 0


def test_cost_of_the_fusion(script):
    """A token costs what its parameters are; beside the whole tokenizer that is less than 12 %."""
    flops = script("fusion_cost").count(3072)
    weights = 12 * 2 * 768 * 3072 + 12 * 12 * 768
    assert flops["fusion"] == 2 * 256 * weights
    assert flops["fusion"] / (flops["encoder"] + flops["decoder"]) < 0.12
    assert 0.6 < flops["fusion"] / flops["encoder"] < 0.63  # as docs/experiments/drorae.md says
    assert script("fusion_cost").count(512)["fusion"] / flops["encoder"] < 0.12


def test_rae_vs_diffusers(script, tmp_path, capsys):
    flags = ["--sizes", "tiny", "--batch-size", "1", "--rounds", "2", "--json", str(tmp_path / "x.json")]
    script("rae_vs_diffusers").main(flags)
    assert "| tiny |" in capsys.readouterr().out
    result = json.loads((tmp_path / "x.json").read_text())["tiny"]
    assert result["latents"] < 1e-4 and result["pixels"] < 1e-4
    assert all(0 < ratio < 10 for job in ("encode", "decode") for ratio in result[job].values())


class TestEmoji:
    def test_configs(self, script):
        emoji, names = script("drorae"), []
        for name, (_, phase, source, _) in emoji.RUNS.items():
            config = ROOT / "experiments/emoji/configs" / f"emoji_drorae_phase{phase}.yaml"
            assert yaml.safe_load(config.read_text())["phase"] == phase
            assert source is None or source in names  # trained before it
            names.append(name)
        steps = yaml.safe_load((ROOT / "experiments/emoji/configs/emoji_drorae_phase3.yaml").read_text())
        assert emoji.RUNS["rae-longer"][3]["max_train_steps"] == steps["max_train_steps"]

    def test_table(self, script):
        emoji = script("drorae")
        results = [
            {name: {"reconstruction": error + shift, "psnr": 20.0} for name, error in zip(emoji.RUNS, errors)}
            for shift, errors in ((0.0, [0.5, 0.4, 0.3, 0.2, 0.35, 0.25]), (0.1, [0.5, 0.4, 0.6, 0.2, 0.35, 0.25]))
        ]
        text = emoji.table(results)
        assert "| RAE (phase 1) | 0.5500 ± 0.0707 | 20.0000 ± 0.0000 |" in text
        assert "| all layers, phase 2 | RAE (phase 1) | 1 of 2 |" in text
        assert "| all layers, phase 3 | all layers, phase 2 | 2 of 2 |" in text

    @pytest.mark.slow
    def test_experiment(self, script, tmp_path, pictures):
        tiny_encoder().save_pretrained(tmp_path / "encoder")
        flags = ["--encoder", str(tmp_path / "encoder"), "--data", pictures, "--seeds", "1"]
        flags += ["--output", str(tmp_path / "out"), "--flags", "--max_train_steps", "1", "--train_batch_size", "4"]
        flags += ["--resolution", "32", "--max_validation_samples", "4", "--lr_warmup_steps", "0"]
        script("drorae").main([*flags, "--report_to", "none", "--patch_size", "8"])
        assert os.listdir(tmp_path / "out" / "seed-0")
        assert "| all layers, phase 3 |" in (tmp_path / "out" / "results.md").read_text()
        with Image.open(tmp_path / "out" / "reconstructions.png") as sheet:
            assert sheet.size == (4 * 36, 4 * 36)
