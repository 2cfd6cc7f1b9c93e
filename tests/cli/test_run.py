"""`xprobe run`: table, files, messages, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.families import COMMON, write_set
from xprobe_cli.main import main
from xprobe_cli.tables import bar

import xprobe

SMALL = ["--languages", "en,de", "--limit", "4"]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["run", str(tiny), *SMALL, "--out", str(out)]) == 0
    return out


def test_the_table_has_a_line_per_layer_and_says_where_the_files_are(finished, capsys, monkeypatch, tiny):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["run", str(tiny), *SMALL, "--out", str(finished), "--resume"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line[:5].strip().isdigit()] == ["0", "1", "2", "3", "4"]
    assert "█" in out
    assert any(line.startswith("boundary  layer") for line in lines)
    assert any(line.startswith("stability alpha") for line in lines)
    assert any(line.startswith("parity") and "0 examples skipped" in line for line in lines)
    assert lines[-2:] == [f"files     {finished}", f"next      xprobe report {finished}"]
    assert err == ""


def test_a_narrow_terminal_gets_the_same_numbers_without_bars(finished, capsys, monkeypatch, tiny):
    monkeypatch.setenv("COLUMNS", "80")
    main(["run", str(tiny), *SMALL, "--out", str(finished), "--resume"])
    out, _ = capsys.readouterr()
    assert "█" not in out
    assert max(len(line) for line in out.splitlines() if line[:5].strip().isdigit()) <= 80


def test_json_is_the_only_output_on_stdout(finished, capsys, tiny):
    assert main(["run", str(tiny), *SMALL, "--out", str(finished), "--resume", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == xprobe.load_study(finished).to_dict()
    assert err == ""


def test_without_out_a_new_folder_is_made_under_runs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(tiny), "--languages", "en", "--limit", "1", "--no-rows"]) == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith(tiny.name)
    assert str(made.relative_to(tmp_path)) in capsys.readouterr().out


def test_bad_records_are_left_out_counted_and_reported(tiny, tmp_path, capsys):
    folder = write_set(tmp_path / "data", {"en": [("A b c.", "What?", "b"), ("D e f.", "Which?", "e")]})
    path = folder / "toy.en.json"
    document = json.loads(path.read_text())
    document["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 0
    path.write_text(json.dumps(document))
    assert main(["run", str(tiny), "--data", str(folder), "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert "1 bad record\n" in out
    assert "1 example, 1 paragraph\n" in out
    assert "xprobe: 1 record left out; the first: toy.en.json: id q0: answer is not at answer_start" in err
    assert main(["run", str(tiny), "--data", str(folder), "--out", str(tmp_path / "s"), "--strict"]) == 1
    assert "toy.en.json: id q0" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def encoder(folder):
    from transformers import AutoConfig, AutoModelForMaskedLM

    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **COMMON)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def bare(folder, tiny):
    """The tiny model without its tokenizer."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    return folder


def truncated(folder):
    write_set(folder, {"en": [("A b c.", "What?", "b")]})
    path = folder / "toy.en.json"
    path.write_text(path.read_text()[:-20])
    return folder


