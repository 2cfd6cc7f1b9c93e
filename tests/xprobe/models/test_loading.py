"""Loading, whole and block by block: xprobe refuses weights and tokens that are not those of the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, save_tiny_model, tiny_tokenizer
from support.runs import parity

from xprobe.config import Execution, StudyConfig
from xprobe.errors import ModelError, XprobeError
from xprobe.forecast import forecast
from xprobe.models import loading
from xprobe.models.streaming.streamed import open_streamed

Change = Callable[[Path], Any]


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(tiny, tmp_path / "model")


def whole(folder: Path, **options: Any) -> tuple[Any, list[str]]:
    warnings: list[str] = []
    dtype = options.pop("dtype", "auto")
    execution = Execution(**options)
    return loading.load(loading.resolve(str(folder)), execution, dtype=dtype, warnings=warnings).model, warnings


def streamed(folder: Path) -> tuple[Any, list[str]]:
    warnings: list[str] = []
    return open_streamed(folder, device="cpu", warnings=warnings).model, warnings


LOADERS = pytest.mark.parametrize("read", [whole, streamed])


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return apply


def configured(**entries: Any) -> Change:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

    return apply


def without(*names: str) -> Change:
    return tensors(lambda named: {name: value for name, value in named.items() if name not in names})


def adding(**more: torch.Tensor) -> Change:
    return tensors(lambda named: {**named, **{name.replace("__", "."): value for name, value in more.items()}})


def scaled(dtype: torch.dtype) -> Change:
    """Weights of an FP8 checkpoint: each has a scale. They are stored as fp8, or cast without their scale."""

    def change(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        chosen = [name for name in named if ".mlp." in name]
        return {
            **{name: value.to(dtype) if name in chosen else value for name, value in named.items()},
            **{f"{name}_scale_inv": torch.full((1, 1), 3.0) for name in chosen},
        }

    return tensors(change)


MISFITS: dict[str, tuple[Change, str]] = {
    "saved while compiled": (
        tensors(lambda named: {f"_orig_mod.{name}": value for name, value in named.items()}),
        r"lacks 39 tensors .* every name begins with '_orig_mod\.', .*\(torch.compile\)",
    ),
    "saved inside of a wrapper": (
        tensors(lambda named: {f"module.{name}": value for name, value in named.items()}),
        r"every name begins with 'module\.'",
    ),
    "no head": (without("lm_head.weight"), r"lacks 1 tensor of LlamaForCausalLM \(lm_head.weight\).*tie_word_embed"),
    "one tensor missing": (without("model.layers.2.mlp.up_proj.weight"), "lacks 1 tensor .*would be random numbers"),
    "fp8": (scaled(torch.float8_e4m3fn), "stored as F8_E4M3, which is a quantised format"),
    "fp8 cast without its scales": (scaled(torch.float32), "holds 12 tensors .*_scale_inv.*quantised weights"),
    "integers instead of weights": (
        tensors(lambda n: {**n, "model.layers.1.mlp.up_proj.weight": (n["lm_head.weight"][:48] * 99).to(torch.int8)}),
        "up_proj.weight is stored as int8, which is a quantised format",
    ),
    "bytes instead of an embedding": (
        tensors(lambda n: {**n, "model.embed_tokens.weight": n["lm_head.weight"].abs().to(torch.uint8)}),
        "embed_tokens.weight is stored as uint8",
    ),
    "another width": (configured(intermediate_size=64), r"has shape \[32, 48\], .* asks for \[32, 64\]"),
    "fewer layers in config.json": (configured(num_hidden_layers=3), r"holds 9 tensors .*model.layers.3"),
    "more layers in config.json": (configured(num_hidden_layers=5), r"lacks 9 tensors .*model.layers.4"),
    "a bias that the class does not know": (
        adding(model__layers__0__self_attn__q_proj__bias=torch.ones(32)),
        r"holds 1 tensor that LlamaForCausalLM has no place for \(model.layers.0.self_attn.q_proj.bias\)",
    ),
    "an adapter's tensors": (
        adding(model__layers__0__self_attn__q_proj__lora_A__weight=torch.ones(2, 32)),
        "an adapter's: merge it",
    ),
    "an adapter beside the weights": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        r"adapter_config.json makes this an adapter.*merge_and_unload",
    ),
    "an adapter's weights beside the model's": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"),
        "adapter_model.safetensors makes this an adapter",
    ),
    "an adapter alone": (
        lambda folder: [(folder / "config.json").unlink(), (folder / "adapter_config.json").write_text("{}")],
        "makes this an adapter",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "quantised by its configuration": (
        configured(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}),
        r"quantised checkpoint \(fp8\)",
    ),
    "a configuration of the wrong type": (configured(hidden_size="x"), "hidden_size"),
    "heads that do not divide the width": (configured(num_attention_heads=5), "attention heads"),
    "own code": (
        configured(auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}, model_type="unknown-one"),
        "--trust-remote-code",
    ),
    "a vision-language model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}'),
        r"reads images or sound besides text \(qwen2_5_vl\)",
    ),
    "a part of a vision-language model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "mllama_text_model"}'),
        "not a causal decoder",
    ),
}  # fmt: skip


@LOADERS
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_of_another_model_is_refused_with_the_tensor_and_the_cause(folder, misfit, read):
    change, cause = MISFITS[misfit]
    change(folder)
    with pytest.raises(ModelError, match=cause):
        read(folder)


def plain_frequencies(folder: Path) -> torch.Tensor:
    return whole(folder)[0].model.rotary_emb.inv_freq


@LOADERS
@pytest.mark.parametrize("change", [lambda f: f, lambda f: f.bfloat16(), lambda f: f * 4])
def test_rotary_frequencies_of_old_checkpoints_are_ignored(folder, change, read):
    stored = change(plain_frequencies(folder))
    adding(model__layers__0__self_attn__rotary_emb__inv_freq=stored)(folder)
    read(folder)


@LOADERS
def test_rotary_frequencies_that_would_be_lost_are_refused(folder, read):
    stored = plain_frequencies(folder) / torch.tensor([1.0, 2.0, 4.0, 8.0])
    adding(model__layers__0__self_attn__rotary_emb__inv_freq=stored)(folder)
    with pytest.raises(ModelError, match=r"layers.0.self_attn.rotary_emb.inv_freq holds other rotary frequencies"):
        read(folder)


OLD_BUFFERS = {
    "gpt2": ("transformer.h.{}.attn", 4),
    "gptj": ("transformer.h.{}.attn", 4),
    "gpt_neo": ("transformer.h.{}.attn.attention", 4),
}


@LOADERS
@pytest.mark.parametrize("family", OLD_BUFFERS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_only_true_causal_masks_of_old_checkpoints_are_ignored(tmp_path, family, dtype, read):
    folder = save_tiny_model(tmp_path / family, family, window=64)
    name, blocks = OLD_BUFFERS[family]
    mask = torch.ones(64, 64).tril().view(1, 1, 64, 64)
    buffers = {f"{name.format(n)}.bias": mask.to(dtype).clone() for n in range(blocks)}
    buffers |= {f"{name.format(n)}.masked_bias": torch.tensor(-1e9) for n in range(blocks)}
    tensors(lambda named: {**named, **buffers})(folder)
    read(folder)
    tensors(lambda named: {**named, f"{name.format(0)}.masked_bias": torch.tensor(0.5)})(folder)
    with pytest.raises(ModelError, match="masked_bias"):
        read(folder)


@LOADERS
def test_layers_that_predict_further_tokens_are_ignored(tmp_path, read):
    folder = save_tiny_model(tmp_path / "deepseek", "deepseek_v3")
    configured(num_nextn_predict_layers=1)(folder)
    tensors(lambda named: {**named, "model.layers.4.eh_proj.weight": torch.ones(32, 64)})(folder)
    read(folder)
    tensors(lambda named: {**named, "model.layers.5.eh_proj.weight": torch.ones(32, 64)})(folder)
    with pytest.raises(ModelError, match=r"holds 1 tensor .*layers.5"):
        read(folder)


@LOADERS
def test_a_tensor_in_two_shards_is_refused(tmp_path, read):
    folder = save_tiny_model(tmp_path / "sharded")
    loading.load(loading.resolve(str(folder))).model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    read(folder)
    one, other, *_ = sorted(folder.glob("*.safetensors"))
    name, value = next(iter(load_file(one).items()))
    save_file({**load_file(other), name: value + 1}, other, {"format": "pt"})
    with pytest.raises(ModelError, match=f"tensor '{name}' is in two files, {one.name} and {other.name}"):
        read(folder)


def test_a_models_own_causal_class_may_have_any_name():
    from transformers import LlamaConfig

    config = LlamaConfig(architectures=["Anything"])
    with pytest.raises(ModelError, match="not a causal decoder"):
        loading.check_decoder(config, "x")
    config.auto_map = {"AutoModelForCausalLM": "modeling_x.Anything"}
    loading.check_decoder(config, "x")


@LOADERS
def test_a_folder_with_the_suffix_of_weights_is_ignored(folder, read):
    (folder / "old.bin").mkdir()
    loading.resolve(str(folder)).fingerprint()
    read(folder)


def llama4_with_vision(folder: Path) -> Path:
    """A tiny Llama 4 with its vision tower, as it is published."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = {**FAMILIES["llama"][1], "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2,
            "interleave_moe_layer_step": 2}  # fmt: skip
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
              "image_size": 28, "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16,
              "projector_output_dim": 16}  # fmt: skip
    Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).save_pretrained(folder)
    tiny_tokenizer("byte_bpe").save_pretrained(folder)
    return folder


