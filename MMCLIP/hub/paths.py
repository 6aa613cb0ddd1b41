"""Folders of this machine, which nobody else needs to know: found in a text, and taken out of it."""

import os
import re
from pathlib import Path


# /a/b, ~/a/b, C:\a, in JSON C:\\a, and file://a, but neither a URL nor a relative path; a full stop behind it is no
# part of it
_LOCAL = re.compile(
    r"(?<=['\"])~?/(?:[^'\"/\n]+/)+[^'\"/\n]*(?=['\"])"  # with spaces, as a shell and JSON quote it
    r"|(?<![\w/.~<-])~?/(?:[\w.@+=-]+/)+[\w.@+=-]*(?<!\.)"
    r"|(?<![\w:/.~<-])[A-Za-z]:[\\/]+[\w.@+=-][^\s\"'`,;]*(?<!\.)"
    r"|\bfile://[^\s\"'`]+(?<!\.)"
)


def local_paths(text: str) -> list[str]:
    """The absolute paths in `text`, each once, in their order."""
    return list(dict.fromkeys(match.group(0) for match in _LOCAL.finditer(text)))


def without_folders(text: str) -> str:
    """`text` with the last part of each absolute path in place of the path."""
    return _LOCAL.sub(lambda match: re.split(r"[\\/]", match.group(0).rstrip("\\/"))[-1], text)


def public_name(path: str | os.PathLike | None) -> str | None:
    """What a model that was given by name or folder may be called in public.

    A Hub id stays; a folder of an installed Python package is `package://NAME/FOLDER`; of any other folder remains the
    name, as `local:NAME`.
    """
    if path is None:
        return None
    path = str(path)
    if not Path(path).exists():
        return path if not local_paths(path) else f"local:{without_folders(path)}"
    parts = Path(path).resolve().parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            return "package://" + "/".join(parts[parts.index(folder) + 1 :])
    return f"local:{parts[-1]}"


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is OWNER/NAME and no folder here."""
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
