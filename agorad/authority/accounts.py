"""The account file: who may have nodes in this run, for runs that keep their own list.

TOML, one table an account: ``[accounts.alice]`` with ``secret_sha256``. Secrets are made here, 160
random bits each, so one SHA-256 is enough: there is nothing to guess. The file is read at every join
(it is small, and an operator's edit counts at once); a file that is damaged refuses new joins with
``unavailable`` and harms nobody who is in. Limits: 1 MiB, names of 1 to 64 letters, digits, ``-._``.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
from pathlib import Path

import attrs

from agorad.settings import read_toml, structure
from p2p.errors import LocalError, Refused

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@attrs.frozen(kw_only=True)
class Account:
    """One entry of the file."""

    secret_sha256: str
    banned: bool = False


@attrs.frozen(kw_only=True)
class AccountFile:
    """The accounts by name."""

    accounts: dict[str, Account]

    def authenticate(self, name: str, secret: str) -> None:
        """``Refused`` unless ``secret`` is the account's."""
        account = self.known(name)
        given = hashlib.sha256(secret.encode()).hexdigest()
        if not hmac.compare_digest(given, account.secret_sha256.lower()):
            raise Refused("wrong_secret", f"the secret is not the one of account {name!r}")

    def known(self, name: str) -> Account:
        """The account, or ``Refused`` if there is none or it is banned."""
        account = self.accounts.get(name)
        if account is None:
            raise Refused("unknown_account", f"there is no account {name!r} in this run; ask its operator")
        if account.banned:
            raise Refused("banned", f"the account {name!r} was removed by the run's operator")
        return account


def load(path: Path) -> AccountFile:
    """Read the file; ``LocalError`` names what is wrong with it."""
    table = read_toml(path, "account file")
    entries = table.get("accounts", {})
    if set(table) - {"accounts"} or not isinstance(entries, dict):
        raise LocalError(f"{path}: an account file holds [accounts.<name>] sections only")
    accounts = {}
    for name, entry in entries.items():
        if not NAME.fullmatch(name) or not isinstance(entry, dict):
            raise LocalError(f"{path}: {name!r} is not an account of 1 to 64 letters, digits, '-', '.', '_'")
        accounts[name] = structure(Account, entry, f"accounts.{name}")
    return AccountFile(accounts=accounts)


def add(path: Path, name: str) -> str:
    """Append an account to the file (made 0600 if need be) and return its new secret."""
    if not NAME.fullmatch(name):
        raise LocalError(f"{name!r} cannot be an account: 1 to 64 letters, digits, '-', '.', '_'")
    if path.exists() and name in load(path).accounts:
        raise LocalError(f"{path} has an account {name!r} already")
    secret = base64.b32encode(os.urandom(20)).decode().lower()
    entry = f'[accounts."{name}"]\nsecret_sha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"\n'
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(entry)
    except OSError as error:
        raise LocalError(f"cannot write the account file {path}: {error.strerror}") from error
    return secret
