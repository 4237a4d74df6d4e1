#!/usr/bin/python3
"""Whether mote leaks: its own memory and its open descriptors while a program in the box floods the
host with vsock connections (tests/boots/flood.c), and over many commands on the exec socket, one after
the other. `make soak-flood` runs this where boxes can run.

    flood.py [SECONDS [COMMANDS]]     600 and 1000, if not said otherwise

Memory is RssAnon and RssFile: the guest's own is shared memory, and counts as RssShmem. Fails when the
second half of the samples is above the first by more than GROWTH_KIB, or their largest above the
smallest by more than SPREAD_KIB, or when descriptors are left."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

SECONDS = int(sys.argv[1]) if len(sys.argv) > 1 else 600
COMMANDS = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
MOTE = os.environ.get("MOTE", "target/release/mote")
SAMPLE_S = 5 if SECONDS >= 120 else 1
# Pages that the allocator and the program use for the first time.
GROWTH_KIB = 512
# Connection tables that come and go with the flood: 4,096 connections of some hundred bytes.
SPREAD_KIB = 8 * 1024
# Connections that are on their way when a sample is taken.
DESCRIPTORS = 16

DATA = 1


def fail(message):
    sys.exit(f"flood: {message}")


def make_root(work):
    root = work / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for applet in "sh", "sleep", "echo":
        (root / "bin" / applet).symlink_to("busybox")
    source = pathlib.Path(__file__).parent / "boots/flood.c"
    subprocess.run(["musl-gcc", "-O1", "-static", "-o", root / "bin/flood", source], check=True)
    return root


class Box:
    """A box whose entrypoint is this command, and has printed the word that it is ready."""

    def __init__(self, command, ready):
        self.work = pathlib.Path(tempfile.mkdtemp(prefix="mote-flood.", dir="/run"))
        self.socket = self.work / "exec.sock"
        spec = {
            "box_id": "flood", "vcpus": 1, "memory_mib": 256, "rootfs_path": str(make_root(self.work)),
            "exec_socket_path": str(self.socket), "fs_mounts": [], "workdir": "/",
            "entrypoint": {"executable": command[0], "args": command[1:], "env": []},
        }
        self.mote = subprocess.Popen(
            [MOTE, "--config", json.dumps(spec)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        if self.mote.stdout.readline() != ready + "\n":
            fail(f"the box ended with {self.mote.wait()} before it said {ready!r}")

    def sample(self):
        """Memory in KiB, and descriptors."""
        if self.mote.poll() is not None:
            fail(f"the box ended with {self.mote.returncode}")
        status = pathlib.Path(f"/proc/{self.mote.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        memory = sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
        return memory, len(os.listdir(f"/proc/{self.mote.pid}/fd"))

    def command(self):
        """Runs a command as the box runtime does, and checks its answer."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(self.socket))
            request = json.dumps({"cmd": ["echo", "served"], "timeout_ns": 10**10}).encode()
            client.sendall(bytes([DATA]) + len(request).to_bytes(4, "big") + request)
            answer = b""
            while part := client.recv(65536):
                answer += part
        reply = json.loads(answer[5:])
        if (bytes(reply["stdout"]), reply["exit_code"]) != (b"served\n", 0):
            fail(f"a command answered {reply}")

    def end(self):
        self.mote.send_signal(signal.SIGTERM)
        if (code := self.mote.wait(timeout=30)) != 143:
            fail(f"mote ended with {code} after SIGTERM")
        if left := [path.name for path in self.work.iterdir() if path.name != "root"]:
            fail(f"mote left {left}")
        shutil.rmtree(self.work)


def judge(what, samples):
    """Prints what was seen, and fails if it grew."""
    memory, descriptors = zip(*samples)
    half = len(samples) // 2
    growth = max(memory[half:]) - max(memory[:half])
    print(f"{what}: {len(samples)} samples", flush=True)
    for name, values in ("memory in KiB", memory), ("descriptors", descriptors):
        print(f"  {name:15}first {values[0]}, last {values[-1]}, least {min(values)}, most {max(values)}")
    print(f"  most memory in the second half less most in the first: {growth} KiB", flush=True)
    if growth > GROWTH_KIB or max(memory) - min(memory) > SPREAD_KIB:
        fail(f"{what}: memory grew: {memory}")
    if max(descriptors) - min(descriptors) > DESCRIPTORS:
        fail(f"{what}: descriptors grew: {descriptors}")


def flood():
    box = Box(["/bin/flood"], "flooding")
    samples, end = [], time.monotonic() + SECONDS
    while time.monotonic() < end or len(samples) < 4:
        time.sleep(SAMPLE_S)
        box.command()
        samples.append(box.sample())
    judge(f"{SECONDS} s of flood", samples)
    box.end()


def commands():
    box = Box(["/bin/sh", "-c", "echo ready; exec sleep 1000000"], "ready")
    # What the first commands need stays allocated.
    for _ in range(10):
        box.command()
    samples = []
    for number in range(COMMANDS):
        box.command()
        if number % max(COMMANDS // 50, 1) == 0:
            samples.append(box.sample())
    samples.append(box.sample())
    judge(f"{COMMANDS} commands", samples)
    box.end()


flood()
commands()
