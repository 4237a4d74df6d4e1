"""The README's plots, as SVG, written out by hand: their background is their own, so that they can be read on a dark
page as on a light one."""

import math
from html import escape

from vmms import ROWS, Machine

WIDTH = 900
FONT = 'system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif'
# Of the same weight for colour-blind readers (Okabe and Ito), on a background of the drawing's of the README.
COLOURS = ["#0072b2", "#56b4e9", "#e69f00", "#b5bcc4"]
LINES = {"floor": "#7b8794", "mote": "#0072b2", "mote-template": "#56b4e9", "firecracker-devices": "#d55e00", "qemu-virtiofs": "#009e73"}
BACKGROUND, EDGE, INK, FAINT = "#fbfbfa", "#d5dae0", "#1f2933", "#46535f"


def drawing(height, title, parts):
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
            f'aria-labelledby="title">\n<title id="title">{escape(title)}</title>\n'
            f"<style>text {{ font-family: {FONT}; font-size: 13px; fill: {INK} }} .faint {{ fill: {FAINT}; font-size: 12px }} "
            ".end { text-anchor: end } .middle { text-anchor: middle } .head { font-size: 16px; font-weight: 600 }</style>\n"
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" fill="{BACKGROUND}" stroke="{EDGE}"/>\n')
    return head + "\n".join([text(20, 30, title, "head"), *parts]) + "\n</svg>\n"


def text(x, y, content, kind=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(content)}</text>'


def rectangle(x, y, width, height, colour):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def line(x1, y1, x2, y2, colour=EDGE, width=1):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def round_step(most, steps):
    """A step of 1, 2 or 5 times a power of ten, of which `steps` or fewer reach `most`."""
    power = 10 ** math.floor(math.log10(most / steps))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * steps >= most)


def timeline(results, rows, counted):
    """A bar for each VMM, from the start of its process to the end of its last one."""
    parts_of = [("first_run", "VMM, until the first KVM_RUN"), ("init", "kernel, until init"),
                ("entrypoint", "until the entrypoint runs"), ("all_gone", "until nothing is left")]
    rows = [row for row in rows if all(results.median(row, mark) is not None for mark, _ in parts_of)]
    left, right, top, step = 245, 70, 74, 34
    most = max(results.median(row, "all_gone") for row in rows)
    scale = (WIDTH - left - right) / most
    bottom = top + step * len(rows)
    parts, x = [], 20.0
    for (_, name), colour in zip(parts_of, COLOURS):
        parts += [rectangle(x, 46, 12, 12, colour), text(x + 18, 57, name, "faint")]
        x += 40 + 6.6 * len(name)
    every = round_step(most, 8)
    for tick in range(0, int(most / every) + 1):
        at = left + tick * every * scale
        parts += [line(at, top - 4, at, bottom), text(at, bottom + 16, f"{tick * every:g}", "faint middle")]
    for index, row in enumerate(rows):
        y, before = top + step * index, 0.0
        parts.append(text(left - 10, y + 18, ROWS[row].name, "end"))
        for (mark, _), colour in zip(parts_of, COLOURS):
            value = results.median(row, mark)
            parts.append(rectangle(left + before * scale, y + 4, (value - before) * scale, step - 12, colour))
            before = value
        entrypoint = results.median(row, "entrypoint")
        parts.append(text(left + before * scale + 6, y + 18, f"{entrypoint:.1f}", "faint"))
    unit = "million instructions" if counted else "ms"
    parts.append(text(WIDTH - right, bottom + 34, f"{unit}; the number is the entrypoint's", "faint end"))
    return drawing(bottom + 46, "Start of a box: 1 vCPU, 256 MiB", parts)


def sweep(results, rows, counted):
    """Lines over the memory's size, and bars for one vCPU and two."""
    swept = [row for row in rows if ROWS[row].swept]
    memories = sorted({machine.memory_mib for _, machine, mode in results.runs
                       if mode == "start" and machine.vcpus == machine.shares == 1})
    vcpus = sorted({machine.vcpus for _, machine, mode in results.runs if mode == "start" and machine.shares == 1
                    and machine.memory_mib == Machine().memory_mib})
    machines = [Machine(memory_mib=memory) for memory in memories] + [Machine(vcpus=count) for count in vcpus]
    values = [results.median(row, "entrypoint", machine) for row in swept for machine in machines]
    most = max(value for value in values if value is not None)
    left, split, top, bottom = 60, 520, 90, 330
    every = round_step(most, 6)
    ceiling = math.ceil(most / every) * every

    def height(value):
        return bottom - (bottom - top) * value / ceiling

    def across(memory):
        return left + 20 + (split - left - 60) * math.log2(memory / memories[0]) / max(1, math.log2(memories[-1] / memories[0]))

    parts, x = [], 20.0
    for row in swept:
        parts += [rectangle(x, 46, 12, 12, LINES[row]), text(x + 18, 57, ROWS[row].name, "faint")]
        x += 44 + 6.6 * len(ROWS[row].name)
    for tick in range(int(ceiling / every) + 1):
        y = height(tick * every)
        parts += [line(left, y, split - 20, y), line(split + 40, y, WIDTH - 20, y), text(left - 8, y + 4, f"{tick * every:g}", "faint end")]
    for memory in memories:
        parts.append(text(across(memory), bottom + 18, f"{memory} MiB", "faint middle"))
    for row in swept:
        points = [(across(memory), height(value)) for memory in memories
                  if (value := results.median(row, "entrypoint", Machine(memory_mib=memory))) is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{LINES[row]}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{LINES[row]}"/>' for x, y in points]
    group = (WIDTH - 20 - split - 40) / len(vcpus)
    for index, count in enumerate(vcpus):
        start = split + 40 + group * index
        width = (group - 30) / len(swept)
        for place, row in enumerate(swept):
            value = results.median(row, "entrypoint", Machine(vcpus=count))
            if value is not None:
                y = height(value)
                parts += [rectangle(start + 15 + width * place, y, width - 4, bottom - y, LINES[row]),
                          text(start + 13 + width * (place + 0.5), y - 5, f"{value:.0f}", "faint middle")]
        parts.append(text(start + group / 2, bottom + 18, f"{count} vCPU{'s' * (count > 1)}", "faint middle"))
    unit = "million instructions" if counted else "ms"
    parts.append(text(left, 80, unit, "faint"))
    parts.append(text(WIDTH - 20, bottom + 40, "1 vCPU on the left, 256 MiB on the right", "faint end"))
    return drawing(bottom + 52, "Until the entrypoint runs, by memory and vCPUs", parts)
