"""Functions of the tests run in other processes: one of their own, or one forked from this."""

import json
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any


def elsewhere(function: Callable[[Any], Any], argument: Any = None, *, strict: bool = False) -> Any:
    """What a function of a test module returns in a process of its own; with `strict`, a warning there is an error."""
    module = function.__module__
    code = f"import json, sys, {module}; print(json.dumps({module}.{function.__name__}(json.load(sys.stdin))))"
    environment = {key: value for key, value in os.environ.items() if key != "CUPY_TF32"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, *(["-W", "error"] if strict else []), "-c", code],
        input=json.dumps(argument),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def forked(function: Callable[[], Any]) -> Any:
    """What a function returns in a process forked from this one, which is ended when it has not within a minute."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX, and newer Pythons, warn of what is tested here
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        status = 1
        try:
            try:
                answer = {"returned": function()}
            except BaseException:  # pytest's own among them: the parent raises it again
                answer = {"raised": traceback.format_exc()}
            os.write(writer, json.dumps(answer).encode())
            status = 0
        finally:
            os._exit(status)  # whatever happened, the child must not go on as a second pytest
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the forked process waited for ever, or was ended: status {status}"
    answer = json.loads(text)
    assert "returned" in answer, answer["raised"]
    return answer["returned"]
