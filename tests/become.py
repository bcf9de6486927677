"""Run by a process that ``forked.py`` has started: become ``python -m MODULE…`` or a script."""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import sys


def become(words: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """Run a module or a script as a command; it prints to ``output``.out and .err."""
    for descriptor, suffix in ((1, "out"), (2, "err")):
        opened = os.open(f"{output}.{suffix}", os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # what the server has imported
    sys.argv = words
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if words[0].endswith(".py"):
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


if __name__ == "become":
    become(WORDS, FOLDER, ENVIRONMENT, OUTPUT)  # type: ignore[name-defined]  # noqa: F821
