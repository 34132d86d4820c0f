"""New processes without the ten seconds that imports take: a process that has imported the libraries forks itself.

[`ForkServer`] runs `python WORDS` in a child that shares nothing with the test but files and the network: it has its
own memory, environment, folder and output, can be killed, and ends as Python does. What a child cannot show is what
an import does: test_packaging.py and test_cli.py start Python itself.

The other half of this file is the program that forks: `python fork_server.py`.
"""

import atexit
import dataclasses
import gc
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path


__all__ = ["PATIENCE", "ChildProcess", "ForkServer"]

# Seconds after which a process counts as hung. Far beyond what any takes: how long that is depends on the machine.
PATIENCE = 900

# They bring torch, diffusers, transformers, accelerate, datasets, peft and all models along.
PRELOADED = (
    "hf_fae.training.loop",
    "hf_fae.cli",
    "hf_fae.loading",
    "hf_fae.convert.published",
    "hf_fae.inspection",
    "factories",
)

TESTS = Path(__file__).parent


@dataclasses.dataclass
class ChildProcess:
    """A forked process: what `subprocess.Popen` would be to it."""

    server: "ForkServer"
    pid: int
    stdout_path: Path
    stderr_path: Path
    returncode: int | None = None

    @property
    def stdout(self) -> str:
        return self.stdout_path.read_text()

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.request({"poll": self.pid})
        return self.returncode

    def wait(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"a process was killed after {PATIENCE} s; it had written {self.stderr[-6000:]}")
            time.sleep(0.005)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def check(self) -> "ChildProcess":
        """Waits for the end, which must be a success."""
        if self.wait() != 0:
            raise RuntimeError(f"The process ended with code {self.returncode}:\n{self.stderr[-6000:]}")
        return self


class ForkServer:
    """Starts processes of `python WORDS`; the server itself starts with the first of them.

    Args:
        folder: the working directory of processes, and where their outputs lie.
        environment: what libraries read while they are imported; `start` can only add what is read later.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder = folder
        # What a developer has set up for the Hub, or for a proxy, is nothing to the tests.
        foreign = re.compile(r"HF_(?!FAE_)|HUGGING_?FACE_|TRANSFORMERS_|.*_proxy$", re.IGNORECASE)
        paths = [str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not foreign.match(name)},
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            **environment,
        }
        self._server: subprocess.Popen | None = None
        self._num_started = 0

    def start(self, words: list, environment: dict[str, str] | None = None) -> ChildProcess:
        """Starts `python WORDS`: a script, `-c CODE` or `-m MODULE`, with its arguments."""
        self._num_started += 1
        outputs = [self.folder / f"process-{self._num_started}.{name}" for name in ("stdout", "stderr")]
        job = {
            "words": [str(word) for word in words],
            "environment": environment or {},
            "folder": str(self.folder),
            "outputs": [str(path) for path in outputs],
        }
        return ChildProcess(self, self.request(job), *outputs)

    def run(self, words: list, environment: dict[str, str] | None = None) -> str:
        """What `python WORDS` prints. Raises RuntimeError with its standard error if it fails."""
        return self.start(words, environment).check().stdout

    def start_two_processes(self, words: list, environment: dict[str, str] | None = None) -> list[ChildProcess]:
        """Starts `python WORDS` in two processes that know of each other, as `accelerate launch` does on two devices.

        On a CPU alone `accelerate launch` starts one process, so this sets the variables that torchrun sets.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        world |= {"ACCELERATE_USE_CPU": "true", **(environment or {})}
        return [self.start(words, {**world, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]

    def run_in_two_processes(self, words: list, environment: dict[str, str] | None = None) -> str:
        """What they print. Raises RuntimeError with the standard error of one that fails."""
        processes = self.start_two_processes(words, environment)
        try:
            return "".join(process.check().stdout for process in processes)
        finally:  # where one failed, the other would wait for it
            for process in processes:
                if process.poll() is None:
                    process.kill()

    def request(self, message: dict) -> int | None:
        if self._server is None:
            command = [sys.executable, str(TESTS / "fork_server.py")]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._server = subprocess.Popen(command, env=self.environment, cwd=self.folder, text=True, **pipes)
        self._server.stdin.write(json.dumps(message) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the fork server ended with code {self._server.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait()
            self._server.stdout.close()


def serve() -> list[str]:
    """Answers requests; returns in forked children only, with the words that they are to run."""
    for line in sys.stdin:
        job = json.loads(line)
        if "poll" in job:
            pid, status = os.waitpid(job["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                become(job)
                return job["words"]
        print(json.dumps(answer), flush=True)
    os._exit(0)


def become(job: dict) -> None:
    """Gives this process what it would have been started with."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    files = [os.open(os.devnull, os.O_RDONLY), *(os.open(path, flags) for path in job["outputs"])]
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["folder"])
    os.environ.update(job["environment"])


def run(words: list[str]) -> None:
    """As Python does it, up to what is imported already."""
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def run_and_exit(words: list[str]) -> None:
    """Python's own way out would take two seconds, to tear down modules that the operating system can drop."""
    code = 0
    try:
        run(words)
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for module in PRELOADED:
        __import__(module)
    if len(list(Path("/proc/self/task").glob("*"))) > 1:
        sys.exit("fork_server.py must have a single thread to fork safely; one of its imports has started another")
    gc.freeze()  # or the first collection in each child would copy all objects
    run_and_exit(serve())
