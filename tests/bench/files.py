#!/usr/bin/python3
"""Files side by side: what programs do to a file system (files.c), in a box of mote's and in Debian's QEMU microvm with
virtiofsd, with the same kernel, memory and cache policy, by turns in one run. `make bench-fs` runs this. Beside them, as what the
guest's kernel costs by itself, the same box on a tmpfs of its own.

The host's files are in its memory, so that the way to them is measured, and no disk. As `make bench`, it measures time
where /dev/kvm is complete, and else counts instructions in a lab (lab.py). Above 1 is better than QEMU."""

import argparse
import dataclasses
import shutil
import statistics
import sys

import report
import runs
from vmms import ROWS, Machine, Run, mote, mote_spec, qemu_virtiofs

NAME = "bench-fs"
RUNS = "resources/bench/files.json"
MACHINE = Machine(memory_mib=512)
ROUNDS = 2
BASE = "qemu-virtiofs"

# What files.c times, and how often it does what it times.
FIGURES = {
    "install": ("write a tree of 20,000 small files", 20000),
    "walk": ("walk over it, cold", 20000),
    "stat": ("`stat` of all, cold", 20000),
    "stat_again": ("`stat` of all once more", 20000),
    "write": ("write 128 MiB in order", 128),
    "read": ("read 128 MiB in order, cold", 128),
    "random": ("4 KiB reads at random, cold", 4096),
    "exec": ("run a program, cold", 1),
    "exec_again": ("run it again", 50),
}


def mote_on_tmpfs(stage, machine):
    spec = mote_spec(stage, machine)
    spec["entrypoint"]["args"] = ["tmpfs"]
    return Run([stage.path("bin/mote"), "--config-file", stage.write("mote-tmpfs.json", spec)])


NAMES = {BASE: (ROWS[BASE].name, qemu_virtiofs), "mote": ("mote", mote), "mote-tmpfs": ("mote, on the guest's tmpfs", mote_on_tmpfs)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row, run once."""

    row: str
    mode: str = "figures"

    @property
    def label(self):
        return self.row

    def command(self, stage):
        run = NAMES[self.row][1](stage, MACHINE)
        # What the last run has written is gone.
        work = stage.path("root/work")
        run.prepare = [*run.prepare, ["rm", "-rf", work], ["mkdir", work]]
        return runs.command(stage, self.label, self.mode, run)


def build(stage):
    runs.build(stage, [ROWS[BASE]])
    runs.compile_static("files", stage.directory / "root/entrypoint")
    shutil.copy("/bin/busybox", stage.directory / "root/busybox")


def table(results, counted):
    rows = list(results)
    medians = {row: {key: statistics.median(run[key] for run in values) for key in FIGURES} for row, values in results.items()}
    lines = []
    for key, (what, times) in FIGURES.items():
        line = [what]
        for row in rows:
            each = report.number(medians[row][key] / times, 1)
            ratio = "" if row == BASE or BASE not in rows else f" ({medians[BASE][key] / medians[row][key]:.2f})"
            line.append(each + ratio)
        lines.append(line)
    unit = "thousand instructions" if counted else "µs"
    return report.table([f"{unit}, each (times {ROWS[BASE].name})", *(NAMES[row][0] for row in rows)], lines)


def apart(results):
    """How far the runs of one figure are apart at most, in percent."""
    return max(100 * (max(values) / min(values) - 1)
               for measured in results.values() for key in FIGURES for values in [[run[key] for run in measured]])


def text(results, here):
    head = (f"{report.where(here)}. One vCPU, {MACHINE.memory_mib} MiB, the same kernel, the host's files in its memory; medians of "
            f"{min(map(len, results.values()))} runs, which are apart by at most {apart(results):.1f} %; in brackets how many times better than QEMU.")
    return f"{head}\n\n{table(results, here['counted'])}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each row")
    parser.add_argument("--keep", action="store_true", help="leave the README and the JSON as they are")
    options = parser.parse_args()
    rows = [row for row in NAMES if row not in ROWS or ROWS[row].is_there()]
    if BASE not in rows:
        sys.exit(f"{NAME}: {ROWS[BASE].variable} does not name virtiofsd; 'make {NAME}' sets it")
    counted = not runs.here_is_kvm()
    measured, failed = runs.run_cases(NAME, build, [Case(row) for row in rows] * options.rounds, counted)
    results = {case.row: values for case, values in measured.items()}
    if failed or len(results) < len(rows):
        sys.exit(f"{NAME}: failed twice: {', '.join(failed)}")
    here = report.environment(counted, [BASE])
    if not options.keep:
        runs.save(RUNS, here, [{"row": row, "values": values} for row, values in results.items()])
        runs.put_into_readme(f"make {NAME}", text(results, here))
    print(text(results, here))


main()
