"""What a container engine keeps beside a container: makes it on this process's own standard streams, or on a terminal, and
ends as it does.

    engine.py MOTE ROOT ID BUNDLE [terminal]"""

import array
import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import termios

PR_SET_CHILD_SUBREAPER = 36

mote, root, name, bundle = sys.argv[1:5]
has_terminal = sys.argv[5:] == ["terminal"]
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
create = [mote, "oci", "--root", root, "--log", f"{bundle}/log", "--log-format", "json", "create"]
create += ["--bundle", bundle, "--pid-file", f"{bundle}/pid"]
listener = socket.socket(socket.AF_UNIX)
if has_terminal:
    listener.bind(f"{bundle}/console")
    listener.listen()
    create += ["--console-socket", f"{bundle}/console"]
made = subprocess.Popen(create + [name])
master = None
if has_terminal:
    client, _ = listener.accept()
    descriptors = array.array("i")
    _, ancillary, _, _ = client.recvmsg(4096, socket.CMSG_SPACE(descriptors.itemsize))
    descriptors.frombytes(ancillary[0][2])
    master = descriptors[0]
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 31, 91, 0, 0))
if made.wait():
    sys.exit(made.returncode)
pid = int(open(f"{bundle}/pid").read())
while master is not None:
    ready, _, _ = select.select([master, 0], [], [])
    try:
        if 0 in ready:
            os.write(master, os.read(0, 4096))
        if master in ready:
            os.write(1, os.read(master, 4096))
    except OSError:
        master = None
while True:
    ended, status = os.wait()
    if ended == pid:
        code = os.waitstatus_to_exitcode(status)
        sys.exit(code if code >= 0 else 128 - code)
