"""What a run of start.py says: tables in Markdown, a JSON file with every run, and plots as SVG, by Python's standard
library alone."""

import dataclasses
import os
import pathlib
import re
import statistics
import subprocess

import lab
import plots
import runs
from vmms import ROWS, Machine

RUNS = "resources/bench/start.json"
PLAIN = Machine()
IDLE = Machine(idle=True)
SOCKET = Machine(socket=True)


def absent(asked, there):
    """The rows that no variable adds, by that variable."""
    by_variable = {}
    for name in asked:
        if name not in there:
            by_variable.setdefault(ROWS[name].variable, []).append(ROWS[name].name)
    return {variable: " and ".join(names) for variable, names in by_variable.items()}


class Results:
    """The medians, by row, machine and mode."""

    def __init__(self, results, counted):
        self.counted = counted
        # The first run of what was run more than once only fills caches.
        self.runs = {(case.row, case.machine, case.mode): runs[1:] or runs for case, runs in results.items()}

    def values(self, row, mark, machine=PLAIN, mode="start"):
        if mark == "init" and ROWS[row].has_agent:
            mode = "init"
        return [run[mark] for run in self.runs.get((row, machine, mode), []) if mark in run]

    def median(self, row, mark, machine=PLAIN, mode="start"):
        """In milliseconds, or millions of instructions; None if there is none. For several vCPUs in the lab it is the least:
        on its one processor they spin while they wait for one another, until its scheduler helps."""
        values = self.values(row, mark, machine, mode)
        if not values:
            return None
        return (min(values) if self.counted and machine.vcpus > 1 else statistics.median(values)) / 1000

    def spread(self, row, mark):
        """How far the runs are apart, in percent of their median."""
        values = self.values(row, mark) or [1]
        return 100 * (max(values) - min(values)) / statistics.median(values)

    def once(self, row, machine, mode):
        return self.runs.get((row, machine, mode), [{}])[-1]


def environment(counted, rows):
    """What was measured, and where, for readers and for the next run's comparison."""
    programs = {ROWS[name].program: os.environ[ROWS[name].variable] for name in rows if ROWS[name].variable}
    versions = {name: first_line([path, "--version"]) for name, path in programs.items() if not name.endswith(".so")}
    versions["qemu"] = first_line(["qemu-system-x86_64", "--version"])
    versions["mote"] = first_line(["git", "describe", "--always", "--dirty", "--exclude=*"])
    here = {"counted": counted, "versions": versions}
    if counted:
        return here | {"lab_kernel": lab.newest_kernel().name.removeprefix("vmlinuz-"), "lab_cpu": lab.CPU}
    info = pathlib.Path("/proc/cpuinfo").read_text()
    cpu = re.search(r"^model name\s*: (.*)", info, re.M)
    is_virtual = re.search(r"^flags.* hypervisor\b", info, re.M) is not None
    return here | {"cpu": cpu[1] if cpu else "unknown", "kernel": os.uname().release, "is_virtual": is_virtual}


def first_line(command):
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.splitlines() or ["unknown"])[0]


def table(head, rows):
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value, digits=1):
    return "" if value is None else f"{value:.{digits}f}"


def beside(value, floor, mote):
    """A figure, with what it is of the floor's and of mote's."""
    if value is None:
        return ""
    ratios = [f"{value / other:.2f}" for other in (floor, mote) if other]
    return f"{value:.1f} ({' / '.join(ratios)})"


MARKS = [("first_run", "first `KVM_RUN`"), ("init", "`init`"), ("entrypoint", "entrypoint"), ("gone", "gone"),
         ("all_gone", "nothing left")]


def start_table(results, rows):
    head = ["VMM", *(name for _, name in MARKS), "apart"]
    lines = []
    for row in rows:
        figures = [beside(*(results.median(name, mark) for name in (row, "floor", "mote"))) for mark, _ in MARKS]
        lines.append([f"{ROWS[row].name}, {ROWS[row].root}", *figures, f"{results.spread(row, 'entrypoint'):.1f} %"])
    return table(head, lines)


# The reasons of AMD's and of Intel's processors, as the tracepoint spells them.
EXIT_KINDS = [
    ("memory and devices", r"npf|EPT_VIOLATION|EPT_MISCONFIG"),
    ("port", r"io|IO_INSTRUCTION"),
    ("`CPUID`", r"cpuid"),
    ("MSR", r"msr|MSR_READ|MSR_WRITE"),
    ("control registers", r"(write|read)_cr\d|cr0_sel_write|CR_ACCESS|(write|read)_dr\d|DR_ACCESS"),
    ("interrupts", r"interrupt|vintr|EXTERNAL_INTERRUPT|INTERRUPT_WINDOW|PENDING_INTERRUPT"),
]


def exits_table(results, rows):
    lines = []
    for row in rows:
        run = results.once(row, PLAIN, "exits")
        exits = {name.removeprefix("exit."): count for name, count in run.items() if name.startswith("exit.")}
        users = sum(count for name, count in run.items() if name.startswith("user.KVM"))
        kinds = [sum(count for reason, count in exits.items() if re.fullmatch(f"(EXIT_)?({pattern})", reason, re.I))
                 for _, pattern in EXIT_KINDS]
        total = sum(exits.values())
        lines.append([ROWS[row].name, *map(str, kinds), str(total - sum(kinds)), str(total), str(users)])
    return table(["exits until the entrypoint", *(name for name, _ in EXIT_KINDS), "other", "all", "to user space"], lines)


