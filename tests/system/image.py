"""A Debian 12 with systemd in a directory, and the wheels that postcopyd is installed from in it.

Run as ``python -m tests.system.image``; it is quick when both are there already. They lie below
the user's cache directory, and whatever runs in the image writes to a memory of its own: the image
stays as it was made.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

from tests.interop.debian_archive import RELEASE, ArchiveError, debian_sources, made_whole
from tests.interop.qemu_versions import CACHE
from tests.support import ROOT

_PACKAGES: Final = ("systemd", "systemd-sysv", "dbus", "python3", "python3-venv")
_PYTHON: Final = "3.11"
"""Of Debian 12; the tests may run on another one."""
_BUILD_LIMIT: Final = 900
"""Seconds, on a slow line."""

IMAGE: Final = CACHE / f"debian-12-{hashlib.sha256(' '.join(_PACKAGES).encode()).hexdigest()[:8]}"


def requirements() -> list[str]:
    """What pip needs to install the project: its dependencies, and what builds it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [*project["project"]["dependencies"], *project["build-system"]["requires"]]


def wheels() -> Path:
    """Where the wheels of these requirements lie, once `make` has made them."""
    text = "\n".join([_PYTHON, *requirements()])
    return CACHE / f"wheels-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def make_image(target: Path) -> None:
    """Make the system in `target`, which does not exist or is empty.

    :raise ArchiveError: if it cannot be made.
    """
    sources = [line.split() for line in debian_sources(Path("/etc/apt"))]
    addresses = [words[-3] for words in sources if words[-2] == RELEASE]
    if not addresses:
        raise ArchiveError(f"apt has no source of Debian's {RELEASE}; this needs Debian 12")
    # In namespaces of its own: what it mounts and starts ends with it, however it ends.
    _run(
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *("debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}"),
        *(RELEASE, str(target), addresses[0]),
    )
    for part in ("var/cache/apt", "var/lib/apt/lists"):
        for file in (target / part).rglob("*"):
            if file.is_file():
                file.unlink()


def download_wheels(target: Path) -> None:
    """Download the requirements, and theirs, for the Python of the image.

    :raise ArchiveError: if they cannot be had.
    """
    _run(
        *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"),
        *("--python-version", _PYTHON, "--dest", str(target), *requirements()),
    )


def _run(*command: str) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_BUILD_LIMIT
        )
    except FileNotFoundError:
        raise ArchiveError(f"there is no {command[0]} here") from None
    except subprocess.TimeoutExpired:
        raise ArchiveError(f"{command[0]} took more than {_BUILD_LIMIT} s") from None
    if done.returncode:
        raise ArchiveError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def main() -> None:
    try:
        if not IMAGE.exists():
            print(
                "making a Debian with systemd for the tests, which takes a minute or two",
                flush=True,
            )
            with made_whole(IMAGE) as directory:
                make_image(directory)
        if not wheels().exists():
            print("fetching the wheels that postcopyd is installed from there", flush=True)
            with made_whole(wheels()) as directory:
                download_wheels(directory)
    except (ArchiveError, OSError) as error:
        sys.exit(f"could not make what the tests need: {error}")


if __name__ == "__main__":
    main()
