"""The host check in a process of its own: ``python -m postcopyd.daemon.host_check_process``.

The check lets go of memory locks for a moment and touches memory that is missing on purpose;
neither is for a process in which migrations run. It writes one JSON object to standard output.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final

_LIMIT: Final = 30.0  # seconds


class HostCheckFailed(Exception):
    """The check itself did not work; the text says how."""


async def run() -> bytes:
    """Check this host as this process sees it, in a process of its own; return JSON.

    :raise HostCheckFailed: if that process does not end in time, or not as it should.
    :raise OSError: if it cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", __name__),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), _LIMIT)
    except TimeoutError:
        raise HostCheckFailed(f"the host check has not ended within {_LIMIT:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise HostCheckFailed(f"the host check ended with status {process.returncode}: {last}")
    return output


def _main() -> None:
    # Imported here, because the daemon itself, which imports this file, has no use for them.
    import msgspec

    from postcopyd.incoming.host_check import check_host

    sys.stdout.buffer.write(msgspec.json.encode(check_host()))


if __name__ == "__main__":
    _main()
