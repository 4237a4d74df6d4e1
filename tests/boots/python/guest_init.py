#!/usr/bin/python3 -u
"""Stands in for the box runtime's guest init of 3.2 and 3.3: it does what that does by its published description, in
the same order, as far as these tests look. Of the exec protocol it has heartbeats, commands without streaming, and
signal-main. The main process is held back while there is a file `hold` in /workspace."""

import base64, ctypes, json, os, shutil, socket, struct, subprocess, tempfile, threading, time

RDONLY, NOSUID_NODEV_NOEXEC, REMOUNT, BIND, DETACH = 1, 2 | 4 | 8, 32, 4096, 2
libc = ctypes.CDLL(None, use_errno=True)


def checked(result, what):
    if result:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def mount(source, target, fstype, flags=0, data=""):
    os.makedirs(target, exist_ok=True)
    words = [word.encode() for word in (source, target, fstype)]
    checked(libc.mount(*words, flags, data.encode()), f"mount {source} on {target}")


def unmount(target, flags=0):
    checked(libc.umount2(target.encode(), flags), f"unmount {target}")
    os.rmdir(target)


def variables(name):
    n = 0
    while (value := os.environ.get(f"{name}_{n}")) is not None:
        yield n, value
        n += 1


# What to run, and where to say how it ended: the shares for that are gone before anything else runs.
status = None
if place := os.environ.get("BOX_BOOT_CONFIG_FILE"):
    assert place == "/run/a3s-box/boot/config.json"
    mount("a3s-terminal", "/run/a3s-box/terminal", "virtiofs", NOSUID_NODEV_NOEXEC)
    status = os.open("/run/a3s-box/terminal/status.json", os.O_RDWR | os.O_NOFOLLOW)
    os.ftruncate(status, 0)
    unmount("/run/a3s-box/terminal", DETACH)
    mount("a3s-boot", "/run/a3s-box/boot", "virtiofs", RDONLY | NOSUID_NODEV_NOEXEC)
    with open(place) as file:
        config = json.load(file)
    unmount("/run/a3s-box/boot")
    assert config["schema"] == "a3s.box.guest-boot.v1"
    main, environment, host = config["exec"], dict(config["environment"]), config["host"]
else:
    with open(os.environ["BOX_EXEC_CONFIG_FILE"]) as file:
        main = json.load(file)
    os.remove(os.environ["BOX_EXEC_CONFIG_FILE"])
    with open(os.environ["BOX_EXEC_ENV_FILE"]) as file:
        pairs = (line.rstrip("\n").split("=", 1) for line in file)
        environment = {k: base64.urlsafe_b64decode(v + "=" * (-len(v) % 4)).decode() for k, v in pairs}
    host = {"hostname": os.environ.get("BOX_HOSTNAME")}
assert main["schema"] == "a3s.box.guest-exec.v1"


def listen(port):
    server = socket.socket(socket.AF_VSOCK)
    server.bind((socket.VMADDR_CID_ANY, port))
    server.listen(64)
    return server


# Clients wait here until the main process runs.
exec_server = listen(4089)

for _, text in variables("BOX_SYSCTL"):
    name, value = text.split("=", 1)
    with open("/proc/sys/" + name.replace(".", "/"), "w") as file:
        file.write(value)
if host.get("hostname"):
    socket.sethostname(host["hostname"])
for name, text in [
    ("hostname", host.get("hostname") and host["hostname"] + "\n"),
    ("resolv.conf", host.get("resolv_conf")),
    ("hosts", host.get("hosts")),
]:
    if text:
        with open("/etc/" + name, "w") as file:
            file.write(text)

mount("workspace", "/workspace", "virtiofs")
for n, text in variables("BOX_VOL"):
    tag, path, *options = text.split(":")
    flags = RDONLY if "ro" in options else 0
    # mote has left all of this to the init.
    assert not os.path.ismount(path), f"{path} is mounted already"
    if "file" in options:
        private = f"/run/.a3s-filemounts/{n}"
        mount(tag, private, "virtiofs")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "a").close()
        source = os.path.join(private, os.path.basename(path)).encode()
        checked(libc.mount(source, path.encode(), None, BIND, None), path)
        if flags:
            checked(libc.mount(None, path.encode(), None, BIND | REMOUNT | RDONLY, None), path)
        continue
    os.makedirs(path, exist_ok=True)
    if "copy" in options:
        staging = f"/run/.a3s-volume-mounts/{n}"
        mount(tag, staging, "virtiofs")
        if not os.listdir(staging):
            shutil.copytree(path, staging, symlinks=True, dirs_exist_ok=True)
        unmount(staging, DETACH)
    mount(tag, path, "virtiofs", flags)
