# SPDX-License-Identifier: BSD-3-Clause
"""Put results as tables into Markdown files, between ``<!-- blocks:begin -->`` and ``:end``.

python benchmarks/report.py README.md,benchmarks/README.md benchmarks/results/*.json
python benchmarks/report.py README.md,benchmarks/README.md benchmarks/results/*.json --check

Results are what compare.py writes, and as ``parts`` what ``fusedsep bench --json`` does. Each kind has its place in one
of the files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusedsep.cli._output import machine_line

FORMATS = ("NCHW", "channels_last")
LABELS = {"eager": "eager", "folded": "BN folded", "compiled": "compiled", "fused": "fused", "frozen": "frozen"}
OURS = ("fused", "frozen")
#: Columns of the comparison with other engines; frozen stands for ours there.
PEER_LABELS = {
    "eager": "eager",
    "compiled": "compiled",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "frozen": "frozen",
}

_ONE_FORMAT = ("compiled", "onnxruntime", "openvino")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("markdown", type=lambda text: [Path(name) for name in text.split(",")], metavar="FILE,...")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the tables are not up to date")
    arguments = parser.parse_args(argv)
    old = {path: path.read_text() for path in arguments.markdown}
    new = dict(old)
    documents = [json.loads(path.read_text()) for path in arguments.results]
    for subject in dict.fromkeys(document["subject"] for document in documents):
        own = [document for document in documents if document["subject"] == subject]
        tables = [render(document) for document in sorted(own, key=lambda document: document["machine"]["threads"])]
        # Where no file has the markers, the first one is named in the error.
        path = next((path for path in new if f"<!-- {subject}:begin -->" in new[path]), arguments.markdown[0])
        new[path] = replace_region(new[path], subject, "\n".join(tables))
    changed = [path for path in new if new[path] != old[path]]
    for path in changed:
        if arguments.check:
            print(f"{path} does not show these results: run benchmarks/report.py", file=sys.stderr)
        else:
            path.write_text(new[path])
    return 1 if arguments.check and changed else 0


def replace_region(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the markers of region ``name``.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, found, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found and found_end) or text.count(begin) + text.count(end) != 2:
        raise ValueError(f"the text must hold {begin} and behind it {end}, once each")
    return f"{head}{begin}\n\n{content}\n{end}{tail}"


#: Subjects whose table names the network in every row, and the title of the table.
_MIXED = {"training-networks": "Training steps", "other-networks": "Other networks"}


def render(document: dict[str, Any]) -> str:
    """The Markdown for one file of results: the first network's table, those of the others folded away, a legend."""
    if document["subject"] == "peers":
        return _render_peers(document)
    if document["subject"] == "parts":
        return _render_parts(document)
    results, machine = document["results"], document["machine"]
    if document["subject"] in _MIXED:
        lines = [
            f"**{_MIXED[document['subject']]}** on {machine_line(machine)}.",
            "",
            *_table(results, machine, with_network=True),
        ]
        return "\n".join([*lines, "", _legend(document), ""])
    first = [result for result in results if result["network"] == results[0]["network"]]
    others = [result for result in results if result not in first]
    lines = [f"**{first[0]['network']}** on {machine_line(machine)}.", "", *_table(first, machine), ""]
    if others:
        lines += ["<details><summary>Blocks of other networks</summary>", ""]
        lines += [*_table(others, machine, with_network=True), "", "</details>", ""]
    lines += [_legend(document), ""]
    return "\n".join(lines)


