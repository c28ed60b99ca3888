"""How recorded results came to be: protocols, data, and where they were run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from mcobjectives_examples.blocks import Block, Table
from mcobjectives_examples.datasets import vouched
from mcobjectives_examples.presets import Preset
from mcobjectives_examples.protocols import SETTINGS, plain, preset_names, worded
from mcobjectives_examples.provenance import machine_name, provenances, short_commit
from mcobjectives_examples.records import Records


def origin_blocks(records: Records) -> list[Block]:
    """Presets, data sets with checksums, and versions, commits and machines of all results."""
    if not records:
        return []
    results = list(records.values())
    return [_presets({config.preset for config in records}), _data(results), _surroundings(results)]


def _presets(presets: Iterable[Preset]) -> Table:
    ordered = sorted(presets, key=lambda preset: (preset.name, -preset.passes))
    lines = [[worded(name), *(plain(name, getattr(preset, name)) for preset in ordered)] for name in SETTINGS]
    note = "Stages are (passes, learning rate). A second stage has a schedule of its own."
    return Table("Training and evaluation", ("", *preset_names(ordered).values()), lines, (), note)


def _data(results: Iterable[dict[str, Any]]) -> Table:
    distinct = {json.dumps(result["data"], sort_keys=True): result["data"] for result in results}
    lines = []
    for data in distinct.values():
        for file in data.get("files", []):
            verified = vouched(str(data.get("source", "")), [file.get("verified")])
            sizes = f"{data.get('train', '')} / {data.get('test', '')}"
            lines.append([str(data.get("name", "")), sizes, file.get("path", ""), file.get("sha256", ""), verified])
    note = "; ".join(dict.fromkeys(f"{d.get('name', '')}: {d.get('source', '')}" for d in distinct.values()))
    return Table("Data", ("data set", "train / test", "file", "sha256", "verified"), lines, (), f"{note}.")


def _surroundings(results: Iterable[dict[str, Any]]) -> Table:
    groups: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    parts = [provenances(result) for result in results]
    for source in (part or {} for of_one in parts for part in of_one):
        versions = source.get("versions", {})
        where = machine_name(source["machine"]) if "machine" in source else ""
        key = (short_commit(source.get("commit")), where, ", ".join(f"{n} {v}" for n, v in versions.items()))
        groups[key].append(source.get("date", "")[:10])
    lines = [
        [str(len(dates)), *key, min(dates) if min(dates) == max(dates) else f"{min(dates)} to {max(dates)}"]
        for key, dates in groups.items()
    ]
    note = "A cell of several parts counts for each." if any(len(of_one) > 1 for of_one in parts) else ""
    return Table("Where it was run", ("cells", "commit", "machine", "versions", "date"), lines, (0,), note)
