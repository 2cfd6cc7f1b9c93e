"""The check finds leaks between prompts of one pass: small ones, and ones beside very large channels."""

from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, random_ids, save_tiny_model, tiny_model
from support.prompts import chosen, family_of_prompts, requests
from support.runs import chosen_strategy
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from xprobe_kernels import reference

from xprobe.capture import tree_attention
from xprobe.capture.engine import Engine
from xprobe.capture.requests import Each, Mean, Request, check_requests
from xprobe.capture.sharing import CHECK_REQUESTS, CHECK_TOKENS, carries_state, short_sample
from xprobe.capture.tree import common_length
from xprobe.models.anatomy import inspect
from xprobe.models.token_limits import TokenLimits

SAMPLE = family_of_prompts(groups=1, each=3)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
RECURRENT = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 160, "state_size": 8, "time_step_rank": 4},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 160, "attention_hidden_size": 32},
    "qwen3_next": {**FAMILIES["qwen3"][1], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
                   "layer_types": ["linear_attention", "full_attention"] * 2},
}  # fmt: skip


class Smeared(nn.Module):
    """A module that adds a little of the token before to each token: no convolution, no attention, no cache."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        return self.inner(hidden + self.share * before)


def smeared(share: float, dtype: torch.dtype):
    model = tiny_model("llama", dtype=dtype)
    model.model.layers[1].mlp = Smeared(model.model.layers[1].mlp, share)
    return model


def chosen_with_warnings(model) -> tuple[str, list[str]]:
    engine = Engine(model, inspect(model), 10_000)
    return chosen(engine, SAMPLE), engine.warn.messages


def largest_difference(model, strategy: str) -> float:
    """Largest difference in log-probability between the rows of a strategy and of plain runs, over all layers."""
    anatomy = inspect(model)
    engine = Engine(model, anatomy, 10_000)
    prompts = family_of_prompts()
    wanted = engine._capture(requests(prompts), "plain", 1).copy()
    got = engine._capture(requests(prompts), strategy, 10_000)
    one, other = (
        reference.logits(rows["answer"].double().flatten(0, 1), anatomy.head).log_softmax(-1) for rows in (got, wanted)
    )
    return float((one - other).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_leak_beside_a_large_channel_is_found(dtype):
    """In real models, some channels are a thousand times larger than the others, and hide differences in these."""
    model = tiny_model("lfm2", dtype=dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 300.0
    assert chosen_with_warnings(model)[0] == "plain"
    model = smeared(0.05 if dtype.itemsize >= 4 else 1.0, dtype)  # in bf16 a smaller share changes no bit beside 300
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 300.0
    strategy, warnings = chosen_with_warnings(model)
    assert strategy == "plain"
    assert "from layer 2 on a token depends on tokens of other prompts" in warnings[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1.0, 1e-1, 1e-2, 1e-3])
def test_a_small_leak_is_found_in_every_dtype(share, dtype):
    """Neither a tree nor a cache of keys and values holds such a state, so the model is run plainly."""
    assert chosen_with_warnings(smeared(share, dtype))[0] == "plain"


class Averaged(nn.Module):
    """An exponential average over the tokens so far."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        average, states = torch.zeros_like(hidden[:, 0]), []
        for token in hidden.unbind(1):
            average = 0.9 * average + 0.1 * token
            states.append(average)
        return self.inner(hidden + self.share * torch.stack(states, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_that_fades_is_found(dtype):
    model = tiny_model("llama", dtype=dtype)
    model.model.layers[1].mlp = Averaged(model.model.layers[1].mlp, 0.05)
    assert chosen_with_warnings(model)[0] == "plain"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_leak_that_spares_position_0_is_found(dtype):
    """Code for packed sequences may start anew at position 0. No continuation in a tree has this position."""
    model = tiny_model("llama", dtype=dtype)
    block = model.model.layers[1]
    own = block.forward

    def forward(hidden_states, *args, position_ids=None, **kwargs):
        before = torch.cat([torch.zeros_like(hidden_states[:, :1]), hidden_states[:, :-1]], 1)
        shifted = 0.05 * before * (position_ids > 0)[..., None]
        return own(hidden_states + shifted, *args, position_ids=position_ids, **kwargs)

    block.forward = forward
    assert chosen_with_warnings(model)[0] == "plain"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_channel_alone_does_not_prevent_sharing(dtype):
    model = tiny_model("llama", dtype=dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 300.0
    assert chosen_with_warnings(model) == ("tree", [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", RECURRENT)
def test_models_that_carry_state_share_nothing(kind, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **RECURRENT[kind])).eval().to(dtype)
    strategy, warnings = chosen_with_warnings(model)
    assert strategy == "plain"
    assert "keeps a state from token to token" in warnings[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_the_positions_it_is_given_is_not_packed(dtype):
    model = tiny_model("llama", dtype=dtype)
    own = model.model.rotary_emb.forward

    def by_place(hidden: torch.Tensor, position_ids: torch.Tensor):
        return own(hidden, torch.arange(hidden.shape[1])[None])

    model.model.rotary_emb.forward = by_place
    assert chosen_with_warnings(model)[0] != "tree"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "qwen3_moe", "bloom", "lfm2"])
def test_the_strategy_that_is_chosen_gives_the_log_probabilities_of_plain_runs(family):
    model = tiny_model(family)
    assert largest_difference(model, chosen_with_warnings(model)[0]) < 1e-4


class Counting(nn.Module):
    """Its result depends on how many prompts are in the pass, as experts with a capacity do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden) * (1 + hidden.shape[0] / 10 + hidden.shape[1] / 1000)


def test_a_model_whose_rows_depend_on_the_batch_is_run_one_prompt_at_a_time():
    model = tiny_model("llama")
    model.model.layers[1].mlp = Counting(model.model.layers[1].mlp)
    anatomy = inspect(model)
    engine = Engine(model, anatomy, 10_000)
    assert chosen(engine, SAMPLE) == "plain"
    assert "one prompt at a time: its rows depend on the batch" in engine.warn.messages[-1]
    prompts = family_of_prompts()
    got = engine.capture(requests(prompts)).copy()
    for number, one in enumerate(prompts):
        alone = engine.capture(requests([one]))
        assert torch.equal(got.part(number, number + 1)["answer"], alone["answer"])


def test_a_convolution_in_the_blocks_is_found_without_a_run():
    model = tiny_model("lfm2")
    assert "convolution" in str(carries_state(model, inspect(model).blocks))
    model = tiny_model("llama")
    assert carries_state(model, inspect(model).blocks) is None


def test_a_streamed_model_that_carries_state_is_not_packed(tmp_path):
    import xprobe

    folder = save_tiny_model(tmp_path / "lfm2", "lfm2")
    options = {"languages": ["en", "de"], "limit": 2, "probes": (), "bootstrap": 20}
    streamed = xprobe.run(folder, stream=True, out=tmp_path / "a", **options)
    whole = xprobe.run(folder, out=tmp_path / "b", **options)
    assert chosen_strategy(streamed) == chosen_strategy(whole) == "plain"
    both = streamed.layers.merge(whole.layers, on=["setting", "layer", "language", "signal"])
    readiness = both[both["signal"] == "readiness"]
    assert (readiness["value_x"] - readiness["value_y"]).abs().max() < 1e-4


# -- the cost of the check ----------------------------------------------------------------------------------------


def long_requests(length: int, own: int = 20, count: int = 4) -> list[Request]:
    """Requests of ``length`` tokens, of which the last ``own`` differ; one of them is of another group."""
    shared, *others = (tuple(row.tolist()) for row in random_ids(count + 2, length, seed=3))
    ends = [(*shared[: length - own], *other[:own]) for other in others[:count]]
    return [
        Request(ids, {"last": Each((length - 1,)), "all": Mean(0, length)}, f"g{ids[0]}")
        for ids in (*ends[: count - 1], others[-1])
    ]


def model_with_window(family: str, **options):
    config = AutoConfig.for_model(
        FAMILIES[family][0], **{**FAMILIES[family][1], "max_position_embeddings": 4096, **options}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens_of_the_check(model, sample) -> int:
    """Tokens that the model runs over while an engine chooses its strategy."""
    sizes = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        engine = Engine(model, inspect(model), 4096)
        sizes.clear()
        engine.choose_strategy(sample)
        assert engine.strategy == "tree"
    finally:
        hook.remove()
    return sum(sizes)


def test_the_check_costs_the_same_for_long_and_for_many_prompts():
    model = model_with_window("llama")
    cost = tokens_of_the_check(model, long_requests(400))
    assert tokens_of_the_check(model, long_requests(3000)) == cost
    assert (
        tokens_of_the_check(model, long_requests(3000, own=2500, count=12)) <= 2 * CHECK_REQUESTS * CHECK_TOKENS + 512
    )


def test_short_requests_are_checked_whole_and_long_ones_still_share_their_beginning():
    config = model_with_window("llama").config
    whole = requests(SAMPLE)
    assert [one.ids for one in short_sample(whole, config)] == [one.ids for one in whole[:CHECK_REQUESTS]]
    sample = long_requests(3000)
    short = short_sample(sample, config)
    assert max(len(one.ids) for one in short) == CHECK_TOKENS
    assert common_length(short[0].ids, short[1].ids) == CHECK_TOKENS - 20
    assert [one.ids[-20:] for one in short] == [one.ids[-20:] for one in sample]
    check_requests(short, TokenLimits(160))


@pytest.mark.parametrize(("length", "strategies"), [(600, {"prefix", "plain"}), (150, {"tree"})])
def test_a_window_that_packing_forgets_is_found_if_prompts_are_longer_than_it(monkeypatch, length, strategies):
    rule = tree_attention.Rule
    monkeypatch.setattr(tree_attention, "Rule", lambda scale, window, softcap: rule(scale, None, softcap))
    model = model_with_window("mistral", sliding_window=200)
    engine = Engine(model, inspect(model), 4096)
    engine.choose_strategy(long_requests(length))
    assert engine.strategy in strategies
