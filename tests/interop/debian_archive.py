"""Debian packages unpacked into a directory of one's own: nothing is installed, nobody is root.

apt's own tools do the work, under a configuration of their own: their lists and their downloads go
to a temporary directory, and their sources are this machine's Debian sources with the suite of the
backports added. The machine's own apt stays as it is.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

RELEASE: Final = "bookworm"
BACKPORTS: Final = f"{RELEASE}-backports"

_SUITES: Final = frozenset({RELEASE, f"{RELEASE}-updates", f"{RELEASE}-security"})
_ONE_LINE: Final = re.compile(
    r"deb\s+(?P<options>\[[^]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s.*\bmain\b"
)
"""An entry of a .list file (sources.list(5))."""

_CONFIGURATION: Final = """
Dir::Etc::SourceList "DIRECTORY/debian.list";
Dir::Etc::SourceParts "DIRECTORY/none";
Dir::Etc::Preferences "DIRECTORY/none";
Dir::Etc::PreferencesParts "DIRECTORY/none";
Dir::State "DIRECTORY/state";
Dir::State::Status "/var/lib/dpkg/status";
Dir::Cache "DIRECTORY/cache";
Debug::NoLocking "true";
Acquire::Languages "none";
Acquire::Retries "3";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""
"""The machine's proxy and keys stay in force; what it has apt do after an update does not.

As root, apt would download as another user, who cannot look into root's directories.
"""


class ArchiveError(Exception):
    """Packages could not be had; the message says which ones and what apt printed."""


class DebianArchive:
    """apt under a configuration of its own in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.downloads = directory / "cache" / "archives"
        self._configuration = directory / "apt.conf"
        self._update_failure = ""

    def update(self) -> None:
        """Read which packages there are.

        :raise ArchiveError: if the machine has no source of Debian packages.
        """
        (self.directory / "state" / "lists" / "partial").mkdir(parents=True)
        (self.downloads / "partial").mkdir(parents=True)
        self._configuration.write_text(_CONFIGURATION.replace("DIRECTORY", str(self.directory)))
        sources = list(debian_sources(Path("/etc/apt")))
        if not sources:
            raise ArchiveError(f"apt has no source of Debian's {RELEASE}; this needs Debian 12")
        (self.directory / "debian.list").write_text("\n".join(sources) + "\n")
        try:
            self.apt("apt-get", "update")
        except ArchiveError as error:
            # A source that cannot be reached may have nothing to do with what is wanted.
            self._update_failure = f"; {error}"

    def download(self, *packages: str) -> list[Path]:
        """Download the packages (NAME or NAME/SUITE) and what of theirs is not installed here.

        :raise ArchiveError: if one cannot be had.
        """
        self.apt("apt-get", "--yes", "--download-only", "--reinstall", "install", *packages)
        return sorted(self.downloads.glob("*.deb"))

    def real_package(self, package: str) -> str:
        """The package that `package`, which has no files of its own, stands for.

        :raise ArchiveError: if there is no such package.
        """
        answer = self.apt("apt-cache", "depends", "--important", package)
        found = re.search(r"^ *Depends: (\S+)$", answer, re.MULTILINE)
        if found is None:
            raise ArchiveError(f"{package} depends on no package: {answer}")
        return found[1]

    def apt(self, tool: str, *arguments: str) -> str:
        """Run one of apt's tools and return what it prints.

        :raise ArchiveError: if it fails.
        """
        command = [tool, "--quiet", f"--config-file={self._configuration}", *arguments]
        try:
            result = subprocess.run(
                command, cwd=self.directory, text=True, capture_output=True, timeout=600
            )
        except FileNotFoundError:
            raise ArchiveError(f"there is no {tool} here; this needs Debian 12") from None
        except subprocess.TimeoutExpired:
            raise ArchiveError(f"{' '.join(command)} took more than 600 s") from None
        if result.returncode:
            printed = result.stdout + result.stderr + self._update_failure
            raise ArchiveError(f"{' '.join(command)}: {printed}")
        return result.stdout


def debian_sources(etc: Path) -> Iterator[str]:
    """The machine's sources of `RELEASE`, in the one-line format, with the backports.

    Both formats of sources.list(5) are read. An embedded key is the only thing that the one-line
    format has no place for: such a source is used with the keys that apt trusts anyway.
    """
    for file in [etc / "sources.list", *sorted(etc.glob("sources.list.d/*.list"))]:
        if file.exists():
            for line in file.read_text().splitlines():
                if found := _ONE_LINE.match(line.strip()):
                    yield from _lines(found["options"] or "", found["uri"], [found["suite"]])
    for file in sorted(etc.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", file.read_text()):
            fields = _fields(stanza)
            words = {name: value.split() for name, value in fields.items()}
            if "deb" not in words.get("types", []) or fields.get("enabled") == "no":
                continue
            if "main" in words.get("components", []):
                key = fields.get("signed-by", "")
                options = f"[signed-by={key}] " if key.startswith("/") else ""
                for uri in words["uris"]:
                    yield from _lines(options, uri, words["suites"])


def unpack(packages: list[Path], directory: Path, *, only: str = "") -> None:
    """Unpack the packages' files into `directory`, all or those that begin with `only`."""
    for package in packages:
        archive = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
        with archive:
            subprocess.run(
                ["tar", "--extract", "--no-same-owner", "--wildcards", f"./{only}*"],
                stdin=archive.stdout,
                cwd=directory,
                check=True,
            )
        if archive.returncode:
            raise ArchiveError(f"{package.name} cannot be unpacked")


@contextlib.contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """A new directory beside `target` that becomes `target` when all is well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _lines(options: str, uri: str, suites: list[str]) -> Iterator[str]:
    for suite in suites:
        if suite in _SUITES:
            yield f"deb {options}{uri} {suite} main"
        if suite == RELEASE:
            yield f"deb {options}{uri} {BACKPORTS} main"


def _fields(stanza: str) -> dict[str, str]:
    """The fields of a deb822 stanza, by their names in lower case, without comments."""
    text = "\n".join(line for line in stanza.splitlines() if not line.startswith("#"))
    pairs = re.findall(r"^([\w-]+):((?:.*\n?)(?:[ \t].*\n?)*)", text, re.MULTILINE)
    return {name.lower(): value.strip() for name, value in pairs}
