#!/usr/bin/python3
"""Files side by side: what programs do to a file system (files.c), in a box of mote's and in Debian's QEMU microvm with
virtiofsd, with the same kernel, memory and time-outs, by turns in one run. `make bench-fs` runs this. Beside them, as
what the guest's kernel costs by itself, the same box on a tmpfs of its own.

The host's files are in its memory, so that the way to them is measured, and no disk. As `make bench`, it measures time
where /dev/kvm is complete, and else counts instructions in a lab (lab.py). Above 1 is better than QEMU."""

import argparse
import shutil
import sys

import pairs
import runs
from vmms import ROWS, Machine, Run, mote, mote_spec, qemu_virtiofs

# What files.c times.
FIGURES = {
    "install": "write a small file of a new tree",
    "walk": "find a file of a tree, cold, by `readdir`",
    "stat": "`stat` of each, cold",
    "stat_later": "`stat` of each once more, 2 s later",
    "write": "write a MiB of 32, in order",
    "read": "read a MiB of 32, in order, cold",
    "random": "read 4 KiB of 32 MiB at random, cold",
    "exec": "run a program of 2 MB, cold",
    "exec_again": "run it again",
}
# In the lab a guest that works for seconds at a stretch now and then spins for ever.
TREE_FILES, COUNTED_TREE_FILES = 20000, 2000


def emptied(stage, run):
    """What the last run has written is gone. The tree is the host's work."""
    root = stage.path("root")
    run.prepare = [*run.prepare, ["rm", "-rf", f"{root}/work"], ["mkdir", f"{root}/work"],
                   [f"{root}/entrypoint", "tree", f"{root}/work/tree"]]
    return run


def qemu_files(stage, machine):
    return emptied(stage, qemu_virtiofs(stage, machine))


def mote_files(stage, machine):
    return emptied(stage, mote(stage, machine))


def mote_on_tmpfs(stage, machine):
    spec = mote_spec(stage, machine)
    spec["entrypoint"]["args"] = ["tmpfs"]
    return emptied(stage, Run([stage.path("bin/mote"), "--config-file", stage.write("mote-tmpfs.json", spec)]))


def build(stage):
    runs.build(stage, [ROWS["qemu-virtiofs"]])
    files = COUNTED_TREE_FILES if stage.counted else TREE_FILES
    runs.compile_static("files", stage.directory / "root/entrypoint", f"-DTREE_FILES={files}")
    shutil.copy("/bin/busybox", stage.directory / "root/busybox")


BENCH = pairs.Bench(
    name="bench-fs", saved="resources/bench/files.json", mode="figures", machine=Machine(memory_mib=512), figures=FIGURES, build=build,
    rows={"qemu-virtiofs": (ROWS["qemu-virtiofs"].name, qemu_files), "mote": ("mote", mote_files),
          "mote-tmpfs": ("mote, on the guest's tmpfs", mote_on_tmpfs)},
    base="qemu-virtiofs", setting=f"The tree has {TREE_FILES:,} files, in the lab {COUNTED_TREE_FILES:,}. The host's files are in its memory, the caches of \"cold\" rows are the guest's")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    sys.exit(BENCH.main(parser))
