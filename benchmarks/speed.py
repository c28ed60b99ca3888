"""Step time and peak memory of training: this library, its peers and the bare matrix products, in one interleaved run.

    python benchmarks/speed.py --layers 1 2 --k 1 5 50 500
    python benchmarks/speed.py --layers 1 --k 50 --peers idiomatic,pyro --json

Every contestant is a process of its own (`peers/`); they take turns, a few steps each per round, while the others wait.
"""

import argparse
import contextlib
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mcobjectives_examples.files import write_json
from mcobjectives_examples.provenance import provenance

HERE = Path(__file__).resolve().parent
PEERS_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
INSTALL = "python -m venv .venv-peers && .venv-peers/bin/pip install -r benchmarks/requirements-peers.txt"
WARM_UP = 3  # steps after the first, which compiles
ANSWER_WITHIN = 600  # seconds for one turn of one worker

messages = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Contestant:
    name: str
    kind: str  # "ours", "peer" or "floor"
    file: str
    module: str  # must be importable in the worker's interpreter
    mode: str = ""
    unbiased: bool = True  # its gradient estimates the k-sample bound's without bias, and is computed in float32
    layers: tuple[int, ...] = (1, 2)
    default: bool = True  # runs without being named


CONTESTANTS = [
    Contestant("eager", "ours", "ours.py", "mcobjectives", "eager"),
    Contestant("compiled", "ours", "ours.py", "mcobjectives", "compiled"),
    Contestant("exact", "ours", "ours.py", "mcobjectives", "exact"),
    Contestant("resampled", "ours", "ours.py", "mcobjectives", "resampled"),
    Contestant("resampled-mixed", "ours", "ours.py", "mcobjectives", "resampled-mixed"),
    Contestant("resampled-bf16", "ours", "ours.py", "mcobjectives", "resampled-bf16", unbiased=False),
    Contestant("idiomatic", "peer", "idiomatic.py", "torch"),
    Contestant("idiomatic-compiled", "peer", "idiomatic.py", "torch", "compiled", default=False),
    Contestant("pyro", "peer", "pyro_renyi.py", "pyro"),
    Contestant("pythae", "peer", "pythae_iwae.py", "pythae", layers=(1,)),
    Contestant("numpyro", "peer", "numpyro_renyi.py", "numpyro"),
    Contestant("tensorflow", "peer", "tensorflow_graph.py", "tensorflow"),
    Contestant("tensorflow-xla", "peer", "tensorflow_graph.py", "tensorflow", "xla", default=False),
    Contestant("floor", "floor", "floor.py", "torch", unbiased=False),
]


class Worker:
    """One contestant's process at one (layers, k)."""

    def __init__(
        self,
        contestant: Contestant,
        python: str,
        layers: int,
        k: int,
        batch: int,
        threads: int,
        data: Path | None = None,
    ):
        self.contestant = contestant
        command = [python, str(HERE / "peers" / contestant.file), f"--layers={layers}", f"--k={k}"]
        command += [f"--batch={batch}", f"--threads={threads}"]
        if contestant.mode:
            command.append(f"--mode={contestant.mode}")
        if data:
            command.append(f"--data={data}")
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the worker
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, bufsize=1
        )
        self.rounds: list[list[float]] = []
        self.peak_mb = 0.0

    def start(self) -> None:
        self.ready = self.answer()
        self.first_loss = self.steps(1)["loss"]
        self.steps(WARM_UP)

    def ask(self, command: object) -> dict:
        assert self.process.stdin is not None
        try:
            print(command, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise RuntimeError(self._last_words()) from None
        return self.answer()

    def steps(self, n: int) -> dict:
        answer = self.ask(n)
        self.peak_mb = answer["peak_mb"]
        return answer

    def turn(self, n: int) -> None:
        """n timed steps after one that only warms the caches the others have taken."""
        self.rounds.append(self.steps(n + 1)["ms"][1:])

    def answer(self) -> dict:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], ANSWER_WITHIN)[0]:
            raise RuntimeError(f"no answer within {ANSWER_WITHIN} s")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        code = self.process.wait(10)
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return lines[-1] if lines else f"ended with exit code {code}"

    def close(self) -> None:
        """No more input ends a sound worker; the signal is for one that hangs."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.communicate(timeout=5)
        self.process.kill()
        self.process.wait()
        self.errors.close()


def interpreters(peers_python: str, wanted: list[Contestant]) -> dict[str, str]:
    """Module -> an interpreter that has it. A library's own release is what its peers' environment pins, so that
    environment comes first for peers; whatever needs only this project's dependencies runs where this runs."""
    here = {"mcobjectives", "torch"}
    found: dict[str, str] = {}
    for python, modules in ((peers_python, {c.module for c in wanted} - here), (sys.executable, None)):
        missing = {c.module for c in wanted} - set(found)
        modules = missing if modules is None else modules
        if modules and Path(python).exists():
            probe = f"import importlib.util as u; print(*(m for m in {sorted(modules)} if u.find_spec(m)))"
            out = subprocess.run([python, "-c", probe], capture_output=True, text=True, cwd=HERE).stdout
            found |= {module: python for module in out.split()}
    return found


