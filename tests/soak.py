#!/usr/bin/python3
"""Boots boxes with faults at random moments, checks each exit code against what its fault allows, and
after each boot that nothing is left of it.

    soak.py --boots 1000 --seed 7 --parallel 2     run them, where boxes can run, and print a table
    soak.py --from 200 --to 300 --seed 7           those of a seed, counted from 0, and no others
    soak.py --results FILE …                       go on with what the file lacks, and add to it
    soak.py --summary FILE [FILE…]                 the table of such files

What happens in boot i of a seed depends on nothing else. On a machine whose /dev/kvm is not complete the
boots run in the lab, in chunks: one that hangs costs itself, and its boots are run again. The exit code
is 1 if a code was wrong or anything was left."""

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
MOTE = os.environ.get("MOTE", str(HERE.parent / "target/release/mote"))
CGROUPS = pathlib.Path("/sys/fs/cgroup/a3s-box")
# Boxes start from templates but for the first of each shape, and whoever comes after it was removed; with `off` they all
# boot.
TEMPLATES = os.environ.get("MOTE_TEMPLATES", "/dev/shm/mote-soak-templates")
# Far beyond any boot.
BOOT_LIMIT_S = 120
# How long after a signal mote stops a box hard.
STOP_LIMIT_S = 8
# How long the leftovers of a killed mote may take to go.
LEFTOVER_LIMIT_S = 20
# A template is made when nothing else runs, and nobody waits for it.
MAKER_LIMIT_S = 300
# Faults hit a box between its first instruction and well after its boot: every other one early in it.
EARLY_S = 0.8
MOMENT_S = 5
# Boots between two checks of what belongs to no single box.
ROUND = 8

APPLETS = ["sh", "cat", "echo", "sleep", "kill", "seq", "dd", "touch", "true", "mount"]


