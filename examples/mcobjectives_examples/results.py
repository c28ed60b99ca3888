"""Recorded results: read with care, whatever a file of that name holds; and which files are figures."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mcobjectives_examples.checkpoints import CheckpointError

FORMATS = {".png": "image/png", ".svg": "image/svg+xml"}
"""The files that figures are drawn to, by their suffix, and what they are to a browser."""
_LARGEST = 1e100
"""Beyond all that float32 arithmetic gives, and well within what a chart can draw."""
_OF_LAYERS = ("active_units", "pca_active_units")
_NUMBERS = ("nll", "elbo", "kl_posterior", "ess_mean", "khat_mean", "khat_unreliable", "reconstruction_error")
_OF_PRUNING = {"nll_pruned", "nll_unpruned_same_images", "nll_pruned_stderr"}


def record_path(figure: Path) -> Path:
    """Where a figure's record is."""
    return figure.with_name(f"{figure.name}.json")


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises `CheckpointError` where it cannot be read, or says a thing twice."""
    try:
        return json.loads(path.read_text(), object_pairs_hook=_once_each)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}: move it away to run that cell again") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"it has {name!r} twice")
    return found


def read_result(path: Path) -> dict[str, Any]:
    """A recorded result; raises `CheckpointError`, saying which part of it is missing or of another kind."""
    result = read_json(path)
    fault = _fault(result)
    if fault:
        raise CheckpointError(f"{path} is not a recorded result ({fault}): move it away to run that cell again")
    return result


def _fault(result: Any) -> str:
    checks = {
        "config": _config,
        "metrics": _metrics,
        "data": _data,
        "provenance": _provenance,
        "earlier_parts": are_parts,
        "seconds": _seconds,
    }
    if not isinstance(result, dict):
        return "no object"
    needed = [name for name in ("config", "metrics", "data") if name not in result]
    if needed:
        return f"without {', '.join(needed)}"
    bad = [name for name, right in checks.items() if name in result and not right(result[name])]
    curve = result.get("learning_curve", [])
    if curve != [] and not _numbers(curve):
        bad.append("learning_curve")
    if not bad and not _of_its_layers(result):
        bad.append("metrics")
    return f"not what it should be: {', '.join(bad)}" if bad else ""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def _texts(value: Any, *names: str) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_number, value))


def _config(value: Any) -> bool:
    if not (_texts(value, "dataset", "binarisation", "objective", "data_sha256") and _preset(value.get("preset"))):
        return False
    after, latent = value.get("after"), value.get("latent")
    counts = [value.get("layers"), value.get("seed"), *([] if latent is None else [latent])]
    return isinstance(after, str | None) and "after" in value and all(isinstance(n, int) for n in counts)


def _preset(value: Any) -> bool:
    """What an older version did not record yet has a default."""
    if not (_texts(value, "name", "about") and isinstance(value.get("stages"), list)):
        return False
    texts = all(isinstance(value.get(name, ""), str | None) for name in ("binarisation", "precision"))
    counts = all(_number(value.get(name, 1)) for name in ("batch_size", "eps", "nll_k"))
    choices = all(value.get(name) is None or _number(value[name]) for name in ("backward_samples", "test_images"))
    pairs = all(_numbers(pair) and len(pair) == 2 for pair in (*value["stages"], value.get("betas", [0, 0])))
    return texts and counts and choices and pairs and bool(value["stages"]) and value.get("precision", "") is not None


def _metrics(value: Any) -> bool:
    """Numbers, a list of them for each layer, or None for what is not finite; the three of pruning together."""
    if not isinstance(value, dict) or "nll" not in value or 0 < len(_OF_PRUNING & value.keys()) < len(_OF_PRUNING):
        return False
    numbers = [value.get(name) for name in (*_NUMBERS, *_OF_PRUNING)]
    units = [value.get(name) for name in _OF_LAYERS]
    return (
        all(part is None or _number(part) for part in numbers)
        and all(part is None or _numbers(part) for part in units)
        and all(part is None or _number(part) or _numbers(part) for part in value.values())
    )


def _of_its_layers(result: dict[str, Any]) -> bool:
    units = [result["metrics"].get(name) for name in _OF_LAYERS]
    return all(part is None or len(part) == result["config"]["layers"] for part in units)


def _data(value: Any) -> bool:
    if not (_texts(value, "sha256") and _number(value.get("test")) and isinstance(value.get("source", ""), str)):
        return False
    files = value.get("files")
    return isinstance(files, list) and all(isinstance(file, dict) and _data_file(file) for file in files)


def _data_file(file: dict[str, Any]) -> bool:
    return "verified" in file and all(isinstance(file.get(name, ""), str) for name in ("path", "sha256"))


def _provenance(value: Any) -> bool:
    if value is None:
        return True
    if not (_texts(value, "date") and isinstance(value.get("commit"), str | None) and "commit" in value):
        return False
    machine = value.get("machine")
    told = _texts(machine, "gpu") or (_texts(machine, "cpu") and _number(machine.get("threads")))
    return told and _texts(value.get("versions"), "mcobjectives", "torch")


def are_parts(value: Any) -> bool:
    """Whether these are parts of a run, as `Trainer.parts` tells them."""
    return isinstance(value, list) and all(
        _texts(part, "engine")
        and _number(part.get("to_pass"))
        and "provenance" in part
        and _provenance(part["provenance"])
        for part in value
    )


def _seconds(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))
