"""Text of others, such as captions and model names, shown as it is."""

from __future__ import annotations

import re


def printable(text: str) -> str:
    """Put the text on one line, with a space for what cannot be printed or written to a file."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def escape(text: str) -> str:
    """Escape a text for a line or a table cell of GitHub's Markdown: no markup, HTML, link, image or formula of it.

    Entities stand where a backslash would not do: for HTML, and for the colon that makes an address a link.
    """
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\`*_{}\[\]|~$]", r"\\\g<0>", text)
    text = text.replace("://", "&#58;//").replace("www.", "www&#46;")
    return re.sub(r"^([#+-]|\d+[.)])(?=\s|$)", lambda found: f"&#{ord(found[0][0])};{found[0][1:]}", text)