for _, text in variables("BOX_TMPFS"):
    path, _, options = text.partition(":")
    assert not os.path.ismount(path), f"{path} is mounted already"
    mount("tmpfs", path, "tmpfs", data=options)
os.makedirs(main["workdir"], exist_ok=True)
if os.environ.get("BOX_READONLY") == "1":
    os.rmdir(tempfile.mkdtemp(dir="/"))
    # A remount alone fails on virtio-fs.
    checked(libc.mount(b"/", b"/", None, BIND, None), "bind /")
    checked(libc.mount(None, b"/", None, REMOUNT | BIND | RDONLY, None), "make / read-only")

if os.path.exists("/workspace/hold"):
    print("held")
    while os.path.exists("/workspace/hold"):
        time.sleep(0.05)
user, _, group = (main["user"] or "0:0").partition(":")
process = subprocess.Popen(
    [main["executable"], *main["args"]],
    cwd=main["workdir"],
    env=environment,
    user=int(user),
    group=int(group),
    stdin=subprocess.DEVNULL,
    start_new_session=True,
)


def read(conn, length):
    data = b""
    while len(data) < length and (part := conn.recv(length - len(data))):
        data += part
    return data


def run(request):
    done = subprocess.run(request["cmd"], env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    output = {"stdout": list(done.stdout), "stderr": list(done.stderr), "exit_code": done.returncode}
    return json.dumps(output).encode()


def serve_exec(conn):
    header = read(conn, 5)
    if len(header) == 5:
        kind, length = struct.unpack(">BI", header)
        payload = read(conn, length)
        if kind == 1:
            payload = run(json.loads(payload))
        elif kind == 2 and payload.startswith(b"signal-main:"):
            process.send_signal(int(payload[12:]))
            payload = b"signal-main-ack"
        conn.sendall(struct.pack(">BI", kind, len(payload)) + payload)
    conn.close()


OPEN, OPENED, DATA, CLOSE = 1, 2, 3, 4


def serve_forward(conn):
    def send(kind, stream, payload=b""):
        conn.sendall(struct.pack(">BII", kind, stream, len(payload)) + payload)

    def pump(stream, server):
        while data := server.recv(16384):
            send(DATA, stream, data)
        send(CLOSE, stream)

    servers = {}
    while len(header := read(conn, 9)) == 9:
        kind, stream, length = struct.unpack(">BII", header)
        payload = read(conn, length)
        if kind == OPEN:
            try:
                server = socket.create_connection(("127.0.0.1", *struct.unpack(">H", payload)))
            except OSError:
                send(OPENED, stream, b"\1")
                continue
            servers[stream] = server
            send(OPENED, stream, b"\0")
            threading.Thread(target=pump, args=(stream, server), daemon=True).start()
        elif kind == DATA:
            servers[stream].sendall(payload)
        elif kind == CLOSE:
            servers.pop(stream).shutdown(socket.SHUT_RDWR)


def accept(server, serve):
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()


threading.Thread(target=accept, args=(exec_server, serve_exec), daemon=True).start()
if os.environ.get("BOX_CRI_PORT_FWD") == "1":
    threading.Thread(target=accept, args=(listen(4093), serve_forward), daemon=True).start()

code = process.wait()
code = 128 - code if code < 0 else code
if status is not None:
    record = {"schema": "a3s.box.guest-terminal.v1", "exit_code": code, "rootfs_quiesced": False}
    os.pwrite(status, json.dumps(record, separators=(",", ":")).encode(), 0)
    os.fsync(status)
try:
    with open("/.a3s_exit_code", "w") as file:
        file.write(str(code))
except OSError:
    pass
os._exit(code)