def sweep_columns(measured):
    """The machines of the sweep, in order, with what readers call them."""
    memories = sorted({machine.memory_mib for _, machine, mode in measured if mode == "start" and machine.vcpus == machine.shares == 1})
    vcpus = sorted({machine.vcpus for _, machine, mode in measured if mode == "start" and machine.vcpus > 1})
    return ([(f"{memory} MiB", Machine(memory_mib=memory)) for memory in memories]
            + [(f"{PLAIN.memory_mib} MiB, {count} vCPUs", Machine(vcpus=count)) for count in vcpus])


def sweep_table(results, rows):
    columns = sweep_columns(results.runs)
    lines = [[ROWS[row].name, *(beside(results.median(row, "entrypoint", machine), results.median("floor", "entrypoint", machine), None)
                                for _, machine in columns)]
             for row in rows if ROWS[row].swept]
    return table(["entrypoint", *(name for name, _ in columns)], lines)


def memory_table(results, rows):
    lines = []
    for row in rows:
        run = results.once(row, IDLE, "memory")
        sizes = [number(run[f"{name}_kib"] / 1024) for name in ("rss", "pss", "anonymous", "page_tables", "ram_pss")] if run else []
        lines.append([ROWS[row].name, str(run.get("processes", "")), str(run.get("threads", "")), *sizes])
    return table(["memory while idle, MiB", "processes", "threads", "RSS", "PSS", "anonymous", "page tables", "the guest's own"], lines)


def by_shares(results, row):
    """The entrypoint by the number of shares, as words."""
    machines = sorted({(machine.shares, machine.network) for name, machine, mode in results.runs if name == row and mode == "start"})
    figures = [(results.median(row, "entrypoint", Machine(shares=shares, network=network)), shares, " and a network" * network)
               for shares, network in machines]
    return ", ".join(f"{number(figure)} with {shares}{network}" for figure, shares, network in figures)


def mote_line(results, unit):
    answered = results.median("mote", "exec_answered", IDLE, "exec")
    if answered is None:
        return ""
    template = by_shares(results, "mote-template")
    from_template = f", and from a template after {template}" if template else ""
    sockets = [(results.median(row, "entrypoint", SOCKET), after) for row, after in (("mote", ""), ("mote-template", "from a template "))]
    socket = ", and ".join(f"{after}after {number(value)}" for value, after in sockets if value is not None)
    return (f"By the number of shares, mote's entrypoint runs after {by_shares(results, 'mote')} {unit}{from_template}. One whose first "
            f"deed is to open a socket for TCP has it {socket}. "
            f"The first `mote exec`, started together with the box, has its answer after {number(answered)} {unit}.")


def where(here, counted="Million instructions", timed="Milliseconds"):
    """What the figures are, for readers."""
    if here["counted"]:
        return (f"{counted} of host, VMM and guest together, counted in an emulated machine ({here['lab_kernel']}, "
                "one processor), where one that sleeps a millisecond counts as a million. They repeat, and are no times of "
                "hardware's: what a cache miss or an exit costs is not in them")
    within = ", itself a virtual machine" if here["is_virtual"] else ""
    return f"{timed} on {here['cpu']}, Linux {here['kernel']}{within}"


def peers(here):
    """What mote is compared with, and in which version."""
    versions = here["versions"]
    return ", ".join(versions[name].removeprefix("QEMU emulator version ") if name != "qemu" else "QEMU " + re.search(r"[\d.]+", versions[name])[0]
                     for name in versions if name not in ("mote", "virtiofsd"))


def report(measured, rows, here):
    """The text that the README gets."""
    results = Results(measured, here["counted"])
    spread = max(results.spread(row, "entrypoint") for row in rows)
    rounds = len(results.values(rows[0], "entrypoint"))
    unit = "million instructions" if here["counted"] else "ms"
    vcpus = ("With two vCPUs, which spin for one another on the lab's one processor, it is the least of the runs, and says little."
             if here["counted"] else "")
    parts = [
        f"{where(here)}. One vCPU, {PLAIN.memory_mib} MiB, mote's kernel for all; medians of {rounds} runs, by turns, which are apart by at most "
        f"{spread:.1f} %; in brackets, of the floor's and of mote's. {peers(here)}.",
        start_table(results, rows), exits_table(results, rows), sweep_table(results, rows), vcpus, memory_table(results, rows),
        mote_line(results, unit),
    ]
    return "\n\n".join(part for part in parts if part)


def write(measured, rows, here):
    """Puts the tables into the README, and every run and the plots beside it."""
    runs.save(RUNS, here, [{"row": case.row, "mode": case.mode, **dataclasses.asdict(case.machine), "values": values}
                           for case, values in measured.items()])
    results = Results(measured, here["counted"])
    plots_at = (runs.ROOT / RUNS).parent
    (plots_at / "start.svg").write_text(plots.timeline(results, rows, here["counted"]))
    (plots_at / "sweep.svg").write_text(plots.sweep(results, rows, here["counted"]))
    runs.put_into_readme("make bench", report(measured, rows, here))
