"""The command line. Errors end in one line on stderr and a non-zero exit; `--debug` shows the traceback."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nnfwd
from nnfwd import activations
from nnfwd import backend as _backend
from nnfwd.errors import DataFileError, NnfwdError, ShapeError
from nnfwd.io import READ, WRITTEN

if TYPE_CHECKING:
    from nnfwd.benchmark import Case, Earlier


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
    except KeyboardInterrupt as error:
        for note in getattr(error, "__notes__", ()):
            print(f"nnfwd: interrupted; {note}", file=sys.stderr)
        return 130
    except (NnfwdError, OSError) as error:
        if options.debug:
            raise
        print("; ".join([f"nnfwd: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
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
        sub._negative_number_matcher = re.compile(r"-\.?\d")  # so that --x -1.5,2 is a value and no option
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
        "run a network on files of inputs, however large",
        "nnfwd run model.npz x.npy -o y.npy --backend jax --dtype float32"
        "\n  nnfwd run model.npz x.npy -o y.npy --resume",
    )
    _model(run, nargs=None)
    kinds = ".npy, .npz, .csv, .zarr, or a folder of .npy files"
    run.add_argument("input", metavar="INPUT", type=Path, help=f"inputs (..., in): {kinds}")
    run.add_argument("-o", "--output", metavar="OUTPUT", type=Path, required=True, help=f"outputs (..., out): {kinds}")
    run.add_argument(
        "--backend", metavar="NAME", default="numpy", help="array library to compute with (default: numpy)"
    )
    run.add_argument("--device", metavar="DEVICE", help="as `nnfwd backends --devices` prints it")
    run.add_argument("--dtype", metavar="DTYPE", help="float16, bfloat16, float32 or float64 (default: the input's)")
    run.add_argument(
        "--precision", choices=_backend.PRECISIONS, default="highest", help="of products (default: highest)"
    )
    run.add_argument("--labels", action="store_true", help="write the classes of the rows instead of the outputs")
    run.add_argument("--workers", metavar="N", type=int, help="blocks computed at a time (default: all processors)")
    run.add_argument(
        "--dask", metavar="ADDRESS", help="compute on a Dask cluster: tcp://host:8786, or the scheduler's file"
    )
    run.add_argument("--resume", action="store_true", help="go on with what an interrupted run has left, if it has")
    run.add_argument("--force", action="store_true", help="replace OUTPUT, or what an interrupted run has left")
    run.add_argument("--quiet", action="store_true", help="print errors only")

    converted = command(
        "convert", _convert, "write a network to a file of another format", "nnfwd convert model.keras model.onnx"
    )
    _model(converted, nargs=None)
    converted.add_argument("output", metavar="OUTPUT", type=Path, help=", ".join(WRITTEN))
    converted.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")

    explained = command(
        "explain", _explain, "the pass with the numbers put in, by loops and by matrices", "nnfwd explain --x 1.5,2,3"
    )
    _model(explained)
    explained.add_argument("--x", metavar="NUMBERS", type=_numbers, help="one input; with MODEL it must be given")
    explained.add_argument("--width", metavar="N", type=int, help="characters a line (default: the terminal's)")

    described = command("info", _info, "what networks are made of", "nnfwd info model.onnx")
    _model(described, nargs="*")
    described.add_argument("--json", action="store_true", help="print JSON")

    checked = command(
        "check",
        _check,
        "hold every backend of this machine, in every dtype, to the rounding-error bound; exit 1 if one is outside",
        "nnfwd check model.npz --data x.npy --backends numpy,jax",
    )
    _model(checked, default="random ones alone")
    checked.add_argument(
        "--data", metavar="X", type=Path, help="inputs (..., in) for it: .npy, .npz or .csv (default: 64 random rows)"
    )
    checked.add_argument("--backends", metavar="NAMES", default="all", help="such as numpy,jax (default: all usable)")
    checked.add_argument("--dtypes", metavar="NAMES", default="all", help="such as float32,float64 (default: all four)")
    checked.add_argument(
        "--precision",
        choices=_backend.PRECISIONS,
        default="highest",
        help="of products: highest is true IEEE, high allows TF32, medium bfloat16 (default: highest)",
    )
    checked.add_argument("--plot", metavar="FILE", type=Path, help="draw |error| / bound: .png, .svg or .pdf")
    checked.add_argument("--json", action="store_true", help="print JSON")
    checked.add_argument("--force", action="store_true", help="replace FILE if it exists")

    measured = command(
        "bench",
        _bench,
        "measure the published cases, or a model of yours, on every backend and beside other libraries",
        "nnfwd bench model.npz --rows 1,10000 --peers\n  nnfwd bench --peers --json > before.json"
        "\n  nnfwd bench --against before.json",
    )
    _model(measured, default="the published cases")
    measured.add_argument(
        "--peers", action="store_true", help="measure ONNX Runtime, PyTorch, JAX, scikit-learn and plain NumPy too"
    )
    measured.add_argument("--case", metavar="NAMES", help="published cases such as digits,jets-1 (default: all)")
    measured.add_argument("--rows", metavar="N,N", type=_counts, help="rows at once (default: 1,10000 for a MODEL)")
    measured.add_argument("--data", metavar="X", type=Path, help="inputs (..., in) for MODEL: .npy, .npz or .csv")
    measured.add_argument("--backends", metavar="NAMES", default="all", help="such as numpy,jax (default: all usable)")
    measured.add_argument("--rounds", metavar="N", type=int, default=15, help="times each is measured (default: 15)")
    measured.add_argument("--threads", metavar="N", type=int, help="of everyone (default: all cores)")
    measured.add_argument("--json", action="store_true", help="print JSON")
    measured.add_argument(
        "--against", metavar="FILE", type=Path, help="compare with an earlier --json, and measure what it has"
    )
    measured.add_argument(
        "--limit", metavar="R", type=float, default=1.25, help="exit 1 where now / then is above (default: 1.25)"
    )
    measured.add_argument("--plot", metavar="FILE", type=Path, help="draw the ratios: .png, .svg or .pdf")
    measured.add_argument("--force", action="store_true", help="replace FILE if it exists")

    plot = command("plot", _plot, "draw a picture", "nnfwd plot network --x 1.5,2,3 -o network.svg")
    plot.add_argument("what", metavar="WHAT", choices=_PICTURES, help=", ".join(_PICTURES))
    _model(plot)
    plot.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help=".png, .svg or .pdf")
    plot.add_argument("--x", metavar="NUMBERS", type=_numbers, help="one input: for node and network")
    plot.add_argument("--w", metavar="NUMBERS", type=_numbers, help="weights: for node, weight and bias")
    plot.add_argument("--b", metavar="NUMBERS", type=_numbers, help="biases: for node and bias")
    plot.add_argument("--activation", metavar="NAME", default="sigmoid", help="for all but network (default: sigmoid)")
    plot.add_argument("--dpi", type=int, default=160, help="dots an inch of a .png (default: %(default)s)")
    plot.add_argument("--force", action="store_true", help="replace FILE if it exists")

    found = command(
        "backends", _backends, "the array libraries, installed or not, and their devices", "nnfwd backends --devices"
    )
    found.add_argument("--devices", action="store_true", help="import each library and ask for its usable devices")
    found.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _model(command: argparse.ArgumentParser, *, nargs: str | None = "?", default: str = "the tutorial's") -> None:
    text = f"a network: {' '.join(READ)}" + ("" if nargs is None else f" (default: {default})")
    command.add_argument("model", metavar="MODEL", type=Path, nargs=nargs, help=text)
    reading = command.add_argument_group("what a file of bare arrays does not state")
    reading.add_argument(
        "--activations",
        metavar="NAMES",
        type=_activations,
        help="after each layer, such as relu,leaky_relu(negative_slope=0.2),identity; a single one is for all",
    )
    reading.add_argument(
        "--prefix", metavar="NAMES", type=_listed, help="which layers, such as policy,head: the starts of their names"
    )
    reading.add_argument(
        "--epsilon", metavar="E", type=float, help="of batch normalisations; PyTorch's default is 1e-5"
    )
    reading.add_argument("--weights", metavar="FILE", type=Path, help="the .h5 that belongs to a .json of Keras")


_READING = ("activations", "prefix", "epsilon", "weights")


def _load(path: Path, options: argparse.Namespace) -> nnfwd.Network:
    return nnfwd.load(path, **{name: getattr(options, name) for name in _READING})


def _described(path: Path, options: argparse.Namespace) -> dict[str, object]:
    """What `info` says of a file. Of bare arrays without activations it says all else."""
    from nnfwd.explain import describe
    from nnfwd.io import facts, find
    from nnfwd.io.state_dict import UNSTATED

    takes = find(path).takes if path.is_file() else ()
    given = {name: getattr(options, name) for name in _READING if len(options.model) == 1 or name in takes}
    known = facts(path)
    try:
        return {"file": str(path), **known, **describe(nnfwd.load(path, **given))}
    except NnfwdError:
        if "activations" not in takes or options.activations is not None:
            raise
    described = describe(nnfwd.load(path, **given | {"activations": UNSTATED}))
    for row in described["layers"]:
        row["activation"] = row["activation"].replace("identity", "not stated: give --activations")
    return {"file": str(path), **known, **described}


def _activations(text: str) -> object:
    """The activations of `relu,leaky_relu(negative_slope=0.2)`: a list, or the only one."""
    found: list[object] = []
    one = r"([^,()]+)(?:\(([^()]*)\))?"
    if not re.fullmatch(f"{one}(,{one})*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write names with commas between, relu,leaky_relu(negative_slope=0.2)"
        )
    for name, settings in re.findall(one, text):
        try:
            values = {k.strip(): float(v) for k, _, v in (part.partition("=") for part in settings.split(",") if part)}
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write a parameter as name(parameter=0.2)") from None
        try:
            found.append(activations.named(name.strip())(**values) if values else name.strip())
        except NnfwdError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return found[0] if len(found) == 1 else found


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.replace(";", ",").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 1.5,2,3") from None


def _network_and_x(options: argparse.Namespace) -> tuple[nnfwd.Network, list[float] | None]:
    """The model asked for with its --x, or the tutorial's network with its own x."""
    from nnfwd.demo import tutorial

    if options.model is not None:
        return _load(options.model, options), options.x
    net, x = tutorial()
    return net, options.x or x


