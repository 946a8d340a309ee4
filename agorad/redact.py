"""Taking out of a text what is nobody else's business: secrets, tokens, keys, mail and internet addresses.

Known secrets are given (``know``) and go wherever they stand, also in hexadecimal, base64 and percent
encoding; what looks like one goes by its form. Internet addresses of others become ``ip-1``, ``ip-2`` …, the
same one each time, so that a reader can still tell who is who; those of this machine's own networks say
nothing and stay.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from pathlib import Path
from typing import Final
from urllib.parse import quote

HIDDEN: Final = "(hidden)"
LEAST: Final = 4
"""Characters of a secret that is looked for as it is; shorter ones stand in every text."""
_FORMS: Final = (
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),
    re.compile(r"\b(?:gh[pousr]_|github_pat_|sk-|xox[bap]-|AKIA)[A-Za-z0-9_-]{8,}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL),
    re.compile(r"(?i)\bbearer\s+[A-Za-z0-9._~+/=-]{8,}"),
)
_NAMED: Final = re.compile(
    r"""(?ix)
    (\b[\w.-]*(?:secret(?!_file)|token(?!s\b)|passw(?:or)?d|api[_-]?key|private[_-]?key)[\w.-]*
    \\*["']?\s*[=:]\s*)
    (\\*"[^"\n]*"|\\*'[^'\n]*'|[^\s,;}"'\\]+)"""
)
"""A setting or a field that is called so, and its value; quotes may be escaped, as in JSON within JSON."""
_URL: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@\"']+@")
_MAIL: Final = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")
_IP4: Final = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])")
_IP6: Final = re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:])")


class Redactor:
    """Remembers what it replaced, for the whole of a report."""

    def __init__(self) -> None:
        self._secrets: dict[str, None] = {}
        self._ips: dict[str, str] = {}
        self.hidden = 0
        """Secrets and mail addresses taken out."""

    @property
    def addresses(self) -> int:
        """Internet addresses that got another name."""
        return len(self._ips)

    def know(self, secret: str | bytes) -> None:
        """One that may stand nowhere. A few bytes are too few to look for."""
        raw = secret.strip().encode() if isinstance(secret, str) else secret
        if len(raw) < LEAST:
            return
        forms = [raw.hex(), raw.hex().upper()]
        for offset in range(3):  # base64 of a text that holds it somewhere
            encoded = base64.b64encode(bytes(offset) + raw).decode().rstrip("=")
            inner = encoded[(0, 2, 3)[offset] : len(encoded) - (1 if (offset + len(raw)) % 3 else 0)]
            forms += [inner, inner.replace("+", "-").replace("/", "_")]
        try:
            plain = raw.decode()
            forms = [plain, quote(plain, safe=""), *forms]
        except UnicodeDecodeError:
            pass
        self._secrets.update(dict.fromkeys(form for form in forms if len(form) >= LEAST))

    def clean(self, text: str) -> str:
        """The text without them."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            if secret in text:
                self.hidden += text.count(secret)
                text = text.replace(secret, HIDDEN)
        for form in _FORMS:
            text = form.sub(self._hide, text)
        text = _NAMED.sub(self._hide_value, text)
        text = _URL.sub(lambda found: f"{found[1]}{HIDDEN}@", text)
        text = _MAIL.sub(self._hide_mail, text)
        home = str(Path.home())
        if home not in ("/", "/root"):
            text = text.replace(home, "~")
        return _IP6.sub(self._address, _IP4.sub(self._address, text))

    def leaks(self, data: bytes) -> bool:
        """Whether one that is known stands there after all."""
        return any(secret.encode() in data for secret in self._secrets)

    def _hide(self, _found: re.Match[str]) -> str:
        self.hidden += 1
        return HIDDEN

    def _hide_value(self, found: re.Match[str]) -> str:
        value = found[2]
        if value.strip("\\\"'") in ("", HIDDEN, "null", "None", "true", "false", "bytes"):
            return found[0]
        self.hidden += 1
        around = value[: len(value) - len(value.lstrip("\\\"'"))]
        return f"{found[1]}{around}{HIDDEN}{around}"

    def _hide_mail(self, found: re.Match[str]) -> str:
        return found[0] if found[0].startswith(HIDDEN) else self._hide(found)

    def _address(self, found: re.Match[str]) -> str:
        try:
            ip = ipaddress.ip_address(found[0])
        except ValueError:
            return found[0]
        if not ip.is_global:
            return found[0]
        return self._ips.setdefault(str(ip), f"ip-{len(self._ips) + 1}")
