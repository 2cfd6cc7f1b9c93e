"""Statistics of every label: those of the fp64 softmax over all logits, at the place of the label, and forward only."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import random_ids, tiny_model
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from xprobe_kernels import Unembedding, lens, token_statistics, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD = Unembedding(torch.eye(6, device=DEVICE), norm="none")
HIDDEN = torch.arange(2 * 4 * 6.0, device=DEVICE).sin().view(2, 4, 6)
LABELS = torch.tensor([[0, 1, -100, 3], [5, 4, 3, -100]], device=DEVICE)


def wanted(hidden: Tensor, labels: Tensor, weight: Tensor, ignore_index: int, shift: bool) -> dict[str, Tensor]:
    """Log-probability, entropy, and all log-probabilities by the definition, in fp64, at the places of the labels."""
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    known = labels != ignore_index
    if shift:
        log_p = torch.cat([torch.zeros_like(log_p[:, :1]), log_p[:, :-1]], 1)
        known = known & (torch.arange(labels.shape[1], device=labels.device) > 0)
    own = log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return {"known": known, "all": log_p, "own": own, "entropy": -(log_p.exp() * log_p).sum(-1)}


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    batch, length = draw(st.integers(0, 3)), draw(st.integers(0, 7))
    width, vocabulary = draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 33, 1024, 1025, 2500]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    labels = torch.randint(0, vocabulary, (batch, length), generator=random)
    ignore_index = draw(st.sampled_from([-100, -1, 0, vocabulary]))
    left_out = torch.rand(batch, length, generator=random) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    return {
        "hidden": torch.randn(batch, length, width, generator=random).to(DEVICE),
        "labels": labels.masked_fill(left_out, ignore_index).to(DEVICE),
        "weight": torch.randn(vocabulary, width, generator=random).to(DEVICE),
        "ignore_index": ignore_index,
        "shift": draw(st.booleans()),
        "top_k": draw(st.integers(0, min(4, vocabulary))),
    }


@settings(max_examples=10 if DEVICE == "cuda" else 150, deadline=None, derandomize=True)
@given(batch=batches())
def test_every_shape_and_every_pattern_of_left_out_labels(batch) -> None:
    hidden, labels, weight, top_k = (batch.pop(name) for name in ("hidden", "labels", "weight", "top_k"))
    values = token_statistics(hidden, labels, Unembedding(weight, norm="none"), top_k=top_k, **batch)
    if not labels.numel():
        assert values.log_probability.shape == values.rank.shape == values.entropy.shape == labels.shape
        return
    labels = torch.where(labels == weight.shape[0], -100, labels)  # an id that the definition cannot gather
    batch["ignore_index"] = -100 if batch["ignore_index"] == weight.shape[0] else batch["ignore_index"]
    truth = wanted(hidden, labels, weight, **batch)
    known = truth["known"]
    for found, exact in ((values.log_probability, truth["own"]), (values.entropy, truth["entropy"])):
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double(), exact.masked_fill(~known, torch.nan), atol=1e-4, rtol=0, equal_nan=True
        )
    margins = (truth["all"] - truth["own"][..., None])[known]
    ranks = values.rank[known]
    assert (values.rank[~known] == 0).all()
    assert ((margins > 1e-4).sum(-1) < ranks).all()
    assert (ranks <= (margins > -1e-4).sum(-1)).all()  # the label itself has margin 0
    if not top_k:
        assert values.top_ids is None
        assert values.top_log_probability is None
        return
    assert (values.top_ids[~known] == -1).all()
    assert values.top_log_probability[~known].isnan().all()
    best = truth["all"][known].topk(top_k).values
    torch.testing.assert_close(values.top_log_probability[known].double(), best, atol=1e-4, rtol=0)
    chosen = truth["all"][known].gather(1, values.top_ids[known])
    torch.testing.assert_close(chosen, best, atol=1e-4, rtol=0)


def test_one_sequence_and_more_leading_dimensions() -> None:
    values = token_statistics(HIDDEN, LABELS, HEAD, top_k=2)
    alone = token_statistics(HIDDEN[1], LABELS[1], HEAD, top_k=2)
    deep = token_statistics(HIDDEN[None, :, None], LABELS[None, :, None], HEAD, top_k=2)
    for name, value in vars(values).items():
        assert torch.equal(getattr(alone, name).nan_to_num(9), value[1].nan_to_num(9)), name
        assert torch.equal(getattr(deep, name)[0, :, 0].nan_to_num(9), value.nan_to_num(9)), name


def test_rows_of_left_out_labels_are_not_computed(monkeypatch) -> None:
    counts = []

    def counted(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        counts.append(len(hidden))
        return lens(hidden, *arguments, **options)

    monkeypatch.setattr(tokens, "lens", counted)
    token_statistics(HIDDEN, LABELS, HEAD)
    token_statistics(HIDDEN, LABELS, HEAD, shift=False)
    assert counts == [4, 6]


def test_a_state_that_is_not_finite_affects_its_own_label_alone() -> None:
    broken = HIDDEN.clone()
    broken[0, 0, 0] = torch.nan
    values, before = token_statistics(broken, LABELS, HEAD), token_statistics(HIDDEN, LABELS, HEAD)
    assert values.rank[0, 1] == 0
    assert values.log_probability[0, 1].isnan()
    assert torch.equal(values.rank[1], before.rank[1])
    assert values.rank[0, 3] == before.rank[0, 3] > 0


# -- models of transformers: docs/kernels-alone.md shows these heads -------------------------------------------------


def final_norm(model: Any) -> Any:
    body = model.base_model
    return next(getattr(body, name) for name in ("norm", "ln_f", "final_layernorm") if hasattr(body, name))


def head_of(family: str, model: Any) -> Unembedding:
    norm, config, weight = final_norm(model), model.config, model.lm_head.weight
    if family in ("gpt2", "gptj", "phi"):
        bias = model.lm_head.bias
        return Unembedding(weight, norm="layer", gamma=norm.weight, beta=norm.bias, eps=norm.eps, bias=bias)
    if family == "cohere":
        scale = config.logit_scale
        return Unembedding(weight, norm="layer", gamma=norm.weight, eps=norm.variance_epsilon, scale=scale)
    if family in ("gemma", "gemma2", "gemma3"):
        gamma, cap = 1 + norm.weight.float(), getattr(config, "final_logit_softcapping", None)
        return Unembedding(weight, norm="rms", gamma=gamma, eps=norm.eps, softcap=cap)
    scale = 1 / config.logits_scaling if family == "granite" else 1.0
    return Unembedding(weight, norm="rms", gamma=norm.weight, eps=norm.variance_epsilon, scale=scale)


HEADS = ["llama", "mistral", "qwen2", "gemma", "gemma2", "gemma3", "gpt2", "gptj", "phi", "cohere", "granite"]


@pytest.mark.parametrize("family", HEADS)
def test_the_heads_of_the_page_give_the_models_own_loss(family) -> None:
    model = tiny_model(family).to(DEVICE)
    head, ids = head_of(family, model), random_ids(2, 9).to(DEVICE)
    labels = ids.clone()
    labels[0, :4] = -100
    raw: list[Tensor] = []
    with torch.no_grad(), torch.random.fork_rng():
        hook = final_norm(model).register_forward_pre_hook(lambda module, inputs: raw.append(inputs[0]))
        outputs = model(ids, labels=labels)
        normed = model.base_model(ids).last_hidden_state
        hook.remove()
        values = token_statistics(raw[0], labels, head)
        again = token_statistics(normed, labels, head.without_norm())
    assert float(-values.log_probability.nanmean()) == pytest.approx(float(outputs.loss), abs=1e-4)
    torch.testing.assert_close(again.log_probability, values.log_probability, atol=1e-4, rtol=0, equal_nan=True)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    moved = token_statistics(normed, shifted, head.without_norm(), shift=False)
    assert torch.equal(moved.rank[:, :-1], again.rank[:, 1:])
    assert (moved.rank[:, -1] == 0).all()


# -- gradients and torch.compile ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda hidden: token_statistics(hidden, LABELS, HEAD),
        lambda hidden: lens(hidden[0], HEAD, LABELS[0].clamp(min=0)),
    ],
)
def test_hidden_states_of_a_graph_are_refused_unless_gradients_are_off(call) -> None:
    hidden = HIDDEN.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"hidden requires a gradient.*computes none.*hidden\.detach\(\).*no_grad"):
        call(hidden * 2)
    for allowed in (torch.no_grad(), torch.inference_mode()):
        with allowed:
            assert not call(hidden * 2).entropy.requires_grad
    assert not call((hidden * 2).detach()).entropy.requires_grad


def test_a_head_in_training_is_followed_but_gets_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.eye(6, device=DEVICE))
    head = Unembedding(weight, norm="none")
    before = token_statistics(HIDDEN, LABELS, head).entropy.nan_to_num(9)
    assert not before.requires_grad
    weight.grad = torch.eye(6, device=DEVICE) * torch.arange(6, device=DEVICE)
    torch.optim.SGD([weight], lr=1.0).step()
    after = token_statistics(HIDDEN, LABELS, head).entropy.nan_to_num(9)
    made_again = token_statistics(HIDDEN, LABELS, Unembedding(weight.detach(), norm="none")).entropy.nan_to_num(9)
    assert torch.equal(after, made_again)
    assert not torch.allclose(after, before)


def test_states_made_under_inference_mode_are_read_outside_of_it() -> None:
    with torch.inference_mode():
        hidden = HIDDEN * 1
    assert torch.equal(token_statistics(hidden, LABELS, HEAD).rank, token_statistics(HIDDEN, LABELS, HEAD).rank)


def test_a_compiled_function_may_call_it_disabled() -> None:
    outside = torch.compiler.disable(token_statistics)

    def step(hidden: Tensor, labels: Tensor) -> Tensor:
        return outside(hidden * 2, labels, HEAD).entropy.nanmean()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.compile(step, backend="eager")(HIDDEN, LABELS)
    assert float(found) == pytest.approx(float(token_statistics(HIDDEN * 2, LABELS, HEAD).entropy.nanmean()))


def test_a_head_that_is_spread_over_devices_must_be_gathered() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(HEAD.weight.cpu(), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match=r"weight is a DTensor.*weight\.full_tensor\(\)"):
            Unembedding(weight, norm="none")
        assert Unembedding(weight.full_tensor(), norm="none").vocab_size == 6
    finally:
        dist.destroy_process_group()


# -- refusals -------------------------------------------------------------------------------------------------------

LARGE = LABELS.masked_fill(LABELS == 3, 6)
NEGATIVE = LABELS.masked_fill(LABELS == 4, -1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((HIDDEN, LABELS, HEAD.weight), {}, r"head must be an Unembedding, got torch\.float32 \[6, 6\]"),
        ((HIDDEN[0, 0], LABELS, HEAD), {}, r"hidden must be a floating-point tensor \[B, T, 6\], got .* \[6\]"),
        ((LABELS, LABELS, HEAD), {}, r"hidden must be a floating-point .* got torch\.int64 \[2, 4\]"),
        ((HIDDEN[..., :5], LABELS, HEAD), {}, r"hidden has width 5, the head's weight has width 6"),
        ((HIDDEN, LABELS[:, 1:], HEAD), {}, r"labels must be an int64 tensor of shape \[2, 4\].* got .*\[2, 3\]"),
        ((HIDDEN, LABELS.int(), HEAD), {}, r"labels must be an int64 tensor .* got torch\.int32"),
        ((HIDDEN, None, HEAD), {}, r"labels must be an int64 tensor .* got NoneType"),
        ((HIDDEN, LABELS.to("meta"), HEAD), {}, r"labels is on meta, hidden is on"),
        ((HIDDEN, LARGE, HEAD), {}, r"labels holds 6 at \[0, 3\]; every .* from 0 to 5, or ignore_index, .*-100"),
        ((HIDDEN, NEGATIVE, HEAD), {}, r"labels holds -1 at \[1, 1\]"),
        ((HIDDEN, LABELS, HEAD), {"ignore_index": -1}, r"labels holds -100 at \[0, 2\].* which is -1"),
        ((HIDDEN, LABELS, HEAD), {"ignore_index": None}, r"ignore_index must be a whole number, got None"),
        ((HIDDEN, LABELS, HEAD), {"shift": 1}, r"shift must be True or False, got 1"),
        ((HIDDEN, LABELS, HEAD), {"top_k": 7}, r"top_k must be a whole number from 0 to 6, got 7"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(arguments, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        token_statistics(*arguments, **options)
