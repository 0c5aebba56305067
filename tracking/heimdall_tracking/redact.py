"""Keeping secrets out of logs, errors and parameters."""

from __future__ import annotations

import re
from typing import Final

MASK: Final = "***"
# Lengths are bounded: logs of megabytes are searched, and what never ends would be looked for at every character.
_USERINFO: Final = re.compile(
    r"(?<=://)(?:[^/?#\s'\"]{1,8192}"
    # SQLAlchemy takes passwords with /, ? and # in them; what begins like a port is none.
    r"|[^/?#\s'\":@]{0,256}:(?!\d+[/?#])[^\s'\"]{1,8192})@"
)
_QUERY: Final = re.compile(
    r"(?i)([?&][^=&?\s]{0,64}(?:password|secret|token|signature|credential|key)[^=&?\s]{0,64}=)[^&\s'\"]+"
)
# As libpq and ODBC are told: password=… among other words.
_WORD: Final = re.compile(
    r"(?i)\b(pass(?:word|wd)|pwd)(\s{0,8}=\s{0,8})(?:'[^']{1,8192}'|\"[^\"]{1,8192}\"|[^\s;&'\"]{1,8192})"
)
_SECRET_NAME: Final = re.compile(
    r"(?i)(pass(word|wd|phrase)|secret|(^|[^a-z])token$|(?-i:[a-z]Token$)|(auth|access|api|bearer)[_-]?token|credential"
    r"|(api|access|private|secret)[_-]?key|authorization|(^|[_-])pwd$|(db|user|login|smtp|proxy|sql)[_-]?pass$)"
)


def redact(text: object) -> str:
    """A text without the user names and passwords that its URLs and connection strings hold.

    Args:
        text: Anything that is about to be logged or raised.

    Returns:
        The text, with `***` where a URL named a user, a password or a signature, or a word a password.
    """
    return _WORD.sub(rf"\1\2{MASK}", _QUERY.sub(rf"\1{MASK}", _USERINFO.sub(f"{MASK}@", str(text))))


def described(error: BaseException) -> str:
    """An error for the log: of which kind it is, and what it says, without secrets."""
    return redact(f"{type(error).__name__}: {error}")


def names_secret(name: str) -> bool:
    """Whether a name, or a part of it between dots, says that what it names is a secret.

    Matched narrowly: `max_tokens` and `tokenizer` are none.
    """
    return any(_SECRET_NAME.search(part) for part in name.split("."))
