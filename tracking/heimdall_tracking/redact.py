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
_SECRET_NAME: Final = re.compile(
    r"(?i)(pass(word|wd|phrase)|secret|(^|[^a-z])token$|(auth|access|api|bearer)[_-]?token|credential"
    r"|(api|access|private|secret)[_-]?key)"
)


def redact(text: object) -> str:
    """A text without the user names and passwords that its URLs hold.

    Args:
        text: Anything that is about to be logged or raised.

    Returns:
        The text, with `***` where a URL named a user, a password or a signature.
    """
    return _QUERY.sub(rf"\1{MASK}", _USERINFO.sub(f"{MASK}@", str(text)))


def names_secret(name: str) -> bool:
    """Whether a name, or a part of it between dots, says that what it names is a secret.

    Matched narrowly: `max_tokens` and `tokenizer` are none.
    """
    return any(_SECRET_NAME.search(part) for part in name.split("."))