def bad_calls(tmp_path, tiny):
    """Every kind of bad input: arguments, exit code, what the message must name."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.en.json").write_text('{"data": []}')
    (tmp_path / "broken.gguf").write_bytes(b"nothing")
    (tmp_path / "nodata").mkdir()
    model, out = str(tiny), ["--out", str(tmp_path / "new")]
    return {
        "missing data file": ([model, "--data", str(tmp_path / "no.en.json")], 2, "no.en.json"),
        "folder without data": ([model, "--data", str(tmp_path / "nodata")], 2, "NAME.<language>.json"),
        "truncated JSON": ([model, "--data", str(truncated(tmp_path / "cut"))], 1, "toy.en.json is not valid JSON"),
        "empty dataset": ([model, "--data", str(tmp_path / "empty.en.json")], 1, "no usable question"),
        "unknown language": ([model, "--languages", "en,xx"], 2, "'xx'"),
        "languages cut short": ([model, "--languages", "en,"], 2, "comma-separated"),
        "unknown setting": ([model, "--setting", "x-en"], 2, "x-en"),
        "unknown signal": ([model, "--signals", "relevance"], 2, "relevance"),
        "encoding without rows": ([model, "--signals", "encoding", "--no-rows"], 2, "--no-rows"),
        "probes without rows": ([model, "--probes", "language", "--no-rows"], 2, "--no-rows"),
        "no probes and a probe": ([model, "--probes", "none,language"], 2, "'none' stands alone"),
        "unknown probe": ([model, "--probes", "syntax"], 2, "syntax"),
        "limit 0": ([model, "--limit", "0"], 2, "--limit"),
        "limit that is no number": ([model, "--limit", "many"], 2, "many"),
        "paragraphs 0": ([model, "--paragraphs", "0"], 2, "--paragraphs"),
        "limit and paragraphs": ([model, "--limit", "4", "--paragraphs", "2"], 2, "leave out limit, or leave out par"),
        "unknown option": ([model, "--limt", "1"], 2, "--limt"),
        "unknown model": (["no/such-model-anywhere"], 1, "no/such-model-anywhere"),
        "path that does not exist": (["./nowhere/model"], 2, "./nowhere/model"),
        "folder without a model": ([str(tmp_path / "nodata")], 1, "config.json"),
        "folder without a tokenizer": ([str(bare(tmp_path / "bare", tiny))], 1, "tokenizer"),
        "encoder-only model": ([str(encoder(tmp_path / "bert"))], 1, "not a causal decoder"),
        "not a GGUF file": ([str(tmp_path / "broken.gguf")], 1, "broken.gguf"),
        "a file that is no model": ([str(tmp_path / "file")], 2, "not a .gguf"),
        "out exists": ([model, "--out", str(tmp_path / "full")], 2, "not empty"),
        "out is a file": ([model, "--out", str(tmp_path / "file")], 2, "is a file"),
        "out below a file": ([model, "--out", str(tmp_path / "file" / "run")], 2, "is a file"),
        "resume without out": ([model, "--resume"], 2, "--out"),
        "resume of no run": ([model, "--out", str(tmp_path / "full"), "--resume"], 2, "no run to resume"),
        "resume of nothing": (["--out", str(tmp_path / "new"), "--resume"], 2, "name the MODEL"),
        "missing template": ([model, "--template", "no.toml"], 2, "no.toml"),
        "chat without a chat template": ([model, "--template", "chat", *out], 1, "--template plain"),
        "empty model": ([""], 2, "empty"),
        "meta device": ([model, "--device", "meta", *out], 2, "meta"),
        "unknown device": ([model, "--device", "tpu9", *out], 2, "tpu9"),
        "unknown backend": ([model, "--backend", "abacus", *out], 2, "abacus"),
    }  # fmt: skip


def test_every_bad_input_gets_one_clear_line_and_the_right_exit_code(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    calls = bad_calls(tmp_path, tiny)
    capsys.readouterr()  # making the models draws bars
    for name, (arguments, code, word) in calls.items():
        assert main(["run", *arguments]) == code, name
        out, err = capsys.readouterr()
        assert out == "", name
        assert err.count("\n") == 1, (name, err)
        assert err.startswith("xprobe: error: "), name
        assert word in err, (name, err)
        assert "Traceback" not in err, name
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path, tiny, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert main(["run", str(tiny), "--out", str(locked / "run")]) == 1
    assert "permission denied" in capsys.readouterr().err


def test_an_out_folder_on_a_read_only_file_system_is_named(tiny, capsys):
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc, which nobody may write into")
    assert main(["run", str(tiny), "--limit", "1", "--languages", "en", "--out", "/proc/self/run"]) == 1
    assert "/proc/self" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(xprobe.XprobeError):
        main(["run", "./nowhere/model", "--debug"])


def test_an_unexpected_error_is_one_line_too(tiny, monkeypatch, capsys):
    import xprobe.study

    monkeypatch.setattr(xprobe.study, "run_config", lambda *_, **__: 1 / 0)
    assert main(["run", str(tiny)]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "--debug" in err
    assert err.count("\n") == 1


def test_control_c_keeps_finished_examples_and_prints_the_command_that_resumes(tiny, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "xprobe_cli", "run", str(tiny), "--out", str(out), "--batch-tokens", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts its background jobs with SIGINT ignored, and their children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "shards").is_dir() or not any((out / "shards").glob("*.safetensors")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1].endswith(f"continue with: {sys.executable} -m xprobe_cli run --out {out} --resume")
    assert stderr.count("\n") <= 2
    assert main(["run", str(tiny), "--out", str(out), "--resume", "--batch-tokens", "4096", "--json"]) == 0


@pytest.mark.parametrize("arguments", [[], ["data"]])
def test_a_group_without_a_command_shows_its_help(arguments, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Commands:" in err


def test_it_runs_as_a_module_and_as_a_script():
    script = Path(sys.executable).with_name("xprobe")
    for command in ([sys.executable, "-m", "xprobe_cli"], [str(script)] if script.exists() else None):
        if command is not None:  # a checkout that is not installed has no script
            result = subprocess.run([*command, "--version"], capture_output=True, text=True)
            assert result.stdout == f"xprobe, version {xprobe.__version__}\n"


def test_resume_takes_options_that_are_not_given_from_the_run(finished, capsys):
    assert main(["run", "--out", str(finished), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == xprobe.load_study(finished).to_dict()
    assert main(["run", "--out", str(finished), "--resume", "--limit", "3"]) == 2
    assert capsys.readouterr().err == (
        f"xprobe: error: cannot resume {finished}: limit was 4 and is now 3. Choose another out (--out)\n"
    )
    assert main(["run", "--out", str(finished), "--resume", "--paragraphs", "2"]) == 2
    assert "limit was 4 and is now None; paragraphs was None and is now 2" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_block_characters_gets_the_numbers(finished, encoding):
    result = subprocess.run(
        [sys.executable, "-m", "xprobe_cli", "run", "--out", str(finished), "--resume"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "120"}, check=True,
    )  # fmt: skip
    assert b"boundary  layer" in result.stdout
    assert b"#" in result.stdout


def test_a_full_disk_behind_stdout_is_not_reported_as_a_fault_of_xprobe():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "xprobe_cli", "data", "list"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 1
    assert "No space left on device" in result.stderr
    assert "fault in xprobe" not in result.stderr


@pytest.mark.parametrize(
    ("value", "wanted"), [(0, ""), (1, "████"), (0.5, "██"), (0.125, "▌"), (None, ""), (2, "████")]
)
def test_bars_are_as_long_as_their_value(value, wanted, capsys):
    assert bar(value, 4) == wanted.ljust(4)
