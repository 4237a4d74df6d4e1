#!/usr/bin/python3
"""Streams and commands side by side: the published ports and `mote exec` of a box, and the vsock of Debian's QEMU microvm by
vhost-vsock, where a server in the guest stands for an agent. `make bench-streams` runs this. The kernel, the memory and
the server (server.c) are the same, and so is the client (client.c), on the host; only what is between them is not: mote
serves vsock itself, QEMU's is served by the host's kernel, to programs that speak vsock, and without a sandbox.

As `make bench`, it measures time where /dev/kvm is complete, and else counts instructions in a lab (lab.py). Above 1 is
better than QEMU."""

import argparse
import sys

import pairs
import runs
from vmms import ROWS, Machine, Run, mote_spec, qemu_virtiofs

MACHINE = Machine(memory_mib=512)
PORTS = (7001, 7002, 7003)
CID = 3

FIGURES = {
    "round_trip": "round trip on one stream",
    "connection": "connection with a round trip",
    "download": "MiB from the guest, 1 stream",
    "downloads": "MiB from the guest, 16 streams",
    "upload": "MiB to the guest, 1 stream",
    "uploads": "MiB to the guest, 16 streams",
    "command": "command",
    "commands": "command, 100 at once",
}


def mote_ports(stage, machine):
    spec = mote_spec(stage, machine) | {"port_map": [f"{port}:{port}" for port in PORTS]}
    client = [stage.path("bin/client"), "tcp", "127.0.0.1", "--",
              stage.path("bin/mote"), "exec", stage.path("exec.sock"), "--", "/true", "exec"]
    return Run([stage.path("bin/mote"), "--config-file", stage.write("mote-streams.json", spec)], options=["-c", " ".join(client)])


def qemu_vsock(stage, machine):
    run = qemu_virtiofs(stage, machine)
    run.command += ["-device", f"vhost-vsock-device,guest-cid={CID}"]
    # An unknown word of the command line is an argument of init's, which passes it on.
    run.command[run.command.index("-append") + 1] += " vsock"
    run.options += ["-c", f"{stage.path('bin/client')} vsock {CID}"]
    return run


def build(stage):
    runs.build(stage, [ROWS["qemu-virtiofs"]])
    runs.compile_static("server", stage.directory / "root/entrypoint")
    runs.compile_static("client", stage.directory / "bin/client")
    runs.compile_bare("entrypoint", stage.directory / "root/true")


BENCH = pairs.Bench(
    name="bench-streams", saved="resources/bench/streams.json", mode="client", machine=MACHINE, figures=FIGURES, build=build,
    rows={"qemu-vsock": ("QEMU microvm + vhost-vsock", qemu_vsock), "mote": ("mote", mote_ports)}, base="qemu-vsock",
    setting="Times are the client's, on the host")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    sys.exit(BENCH.main(parser))
