#!/usr/bin/env python3
"""What `make check` proves of the source's structure, for mote (src/), its agent (guest/src/) and
the attestation server (guest/attest/src/):

- Imports follow the order of the crate's map, the list in lib.rs (and in the guest programs' main.rs): each
  module uses only those above it. Every module is in the map, and the map names none that is gone.
- No files import each other in a circle, within a folder neither.
- No file outside tests has more than 800 lines, and those with more than 500 are named below.
- What comments cite is there: "contract §N.M" is a heading of resources/contract.md, and other
  documents are named by a path that exists.

A `mod` line is no import, and test-only modules do not count.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 800
MANY_LINES = 500

# One idea each, and longer than most: why.
LONG = {
    "guest/src/exec.rs": "one protocol: what a client sends to the exec socket, and what it gets",
    "src/cgroup.rs": "creating, joining and removing one cgroup, against others who do the same",
    "src/manual/members.rs": "one table: a row for each member of the spec",
    "src/client/cp.rs": "both directions of copying, each with its tests",
    "src/host/janitor.rs": "both ends of one line, and what is left at the end",
    "src/oci/state.rs": "what outlives a command: one directory, and all that is read from it",
    "src/run.rs": "every event of a box's life, in one loop",
    "src/spec/mod.rs": "one struct and one parser for each object of the spec",
    "src/virtio/mmio.rs": "one register file: what its driver reads and writes, and how it goes on in another VM",
    "src/virtio/vsock/mux.rs": "what may happen to a connection, from either side",
}

USE = r"^ *(?:pub(?:\([^)]*\))? )?use ([^;]+);"

# What people of other projects cannot open.
OUTSIDE = re.compile(r"design(?:\.md)? §|performance\.md|house\.md|style-anchors|\.\./shared")


class Crate:
    """The modules of one crate root: file, imports, and the order of its map."""

    def __init__(self, source, root, libraries=()):
        self.source = source
        self.root = source / root
        self.files = {}
        self.imports = defaultdict(set)
        self.libraries = libraries
        self.faults = []
        self.add((), self.root)

    def add(self, module, path):
        """Reads a file and those of its modules that are not only for tests."""
        self.files[module] = path
        text = without_comments(path.read_text())
        declared = re.finditer(r"((?:#\[[^\]]*\]\s*)*)(?:pub(?:\([^)]*\))? )?mod (\w+);", text)
        for attributes, name in (match.groups() for match in declared):
            if re.search(r"cfg\(.*\btest\b", attributes):
                continue
            folder = path.parent if path.stem in ("lib", "main", "mod") else path.parent / path.stem
            here = [folder / f"{name}.rs", folder / name / "mod.rs"]
            self.add((*module, name), next(file for file in here if file.exists()))

    def read_imports(self):
        for module, path in self.files.items():
            text = re.sub(r"#\[cfg\(test\)\]\nmod tests \{.*", "", path.read_text(), flags=re.S)
            text = without_comments(text)
            uses = re.findall(USE, text, re.M)
            paths = [path for use in uses for path in leaves(re.sub(r"\s+", " ", use))]
            text = re.sub(USE, "", text, flags=re.M)
            paths += re.findall(r"\b((?:crate|super|self)(?:::\w+)+)", text)
            for written in paths:
                target = self.resolve(module, written.split(" as ")[0].replace(" ", "").split("::"))
                if target is not None and target != module:
                    self.imports[module].add(target)

    def resolve(self, module, path):
        """The module that a path leads to, if it is one of this crate's."""
        match path[0]:
            case "crate":
                absolute = path[1:]
            case "self":
                absolute = [*module, *path[1:]]
            case "super":
                ups = sum(1 for part in path if part == "super")
                absolute = [*module[: len(module) - ups], *path[ups:]]
            case child if (*module, child) in self.files:
                absolute = [*module, *path]
            case _:
                return None
        known = (tuple(absolute[:length]) for length in range(len(absolute), 0, -1))
        return next((candidate for candidate in known if candidate in self.files), None)

    def name(self, module):
        return "::".join(module) or self.root.stem

    def check_circles(self):
        done, path = set(), []

        def visit(module):
            if module in path:
                circle = [*path[path.index(module) :], module]
                self.faults.append("imports in a circle: " + " -> ".join(map(self.name, circle)))
            elif module not in done:
                path.append(module)
                for target in sorted(self.imports[module]):
                    visit(target)
                path.pop()
                done.add(module)

        for module in sorted(self.files):
            visit(module)

    def check_order(self):
        """Against the map: `//! - [`a`], [`b::c`]: what they are` after "uses only those above it"."""
        text = self.root.read_text()
        _, marker, map_text = text.partition("uses only those above it")
        where = self.root.relative_to(ROOT)
        if not marker:
            self.faults.append(f"{where}: has no map (\"each … uses only those above it\")")
            return
        lines = re.findall(r"^//! - ((?:\[?`[\w:]+`\]?(?:, )?)+)", map_text, re.M)
        order = [tuple(name.split("::")) for line in lines for name in re.findall(r"`([\w:]+)`", line)]
        rank = {module: index for index, module in enumerate(order)}
        for module in order:
            if module not in self.files and not is_test_module(self.source, module):
                self.faults.append(f"{where}: the map names {self.name(module)}, which is gone")
        for module in self.files:
            if module and module[:1] not in rank:
                self.faults.append(f"{where}: the map lacks {self.name(module)}")

        def room(module):
            named = (module[:length] for length in range(len(module), 0, -1))
            return next((candidate for candidate in named if candidate in rank), None)

        for module, targets in self.imports.items():
            for target in targets:
                ours, theirs = room(module), room(target)
                nested = ours and theirs and (ours[: len(theirs)] == theirs or theirs[: len(ours)] == ours)
                if ours and theirs and not nested and rank[theirs] > rank[ours]:
                    names = self.name(module), self.name(target)
                    self.faults.append("{} imports {}, which stands below it in the map".format(*names))


