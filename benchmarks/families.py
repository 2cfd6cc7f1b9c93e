"""Checks xprobe on every causal model type of the installed transformers and writes docs/families.md.

    python benchmarks/families.py --out docs/families.md --json families.json
    python benchmarks/families.py --only llama,qwen3            # prints only these rows
    python benchmarks/families.py --from families.json --out docs/families.md                   # only the tables
    python benchmarks/families.py --from families.json --only llama --json families.json        # one case again

Every family is a tiny random model (``tiny_families.py``). A separate process saves, loads, reads, runs, streams and
dry-runs it (``family_checks.py``), with limits on time and memory. The sweep needs a CPU and no network.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pkgutil
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import family_table
import tiny_families

import xprobe

TESTS = Path(__file__).resolve().parents[1] / "tests"  # has the tokenizer and the prompts
SECONDS, MEMORY = 120, 12 << 30  # limits of one family
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row of a table: a model type, with the entries of its configuration that are changed."""

    model_type: str
    options: tuple[tuple[str, Any], ...] = ()
    wrapper: bool = False  # a vision-language model: belongs to the second table

    @property
    def name(self) -> str:
        return " ".join([self.model_type, *(f"{key}={value}" for key, value in self.options)])


def cases(only: Iterable[str] = ()) -> list[Case]:
    """All rows of both tables, or those of the model types ``only``."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    causal = sorted(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    wrappers = sorted(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - set(causal))
    listed = []
    for model_type in causal:
        listed.append(Case(model_type))
        config_class = CONFIG_MAPPING[model_type]
        if getattr(config_class, "is_decoder", None) is False and not getattr(
            config_class, "is_encoder_decoder", False
        ):
            listed.append(Case(model_type, (("is_decoder", True),)))
    listed += [Case(model_type, wrapper=True) for model_type in wrappers]
    wanted = set(only)
    unknown = wanted - {case.model_type for case in listed}
    if unknown:
        raise SystemExit(f"transformers knows no causal model of type {', '.join(sorted(unknown))}")
    return [case for case in listed if not wanted or case.model_type in wanted]


def sweep(chosen: list[Case], jobs: int, seconds: float = SECONDS) -> dict[str, Record]:
    """Runs the checks of every case, each in its own process."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(TESTS))
    from support.families import tiny_tokenizer

    import_module("family_checks")
    for module in pkgutil.walk_packages(xprobe.__path__, "xprobe."):
        import_module(module.name)  # once here, so that children need not

    context = multiprocessing.get_context("fork")
    tokenizer = tiny_tokenizer("byte_bpe")
    waiting, running, results = list(chosen), {}, {}
    with tempfile.TemporaryDirectory(prefix="xprobe-families-") as scratch:
        while waiting or running:
            while waiting and len(running) < jobs:
                case = waiting.pop(0)
                folder = Path(scratch, case.name.replace(" ", "_"))
                process = context.Process(target=_child, args=(case, folder, tokenizer))
                process.start()
                running[case] = process, folder, time.monotonic()
            for case, (process, folder, start) in list(running.items()):
                timed_out = time.monotonic() - start > seconds
                if process.is_alive() and not timed_out:
                    continue
                if process.is_alive():
                    process.kill()
                process.join()
                del running[case]
                result = folder / "result.json"
                record = json.loads(result.read_text()) if result.is_file() else {}
                if process.exitcode:
                    reason = f"stopped after {seconds:.0f} s" if timed_out else f"exit code {process.exitcode}"
                    record["stopped"] = {"fault": reason}
                record["seconds"] = round(time.monotonic() - start, 1)
                results[case.name] = {"wrapper": case.wrapper, **record}
                print(f"{len(results)}/{len(chosen)} {family_table.summary_line(case.name, record)}", flush=True)
            time.sleep(0.05)
    return {case.name: results[case.name] for case in chosen}


def _child(case: Case, folder: Path, tokenizer: Any) -> None:
    import family_checks
    import torch
    import transformers

    folder.mkdir(parents=True)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model_folder = folder / "model"

    def save(record: Record) -> None:
        text = json.dumps(record).replace(str(model_folder), "FOLDER")
        (folder / "result.part").write_text(text)
        (folder / "result.part").replace(folder / "result.json")

    record: Record = {}
    try:
        (_save_wrapper if case.wrapper else _save_model)(case, model_folder, record)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        record["build"] = {**record.get("build", {}), "fault": reason}
        save(record)
        return
    tokenizer.save_pretrained(model_folder)
    checks = family_checks.Checks(model_folder, record, save)
    checks.wrapper() if case.wrapper else checks.run()


def _save_model(case: Case, folder: Path, record: Record) -> None:
    """Saves a tiny random model. For a type that also reads images it saves the whole vision-language model."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    whole = case.model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto_class = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    note = tiny_families.NEED_ANOTHER_MODEL.get(case.model_type)
    record["build"] = {"note": note} if note else {}
    config = tiny_families.tiny_config(case.model_type, **dict(case.options))
    model = tiny_families.tiny_model(config, auto_class)
    record["build"] |= {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    if not note:
        tiny_families.check_runs(model)
    model.save_pretrained(folder)


def _save_wrapper(case: Case, folder: Path, record: Record) -> None:
    """Saves only the configuration of a vision-language model: its weights do not change the outcome."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = tiny_families.tiny_config(case.model_type)
    except Exception:  # the tiny sizes contradict each other; no model is built here, so the default sizes work too
        config = CONFIG_MAPPING[case.model_type]()
    name = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[case.model_type]
    config.architectures = [name if isinstance(name, str) else name[0]]
    record["build"] = {"class": config.architectures[0]}
    config.save_pretrained(folder)


def versions() -> Record:
    """The date and the versions, which the document states."""
    import torch
    import transformers

    return {
        "date": date.today().isoformat(), "xprobe": xprobe.__version__, "transformers": transformers.__version__,
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the tables to this Markdown file")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--from", dest="source", type=Path, help="read the results of an earlier sweep from this file")
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--jobs", type=int, default=2, help="number of families checked at the same time")
    options = parser.parse_args()
    start = time.monotonic()
    results = json.loads(options.source.read_text(encoding="utf-8")) if options.source else {"cases": {}}
    if options.only or not options.source:
        made = versions()
        if options.source and {**results["made"], **made, "date": ""} != {**results["made"], "date": ""}:
            parser.error(f"{options.source} was made with {results['made']}: run the whole sweep again")
        results["cases"] |= sweep(cases(filter(None, options.only.split(","))), options.jobs)
        results["made"] = {"minutes": round((time.monotonic() - start) / 60, 1), **results.get("made", {}), **made}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if options.out:
        options.out.write_text(family_table.document(results), encoding="utf-8")


if __name__ == "__main__":
    main()
