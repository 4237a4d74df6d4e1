#!/usr/bin/python3
"""Which of mote's functions a start runs, and in which of its processes: resources/start-order, which `make start-order` writes
by this. The linker puts them next to each other (build.rs). One that is missing here costs starts a page fault at most."""

import bisect
import os
import pathlib
import re
from collections import defaultdict

import hot
import runs
import start
from lab import Lab
from vmms import Machine, Stage

LIST = runs.ROOT / "resources/start-order"
HEAD = """# Sections of mote's text that starts use, as a linker script has them: written by `make start-order`. The hashes in Rust's
# names are left out, as they change with the compiler, and with its flags.
"""
UNTIL_NOTHING_IS_LEFT = "4"
# By the function that only that process runs. What runs none of them is the janitor, or another that mote has forked.
PROCESSES = {"mote": "4mote4plan4Plan", "virtiofsd": "9virtiofsd11passthrough"}
# Other programs have code at the same addresses, but do not enter it where mote's functions start.
ENTERED = 0.6


def text_sections(map_file):
    """Of the linker's map: the address, length, and pattern of each function's input section."""
    found = []
    for line in map_file.read_text().splitlines():
        match = re.fullmatch(r"\s*([0-9a-f]+)\s+[0-9a-f]+\s+([0-9a-f]+)\s+\d+\s{9}(\S.*):\((\.text\S*)\)", line)
        if match:
            address, length, file, section = match.groups()
            found.append((int(address, 16), int(length, 16), pattern(file, section)))
    return sorted(found)


def pattern(file, section):
    """A function of Rust's is known by its name, and of C by its file."""
    if re.fullmatch(r"\.text\.(unlikely\.)?(_[\w.$]*|main)", section):
        return f"*({re.sub(r'Cs[0-9A-Za-z]+_', 'Cs*_', re.sub(r'17h[0-9a-f]{16}E', '17h*E', section))})"
    member = re.search(r"([^/]+)\(([^/]+)\)$", file)
    name = f"{re.sub(r'-[0-9a-f]{16}', '-*', member[1])}:{member[2]}" if member else file.rpartition("/")[2]
    return f"*{name}(.text .text.*)"


def of_processes(counts, base, sections):
    """The places in `sections` that each of mote's processes has run."""
    starts = [address for address, *_ in sections]
    ran, entered = defaultdict(set), defaultdict(set)
    for space, address in counts:
        place = bisect.bisect_right(starts, address - base) - 1
        if space == "guest" or address >= hot.KERNEL or place < 0 or address - base >= starts[place] + sections[place][1]:
            continue
        ran[space].add(place)
        if address - base == starts[place]:
            entered[space].add(place)
    return [places for space, places in ran.items() if len(entered[space]) >= ENTERED * len(places)]


def main():
    runs.prepare("start-order", True)
    with runs.work_directory() as work:
        work = pathlib.Path(work)
        program = hot.program_with_symbols(runs.ROOT, f"-Wl,-Map={work / 'map'}")
        sections = text_sections(work / "map")
        symbols, entry = hot.program_symbols(program)
        os.environ["MOTE"] = str(program)
        stage = Stage(work / "stage", "/bench")
        start.build(stage)
        machines = [Machine(), Machine(vcpus=2), *start.MANY]
        # From a template, the second time.
        cases = [start.Case("mote", Machine()), *(start.Case("mote-template", machine) for machine in machines for _ in range(2))]
        commands = [case.command(stage) for case in cases]
        lab = Lab(work)
        lab.pack(stage.directory, [pathlib.Path(start.PASST)])
        plugin, out = work / "profile.so", work / "counts"
        hot.build_plugin(plugin)
        users, ran = defaultdict(set), 0
        for line in lab.boot(commands, f"{plugin},out={out}", ()):
            if line.startswith("FAIL "):
                raise RuntimeError(line)
            if line.startswith("RUN "):
                ran += 1
                counts = hot.read_counts(pathlib.Path(f"{out}.{UNTIL_NOTHING_IS_LEFT}"))
                for places in of_processes(counts, hot.load_address(counts, symbols, entry), sections):
                    patterns = {sections[place][2] for place in places}
                    names = [name for name, own in PROCESSES.items() if any(own in pattern for pattern in patterns)]
                    for each in patterns:
                        users[each].add(names[0] if names else "others")
    # What several processes use first, so that it is theirs together.
    groups = defaultdict(list)
    for each, names in users.items():
        groups[tuple(sorted(names))].append(each)
    text = HEAD
    for names in sorted(groups, key=lambda names: (-len(names), names)):
        text += "\n".join([f"# {' and '.join(names)}", *sorted(groups[names]), ""])
    LIST.write_text(text)
    print(f"start-order: {ran} runs, {len(users)} sections in {LIST.relative_to(runs.ROOT)}")


if __name__ == "__main__":
    main()
