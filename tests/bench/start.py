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
import shutil
import signal
import subprocess
import sys
import tempfile

import hot
import report
from lab import Lab, archive, quoted
from vmms import ROWS, Machine, Stage, to_init

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MEMORY_MIB = [128, 256, 512, 1024, 4096]
VCPUS = [1, 2]
SHARES = [1, 4, 12]
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
        return f"{self.row}@{self.machine.memory_mib}@{self.machine.vcpus}@{self.machine.shares}"

    def command(self, stage):
        row = ROWS[self.row]
        run = to_init(row, stage, self.machine) if self.mode == "init" else row.run(stage, self.machine)
        options = list(run.options)
        if self.mode == "exec":
            client = [stage.path("bin/mote"), "exec", "--wait", "20s", stage.path("exec.sock"), "--", "/entrypoint", "exec"]
            options += ["-c", " ".join(client)]
        measure = [stage.path("bin/measure"), self.label, "start" if self.mode == "init" else self.mode, *options, "--", *run.command]
        variables = [f"{name}={value}" for name, value in run.environment.items()]
        return "; ".join([*map(quoted, run.prepare), " ".join([*variables, quoted(measure)])])


def build(stage):
    """Everything that runs: our programs, the VMMs that are not this system's, the kernel, and three kinds of roots."""
    directory = stage.directory
    (directory / "bin").mkdir(parents=True)
    gcc = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s"]
    for name in ("measure", "floor"):
        subprocess.run([*gcc, "-o", directory / "bin" / name, HERE / f"{name}.c", "-lpthread"], check=True)
    (directory / "root").mkdir()
    for name in ("init", "entrypoint"):
        subprocess.run([*gcc, "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-no-pie", "-Wl,--build-id=none",
                        "-o", directory / "root" / name, HERE / f"{name}.c"], check=True)
    for name in ("dev", "proc", "sys", "tmp", "run", "etc", "mote", "share"):
        (directory / "root" / name).mkdir()
    (directory / "share").mkdir()
    archive(directory / "root", directory / "initramfs")
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-d", directory / "root", directory / "root.ext4", DISK], stdout=subprocess.DEVNULL, check=True)
    shutil.copy(os.environ["MOTE_BENCH_KERNEL"], directory / "vmlinux")
    shutil.copy(os.environ.get("MOTE", ROOT / "target/release/mote"), directory / "bin/mote")
    if ROWS["libkrun"].is_there():
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", directory / "bin/libkrun", HERE / "libkrun.c"], check=True)
    for row in ROWS.values():
        if row.program and row.is_there():
            target = directory / "bin" / row.program
            shutil.copy(os.environ[row.variable], target)
            target.chmod(0o755)


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
        sweep += [Case("mote", Machine(shares=shares)) for shares in SHARES if shares != 1]
        answers = [Case("mote", idle, "exec")]
    once = [Case(name, plain, "exits") for name in rows] + [Case(name, idle, "memory") for name in rows]
    return compared + compared * rounds + (sweep + answers) * (sweep_rounds + 1) + parallel * (sweep_rounds + 2) + once


def run_here(commands):
    for command in commands:
        done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, text=True)
        yield from done.stdout.splitlines()


def parse(line):
    """`RUN LABEL MODE key=value…`, as a dictionary of numbers."""
    _, label, mode, *pairs = line.split()
    return label, mode, {name: int(value) for name, value in (pair.split("=") for pair in pairs)}


def measure(cases, stage, run):
    """Runs all cases, those that fail once more. Returns the results of each, and what has failed twice."""
    results, again = {}, []
    number = 0
    for line in run([case.command(stage) for case in cases]):
        kind = line.split(" ", 1)[0]
        if kind in ("RUN", "FAIL"):
            case = cases[number]
            number += 1
            progress(number, len(cases), case)
            if kind == "RUN":
                results.setdefault(case, []).append(parse(line)[2])
            else:
                print(line, flush=True)
                again.append(case)
        elif line and not line.startswith("LAB "):
            print(line, flush=True)
    # Nested virtualisation under emulation is not always right.
    failed = []
    for case in again:
        for line in run([case.command(stage)]):
            if line.startswith("FAIL "):
                failed.append(f"{case.label} {case.mode}")
            if line.startswith("RUN "):
                results.setdefault(case, []).append(parse(line)[2])
    return results, failed


def progress(number, of, case):
    if sys.stderr.isatty():
        print(f"\r\033[Kbench: {number} of {of}: {case.label} {case.mode}", end="" if number < of else "\n", file=sys.stderr)


def here_is_kvm():
    """Whether boxes can run here, as mote itself finds."""
    probe = subprocess.run([os.environ.get("MOTE", ROOT / "target/release/mote"), "probe"], capture_output=True)
    return probe.returncode == 0


def profiled(work, stage):
    program = hot.program_with_symbols(ROOT)
    os.environ["MOTE"] = str(program)
    build(stage)
    hot.prepare(stage)
    hot.commands(stage, lambda mode: Case("mote", Machine(), mode))
    lab = Lab(work)
    lab.pack(stage.directory, [])
    return hot.profile(lab, stage, lambda mode: Case("mote", Machine(), mode), program, report.table)


def render():
    runs = json.loads((ROOT / report.RUNS).read_text())
    results = {}
    for run in runs["runs"]:
        machine = Machine(*(run[field.name] for field in dataclasses.fields(Machine)))
        results[Case(run["row"], machine, run["mode"])] = run["values"]
    rows = [name for name in ROWS if any(case.row == name for case in results)]
    report.write(ROOT, results, rows, runs["environment"])


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

    # So that the lab ends with this, and what it has written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if "MOTE_BENCH_KERNEL" not in os.environ:
        sys.exit("bench: MOTE_BENCH_KERNEL does not name the guest's kernel; 'make bench' sets it")
    counted = options.profile or not here_is_kvm()
    if not counted and os.geteuid() != 0:
        sys.exit("bench: measuring time here takes root, for the kernel's tracepoints; run: sudo -E make bench")
    with tempfile.TemporaryDirectory(prefix="mote-bench.", dir="/run" if os.geteuid() == 0 else None) as work:
        work = pathlib.Path(work)
        stage = Stage(work / "stage", "/bench" if counted else str(work / "stage"))
        if options.profile:
            return print(profiled(work, stage))
        build(stage)
        cases = plan(rows, options.rounds, options.sweep_rounds)
        # Writes the configurations, which the lab's image has to have.
        for case in cases:
            case.command(stage)
        if counted:
            lab = Lab(work)
            lab.pack(stage.directory, [pathlib.Path("/usr/bin/qemu-system-x86_64")] if any("qemu" in row for row in rows) else [])
            results, failed = measure(cases, stage, lab.run)
        else:
            results, failed = measure(cases, stage, run_here)
    here = report.environment(counted, rows)
    if not options.keep:
        report.write(ROOT, results, rows, here)
    print(report.report(results, rows, here))
    if failed:
        sys.exit(f"bench: failed twice, and not in these figures: {', '.join(failed)}")


main()
