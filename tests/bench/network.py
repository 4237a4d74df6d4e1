#!/usr/bin/python3
"""The network side by side: mote without a network of its own (TSI), mote on passt, and Debian's QEMU
microvm on passt with the same kernel, memory and root file system, in one run. `make bench-net` runs
this where boxes can run.

The guest's peer is in a network namespace of this run's, on an address that is not loopback. Numbers
of the lab are not hardware's, so all are given as ratios to QEMU; above 1 is better, for times too."""

import asyncio
import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time

HOST = "198.51.100.1"
GUEST, GATEWAY, PREFIX, MAC = "10.77.0.2", "10.77.0.1", 24, (2, 66, 10, 77, 0, 2)
MTU = 65520  # what passt tells its guests by DHCP
MEMORY_MIB = 512
SECONDS = int(os.environ.get("MOTE_BENCH_SECONDS", "5"))
DOWNLOAD_MIB = int(os.environ.get("MOTE_BENCH_MIB", "1024"))
ROW_LIMIT_S = 600

CONNECTIONS = 200

SETUP = f"""
link set lo up
link add outside type veth peer name beyond
link set beyond up
link set outside up
address add {HOST}/24 dev outside
route add default dev outside
"""

# What runs in each guest. It says lines of JSON.
CLIENT = """
import asyncio, hashlib, json, socket, subprocess, sys, time
HOST, SECONDS, CONNECTIONS, MIB = sys.argv[1], *map(int, sys.argv[2:])

def say(**values):
    print(json.dumps(values), flush=True)

def iperf(*more):
    done = subprocess.run(["iperf3", "-c", HOST, "-t", str(SECONDS), "-J", *more], capture_output=True)
    end = json.loads(done.stdout)
    if "error" in end:
        sys.exit("iperf3: " + end["error"])
    return end["end"]["sum_received"]["bits_per_second"]

def talk():
    with socket.create_connection((HOST, 7), timeout=60) as conn:
        conn.sendall(b"x")
        assert conn.recv(1) == b"x"

async def talk_later():
    reader, writer = await asyncio.open_connection(HOST, 7)
    writer.write(b"x")
    assert await reader.readexactly(1) == b"x"
    writer.close()

async def talk_at_once():
    await asyncio.gather(*(talk_later() for _ in range(CONNECTIONS)))

def timed(work):
    start = time.monotonic()
    work()
    return time.monotonic() - start

def available():
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))

say(upload=iperf(), download=iperf("-R"))
talk()
say(sequential=timed(lambda: [talk() for _ in range(CONNECTIONS)]))
say(concurrent=timed(lambda: asyncio.run(talk_at_once())))
say(before=available())
digest = hashlib.sha256()
def download():
    with socket.create_connection((HOST, 8)) as conn:
        while data := conn.recv(1 << 18):
            digest.update(data)
taken = timed(download)
say(after=available(), transfer=MIB / taken, sha256=digest.hexdigest())
"""

# PID 1 under QEMU: what mote's agent does for a box.
INIT = f"""#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /tmp
ip link set lo up
ip link set eth0 mtu {MTU} up
ip address add {GUEST}/{PREFIX} dev eth0
ip route add default via {GATEWAY}
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
python3 /client.py {HOST} {SECONDS} {CONNECTIONS} {DOWNLOAD_MIB}
/busybox reboot -f
"""


class Missing(Exception):
    """A row that cannot run here, and why."""


def need(program, why):
    if not shutil.which(program):
        sys.exit(f"bench-net: {program} is missing ({why}); run 'make tools'")


def blocks():
    block = random.Random(1).randbytes(1 << 20)
    for number in range(DOWNLOAD_MIB):
        yield number.to_bytes(8, "big") + block[8:]


async def serve():
    async def echo(reader, writer):
        writer.write(await reader.read(1))
        await writer.drain()
        writer.close()

    async def give(_reader, writer):
        for block in blocks():
            writer.write(block)
            await writer.drain()
        writer.close()

    await asyncio.start_server(echo, HOST, 7, backlog=1024)
    await asyncio.start_server(give, HOST, 8)
    await asyncio.Event().wait()


