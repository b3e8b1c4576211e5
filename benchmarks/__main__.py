"""Every benchmark, or those named: `python -m benchmarks [NAME ...] [--quick] [--write]`.

Prints the tables; a full run also writes benchmarks/results.json and benchmarks/results.md, and with --write those named put
theirs in the place of the old ones. Both sides of every ratio are measured in the same run, on the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.section import Section

NAMES = ("imports", "proposals", "loading", "checkpoints", "handover", "scale", "whole_run", "elastic")
HERE = Path(__file__).parent


def hardware() -> str:
    """Cores, processor, memory and, where there is one, the GPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB{gpu}"


def write(sections: list[Section]) -> None:
    about = {"hardware": hardware(), "date": datetime.now(UTC).date().isoformat()}
    figures = {name: round(value, 3) for section in sections for name, value in section.figures.items()}
    (HERE / "results.json").write_text(json.dumps({**figures, **about}, indent=2) + "\n")
    head = ["# Benchmarks", "", f"Made by `python -m benchmarks` on {about['hardware']}, {about['date']}.", ""]
    (HERE / "results.md").write_text("\n".join(head + [section.markdown() for section in sections]))


def merge(sections: list[Section]) -> None:
    """Put `sections` into the files in the place of those that begin with the same word; each says when it was made."""
    made = f"Made on {hardware()}, {datetime.now(UTC).date().isoformat()}."
    figures = json.loads((HERE / "results.json").read_text())
    figures |= {name: round(value, 3) for section in sections for name, value in section.figures.items()}
    (HERE / "results.json").write_text(json.dumps(figures, indent=2) + "\n")
    head, *old = (HERE / "results.md").read_text().split("\n## ")
    parts = {_word(part): part.rstrip("\n") + "\n" for part in old}
    new = {_word(section.title): f"{section.markdown().removeprefix('## ')}\n{made}\n" for section in sections}
    (HERE / "results.md").write_text("\n## ".join([head, *(parts | new).values()]))


def _word(title: str) -> str:
    return title.split()[0].strip(":,")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(NAMES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="few repeats: to see that it runs, not to be quoted")
    parser.add_argument("--write", action="store_true", help="of those named, write the results too")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_USAGE_STATS_ENABLED", "0"), ("OMP_NUM_THREADS", "1")):
        os.environ.setdefault(name, value)
    console, sections = Console(width=120), []
    for name in arguments.names or NAMES:
        began = time.perf_counter()
        section: Section = import_module(f"benchmarks.{name}").measure(arguments.quick)
        section.show(console)
        console.print(f"[dim]{name}: {time.perf_counter() - began:.0f} s[/dim]\n")
        sections.append(section)
    if not arguments.quick and not arguments.names:
        write(sections)
    elif not arguments.quick and arguments.write:
        merge(sections)


if __name__ == "__main__":
    main()
