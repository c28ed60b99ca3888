"""What each benchmark's record says, in Markdown: a function of the record for each, named in `MEASUREMENTS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mcobjectives_examples import blocks
from mcobjectives_examples.provenance import provenances
from mcobjectives_examples.render import sources

DOCS = Path(__file__).resolve().parents[1]


def provenance(results: Iterable[dict[str, Any] | None]) -> str:
    """Versions, machines, commits and dates of results, in a line."""
    found = (source for result in results if result is not None for source in provenances(result))
    return f"{sources(found)}\n{{ .generated }}"


def recorded(
    record: dict[str, Any], header: Sequence[str], lines: Sequence[Sequence[str]], right: Iterable[int], said: str = ""
) -> str:
    """A table, what is said of it, and where its record comes from."""
    table = blocks.markdown_table(header, lines, right=right)
    return "\n\n".join(filter(None, (table, said, provenance([record]))))


def speed(record: dict[str, Any]) -> str:
    """Step time and memory of this library, its peers and the bare matrix products."""
    parts = []
    for layers, k in dict.fromkeys((row["layers"], row["k"]) for row in record["rows"]):
        rows = sorted((r for r in record["rows"] if (r["layers"], r["k"]) == (layers, k)), key=lambda r: r["median_ms"])
        peers = [r for r in rows if r["kind"] == "peer"]
        best = peers[0] if peers else None
        lines = []
        for row in rows:
            ratio = "" if best is None else f"{best['median_ms'] / row['median_ms']:.2f}×"
            name = f"**{row['name']}**" if row["kind"] == "ours" else row["name"]
            quartiles = f"{row['q25_ms']:.1f} to {row['q75_ms']:.1f}"
            lines.append((name, f"{row['median_ms']:.1f}", quartiles, f"{row['peak_mb']:.0f}", ratio))
        against = f"times as fast as {best['name']}" if best else "ratio"
        parts.append(f"## {layers} stochastic layer{'s' if layers > 1 else ''}, k = {k}")
        parts.append(
            blocks.markdown_table(("", "ms a step", "quartiles", "peak MB", against), lines, right=range(1, 5))
        )
    versions = {f"{name} {v}" for row in record["rows"] for name, v in row["versions"].items()}
    parts.append(f"Versions: {', '.join(sorted(versions))}.")
    parts.append(provenance([record]))
    return "\n\n".join(parts)


def overhead(record: dict[str, Any]) -> str:
    """What the objective's call costs over the same arithmetic by hand."""
    lines = [
        (
            str(row["k"]),
            f"{row['by_hand_ms']:.2f}",
            f"{row['objective_ms']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_of_first_deciles']:.3f}",
        )
        for row in record["rows"]
    ]
    header = ("k", "by hand, ms", "objective, ms", "ratio", "of first deciles")
    return recorded(record, header, lines, right=range(5))


def stacking(record: dict[str, Any]) -> str:
    """What training several seeds as one saves."""
    lines = [
        (
            str(row["k"]),
            f"`{row['precision']}`",
            f"{row['one_by_one_ms']:.2f}",
            f"{row['together_ms']:.2f}",
            f"{row['speedup']:.2f}",
        )
        for row in record["rows"]
    ]
    members = record["rows"][0]["members"]
    header = ("k", "precision", f"{members} seeds one by one, ms", "together, ms", "speed-up")
    return recorded(record, header, lines, right=(0, 2, 3, 4))


def side_by_side(record: dict[str, Any]) -> str:
    """What cells beside each other save."""
    lines = [
        (str(row["k"]), f"{row['in_turn_seconds']:.1f}", f"{row['beside_seconds']:.1f}", f"{row['speedup']:.2f}")
        for row in record["rows"]
    ]
    jobs = record["rows"][0]["jobs"]
    header = ("k", f"{jobs} cells in turn, s", "side by side, s", "speed-up")
    return recorded(record, header, lines, right=range(4))


