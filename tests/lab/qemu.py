#!/usr/bin/python3
"""Prints the path of the QEMU that emulates labs: a copy of this system's, in the user's cache, without one store of a
register.

When a hypervisor has VMRUN inject an interrupt, helper_vmrun() (target/i386/tcg/system/svm_helper.c) delivers it at
once, and leaves its vector in the CPU's exception_index all the same. If QEMU's main loop wants the CPU before the guest's
next exception or exit, that is taken for an exception that waits: the interrupt is delivered once more, whether or not
the guest has interrupts off by then. A guest then waits for a lock that its own interrupted handler holds, and spins
for ever: of 558 starts in the benchmark's lab 3 hung, and the one that was looked into was in that state. Without the
store exception_index is -1 there, as it is elsewhere while guests run.

It is looked for as what it is; a QEMU that has no such store, or more than one, is used as it is."""

import hashlib
import os
import pathlib
import re
import shutil
import struct
import sys

# How far before the call that delivers the interrupt the store may be.
WINDOW = 96
# `mov %r32, disp32(%reg)`: what a CPU has outside of its architecture lies before that, so the distance is negative.
STORE = re.compile(rb"\x89[\x80-\x83\x85-\x8b\x8d-\x93\x95-\x9b\x9d-\xa3\xa5-\xab\xad-\xb3\xb5-\xbb\xbd-\xbf]..\xff\xff", re.S)
NOTHING = b"\x66\x0f\x1f\x44\x00\x00"


def sections(elf):
    """Type, address, offset, size and link of each."""
    at, = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    for number in range(count):
        _, kind, _, address, offset, length, link = struct.unpack_from("<IIQQQQI", elf, at + number * size)
        yield kind, address, offset, length, link


def function(elf, name):
    """Where an exported function is in the file, and its length. Code lies there as it does in memory."""
    all_sections = list(sections(elf))
    for kind, _, offset, length, link in all_sections:
        if kind != 11:
            continue
        names = all_sections[link][2]
        for entry in range(offset, offset + length, 24):
            at, _, _, _, value, size = struct.unpack_from("<IBBHQQ", elf, entry)
            if elf[names + at:names + at + len(name) + 1] == name + b"\0":
                return value, size
    raise LookupError(name.decode())


def without_store(elf):
    """The program without the store, or None."""
    try:
        (start, length), (deliver, _) = function(elf, b"helper_vmrun"), function(elf, b"do_interrupt_x86_hardirq")
    except LookupError:
        return None
    for call in range(start, start + length - 5):
        if elf[call] == 0xE8 and call + 5 + struct.unpack_from("<i", elf, call + 1)[0] == deliver:
            found = [match.start() for match in STORE.finditer(elf, call - WINDOW, call)]
            if len(found) == 1:
                return elf[:found[0]] + NOTHING + elf[found[0] + len(NOTHING):]
    return None


def main():
    original = shutil.which("qemu-system-x86_64")
    if not original:
        sys.exit("lab: there is no qemu-system-x86_64; run 'make tools'")
    elf = pathlib.Path(original).read_bytes()
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "mote"
    # By the name that labs are known by.
    copy = cache / f"qemu-{hashlib.sha256(elf + pathlib.Path(__file__).read_bytes()).hexdigest()[:16]}" / "qemu-system-x86_64"
    if not copy.exists():
        changed = without_store(elf)
        if changed is None:
            print("lab: this QEMU is none whose double interrupts are known; it is used as it is", file=sys.stderr)
            return print(original)
        copy.parent.mkdir(parents=True, exist_ok=True)
        new = copy.with_suffix(f".{os.getpid()}")
        new.write_bytes(changed)
        new.chmod(0o755)
        new.replace(copy)
    print(copy)


main()
