#!/usr/bin/python3
"""Which functions of the guest's kernel boxes run, or have patched as it boots: resources/kernel/used-functions, which `make
used-functions` writes by this. The kernel's others are put apart (resources/kernel/cold-text.patch), and boxes map them from
a file. One that is missing here costs the boxes that run it a page fault, and nothing else."""

import json
import pathlib
import re

import hot
import runs
import start
from lab import Lab
from vmms import Machine, Run, Stage, mote

LIST = runs.ROOT / "resources/kernel/used-functions"
HEAD = """# Functions of the guest's kernel that boxes run, or have patched as it boots: written by `make used-functions`.
"""
UNTIL_NOTHING_IS_LEFT = "4"
# Where the kernel's text is, and with it everything that a boot patches.
END = "_etext"
TEXT = "ffffffff80000000-ffffffff81000000"
# What a shell's commands use of a kernel, before the benchmark's program runs in that box. More would not fit into the 2 MiB.
USUAL = """
/busybox mkdir /tmp/bin; /busybox --install -s /tmp/bin; export PATH=/tmp/bin
ls -l / /dev; ps; id; stat /tmp; cat /proc/meminfo /proc/self/maps /proc/self/status /proc/self/stat
dd if=/dev/zero of=/tmp/zeros bs=64k count=64; cp /tmp/zeros /share/zeros; cat /share/zeros | gzip | gunzip | md5sum
mkdir -p /share/a/b; tar -c -f /share/a/t.tar /tmp/bin; tar -t -f /share/a/t.tar | sort | uniq | wc -l; mv /share/a/t.tar /share/a/b/u.tar
ln -s b /share/a/c; ln /share/a/b/u.tar /share/a/v; chmod 600 /share/a/v; touch /share/a/v; readlink /share/a/c; rm -rf /share/a
mkdir /tmp/ram; mount -t tmpfs ram /tmp/ram; cp /busybox /tmp/ram/sh; /tmp/ram/sh -c "dd if=/dev/zero of=/tmp/ram/zeros bs=64k count=400; md5sum /tmp/ram/zeros"; umount /tmp/ram; nproc
mkfifo /tmp/fifo; (echo through >/tmp/fifo) & timeout 1 cat /tmp/fifo; wait
(timeout 1 nc -l -p 99 >/dev/null) & sleep 0.1; echo there | timeout 1 nc 127.0.0.1 99; wait; timeout 1 nc 198.51.100.1 9 </dev/null
sleep 100 & kill $!; wait; timeout 0.1 sleep 1; sh -c 'trap true USR1; kill -USR1 $$; ulimit -n 100'
"""


def usual(stage):
    """A run in which a shell runs these commands before the benchmark's program."""
    box = mote(stage, Machine())
    spec = json.loads((stage.directory / pathlib.Path(box.command[-1]).name).read_text())
    spec["entrypoint"] = {"executable": "/busybox", "args": ["sh", "-c", f"({USUAL}) >/dev/null 2>&1; exec /entrypoint"], "env": []}
    run = Run([box.command[0], "--config-file", stage.write("usual.json", spec)], box.environment)
    return runs.command(stage, "usual", "start", run)


def executed(lab, commands):
    """The names of the guest kernel's symbols, by address, and the addresses at which these runs were, or where they wrote."""
    plugin, out = lab.work / "profile.so", lab.work / "counts"
    hot.build_plugin(plugin)
    packed, which, addresses, ran = "", None, set(), 0
    for line in lab.boot(commands, f"{plugin},out={out},stores={TEXT}", ()):
        if line.startswith(hot.SYMBOLS):
            which = line.split()[1]
        elif which == "guest" and re.fullmatch(r"[A-Za-z0-9+/=]+", line):
            packed += line
        elif line.startswith("RUN "):
            ran += 1
            counts = hot.read_counts(pathlib.Path(f"{out}.{UNTIL_NOTHING_IS_LEFT}"))
            addresses |= {address for space, address in counts if space in ("guest", "stores") and address >= hot.KERNEL}
        elif line.startswith("FAIL "):
            raise RuntimeError(line)
    print(f"functions: {ran} runs")
    return hot.kernel_symbols(packed), addresses


def main():
    runs.prepare("used-functions", True)
    with runs.work_directory() as work:
        work = pathlib.Path(work)
        stage = Stage(work / "stage", "/bench")
        start.build(stage)
        hot.prepare(stage)
        cases = [start.Case("mote", Machine()), start.Case("mote", Machine(idle=True), "exec"), start.Case("mote", Machine(vcpus=2)),
                 start.Case("mote", Machine(memory_mib=4096)), *(start.Case("mote-template", machine) for machine in start.MANY)]
        _, guest, *_ = hot.commands(stage, lambda mode: start.Case("mote", Machine(), mode))
        commands = [guest, usual(stage), *(case.command(stage) for case in cases)]
        lab = Lab(work)
        lab.pack(stage.directory, [pathlib.Path(start.PASST)])
        symbols, addresses = executed(lab, commands)
    # The last symbol is the text's end, or of programs of BPF: what is behind it has no name.
    names = sorted({symbols.name(address) for address in addresses if address < symbols.address(END)})
    LIST.write_text(HEAD + "\n".join(names) + "\n")
    print(f"functions: {len(names)} in {LIST.relative_to(runs.ROOT)}")


if __name__ == "__main__":
    main()
