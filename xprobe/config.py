"""What a study measures (``StudyConfig``) and how it is computed (``Execution``). Both are saved with the run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral
from typing import Any

from xprobe.arguments import check_device_map, check_instance, check_jobs, check_least, text_names
from xprobe.errors import UsageError

SETTINGS = {
    "en-x": "context and answer in English, question in each language",
    "x-x": "context, question and answer in each language",
}
BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}  # by device type; measured in docs/capture.md
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
TEMPLATES = ("auto", "chat", "plain")

# docs/method.md defines them
SIGNALS = {
    "readiness": "how near the gold answer is to the top of the lens's ranking",
    "encoding": "how well a question is told apart from the others on its paragraph, across languages",
}

# stage that is added to a finished run -> its command
STAGE_COMMANDS = {
    "answers": "evaluate", "oracle": "oracle", "relevance": "attribute", "patching": "patch", "lenses": "lenses",
}  # fmt: skip

# probe -> what it asks; xprobe.probes.registry defines how each one is trained
BUILT_IN_PROBES = {
    "alignment": "a linear map to what the other languages' states of a question agree on",
    "language": "which language the question is in",
    "correctness": "whether the first answer token will be on top at the last layer",
}

DEFAULT_PROBES = ("alignment", "language", "correctness")  # trained if nothing else is asked for

PROBES = dict(BUILT_IN_PROBES)  # and those that ``xprobe.probes.register`` adds

# State (a tensor of the shards) -> the signal that is read from it: h[l] at the last prompt token, where the answer
# will be produced, and its mean over the question's own tokens
STATES = {"prompt_end": "encoding", "question_mean": "encoding_question"}

MAX_DRAWS = 1_000_000  # of the bootstrap and the permutations: more would only fill the memory

MAX_SEED = 2**32 - 1  # of scikit-learn's and numpy's generators

PROBE_COLUMNS = ("setting", "probe", "state", "layer", "metric", "score", "lo", "hi", "baseline", "control",
                 "control_lo", "control_hi", "selectivity", "folds", "n", "not_converged")  # fmt: skip

LAYER_COLUMNS = ("setting", "layer", "language", "signal", "value", "lo", "hi", "n")
EXAMPLE_COLUMNS = ("setting", "language", "question_id", "paragraph", "onset", "sharpness", "phased")

ROWS_FILE = ".rows-"  # beginning of the temporary name of a file of hidden rows in a run folder

DEFAULT_MODEL = "smollm2-135m"

# what a manifest calls a model, and questions, that a script had in memory
MODEL_IN_MEMORY, RECORDS_IN_MEMORY = "memory", "records in memory"


@dataclass(frozen=True)
class StudyConfig:
    """What a study measures. It identifies a run: a run is continued with the same one, or not at all.

    Parameters
    ----------
    model : str
        Alias, Hugging Face id, local folder or ``.gguf`` file.
    data : str
        ``builtin``, ``xquad``, ``hf:NAME`` (a data set of the Hugging Face Hub), a folder of ``NAME.<lang>.json`` files
        or one such file (docs/data.md).
    settings : tuple of str
        ``en-x``, ``x-x`` or both.
    languages : tuple of str, optional
        Question languages; all that the data holds if None.
    limit : int, optional
        How many questions to use, each in every language; spread over paragraphs (docs/data.md).
    paragraphs, questions_per_paragraph : int, optional
        How many paragraphs to use, and at most how many questions of each: in place of ``limit``.
    signals : tuple of str, optional
        Which signals to compute. None: readiness, and encoding if rows are kept.
    probes : tuple of str, optional
        Names of the probes to train: built-in ones (``BUILT_IN_PROBES``) and your own (``xprobe.probes.register``); ()
        for none. None: ``DEFAULT_PROBES`` if rows are kept. ``check_probes`` checks the names when a run begins, not
        here: the configuration of a run can be read where its probes are not registered.
    template : str
        ``auto`` (chat template if the tokenizer has one), ``chat``, ``plain``, or the path of a template file.
    dtype : str
        ``auto``: float32 on a CPU, the checkpoint's dtype on an accelerator. A run that is continued keeps the dtype
        that it began with.
    lens : str
        What reads the states: ``logit``, or ``tuned:FOLDER``, ``jacobian:FILE``, ``regression:FILE`` (docs/lenses.md).
    strict : bool
        Make bad records fatal.
    seed, bootstrap, permutations : int
        Random seed, bootstrap draws for the intervals, and permutations of the test whether an example has phases.
    store_rows : bool
        Keep captured hidden rows in the shards: encoding and probes need them.

    Raises
    ------
    UsageError
        Names the parameter, its value and what was expected.

    Examples
    --------
    >>> StudyConfig(languages=("en", "de")).settings
    ('en-x',)
    """

    model: str = DEFAULT_MODEL
    data: str = "builtin"
    settings: tuple[str, ...] = ("en-x",)
    languages: tuple[str, ...] | None = None
    limit: int | None = None
    paragraphs: int | None = None
    questions_per_paragraph: int | None = None
    signals: tuple[str, ...] | None = None
    probes: tuple[str, ...] | None = None
    template: str = "auto"
    dtype: str = "auto"
    lens: str = "logit"
    strict: bool = False
    seed: int = 0
    bootstrap: int = 1000
    permutations: int = 200
    store_rows: bool = True

    def __post_init__(self) -> None:
        _check_types(self)
        defaults = {"signals": ("readiness", "encoding"), "probes": DEFAULT_PROBES}
        without_rows = {"signals": ("readiness",), "probes": ()}
        for name, value in (defaults if self.store_rows else without_rows).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("settings", "signals", "probes", "languages"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, text_names(name, value))
        _known("setting", self.settings, SETTINGS)
        signals, probes = self.signals or (), self.probes or ()
        _known("signal", signals, SIGNALS)
        if not self.store_rows and ("encoding" in signals or probes):
            what = "signal 'encoding' needs" if "encoding" in signals else "probes need"
            raise UsageError(f"{what} the hidden rows: leave out store_rows=False (--no-rows)")
        if self.languages is not None and not self.languages:
            raise UsageError("languages is empty: name at least one, or leave it out for all that the data holds")
        _known("dtype", (self.dtype,), DTYPES)
        check_selection(self.limit, self.paragraphs, self.questions_per_paragraph)
        for name, least in (("bootstrap", 1), ("permutations", 20), ("seed", 0)):
            check_least(name, getattr(self, name), least)
        for name in ("bootstrap", "permutations"):
            if getattr(self, name) > MAX_DRAWS:
                raise UsageError(f"{name} must be a whole number of at most {MAX_DRAWS}, got {getattr(self, name)}")
        if self.seed > MAX_SEED:
            raise UsageError(f"seed must be a whole number of at most {MAX_SEED}, got {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``manifest.json``."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StudyConfig:
        """The inverse of ``to_dict``; names that this version does not know are refused."""
        return cls(**_known_values(cls, values))


# options of Execution that cannot stand together
_EXCLUDES = {
    "device": ("device_map", "tensor_parallel"),
    "device_map": ("device", "stream", "tensor_parallel"),
    "stream": ("device_map", "tensor_parallel"),
    "tensor_parallel": ("device", "device_map", "stream"),
}
_TRUST = ("trust_remote_code", "allow_pickle")  # they let a model run any code


@dataclass(frozen=True)
class Execution:
    """How a study is computed. It may change between two parts of a run; it changes results by rounding at most.

    Parameters
    ----------
    device : str
        ``auto`` (the first accelerator that torch sees, else the CPU), or a torch device.
    device_map : str or dict, optional
        Spreads the model over several devices, main memory and disk: one of transformers' rules (``auto``,
        ``balanced``, ``balanced_low_0``, ``sequential``), or a device for each module by name. Replaces ``device``.
    tensor_parallel : bool
        Share every layer among the processes that torchrun started.
    batch_tokens : int, optional
        Maximum number of tokens in one forward pass. None: 4096, on a CUDA device 16384.
    backend : str
        Lens backend: ``auto``, or one that ``xprobe doctor`` lists.
    stream : bool
        Run block by block, for models larger than memory: weights are read from the checkpoint once per run.
    jobs : int
        Layers whose probes are trained at the same time; -1: one per core.
    trust_remote_code, allow_pickle : bool
        Let the model bring its own code, or weights in a pickle. Both can run anything on your machine.

    Raises
    ------
    UsageError
        Names the parameter, its value and what was expected.

    Examples
    --------
    >>> Execution(device="cpu", batch_tokens=1024).stream
    False
    """

    device: str = "auto"
    device_map: str | dict[str, int | str] | None = field(default=None, hash=False)
    tensor_parallel: bool = False
    batch_tokens: int | None = None
    backend: str = "auto"
    stream: bool = False
    jobs: int = -1
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        if self.batch_tokens is not None:
            check_least("batch_tokens", self.batch_tokens, 1)
        check_jobs(self.jobs)
        self._check_devices()

    def tokens_on(self, device: str) -> int:
        """Maximum number of tokens in one forward pass on this torch device.

        Examples
        --------
        >>> Execution().tokens_on("cpu"), Execution().tokens_on("cuda:1"), Execution(batch_tokens=100).tokens_on("cuda")
        (4096, 16384, 100)
        """
        return self.batch_tokens or BATCH_TOKENS.get(device.partition(":")[0], BATCH_TOKENS["cpu"])

    def _check_devices(self) -> None:
        if self.tensor_parallel and (self.device_map is not None or self.stream or self.device != "auto"):
            raise UsageError(
                "tensor_parallel has each process take its own device: leave device, device_map and stream"
            )
        if self.device_map is None:
            return
        if isinstance(self.device_map, str):
            _known("device_map", (self.device_map,), DEVICE_MAPS)
        else:
            check_device_map(self.device_map)
            object.__setattr__(self, "device_map", dict(self.device_map))
        if self.device != "auto":
            raise UsageError(
                f"device {self.device!r} and device_map {self.device_map!r} contradict each other: give one"
            )
        if self.stream:
            raise UsageError("device_map and stream are two strategies for a large model: choose one")

    def resumed_with(self, given: dict[str, Any]) -> Execution:
        """The options of a resumed run: those of ``given``, the rest from this execution.

        A given option replaces every recorded one that it excludes: ``device``, ``device_map``, ``stream`` and
        ``tensor_parallel`` partly exclude each other. ``trust_remote_code`` and ``allow_pickle`` are never taken from
        the record: a run folder may come from somebody else, and both let a model run any code.

        Raises
        ------
        UsageError
            The options of ``given`` contradict each other.

        Examples
        --------
        >>> recorded = Execution(device_map="auto", batch_tokens=1024, trust_remote_code=True)
        >>> resumed = recorded.resumed_with({"device": "cpu"})
        >>> resumed.device, resumed.device_map, resumed.batch_tokens, resumed.trust_remote_code
        ('cpu', None, 1024, False)
        """
        replaced = {name for option, value in given.items() if value is not False for name in _EXCLUDES.get(option, ())}
        recorded = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in replaced | set(_TRUST)}
        return Execution(**{**recorded, **given})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``manifest.json``."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Execution:
        """The inverse of ``to_dict``; names that this version does not know are refused."""
        return cls(**_known_values(cls, values))


def split_options(
    options: dict[str, Any], renamed: dict[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options by name, in those of ``StudyConfig`` and those of ``Execution``.

    ``renamed``: options that the caller's users know under another name; an error names them so.

    Raises
    ------
    UsageError
        Names an option that neither of them has.

    Examples
    --------
    >>> split_options({"seed": 1, "device": "cpu"})
    ({'seed': 1}, {'device': 'cpu'})
    """
    what, how = ({f.name for f in fields(kind)} for kind in (StudyConfig, Execution))
    unknown = sorted(set(options) - what - how)
    if unknown:
        known = sorted((renamed or {}).get(name, name) for name in what | how)
        raise UsageError(f"unknown option {unknown[0]!r}; known: {', '.join(known)}")
    return ({k: v for k, v in options.items() if k in what}, {k: v for k, v in options.items() if k in how})


