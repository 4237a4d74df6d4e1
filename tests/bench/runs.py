"""What the benchmarks by measure.c share: what runs is put together below one directory, then all commands run by turns,
here by the clock where /dev/kvm is complete, else in the lab that counts instructions (lab.py)."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

from lab import Lab, quoted
from vmms import ROWS, Stage

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GCC = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s"]
# Until a guest has started and ended. One that spins for ever (tests/lab/qemu.py says why they did) takes a minute of
# emulation for each virtual second, of which no run needs more than a half.
START_LIMIT_S, COUNTED_START_LIMIT_S = 90, 3
# Of what has failed.
REPETITIONS = 3
# What mote and init.c mount things on, and what the runs need.
ROOT_DIRECTORIES = ("dev", "proc", "sys", "tmp", "run", "etc", "mote", "share")


def compile_static(name, target, *more):
    subprocess.run([*GCC, "-o", target, HERE / f"{name}.c", *more], check=True)


def compile_bare(name, target):
    """A guest's program that has no C library, so that its start costs nothing of its own."""
    compile_static(name, target, "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-no-pie", "-Wl,--build-id=none")


def build(stage, rows):
    """What every benchmark has: measure.c, the VMMs of these rows, the kernel, and a root with an /init for peers."""
    directory = stage.directory
    (directory / "bin").mkdir(parents=True)
    limit_s = COUNTED_START_LIMIT_S if stage.counted else START_LIMIT_S
    compile_static("measure", directory / "bin/measure", "-lpthread", f"-DSTART_LIMIT_S={limit_s}")
    (directory / "root").mkdir()
    compile_bare("init", directory / "root/init")
    for name in ROOT_DIRECTORIES:
        (directory / "root" / name).mkdir()
    (directory / "share").mkdir()
    shutil.copy(os.environ["MOTE_BENCH_KERNEL"], directory / "vmlinux")
    shutil.copy(mote_binary(), directory / "bin/mote")
    for row in rows:
        if row.program and row.is_there():
            target = directory / "bin" / row.program
            shutil.copy(os.environ[row.variable], target)
            target.chmod(0o755)


def command(stage, label, mode, run, options=()):
    """The shell's line that measures one of vmms.py's runs."""
    measure = [stage.path("bin/measure"), label, mode, *run.options, *options, "--", *run.command]
    variables = [f"{name}={value}" for name, value in run.environment.items()]
    return "; ".join([*map(quoted, run.prepare), " ".join([*variables, quoted(measure)])])


def mote_binary():
    return os.environ.get("MOTE", ROOT / "target/release/mote")


def here_is_kvm():
    """Whether boxes can run here, as mote itself finds."""
    return subprocess.run([mote_binary(), "probe"], capture_output=True).returncode == 0


def prepare(name, counted):
    """Says what is missing before anything is built."""
    # So that the lab ends with this, and what it has written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if "MOTE_BENCH_KERNEL" not in os.environ:
        sys.exit(f"{name}: MOTE_BENCH_KERNEL does not name the guest's kernel; 'make {name}' sets it")
    if not counted and os.geteuid() != 0:
        sys.exit(f"{name}: measuring time here takes root, for the kernel's tracepoints; run: sudo -E make {name}")


def work_directory():
    return tempfile.TemporaryDirectory(prefix="mote-bench.", dir="/run" if os.geteuid() == 0 else None)


def run_cases(name, build_all, cases, counted, vectors=True, programs=()):
    """Builds, and runs all cases, those that fail some times more. They need QEMU if their row says so, and these programs of this
    system. Returns the results of each, and what has failed each time."""
    prepare(name, counted)
    with work_directory() as work:
        work = pathlib.Path(work)
        stage = Stage(work / "stage", "/bench" if counted else str(work / "stage"), counted)
        build_all(stage)
        # Writes the configurations, which the lab's image has to have.
        for case in cases:
            case.command(stage)
        if not counted:
            return measure(name, cases, stage, run_here)
        lab = Lab(work, vectors)
        qemu = ["/usr/bin/qemu-system-x86_64"] if any("qemu" in case.row for case in cases) else []
        lab.pack(stage.directory, [pathlib.Path(program) for program in (*qemu, *programs)])
        return measure(name, cases, stage, lab.run)


def run_here(commands):
    for command in commands:
        done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, text=True)
        yield from done.stdout.splitlines()


def parse(line):
    """`RUN LABEL MODE key=value…`, as a dictionary of numbers."""
    _, label, mode, *pairs = line.split()
    return label, mode, {name: int(value) for name, value in (pair.split("=") for pair in pairs)}


def measure(name, cases, stage, run):
    results, again = {}, []
    number = 0
    for line in run([case.command(stage) for case in cases]):
        kind = line.split(" ", 1)[0]
        if kind in ("RUN", "FAIL"):
            case = cases[number]
            number += 1
            progress(name, number, len(cases), case)
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
        for _ in range(REPETITIONS):
            # Twice, since the first run in a new lab fills its page cache.
            last = [line for line in run([case.command(stage)] * 2) if line.startswith(("RUN ", "FAIL "))][-1]
            print(f"{name}: repeated: {last}", flush=True)
            if last.startswith("RUN "):
                results.setdefault(case, []).append(parse(last)[2])
                break
        else:
            failed.append(f"{case.label} {case.mode} ({last})")
    return results, failed


def progress(name, number, of, case):
    if not sys.stderr.isatty():
        print(f"{name}: {number} of {of}: {case.label} {case.mode}", file=sys.stderr, flush=True)
    else:
        print(f"\r\033[K{name}: {number} of {of}: {case.label} {case.mode}", end="" if number < of else "\n", file=sys.stderr)


def save(file, environment, runs):
    """Every run, one a line, as JSON below the repository."""
    lines = ",\n".join(json.dumps(run) for run in runs)
    file = ROOT / file
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'{{"environment": {json.dumps(environment)},\n"runs": [\n{lines}\n]}}\n')


def put_into_readme(target, text):
    """Between the two comments that name the target."""
    begin, end = f"<!-- {target} -->", f"<!-- /{target} -->"
    readme = ROOT / "README.md"
    before, found_begin, rest = readme.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise RuntimeError(f"README.md has no {begin} and {end} for the tables to go between")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")