def make_tree(work):
    root = work / "root"
    for name in ("root", "upper", "work"):
        (work / name).mkdir()
    layers = f"lowerdir={os.environ['MOTE_TEST_DEBIAN']},upperdir={work / 'upper'},workdir={work / 'work'}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, root], check=True)
    (root / "client.py").write_text(CLIENT)
    (root / "bench-init").write_text(INIT)
    (root / "bench-init").chmod(0o755)
    shutil.copy("/bin/busybox", root / "busybox")
    return root


def wait_for(path, process, name):
    while not path.exists():
        if process.poll() is not None:
            raise Missing(f"{name} ended with {process.returncode} before it was ready")
        time.sleep(0.01)


def passt(work):
    # It gives up root, and its socket's directory has to be open to who it is then.
    directory = pathlib.Path(tempfile.mkdtemp(dir=work))
    directory.chmod(0o777)
    path = directory / "passt.sock"
    process = subprocess.Popen(
        ["passt", "--foreground", "--quiet", "--socket", path, "--address", GUEST, "--netmask", str(PREFIX),
         "--gateway", GATEWAY, "--interface", "outside", "--ipv4-only", "--mtu", str(MTU)],
        stdin=subprocess.DEVNULL, stderr=(directory / "log").open("w"))
    try:
        wait_for(path, process, "passt")
    except Missing as reason:
        raise Missing(f"{reason}:\n{(directory / 'log').read_text()}") from None
    return process, path