def _explain(options: argparse.Namespace) -> int:
    from nnfwd.explain import explain

    net, x = _network_and_x(options)
    if x is None:
        raise ShapeError(f"give one input of {net.in_features or 'any number of'} numbers, --x 1.5,2,...")
    print(explain(net, x, width=options.width or shutil.get_terminal_size((100, 24)).columns))
    return 0


def _info(options: argparse.Namespace) -> int:
    from nnfwd.demo import tutorial
    from nnfwd.explain import describe, table

    if not options.model:
        described = describe(tutorial()[0])
        print(json.dumps(described, indent=2) if options.json else table(described))
        return 0
    found, status = [], 0
    for path in options.model:
        try:
            described = _described(path, options)
        except (NnfwdError, OSError) as error:
            if len(options.model) == 1 or options.debug:
                raise
            status = 1
            described = {"file": str(path), "error": str(error)}
            print(f"nnfwd: {error}", file=sys.stderr)
        found.append(described)
        if not options.json and "error" not in described:
            print(table(described), end="\n" if path == options.model[-1] else "\n\n", flush=True)
    if options.json:
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2))
    return status


def _convert(options: argparse.Namespace) -> int:
    from nnfwd.io.files import check_output

    check_output(options.output, WRITTEN, sources=[options.model], force=options.force)
    net = _load(options.model, options)
    nnfwd.save(net, options.output)
    print(f"{options.model} -> {options.output}: {net.in_features} -> {net.out_features}, {net.dtype}")
    return 0


