"""A process that has torch, fusion and the studio imported, and forks itself for every part of the campaign.

A forked child starts in milliseconds and forks on by itself (`processes`), so that a command that is killed at a random
moment costs a fraction of a second. The server never computes anything: a process with threads cannot be forked safely.
"""

import gc
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
# A mount namespace of its own: small file systems can be mounted, and are gone with the process.
NAMESPACE = ("unshare", "--mount", "--map-root-user")


class ForkServer:
    """The client's end. `call` runs a function of a module in a forked child and returns what it returns."""

    def __init__(self, folder: Path) -> None:
        paths = [str(ROOT), str(ROOT / "app"), str(ROOT / "tests")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FUSION_CACHE": str(folder / "cache")}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TMPDIR": str(folder)}
        environment |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
        environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "TRANSFORMERS_VERBOSITY": "error"}
        environment |= {"DIFFUSERS_VERBOSITY": "error"}
        words = [*namespace(), "nice", "-n", "5", sys.executable, "-m", "campaign.fork_server"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(words, env=environment, cwd=folder, **pipes)

    def call(self, function: str, *arguments: Any) -> Any:
        """`function` as "module:name". Raises AssertionError with the child's traceback."""
        pickle.dump((function, arguments), self.process.stdin)
        self.process.stdin.flush()
        value, problem = pickle.load(self.process.stdout)
        assert not problem, problem
        return value

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:  # it still works for a call that nobody waits for
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def namespace() -> tuple[str, ...]:
    """The words before a command that give it a mount namespace; none where that is not allowed."""
    try:
        allowed = subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    except OSError:
        return ()
    return NAMESPACE if allowed else ()


def import_everything() -> None:
    """Everything that a command imports when it needs it."""
    import accelerate  # noqa: F401
    import torch

    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    import fusion
    from fusion.cli import VERBS

    for name in fusion.__all__:
        getattr(fusion, name)
    for verb in VERBS:
        importlib.import_module(f"fusion.cli.{verb}")
    importlib.import_module("fusion_studio.interface")
    importlib.import_module("tiny").pipeline("sd1")  # diffusers and transformers import their classes lazily


def serve() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that is printed gets among the replies
    import_everything()
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        gc.collect()
        gc.freeze()  # children leave the pages of what is here alone
        child = os.fork()
        if not child:
            reply(replies, function, arguments)
        _, status = os.waitpid(child, 0)
        if status:
            pickle.dump((None, f"{function} ended with {os.waitstatus_to_exitcode(status)}"), replies)
            replies.flush()


def reply(replies: Any, function: str, arguments: tuple[Any, ...]) -> None:
    """In the child: run the function, send what it returns, and leave without the server's clean-up."""
    os.setsid()
    try:
        module, _, name = function.partition(":")
        value, problem = getattr(importlib.import_module(module), name)(*arguments), ""
    except BaseException:
        value, problem = None, traceback.format_exc()
    pickle.dump((value, problem), replies)
    replies.flush()
    os._exit(0)


if __name__ == "__main__":
    serve()