class Box:
    """One boot: its directory, its spec, the faults it is hit with, and how it ended."""

    def __init__(self, work, seed, number):
        self.random = random.Random(f"{seed}:{number}")
        self.seed = seed
        self.number = number
        self.name = f"soak-{number:06}"
        self.dir = work / self.name
        self.environment = {"PATH": os.environ["PATH"], "TMPDIR": str(self.dir / "tmp"), "MOTE_TEMPLATES": TEMPLATES}
        self.events = []
        self.signalled_at = None
        # Codes that are right as well when the end came no sooner than mote's limit after a signal.
        self.allowed_late = set()
        self.helpers = []
        limits = {"cpu_shares": 1024} if self.random.random() < 0.5 else {}
        self.spec = {
            "box_id": self.name, "vcpus": 1, "memory_mib": 96, "rootfs_path": str(self.dir / "root"),
            "exec_socket_path": str(self.dir / "sock/exec.sock"),
            "pty_socket_path": str(self.dir / "sock/pty.sock"),
            "fs_mounts": [], "workdir": "/",
            "entrypoint": {"executable": "/bin/sh", "args": [], "env": []},
            "resource_limits": limits,
            "console_output": str(self.dir / "console.log"),
        }

    # ---- what a fault is made of ----

    def script(self, text):
        self.spec["entrypoint"]["args"] = ["-c", text]

    def forever(self):
        # Not a shell's child: a signal to the box ends it by that signal.
        self.script("exec sleep 100000")

    def moment(self):
        return self.random.uniform(0, self.random.choice([EARLY_S, MOMENT_S]))

    def at(self, after_s, act):
        """Has something happen after a time, if the box is there that long."""
        self.events.append((after_s, act))

    def send(self, number):
        def act(mote):
            self.signalled_at = self.signalled_at or time.monotonic()
            mote.send_signal(number)
        return act

    def code(self):
        return self.random.randrange(256)

    # ---- its life ----

    def run(self, fault):
        for sub in ["tmp", "sock"]:
            (self.dir / sub).mkdir(parents=True)
        make_tree(self.dir / "root", self.dir.parent / "busybox")
        self.streams = {"stdout": subprocess.DEVNULL, "stderr": open(self.dir / "stderr", "wb")}
        allowed = fault(self)
        started = time.monotonic()
        mote = subprocess.Popen(
            [MOTE, "--config", json.dumps(self.spec), "--outcome", str(self.dir / "outcome.json"),
             "--timeline", str(self.dir / "timeline.json")],
            stdin=subprocess.DEVNULL, env=self.environment, **self.streams)
        if not isinstance(self.streams["stderr"], int):
            self.streams["stderr"].close()
        for after_s, act in sorted(self.events, key=lambda event: event[0]):
            try:
                mote.wait(max(0, started + after_s - time.monotonic()))
                break
            except subprocess.TimeoutExpired:
                act(mote)
        try:
            code = mote.wait(BOOT_LIMIT_S)
        except subprocess.TimeoutExpired:
            mote.kill()
            mote.wait()
            code = "hung"
        if self.signalled_at and time.monotonic() - self.signalled_at >= STOP_LIMIT_S:
            allowed |= self.allowed_late
        for helper in self.helpers:
            helper.kill()
            helper.wait()
        left = eventually_none(self.left)
        stderr = (self.dir / "stderr").read_text(errors="replace")
        outcome = self.written("outcome.json")
        wrong = code not in allowed or not self.agrees(code, outcome)
        result = {
            "seed": self.seed, "boot": self.number, "fault": fault.__name__, "code": code, "kind": outcome.get("kind"),
            "template": self.written("timeline.json").get("template"),
            "seconds": round(time.monotonic() - started, 2), "wrong": wrong, "left": left,
        }
        if wrong:
            result["allowed"] = sorted(map(str, allowed))
        if wrong or left:
            result["stderr"] = stderr[-2000:]
            result["console"] = self.console()[-2000:]
        shutil.rmtree(self.dir)
        return result

    def written(self, name):
        """What mote has written to this file; a mote that was killed has written nothing."""
        try:
            return json.loads((self.dir / name).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def console(self):
        try:
            return (self.dir / "console.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def agrees(self, code, outcome):
        """Whether the outcome file says the same, or nothing."""
        return outcome.get("exit_code") == code if code != "hung" and code >= 0 else not outcome

    def left(self):
        """What is still there of this box."""
        found = [f"process {pid}: {name}" for pid, name in processes_of(self.dir)]
        for sub in ["tmp", "sock"]:
            found += [str(path) for path in (self.dir / sub).iterdir()]
        if (CGROUPS / self.name).exists():
            found.append(f"cgroup {self.name}")
        return found


def name_of(process):
    """A process's name."""
    return (process / "comm").read_text().strip()


def processes_of(directory):
    """Processes started for a box: its directory is in their environment or their command line."""
    needle = str(directory).encode() + b"/"
    found = []
    for process in pathlib.Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                told = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
                if needle in told:
                    found.append((int(process.name), name_of(process)))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                pass
    return found


def eventually_none(left, limit_s=LEFTOVER_LIMIT_S):
    deadline = time.monotonic() + limit_s
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


# ---- the faults: each prepares a box, and returns the exit codes that it allows ----

def none(box):
    code = box.code()
    box.script(f"exit {code}")
    return {code}


def entrypoint_killed(box):
    number = box.random.choice([1, 2, 6, 9, 11, 15])
    box.script(f"kill -{number} $$; sleep 1000")
    return {128 + number}


def stopped(number):
    def fault(box):
        box.forever()
        box.at(box.moment(), box.send(number))
        # In its first milliseconds mote has not taken over its signals, and dies of this one. An
        # entrypoint that was not yet started ends like one that was, unless the boot takes too long.
        box.allowed_late = {121}
        return {128 + number, -number}
    fault.__name__ = signal.Signals(number).name.lower()
    return fault


def sigkill(box):
    box.forever()
    box.at(box.moment(), box.send(signal.SIGKILL))
    return {-signal.SIGKILL}


def paused(box):
    code = box.code()
    box.script(f"sleep 0.5; exit {code}")
    for _ in range(box.random.randrange(1, 4)):
        at = box.moment()
        box.at(at, box.send(signal.SIGSTOP))
        box.at(at + box.random.uniform(0, 0.5), box.send(signal.SIGCONT))
    # However the pauses overlap, the last signal is SIGCONT.
    box.at(MOMENT_S + 0.5, box.send(signal.SIGCONT))
    return {code}


def virtiofsd_killed(box):
    box.forever()
    which = box.random.random()

    def kill(mote):
        # Repeatedly, since in the first moments there is no virtiofsd.
        deadline = time.monotonic() + BOOT_LIMIT_S
        while mote.poll() is None and time.monotonic() < deadline:
            pids = [pid for pid, name in processes_of(box.dir) if name == "virtiofsd"]
            if pids:
                try:
                    os.kill(pids[int(which * len(pids))], signal.SIGKILL)
                    return
                except ProcessLookupError:
                    pass
            time.sleep(0.002)
    box.at(box.moment(), kill)
    # 125 until virtiofsd has answered mote for the first time, 124 from then on.
    return {124, 125}


def maker_killed(box):
    code = box.code()
    box.script(f"sleep 1; exit {code}")
    if TEMPLATES != "off":
        shutil.rmtree(TEMPLATES, ignore_errors=True)
    # The makers of other boxes, too.
    box.at(box.moment(), lambda _: subprocess.run(["pkill", "-KILL", "-x", "mote-template"]))
    return {code}


def client_killed(box):
    code = box.code()
    box.script(f"sleep 1; exit {code}")
    command = box.random.choice([["dd", "if=/dev/zero", "bs=65536"], ["sleep", "1000"], ["seq", "100000000"]])

    def connect(_):
        box.helpers.append(subprocess.Popen(
            [MOTE, "exec", box.spec["exec_socket_path"], "--", *command], env=box.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    at = box.moment()
    box.at(at, connect)
    box.at(at + box.moment() / 2, lambda _: box.helpers[0].kill())
    return {code}


def output_closed(box):
    code = box.code()
    box.script(f"seq 20000; sleep 0.2; seq 20000; seq 20000 >&2; exit {code}")
    box.spec["console_output"] = None
    reader, writer = os.pipe()
    box.streams["stderr"].close()
    box.streams = {"stdout": writer, "stderr": writer}
    (box.dir / "stderr").touch()
    os.set_blocking(reader, False)

    def close(_):
        os.close(reader)
    box.at(0, lambda _: os.close(writer))
    box.at(box.moment(), close)
    # The box waits for a reader until it has gone.
    return {code}


def guest_panics(box):
    box.script("echo c >/proc/sysrq-trigger; sleep 1000")
    return {123}


def bad_spec(box):
    field, value = box.random.choice([
        ("vcpus", 0), ("vcpus", 65), ("memory_mib", 1), ("memory_mib", "x"), ("rootfs_path", "/no/such"),
        ("box_id", None), ("workdir", "relative"), ("exec_socket_path", "/run/" + "s" * 108),
        ("fs_mounts", [{"tag": "", "host_path": "/", "read_only": True}]), ("port_map", ["80"]),
        ("console_output", "/no/such/log"), ("tee_config", {}), ("user", 7),
        ("resource_limits", {"cpuset_cpus": "0-"}), ("network", {"passt_socket_path": 5}),
    ])
    box.spec[field] = value
    return {125}


def two_signals(box):
    # An entrypoint that ignores the first: it must be the second that ends it.
    box.script("trap '' TERM INT HUP QUIT; while :; do sleep 1; done")
    # Two different ones: the same one within a second is one request.
    first, second = box.random.sample([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT], 2)
    at = box.moment()
    box.at(at, box.send(first))
    box.at(at + box.random.uniform(0.001, 2), box.send(second))
    # By the first signal end: a mote that has not taken over its signals yet, and an entrypoint whose shell
    # has not set its traps yet.
    return {121, -first, 128 + first}


FAULTS = [
    none, entrypoint_killed, stopped(signal.SIGTERM), stopped(signal.SIGINT), sigkill, paused,
    virtiofsd_killed, maker_killed, client_killed, output_closed, guest_panics, bad_spec, two_signals,
]


# ---- what belongs to no single box ----

def shared_state():
    """Everything on this machine that boxes could leave behind, apart from their directories."""
    state = set()
    for process in pathlib.Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            state.update(f"namespace {os.readlink(link)}" for link in (process / "ns").iterdir())
            name = name_of(process)
            if name.startswith(("mote", "virtiofsd")):
                state.add(f"process {process.name}: {name}")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            pass
    state.update(f"mount {line}" for line in pathlib.Path("/proc/self/mounts").read_text().splitlines())
    if CGROUPS.exists():
        state.update(f"cgroup {path.name}" for path in CGROUPS.iterdir() if path.is_dir())
    for directory in ["/tmp", "/dev/shm"]:
        state.update(f"file {path}" for path in pathlib.Path(directory).iterdir() if "mote-" in path.name)
    return state


def make_tree(root, busybox):
    (root / "bin").mkdir(parents=True)
    os.link(busybox, root / "bin/busybox")
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")


def run_here(numbers, seed, parallel, report):
    work = pathlib.Path(f"/run/mote-soak-{os.getpid()}")
    work.mkdir()
    shutil.copy("/bin/busybox", work / "busybox")
    numbers = list(numbers)
    try:
        with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
            def boot(number):
                box = Box(work, seed, number)
                report(box.run(box.random.choice(FAULTS)))
            before = shared_state() | {f"file {TEMPLATES}"}
            for start in range(0, len(numbers), ROUND):
                some = numbers[start:start + ROUND]
                for future in [pool.submit(boot, number) for number in some]:
                    future.result()
                eventually_none(lambda: subprocess.run(["pgrep", "-x", "mote-template"], capture_output=True).stdout, MAKER_LIMIT_S)
                left = eventually_none(lambda: sorted(shared_state() - before))
                if left:
                    report({"boots": some, "left": left})
                    # Each leftover is reported once.
                    before |= set(left)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run_in_lab(numbers, arguments, report):
    """Chunks of boots, each in a lab of its own; what a lab that hangs has not reported is run again."""
    missing = list(numbers)
    environment = {**os.environ, "LAB_ATTEMPTS": "1", "LAB_LIMIT_S": str(60 + 20 * arguments.chunk)}
    fruitless = 0
    while missing:
        chunk = missing[:arguments.chunk]
        command = [str(HERE / "lab/lab.sh"), str(HERE / "soak.py"), "--seed", arguments.seed,
                   "--parallel", str(arguments.parallel), "--numbers", ",".join(map(str, chunk))]
        lab = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               text=True, errors="replace")
        done = set()
        try:
            for line in lab.stdout:
                # The last line of a lab that is ended may be half a line.
                if line.startswith("{") and line.endswith("}\n"):
                    result = json.loads(line)
                    done.add(result.get("boot"))
                    report(result)
        finally:
            lab.terminate()
            lab.wait()
        missing = [number for number in missing if number not in done]
        fruitless = 0 if done else fruitless + 1
        if fruitless == 5:
            sys.exit("soak: five labs in a row ended before their first boot")


# ---- results ----

def summary(results):
    """Prints the table; returns whether all is well."""
    boots = {(result["seed"], result["boot"]): result for result in results if "boot" in result}
    rows = collections.defaultdict(list)
    for result in boots.values():
        rows[result["fault"]].append(result)
    print(f"{'fault':<18} {'boots':>5} {'wrong':>5} {'left':>5}  exit codes (times)")
    for fault, of_fault in sorted(rows.items()):
        codes = collections.Counter(str(result["code"]) for result in of_fault)
        wrong = sum(result["wrong"] for result in of_fault)
        left = sum(bool(result["left"]) for result in of_fault)
        shown = ", ".join(f"{code} ({times})" for code, times in codes.most_common(8))
        more = f", and {len(codes) - 8} other codes" if len(codes) > 8 else ""
        print(f"{fault:<18} {len(of_fault):>5} {wrong:>5} {left:>5}  {shown}{more}")
    wrong = [result for result in boots.values() if result["wrong"]]
    left = [result for result in results if result["left"]]
    for result in wrong + [result for result in left if result not in wrong]:
        print(json.dumps(result))
    used = sum(result.get("template") == "used" for result in boots.values())
    print(f"{len(boots)} boots: {len(wrong)} wrong exit codes, {len(left)} leftovers; {used} have told that they started from a template")
    return bool(boots) and not wrong and not left


def read_results(paths):
    lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boots", type=int, default=100)
    parser.add_argument("--from", type=int, dest="first", default=0)
    parser.add_argument("--to", type=int, dest="end")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=100, help="boots in one lab")
    parser.add_argument("--results", type=pathlib.Path)
    parser.add_argument("--summary", type=pathlib.Path, nargs="+")
    # What a chunk of the lab is asked for: these boots, here.
    parser.add_argument("--numbers", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.summary:
        sys.exit(not summary(read_results(arguments.summary)))

    # An exit runs the clean-up, which ends the boots that are under way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    lock = threading.Lock()
    results = read_results([arguments.results]) if arguments.results else []

    def report(result):
        line = json.dumps(result)
        with lock:
            results.append(result)
            if arguments.results:
                with open(arguments.results, "a") as file:
                    file.write(line + "\n")
            print(line, flush=True)

    if arguments.numbers:
        run_here(map(int, arguments.numbers.split(",")), arguments.seed, arguments.parallel, report)
        return
    end = arguments.first + arguments.boots if arguments.end is None else arguments.end
    known = {result.get("boot") for result in results if result.get("seed") == arguments.seed}
    numbers = [number for number in range(arguments.first, end) if number not in known]
    complete = subprocess.run([MOTE, "probe"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if complete.returncode == 0:
        run_here(numbers, arguments.seed, arguments.parallel, report)
    else:
        run_in_lab(numbers, arguments, report)
    sys.exit(not summary(results))


main()
