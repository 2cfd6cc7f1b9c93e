"""The benchmark: right figures, variants measured in turn, and no speed for a wrong or failed variant."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from xprobe_kernels import lens
from xprobe_kernels.bench import __main__ as program
from xprobe_kernels.bench import baselines, capture_speed, command, figure, table
from xprobe_kernels.bench.accuracy import truth
from xprobe_kernels.bench.command import Settings, measure
from xprobe_kernels.bench.lens_speed import Large
from xprobe_kernels.bench.measure import Clock, interleaved, time_in_turn
from xprobe_kernels.bench.shapes import GPU, MANY, Head, work

TINY = Head("tiny", "Tiny", layers=3, width=32, vocabulary=700, softcap=30.0, positions=8)
FIRST = command.measured_backends(torch.device("cpu"))[0]
MIB = 1 << 20


@pytest.fixture
def tiny(monkeypatch) -> None:
    """One tiny head in place of the real ones, and small ceilings."""
    monkeypatch.setattr(command, "HEADS", {"tiny": TINY})
    monkeypatch.setattr("xprobe_kernels.bench.lens_speed.LARGE", {"quick": Large(64, MIB)})


def quick(**settings: Any) -> dict[str, Any]:
    return measure(
        Settings(shape="tiny", rows="many", rounds=3, quick=True, backends=(FIRST,), device="cpu", **settings)
    )


def entry(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in result["lens"][0]["variants"] if entry["name"] == name)


def ours(result: dict[str, Any]) -> dict[str, Any]:
    return entry(result, f"lens {FIRST}")


# turns


def test_the_order_is_turned_round_every_other_round() -> None:
    assert list(interleaved(["a", "b", "c"], 3)) == [
        (0, "a"), (0, "b"), (0, "c"), (1, "c"), (1, "b"), (1, "a"), (2, "a"), (2, "b"), (2, "c"),
    ]  # fmt: skip


class Ticks(Clock):
    """Notes who is called and takes a second for every call."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def time(self, call: Any, turn: int, repeats: int = 1) -> float:
        self.calls.append(call(turn))
        return 1.0


def test_calls_run_by_turns_after_a_warm_up_of_each() -> None:
    clock = Ticks()
    samples = time_in_turn({"a": lambda turn: "a", "b": lambda turn: "b"}, clock, {}, rounds=2, seconds=0)
    assert "".join(clock.calls) == "ab" + "ab" + "ba"
    assert samples["a"].seconds == [1.0, 1.0]


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 3), (10, 5), (1000, 50)])
def test_rounds_left_open_fill_the_time(seconds, rounds) -> None:
    samples = time_in_turn({"a": lambda turn: "a", "b": lambda turn: "b"}, Ticks(), {}, rounds=None, seconds=seconds)
    assert len(samples["b"].seconds) == rounds


def test_one_that_fails_stops_no_other() -> None:
    def late(turn: int) -> None:
        if turn > 1:
            raise MemoryError("no  room\nleft")

    def early(turn: int) -> None:
        raise ValueError

    calls = {"late": late, "early": early, "good": lambda turn: "good"}
    samples = time_in_turn(calls, Ticks(), {}, rounds=4, seconds=0)
    assert samples["late"].message == "MemoryError: no room left"
    assert (samples["early"].message, samples["early"].seconds) == ("ValueError", [])
    assert len(samples["good"].seconds) == 4


def test_memory_beyond_the_inputs_is_seen() -> None:
    clock = Clock()
    if not clock.reset_peak():
        pytest.skip("the system does not reset the peak")
    kept = []

    def hold(turn: int) -> None:
        if turn == 0:
            kept.append(torch.ones(5 * MIB))
        torch.ones(10 * MIB)

    samples = time_in_turn({"hold": hold, "nothing": lambda turn: None}, clock, {}, rounds=1, seconds=0)
    assert samples["hold"].extra_bytes == pytest.approx(40 * MIB, rel=0.1)
    assert samples["nothing"].extra_bytes < 4 * MIB


def test_what_the_first_call_keeps_is_seen() -> None:
    kept: list[torch.Tensor] = []
    samples = time_in_turn(
        {"a": lambda turn: kept or kept.append(torch.ones(10 * MIB))}, Clock(), {}, rounds=1, seconds=0
    )
    if samples["a"].kept_bytes is None:
        pytest.skip("the system does not report memory")
    assert samples["a"].kept_bytes == pytest.approx(40 * MIB, rel=0.1)
    assert samples["a"].extra_bytes < 4 * MIB


