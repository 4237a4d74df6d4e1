#!/usr/bin/python3
"""Files side by side: what programs do to a file system (files.c), in a box of mote's and in Debian's QEMU microvm with
virtiofsd, with the same kernel, memory and cache policy, by turns in one run. `make bench-fs` runs this. Beside them, as
what the guest's kernel costs by itself, the same box on a tmpfs of its own.

The host's files are in its memory, so that the way to them is measured, and no disk. As `make bench`, it measures time
where /dev/kvm is complete, and else counts instructions in a lab (lab.py). Above 1 is better than QEMU."""

import argparse
import shutil
import sys

import pairs
import runs
from vmms import ROWS, Machine, Run, mote, mote_spec, qemu_virtiofs

# What files.c times, and how often it does what it times.
FIGURES = {
    "install": ("write a small file of a new tree", 1000),
    "walk": ("walk over 20,000 files, cold", 20000),
    "stat": ("`stat` of 20,000 files, cold", 20000),
    "stat_later": ("`stat` once more, 2 s later", 4000),
    "write": ("write a MiB of 64, in order", 64),
    "read": ("read a MiB of 64, in order, cold", 64),
    "random": ("read 4 KiB of 64 MiB at random, cold", 1024),
    "exec": ("run a program of 2 MB, cold", 1),
    "exec_again": ("run it again", 20),
}


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
    runs.compile_static("files", stage.directory / "root/entrypoint")
    shutil.copy("/bin/busybox", stage.directory / "root/busybox")


BENCH = pairs.Bench(
    name="bench-fs", saved="resources/bench/files.json", mode="figures", machine=Machine(memory_mib=512), figures=FIGURES, build=build,
    rows={"qemu-virtiofs": (ROWS["qemu-virtiofs"].name, qemu_files), "mote": ("mote", mote_files),
          "mote-tmpfs": ("mote, on the guest's tmpfs", mote_on_tmpfs)},
    base="qemu-virtiofs", rounds=2, setting="The host's files are in its memory, the caches of \"cold\" are the guest's")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    sys.exit(BENCH.main(parser))
