"""A benchmark that times the same work under QEMU and under mote, one table with both beside one another: what files.py
and streams.py share."""

import dataclasses
import statistics
import sys

import report
import runs
from vmms import ROWS

# Counted instructions repeat, but for what waits on timers; a run takes about half a minute.
ROUNDS, COUNTED_ROUNDS = 5, 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One row, run once."""

    bench: "Bench" = dataclasses.field(compare=False, repr=False)
    row: str

    @property
    def label(self):
        return self.row

    @property
    def mode(self):
        return self.bench.mode

    def command(self, stage):
        run = self.bench.rows[self.row][1](stage, self.bench.machine)
        return runs.command(stage, self.label, self.mode, run)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is timed, and under what."""

    name: str
    # Where every run is kept, in the repository.
    saved: str
    # measure.c's.
    mode: str
    machine: object
    # By the name that the guest or client says: what readers see.
    figures: dict
    build: callable
    # By name: what readers see, and what makes the command.
    rows: dict
    # The row that others are compared with.
    base: str
    # What else readers have to know of all rows.
    setting: str

    def main(self, parser):
        parser.add_argument("--rounds", type=int, help=f"runs of each row ({ROUNDS}; {COUNTED_ROUNDS} where instructions are counted)")
        parser.add_argument("--keep", action="store_true", help="leave the README and the JSON as they are")
        options = parser.parse_args()
        virtiofsd = ROWS["qemu-virtiofs"]
        if not virtiofsd.is_there():
            sys.exit(f"{self.name}: {virtiofsd.variable} does not name virtiofsd; 'make {self.name}' sets it")
        counted = not runs.here_is_kvm()
        rounds = options.rounds or (COUNTED_ROUNDS if counted else ROUNDS)
        measured, failed = runs.run_cases(self.name, self.build, [Case(self, row) for row in self.rows] * rounds, counted, vectors=False)
        results = {case.row: values for case, values in measured.items()}
        if len(results) < len(self.rows):
            sys.exit(f"{self.name}: failed each time: {', '.join(failed)}")
        here = report.environment(counted, ["qemu-virtiofs"])
        text = self.text(results, here)
        if not options.keep:
            runs.save(self.saved, here, [{"row": row, "values": values} for row, values in results.items()])
            runs.put_into_readme(f"make {self.name}", text)
        print(text)
        return f"{self.name}: failed each time, and not in these figures: {', '.join(failed)}" if failed else 0

    def text(self, results, here):
        runs_each = min(map(len, results.values()))
        medians = f" Medians of {runs_each} runs, which are apart by at most {self.apart(results):.1f} %." if runs_each > 1 else ""
        return (f"{report.where(here, 'Thousand instructions', 'Microseconds')}. One vCPU, {self.machine.memory_mib} MiB, the same kernel, {report.peers(here)}. {self.setting}.{medians} "
                f"In brackets how many times better than QEMU.\n\n{self.table(results, here['counted'])}")

    def table(self, results, counted):
        medians = {row: {key: statistics.median(run[key] for run in values) for key in self.figures} for row, values in results.items()}
        base = medians[self.base]
        lines = []
        for key, what in self.figures.items():
            line = [what]
            for row in self.rows:
                ratio = "" if row == self.base else f" ({base[key] / medians[row][key]:.2f})"
                line.append(report.number(medians[row][key] / 1000) + ratio)
            lines.append(line)
        unit = "thousand instructions each" if counted else "µs each"
        return report.table([unit, *(name for name, _ in self.rows.values())], lines)

    def apart(self, results):
        """How far the runs of one figure are apart at most, in percent."""
        return max(100 * (max(values) / min(values) - 1)
                   for measured in results.values() for key in self.figures for values in [[run[key] for run in measured]])