# answers


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_variant_gives_the_lens_and_chunks_change_nothing(dtype, kl) -> None:
    each = work(TINY, MANY, GPU)
    task = baselines.make(each, torch.device("cpu"), dtype, kl=kl)
    judge = truth(task)
    whole = baselines.naive(None, fp32=True)(task)
    parts = baselines.naive(5, fp32=True)(task)
    readout = baselines.read_lens(lens(task.hidden, task.head, task.lookup, top_k=5, final_rows=task.final_rows,
                                       backend="reference"))  # fmt: skip
    for reading in (whole, parts, baselines.naive(None, fp32=False)(task), readout):
        errors, fault = judge.judge(reading)
        assert fault is None, fault
        assert ("kl" in errors) == kl
    assert torch.equal(whole.rank, parts.rank)
    assert torch.allclose(whole.logsumexp, parts.logsumexp, atol=1e-5)
    assert judge.errors(readout.rows(judge.index))["rank_agreement"] == 1.0
    assert int(readout.rank.min()) == 1 < int(readout.rank.max())


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("logits", lambda x: x + 1, "log_probability off by 1"),
        ("logsumexp", lambda x: x * torch.nan, "log_probability off by inf"),
        ("entropy", lambda x: x - 0.5, "entropy off by 0.5"),
        ("rank", lambda x: x + 200, "rank "),
        ("top_ids", lambda x: x.flip(1) * 0, "top_logit off by inf"),
        ("kl", lambda x: x + 1, "kl off by 1"),
    ],
)
def test_a_wrong_backend_is_called_wrong_and_gets_no_speed(tiny, monkeypatch, field, change, said) -> None:
    def shifted(*arguments: Any, **options: Any) -> Any:
        readout = lens(*arguments, **options)
        return dataclasses.replace(readout, **{field: change(getattr(readout, field))})

    assert ours(quick(kl=True))["status"] == "ok"
    monkeypatch.setattr(baselines, "lens", shifted)
    result = quick(kl=True)
    assert ours(result)["status"] == "wrong"
    assert said in ours(result)["message"]
    assert "seconds" not in ours(result)
    assert ours(result)["errors"] is not None
    assert f"WRONG: lens {FIRST}: WrongError: " in table.lens_text(result["lens"][0])
    assert entry(result, "naive bf16")["status"] == "ok"


