"""What recorded cells have in common: data set, binarisation and preset, in words that tell them apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from mcobjectives_examples.presets import Preset
from mcobjectives_examples.records import Records
from mcobjectives_examples.words import counted

SETTINGS = tuple(f.name for f in fields(Preset) if f.name not in ("name", "about"))


def by_protocol(records: Records) -> dict[str, Records]:
    """Records in groups of one data set, binarisation and whole preset, by a name of each."""
    names = preset_names(config.preset for config in records)
    groups: defaultdict[str, Records] = defaultdict(dict)
    for config, result in records.items():
        name = f"{config.dataset}, binarisation {config.binarisation}, preset {names[config.preset]}"
        groups[name][config] = result
    return dict(groups)


def preset_names(presets: Iterable[Preset]) -> dict[Preset, str]:
    """The name of each preset, with what differs where several have it: "smoke (1 pass, batch size 20)"."""
    distinct = list(dict.fromkeys(presets))
    return {preset: _name(preset, [p for p in distinct if p.name == preset.name]) for preset in distinct}


def _name(preset: Preset, namesakes: Sequence[Preset]) -> str:
    differ = [name for name in SETTINGS if len({getattr(p, name) for p in namesakes}) > 1]
    said = {name: f"{worded(name)} {plain(name, getattr(preset, name))}" for name in differ}
    if "stages" in said and len({p.stages for p in namesakes}) == len({p.passes for p in namesakes}):
        said["stages"] = counted(preset.passes, "pass")
    return preset.name + (f" ({', '.join(said.values())})" if said else "")


def worded(name: str) -> str:
    """A setting's name in words."""
    return name.replace("_", " ")


def plain(name: str, value: Any) -> str:
    """A setting's value in words."""
    if isinstance(value, tuple):
        return ", ".join(f"({', '.join(f'{x:g}' for x in v)})" if isinstance(v, tuple) else f"{v:g}" for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return {"binarisation": "the data set's"}.get(name, "all") if value is None else str(value)