def evaluation(record: dict[str, Any]) -> str:
    """What large-k evaluation costs over its bare matrix products."""
    lines = [(row["name"], f"{row['seconds']:.2f}", f"{row['over_products']:.2f}") for row in record["rows"]]
    header = ("", "seconds", "over the products")
    said = f"IWAE-{record['k']} of {record['images']} images, float32."
    return recorded(record, header, lines, right=range(1, 3), said=said)


def precision(record: dict[str, Any]) -> str:
    """What bfloat16 products do to log-weights, normalised weights and the bound."""
    found = record["errors"]
    lines = [
        (f"{found['log_weight_std_within_x']:.3f}", f"{100 * found['total_variation']:.1f} %", f"{found['bound']:+.3f}")
    ]
    header = ("log-weights within an image, std in nats", "normalised weights, total variation", "bound, nats")
    about = f"k = {found['k']}, effective sample size {found['ess']:.1f}, {found['images']} test images"
    said = f"IWAE-5 trained for {record['passes']} passes on {record['dataset']}; {about}."
    return recorded(record, header, lines, right=range(3), said=said)


def time_to_nll(record: dict[str, Any]) -> str:
    """Seconds of training to a test NLL, beside peers."""
    rows = record["contestants"]
    reached = {n: r["seconds_to_target"] for n, r in rows.items()}
    peers = [t for n, t in reached.items() if t and rows[n]["kind"] == "peer"]
    lines = []
    for name, seconds in reached.items():
        last = rows[name]["curve"][-1]
        shown = "not reached" if seconds is None else f"{seconds:.0f}"
        ratio = f"{min(peers) / seconds:.2f}×" if peers and seconds else ""
        lines.append((name, shown, ratio, f"{last['nll']:.2f}", f"{last['seconds']:.0f}"))
    header = (
        "",
        f"seconds to {record['target']:g} nats",
        "times as fast as the fastest peer",
        f"NLL after {record['passes']} passes",
        "seconds",
    )
    figure = Path("assets/time_to_nll.png")
    plot = f"![Test NLL against seconds of training]({figure})" if (DOCS / figure).exists() else ""
    how = f"IWAE-{record['nll_k']} on {record['images']} random test images; one cycle of {record['passes']} passes."
    said = "\n\n".join(filter(None, (plot, how)))
    return recorded(record, header, lines, right=range(1, 5), said=said)


def final_nll(record: dict[str, Any]) -> str:
    """What cheaper steps cost in the NLL after training."""
    lines = []
    for row in record["rows"]:
        mean, stderr = row.get("difference"), row.get("stderr")
        shown = "" if mean is None else f"{mean:+.3f} ± {stderr:.3f}"
        lines.append((row["name"], f"{sum(row['nll']) / len(row['nll']):.2f}", shown))
    seeds = len(record["rows"][0]["nll"])
    header = ("", f"NLL, mean of {seeds} seeds", "difference, nats")
    said = (
        f"IWAE-{record['k']}, {record['passes']} passes of {record['dataset']}; ± is the standard error over the seeds."
    )
    return recorded(record, header, lines, right=(1, 2), said=said)


def resampling(record: dict[str, Any]) -> str:
    """What the choice of samples to back-propagate adds in variance."""
    ways = ("threshold", "systematic", "multinomial")
    lines = [(str(row["m"]), *(f"{row[way]:.2g}" for way in ways)) for row in record["rows"]]
    size = record["rows"][0]["effective_sample_size"]
    said = f"Of k = {record['k']} samples, effective sample size {size:.1f}."
    header = ("m", "threshold rule", "systematic", "multinomial")
    return recorded(record, header, lines, right=range(4), said=said)


