"""Fitting of transports: by regression in one pass over a text, or from mean Jacobians.

text -> token ids -> states of every layer -> sums (regression) or Jacobians -> maps -> a file in the published format
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xprobe.arguments import check_callable, check_replaceable
from xprobe.capture.engine import Engine
from xprobe.capture.requests import Each, Request
from xprobe.errors import DataError, ModelError, UsageError
from xprobe.events import Note, Notify, Stage, Step
from xprobe.lenses.files import check_writable, save_lens
from xprobe.lenses.jacobian import jacobian_of_text
from xprobe.lenses.settings import RIDGES, FitSettings
from xprobe.lenses.sums import Fit, Sums, agreement
from xprobe.models import in_memory
from xprobe.models.anatomy import Anatomy, inspect
from xprobe.models.passes import frozen

if TYPE_CHECKING:
    import pandas as pd

    from xprobe.models.loading import LoadedModel

ROW_BYTES = 256 << 20  # most bytes of states that are held at once
BATCH = 1024  # tokens of one backward pass
BUILTIN = "builtin"


@dataclass(frozen=True, eq=False)
class FittedLens:
    """A lens that was fitted.

    Attributes
    ----------
    path : Path
        Its file; ``lens=f"{kind}:{path}"`` uses it.
    settings : FitSettings
    texts, tokens : int
        What it was fitted on.
    table : DataFrame
        One row per layer: ``agreement`` (cosine of the maps of both halves of the texts), and for a regression
        ``explained`` (R² of each half's map on the other half, mean), ``explained_before`` (R² of the state itself) and
        ``ridge``.
    """

    path: Path
    settings: FitSettings
    texts: int
    tokens: int
    table: pd.DataFrame

    @property
    def warning(self) -> str | None:
        """Where the fit says nothing, in words; None where all layers are fitted."""
        if "explained" not in self.table:
            return None
        poor = self.table.index[(self.table["explained"] < 0) | (self.table["ridge"] >= RIDGES[-1])]
        if not len(poor):
            return None
        return (
            f"the maps of {len(poor)} of {len(self.table)} layers (up to layer {poor[-1]}) explain next to nothing of "
            "text that they were not fitted on: fit them on a longer text"
        )

    @property
    def name(self) -> str:
        """How ``--lens`` and ``lens=`` name it."""
        return f"{self.settings.kind}:{self.path}"


def fit_lens(
    model: Any,
    out: str | Path,
    settings: FitSettings | None = None,
    *,
    text: str | Path | Sequence[str] = BUILTIN,
    tokenizer: Any = None,
    dtype: str = "auto",
    batch_tokens: int = 4096,
    progress: Notify | None = None,
    **options: Any,
) -> FittedLens:
    """Fits a lens for a model, and writes it to a file in the format of published Jacobian lenses.

    A Jacobian takes D passes back through the model for each text, many of them in one batch. After each text a
    checkpoint is written beside the file, so a call that was stopped goes on.

    Parameters
    ----------
    model : str or PreTrainedModel
    out : path
        The file, by custom with the ending .pt.
    settings : FitSettings, optional
    text : path, or sequence of str
        Texts, or a UTF-8 file with blank lines between texts. ``builtin``: the contexts of the built-in question set,
        12 in each of 12 languages.
    tokenizer : PreTrainedTokenizerBase, optional
        Of a model in memory.
    dtype : str
        As for ``xprobe.run``, where ``model`` is a name.
    batch_tokens : int
        Most tokens in one forward pass.
    progress : callable (event), optional
    **options
        ``device``, ``trust_remote_code``, ``allow_pickle``, as for ``xprobe.run``.

    Raises
    ------
    UsageError
        An argument is of another kind or out of its range.
    DataError
        Fewer than two texts are long enough.
    ModelError
        The model cannot be loaded, or its parts are not found.

    Examples
    --------
    >>> import xprobe
    >>> fitted = xprobe.fit_lens("smollm2-135m", "lenses/regression.pt")         # doctest: +SKIP
    >>> fitted.table[["explained_before", "explained"]]                          # doctest: +SKIP
    """
    settings = settings or FitSettings()
    if not isinstance(settings, FitSettings):
        raise UsageError(f"settings must be a FitSettings, got {settings!r}")
    check_callable("progress", progress)
    path = Path(out)
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file")
    check_replaceable(path)
    check_writable(path)
    notify = progress or (lambda event: None)
    texts = read_texts(text)
    notify(Stage("loading the model"))
    loaded = in_memory.load_or_wrap(model, tokenizer, dtype, options)
    ids = encode_texts(loaded.tokenizer, texts, settings, loaded.window)
    with in_memory.evaluation_mode(loaded.model):
        anatomy = inspect(loaded.model)
        target = anatomy.n_layers - (1 if settings.target == "last" else 2)
        layers = list(range(1, target))
        if not layers:
            raise ModelError(f"a model of {anatomy.n_layers - 1} blocks has no layer between its first and its target")
        about = _about(loaded, settings, ids, anatomy.n_layers - 1)
        work = _regression if settings.kind == "regression" else _jacobian
        part = _Part(loaded.model, anatomy, ids, layers, target, settings, path, about, batch_tokens, notify)
        maps, biases, table = work(part)
    save_lens(path, maps, biases, about)
    _checkpoint(path).unlink(missing_ok=True)
    return FittedLens(path, settings, len(ids), sum(map(len, ids)), table)


def read_texts(text: str | Path | Sequence[str]) -> list[str]:
    """Texts from a file, the built-in ones, or as they are given.

    Raises
    ------
    UsageError
        There is no such file, or it is not text.

    Examples
    --------
    >>> texts = read_texts("builtin")
    >>> len(texts) >= 100, all(isinstance(one, str) for one in texts)
    (True, True)
    """
    if isinstance(text, list | tuple):
        if not all(isinstance(one, str) for one in text):
            raise UsageError("text must be a file, or a list of texts")
        return list(text)
    if not isinstance(text, str | Path):
        raise UsageError(f"text must be a file, or a list of texts, got {text!r}")
    if text == BUILTIN:
        return _builtin_texts()
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {text}: {error}") from error
    return [part.strip() for part in content.split("\n\n") if part.strip()]


def _builtin_texts() -> list[str]:
    """The contexts of the built-in set: the first one in every language, then the second one, and so on."""
    from xprobe.qa.parallel import load_data

    data = load_data(BUILTIN)
    by_language: dict[str, dict[str, None]] = {}
    for example in data.select(("x-x",))[0]:
        by_language.setdefault(example.language, {})[example.context] = None
    columns = [list(own) for own in by_language.values()]
    return [own[row] for row in range(max(map(len, columns))) for own in columns if row < len(own)]


def encode_texts(
    tokenizer: Any, texts: Sequence[str], settings: FitSettings, window: int | None
) -> list[tuple[int, ...]]:
    """Token ids of the texts, cut to ``settings.tokens``; texts of at most ``settings.first`` + 1 are left out.

    Raises
    ------
    DataError
        Fewer than two are left.
    """
    most = min(settings.tokens, window or settings.tokens)
    encoded = (tuple(tokenizer(text)["input_ids"][:most]) for text in texts)
    found = [ids for ids in encoded if len(ids) > settings.first + 1][: settings.texts]
    if len(found) < 2:
        raise DataError(
            f"{len(found)} of {len(texts)} texts have more than {settings.first + 1} tokens: a lens needs at least two "
            "such texts"
        )
    return found


def _about(loaded: LoadedModel, settings: FitSettings, ids: Sequence[tuple[int, ...]], blocks: int) -> dict[str, Any]:
    """What the file says of the fit."""
    import transformers

    from xprobe import __version__

    checksum = hashlib.sha256(json.dumps(list(map(list, ids))).encode()).hexdigest()
    return {
        **asdict(settings), "model": loaded.source.name, "n_blocks": blocks, "n_prompts": len(ids),
        "n_tokens": sum(map(len, ids)), "text_sha256": checksum, "xprobe": __version__,
        "transformers": str(transformers.__version__), "torch": str(torch.__version__),
    }  # fmt: skip


Work = tuple[dict[int, Tensor], "dict[int, Tensor] | None", "pd.DataFrame"]


@dataclass(frozen=True, eq=False)
class _Part:
    """What both kinds of fit are given."""

    model: Any
    anatomy: Anatomy
    ids: Sequence[tuple[int, ...]]
    layers: list[int]
    target: int
    settings: FitSettings
    path: Path
    about: dict[str, Any]
    batch_tokens: int
    notify: Callable[[Any], None]


def _regression(part: _Part) -> Work:
    """Maps from streamed sums over two halves of the texts, the even and the odd ones."""
    import pandas as pd

    anatomy, ids, layers, settings, notify = part.anatomy, part.ids, part.layers, part.settings, part.notify
    engine = Engine(part.model, anatomy, part.batch_tokens)
    width, device = anatomy.head.width, anatomy.head.weight.device
    halves = [{layer: Sums(width, device) for layer in layers} for _ in range(2)]
    done = 0
    notify(Step("texts", 0, len(ids)))
    for some in _batches(ids, max(1, ROW_BYTES // (anatomy.n_layers * width * 4))):
        requests = [Request(ids[i], {"all": Each(tuple(range(settings.first, len(ids[i]))))}) for i in some]
        rows = engine.capture(requests)
        ends = rows.offsets["all"].tolist()
        for place, i in enumerate(some):
            own = rows["all"][:, ends[place] : ends[place + 1]]
            for layer in layers:
                halves[i % 2][layer].add(own[layer], own[part.target])
        done += len(some)
        notify(Step("texts", done, len(ids)))
    maps, biases, lines = {}, {}, []
    ones = torch.ones(width, dtype=torch.float64, device=device)
    identity = Fit(ones.diag(), 0 * ones)
    for layer in layers:
        one, other = (half[layer] for half in halves)
        tried = [
            (ridge, one.solve(ridge), other.solve(ridge))
            for ridge in (RIDGES if settings.ridge is None else (settings.ridge,))
        ]
        explained = [(other.explained(first) + one.explained(second)) / 2 for _, first, second in tried]
        best = max(range(len(tried)), key=explained.__getitem__)
        ridge, first, second = tried[best]
        both = (one + other).solve(ridge)
        maps[layer], biases[layer] = both.weight.float().cpu(), both.bias.float().cpu()
        lines.append(
            {
                "layer": layer, "agreement": agreement(first.weight, second.weight), "explained": explained[best],
                "explained_before": (one + other).explained(identity), "ridge": ridge,
            }
        )  # fmt: skip
    return maps, biases, pd.DataFrame(lines).set_index("layer")


def _batches(ids: Sequence[tuple[int, ...]], most: int) -> Iterator[list[int]]:
    """Indices of texts, in batches of at most ``most`` tokens, or one text."""
    batch: list[int] = []
    filled = 0
    for i, own in enumerate(ids):
        if batch and filled + len(own) > most:
            yield batch
            batch, filled = [], 0
        batch.append(i)
        filled += len(own)
    if batch:
        yield batch


def _checkpoint(path: Path) -> Path:
    return path.with_name(path.name + ".checkpoint")


def _jacobian(part: _Part) -> Work:
    """Mean Jacobians, with a checkpoint after each text."""
    import pandas as pd

    ids, layers, checkpoint = part.ids, part.layers, _checkpoint(part.path)
    total, even, done = _read_checkpoint(checkpoint, part.about, len(layers), part.anatomy.head.width)
    if checkpoint.exists() and not done:
        part.notify(Note(f"{checkpoint} is of another fit, or damaged: the fit begins anew", important=True))
    part.notify(Step("texts", done, len(ids)))
    with frozen(part.model):
        for i in range(done, len(ids)):
            rows = max(1, BATCH // len(ids[i]))
            own = jacobian_of_text(part.model, part.anatomy, ids[i], layers, part.target, rows, part.settings.first)
            total += own
            if i % 2 == 0:
                even += own
            _write_checkpoint(checkpoint, part.about, layers, total, even, i + 1)
            part.notify(Step("texts", i + 1, len(ids)))
    maps = {layer: total[place] / len(ids) for place, layer in enumerate(layers)}
    lines = [
        {"layer": layer, "agreement": agreement(even[place], total[place] - even[place])}
        for place, layer in enumerate(layers)
    ]
    return maps, None, pd.DataFrame(lines).set_index("layer")


def _read_checkpoint(path: Path, about: dict[str, Any], layers: int, width: int) -> tuple[Tensor, Tensor, int]:
    """Sums of the Jacobians of all texts so far and of the even ones, and how many; nothing where none fits."""
    empty = torch.zeros(layers, width, width), torch.zeros(layers, width, width), 0
    if not path.exists():
        return empty
    try:
        held = torch.load(path, weights_only=True, map_location="cpu")
        if held["xprobe"] != about:
            return empty
        total = torch.stack([held["jacobian_sum"][block] for block in sorted(held["jacobian_sum"])])
        return total, held["even"], int(held["n_done"])
    except Exception:  # a checkpoint that was written in part, or by something else: the fit begins anew
        return empty


def _write_checkpoint(
    path: Path, about: dict[str, Any], layers: Sequence[int], total: Tensor, even: Tensor, done: int
) -> None:
    """In the format of the authors' library, with the sum of the even texts beside it."""
    sums = {layer - 1: total[place] for place, layer in enumerate(layers)}
    held = {"jacobian_sum": sums, "n_done": done, "next_idx": done, "even": even, "xprobe": about}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        torch.save(held, temporary)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