@LOADERS
def test_only_the_vision_tower_beside_a_text_decoder_is_ignored(tmp_path, read):
    folder = llama4_with_vision(tmp_path / "whole")
    model, _ = read(folder)
    assert type(model).__name__ == "Llama4ForCausalLM"
    adding(language_model__model__layers__0__self_attn__q_proj__scale=torch.ones(1))(folder)
    with pytest.raises(ModelError, match=r"no place for .*q_proj\.scale"):
        read(folder)


@LOADERS
def test_a_tied_head_needs_no_tensor(tmp_path, read):
    folder = save_tiny_model(tmp_path / "tied", "llama_tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model, warnings = read(folder)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert warnings == []


@LOADERS
def test_different_weights_that_config_json_ties_lead_to_a_warning(folder, read):
    configured(tie_word_embeddings=True)(folder)
    model, warnings = read(folder)
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert any("with different values" in message for message in warnings)


@LOADERS
@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_the_attention_of_another_package_is_replaced_by_the_default(folder, tiny, attention, read):
    configured(attn_implementation=attention)(folder)
    model, warnings = read(folder)
    assert any(attention in message for message in warnings)
    assert model.config._attn_implementation in ("sdpa", "eager")
    forecast(StudyConfig(model=str(folder), limit=1, languages=("en",)))


@pytest.mark.parametrize(
    "entries",
    [
        {"model_type": "llava"},
        {"model_type": "qwen2_vl", "attn_implementation": "flash_attention_2"},
        {"model_type": "mllama_text_model"},
        {"model_type": "emu3_text_model"},
        {"model_type": "whisper"},
        {"model_type": "t5"},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "nobody-knows"},
        {},
    ],
)
def test_a_dry_run_gives_the_error_of_the_run(folder, entries):
    (folder / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ModelError) as dry:
        forecast(StudyConfig(model=str(folder), limit=1, languages=("en",)))
    with pytest.raises(ModelError) as run:
        whole(folder)
    assert str(dry.value) == str(run.value)
    assert "\n" not in str(run.value)