def without_comments(text):
    return re.sub(r"^\s*//.*|\s//.*", "", text, flags=re.M)


def leaves(use):
    """The paths of a `use` tree."""
    head, brace, rest = use.partition("{")
    if not brace:
        return [use]
    depth, item, items = 0, "", []
    for char in rest[: rest.rindex("}")] + ",":
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            items.append(item)
            item = ""
        else:
            item += char
    return [leaf for item in items if item.strip() for leaf in leaves(head + item.strip())]


def is_test_module(source, module):
    path = source.joinpath(*module)
    return path.with_suffix(".rs").exists() or (path / "mod.rs").exists()


def check_lengths(crates):
    seen = set()
    for path in sorted({path for crate in crates for path in crate.files.values()}):
        name, lines = str(path.relative_to(ROOT)), path.read_text().count("\n")
        if lines > MOST_LINES:
            yield f"{name} has {lines} lines; split it by its ideas (at most {MOST_LINES})"
        elif lines > MANY_LINES and name not in LONG:
            yield f"{name} has {lines} lines; split it, or say in tests/structure.py why it is one idea"
        elif lines > MANY_LINES:
            seen.add(name)
    for name in sorted(LONG.keys() - seen):
        yield f"tests/structure.py: {name} is not that long any more"


def check_citations():
    contract = (ROOT / "resources/contract.md").read_text()
    sections = set(re.findall(r"^#+ §?(\d+(?:\.\d+)*)\b", contract, re.M))
    files = [path for folder in ("src", "guest", "tests", "resources") for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.suffix == ".md"]
    for path in sorted(files):
        if not path.is_file() or "corpus" in path.parts or path == Path(__file__).resolve():
            continue
        if path.suffix not in (".rs", ".c", ".h", ".py", ".sh", ".md", ".json", ".config", ".toml"):
            continue
        text = path.read_text()
        name = path.relative_to(ROOT)
        # A citation may go on with more sections (§1.4, §2.8) and over the end of a line.
        for run in re.findall(r"contract(?:\.md)?[\s/#*]*((?:,? ?§\d+(?:\.\d+)*)+)", text):
            for section in re.findall(r"§(\d+(?:\.\d+)*)", run):
                if section not in sections:
                    yield f"{name}: cites contract §{section}, which resources/contract.md lacks"
        for found in OUTSIDE.findall(text):
            yield f"{name}: cites \"{found.strip()}\", which is not in this repository"
        for cited in re.findall(r"resources/[\w-]+\.md", text):
            if not (ROOT / cited).exists():
                yield f"{name}: cites {cited}, which does not exist"


def main():
    crates = [
        Crate(ROOT / "src", "lib.rs"),
        Crate(ROOT / "guest/src", "lib.rs"),
        Crate(ROOT / "guest/src", "main.rs"),
        Crate(ROOT / "guest/attest/src", "main.rs"),
    ]
    faults = []
    for crate in crates:
        crate.read_imports()
        crate.check_circles()
        crate.check_order()
        faults += crate.faults
    faults += check_lengths(crates)
    faults += check_citations()
    for fault in faults:
        print(f"structure: {fault}", file=sys.stderr)
    modules = sum(len(crate.files) for crate in crates)
    edges = sum(len(targets) for crate in crates for targets in crate.imports.values())
    if not faults:
        print(f"structure: {modules} modules, {edges} imports, none against the flow, no circle")
    sys.exit(bool(faults))


main()
