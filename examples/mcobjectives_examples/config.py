"""What determines a trained model, and its name: `Config`, and the one way to write an objective."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mcobjectives import IWAE, MIWAE, VAE, Split
from mcobjectives.objective import Objective
from mcobjectives.specs import format_objective, parse_objective
from mcobjectives_examples.presets import Preset

LARGEST_SEED = 2**31


@dataclass(frozen=True)
class Config:
    """All that determines a trained model, but for the machine it runs on."""

    dataset: str
    binarisation: str
    layers: int
    objective: str
    preset: Preset
    seed: int = 0
    after: str | None = None
    latent: int | None = None
    """Units of the topmost stochastic layer, None for the paper's."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < LARGEST_SEED:
            raise ValueError(f"seed must be from 0 to {LARGEST_SEED - 1}, got {self.seed}")

    def to_dict(self, data_sha256: str) -> dict[str, Any]:
        """As plain JSON values, with the data's checksum; `latent` only where it is not the paper's."""
        record = json.loads(json.dumps(asdict(self) | {"data_sha256": data_sha256}))
        return record if self.latent is not None else {k: v for k, v in record.items() if k != "latent"}

    @classmethod
    def from_dict(cls, record: dict[str, Any], **changes: Any) -> Config:
        """The configuration of a record, with changes to its preset."""
        preset = dict(record["preset"]) | changes
        preset |= {"stages": tuple(map(tuple, preset["stages"])), "betas": tuple(preset["betas"])}
        kept = {f.name: record[f.name] for f in fields(cls) if f.name not in ("preset", "latent")}
        return cls(**kept, preset=Preset(**preset), latent=record.get("latent"))

    @property
    def unworded(self) -> Config:
        """The configuration without its preset's description, which may be reworded between two runs."""
        return replace(self, preset=replace(self.preset, about=""))

    @property
    def first_stage_name(self) -> str:
        """The name of the run whose parameters this one starts from."""
        assert self.after is not None
        return replace(self, objective=self.after, after=None).name

    @property
    def name(self) -> str:
        """A file name that says what was trained."""
        after = "" if self.after is None else f"-after-{_slug(self.after)}"
        model = f"{self.layers}L" if self.latent is None else f"{self.layers}L-latent{self.latent}"
        return f"{self.dataset}-{self.binarisation}-{model}-{_slug(self.objective)}{after}-seed{self.seed}"


def _slug(spec: str) -> str:
    return "-".join(filter(None, re.split(r"[^A-Za-z0-9._-]+", spec)))


def training_objective(spec: str, preset: Preset) -> Objective:
    """The objective of a spec as the preset trains it, with its `backward_samples` where there are more than those."""
    objective = parse_objective(spec)
    m = preset.backward_samples
    if m is None or objective.k <= m or objective.backward_samples is not None or objective.chunk_size is not None:
        return objective
    return replace(objective, backward_samples=m)


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration as it would be recorded now, for comparing two.

    What an older version left out has its default.
    """
    try:
        return Config.from_dict(record).unworded.to_dict(record["data_sha256"])
    except (KeyError, TypeError, ValueError):  # of something else: it is compared as it stands
        return record


def differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    """In what two recorded configurations differ, for people; empty where they are of one run."""
    one, other = _flat(comparable(one)), _flat(comparable(other))
    return ", ".join(sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)))


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    preset = record.get("preset")
    parts = {f"preset.{name}": value for name, value in preset.items()} if isinstance(preset, dict) else {}
    return {name: value for name, value in record.items() if not (parts and name == "preset")} | parts


def canonical(spec: str) -> str:
    """The one way to write an objective, with its options spelt out; equal objectives are trained once.

    IWAE of one sample is the VAE; MIWAE(1, k) is VAE and MIWAE(k, 1) IWAE; 2.0 is written as 2.
    """
    objective = parse_objective(spec)
    if isinstance(objective, Split):
        return format_objective(objective)
    for k1, k2 in ((1, objective.k), (objective.k, 1)):
        if objective == MIWAE(k1=k1, k2=k2):
            objective = VAE(k=objective.k) if k1 == 1 else IWAE(k=objective.k)
    if objective == IWAE(k=1):
        objective = VAE(k=1)
    spec = name_of(format_objective(objective)) + repr(objective).removeprefix(type(objective).__name__)
    return re.sub(r"(=-?\d+)\.0(?=[,)])", r"\1", spec)


def name_of(spec: str) -> str:
    """ "power" of "power(k=50, p=3)"."""
    return spec.partition("(")[0]


def without_k(spec: str) -> str:
    """ "power(p=3)" of "power(k=50, p=3)", and "vae" of "vae(k=1)"."""
    options = spec.removesuffix(")").partition("(")[2].split(", ")
    kept = ", ".join(option for option in options if not option.startswith("k="))
    return f"{name_of(spec)}({kept})" if kept else name_of(spec)


def capped(spec: str, cap: int | None) -> str:
    """The objective's spec with at most `cap` samples (MIWAE keeps k1, in fewer groups, where it can)."""
    objective = parse_objective(spec)
    if cap is None or objective.k <= cap:
        return spec
    if isinstance(objective, Split):
        raise ValueError(f"k={cap} cannot cap {spec!r}: give its parts fewer samples")
    if isinstance(objective, MIWAE):
        k1 = min(objective.k1, cap)
        return format_objective(replace(objective, k1=k1, k2=max(1, cap // k1)))
    if "k" not in {f.name for f in fields(objective)}:
        raise ValueError(f"k={cap} cannot cap {spec!r}, which has no option k: give it fewer samples")
    return format_objective(replace(objective, k=cap))  # type: ignore[call-arg]
