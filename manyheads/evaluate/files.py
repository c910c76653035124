"""Files are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: str) -> None:
    """Write to a sibling, then rename it into place: a reader sees the old file or the new one, never a part."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        part.write_text(content, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written ({error.strerror}); nothing was changed") from None
    finally:
        part.unlink(missing_ok=True)
