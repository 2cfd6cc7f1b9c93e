"""Block-by-block runs from a checkpoint: the states of the model in memory, and each byte is read once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.families import COMMON, FAMILIES, OLD, random_ids, tiny_model

from xprobe.errors import ModelError, ParityError
from xprobe.models.anatomy import inspect, watch_states
from xprobe.models.parity import compare_with_model
from xprobe.models.passes import Pass
from xprobe.models.streaming.streamed import open_streamed, own_logits, sweep

STATE_BYTES = 32 * 4  # hidden state of one token in the tiny models


def padded_ids() -> list[torch.Tensor]:
    """A batch with padding (id 0) on the right, and a longer batch of one row."""
    batch = random_ids(2, 12)
    batch[1, 9:] = 0
    return [batch, random_ids(1, 20, 1)]


def saved(family: str, folder: Path, **options) -> Path:
    tiny_model(family).save_pretrained(folder, **options)
    return folder


def in_memory(folder: Path, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def states_in_memory(model, batches: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    blocks, result = inspect(model).blocks, []
    for ids in batches:
        states: list[torch.Tensor] = []
        with torch.inference_mode(), watch_states(blocks, lambda layer, hidden, to=states: to.append(hidden.clone())):
            model(input_ids=ids, use_cache=False)
        result.append(states)
    return result


def streamed_states(streamed, batches: list[torch.Tensor], **options):
    """(states per batch and layer, report) of a sweep. Asserts that the layers come in order."""
    result: list[list[torch.Tensor]] = [[] for _ in batches]

    def receiver(states: list[torch.Tensor]):
        def receive(layer: int, hidden: torch.Tensor) -> None:
            assert layer == len(states)
            states.append(hidden.clone())

        return receive

    report = sweep(
        streamed,
        [Pass({"input_ids": ids}, receiver(states)) for states, ids in zip(result, batches, strict=True)],
        **options,
    )
    return result, report


def assert_equal_states(got: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]], atol: float = 1e-5) -> None:
    for one, other in zip(got, wanted, strict=True):
        for layer, (a, b) in enumerate(zip(one, other, strict=True)):
            assert a.dtype == b.dtype
            assert torch.allclose(a, b, rtol=0, atol=atol), f"layer {layer}"


def no_block_in_memory(streamed) -> bool:
    return all(value.is_meta for block in streamed.anatomy.blocks for value in block.state_dict().values())


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_family_gives_the_states_of_the_model_in_memory(family, tmp_path):
    folder = saved(family, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    batches = padded_ids()
    model = in_memory(folder)
    wanted = states_in_memory(model, batches)
    streamed = open_streamed(folder, device="cpu")
    got, report = streamed_states(streamed, batches)
    assert_equal_states(got, wanted)
    assert streamed.checkpoint.bytes_read == streamed.nbytes == streamed.checkpoint.nbytes
    assert 0 < report.bytes_read < streamed.nbytes
    anatomy = inspect(model)
    assert streamed.anatomy.head.fingerprint() == anatomy.head.fingerprint()
    assert streamed.anatomy.names == anatomy.names
    with torch.inference_mode():
        logits = model(input_ids=batches[1], use_cache=False).logits[0]
    assert torch.allclose(own_logits(streamed, got[1][-1][0]), logits, rtol=0, atol=1e-5)
    assert no_block_in_memory(streamed)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in streamed.model.modules())


@pytest.mark.parametrize("family", ["llama_tied", "mixtral", "gemma2", "mpt"])
def test_fp32_files_are_converted_to_another_dtype(family, tmp_path):
    folder = saved(family, tmp_path)
    streamed = open_streamed(folder, "bfloat16", "cpu")
    got, _ = streamed_states(streamed, padded_ids())
    assert_equal_states(got, states_in_memory(in_memory(folder, torch.bfloat16), padded_ids()), atol=0.0)
    assert streamed.checkpoint.bytes_read == streamed.checkpoint.nbytes


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "opt_projected", "cohere", "granite"])
def test_parity_needs_no_second_pass(family, tmp_path):
    streamed = open_streamed(saved(family, tmp_path), device="cpu")
    got, _ = streamed_states(streamed, padded_ids())
    rows, targets = got[1][-1][0], padded_ids()[1][0].roll(-1)
    logits, head = own_logits(streamed, rows), streamed.anatomy.head
    assert compare_with_model(streamed.model, rows, logits, head, targets) < 1e-3
    with pytest.raises(ParityError, match="off the model's own log-probabilities"):
        compare_with_model(streamed.model, rows, logits, replace(head, scale=1.1 * head.scale), targets)


def test_own_logits_accept_more_rows_than_the_model_has_positions(llama):
    streamed = open_streamed(llama, device="cpu")
    rows = torch.randn(150, 32)
    whole = own_logits(streamed, rows)
    assert whole.shape == (150, 160)
    assert torch.allclose(whole[140:], own_logits(streamed, rows[140:]), atol=1e-6)


@pytest.mark.parametrize("budget", [0, 20 * STATE_BYTES, 30 * STATE_BYTES])
def test_spilled_states_are_unchanged(llama, tmp_path, budget):
    streamed = open_streamed(llama, device="cpu")
    wanted, report = streamed_states(streamed, padded_ids())
    assert report.spilled_bytes == 0
    got, report = streamed_states(streamed, padded_ids(), spill_bytes=budget, folder=tmp_path)
    assert_equal_states(got, wanted, atol=0.0)
    tokens = 8 + 8 + 24 + 20  # two probes, two batches
    assert tokens * STATE_BYTES - budget <= report.spilled_bytes <= tokens * STATE_BYTES
    assert not list(tmp_path.iterdir())


def test_the_error_names_a_spill_folder_that_cannot_be_written(llama, tmp_path):
    with pytest.raises(ModelError, match=r"cannot keep hidden states in .*nowhere"):
        streamed_states(open_streamed(llama, device="cpu"), padded_ids(), spill_bytes=0, folder=tmp_path / "nowhere")


def test_at_most_two_blocks_are_in_memory_and_the_next_is_read_while_one_computes(llama):
    streamed = open_streamed(llama, device="cpu")
    blocks = streamed.anatomy.blocks
    seen: list[set[int]] = []

    def loaded() -> set[int]:
        return {index for index, block in enumerate(blocks) if not any(p.is_meta for p in block.parameters())}

    def receive(layer: int, hidden: torch.Tensor) -> None:
        deadline = time.monotonic() + 10
        while layer and layer < len(blocks) and layer not in loaded() and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(loaded())

    sweep(streamed, [Pass({"input_ids": random_ids(1, 8)}, receive)])
    assert seen[1:] == [{0, 1}, {1, 2}, {2, 3}, {3}]


def test_each_call_of_the_decoder_is_inside_the_context_of_its_pass(llama):
    current: ContextVar[str | None] = ContextVar("current", default=None)
    streamed = open_streamed(llama, device="cpu")
    seen: list[tuple[str | None, int]] = []
    for block in streamed.anatomy.blocks:
        attention = block.self_attn
        attention.register_forward_pre_hook(lambda module, args: seen.append((current.get(), module.layer_idx)))

    def named(name: str) -> Pass:
        @contextmanager
        def active():
            token = current.set(name)
            yield
            current.reset(token)

        return Pass({"input_ids": random_ids(1, 6)}, lambda layer, hidden: None, active)

    sweep(streamed, [named("a"), named("b")])
    assert [entry for entry in seen if entry[0]] == [(name, layer) for layer in range(4) for name in "ab"]


def test_an_error_in_a_receiver_frees_all_blocks(llama):
    streamed = open_streamed(llama, device="cpu")

    def receive(layer: int, hidden: torch.Tensor) -> None:
        if layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(streamed, [Pass({"input_ids": random_ids(1, 8)}, receive)])
    assert no_block_in_memory(streamed)
    got, _ = streamed_states(streamed, padded_ids())
    assert_equal_states(got, states_in_memory(in_memory(llama), padded_ids()))


def test_progress_counts_the_blocks_of_all_passes(llama):
    calls: list[tuple[int, int]] = []
    passes = [Pass({"input_ids": random_ids(1, 8)}, lambda layer, hidden: None)] * 3
    sweep(open_streamed(llama, device="cpu"), passes, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 12) for done in range(1, 13)]


def rewritten(folder: Path, family: str, change) -> Path:
    """Saves a model without save_pretrained. ``change`` maps each name to a new one, or to None to drop the tensor."""
    model = tiny_model(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    named = {change(name): value.contiguous().clone() for name, value in model.state_dict().items()}
    named.pop(None, None)
    save_file(named, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mixtral", lambda name: name),  # experts that are already fused
        ("qwen3_moe", lambda name: name),
        ("gpt2", lambda name: None if name == "lm_head.weight" else name.removeprefix("transformer.")),
        ("llama_tied", lambda name: None if name == "lm_head.weight" else name.removeprefix("model.")),
        ("llama_tied", lambda name: name),  # both names of a tied weight
        ("gemma2", lambda name: None if name == "model.embed_tokens.weight" else name),  # only the name of the head
    ],
    ids=["fused", "fused-qwen", "gpt2-bare", "llama-bare", "tied-twice", "tied-head"],
)
def test_checkpoints_with_other_names_than_save_pretrained_writes_are_read(family, change, tmp_path):
    folder = rewritten(tmp_path, family, change)
    streamed = open_streamed(folder, device="cpu")
    got, _ = streamed_states(streamed, padded_ids())
    assert_equal_states(got, states_in_memory(in_memory(folder), padded_ids()))
    assert streamed.checkpoint.bytes_read == streamed.checkpoint.nbytes


def test_tied_weights_that_differ_in_the_files_stay_different(tmp_path):
    """As in transformers: the files decide, not the configuration."""
    model = tiny_model("llama_tied")
    model.config.save_pretrained(tmp_path)
    named = {name: value.clone() for name, value in model.state_dict().items()}
    named["lm_head.weight"] += 1
    save_file(named, tmp_path / "model.safetensors")
    streamed = open_streamed(tmp_path, device="cpu")
    assert torch.equal(streamed.anatomy.head.weight, named["lm_head.weight"])
    assert torch.equal(streamed.model.model.embed_tokens.weight, named["model.embed_tokens.weight"])


def test_a_vision_tower_with_the_same_number_of_layers_is_ignored(tmp_path):
    from transformers import AutoModelForCausalLM, Gemma3Config

    vision = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {**FAMILIES["gemma3"][1], "model_type": "gemma3_text"}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    streamed = open_streamed(tmp_path, device="cpu")
    got, _ = streamed_states(streamed, padded_ids())
    assert_equal_states(got, states_in_memory(in_memory(tmp_path), padded_ids()))
    assert "language_model" in streamed.anatomy.names["blocks"]
    assert streamed.checkpoint.bytes_read == streamed.nbytes < streamed.checkpoint.nbytes


def test_tensors_that_the_model_declares_as_ignorable_are_not_read(llama, tmp_path):
    from safetensors.torch import load_file

    named = load_file(llama / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": in_memory(llama).model.rotary_emb.inv_freq.clone()}
    save_file({**named, **extra}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    streamed = open_streamed(tmp_path, device="cpu")
    streamed_states(streamed, padded_ids())
    assert streamed.nbytes == streamed.checkpoint.nbytes - 4 * 4  # read once for a check, but not part of the model


def test_a_model_that_looks_at_later_tokens_is_refused(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options = FAMILIES["gemma3"]
    config = AutoConfig.for_model(kind, **options, use_bidirectional_attention=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    streamed = open_streamed(tmp_path, device="cpu")
    before = streamed.checkpoint.bytes_read
    with pytest.raises(ModelError, match="later tokens"):
        sweep(streamed, [])
    assert streamed.checkpoint.bytes_read - before < 0.6 * (streamed.nbytes - before)  # refused after the first block


def test_the_error_names_the_layer_of_damaged_weights(llama, tmp_path):
    model = in_memory(llama)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="NaN or infinity at layer 3"):
        sweep(open_streamed(tmp_path, device="cpu"), [])


SHARING = {
    "gemma4": ("gemma4_text", {**COMMON, "head_dim": 8, "num_kv_shared_layers": 0, "sliding_window": 8,
                               "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 160},
               r"'shared_kv_states', a \w+ through which blocks may share state"),
    "zamba2": ("zamba2", {**COMMON, "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "num_mem_blocks": 1,
                          "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 16},
               "ties model.layers"),
}  # fmt: skip


def test_blocks_that_return_three_values_run_one_at_a_time(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 160, "attention_hidden_size": 32}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", **sizes)).save_pretrained(tmp_path)
    got, _ = streamed_states(open_streamed(tmp_path, device="cpu"), padded_ids())
    assert_equal_states(got, states_in_memory(in_memory(tmp_path), padded_ids()))


@pytest.mark.parametrize("family", SHARING)
def test_blocks_that_share_more_than_a_hidden_state_are_refused_with_the_cause(family, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options, cause = SHARING[family]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=cause):
        open_streamed(tmp_path, device="cpu")


def test_blocks_with_arguments_from_earlier_blocks_are_refused(llama):
    from xprobe.models.anatomy import sample_ids
    from xprobe.models.streaming.stand_ins import BlockRunner

    model = in_memory(llama)
    ids = sample_ids(model)
    BlockRunner(model, model.model.layers, ids)
    block, own = model.model.layers[1], type(model.model.layers[1]).__call__

    class Peeking(type(block)):
        def __call__(self, hidden, **kwargs):
            return own(self, hidden, summary=hidden.mean(), **kwargs)

    class Scaling(type(block)):
        def __call__(self, hidden, **kwargs):
            return own(self, hidden * 2, **kwargs)

    for kind, cause in ((Peeking, "'summary', which depends on what earlier blocks"), (Scaling, "changed between two")):
        block.__class__ = kind
        with pytest.raises(ModelError, match=cause):
            BlockRunner(model, model.model.layers, ids)


MEMORY = """
import sys, torch
from support.families import random_ids
from support.memory import PeakMemory
from xprobe.models.passes import Pass
from xprobe.models.parity import compare_with_model
from xprobe.models.streaming.streamed import open_streamed, sweep
streamed = open_streamed(sys.argv[1], "float32", "cpu")
passes = [Pass({"input_ids": random_ids(1, 16, seed, 64)}, lambda layer, hidden: None) for seed in range(4)]
with PeakMemory() as peak:
    sweep(streamed, passes)
print(peak.growth, streamed.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_a_process_holds_two_blocks_and_not_the_model(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    options = {**COMMON, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**options))
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    block = sum(value.nbytes for value in model.model.layers[0].parameters())
    whole = sum(value.nbytes for value in model.parameters())
    del model
    answer = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    growth, read = map(int, answer.stdout.split())
    assert read == whole > 180e6
    assert block < growth < 4 * block  # two blocks, activations, and small tensors that the allocator keeps


def test_gpt2_with_causal_masks_in_its_checkpoint_is_read(tmp_path):
    """Old checkpoints hold the causal masks. The model now computes them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **OLD)).eval()
    model.config.save_pretrained(tmp_path)
    named = {name.removeprefix("transformer."): value.clone() for name, value in model.state_dict().items()}
    del named["lm_head.weight"]
    named |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(4)}
    save_file(named, tmp_path / "model.safetensors")
    got, _ = streamed_states(open_streamed(tmp_path, device="cpu"), padded_ids())
    assert_equal_states(got, states_in_memory(model, padded_ids()))
