#!/usr/bin/python3
"""Start-up side by side: one busybox box under mote and the same kernel, memory and program under
Debian's QEMU microvm, alternating in one run. `make bench` runs this where boxes can run.

Each run is timed from its spawn to its end, with the program having said hello in between. mote runs
twice: as ever, and without its sandbox, for what that costs. QEMU runs twice: with the program in its
initramfs (no file system daemon at all), and with a virtiofsd of its own, as mote has. Times in the lab
are not hardware's; compare the rows of one run."""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
MEMORY_MIB = 256
MOTE = os.environ.get("MOTE", "target/release/mote")
KERNEL = os.environ["MOTE_BENCH_KERNEL"]
WORK = pathlib.Path(tempfile.mkdtemp(prefix="mote-bench.", dir="/run"))

INIT = """#!/bin/sh
/bin/busybox echo hello
/bin/busybox reboot -f
"""


def make_tree():
    root = WORK / "root"
    (root / "bin").mkdir(parents=True)
    (root / "dev").mkdir()
    shutil.copy("/bin/busybox", root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    names = subprocess.run(["find", ".", "-mindepth", "1"], cwd=root, capture_output=True, check=True).stdout
    cpio = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=names, capture_output=True, check=True)
    (WORK / "initramfs").write_bytes(cpio.stdout)
    return root


def timed(command, expected_code, **variables):
    environment = {**os.environ, **variables}
    start = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, env=environment)
    elapsed = time.monotonic() - start
    if b"hello" not in done.stdout or done.returncode != expected_code:
        sys.exit(f"bench: {command[0]} failed ({done.returncode}):\n{done.stdout.decode()}{done.stderr.decode()}")
    return elapsed


def mote(root, **variables):
    spec = {
        "box_id": "bench", "vcpus": 1, "memory_mib": MEMORY_MIB, "rootfs_path": str(root),
        "exec_socket_path": "", "fs_mounts": [], "workdir": "/",
        "entrypoint": {"executable": "/bin/busybox", "args": ["echo", "hello"], "env": []},
    }
    return timed([MOTE, "--config", json.dumps(spec), "--timeline", str(WORK / "timeline")], 0, **variables)


def mote_unconfined(root):
    return mote(root, MOTE_NO_SANDBOX="1")


def qemu(machine, append):
    return timed([
        "qemu-system-x86_64", "-M", "microvm,accel=kvm,acpi=off,rtc=off,pit=off,pic=off,isa-serial=on",
        "-cpu", "host,tsc-deadline=on", "-smp", "1", "-m", f"{MEMORY_MIB}M", "-nodefaults",
        "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", KERNEL,
        "-append", f"console=ttyS0 quiet reboot=t panic=-1 noreplace-smp swiotlb=noforce {append}", *machine,
    ], 0)


def qemu_initramfs(_root):
    return qemu(["-initrd", str(WORK / "initramfs")], "")


def qemu_virtiofs(root):
    socket = WORK / "fs.sock"
    daemon = subprocess.Popen(
        [os.environ["MOTE_BENCH_VIRTIOFSD"], "--socket-path", str(socket), "--shared-dir", str(root), "--cache=auto", "--log-level=error"])
    start = time.monotonic()
    while not socket.exists():
        time.sleep(0.001)
    waited = time.monotonic() - start
    elapsed = qemu([
        "-global", "virtio-mmio.force-legacy=false",
        "-object", f"memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on", "-machine", "memory-backend=mem",
        "-chardev", f"socket,id=fs,path={socket}", "-device", "vhost-user-fs-device,chardev=fs,tag=root",
    ], "root=root rootfstype=virtiofs rw init=/init")
    daemon.wait()
    return waited + elapsed


def main():
    root = make_tree()
    rows = {"mote (virtiofs)": mote, "mote (no sandbox)": mote_unconfined, "QEMU microvm (initramfs)": qemu_initramfs,
            "QEMU microvm (virtiofs)": qemu_virtiofs}
    times = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, run in rows.items():
            times[name].append(run(root))
    print(f"{'spawn to end, ms':28}{'min':>8}{'median':>8}{'max':>8}")
    for name, values in times.items():
        ms = [1000 * value for value in values]
        print(f"{name:28}{min(ms):8.0f}{statistics.median(ms):8.0f}{max(ms):8.0f}")
    print("mote's last timeline:", (WORK / "timeline").read_text().strip())


try:
    main()
finally:
    shutil.rmtree(WORK, ignore_errors=True)