def rates(record: dict[str, Any]) -> str:
    """A two-layer VAE after the same passes at other peak rates."""
    lines = [
        (f"{row['rate']:g}", f"{row['nll']:.2f}", f"{row['kl_posterior']:.2f}", "+".join(map(str, row["active_units"])))
        for row in sorted(record["rows"], key=lambda row: -row["rate"])
    ]
    header = ("peak learning rate", "NLL", "KL", "active units, lower + upper")
    said = (
        f"Two-layer VAE of {record['k']} sample{'s' if record['k'] > 1 else ''}, {record['passes']} passes of "
        f"{record['dataset']}, one seed; NLL on {record['test_images']} random test images, the same for all."
    )
    return recorded(record, header, lines, right=range(4), said=said)


def snr(record: dict[str, Any]) -> str:
    """Slopes of log SNR in log k on Rainforth's toy."""
    lines = [
        (
            f"`{estimator}`",
            {"theta": "θ (generative)", "phi": "φ (inference)"}[group],
            f"{fit['slope']:+.2f} ± {fit['stderr']:.2f}".replace("-", "−"),
        )
        for estimator, groups in record["slopes"].items()
        for group, fit in groups.items()
    ]
    figure = Path("assets/snr.png")
    shown = f"![SNR of the gradient against k]({figure})" if (DOCS / figure).exists() else ""
    header = ("estimator", "parameters", "slope")
    return recorded(record, header, lines, right=[2], said=shown)


def memory(record: dict[str, Any]) -> str:
    """Peak memory of a step at large k in chunks, over one at k = 50."""
    on_gpu = any("peak_cuda_mb" in row for row in record["rows"])
    lines = []
    for row in record["rows"]:
        cells = [f"`{row['gradient']}`", str(row["k"]), str(row["chunk_size"] or "all")]
        cells += [f"{row['peak_rss_mb']:.0f}", f"{row['over_k50']:.2f}"]
        cells += [f"{row['of_steps_mb']:.0f}", f"{row['steps_over_k50']:.2f}"]
        lines.append((*cells, f"{row['peak_cuda_mb']:.0f}") if on_gpu else cells)
    header = [
        "estimator",
        "k",
        "samples at a time",
        "peak MB",
        "over k = 50",
        "MB of the steps",
        "over k = 50",
        *(["peak CUDA MB"] if on_gpu else []),
    ]
    return recorded(record, header, lines, right=range(1, len(header)))


def pyro_step(record: dict[str, Any]) -> str:
    """A step of SVI with ObjectiveELBO beside Pyro's own losses."""
    lines = []
    for k, rows in record["k"].items():
        for name, row in rows.items():
            quartiles = " to ".join(f"{q:.2f}" for q in row["quartiles_ms"])
            lines.append((k, name, f"{row['median_ms']:.2f}", quartiles, f"{row['ratio_to_renyi']:.2f}"))
    header = ("k", "loss", "ms a step", "quartiles", "of RenyiELBO's time")
    pyro = record["provenance"]["versions"].get("pyro-ppl", "")
    said = f"Pyro {pyro}." if pyro else ""
    return recorded(record, header, lines, right=range(2, 5), said=said)


def parts(record: dict[str, Any]) -> str:
    """Where the time of a step goes, and how much faster than the peers its products alone would be."""
    rows = record["rows"]
    names = dict.fromkeys(name for row in rows for name in row["parts_ms"])
    lines = [("whole step", *(f"{row['step_ms']:.2f}" for row in rows))]
    for name in names:
        cells = (row["parts_ms"].get(name) for row in rows)
        lines.append((name, *("" if ms is None else f"{ms:.2f}" for ms in cells)))
    for name in dict.fromkeys(name for row in rows for name in row["peers_ms"]):
        lines.append((f"`{name}`", *(f"{row['peers_ms'][name]:.2f}" for row in rows)))
    for title, key in (("times as fast as the fastest peer", "faster"), ("the products alone would be", "limit")):
        lines.append((title, *(f"{row[key]:.2f}×" if row[key] else "" for row in rows)))
    header = ["milliseconds"]
    for row in rows:
        kept = row["backward_samples"]
        header.append(
            f"k = {row['k']}, " + ("float32" if kept is None else f"{kept} back-propagated, {row['precision']}")
        )
    return recorded(record, header, lines, right=range(1, len(header)))


