"""Transports: linear models' maps are recovered, Jacobians are those of autograd, files follow the published format."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import random_ids, save_tiny_model, tiny_model
from torch import Tensor

import xprobe
from xprobe.errors import DataError, ModelError, UsageError
from xprobe.lenses.files import load_lens, save_lens
from xprobe.lenses.fit import FitSettings, encode_texts, fit_lens, read_texts
from xprobe.lenses.jacobian import jacobian_of_text
from xprobe.lenses.sums import Sums, agreement
from xprobe.lenses.transport import Transport, from_maps
from xprobe.models.anatomy import inspect, watch_states
from xprobe.models.passes import frozen

TEXTS = [
    "ada sold forty boats in march and bob left the town after the long winter had ended at last for all of them",
    "the old tower stands near the river where many people sold fish and bread before the war came to the land",
    "who built the bridge over the river and when did the people of the town begin to use it every single day",
    "many boats left the town in the winter and forty people sold the bread that they had made before the march",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("transports") / "model")


# -- application ------------------------------------------------------------------------------------------------------


def test_each_layer_gets_its_own_map_and_the_others_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 7, 6, generator=generator)
    maps = {layer: torch.randn(6, 6, generator=generator) for layer in (1, 3)}
    biases = {layer: torch.randn(6, generator=generator) for layer in (1, 3)}
    before = rows.clone()
    found = from_maps("regression", maps, biases).apply(rows)
    added = from_maps("tuned", maps, biases, residual=True).apply(rows)
    assert torch.equal(rows, before)
    for layer in range(5):
        wanted = rows[layer] @ maps[layer].T + biases[layer] if layer in maps else rows[layer]
        torch.testing.assert_close(found[layer], wanted)
        torch.testing.assert_close(added[layer], wanted + rows[layer] if layer in maps else wanted)


def test_two_factors_are_one_map() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(2, 6, 2, generator=generator), torch.randn(2, 2, 6, generator=generator)
    rows = torch.randn(3, 4, 6, generator=generator)
    found = Transport("regression", (0, 2), (left, right)).apply(rows)
    whole = Transport("regression", (0, 2), left @ right).apply(rows)
    torch.testing.assert_close(found, whole)


def test_products_of_16_bit_rows_are_summed_in_32_bits() -> None:
    rows = torch.full((1, 1, 4096), 1.0, dtype=torch.bfloat16)
    weight = torch.ones(1, 4096, 4096)
    found = Transport("jacobian", (0,), weight).apply(rows)
    assert found.dtype == torch.bfloat16
    assert float(found[0, 0, 0]) == 4096.0  # a sum in 16 bits stays at 256


def test_rows_of_another_model_are_refused() -> None:
    transport = from_maps("jacobian", {3: torch.eye(6)})
    with pytest.raises(ModelError, match="maps of width 6 up to layer 3, the rows have width 8 and 5 layers"):
        transport.apply(torch.zeros(5, 1, 8))
    with pytest.raises(ModelError, match="up to layer 3, the rows have width 6 and 3 layers"):
        transport.apply(torch.zeros(3, 1, 6))


# -- regression -------------------------------------------------------------------------------------------------------


def test_sums_in_parts_give_the_map_of_a_linear_model() -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((300, 5), (5, 5), (5,)))
    x[:, 0] *= 1000  # one entry is much larger than the others, as in real models
    y = x @ weight.T + bias
    one, other = Sums(5), Sums(5)
    one.add(x[:100], y[:100])
    other.add(x[100:], y[100:])
    fit = (one + other).solve(ridge=0.0)
    torch.testing.assert_close(fit.weight.float(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fit.bias.float(), bias, rtol=1e-3, atol=1e-3)
    assert other.explained(one.solve(ridge=0.0)) == pytest.approx(1.0, abs=1e-6)
    assert agreement(one.solve(0.0).weight, other.solve(0.0).weight) == pytest.approx(1.0, abs=1e-6)


def test_explained_variance_is_that_of_the_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(80, 4, generator=generator), torch.randn(80, 4, generator=generator)
    sums = Sums(4)
    sums.add(x, y)
    fit = sums.solve(ridge=0.1)
    predicted = x.double() @ fit.weight.T + fit.bias
    wanted = 1 - (y - predicted).square().sum() / (y - y.mean(0)).square().sum()
    assert sums.explained(fit) == pytest.approx(float(wanted), abs=1e-6)


def test_a_regression_on_a_model_explains_more_than_the_states_themselves(folder: Path, tmp_path: Path) -> None:
    doubled = [text for text in TEXTS for _ in range(2)] * 15  # every other text is one half
    fitted = fit_lens(str(folder), tmp_path / "r.pt", FitSettings(first=2, tokens=64), text=doubled)
    assert list(fitted.table.index) == [1, 2, 3]
    assert (fitted.table["explained"] > fitted.table["explained_before"]).all()
    assert fitted.table["agreement"].between(0.99, 1.0).all()  # both halves hold the same texts
    assert fitted.texts == 120
    transport, warnings = load_lens(fitted.name, 32, 5, str(folder))
    assert transport is not None
    assert (transport.layers, transport.kind, warnings) == ((1, 2, 3), "regression", [])
    assert transport.bias is not None


# -- Jacobians --------------------------------------------------------------------------------------------------------


def by_autograd(model: Any, ids: list[int], layer: int, target: int, first: int) -> Tensor:
    """The Jacobian from the definition: the whole derivative of all states by all states, then sums and means."""
    blocks = inspect(model).blocks
    states: list[Tensor] = []
    with torch.no_grad(), watch_states(blocks, lambda at, hidden: states.append(hidden)):
        model(torch.tensor([ids]))

    def run(hidden: Tensor) -> Tensor:
        ends: dict[int, Tensor] = {}

        def put(module: Any, args: tuple, kwargs: dict) -> Any:
            return ((hidden[None], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden[None]})

        hook = blocks[layer].register_forward_pre_hook(put, with_kwargs=True)
        with watch_states(blocks, lambda at, h: ends.update({at: h})):
            model(torch.tensor([ids]))
        hook.remove()
        return ends[target][0]

    whole = torch.autograd.functional.jacobian(run, states[layer][0])  # [T, D, T, D]: target by source
    positions = range(first, len(ids))
    per_source = [sum(whole[q, :, p] for q in positions) for p in positions]
    return torch.stack(per_source).mean(0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("rows", [5, 32])
@pytest.mark.parametrize("batched", [True, False])
def test_jacobians_are_those_of_autograd(
    family: str, rows: int, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not batched:
        monkeypatch.setattr("xprobe.lenses.jacobian._together", lambda *arguments: None)
    model = tiny_model(family)
    ids = random_ids(1, 9, seed=4)[0].tolist()
    with frozen(model):
        found = jacobian_of_text(model, inspect(model), ids, [1, 3], 4, rows, first=2)
    for place, layer in enumerate((1, 3)):
        wanted = by_autograd(model, ids, layer, 4, 2)
        torch.testing.assert_close(found[place], wanted, rtol=1e-3, atol=1e-5)


def second_reader(path: Path) -> dict[str, Any]:
    """What another program reads, which knows the published format alone."""
    held = torch.load(path, weights_only=True)
    assert {"J", "n_prompts", "source_layers", "d_model"} <= set(held)
    assert held["source_layers"] == sorted(held["J"])
    assert {one.dtype for one in held["J"].values()} == {torch.float16}
    assert {tuple(one.shape) for one in held["J"].values()} == {(held["d_model"],) * 2}
    return held


def test_a_jacobian_lens_is_the_mean_over_texts_and_has_the_published_format(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = FitSettings("jacobian", first=2, tokens=12)
    fitted = fit_lens(str(folder), tmp_path / "deep" / "j.pt", settings, text=TEXTS)
    held = second_reader(fitted.path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = [list(own) for own in encode_texts(tokenizer, TEXTS, settings, None)]
    wanted = torch.stack([by_autograd(model, own, 2, 4, 2) for own in ids]).mean(0)
    torch.testing.assert_close(held["J"][1].float(), wanted, rtol=2e-3, atol=2e-3)  # block 1's output is layer 2
    assert (held["n_prompts"], held["d_model"], held["source_layers"]) == (4, 32, [0, 1, 2])
    assert not list(fitted.path.parent.glob("*.checkpoint*"))
    penultimate = fit_lens(
        str(folder), tmp_path / "p.pt", FitSettings("jacobian", "penultimate", first=2, tokens=12), text=TEXTS
    )
    assert list(penultimate.table.index) == [1, 2]


def test_a_killed_fit_goes_on(folder: Path, tmp_path: Path) -> None:
    whole = fit_lens(str(folder), tmp_path / "whole.pt", FitSettings("jacobian", first=2, tokens=16), text=TEXTS)
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    code = (
        "import sys, time, xprobe\n"
        "from xprobe.events import Step\n"
        "def slow(event):\n"
        "    if isinstance(event, Step) and event.done == 2: print('two', flush=True); time.sleep(60)\n"
        "settings = xprobe.FitSettings('jacobian', first=2, tokens=16)\n"
        "xprobe.fit_lens(sys.argv[1], sys.argv[2], settings, text=sys.argv[3], progress=slow)\n"
    )
    arguments = [str(folder), str(tmp_path / "cut.pt"), str(tmp_path / "texts.txt")]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, env=dict(os.environ))
    assert process.stdout is not None
    assert process.stdout.readline() == b"two\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut.pt").exists()
    events: list[Any] = []
    settings = FitSettings("jacobian", first=2, tokens=16)
    cut = fit_lens(str(folder), tmp_path / "cut.pt", settings, text=tmp_path / "texts.txt", progress=events.append)
    assert [event.done for event in events if hasattr(event, "done")] == [2, 3, 4]
    (tmp_path / "other.pt.checkpoint").write_bytes(b"half a file")
    fit_lens(str(folder), tmp_path / "other.pt", settings, text=TEXTS[:2], progress=events.append)
    assert any("is of another fit, or damaged: the fit begins anew" in str(event) for event in events)
    for block, wanted in second_reader(whole.path)["J"].items():
        assert torch.equal(second_reader(cut.path)["J"][block], wanted)


# -- files ------------------------------------------------------------------------------------------------------------


def published(path: Path, width: int = 32, blocks: tuple[int, ...] = (0, 1, 2), **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(5)
    maps = {block: torch.randn(width, width, generator=generator).half() for block in blocks}
    torch.save({"J": maps, "n_prompts": 7, "source_layers": list(blocks), "d_model": width} | changes, path)
    return path


def test_a_published_file_and_its_checkpoint_are_the_same_lens(tmp_path: Path) -> None:
    path = published(tmp_path / "j.pt")
    maps = torch.load(path, weights_only=True)["J"]
    sums = {block: 7 * tensor.float() for block, tensor in maps.items()}
    torch.save({"jacobian_sum": sums, "n_done": 7, "next_idx": 7}, tmp_path / "sums.pt")
    one, warnings = load_lens(f"jacobian:{path}", 32, 5)
    other, _ = load_lens(f"jacobian:{tmp_path / 'sums.pt'}", 32, 5)
    assert one is not None
    assert other is not None
    assert one.layers == other.layers == (1, 2, 3)
    torch.testing.assert_close(one.weight, other.weight)
    assert torch.equal(one.weight[0], maps[0].float())
    assert (one.about["n_prompts"], warnings) == (7, [])


def test_a_tuned_lens_is_added_to_the_state_of_its_layer(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    state = {f"{i}.weight": torch.randn(8, 8, generator=generator) for i in range(3)}
    state |= {f"{i}.bias": torch.randn(8, generator=generator) for i in range(3)}
    torch.save(state, tmp_path / "params.pt")
    config = {"base_model_name_or_path": "gpt2", "d_model": 8, "num_hidden_layers": 3, "bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    transport, warnings = load_lens(f"tuned:{tmp_path}", 8, 4, "openai-community/gpt2")
    assert transport is not None
    rows = torch.randn(4, 2, 8, generator=generator)
    found = transport.apply(rows)
    for layer in range(3):
        wanted = rows[layer] + rows[layer] @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]
        torch.testing.assert_close(found[layer], wanted)
    assert torch.equal(found[3], rows[3])
    assert warnings == []
    assert "fitted on 'gpt2', the model is 'other'" in load_lens(f"tuned:{tmp_path}", 8, 4, "other")[1][0]


@pytest.mark.parametrize(
    ("state", "count", "message"),
    [
        ([1, 2], 1, "params.pt must hold named maps"),
        ({}, 0, "config.json their number"),
        ({"0.weight": torch.zeros(7, 7)}, 1, r"has no map 0.weight of \[8, 8\]"),
        ({"0.weight": torch.zeros(8, 8), "0.bias": torch.zeros(3)}, 1, r"has no bias 0.bias of \[8\]"),
        ({"0.weight": torch.full((8, 8), float("inf"))}, 1, "the map of layer 0 holds NaN or infinity"),
    ],
)
def test_bad_tuned_lenses_are_refused(tmp_path: Path, state: Any, count: int, message: str) -> None:
    torch.save(state, tmp_path / "params.pt")
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 8, "num_hidden_layers": count}))
    with pytest.raises(ModelError, match=message):
        load_lens(f"tuned:{tmp_path}", 8, 4)


def test_layers_without_a_map_are_named(tmp_path: Path) -> None:
    path = published(tmp_path / "few.pt", blocks=(1,))
    _, warnings = load_lens(f"jacobian:{path}", 32, 5)
    assert warnings == [
        f"the lens {path} has no map for 2 of the layers 1 to 3 (the first is 1): they are read as they are"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"J": {}}, "must be a dictionary by block, and hold at least one"),
        ({"J": None}, "has no entry 'J': it is no Jacobian lens"),
        ({"J": {0: torch.zeros(3, 4)}}, "every map must be a square matrix"),
        ({"J": {0: torch.zeros(4, 4), 1: torch.zeros(5, 5)}}, "every map must be a square matrix of one width"),
        ({"J": {"a": torch.zeros(4, 4)}}, "maps are named by block numbers, found 'a'"),
        ({"J": {0: torch.full((32, 32), float("nan"))}}, "the map of block 0 holds NaN"),
        ({"d_model": 16}, "says d_model 16, and its maps have width 32"),
        ({"J": {9: torch.eye(32)}}, "is of a model of 10 blocks or more, this one has 4"),
        ({"xprobe": {"kind": "strange"}}, "holds a lens of the unknown kind 'strange'"),
        ({"xprobe": {"n_blocks": "4"}}, "says n_blocks '4', which is no whole number"),
        ({"xprobe": {"n_blocks": 6}}, "is of a model of 6 blocks, this one has 4"),
        ({"xprobe": {"biases": [1, 2]}}, "the biases must be a dictionary with the blocks of the maps"),
        ({"xprobe": {"biases": {0: torch.zeros(32)}}}, "the biases must be a dictionary with the blocks of the maps"),
        ({"xprobe": {"biases": dict.fromkeys(range(3), torch.zeros(7))}}, "the bias of block 0 must be 32 finite"),
        ({"J": {0: torch.eye(16)}, "d_model": 16}, "has width 16, the model has width 32: it is of another model"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = published(tmp_path / "bad.pt", **changes)
    with pytest.raises(ModelError, match=message):
        load_lens(f"jacobian:{path}", 32, 5)


def test_a_file_that_runs_code_or_is_none_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"J": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no lens")
    for name in ("evil.pt", "text.pt"):
        with pytest.raises(ModelError, match="cannot be read as a file of tensors"):
            load_lens(f"jacobian:{tmp_path / name}", 32, 5)
    assert not (tmp_path / "ran").exists()


def test_a_lens_of_another_kind_is_named(tmp_path: Path) -> None:
    maps = {1: torch.eye(4), 2: torch.eye(4)}
    save_lens(tmp_path / "r.pt", maps, {1: torch.ones(4), 2: torch.ones(4)}, {"kind": "regression", "n_prompts": 2})
    with pytest.raises(ModelError, match="holds a regression lens, not a jacobian lens: name it regression:"):
        load_lens(f"jacobian:{tmp_path / 'r.pt'}", 4, 4)
    transport, _ = load_lens(f"regression:{tmp_path / 'r.pt'}", 4, 4)
    assert transport is not None
    assert transport.bias is not None
    assert transport.bias.tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lens", "unknown lens 'lens'; known: logit, tuned, jacobian, regression"),
        ("logit:x", "logit has no file"),
        ("tuned", "needs a file: tuned:FILE"),
        ("jacobian:/no/such/file.pt", "there is no file /no/such/file.pt"),
        ("jacobian:nothing.pt", "there is no file nothing.pt"),
        ("tuned:/no/such/folder", "there is no folder /no/such/folder"),
    ],
)
def test_bad_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_lens(name, 32, 5)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_texts_are_read_from_files_and_the_built_in_set(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n\n\ntwo\n", encoding="utf-8")
    assert read_texts(tmp_path / "t.txt") == ["one", "two"]
    assert len(read_texts("builtin")) == 144
    with pytest.raises(UsageError, match="cannot read the text"):
        read_texts(tmp_path / "none.txt")
    with pytest.raises(UsageError, match="text must be a file"):
        read_texts([5])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "tuned"}, "unknown kind 'tuned'; known: regression, jacobian"),
        ({"target": "first"}, "unknown target 'first'"),
        ({"texts": 1}, "texts must be a whole number of at least 2"),
        ({"tokens": 16}, "tokens must be a whole number of at least 18"),
        ({"ridge": -1}, "ridge must be a number of at least 0"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FitSettings(**arguments)


def test_short_texts_and_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 of 2 texts have more than 17 tokens"):
        xprobe.fit_lens(str(folder), tmp_path / "x.pt", text=["a b", "c d"])
    with pytest.raises(UsageError, match=r"cannot write /proc/no/x\.pt"):
        xprobe.fit_lens(str(folder), "/proc/no/x.pt", text=TEXTS)
    with pytest.raises(UsageError, match="is a folder: name a file"):
        xprobe.fit_lens(str(folder), tmp_path, text=TEXTS)
    with pytest.raises(UsageError, match="settings must be a FitSettings"):
        xprobe.fit_lens(str(folder), tmp_path / "x.pt", "jacobian")  # type: ignore[arg-type]
