"""The command line. Errors end in one line on stderr and a non-zero exit; `--debug` shows the traceback."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import nnfwd
from nnfwd import backend as _backend
from nnfwd.errors import NnfwdError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        status: int = options.command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (NnfwdError, OSError) as error:
        if options.debug:
            raise
        print(f"nnfwd: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnfwd", description="Run a trained feed-forward network on whatever array library you have."
    )
    parser.add_argument("--version", action="version", version=f"nnfwd {nnfwd.__version__}")
    parser.set_defaults(command=None, debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, function: object, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(command=function)
        return sub

    demo = command("demo", _demo, "the tutorial, then handwritten digits, on every usable backend", "nnfwd demo")
    demo.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        type=Path,
        default=Path("nnfwd-demo"),
        help="for pictures (default: %(default)s)",
    )

    run = command(
        "run",
        _run,
        "run a network on a file of inputs",
        "nnfwd run model.npz x.npy -o y.npy --backend jax --dtype float32",
    )
    run.add_argument("model", metavar="MODEL", type=Path, help="a network: .npz")
    run.add_argument("input", metavar="INPUT", type=Path, help="inputs (..., in): .npy, .npz or .csv")
    run.add_argument(
        "-o", "--output", metavar="OUTPUT", type=Path, required=True, help="outputs (..., out): .npy, .npz or .csv"
    )
    run.add_argument(
        "--backend", metavar="NAME", default="numpy", help="array library to compute with (default: numpy)"
    )
    run.add_argument("--device", metavar="DEVICE", help="as `nnfwd backends --devices` prints it")
    run.add_argument("--dtype", metavar="DTYPE", help="float16, bfloat16, float32 or float64 (default: the input's)")
    run.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")

    found = command(
        "backends", _backends, "the array libraries, installed or not, and their devices", "nnfwd backends --devices"
    )
    found.add_argument("--devices", action="store_true", help="import each library and ask for its usable devices")
    found.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _demo(options: argparse.Namespace) -> int:
    from nnfwd.demo import demo

    for line in demo(options.output):
        print(line, flush=True)
    return 0


def _run(options: argparse.Namespace) -> int:
    from nnfwd.io.arrays import check_output, read_array, write_array

    net = nnfwd.load(options.model)
    x, has_dtype = read_array(options.input)
    check_output(options.output, source=options.input, force=options.force)
    dtype = options.dtype or (None if has_dtype else net.dtype)
    y = net(x, backend=options.backend, device=options.device, dtype=dtype)
    home = _backend.of(y).to_numpy(y)
    write_array(options.output, home)
    print(f"{options.input} {tuple(x.shape)} -> {options.output} {home.shape} {home.dtype}")
    return 0


def _backends(options: argparse.Namespace) -> int:
    found = nnfwd.backends(devices=options.devices)
    if options.json:
        print(json.dumps([dataclasses.asdict(info) for info in found], indent=2))
        return 0
    for info in found:
        devices = f"   {', '.join(info.devices)}" if info.devices else ""
        print(f"{info.name:16}{info.version or '-':16}{info.status}{devices}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