def own_memory_kib(pid):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def cpu_time_s(pid):
    """What a process and those that it has started have used; a vCPU's time is its guest's, too."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = [child for task in pathlib.Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(map(cpu_time_s, children))


def run(name, command, helpers):
    """Runs a guest to its end; what its client said, and the memory and CPU time of the VMM and its helpers around the download."""
    values, said = {}, []
    if not shutil.which(command[0]):
        raise Missing(f"there is no {command[0]}; run 'make build'")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    limit = threading.Timer(ROW_LIMIT_S, process.kill)
    limit.start()
    try:
        for line in process.stdout:
            said.append(line)
            if not line.startswith("{"):
                continue
            # The figures come at the end; until then this says how far it is.
            print(f"bench-net: {name}: {line}", end="", file=sys.stderr, flush=True)
            values |= json.loads(line)
            if "before" in line or "after" in line:
                moment = "after" if "after" in line else "before"
                values[f"host_{moment}"] = sum(own_memory_kib(p.pid) for p in (process, *helpers))
                values[f"cpu_{moment}"] = sum(cpu_time_s(p.pid) for p in (process, *helpers))
        process.wait()
    finally:
        limit.cancel()
        process.kill()
    if "after" not in values:
        raise Missing(f"{name} ended with {process.returncode}:\n{''.join(said[-15:])}".rstrip())
    return values


def mote(work, root, network, helpers):
    binary = os.environ.get("MOTE", "target/release/mote")
    spec = {
        "box_id": "bench-net", "vcpus": 1, "memory_mib": MEMORY_MIB, "rootfs_path": str(root),
        "exec_socket_path": "", "fs_mounts": [], "workdir": "/", "network": network,
        # The peer is on an address of the host.
        "egress": [f"allow:{HOST}"],
        "entrypoint": {"executable": "python3", "env": [], "args": [
            "/client.py", HOST, str(SECONDS), str(CONNECTIONS), str(DOWNLOAD_MIB)]},
    }
    return run("mote + passt" if network else "mote (TSI)", [binary, "--config", json.dumps(spec)], helpers)


def mote_tsi(work, root):
    return mote(work, root, None, ())


def mote_passt(work, root):
    process, path = passt(work)
    try:
        network = {"passt_socket_path": str(path), "ip_address": GUEST, "gateway": GATEWAY,
                   "prefix_len": PREFIX, "mac_address": MAC, "dns_servers": []}
        return mote(work, root, network, (process,))
    finally:
        process.kill()
        process.wait()


def qemu_passt(work, root):
    process, path = passt(work)
    directory = pathlib.Path(tempfile.mkdtemp(dir=work))
    fs = subprocess.Popen([os.environ["MOTE_BENCH_VIRTIOFSD"], "--socket-path", directory / "fs.sock", "--shared-dir", root,
                           "--cache=auto", "--log-level=error"])
    try:
        wait_for(directory / "fs.sock", fs, "virtiofsd")
        return run("QEMU microvm + passt", [
            "qemu-system-x86_64", "-M", "microvm,accel=kvm,acpi=off,rtc=off,pit=off,pic=off,isa-serial=on",
            "-cpu", "host,tsc-deadline=on", "-smp", "1", "-m", f"{MEMORY_MIB}M", "-nodefaults",
            "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-kernel", os.environ["MOTE_BENCH_KERNEL"],
            "-append", "console=ttyS0 quiet reboot=t panic=-1 noreplace-smp swiotlb=noforce "
                       "root=root rootfstype=virtiofs rw init=/bench-init",
            "-global", "virtio-mmio.force-legacy=false",
            "-object", f"memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on", "-machine", "memory-backend=mem",
            "-chardev", f"socket,id=fs,path={directory / 'fs.sock'}", "-device", "vhost-user-fs-device,chardev=fs,tag=root",
            "-netdev", f"stream,id=net,server=off,addr.type=unix,addr.path={path}",
            "-device", "virtio-net-device,netdev=net,mac=" + ":".join(f"{byte:02x}" for byte in MAC),
        ], (process,))
    finally:
        for helper in (process, fs):
            helper.kill()
            helper.wait()


def report(results):
    base = results["QEMU microvm + passt"]
    faster = lambda key: lambda row: row[key] / base[key]
    shorter = lambda key: lambda row: base[key] / row[key]
    cpu_s = lambda row: row["cpu_after"] - row["cpu_before"]
    metrics = {
        "iperf3, to the guest": faster("download"),
        "iperf3, from the guest": faster("upload"),
        "one connection after another": shorter("sequential"),
        f"{CONNECTIONS} connections at once": shorter("concurrent"),
        f"{DOWNLOAD_MIB} MiB with sha256": faster("transfer"),
        "CPU time of it": lambda row: cpu_s(base) / cpu_s(row),
    }
    print(f"{'times QEMU, more is better':32}" + "".join(f"{name:>24}" for name in results))
    for metric, ratio in metrics.items():
        print(f"{metric:32}" + "".join(f"{ratio(row):24.2f}" for row in results.values()))
    for metric, before, after in (
        ("host memory over it, KiB", "host_before", "host_after"), ("guest memory over it, KiB", "after", "before"),
    ):
        print(f"{metric:32}" + "".join(f"{row[after] - row[before]:+24}" for row in results.values()))
    print(f"{'CPU time per GiB of it, s':32}" + "".join(f"{cpu_s(row) * 1024 / DOWNLOAD_MIB:24.1f}" for row in results.values()))


def main(work):
    for program, why in (("passt", "the peer"), ("iperf3", "throughput"),
                         ("qemu-system-x86_64", "what to compare with")):
        need(program, why)
    subprocess.run(["ip", "-batch", "-"], input=SETUP, text=True, check=True)
    root = make_tree(work)
    threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
    iperf = subprocess.Popen(["iperf3", "--server", "--bind", HOST], stdout=subprocess.DEVNULL)
    digest = hashlib.sha256()
    for block in blocks():
        digest.update(block)
    results, missing = {}, {}
    rows = {"QEMU microvm + passt": qemu_passt, "mote (TSI)": mote_tsi, "mote + passt": mote_passt}
    try:
        for name, row in rows.items():
            try:
                results[name] = row(work, root)
                if results[name]["sha256"] != digest.hexdigest():
                    missing[name] = f"the download of {DOWNLOAD_MIB} MiB arrived broken"
            except Missing as reason:
                missing[name] = str(reason)
    finally:
        iperf.kill()
        subprocess.run(["umount", root], check=False)
    if "QEMU microvm + passt" in results:
        report(results)
    for name, reason in missing.items():
        print(f"bench-net: {name} is missing: {reason}", file=sys.stderr)
    return 1 if missing else 0


if os.environ.get("MOTE_BENCH_INSIDE") != "1":
    # A network and mounts of its own, which go with it.
    os.environ["MOTE_BENCH_INSIDE"] = "1"
    os.execvp("unshare", ["unshare", "--net", "--mount", sys.executable, *sys.argv])
WORK = pathlib.Path(tempfile.mkdtemp(prefix="mote-bench.", dir="/run"))
WORK.chmod(0o755)
try:
    code = main(WORK)
finally:
    shutil.rmtree(WORK, ignore_errors=True)
sys.stdout.flush()
os._exit(code)  # the servers' thread goes on for ever
