"""Run every benchmark and write the results into docs/performance.md and its figure.

    python benchmarks/run_all.py                     # an hour or so on two cores
    python benchmarks/run_all.py --threads 1 --clock cpu

What is between the two markers in docs/performance.md is replaced; the words around it stay.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
from common import Table

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "performance.md"
FIGURE = HERE.parent / "docs" / "figures" / "performance.png"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PICTURE = "![Time per cell beside other tools, and how replay's time grows](figures/performance.png)"
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "peers": ("peers.py",),
    "peers, Qwen2-Audio": ("peers.py", "--shape=qwen2_audio"),
    "limit": ("limit.py",),
    "memory": ("memory.py",),
    "scaling": ("scaling.py",),
}


def main() -> None:
    """Run, write, draw."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--only", nargs="*", choices=tuple(BENCHMARKS), default=list(BENCHMARKS))
    made.add_argument("--results", type=Path, help="folder that keeps the tables as JSON; --only adds to what is there")
    options = made.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.results or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            _run(name, folder / f"{_slug(name)}.json", options)
        found = {name: folder / f"{_slug(name)}.json" for name in BENCHMARKS}
        results = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    write(results)
    draw(results)


def _run(name: str, target: Path, options: argparse.Namespace) -> None:
    script, *arguments = BENCHMARKS[name]
    command = [sys.executable, str(HERE / script), *arguments, f"--json={target}"]
    command += [f"--{option}={getattr(options, option)}" for option in ("threads", "clock", "repeats")]
    print(f"--- {name}", flush=True)
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-").lower()


def write(results: dict[str, dict[str, object]]) -> None:
    """Put the tables between the page's markers."""
    blocks = [BEGIN, PICTURE]
    for name, result in results.items():
        blocks.append(f"### {name[0].upper()}{name[1:]}\n\n{result['machine']}")
        blocks += [table.markdown().rstrip() for table in _tables(result)]
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(before + "\n\n".join([*blocks, END]) + after)


def draw(results: dict[str, dict[str, object]]) -> None:
    """Time per cell beside the peers, and growth."""
    sns.set_theme(style="whitegrid", font_scale=0.8)
    figure, (bars, growth) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(3, 2), layout="constrained")
    if "peers" in results:
        (table,) = _tables(results["peers"])
        names = [str(row[0]).replace(" (base runs included)", "") for row in table.rows]
        times = [float(row[1]) for row in table.rows]
        colours = [sns.color_palette()[3 if index == 0 else 0] for index in range(len(names))]
        bars.barh(names, times, color=colours)
        for index, row in enumerate(table.rows):
            beside = f", {float(row[2]):.3g} times replay" if index else ""
            bars.text(times[index], index, f" {times[index]:,.0f} ms{beside}", va="center")
        bars.set(xscale="log", xlabel="milliseconds per cell", xlim=(min(times) / 2, max(times) * 80))
        bars.invert_yaxis()
        bars.grid(axis="y", visible=False)
        bars.set_title(table.title)
    for table in _tables(results["scaling"]) if "scaling" in results else ():
        counts = [float(row[0]) for row in table.rows]
        taken = [float(row[4]) for row in table.rows]
        growth.plot([count / counts[0] for count in counts], taken, marker="o", label=table.columns[0])
        if table.columns[0] != "audio positions":
            work = [float(row[2]) / float(table.rows[0][2]) for row in table.rows]
            growth.plot([count / counts[0] for count in counts], work, ls=":", color="grey")
    growth.set_xscale("log", base=2)
    growth.set_yscale("log", base=2)
    for axis in (growth.xaxis, growth.yaxis):
        axis.set_major_formatter("{x:g}")
    growth.set(xlabel="size, times the smallest", ylabel="time, times the smallest")
    growth.set_title("growth (dotted: cells x remaining suffix)")
    growth.legend()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=150)
    plt.close(figure)


def _tables(result: dict[str, object]) -> list[Table]:
    return [Table(**table) for table in result["tables"]]  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
