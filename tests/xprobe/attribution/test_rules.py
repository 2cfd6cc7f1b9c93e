"""Rules of attribution: what they conserve, what they compute by hand, and that they leave a model as it was."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from support.families import FAMILIES, random_ids, tiny_model
from torch import Tensor, nn

from xprobe.attribution import relevance as module
from xprobe.attribution.parts import Norm
from xprobe.attribution.relevance import GradientRunner, relevance
from xprobe.attribution.rules import proportional, rule_applied
from xprobe.attribution.settings import RULES
from xprobe.errors import ModelError, UsageError
from xprobe.models.anatomy import inspect

NAMED = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "olmo2", "granite", "cohere", "smollm3", "gpt2",
    "gpt_neox", "mixtral", "qwen3_moe",
)  # fmt: skip
NAMED = tuple(name for name in NAMED if name in FAMILIES)
BIASED = ("qwen2", "gpt2", "gpt_neox")
TEXTS = [(tuple(random_ids(1, 12, seed=3)[0].tolist()), (8, 9, 11)), ((5, 6, 7, 9), (8,)), ((11, 12), (13, 14))]


@pytest.fixture(params=NAMED)
def named(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    model = tiny_model(request.param)
    return request.param, model, inspect(model)


def test_cp_conserves_the_answers_logits_in_families_without_biases(named: tuple[str, Any, Any]) -> None:
    family, model, anatomy = named
    for found in relevance(model, anatomy, TEXTS, "cp"):
        if family in BIASED:  # a bias has a share of its own
            assert torch.isfinite(found.conserved).all()
        else:
            assert found.conserved.tolist() == pytest.approx([1.0] * anatomy.n_layers, abs=1e-3)


def test_the_attributed_value_is_the_sum_of_the_models_own_logits(named: tuple[str, Any, Any]) -> None:
    _, model, anatomy = named
    for attributed in ("logit", "log_probability"):
        found = relevance(model, anatomy, TEXTS, "attnlrp", attributed)
        for (prompt, answer), one in zip(TEXTS, found, strict=True):
            with torch.inference_mode():
                values = model(torch.tensor([[*prompt, *answer]])).logits[0]
            values = values if attributed == "logit" else values.log_softmax(-1)
            wanted = sum(float(values[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
            assert one.attributed == pytest.approx(wanted, rel=1e-4, abs=1e-4)
            assert one.values.shape == (anatomy.n_layers, len(prompt) + len(answer) - 1)


def by_autograd(model: Any, anatomy: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """Gradient times input at every layer, from one graph of the whole model."""
    states: list[Tensor] = []

    def keep(hidden: Tensor) -> None:
        hidden.retain_grad()
        states.append(hidden)

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in anatomy.blocks]
    after = lambda module, args, output: keep(output if isinstance(output, Tensor) else output[0])  # noqa: E731
    hooks.append(anatomy.blocks[-1].register_forward_hook(after))
    logits = model(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0]
    torch.stack([logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]).sum().backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return torch.stack([(state * state.grad).sum(-1)[0] for state in states]).detach()


def test_gradient_is_autograd_through_the_whole_model(named: tuple[str, Any, Any]) -> None:
    _, model, anatomy = named
    for (prompt, answer), found in zip(TEXTS, relevance(model, anatomy, TEXTS, "gradient"), strict=True):
        wanted = by_autograd(model, anatomy, prompt, answer)
        assert torch.allclose(found.values, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("rule", RULES)
def test_block_by_block_is_the_whole_graph_under_the_rule(named: tuple[str, Any, Any], rule: str) -> None:
    """The final norm counts by the rule too, so it is compared from the last layer's gradient down."""
    _, model, anatomy = named
    (prompt, answer), *_ = TEXTS
    (found,) = relevance(model, anatomy, [(prompt, answer)], rule)
    whole: list[Tensor] = []
    with rule_applied(model, anatomy, rule):
        states: list[Tensor] = []
        hooks = [
            block.register_forward_pre_hook(
                lambda module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            for block in anatomy.blocks
        ]
        top = model.base_model(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False)
        for hook in hooks:
            hook.remove()
        last = states[-1]
        output = anatomy.blocks[-1]
        del output, top
        # the relevance of layer L - 1 and below depends on the gradient at L - 1 alone
        gradient = _gradient_at(model, anatomy, prompt, answer, rule, anatomy.n_layers - 2)
        graph = torch.autograd.grad(last, states[:-1], gradient)
        whole = [(state.detach() * own).sum(-1)[0] for state, own in zip(states[:-1], graph, strict=True)]
    wanted = torch.stack(whole)
    assert torch.allclose(found.values[: len(whole)], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max() + 1e-6))


