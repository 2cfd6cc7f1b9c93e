"""Files of transports: published Jacobian and tuned lenses, and those that xprobe fits.

A Jacobian lens is a ``torch.save`` of {"J": {block: [D, D]}, "n_prompts", "source_layers", "d_model"}; the output of
block b is layer b + 1. A checkpoint of an unfinished fit holds sums: {"jacobian_sum": {block: [D, D]}, "n_done"}.
Lenses that xprobe fits have the same format, with more entries under "xprobe". A tuned lens is a folder with
config.json and params.pt; translator i is added to the state of layer i. Every file is read with ``weights_only=True``,
so none runs code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xprobe.errors import ModelError, UsageError
from xprobe.lenses.settings import FITTED, LOGIT, LensName
from xprobe.lenses.transport import Transport, from_maps

FORMAT = 1  # of the entry "xprobe"


def load_lens(name: str, width: int, layers: int, model: str = "") -> tuple[Transport | None, list[str]]:
    """Reads the lens that a text names, and checks that it fits the model.

    Parameters
    ----------
    name : str
        As ``LensName.parse`` takes it.
    width, layers : int
        D and L + 1 of the model.
    model : str
        Its name, to compare with the one that the file records.

    Returns
    -------
    transport : Transport or None
        None for ``logit``.
    warnings : list of str

    Raises
    ------
    UsageError
        The name is wrong, or there is no such file.
    ModelError
        The file is damaged, is no such lens, or is the lens of a model of other size.
    """
    parsed = LensName.parse(name)
    if parsed.kind == LOGIT:
        return None, []
    path = find_file(parsed.place, folder=parsed.kind == "tuned")
    transport = _read_tuned(path) if parsed.kind == "tuned" else _read_jacobian(path, parsed.kind)
    where = f"the lens {path}"
    if transport.width != width:
        raise ModelError(f"{where} has width {transport.width}, the model has width {width}: it is of another model")
    blocks = transport.about.get("n_blocks")
    if max(transport.layers) >= layers or (blocks is not None and blocks != layers - 1):
        count = f"{blocks} blocks" if blocks is not None else f"{max(transport.layers)} blocks or more"
        raise ModelError(f"{where} is of a model of {count}, this one has {layers - 1}")
    return transport, _warnings(where, transport, model, layers)


def lens_checksum(name: str) -> str:
    """SHA-256 of the file of a lens; empty for ``logit``.

    Raises
    ------
    UsageError
        The name is wrong, or there is no such file.

    Examples
    --------
    >>> lens_checksum("logit")
    ''
    """
    parsed = LensName.parse(name)
    if parsed.kind == LOGIT:
        return ""
    tuned = parsed.kind == "tuned"
    path = find_file(parsed.place, folder=tuned)
    return _sha256(path / "params.pt" if tuned else path)


def _warnings(where: str, transport: Transport, model: str, layers: int) -> list[str]:
    found = []
    recorded = str(transport.about.get("model") or "")
    if recorded and model and recorded.rstrip("/").rpartition("/")[2] != model.rstrip("/").rpartition("/")[2]:
        found.append(f"{where} was fitted on {recorded!r}, the model is {model!r}")
    fitted_with = str(transport.about.get("transformers") or "")
    if fitted_with:
        import transformers

        if fitted_with.split(".")[:2] != transformers.__version__.split(".")[:2]:
            found.append(f"{where} was fitted with transformers {fitted_with}, here is {transformers.__version__}")
    missing = [layer for layer in range(1, layers - 1) if layer not in transport.layers]
    if missing:
        found.append(
            f"{where} has no map for {len(missing)} of the layers 1 to {layers - 2} (the first is {missing[0]}): they "
            "are read as they are"
        )
    return found


def find_file(place: str, *, folder: bool = False) -> Path:
    """The file (or folder) that a place names: a local path, or ``owner/repository/path[@revision]`` on the Hub.

    Raises
    ------
    UsageError
        Neither exists.
    """
    path = Path(place).expanduser()
    if path.exists():
        if path.is_dir() != folder:
            raise UsageError(
                f"{place} is a {'folder' if path.is_dir() else 'file'}, a {'folder' if folder else 'file'} is expected"
            )
        return path
    name, _, revision = place.partition("@")
    parts = name.split("/")
    if len(parts) < (2 if folder else 3) or path.is_absolute() or name.startswith("."):
        raise UsageError(
            f"there is no {'folder' if folder else 'file'} {place}; on the Hub it would be owner/repository/path"
        )
    from huggingface_hub import hf_hub_download

    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        if not folder:
            return Path(hf_hub_download(repository, inside, revision=revision or None))
        names = [f"{inside}/{one}" if inside else one for one in ("config.json", "params.pt")]
        found = [Path(hf_hub_download(repository, one, revision=revision or None)) for one in names]
        return found[0].parent
    except Exception as error:  # its many kinds of errors of network, names and permissions
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"there is no local {place}, and the Hub does not give it: {reason}") from error


def _load(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds on damaged files, and advises to switch the safety off
        what = (
            "is empty" if path.exists() and not path.stat().st_size else "is damaged, no such file, or would run code"
        )
        raise ModelError(
            f"{path} {what}: it cannot be read as a file of tensors (torch.load with weights_only=True, "
            f"{type(error).__name__})"
        ) from error


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def _read_jacobian(path: Path, kind: str) -> Transport:
    """A Jacobian lens or one that xprobe fitted, finished or as a checkpoint with sums."""
    held = _load(path)
    if not isinstance(held, dict):
        raise ModelError(f"{path} holds a {type(held).__name__}, no lens")
    own: dict[str, Any] = held["xprobe"] if isinstance(held.get("xprobe"), dict) else {}
    found_kind = str(own.get("kind", "jacobian"))
    if found_kind not in FITTED:
        raise ModelError(f"{path} holds a lens of the unknown kind {found_kind!r}")
    if found_kind != kind:
        raise ModelError(f"{path} holds a {found_kind} lens, not a {kind} lens: name it {found_kind}:{path}")
    maps, count = held.get("J"), held.get("n_prompts")
    if maps is None and "jacobian_sum" in held:
        count = held.get("n_done")
        if not isinstance(count, int) or count < 1:
            raise ModelError(f"{path} is a checkpoint without a count of prompts (n_done)")
        maps = {block: total / count for block, total in _tensors(path, held["jacobian_sum"]).items()}
    if maps is None:
        raise ModelError(f"{path} has no entry 'J': it is no Jacobian lens (it holds {', '.join(map(str, held))[:80]})")
    by_layer = {block + 1: tensor for block, tensor in _tensors(path, maps).items()}
    width = next(iter(by_layer.values())).shape[0]
    if held.get("d_model", width) != width:
        raise ModelError(f"{path} says d_model {held['d_model']}, and its maps have width {width}")
    shifts = _biases(path, own.get("biases"), set(by_layer), width)
    if own.get("n_blocks") is not None and not isinstance(own["n_blocks"], int):
        raise ModelError(f"{path} says n_blocks {own['n_blocks']!r}, which is no whole number")
    about = {"n_prompts": count, **{k: v for k, v in own.items() if k != "biases"}}
    return from_maps(kind, by_layer, shifts, sha256=_sha256(path), about=about)


def _biases(path: Path, biases: Any, layers: set[int], width: int) -> dict[int, Tensor] | None:
    """Biases by layer, for every layer that has a map; None if the file has none."""
    if biases is None:
        return None
    if not isinstance(biases, dict) or {block + 1 for block in biases if isinstance(block, int)} != layers:
        raise ModelError(f"{path}: the biases must be a dictionary with the blocks of the maps")
    for block, bias in biases.items():
        if not isinstance(bias, Tensor) or tuple(bias.shape) != (width,) or not bool(torch.isfinite(bias).all()):
            raise ModelError(f"{path}: the bias of block {block} must be {width} finite numbers")
    return {block + 1: bias for block, bias in biases.items()}


def _tensors(path: Path, maps: Any) -> dict[int, Tensor]:
    """Square matrices of one width by block number."""
    if not isinstance(maps, dict) or not maps:
        raise ModelError(f"{path}: the maps must be a dictionary by block, and hold at least one")
    shapes = {tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in maps.values()}
    if len(shapes) != 1 or any(len(shape) != 2 or shape[0] != shape[1] for shape in shapes):
        raise ModelError(
            f"{path}: every map must be a square matrix of one width, found {sorted(map(str, shapes))[:3]}"
        )
    by_block = {}
    for block, tensor in maps.items():
        if isinstance(block, bool) or not isinstance(block, int) or block < 0:
            raise ModelError(f"{path}: maps are named by block numbers, found {block!r}")
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{path}: the map of block {block} holds NaN or infinity")
        by_block[block] = tensor
    return by_block


def _read_tuned(path: Path) -> Transport:
    """A folder of tuned-lens: config.json and params.pt."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        width, count = int(config["d_model"]), int(config["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no tuned lens: its config.json cannot be used ({error!r})") from error
    state = _load(path / "params.pt")
    if not isinstance(state, dict) or count < 1 or width < 1:
        raise ModelError(f"{path} is no tuned lens: params.pt must hold named maps, and config.json their number")
    maps: dict[int, Tensor] = {}
    biases: dict[int, Tensor] = {}
    for layer in range(count):
        weight, bias = state.get(f"{layer}.weight"), state.get(f"{layer}.bias")
        if not isinstance(weight, Tensor) or tuple(weight.shape) != (width, width):
            raise ModelError(f"{path / 'params.pt'} has no map {layer}.weight of [{width}, {width}]")
        if bias is None:
            bias = torch.zeros(width)
        if not isinstance(bias, Tensor) or tuple(bias.shape) != (width,):
            raise ModelError(f"{path / 'params.pt'} has no bias {layer}.bias of [{width}]")
        if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise ModelError(f"{path / 'params.pt'}: the map of layer {layer} holds NaN or infinity")
        maps[layer], biases[layer] = weight, bias
    about = {"model": config.get("base_model_name_or_path"), "n_blocks": count}
    return from_maps("tuned", maps, biases, residual=True, sha256=_sha256(path / "params.pt"), about=about)


def check_writable(path: Path) -> None:
    """Refuses a file that could not be written, before anything is computed.

    Raises
    ------
    UsageError
        Its folder cannot be made, or not be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(path.name + ".part")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def save_lens(path: Path, maps: dict[int, Tensor], biases: dict[int, Tensor] | None, about: dict[str, Any]) -> None:
    """Writes a fitted lens in the published format, in fp16; ``maps`` and ``biases`` by *layer*.

    Raises
    ------
    UsageError
        The file cannot be written.
    """
    own = {"format": FORMAT, **about}
    if biases is not None:
        own["biases"] = {layer - 1: bias.float() for layer, bias in biases.items()}
    held = {
        "J": {layer - 1: one.to(torch.float16) for layer, one in maps.items()},
        "n_prompts": about["n_prompts"],
        "source_layers": sorted(layer - 1 for layer in maps),
        "d_model": next(iter(maps.values())).shape[0],
        "xprobe": own,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        torch.save(held, temporary)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