def _check_types(config: Any) -> None:
    """Text is text, True or False is True or False; whole numbers of numpy become Python's."""
    for entry in fields(config):
        value, kind = getattr(config, entry.name), type(entry.default)
        if isinstance(value, Integral) and not isinstance(value, bool | int):
            object.__setattr__(config, entry.name, int(value))
        if kind in (str, bool):
            check_instance(entry.name, value, kind)


def _to_dict(config: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def _known_values(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"configuration has unknown entries {unknown}; known: {sorted(known)}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def check_selection(limit: int | None, paragraphs: int | None, questions_per_paragraph: int | None) -> None:
    """Checks the three numbers that choose questions.

    Raises
    ------
    UsageError
        One is below 1 or no whole number, or ``limit`` stands together with another.

    Examples
    --------
    >>> check_selection(None, 12, 4)
    >>> check_selection(20, 12, None)
    Traceback (most recent call last):
    xprobe.errors.UsageError: limit 20 contradicts paragraphs 12: leave out limit, or leave out paragraphs
    """
    bounds = {"paragraphs": paragraphs, "questions_per_paragraph": questions_per_paragraph}
    meaning = {"limit": "no limit", "paragraphs": "all paragraphs", "questions_per_paragraph": "all questions of each"}
    for name, value in {"limit": limit, **bounds}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise UsageError(
                f"{name} must be a whole number of at least 1, got {value!r}; leave it out for {meaning[name]}"
            )
    others = [name for name, value in bounds.items() if value is not None]
    if limit is not None and others:
        given = " and ".join(f"{name} {bounds[name]}" for name in others)
        raise UsageError(f"limit {limit} contradicts {given}: leave out limit, or leave out {' and '.join(others)}")


def check_probes(names: Iterable[str]) -> None:
    """Checks that probes can be trained in this process.

    Raises
    ------
    UsageError
        Names the first probe that is neither built in nor registered.

    Examples
    --------
    >>> check_probes(["language"])
    >>> check_probes(["syntax"])
    Traceback (most recent call last):
    xprobe.errors.UsageError: unknown probe 'syntax'; available: alignment, language, correctness...
    """
    for name in names:
        if name not in PROBES:
            raise UsageError(
                f"unknown probe {name!r}; available: {', '.join(PROBES)}. If it is a probe of your own, register it as "
                "the script did that defines it (xprobe.probes.register)"
            )


def _known(what: str, values: tuple[str, ...], allowed: Any) -> None:
    if not values:
        raise UsageError(f"no {what} given; available: {', '.join(allowed)}")
    for value in values:
        if value not in allowed:
            raise UsageError(f"unknown {what} {value!r}; available: {', '.join(allowed)}")