def goals(read: Callable[[str], dict[str, Any] | None]) -> str:
    """Each goal that the project has set itself, beside what is recorded; from a function that reads a record."""
    lines = []

    def add(goal: str, bar: str, found: float | None, met: bool) -> None:
        shown = "not run" if found is None else f"{found:.2f}"
        lines.append((goal, bar, shown, "" if found is None else "met" if met else "missed"))

    def at_least(goal: str, bar: float, found: float | None) -> None:
        add(goal, f"≥ {bar}×", found, found is not None and found >= bar)

    def at_most(goal: str, bar: float, found: float | None) -> None:
        add(goal, f"≤ {bar}×", found, found is not None and found <= bar)

    steps = (read("speed") or {"rows": []})["rows"]

    def faster(k: int, names: Iterable[str] = (), against: str = "") -> float | None:
        """Of the fastest of our unbiased ways, or of some of them, over a peer or the fastest."""
        rows = [r for r in steps if (r["layers"], r["k"]) == (1, k)]
        ours = [
            r["median_ms"] for r in rows if r["kind"] == "ours" and r["unbiased"] and (not names or r["name"] in names)
        ]
        peers = [r["median_ms"] for r in rows if r["kind"] == "peer" and against in ("", r["name"])]
        return min(peers) / min(ours) if ours and peers else None

    at_least("a step, k = 50, over the fastest peer", 4, faster(50))
    for peer in ("pyro", "pythae"):
        at_least(f"the same over {peer}", 6, faster(50, against=peer))
    at_least("the same with all samples back-propagated, over the fastest peer", 1.3, faster(50, ("compiled", "exact")))
    for k in (1, 5):
        at_least(f"a step, k = {k}, over the fastest peer", 1.2, faster(k))
    race = read("time_to_nll") or {"contestants": {}, "target": 90}
    reached = [
        (row["kind"], row["seconds_to_target"]) for row in race["contestants"].values() if row["seconds_to_target"]
    ]
    peers = [seconds for kind, seconds in reached if kind == "peer"]
    ours = [seconds for kind, seconds in reached if kind == "ours"]
    at_least(
        "seconds to a test NLL of 90, over the fastest peer",
        3,
        min(peers) / min(ours) if peers and ours and race["target"] == 90 else None,
    )
    chunked = (read("memory") or {"rows": []})["rows"]
    at_most(
        "peak memory of a process, k = 5000 over k = 50",
        1.3,
        max((r["over_k50"] for r in chunked if r["k"] == 5000), default=None),
    )
    evaluated = (read("evaluation") or {"rows": []})["rows"]
    at_most(
        "NLL of 5000 samples an image over its products",
        1.5,
        min((r["over_products"] for r in evaluated if r["name"] != "products"), default=None),
    )
    called = (read("overhead") or {"rows": []})["rows"]
    for k, bar in ((1, 1.1), (50, 1.03)):
        at_most(
            f"an objective's call over the same by hand, k = {k}",
            bar,
            next((r["ratio"] for r in called if r["k"] == k), None),
        )
    for k, bar in ((1, 8), (50, 3)):
        at_least(f"steps a second on a GPU over eager PyTorch, k = {k}", bar, None)
    return blocks.markdown_table(("goal", "bar", "recorded", ""), lines, right=(1, 2))


MEASUREMENTS: dict[str, Callable[[dict[str, Any]], str]] = {
    show.__name__: show
    for show in (
        speed,
        parts,
        overhead,
        stacking,
        side_by_side,
        evaluation,
        precision,
        time_to_nll,
        final_nll,
        resampling,
        rates,
        snr,
        memory,
        pyro_step,
    )
}
"""The benchmark's name, which is its record's and its marker's -> what the record says."""