def _gradient_at(model: Any, anatomy: Any, prompt: Any, answer: Any, rule: str, layer: int) -> Tensor:
    """The gradient at a layer, as ``relevance`` has it on its way down."""
    calls = module._forward(model, anatomy, torch.tensor([[*prompt, *answer[:-1]]]))
    top = calls[-1].result.detach().requires_grad_()
    with torch.enable_grad():
        value = module._attributed(top, [(prompt, answer)], anatomy.head, rule, "logit")
    (gradient,) = torch.autograd.grad(value.sum(), top)
    for call in reversed(calls[layer:]):
        gradient = call.gradient(gradient)
    return gradient


def test_texts_of_one_batch_have_the_relevance_of_each_alone(named: tuple[str, Any, Any]) -> None:
    _, model, anatomy = named
    together = relevance(model, anatomy, TEXTS, "cp")
    for text, found in zip(TEXTS, together, strict=True):
        (alone,) = relevance(model, anatomy, [text], "cp")
        assert torch.allclose(found.values, alone.values, rtol=1e-3, atol=1e-4 * float(alone.values.abs().max()))


@pytest.mark.parametrize("rule", RULES)
def test_blocks_that_run_again_give_the_same(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    anatomy = inspect(model)
    kept = relevance(model, anatomy, TEXTS, rule)
    for most in (0, 20_000):
        monkeypatch.setattr(module, "KEPT_BYTES", {"cpu": most})
        for one, other in zip(kept, relevance(model, anatomy, TEXTS, rule), strict=True):
            assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("rule", RULES)
def test_the_model_is_left_as_it_was(named: tuple[str, Any, Any], rule: str) -> None:
    _, model, anatomy = named
    ids = torch.tensor([TEXTS[0][0]])
    model.train(False)
    next(model.parameters()).requires_grad_(True)
    before = model(ids).logits.detach()
    attributes = {id(m): set(vars(m)) for m in model.modules()}
    attention = model.config._attn_implementation
    with rule_applied(model, anatomy, rule):
        assert torch.equal(model(ids).logits, before)  # the forward pass computes the same numbers
    with pytest.raises(ZeroDivisionError), rule_applied(model, anatomy, rule):
        raise ZeroDivisionError
    relevance(model, anatomy, TEXTS, rule)
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == attention
    assert all(set(vars(m)) == attributes[id(m)] for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_threads_cannot_take_one_model_and_other_models_are_not_touched() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    anatomy, ids = inspect(model), torch.tensor([TEXTS[0][0]])
    errors: list[Exception] = []

    def second() -> None:
        try:
            with rule_applied(model, anatomy, "cp"):
                pass
        except UsageError as error:
            errors.append(error)

    with rule_applied(model, anatomy, "attnlrp"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert other.config._attn_implementation == "sdpa"
        states = other(ids, output_hidden_states=True)
        assert states.logits.requires_grad
    assert "is being attributed already" in str(errors[0])
    with rule_applied(model, anatomy, "cp"):
        pass


def test_a_part_of_an_unknown_kind_is_named_and_refused() -> None:
    class Mystery(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.sin()

    model = tiny_model("llama")
    block = model.model.layers[1]
    block.self_attn.o_proj = nn.Sequential(Mystery(), block.self_attn.o_proj)
    anatomy = inspect(model)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.o_proj\.0 is a Mystery.* do not know"):
        relevance(model, anatomy, TEXTS, "cp")
    assert all(torch.isfinite(found.values).all() for found in relevance(model, anatomy, TEXTS, "gradient"))


@pytest.mark.parametrize("family", ["bloom", "gpt_oss", "gptj", "gpt_neo", "falcon", "mpt", "lfm2"])
def test_families_that_the_rules_do_not_know_are_refused(family: str) -> None:
    """Some by a module of an unknown kind, the others because a block without biases does not conserve."""
    if family not in FAMILIES:
        pytest.skip(f"this transformers has no {family}")
    model = tiny_model(family)
    anatomy = inspect(model)
    before = model(torch.tensor([TEXTS[0][0]])).logits.detach()
    with pytest.raises(ModelError, match=r"do not know.*; the rule 'gradient' needs no such knowledge"):
        relevance(model, anatomy, TEXTS, "cp")
    with pytest.raises(ModelError, match="do not know"):
        GradientRunner(model, anatomy, "attnlrp")
    assert torch.equal(model(torch.tensor([TEXTS[0][0]])).logits, before)
    assert all(torch.isfinite(found.values).all() for found in relevance(model, anatomy, TEXTS, "gradient"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2"])
def test_16_bits_are_taken(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    for found in relevance(model, inspect(model), TEXTS, "cp"):
        assert torch.isfinite(found.values).all()


@pytest.mark.parametrize("family", ["gptj", "falcon"])
def test_what_blocks_lose_is_not_lost_in_the_rounding_of_16_bits(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="do not know"):
        relevance(model, inspect(model), TEXTS, "cp")


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_attention_under_attnlrp_is_the_published_rules_by_hand() -> None:
    """Products give half to each factor; the softmax gives x (R_x - s sum R). Explicit relevance, no autograd."""
    model = tiny_model("llama").double()
    anatomy = inspect(model)
    attention = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(1)
    heads, tokens, width = 4, 5, 8
    q, k, v = (torch.randn(1, heads, tokens, width, generator=generator, dtype=torch.float64) for _ in range(3))
    scale = width**-0.5
    mask = torch.triu(torch.full((tokens, tokens), -torch.inf, dtype=torch.float64), 1)
    scores = q @ k.transpose(2, 3) * scale
    weights = (scores + mask).softmax(-1)
    out = weights @ v
    arriving = torch.randn(out.shape, generator=generator, dtype=torch.float64)  # relevance of the output / output
    # half of the relevance of each product A_ij v_jd goes to A_ij, half to v_jd
    shared = weights[..., None] * v[:, :, None] * arriving[:, :, :, None]  # [1, H, i, j, d]
    of_values = shared.sum(2) / 2
    of_weights = shared.sum(-1) / 2
    of_scores = scores * (of_weights - weights * of_weights.sum(-1, keepdim=True)) / 1.0
    product = q[:, :, :, None] * k[:, :, None] * scale  # [1, H, i, j, d]
    ratio = (of_scores / scores)[..., None]
    of_queries, of_keys = (product * ratio).sum(3) / 2, (product * ratio).sum(2) / 2
    with rule_applied(model, anatomy, "attnlrp"):
        from transformers import AttentionInterface

        attention.num_key_value_groups = 1  # here, a key for each head
        attend = AttentionInterface()[model.config._attn_implementation]
        inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        found, _ = attend(attention, *inputs, mask[None, None], scaling=scale)
        found.backward(arriving.transpose(1, 2))
    wanted = (of_queries, of_keys, of_values)
    for tensor, by_hand in zip(inputs, wanted, strict=True):
        assert tensor.grad is not None
        assert torch.allclose(tensor.detach() * tensor.grad, by_hand, atol=1e-10)


@pytest.mark.parametrize(("rule", "gate", "up"), [("cp", 0.0, 1.0), ("attnlrp", 0.5, 0.5)])
def test_a_gated_mlp_on_paper(rule: str, gate: float, up: float) -> None:
    """Inputs of gate and up projection differ, so their shares can be told apart: p = silu(2) * 3."""
    model = tiny_model("llama").double()
    anatomy = inspect(model)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            projection.weight.zero_()
        mlp.gate_proj.weight[0, 0] = 1.0
        mlp.up_proj.weight[0, 1] = 1.0
        mlp.down_proj.weight[0, 0] = 1.0
    hidden = torch.zeros(1, 1, 32, dtype=torch.float64)
    hidden[0, 0, :2] = torch.tensor([2.0, 3.0])
    hidden.requires_grad_()
    with rule_applied(model, anatomy, rule):
        out = mlp(hidden)[0, 0, 0]
        out.backward()
    assert hidden.grad is not None
    product = 3 * 2 / (1 + torch.exp(torch.tensor(-2.0, dtype=torch.float64)))
    assert float(out) == pytest.approx(float(product))
    shares = (hidden * hidden.grad)[0, 0, :2] / product
    assert shares.tolist() == pytest.approx([gate, up])


def test_norms_conserve_and_a_layer_norm_takes_the_mean_off() -> None:
    hidden = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    Norm("layer", torch.tensor([1.0, 1.0, 2.0]), 0.0).linear(hidden)[2].backward()
    spread = (torch.tensor([-2.0, -1.0, 3.0]).square().mean()) ** 0.5
    assert hidden.grad is not None
    assert hidden.grad.tolist() == pytest.approx([float(2 * x / spread) for x in (-1 / 3, -1 / 3, 2 / 3)])
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    value = nn.functional.gelu(x)
    proportional(value, x).sum().backward()
    assert x.grad is not None
    assert (x * x.grad).tolist() == pytest.approx(value.tolist())


@pytest.mark.parametrize("rule", RULES)
def test_no_tensor_stays_alive(rule: str) -> None:
    model = tiny_model("llama")
    runner = GradientRunner(model, inspect(model), rule)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    runner.run(TEXTS)
    before = alive()
    for _ in range(3):
        runner.run(TEXTS)
    assert alive() <= before


# -- the runner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_the_runner_gives_every_text_in_order(batch_tokens: int) -> None:
    model = tiny_model("llama")
    anatomy = inspect(model)
    found = GradientRunner(model, anatomy, "cp", batch_tokens=batch_tokens).run(TEXTS)
    for text, one in zip(TEXTS, found, strict=True):
        (alone,) = relevance(model, anatomy, [text], "cp")
        assert torch.allclose(one.values, alone.values, atol=1e-5)


def test_the_runner_goes_on_with_smaller_batches_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    runner = GradientRunner(model, inspect(model), "cp", batch_tokens=100_000)
    whole, sizes = module.relevance, []

    def scarce(model: Any, anatomy: Any, texts: Any, *rest: Any) -> Any:
        sizes.append(len(texts))
        if len(texts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, anatomy, texts, *rest)

    monkeypatch.setattr(module, "relevance", scarce)
    assert len(runner.run(TEXTS)) == len(TEXTS)
    assert sizes[0] == 3
    assert sizes.count(1) == 3
    assert "memory ran out: going on with at most" in runner.warn.messages[0]


@pytest.mark.parametrize(
    ("texts", "rule", "attributed", "message"),
    [
        ([((5,), ())], "cp", "logit", "text 0 has an empty prompt or answer"),
        (TEXTS, "lrp", "logit", "unknown rule 'lrp'; known: cp, gradient, attnlrp"),
        (TEXTS, "cp", "loss", "unknown quantity 'loss'; known: logit, log_probability"),
    ],
)
def test_bad_arguments_are_refused(texts: Any, rule: str, attributed: str, message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match=message):
        relevance(model, inspect(model), texts, rule, attributed)
