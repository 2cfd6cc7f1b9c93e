"""``python -m xprobe_kernels.bench``: the same benchmark as ``xprobe bench``, without the rest of xprobe."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from xprobe_kernels.bench.command import Settings, SettingsError, measure


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark. Exit codes: 0 success, 2 wrong usage, 1 a file that cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m xprobe_kernels.bench", description="Speed of the kernels.")
    parser.add_argument("--kernel", default="lens", help="lens, capture or all (default: lens)")
    parser.add_argument("--shape", help="a model's name or all (default: all on a GPU, two on a CPU)")
    parser.add_argument("--rows", default="all", help="many, few or all (default: all)")
    parser.add_argument("--rounds", type=int, help="rounds of measurement (default: as many as fit)")
    parser.add_argument("--dtype", default="bfloat16", help="of the model: bfloat16, float16 or float32")
    parser.add_argument("--backend", action="append", default=[], dest="backends", help="lens backend; repeatable")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, a few seconds: only checks that the benchmark works"
    )
    parser.add_argument("--kl", action="store_true", help="also compute the KL to the final layer")
    parser.add_argument(
        "--rivals", action="store_true", help="measure other projects' fused linear cross entropy beside the lens"
    )
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON; without FILE to stdout")
    parser.add_argument("--figure", metavar="FILE.png", help="write a roofline figure (needs matplotlib)")
    options = vars(parser.parse_args(arguments))
    target, figure = options.pop("json"), options.pop("figure")
    try:
        settings = Settings(**options | {"backends": tuple(options["backends"])})
        settings.check()
        if target not in (None, "-") and not Path(target).resolve().parent.is_dir():
            raise SettingsError(f"--json: {Path(target).resolve().parent} is not a folder")
        if figure:
            from xprobe_kernels.bench import figure as drawing

            drawing.check(figure, settings.measured)
        result = measure(settings, show=None if target == "-" else lambda text: print(text, flush=True))
        if target == "-":
            print(json.dumps(result, indent=1, allow_nan=False))
        elif target:
            Path(target).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if figure:
            try:
                drawing.roofline(result, figure)
            except drawing.NothingToDrawError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
