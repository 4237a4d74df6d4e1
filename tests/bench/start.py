#!/usr/bin/python3
"""The start of a box, side by side: mote, other VMMs and a floor that none can be much faster than, on one kernel, with
the same memory, vCPUs and program, by turns in one run. `make bench` runs this.

Here, on a machine whose /dev/kvm is complete, it measures time. Elsewhere it counts instructions, in a lab of its own
(lab.py), whose results repeat to 0.3 %. The output says which, and so do the files that it writes:
resources/bench/start.json with every run, the tables of the README between two comments, and the README's plots.

QEMU is Debian's. Other VMMs are measured if a variable names them: MOTE_BENCH_FIRECRACKER,
MOTE_BENCH_CLOUD_HYPERVISOR, MOTE_BENCH_LIBKRUN (the library)."""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import hot
import report
import runs
from lab import Lab, archive
from vmms import ROWS, Machine, Stage, to_init

MEMORY_MIB = [128, 256, 512, 1024, 4096]
VCPUS = [1, 2]
SHARES = [1, 4, 12]
# Beside them, the most that a box has by a template.
MANY = [Machine(shares=12), Machine(shares=12, network=True)]
PASST = "/usr/bin/passt"
# Runs of one row: of the first table, and of each point of a sweep. One more comes first and does not count: it
# fills the page cache.
ROUNDS, SWEEP_ROUNDS = 7, 3
# A disk that holds the program, for VMMs whose root is one.
DISK = "16M"


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that is run, some times. Its mode is one of measure.c's, or `init`: `start`, by `to_init`."""

    row: str
    machine: Machine
    mode: str = "start"

    @property
    def label(self):
        return f"{self.row}@{self.machine.memory_mib}@{self.machine.vcpus}@{self.machine.shares}{'@network' * self.machine.network}{'@socket' * self.machine.socket}"

    def command(self, stage):
        row = ROWS[self.row]
        if self.mode == "init" and row.says_when:
            return by_timeline(self.label, row.run(stage, self.machine), stage.path("timeline.json"))
        run = to_init(row, stage, self.machine) if self.mode == "init" else row.run(stage, self.machine)
        options = []
        if self.mode == "exec":
            client = [stage.path("bin/mote"), "exec", "--wait", "20s", stage.path("exec.sock"), "--", "/entrypoint", "exec"]
            options = ["-c", " ".join(client)]
        return runs.command(stage, self.label, "start" if self.mode == "init" else self.mode, run, options)


def by_timeline(label, run, file):
    """The shell's line that has mote say when its agent has started, in microseconds, and repeats it as measure.c does."""
    variables = " ".join(f"{name}={value}" for name, value in run.environment.items())
    box = " ".join(map(str, [run.command[0], "--timeline", file, *run.command[1:]]))
    started = f"""$(sed 's/.*"agent_started":\\([0-9]*\\).*/\\1/' {file})"""
    return "; ".join([*(" ".join(map(str, command)) for command in run.prepare), f"{variables} {box}", f"echo RUN {label} start init={started}"])


def build(stage):
    """Everything that runs: the VMMs, the floor, and three kinds of roots."""
    runs.build(stage, ROWS.values())
    directory = stage.directory
    runs.compile_static("floor", directory / "bin/floor", "-lpthread")
    runs.compile_bare("entrypoint", directory / "root/entrypoint")
    archive(directory / "root", directory / "initramfs")
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-d", directory / "root", directory / "root.ext4", DISK], stdout=subprocess.DEVNULL, check=True)
    runs.compile_static("snapshot", directory / "bin/snapshot")
    if ROWS["libkrun"].is_there():
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", directory / "bin/libkrun", runs.HERE / "libkrun.c"], check=True)


def plan(rows, rounds, sweep_rounds):
    """What is run, in this order: by turns within each part, so that what drifts on the machine drifts for all."""
    plain, idle = Machine(), Machine(idle=True)
    compared = [Case(name, plain, mode) for name in rows for mode in ("start", *["init"] * ROWS[name].has_agent)]
    swept = [name for name in rows if ROWS[name].swept]
    sizes = [Machine(memory_mib=memory) for memory in MEMORY_MIB if memory != plain.memory_mib]
    sweep = [Case(name, machine) for machine in sizes for name in swept]
    parallel = [Case(name, Machine(vcpus=vcpus)) for vcpus in VCPUS if vcpus != 1 for name in swept]
    answers = []
    if "mote" in rows:
        sweep += [Case("mote", Machine(shares=shares)) for shares in SHARES if shares != 1] + [Case("mote", report.SOCKET)]
        answers = [Case("mote", idle, "exec")]
    if "mote-template" in rows:
        sweep += [Case("mote-template", machine) for machine in (*MANY, report.SOCKET)]
    once = [Case(name, plain, "exits") for name in rows] + [Case(name, idle, "memory") for name in rows]
    return compared + compared * rounds + (sweep + answers) * (sweep_rounds + 1) + parallel * (sweep_rounds + 2) + once


def profiled(row):
    runs.prepare("bench", True)
    with runs.work_directory() as work:
        work = pathlib.Path(work)
        stage = Stage(work / "stage", "/bench")
        program = hot.program_with_symbols(runs.ROOT)
        os.environ["MOTE"] = str(program)
        build(stage)
        hot.prepare(stage)
        hot.commands(stage, lambda mode: Case(row, Machine(), mode))
        lab = Lab(work)
        lab.pack(stage.directory, [])
        return hot.profile(lab, stage, lambda mode: Case(row, Machine(), mode), program, report.table)


def render():
    saved = json.loads((runs.ROOT / report.RUNS).read_text())
    results = {}
    for run in saved["runs"]:
        machine = Machine(*(run[field.name] for field in dataclasses.fields(Machine)))
        results[Case(run["row"], machine, run["mode"])] = run["values"]
    rows = [name for name in ROWS if any(case.row == name for case in results)]
    report.write(results, rows, saved["environment"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each VMM for the first table")
    parser.add_argument("--sweep-rounds", type=int, default=SWEEP_ROUNDS, help="runs for each memory size and so on")
    parser.add_argument("--rows", default=",".join(ROWS), help="which VMMs")
    parser.add_argument("--keep", action="store_true", help="leave the README and its files as they are")
    parser.add_argument("--profile", action="store_true", help="instead, where the instructions of mote's start go")
    parser.add_argument("--render", action="store_true", help="only write tables and plots again, of the runs that are there")
    options = parser.parse_args()
    if options.render:
        return render()
    missing = [name for name in options.rows.split(",") if name not in ROWS]
    if missing:
        sys.exit(f"bench: there is no row {', '.join(missing)}; there are {', '.join(ROWS)}")
    rows = [name for name in options.rows.split(",") if ROWS[name].is_there()]
    for variable, absent in report.absent(options.rows.split(","), rows).items():
        print(f"bench: without {absent}; {variable}=PROGRAM adds it")

    if options.profile:
        return print(profiled("mote-template" if options.rows == "mote-template" else "mote"))
    counted = not runs.here_is_kvm()
    results, failed = runs.run_cases("bench", build, plan(rows, options.rounds, options.sweep_rounds), counted, programs=[PASST])
    here = report.environment(counted, rows)
    if not options.keep:
        report.write(results, rows, here)
    print(report.report(results, rows, here))
    if failed:
        sys.exit(f"bench: failed each time, and not in these figures: {', '.join(failed)}")


if __name__ == "__main__":
    main()
