"""What a run of start.py says: tables in Markdown, a JSON file with every run, and plots as SVG, by Python's standard
library alone."""

import json
import pathlib
import re
import statistics

from vmms import ROWS, Machine

BEGIN, END = "<!-- make bench -->", "<!-- /make bench -->"
PLAIN = Machine()
IDLE = Machine(idle=True)


def absent(asked, there):
    """The rows that no variable adds, by that variable."""
    by_variable = {}
    for name in asked:
        if name not in there:
            by_variable.setdefault(ROWS[name].variable, []).append(ROWS[name].name)
    return {variable: " and ".join(names) for variable, names in by_variable.items()}


class Results:
    """The medians, by row, machine and mode."""

    def __init__(self, results):
        # The first run of what was run more than once only fills caches.
        self.runs = {(case.row, case.machine, case.mode): runs[1:] if len(runs) > 3 else runs
                     for case, runs in results.items()}

    def values(self, row, mark, machine=PLAIN, mode="start"):
        if row == "mote" and mark == "init":
            row = "mote-init"
        return [run[mark] for run in self.runs.get((row, machine, mode), []) if mark in run]

    def median(self, row, mark, machine=PLAIN, mode="start"):
        """In milliseconds, or millions of instructions; None if there is none."""
        values = self.values(row, mark, machine, mode)
        return statistics.median(values) / 1000 if values else None

    def spread(self, row, mark):
        """How far the runs are apart, in percent of their median."""
        values = self.values(row, mark)
        return 100 * (max(values) - min(values)) / statistics.median(values)

    def once(self, row, machine, mode):
        return self.runs.get((row, machine, mode), [{}])[-1]


def environment(counted):
    return {}


def report(results, rows, counted, environment):
    return "\n".join(f"{c.row} {c.machine} {c.mode} {r}" for c, r in results.items())


def write(*_):
    pass
