"""A model that kills its process, for real, at the sight of one token: what a bug in a kernel does to a passage.

`write_sitecustomize` writes a folder which, on a process's module path, poisons `Encoder` as soon as it is imported.
Nothing of the program knows of it.
"""

from __future__ import annotations

from pathlib import Path

from tests.checkpoints import bert_vocabulary

WORD = "ß"
TOKEN = bert_vocabulary().index(WORD)
DEATHS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "segfault": "ctypes.string_at(0)",
    "exit": "os._exit(3)",
    "hung": "signal.pause()",
    "error": "raise RuntimeError('a kernel refused')",
}

_SITECUSTOMIZE = """
import ctypes, importlib.abc, importlib.util, os, signal, sys


class Poisoner(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "pipelines.encode":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            poison(module)

        spec.loader.exec_module = exec_module
        return spec


def poison(module):
    healthy = module.Encoder.encode_tokens

    def encode_tokens(self, tokens):
        if (tokens.ids == {token}).any():
            {death}
        return healthy(self, tokens)

    module.Encoder.encode_tokens = encode_tokens


sys.meta_path.insert(0, Poisoner())
"""


def write_sitecustomize(folder: Path, death: str) -> str:
    """Write the module that makes the model deadly and return its folder. death: one of DEATHS."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(token=TOKEN, death=DEATHS[death]))
    return str(folder)