_PICTURE_KINDS = (".png", ".svg", ".pdf")
_PICTURES = ("activation", "activations", "node", "weight", "bias", "network")


def _plot(options: argparse.Namespace) -> int:
    from nnfwd import plot
    from nnfwd.io.files import check_output, replacing

    path: Path = options.output
    if options.model is not None and options.what != "network":
        raise DataFileError(
            f"{options.what} draws no MODEL, and {options.model} was given: name a function by --activation"
        )
    check_output(path, _PICTURE_KINDS, force=options.force)
    name = options.activation
    if options.what == "activation":
        ax = plot.activation(name)
    elif options.what == "activations":
        ax = plot.activations()
    elif options.what == "node":
        ax = plot.node(options.x or [1.5, 2, 3], options.w or [0.2] * 3, *(options.b or [0.8])[:1], activation=name)
    elif options.what == "weight":
        ax = plot.weight_effect(options.w or (0.5, 1, 2), activation=name)
    elif options.what == "bias":
        ax = plot.bias_effect(options.b or (-8, 0, 8), weight=(options.w or [5])[0], activation=name)
    else:
        ax = plot.network(*_network_and_x(options))
    with replacing(path) as file:
        ax.figure.savefig(file, format=path.suffix[1:].lower(), dpi=options.dpi)
    print(f"wrote {path}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from nnfwd.demo import demo

    for line in demo(options.output):
        print(line, flush=True)
    return 0


def _check(options: argparse.Namespace) -> int:
    from nnfwd import checking, plot
    from nnfwd.io.files import check_output, replacing
    from nnfwd.streaming.sources import read_whole

    if options.data is not None and options.model is None:
        raise DataFileError(f"--data {options.data} needs a MODEL to run it")
    if options.plot is not None:
        check_output(options.plot, _PICTURE_KINDS, force=options.force)
    os.environ.setdefault("JAX_ENABLE_X64", "1")  # this process is ours, and JAX has no float64 without
    net = None if options.model is None else _load(options.model, options)
    x = None if options.data is None else read_whole(options.data)
    found = checking.checked(
        net,
        x,
        backends="all" if options.backends == "all" else _listed(options.backends),
        dtypes=checking.DTYPES if options.dtypes == "all" else _listed(options.dtypes),
        precision=options.precision,
    )
    if options.json:
        report = checking.Report.collected(found)
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        heading = iter([checking.HEADER])
        report = checking.Report.collected(found, show=lambda row: print(*heading, row, sep="\n", flush=True))
        print(report.summary)
    if options.plot is not None:
        with replacing(options.plot) as file:
            plot.agreement(report).figure.savefig(file, format=options.plot.suffix[1:].lower(), dpi=160)
    return 0 if report.ok else 1


def _bench(options: argparse.Namespace) -> int:
    from nnfwd import benchmark
    from nnfwd.benchmark.against import table
    from nnfwd.io.files import check_output, replacing
    from nnfwd.plot.axes import new_axes
    from nnfwd.plot.benchmark import benchmark as drawn
    from nnfwd.progress import Progress

    if options.plot is not None:
        check_output(options.plot, _PICTURE_KINDS, force=options.force)
        new_axes(1, 1)  # where matplotlib is not installed, now and not in five minutes
    earlier = None if options.against is None else benchmark.Earlier.read(options.against)
    cases = _cases(options, earlier)
    if earlier is not None:
        earlier.check(cases)
    cores = _backend.usable_cores()
    threads = cores if options.threads is None else options.threads
    peers = options.peers or (earlier is not None and earlier.had_peers)
    with _cores(threads), Progress() as tell:
        machine = benchmark.machine(threads)
        found = benchmark.benchmarked(
            cases,
            backends="all" if options.backends == "all" else _listed(options.backends),
            compare=peers,
            rounds=options.rounds,
            threads=threads,
            tell=tell,
        )
        heading = iter([f"{benchmark.described_machine(machine)}\n\n{benchmark.HEADER}"])

        def show(result: benchmark.Result) -> None:
            tell("")
            if not options.json:
                print(*heading, result, sep="\n", flush=True)

        report = benchmark.Report.collected(machine, found, show)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        print(report.summary)
    changes = [] if earlier is None else list(earlier.changes(report))
    if earlier is not None:  # beside JSON it goes to people, not into the file
        text = table(changes, list(earlier.notes(report)), earlier.path, options.limit)
        print(text, file=sys.stderr if options.json else sys.stdout)
    if options.plot is not None:
        with replacing(options.plot) as file:
            drawn(report).figure.savefig(file, format=options.plot.suffix[1:].lower(), dpi=160)
    slower = any(change.ratio > options.limit for change in changes)
    return 0 if report.ok and not slower else 1


def _cases(options: argparse.Namespace, earlier: "Earlier | None") -> list["Case"]:
    """What to measure: the model, the cases asked for, or those of the earlier run."""
    from nnfwd import benchmark
    from nnfwd.streaming.sources import read_whole

    if options.model is None:
        if options.data is not None:
            raise DataFileError(f"--data {options.data} needs a MODEL to run it")
        if options.case is None and earlier is not None:
            return earlier.cases(options.rows)
        return benchmark.published(None if options.case is None else _listed(options.case), options.rows)
    if options.case is not None:
        raise DataFileError(f"--case names published networks, and {options.model} was given: leave one out")
    x = None if options.data is None else read_whole(options.data)
    net = _load(options.model, options)
    if net.dtype == "float64":
        os.environ.setdefault("JAX_ENABLE_X64", "1")  # this process is ours, and JAX has no float64 without
    return benchmark.own(options.model.name, net, x, options.rows)


@contextlib.contextmanager
def _cores(threads: int) -> Iterator[None]:
    """Holds this process to as many cores, which is the one thing that JAX goes by: it counts them when it starts."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    if 0 < threads < len(before):
        os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _counts(text: str) -> list[int]:
    try:
        return [int(number.replace("_", "")) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 1,10000") from None


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _run(options: argparse.Namespace) -> int:
    from nnfwd.progress import Bar, Progress

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as schedulers end a job: it keeps what it has
    net = _load(options.model, options)
    if options.output.exists() and options.output.samefile(options.model):
        raise DataFileError(f"{options.output} is read from: choose another name for the output")
    with contextlib.ExitStack() as stack:
        executor = None
        if options.dask is not None:
            executor = stack.enter_context(_backend.load("dask").cluster(options.dask))  # type: ignore[attr-defined]
            logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what matters of it comes as an error of ours
        line = stack.enter_context(Progress(quiet=options.quiet))
        done = nnfwd.stream(
            net,
            options.input,
            options.output,
            backend=options.backend,
            device=options.device,
            dtype=options.dtype,
            precision=options.precision,
            labels=options.labels,
            workers=options.workers,
            executor=executor,
            resume=options.resume,
            force=options.force,
            progress=Bar(line, str(options.input)),
        )
    if not options.quiet:
        kept = f" ({done.kept:,} rows were there already)" if done.kept else ""
        print(f"{options.input} {done.source_shape} -> {options.output} {done.shape} {done.dtype}{kept}")
    return 0


def _backends(options: argparse.Namespace) -> int:
    found = nnfwd.backends(devices=options.devices)
    if options.json:
        print(json.dumps([dataclasses.asdict(info) for info in found], indent=2))
        return 0
    for info in found:
        devices = f"   {', '.join(info.devices)}" if info.devices else ""
        print(f"{info.name:16} {info.version or '-':16}{info.status}{devices}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
