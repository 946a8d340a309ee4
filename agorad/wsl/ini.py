"""Changing one setting of an ini file that people wrote, and nothing else of it: wsl.conf and .wslconfig."""

from __future__ import annotations

import re


def with_setting(text: str, section: str, key: str, value: str) -> str:
    """The text with ``key=value`` in ``[section]``: comments, order, line ends and other settings stay."""
    end = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines()
    inside, place = False, None
    for number, line in enumerate(lines):
        if header := re.match(r"\ufeff?\s*\[(.*)\]\s*$", line):
            inside = header.group(1).strip().lower() == section.lower()
            place = number + 1 if inside else place
        elif inside:
            found = re.match(r"\s*([^=#;\s][^=]*?)\s*=\s*(.*?)\s*$", line)
            if found and found.group(1).lower() == key.lower():
                if found.group(2).lower() == value.lower():
                    return text
                lines[number] = f"{key}={value}"
                return end.join(lines) + end
            place = number + 1 if line.strip() else place
    if place is None:
        lines += ["", f"[{section}]"] if lines and lines[-1].strip() else [f"[{section}]"]
        place = len(lines)
    lines.insert(place, f"{key}={value}")
    return end.join(lines) + end
