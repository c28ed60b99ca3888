"""Write the recorded tables into README.md, between its markers: `make readme`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mcobjectives_examples import blocks, render
from mcobjectives_examples.findings import findings
from mcobjectives_examples.paper import table
from mcobjectives_examples.records import read, table_runs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def table_1() -> str:
    """The 1L rows of table 1 at preset `short`, with the seeds that benchmarks/results/short has."""
    [run] = [run for run in table_runs(read(RESULTS / "short")) if run.number == "1"]
    done = [row for row in run.rows if row.layers == 1]
    return render.markdown(f"Table 1: {table(1)['title']}", done, findings(done))


def speed() -> str:
    """Step times of 1L, k = 50, from benchmarks/results/speed.json; says so where it is not recorded."""
    path = RESULTS / "speed.json"
    if not path.exists():
        return "Not recorded yet.\n"
    recorded = json.loads(path.read_text())
    chosen = [row for row in recorded["rows"] if row["layers"] == 1 and row["k"] == 50]
    peers = [row["median_ms"] for row in chosen if row["kind"] == "peer"]
    lines = [
        (f"{row['name']} ({row['kind']})", f"{row['median_ms']:.1f}", f"{min(peers) / row['median_ms']:.2f}")
        for row in sorted(chosen, key=lambda row: row["median_ms"])
    ]
    header = ("step, 1L, k = 50, batch 100", "ms", "fastest peer / this")
    return blocks.markdown_table(header, lines, right=(1, 2)) + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, content in (("table-1", table_1()), ("speed", speed())):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no markers <!-- {name} --> ... <!-- /{name} -->")
        text = pattern.sub(lambda match, content=content: match[1] + content + match[2], text)
    readme.write_text(text)


if __name__ == "__main__":
    main()
