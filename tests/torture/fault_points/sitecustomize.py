"""Kills the daemon at points of its own code, which knows nothing of it.

Python imports this module at its start where it is found first, so each process of a daemon that
has this directory on its PYTHONPATH does. The variable POSTCOPYD_KILLS names a file with what is to
happen (`tests/torture/kills.py` writes it): kills, each of which is armed when the one before has
happened, and happens once over all processes. A kill replaces a function of the daemon by one that
counts its calls. Before it kills it leaves a file that names whom, and when.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.torture import victims

MODULES = {
    "postcopyd.daemon.worker": "worker",
    "postcopyd.cli.postcopyd": "supervisor",
}


class Kill:
    """One kill of the file, in one process."""

    def __init__(self, directory: Path, description: dict[str, Any]) -> None:
        self.target: str = description["target"]
        self._when: str = description["when"]
        self._count: int = description["count"]
        self._mentions: str = description["mentions"]
        self._called_by: str = description["called_by"]
        self._victim: victims.Victim | None = description["victim"]
        self._role: str = description["process"]
        self._done = directory / description["marker"]
        after: str | None = description["after"]
        self._armed_by = None if after is None else directory / after
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
        named = self._named()
        kill = victims.Kill(time.monotonic(), tuple(named))
        if _claim(self._done, json.dumps(asdict(kill))):
            victims.kill(named)

    def _named(self) -> list[victims.Process]:
        """Whom it kills; of a mere step that is nobody."""
        if self._victim is None:
            return []
        own = os.getpid()
        if self._role == "worker":
            supervisor, worker = victims.supervisor(os.getppid()), [victims.ourselves()]
        else:
            supervisor, worker = victims.supervisor(own), victims.worker(own)
        # Who kills itself comes last.
        both = [*supervisor, *worker] if self._role == "worker" else [*worker, *supervisor]
        return {"worker": worker, "supervisor": supervisor, "both": both}[self._victim]

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


def _claim(path: Path, content: str) -> bool:
    """Leave a file, whole or not at all; tell whether nobody else has."""
    draft = path.with_name(f"draft-{path.name}-{os.getpid()}")
    draft.write_text(content)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


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
    kills = [Kill(file.parent, description) for description in json.loads(file.read_text())]
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
