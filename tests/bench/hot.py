"""Where the instructions of a start go: by process and thread, from the kernel's own accounting, and by symbol of the
lab's kernel, the guest's and mote, as profile.c counts them."""

import base64
import bisect
import gzip
import json
import os
import pathlib
import re
import shutil
import subprocess
from collections import Counter

from vmms import Machine, Run, mote

HERE = pathlib.Path(__file__).resolve().parent
PHASES = [("vmrun", "until the first `KVM_RUN`"), ("init", "from there until `init`"), ("2", "from there until the entrypoint runs"),
          ("4", "from there until nothing is left")]
LONGEST = 24
KERNEL = 0xffff800000000000

SYMBOLS = "SYMBOLS"


def prepare(stage):
    """What the guest needs besides, to say its kernel's symbols."""
    shutil.copy("/bin/busybox", stage.directory / "root/busybox")


def commands(stage, case):
    """Runs that say the symbols, fill the caches, and count: the last one's counts stay."""
    box = mote(stage, Machine())
    spec = json.loads((stage.directory / pathlib.Path(box.command[-1]).name).read_text())
    spec["entrypoint"] = {"executable": "/busybox", "args": ["cat", "/proc/kallsyms"], "env": []}
    spec["exec_socket_path"] = ""
    show = Run([box.command[0], "--config-file", stage.write("symbols.json", spec)])
    packed = "gzip | base64; echo " + SYMBOLS + " end"
    return [
        f"echo {SYMBOLS} host; cat /proc/kallsyms | {packed}",
        f"echo {SYMBOLS} guest; MOTE_TEMPLATES=off {' '.join(map(str, show.command))} | {packed}",
        case("start").command(stage), case("processes").command(stage), case("start").command(stage),
    ]


def build_plugin(to):
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", "-o", to, HERE / "profile.c"], check=True)


class Symbols:
    """Functions by address."""

    def __init__(self, pairs):
        pairs = sorted(pairs)
        self.addresses = [address for address, _ in pairs]
        self.names = [name for _, name in pairs]

    def address(self, name):
        return self.addresses[self.names.index(name)]

    def name(self, address):
        place = bisect.bisect_right(self.addresses, address) - 1
        return self.names[place] if place >= 0 else f"{address:#x}"


def kernel_symbols(packed):
    text = gzip.decompress(base64.b64decode(packed)).decode()
    fields = (line.split() for line in text.splitlines())
    return Symbols((int(address, 16), name) for address, kind, name, *_ in fields if kind in "tTwW")


def program_symbols(path):
    """Those of a program, relative to where it is loaded, and its entry point."""
    text = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    pairs = re.findall(r"^([0-9a-f]+) [tTwW] (.*)$", text, re.M)
    header = subprocess.run(["readelf", "-h", path], capture_output=True, text=True, check=True).stdout
    entry = int(re.search(r"Entry point address:\s*(0x[0-9a-f]+)", header)[1], 16)
    # The hash at a Rust symbol's end says nothing to readers.
    return Symbols((int(address, 16), re.sub(r"::h[0-9a-f]{16}$", "", name)) for address, name in pairs), entry


def read_counts(path):
    """Instructions by address space and address."""
    counts = Counter()
    for line in path.read_text().splitlines():
        space, address, instructions = line.split()
        counts[space, int(address, 16)] += int(instructions)
    return counts


def load_address(counts, symbols, entry):
    """Where mote was loaded: its entry point ran, and most code that ran elsewhere is in it from there on."""
    if not symbols.addresses:
        return 0
    low, high = symbols.addresses[0], symbols.addresses[-1]
    user = sorted({address for space, address in counts if space != "guest" and address < KERNEL})
    bases = {address - entry for address in user if (address - entry) % 4096 == 0}
    return max(bases, default=0, key=lambda base: bisect.bisect(user, base + high) - bisect.bisect(user, base + low))


def by_symbol(counts, host, guest, program, base):
    """Instructions by place and function."""
    sums = Counter()
    low, high = (base + program.addresses[place] for place in (0, -1)) if program.addresses else (0, 0)
    for (space, address), instructions in counts.items():
        if space == "guest":
            key = ("guest kernel", guest.name(address)) if address >= KERNEL else ("guest programs", "all")
        elif address >= KERNEL:
            key = ("host kernel", host.name(address))
        elif low <= address <= high:
            key = ("mote, its virtiofsd and janitor", program.name(address - base))
        else:
            key = ("other host programs", "all")
        sums[key] += instructions
    return sums


def millions(instructions):
    return f"{instructions / 1e6:.2f}"


def profile(lab, stage, case, program, table):
    """Runs it, and returns the text."""
    plugin, out = lab.work / "profile.so", lab.work / "counts"
    build_plugin(plugin)
    packed, which, threads, ran = {}, None, {}, 0
    for line in lab.boot(commands(stage, case), f"{plugin},out={out}", ()):
        if line.startswith(SYMBOLS):
            which = line.split()[1]
        elif which in ("host", "guest") and re.fullmatch(r"[A-Za-z0-9+/=]+", line):
            packed[which] = packed.get(which, "") + line
        elif line.startswith("RUN "):
            ran += 1
            threads |= {name.removeprefix("cpu."): int(value) for name, value in re.findall(r"(cpu\.\S+)=(\d+)", line)}
        elif line:
            print(line)
    if ran != 3:
        raise RuntimeError("the profile's lab did not get to its end; run it again")
    host, guest = kernel_symbols(packed["host"]), kernel_symbols(packed["guest"])
    mote_symbols, entry = program_symbols(program)
    counts = [read_counts(pathlib.Path(f"{out}.{phase}")) for phase, _ in PHASES]
    base = load_address(counts[-1], mote_symbols, entry)
    sums = [by_symbol(count, host, guest, mote_symbols, base) for count in counts]
    # Each file counts from the start on; a phase is what has come to the one before.
    phases = [sums[0], *(later - earlier for earlier, later in zip(sums, sums[1:]))]
    parts = ["CPU time until the entrypoint runs, by thread, in million instructions (a vCPU's includes its guest).",
             table(["thread", "million"], [[name, millions(ns)] for name, ns in sorted(threads.items(), key=lambda item: -item[1])])]
    places = sorted({place for phase in phases for place, _ in phase})
    totals = [[place, *(millions(sum(count for (at, _), count in phase.items() if at == place)) for phase in phases)] for place in places]
    parts += ["Where it ran, in million instructions.", table(["", *(name for _, name in PHASES)], totals)]
    for place in places:
        for phase, (_, when) in zip(phases, PHASES):
            most = Counter({name: count for (at, name), count in phase.items() if at == place}).most_common(LONGEST)
            if len(most) > 1:
                parts += [f"{place}, {when}", table(["function", "million"], [[f"`{name}`", millions(count)] for name, count in most])]
    return "\n\n".join(parts)


def program_with_symbols(root, *linker_arguments):
    """mote, built once more with its symbols, which the release has not."""
    if "MOTE_BENCH_UNSTRIPPED" in os.environ:
        return pathlib.Path(os.environ["MOTE_BENCH_UNSTRIPPED"])
    target = root / "target/profile"
    subprocess.run(["cargo", "rustc", "--bin", "mote", "--locked", "--release", "--config", 'profile.release.strip="none"', "--target-dir", target,
                    "--", *(f"-Clink-arg={argument}" for argument in linker_arguments)], cwd=root, check=True)
    return next(target.glob("*/release/mote"))