def _render_peers(document: dict[str, Any]) -> str:
    results, machine = document["results"], document["machine"]
    engines = _present(results, PEER_LABELS)
    versions = machine["peers"]
    header = ["", *(f"{PEER_LABELS[engine]} {versions.get(engine, '')}".strip() for engine in engines)]
    header += ["fastest other / frozen", "of peak"]
    lines = [f"**{results[0]['network']}** on {machine_line(machine)}.", ""]
    lines += [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for result in results:
        share = result["gflop"] / best_ms(result, "frozen") * 1e3 / machine["fma_gflops"]
        cells = [result["name"], *(_times(result, engine) for engine in engines)]
        lines.append(_row([*cells, f"{lead(result):.2f}x", f"{share:.0%}"]))
    leads = [lead(result) for result in results]
    spreads = [time["spread_ms"] / time["median_ms"] for result in results for time in result["times"].values()]
    legend = (
        f"Median milliseconds of {document['settings']['repeats']} calls in turns, each rehearsed for 2 ms; "
        f"half of the quartile range is mostly {statistics.median(spreads):.0%} of it and {max(spreads):.0%} at worst. "
        f"Where there are two, NCHW · channels_last. *fastest other / frozen*: geometric mean "
        f"{statistics.geometric_mean(leads):.2f}x, from {min(leads):.2f}x to {max(leads):.2f}x. *of peak*: operations "
        f"of frozen as a share of the {machine['fma_gflops']:.0f} GFLOP/s that multiply-adds in registers reached in "
        "the same process. Each engine was checked against float64 first."
    )
    return "\n".join([*lines, "", legend, ""])


def _render_parts(document: dict[str, Any]) -> str:
    limits = {known["threads"]: known for known in document["limits"]}
    lines = []
    for index, network in enumerate(document["parts"]):
        known = limits[network["threads"]]
        facts = machine_line({**document["machine"], "threads": network["threads"]})
        name = f"{network['name']}, batch {network['batch']}"
        lines += [f"<details><summary>{name}</summary>", ""] if index else []
        lines += [f"**{name}** on {facts}: {known['text']}.", ""]
        header = [
            "",
            "MFLOP",
            "KiB",
            "FLOP / byte",
            "at peak, us",
            "bytes, us",
            "between, us",
            "measured, us",
            "of peak",
        ]
        lines += [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
        for part in network["parts"]:
            numbers = (
                1e3 * part["gflop"],
                part["moved_bytes"] / 1024,
                part["intensity"],
                *(1e3 * part[name] for name in ("arithmetic_ms", "moved_ms", "scratch_ms", "ms")),
            )
            cells = [_three_digits(number) for number in numbers]
            cells[4] += f" ({part['level']})"
            lines.append(_row([part["name"], *cells, f"{part['share_of_peak']:.0%}"]))
        alone, whole = _three_digits(network["sum_ms"]), _three_digits(network["whole_ms"])
        lines += ["", f"All parts {alone} ms one by one; as one call {whole} ms.", ""]
        lines += ["</details>", ""] if index else []
    return "\n".join(lines)


def lead(result: dict[str, Any]) -> float:
    """How many times as long as frozen the fastest that is not ours takes, each in the format that suits it better."""
    others = {variant.split()[0] for variant in result["times"]}.difference(OURS)
    return min(best_ms(result, engine) for engine in others) / best_ms(result, "frozen")


def speed(result: dict[str, Any], engine: str) -> float:
    """How many times as fast as eager ``engine`` is, each in the memory format that suits it better."""
    return best_ms(result, "eager") / best_ms(result, engine)


def best_ms(result: dict[str, Any], engine: str) -> float:
    """Median milliseconds in the faster memory format."""
    return min(times["median_ms"] for variant, times in result["times"].items() if variant.split()[0] == engine)


def _table(results: list[dict[str, Any]], machine: dict[str, Any], with_network: bool = False) -> list[str]:
    present = _present(results, LABELS)
    ours = _present(results, OURS)
    header = ["", *(LABELS[engine] for engine in present), *(f"speed, {engine}" for engine in ours)]
    header += ["GFLOP/s", "of sgemm", *(f"MiB, {engine}" for engine in results[0].get("saved_bytes", ()))]
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for result in results:
        gflops = result["gflop"] / best_ms(result, ours[-1]) * 1e3
        lines.append(
            _row(
                [
                    f"{result['network']}: {result['name']}" if with_network else result["name"],
                    *(_times(result, engine) for engine in present),
                    *(f"{speed(result, engine):.2f}x" for engine in ours),
                    f"{gflops:.0f}",
                    f"{gflops / machine['sgemm_gflops']:.0%}",
                    *(_three_digits(saved / 2**20) for saved in result.get("saved_bytes", {}).values()),
                ]
            )
        )
    return lines


def _present(results: list[dict[str, Any]], engines: Iterable[str]) -> list[str]:
    measured = {variant.split()[0] for variant in results[0]["times"]}
    return [engine for engine in engines if engine in measured]


def _times(result: dict[str, Any], engine: str) -> str:
    times = [result["times"].get(f"{engine} {memory_format}") for memory_format in FORMATS]
    if engine in _ONE_FORMAT:
        times = [next(filter(None, times), None)]
    return " · ".join("-" if time is None else _three_digits(time["median_ms"]) for time in times)


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:.0f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _legend(document: dict[str, Any]) -> str:
    results, settings = document["results"], document["settings"]
    spreads = [time["spread_ms"] / time["median_ms"] for result in results for time in result["times"].values()]
    sgemm = document["machine"]["sgemm_gflops"]
    best = _present(results, OURS)[-1]
    batch = "" if settings["batch"] is None else f"batch {settings['batch']}, "
    legend = (
        f"Median milliseconds, {' · '.join(FORMATS)}, {batch}of {settings['repeats']} calls in "
        f"turns; half of the quartile range is mostly {statistics.median(spreads):.0%} of it and {max(spreads):.0%} at "
        "worst. Each variant was checked against float64 first. *speed*: times that of eager, either in the memory "
        f"format that suits it better. *GFLOP/s*: of {best}; *of sgemm*: the same as a share of the "
        f"{sgemm:.0f} GFLOP/s of `torch.mm` at 1024 x 1024."
    )
    if "saved_bytes" in results[0]:
        legend += (
            " Forward and backward count as three times the forward. *MiB*: what autograd keeps from the one for the "
            "other, besides parameters and buffers."
        )
    return legend


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
