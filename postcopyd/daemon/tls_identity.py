"""What the daemon shows of itself and whom it believes in TLS, read anew when the files change."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from postcopyd.daemon import event_log
from postcopyd.daemon.tls_files import TlsFiles, TlsFilesError, signature

if TYPE_CHECKING:
    from postcopyd.daemon.config import Tls

_T = TypeVar("_T")


class TlsIdentity:
    """The certificate, its key and the CA certificates of this daemon."""

    def __init__(self, settings: Tls) -> None:
        """Read the files. What others would not accept is logged, and used all the same.

        :raise TlsFilesError: if they cannot be used.
        """
        self._settings = settings
        self._seen = self._used = signature(settings)
        files = TlsFiles.load(settings)
        for doubt in (*files.outdated, *files.exposed):
            event_log.log_tls_doubt(doubt)
        self._context = files.context
        self._worker = ThreadPoolExecutor(1, "tls")

    async def aside(self, work: Callable[[], _T]) -> _T:
        """Have `work` done in the thread of TLS, where its arithmetic makes no fault wait.

        It has ended when this returns, also when this is cancelled.
        """
        work_there = self._worker.submit(work)
        future = asyncio.wrap_future(work_there)
        try:
            await asyncio.wait((future,))
        finally:
            if not work_there.cancel():  # what has not begun need not begin any more
                while not future.done():
                    with suppress(asyncio.CancelledError):  # once more: we are on our way out
                        await asyncio.wait((future,))
                future.exception()  # who was cancelled does not want to know
        try:
            return future.result()
        finally:
            del future  # which holds an exception, which holds this frame

    async def context(self) -> ssl.SSLContext:
        """Return what makes the next connection, from the files as they are now."""
        if signature(self._settings) != self._seen:
            await self.reload()
        return self._context

    async def reload(self) -> None:
        """Read the files anew. If one has become worse the old ones stay; it is logged.

        One that is out of date by now and has not changed keeps nothing new from being used: a
        certificate may be revoked when ours has expired.
        """
        self._seen = now = signature(self._settings)
        try:
            files = await self.aside(lambda: TlsFiles.load(self._settings))
        except TlsFilesError as error:
            event_log.log_tls_kept(error)
            return
        changed = {setting for setting in now if now[setting] != self._used[setting]}
        if "key" in changed:
            changed.add("certificate")
        for worse in files.outdated:
            if worse.setting in changed:
                event_log.log_tls_kept(worse)
                return
        for doubt in (*files.outdated, *files.exposed):
            event_log.log_tls_doubt(doubt)
        self._context = files.context
        self._used = now
        event_log.log_tls_read(self._settings.certificate)

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown()