def installed(wanted: list[Contestant], pythons: dict[str, str]) -> list[Contestant]:
    """Those that can run; the others are named, and what would install them."""
    for c in wanted:
        if c.module not in pythons:
            messages.print(f"left out: {c.name} {_not_installed(c)}", markup=False, soft_wrap=True)
    return [c for c in wanted if c.module in pythons]


def _not_installed(c: Contestant) -> str:
    return f"not installed: {INSTALL if c.kind == 'peer' else 'pip install -e .'}"


def measure(layers: int, k: int, wanted: list[Contestant], pythons: dict[str, str], args) -> tuple[list[dict], dict]:
    """Rows of one (layers, k), and why each contestant that gave none did not."""
    steps = args.steps or max(3, min(30, 1000 // k))
    alive: list[Worker] = []
    failed: dict[str, str] = {}

    def started(c: Contestant) -> Worker:
        progress(f"{layers}L k={k}: starting {c.name}")
        worker = Worker(c, pythons[c.module], layers, k, args.batch, args.threads)
        try:
            worker.start()
        except RuntimeError:
            worker.close()
            raise
        return worker

    def attempt(worker: Worker, what: Callable[[], None]) -> None:
        try:
            what()
        except RuntimeError as error:
            failed[worker.contestant.name] = f"failed: {error}"
            alive.remove(worker)
            worker.close()

    try:
        able = []
        for c in wanted:
            if layers not in c.layers:
                failed[c.name] = f"has no {layers}L model"
            elif c.module not in pythons:
                failed[c.name] = _not_installed(c)
            else:
                able.append(c)
        with ThreadPoolExecutor(args.threads) as pool:  # imports and compilation are not timed
            for c, start in [(c, pool.submit(started, c)) for c in able]:
                try:
                    alive.append(start.result())
                except RuntimeError as error:
                    failed[c.name] = f"failed: {error}"
        for r in range(args.rounds):
            progress(f"{layers}L k={k}: round {r + 1} of {args.rounds}")
            first = r % max(1, len(alive))
            for worker in alive[first:] + alive[:first]:
                time.sleep(0.05)  # the last one's threads may still spin
                attempt(worker, partial(worker.turn, steps))
        rows = [row(worker, layers, k) for worker in alive]
    finally:
        for worker in alive:
            worker.close()
    for name, why in failed.items():
        messages.print(f"{layers}L k={k}: {name} {why}", markup=False, soft_wrap=True)
    return rows, failed


def progress(text: str) -> None:
    messages.print(f"[dim]{text}")


def row(worker: Worker, layers: int, k: int) -> dict:
    c = worker.contestant
    ms = sorted(t for turn in worker.rounds for t in turn)
    q25, median, q75 = statistics.quantiles(ms, n=4) if len(ms) > 1 else ms * 3
    return {
        "name": c.name,
        "kind": c.kind,
        "unbiased": c.unbiased,
        "layers": layers,
        "k": k,
        "median_ms": round(median, 3),
        "min_ms": round(ms[0], 3),
        "q25_ms": round(q25, 3),
        "q75_ms": round(q75, 3),
        "round_medians_ms": [round(statistics.median(turn), 3) for turn in worker.rounds],
        "steps": len(ms),
        "peak_mb": worker.peak_mb,
        "import_mb": worker.ready["import_mb"],
        "first_loss": round(worker.first_loss, 3),
        "versions": worker.ready["versions"],
    }


def fastest_peer(rows: list[dict]) -> dict | None:
    return min((r for r in rows if r["kind"] == "peer"), key=lambda r: r["median_ms"], default=None)


def table(rows: list[dict], failed: dict[str, str], layers: int, k: int) -> Table:
    best = fastest_peer(rows)
    out = Table(title=f"{layers}L, k = {k}: one training step", title_justify="left")
    out.add_column("")
    out.add_column("kind")
    for heading in ("median ms", "quartiles", "min", "peak MB", "over " + (best["name"] if best else "fastest peer")):
        out.add_column(heading, justify="right", no_wrap=True)
    for r in sorted(rows, key=lambda r: r["median_ms"]):
        ratio = ""
        if best:
            pairs = zip(best["round_medians_ms"], r["round_medians_ms"], strict=True)
            by_round = sorted(theirs / own for theirs, own in pairs)
            ratio = f"{best['median_ms'] / r['median_ms']:.2f}x ({by_round[0]:.2f}-{by_round[-1]:.2f})"
        cells = [f"{r['median_ms']:.2f}", f"{r['q25_ms']:.2f}-{r['q75_ms']:.2f}", f"{r['min_ms']:.2f}"]
        cells += [f"{r['peak_mb']:.0f}", ratio]
        out.add_row(r["name"], r["kind"], *cells, style="bold" if r["kind"] == "ours" else None)
    if failed:
        out.caption = "\n".join(f"{name}: {why}" for name, why in failed.items())
        out.caption_justify = "left"
    return out


def surroundings(threads: int) -> dict:
    """Where the workers' numbers come from, with how busy the machine was before."""
    system = f"{platform.system()} {platform.machine()}"
    return provenance(threads=threads, load_before=round(os.getloadavg()[0], 2), system=system)


def kept(path: Path | None, source: dict, asked: set[tuple[int, int]]) -> list[dict]:
    """What the file holds of other layers and k, if it is of this code and machine: a record may be made in parts."""
    if path is None or not path.exists():
        return []
    record = json.loads(path.read_text())
    if "+" in (source["commit"] or "+") or _setting(record["provenance"]) != _setting(source):
        return []
    return [row for row in record["rows"] if (row["layers"], row["k"]) not in asked]


def _setting(source: dict) -> dict:
    machine = {name: value for name, value in source["machine"].items() if name != "load_before"}
    return {"commit": source["commit"], "python": source["versions"]["python"], **machine}


def choose(kind: str, names: str | None) -> list[Contestant]:
    """None: the usual ones; "all"; "none"; or names with commas between."""
    known = [c for c in CONTESTANTS if c.kind == kind]
    if names is None:
        return [c for c in known if c.default]
    if names in ("all", "none"):
        return known if names == "all" else []
    asked = {n.strip() for n in names.split(",")}
    if unknown := asked - {c.name for c in known}:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(c.name for c in known)}, all, none")
    return [c for c in known if c.name in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--layers", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 50, 500])
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="per round and contestant (default: 30, fewer above k = 33)")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--ours", help="names with commas between, or none (default: all)")
    parser.add_argument("--peers", help="names with commas between, all or none (default: all but compiled variants)")
    parser.add_argument("--peers-python", default=str(PEERS_PYTHON), help="interpreter that has the peers")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON and nothing else")
    parser.add_argument(
        "--out", type=Path, help="write rows and provenance here, beside what this commit has of other layers and k"
    )
    args = parser.parse_args()

    wanted = choose("ours", args.ours) + choose("peer", args.peers) + choose("floor", "all")
    pythons = interpreters(args.peers_python, wanted)
    out = Console() if sys.stdout.isatty() else Console(width=110)
    source = surroundings(args.threads)
    load = source["machine"]["load_before"]
    if load > 0.5:
        messages.print(f"the machine is busy (load {load:.1f}): expect noise, more rounds help")
    rows = kept(args.out, source, {(layers, k) for layers in args.layers for k in args.k})
    for layers in args.layers:
        for k in args.k:
            measured, failed = measure(layers, k, wanted, pythons, args)
            rows += measured
            if not args.json:
                out.print(table(measured, failed, layers, k))
            if args.out:  # after each, so that a run that is stopped keeps what it has
                rows.sort(key=lambda row: (row["layers"], row["k"]))
                write_json(args.out, {"provenance": source, "rows": rows})
    if args.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
