"""Kills the daemon at points of its own code, which knows nothing of it.

Python imports this module at its start where it is found first, so each process of a daemon that
has this directory on its PYTHONPATH does. The variable POSTCOPYD_KILLS names a file with what is to
happen (`tests/torture/kills.py` writes it): kills, each of which is armed when the one before has
happened, and happens once over all processes. A kill replaces a function of the daemon by one that
counts its calls.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = {
    "postcopyd.daemon.worker": "worker",
    "postcopyd.cli.postcopyd": "supervisor",
}


class Kill:
    """One kill of the file, in one process."""

    def __init__(self, directory: Path, number: int, description: dict[str, Any]) -> None:
        self.target: str = description["target"]
        self._when: str = description["when"]
        self._count: int = description["count"]
        self._mentions: str = description["mentions"]
        self._called_by: str = description["called_by"]
        self._victim: str = description["victim"]
        self._role: str = description["process"]
        self._done = directory / f"killed-{number}"
        self._armed_by = directory / f"killed-{number - 1}" if number else None
        self._calls = 0

    def reached(self, when: str, arguments: object) -> None:
        """Be told of a call; kill if it is the one."""
        if (
            when != self._when
            or self._role != _role
            or (self._armed_by is not None and not self._armed_by.exists())
        ):
            return
        if self._mentions and self._mentions not in repr(arguments):
            return
        # The frames above are those of this method and of the wrapper.
        if self._called_by and sys._getframe(2).f_code.co_qualname != self._called_by:
            return
        self._calls += 1
        if self._calls == self._count:
            self._happen()

    def _happen(self) -> None:
        try:
            os.close(os.open(self._done, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return
        own, parent = os.getpid(), os.getppid()
        if self._role == "worker":
            victims = {"worker": [own], "supervisor": [parent], "both": [parent, own]}
            assert _role_of(parent) in ("supervisor", None)
        else:
            victims = {"worker": [_worker()], "supervisor": [own], "both": [_worker(), own]}
        for victim in victims.get(self._victim, ()):  # of a mere step there is none
            if _role_of(victim) is not None:
                os.kill(victim, signal.SIGKILL)

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return what does the same as `function` and tells of each call."""
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*arguments: Any, **more: Any) -> Any:
                self.reached("before", (arguments[1:], more))
                result = await function(*arguments, **more)
                self.reached("after", (arguments[1:], more))
                return result

            return awaited

        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def gave(*arguments: Any, **more: Any) -> Any:
                for item in function(*arguments, **more):
                    self.reached("before", item)
                    yield item
                    self.reached("after", item)

            return gave

        @functools.wraps(function)
        def called(*arguments: Any, **more: Any) -> Any:
            self.reached("before", (arguments[1:], more))
            result = function(*arguments, **more)
            self.reached("after", (arguments[1:], more))
            return result

        return called

    def install(self, module: ModuleType) -> None:
        """Put the wrapper in the place of the target, which is there since a moment ago."""
        *path, name = self.target.partition(":")[2].split(".")
        owner: Any = module
        for step in path:
            owner = getattr(owner, step)
        found = vars(owner)[name]
        if isinstance(found, staticmethod):
            setattr(owner, name, staticmethod(self.wrap(found.__func__)))
        else:
            setattr(owner, name, self.wrap(found))


def _command(process: int) -> list[str]:
    return Path(f"/proc/{process}/cmdline").read_text().split("\0")


def _role_of(process: int) -> str | None:
    """What a process is; None for one that has gone or is none of ours."""
    try:
        words = _command(process)
        name = Path(f"/proc/{process}/comm").read_text()
    except OSError:
        return None
    if name.startswith("postcopyd-"):  # it may be a copy of the supervisor
        return "worker"
    return next((role for module, role in MODULES.items() if module in words), None)


def _worker() -> int:
    """The oldest child that lives: the one that does, or is about to do, the daemon's work."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    return next((int(child) for child in children if _role_of(int(child)) == "worker"), 0)


class Finder(importlib.abc.MetaPathFinder):
    """Has the kills of a module installed when it has been imported, before anybody uses it."""

    def __init__(self, kills: list[Kill]) -> None:
        self._kills = kills

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        kills = [kill for kill in self._kills if kill.target.partition(":")[0] == name]
        if not kills:
            return None
        self._kills = [kill for kill in self._kills if kill not in kills]
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_install(module: ModuleType) -> None:
            execute(module)
            for kill in kills:
                kill.install(module)

        spec.loader.exec_module = execute_and_install  # type: ignore[method-assign]
        return spec


_role: str | None = None
"""What this process is, once that is known."""


def _become(role: str) -> None:
    global _role
    _role = role


def _begin(file: Path) -> None:
    kills = [
        Kill(file.parent, number, description)
        for number, description in enumerate(json.loads(file.read_text()))
    ]
    for kill in kills:
        module = kill.target.partition(":")[0]
        if module in sys.modules:
            kill.install(sys.modules[module])
    sys.meta_path.insert(0, Finder(kills))


if "POSTCOPYD_KILLS" in os.environ and sys.orig_argv[1:2] == ["-m"]:
    _role = MODULES.get(sys.orig_argv[2])
    if _role is not None:
        os.register_at_fork(after_in_child=functools.partial(_become, "worker"))
        _begin(Path(os.environ["POSTCOPYD_KILLS"]))