def test_the_message_names_a_pickle_only_if_there_is_one(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights") as caught:
        whole(folder)
    assert "--allow-pickle" not in str(caught.value)
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle \(pytorch_model.bin\).*--allow-pickle"):
        whole(folder)


def test_a_pickle_is_checked_like_other_weights(folder):
    named = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(named, folder / "pytorch_model.bin")
    model, _ = whole(folder, allow_pickle=True)
    assert torch.equal(model.lm_head.weight, named["lm_head.weight"])
    del named["lm_head.weight"]
    torch.save(named, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"lacks 1 tensor .*lm_head"):
        whole(folder, allow_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(ModelError, match="its pickle is damaged"):
        whole(folder, allow_pickle=True)


def test_a_mixture_of_experts_runs_in_fp64(tmp_path):
    import xprobe

    folder = save_tiny_model(tmp_path / "moe", "qwen3_moe")
    options = {"dtype": "float64", "languages": ["en", "de"], "limit": 2, "probes": (), "bootstrap": 20}
    one = xprobe.run(folder, out=tmp_path / "a", **options)
    other = xprobe.run(folder, out=tmp_path / "b", stream=True, **options)
    assert parity(one) < 1e-6
    together = one.layers.merge(other.layers, on=["setting", "layer", "language", "signal"])
    assert len(together) == len(one.layers)
    assert (together["value_x"] - together["value_y"]).abs().max() < 1e-6


def outcome(folder: Path) -> str:
    """The error of a dry run, or "" without an error."""
    try:
        forecast(StudyConfig(model=str(folder), limit=1, languages=("en",)))
    except XprobeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", [None, -1, "x", []])
def test_a_wrong_entry_of_config_json_gives_an_error_of_one_line_or_none(folder, value):
    file = folder / "config.json"
    entries = json.loads(file.read_text())
    errors = {}
    for name in entries:
        file.write_text(json.dumps({**entries, name: value}))
        errors[name] = outcome(folder)
    assert not any("\n" in line for line in errors.values())
    assert errors["hidden_size"] != ""
    assert errors["bos_token_id"] == "" or value is not None


def test_a_change_in_the_middle_of_a_large_file_changes_the_fingerprint(folder) -> None:
    large = folder / "model-00002-of-00002.safetensors"
    with large.open("wb") as handle:
        handle.truncate(70 << 20)
    before = loading.resolve(str(folder)).fingerprint()
    with large.open("r+b") as handle:
        handle.seek(40 << 20)
        handle.write(b"\1" * (2 << 20))  # as large as a small weight matrix
    assert loading.resolve(str(folder)).fingerprint() != before


def test_the_smallest_window_of_a_configuration_counts() -> None:
    from transformers import MptConfig

    config = MptConfig(max_seq_len=64)
    config.max_position_embeddings = 4096  # an entry that the family does not read
    assert loading.window(config) == 64