def test_a_failing_backend_is_reported_with_its_message(tiny, monkeypatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(baselines, "lens", broken)
    result = quick()
    assert (ours(result)["status"], ours(result)["message"]) == ("failed", "RuntimeError: out of luck")
    assert f"FAILED: lens {FIRST}: RuntimeError: out of luck" in table.lens_text(result["lens"][0])
    assert entry(result, "naive fp32")["times_naive"] == 1.0


def test_without_the_naive_lens_there_is_no_ratio_to_it(tiny, monkeypatch) -> None:
    monkeypatch.setattr(baselines, "naive_logits", lambda *arguments: 1 / 0)
    monkeypatch.setattr("xprobe_kernels.bench.lens_speed.truth", lambda task: SimpleNamespace(
        index=torch.arange(2), bounds={}, judge=lambda reading: ({}, None)))  # fmt: skip
    result = quick()
    assert ours(result)["times_naive"] is None
    assert ours(result)["share_of_product"] > 0
    assert "-" in table.lens_text(result["lens"][0])


def test_inputs_that_do_not_fit_cost_one_shape_only(tiny, monkeypatch) -> None:
    make, asked = baselines.make, []

    def first_fails(each: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(each)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("too large")
        return make(each, *arguments, **options)

    monkeypatch.setattr(baselines, "make", first_fails)
    first, second = measure(Settings(shape="tiny", rounds=1, quick=True, device="cpu"))["lens"]
    assert first["message"] == "inputs: OutOfMemoryError: too large"
    assert "NOT MEASURED" in table.lens_text(first)
    assert second["variants"]


def test_what_does_not_fit_is_done_in_chunks_and_says_so(tiny, monkeypatch) -> None:
    assert baselines.chunk(100, 10, 1000) is None
    assert baselines.chunk(100, 10, 300) == 25  # equal ones where possible
    assert baselines.chunk(7, 10, 40) == 4
    assert baselines.chunk(7, 10, 5) == 1
    monkeypatch.setattr("xprobe_kernels.bench.lens_speed.CPU_MEMORY", 5 * 4 * 700 * 8)
    result = quick()
    assert entry(result, "naive fp32")["rows_at_once"] == 8
    assert "naive fp32 (8 rows at once)" in table.lens_text(result["lens"][0])


# the whole


def test_a_tiny_run_end_to_end(tiny) -> None:
    said: list[str] = []
    settings = Settings(kernel="all", shape="tiny", rounds=3, quick=True, kl=True, device="cpu")
    result = json.loads(json.dumps(measure(settings, said.append), allow_nan=False))
    assert set(result) == {"benchmark", "schema", "environment", "settings", "lens", "capture", "rivals"}
    assert result["schema"] == command.SCHEMA
    environment = result["environment"]
    assert {
        "device",
        "driver",
        "cuda",
        "torch",
        "triton",
        "python",
        "cpu",
        "threads",
        "date",
        "command",
        "commit",
    } <= set(environment)
    assert environment["date"].endswith("+00:00")
    assert [part["name"] for part in result["lens"]] == ["tiny/many", "tiny/few"]
    for part in result["lens"]:
        statuses = {entry["name"]: entry["status"] for entry in part["variants"]}
        assert statuses.pop("compiled naive bf16") == "skipped"
        assert set(statuses.values()) == {"ok"}, part["variants"]
        assert {f"lens {name}" for name in command.measured_backends(torch.device("cpu"))} < set(statuses)
        assert all(ceiling > 0 for ceiling in part["ceilings"].values())
        for each in part["variants"]:
            if each["status"] == "ok":
                assert len(each["rounds"]) == 3
                assert each["seconds"] == sorted(each["rounds"])[1]
                assert each["operations_per_second"] == pytest.approx(part["operations"] / each["seconds"])
    text = "\n".join(said)
    assert f"load {environment['load']:.1f} before" in text
    heading = next(line for line in text.splitlines() if "x naive" in line)
    assert heading.index("x naive") < heading.index("of product") < heading.index(" ms ")
    assert [each["status"] for part in result["capture"] for each in part["variants"]] == ["ok"] * 6


def test_capture_that_captures_other_rows_is_wrong(monkeypatch) -> None:
    options = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "rounds": 1, "seconds": 0.0, "quick": True}
    block = capture_speed.make(TINY.width, capture_speed.SPANS, 2, 64, options["device"], torch.bfloat16)
    assert block.touched == 2 * (6 * 16 + 6) * TINY.width
    monkeypatch.setattr(
        capture_speed, "capture", lambda hidden, spans, out, check: out.copy_(hidden[0, 0].expand_as(out))
    )
    for case in (capture_speed.POSITIONS, capture_speed.SPANS):
        result = capture_speed.compare(TINY, case, **options)
        assert [each["status"] for each in result["variants"]] == ["ok", "ok", "wrong"]
        assert "WRONG: capture" in table.capture_text(result)


def test_the_compiled_naive_lens_is_measured_too(tiny, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr("xprobe_kernels.bench.lens_speed.LARGE", {"cpu": Large(64, MIB)})
    result = measure(Settings(shape="tiny", rows="few", rounds=1, device="cpu", backends=(FIRST,)))
    assert entry(result, "compiled naive bf16")["status"] == "ok"
    assert entry(result, "compiled naive bf16")["seconds"] > 0


def test_threads_are_asked_for_and_given_back(tiny) -> None:
    before = torch.get_num_threads()
    assert quick(threads=before + 1)["environment"]["threads"] == before + 1
    assert torch.get_num_threads() == before


# figure


def test_the_figure_shows_every_variant(tiny, tmp_path) -> None:
    from matplotlib.image import imread

    result, target = quick(), tmp_path / "roofline.png"
    figure.check(str(target), ("lens",))
    figure.roofline(result, str(target))
    picture = imread(target)
    assert min(picture.shape[:2]) > 500
    colours = {tuple(int(255 * part) for part in pixel) for pixel in picture[::2, ::2, :3].reshape(-1, 3)}
    for colour in (figure.SHADES[0], figure.COLOURS["naive"], figure.COLOURS["product"]):
        assert tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5)) in colours


def test_a_figure_of_nothing_is_refused(tmp_path) -> None:
    with pytest.raises(figure.NothingToDrawError):
        figure.roofline({"lens": []}, str(tmp_path / "x.png"))


# the program


def test_the_program_writes_json_and_answers_bad_usage_in_one_line(tiny, tmp_path, capsys) -> None:
    target = tmp_path / "bench.json"
    arguments = ["--shape", "tiny", "--rows", "few", "--rounds", "1", "--quick", "--backend", FIRST]
    arguments += ["--device", "cpu"]
    assert program.main([*arguments, "--json", str(target)]) == 0
    assert "x naive" in capsys.readouterr().out
    assert json.loads(target.read_text())["lens"][0]["name"] == "tiny/few"
    assert program.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["backends"] == [FIRST]
    assert program.main(["--shape", "nope"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_kernels_load_without_their_benchmark() -> None:
    code = (
        "import sys, xprobe_kernels\nprint([name for name in sys.modules if name.startswith('xprobe_kernels.bench')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_folder_for_the_json_is_named_before_anything_is_measured(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(program, "measure", lambda *args, **options: pytest.fail("it was measured"))
    assert program.main(["--json", str(tmp_path / "none" / "x.json")]) == 2
    assert f"--json: {tmp_path / 'none'} is not a folder" in capsys.readouterr().err
