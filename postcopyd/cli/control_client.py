"""Speaks to the daemon's control API; blocking, and quick to import."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote, urlencode

_TIMEOUT: Final = 30.0  # seconds for an answer that nothing has to be waited for
_PAUSES: Final = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds before a question is asked again whose answer was cut off."""


class ControlError(Exception):
    """The daemon did not do what was asked."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        """For programs: a code of the control API, or `unreachable`."""
        self.message = message
        self.hint = hint
        """What to do; empty when there is nothing to say."""


class ControlClient:
    """One daemon. Every call opens a connection of its own, so calls may come from any thread.

    A migration is returned as the control API gives it (`postcopyd.incoming.report.Report` as a
    dictionary, and what the daemon knows beside it). Every call raises `ControlError`.
    """

    def __init__(self, path: str) -> None:
        """Speak to the daemon whose control socket is at `path`."""
        self._path = path

    def list(self) -> list[dict[str, Any]]:
        """Return all migrations."""
        migrations: list[dict[str, Any]] = self._ask("GET", "/v1/migrations")["migrations"]
        return migrations

    def show(self, name: str) -> dict[str, Any]:
        """Return one migration."""
        return self._ask("GET", _path_of(name))

    def create(
        self, name: str, listen: str = "", handoff: str = "", allowed: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Create a migration; an address left empty is the daemon's choice.

        :param allowed: names in certificates that may be its source; without any, all that the
            daemon is configured to allow.
        """
        wish = {"name": name, "listen": listen, "handoff": handoff, "allowed_sources": allowed}
        return self._ask("POST", "/v1/migrations", json.dumps(wish).encode())

    def receive_qemu(
        self, qmp: str, listen: str = "", name: str = "", allowed: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Create a migration for the QEMU whose QMP socket is at `qmp`; the daemon adopts it."""
        wish = {"qmp": qmp, "listen": listen, "name": name, "allowed_sources": allowed}
        return self._ask("POST", "/v1/qemu", json.dumps(wish).encode())

    def retry(self, name: str, qmp: str, force: bool = False) -> dict[str, Any]:
        """Have the QEMU whose QMP socket is at `qmp` take the place of one that did not load."""
        wish = json.dumps({"qmp": qmp, "force": force}).encode()
        return self._ask("POST", _path_of(name) + "/retry", wish)

    def wait(self, name: str, timeout: float | None = None) -> dict[str, Any]:
        """Return the migration when it has ended, or as it stands after `timeout` seconds."""
        path = _path_of(name) + "/wait"
        if timeout is None:
            return self._ask("GET", path, within=None)
        return self._ask("GET", f"{path}?timeout={timeout:g}", within=timeout + _TIMEOUT)

    def cancel(self, name: str, force: bool = False) -> dict[str, Any]:
        """Cancel the migration, or forget it if it has ended."""
        query = "?" + urlencode({"force": 1}) if force else ""
        return self._ask("DELETE", _path_of(name) + query)

    def abandon(self, name: str, force: bool = False) -> dict[str, Any]:
        """Give up what has not come; return the migration when that is done."""
        wish = json.dumps({"force": force}).encode()
        return self._ask("POST", _path_of(name) + "/abandon", wish, within=None)

    def check(self) -> dict[str, Any]:
        """Return what the host can do, as the daemon sees it."""
        return self._ask("GET", "/v1/check", within=60.0)

    def _ask(
        self, method: str, path: str, body: bytes | None = None, within: float | None = _TIMEOUT
    ) -> dict[str, Any]:
        for pause in _PAUSES if method == "GET" else ():
            try:
                return self._ask_once(method, path, body, within)
            except ConnectionResetError:
                time.sleep(pause)  # it was killed, and another one goes on
        try:
            return self._ask_once(method, path, body, within)
        except ConnectionResetError:
            raise ControlError(
                "unreachable",
                f"postcopyd at {self._path} has hung up before it answered",
                "postcopyctl list tells what has come of it",
            ) from None

    def _ask_once(
        self, method: str, path: str, body: bytes | None, within: float | None
    ) -> dict[str, Any]:
        connection = _UnixConnection(self._path, within)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            refusal = None
            if response.status >= http.client.BAD_REQUEST:
                refusal = ControlError(**answer["error"])
        except TimeoutError:
            raise ControlError(
                "unreachable",
                f"postcopyd at {self._path} does not answer",
                "systemctl status postcopyd tells how it is",
            ) from None
        except ConnectionResetError:
            raise
        except (http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise ControlError(
                "unreachable",
                f"what listens at {self._path} does not speak as postcopyd does",
                "give the path of the control socket: --control PATH",
            ) from error
        except OSError as error:
            raise ControlError(
                "unreachable",
                f"postcopyd at {self._path} cannot be reached: {error.strerror or error}",
                _remedy(error),
            ) from error
        finally:
            connection.close()
        if refusal is not None:
            raise refusal
        result: dict[str, Any] = answer
        return result


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("postcopyd", timeout=timeout)
        self._socket_path = path

    def connect(self) -> None:
        """Connect to the socket instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._socket_path)


def _path_of(name: str) -> str:
    return "/v1/migrations/" + quote(name, safe="")


def _remedy(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "control_users and control_group in the configuration say who may"
    return "is it running (systemctl start postcopyd)? Is it another socket (--control PATH)?"
