#!/usr/bin/python3
"""Boxes beside one another: what each costs in memory, by mote and by Debian's QEMU microvm with virtiofsd, on the same kernel
and guest memory, and how often one wakes up that has nothing to do. `make bench-density` runs this.

It measures here where /dev/kvm is complete, else in the lab that counts instructions (lab.py): memory and wake-ups are
the same kind of figure in both. Other VMMs are measured if a variable names them, as by `make bench`."""

import argparse
import dataclasses
import pathlib
import sys

import report
import runs
from lab import archive
from vmms import ROWS, Machine, Run, firecracker, mote_spec, qemu_virtiofs

NAME = "bench-density"
RUNS = "resources/bench/density.json"
MACHINE = Machine(memory_mib=128, idle=True)
BOXES = [1, 8, 32]
# What a box takes at most, for hosts on which not all have room.
BOX_MIB = 128


def mote_numbered(stage, machine):
    """Boxes, each with its own name and socket; all have the root in common."""
    for number in range(max(BOXES)):
        spec = mote_spec(stage, machine)
        spec |= {"box_id": f"bench-{number}", "exec_socket_path": stage.path(f"exec-{number}.sock")}
        stage.write(f"mote-density-{number}.json", spec)
    return Run([stage.path("bin/mote"), "--config-file", stage.path("mote-density-{}.json")])


def qemu_numbered(stage, machine):
    run = qemu_virtiofs(stage, machine)
    socket = stage.path("virtiofsd.sock")
    numbered = stage.path("virtiofsd-{}.sock")
    run.command = [str(word).replace(socket, numbered) for word in run.command]
    run.options = [word.replace(socket, numbered) for word in run.options]
    return run


STARTS = {"mote": mote_numbered, "qemu-virtiofs": qemu_numbered, "firecracker": firecracker}
BASE = "qemu-virtiofs"


@dataclasses.dataclass(frozen=True)
class Case:
    """Some boxes of one VMM's, at a time."""

    row: str
    boxes: int
    mode: str = "density"

    @property
    def label(self):
        return f"{self.row}@{self.boxes}"

    def command(self, stage):
        return runs.command(stage, self.label, self.mode, STARTS[self.row](stage, MACHINE), ["-n", self.boxes])


def build(stage):
    runs.build(stage, [ROWS[name] for name in STARTS])
    runs.compile_bare("entrypoint", stage.directory / "root/entrypoint")
    archive(stage.directory / "root", stage.directory / "initramfs")


MEMORY = {"rss": "RSS", "pss": "PSS", "anonymous": "anonymous", "page_tables": "page tables", "ram_pss": "the guest's own"}


def memory_table(results):
    lines = []
    for case, run in results.items():
        mib = [report.number(run[f"{name}_kib"] / case.boxes / 1024) for name in MEMORY]
        # Of one box, it is within what the kernel keeps on its lists for a processor, neither free nor taken.
        loss = report.number(run["taken_kib"] / case.boxes / 1024) if case.boxes > 1 else ""
        lines.append([ROWS[case.row].name, str(case.boxes), str(run["processes"] // case.boxes), str(run["threads"] // case.boxes), *mib, loss])
    return report.table(["MiB, each box", "boxes", "processes", "threads", *MEMORY.values(), "the host's loss"], lines)


def idle_table(results):
    lines = []
    for case, run in results.items():
        per_second = [run[name] / run["seconds"] / case.boxes for name in ("switches", "exits")]
        lines.append([ROWS[case.row].name, str(case.boxes), *(report.number(rate, 2) for rate in per_second)])
    return report.table(["each second, each idle box", "boxes", "context switches", "exits"], lines)


def text(results, here):
    where = (f"Emulated machine ({here['lab_kernel']}, one processor)" if here["counted"] else report.where(here).removeprefix("Milliseconds on "))
    return "\n\n".join([
        f"{where}. One vCPU, {MACHINE.memory_mib} MiB, the same kernel and root; {report.peers(here)}.",
        memory_table(results), idle_table(results)])


def room_for(boxes, counted):
    if counted:
        return boxes
    available_kib = next(int(line.split()[1]) for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return min(boxes, available_kib // 1024 // BOX_MIB)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--boxes", help="how many at a time, with commas between")
    parser.add_argument("--keep", action="store_true", help="leave the README and the JSON as they are")
    options = parser.parse_args()
    counted = not runs.here_is_kvm()
    rows = [row for row in STARTS if ROWS[row].is_there()]
    if BASE not in rows:
        sys.exit(f"{NAME}: {ROWS[BASE].variable} does not name virtiofsd; 'make {NAME}' sets it")
    wanted = map(int, options.boxes.split(",")) if options.boxes else BOXES
    counts = sorted({room_for(boxes, counted) for boxes in wanted})
    # Each first alone, which does not count: it fills the page cache.
    cases = [Case(row, boxes) for boxes in [1, *counts] for row in rows]
    measured, failed = runs.run_cases(NAME, build, cases, counted)
    results = {case: values[-1] for case, values in measured.items()}
    here = report.environment(counted, rows)
    if not options.keep and not failed:
        runs.save(RUNS, here, [{"row": case.row, "boxes": case.boxes, "values": run} for case, run in results.items()])
        runs.put_into_readme(f"make {NAME}", text(results, here))
    print(text(results, here))
    if failed:
        sys.exit(f"{NAME}: failed each time, and not in these figures: {', '.join(failed)}")


main()
