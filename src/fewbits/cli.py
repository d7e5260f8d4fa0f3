"""The command line: arguments -> one public function -> a printed result.

Results go to stdout (JSON with --json), progress and errors to stderr. Exit codes: 0 done, 1 the machine
failed, 2 the input is wrong, 3 verification failed, 130 interrupted.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fewbits.errors import FewbitsError, InputError, ResourceError
from fewbits.ranks import LIMIT_S, RankError, join, own_device, ranks_of_environment
from fewbits.scheme import InputScheme, QuantScheme

# Imports make a million objects that stay: looking through them again and again took a tenth of
# `plan`. A collection for each 100,000 objects costs no memory to speak of. Measured 2026-11-25.
gc.set_threshold(100_000, 10, 10)
atexit.register(gc.freeze)  # nor are they looked through at the end, which took a second

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a language model 4-8x smaller and prove that the result is good.",
)
out = Console(soft_wrap=True, markup=False)  # a path may hold brackets
wide = Console(
    soft_wrap=True, width=200, markup=False
)  # tables are not squeezed into 80 columns of a pipe
err = Console(stderr=True, soft_wrap=True, markup=False)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, or a hub id.", show_default=False)]
Method = Annotated[
    str,
    typer.Option(
        help="rtn: round to nearest. int8: the same with --bits 8 --group-size none. llm-int8: inputs "
        "in 8 bits too, but for outlier columns. q4_k: Q4_K of llama.cpp. With --calibration: gptq, "
        "awq, awq+gptq, weighted-rtn; +learned behind one of them: then rounding is learned, block by "
        "block; best: awq+gptq+learned, and each matrix in a scheme of its own, by what rounding it "
        "costs."
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="What the model is run on: a text file, a .jsonl file, hub:owner/name/config:split:column, "
        "or self for text that the model writes."
    ),
]
Stats = Annotated[
    Path | None,
    typer.Option(metavar="STATS", help="Folder that measure made, instead of --calibration."),
]
Samples = Annotated[int, typer.Option(help="Of calibration.")]
SeqLen = Annotated[
    int | None, typer.Option(help="Tokens of a sample.  [default: 2048, at most the context]")
]
Seed = Annotated[int, typer.Option(help="Of the draw of samples.")]
BitsPerWeight = Annotated[
    float | None,
    typer.Option(
        "--bits-per-weight",
        metavar="B",
        help="Of all weight files, at most, like 3.7, instead of --bits and --group-size: each matrix "
        "gets its own scheme, by what rounding it costs.",
        show_default=False,
    ),
]
FileSize = Annotated[
    str | None,
    typer.Option("--memory", help="The same in bytes, like 4GB.", show_default=False),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="Like 6GB: the work is divided so that it takes less, or the run is refused."),
]
Bits = Annotated[int | None, typer.Option(help="8, 4, 3 or 2.  [default: 4; int8, llm-int8: 8]")]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="llm-int8: columns with larger inputs stay in 16 bit: those that --calibration finds, or "
        "without it those of each call; 0: none does.  [default: 6]"
    ),
]
GroupSize = Annotated[
    str | None,
    typer.Option(help="Input columns that share a scale, or none.  [default: 128; 8 bits: none]"),
]
PerTensor = Annotated[
    bool,
    typer.Option(
        "--per-tensor", help="One scale for a whole matrix; of llm-int8 also for all inputs of a call."
    ),
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="Store a zero point with each scale.")]
Trellis = Annotated[
    bool,
    typer.Option(
        "--trellis",
        help="Codes of 2 to 4 bits that are looked up together with their neighbours': half the squared "
        "error; in fewbits' own format.",
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        help="PATTERN=SCHEME for the modules a glob matches (or re:REGEX), such as "
        "'*.down_proj=w8-channel' or '*.0.*=float'. May be repeated; the last match decides."
    ),
]
Head = Annotated[bool, typer.Option("--head", help="Quantize the output head too.")]
Embeddings = Annotated[
    bool,
    typer.Option(
        "--embeddings",
        help="Quantize the embedding too, and a head that is tied to it: in 8 bits, or as --override "
        "says.",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        help="compressed-tensors, gptq, gptq-v2, awq, gguf or fewbits.  [default: the first, or the "
        "last where it cannot hold the model; q4_k: gguf]"
    ),
]


Compiled = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Run steps after the prompt as one graph on a CPU: faster, once PyTorch's compiler has "
        "made it, in the first.",
    ),
]
Int8Inputs = Annotated[
    bool,
    typer.Option(
        "--int8-inputs", help="Round the inputs of matrices of up to 4 bits to 8 bits on a CPU: faster."
    ),
]
Device = Annotated[
    str,
    typer.Option(help="Where blocks are run and matrices rounded, one block at a time: cpu or cuda."),
]
RunsOn = Annotated[str, typer.Option("--device", help="Where the model runs: cpu or cuda.")]
RankTimeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="Of several ranks, started by torchrun: one without a sign of life is lost.",
    ),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Throw away what OUT and unfinished work for it hold.")
]
Client = Annotated[
    list[str] | None,
    typer.Option(
        help="That must load the result: vllm, vllm==0.24, transformers, gptqmodel or llama.cpp. May be "
        "repeated.  [default: what some would not load is a note]"
    ),
]
TensorParallel = Annotated[
    int, typer.Option(min=1, help="Devices that a client divides the model between.")
]


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """A command of the app; every failure on purpose is one line and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        with contextlib.suppress(ValueError):  # not in the main thread: then nobody signals us either
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            function(*args, **kwargs)
        except RankError as error:  # it may be rank 0 that did not come
            _leave(f"error: {error}", error.exit_code, every_rank=True)
        except FewbitsError as error:
            _leave(f"error: {error}", error.exit_code)
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # torch's own kind
                raise
            _leave("error: the machine has no memory left for this", 1)
        except MemoryError:
            _leave("error: the machine has no memory left for this", 1)
        except OSError as error:
            _leave(f"error: {error}", 1)
        except KeyboardInterrupt:
            kept = function.__name__ in ("compare", "convert", "measure", "quantize")
            what = "what was finished is kept" if kept else "nothing was left behind"
            again = "goes on" if kept else "starts again"
            _leave(f"interrupted: {what}; the same command {again}", 130)

    return app.command()(run)


def _leave(line: str, code: int, every_rank: bool = False) -> NoReturn:
    """Say one line and end; of several ranks only the first says what it ends with."""
    if ranks_of_environment() == 1:
        err.print(line, markup=False, highlight=False)
        raise typer.Exit(code) from None
    if every_rank or os.environ["RANK"] == "0":
        err.print(line, markup=False, highlight=False)
    sys.stdout.flush()
    os._exit(code)  # threads that wait for other ranks would be waited for


@contextmanager
def _progress(shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each thing that is being done; nothing where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=err, transient=True, disable=not (shown and err.is_terminal)
    ) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            name = what.partition(",")[0]  # behind a comma stands how it is going
            if name not in tasks:
                tasks[name] = bars.add_task(what, total=total)
            bars.update(tasks[name], description=what, completed=done, total=total)

        yield update


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def _bytes(text: str | None, option: str = "--max-memory") -> int | None:
    """A size like 6GB or 500MB in bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    size = 0 if match is None else float(match[1]) * 1000 ** " kMGT".index(match[2] or " ")
    if not 1 <= size < float("inf"):
        raise InputError(f"{option} is {text!r}; accepted are sizes like 6GB and 500MB")
    return int(size)


def _scheme(
    method: str,
    bits: int | None,
    group_size: str | None,
    per_tensor: bool,
    asymmetric: bool,
    threshold: float | None = None,
    calibrated: bool = False,
) -> QuantScheme:
    last = method.rpartition("+")[2]
    eight = last in ("int8", "llm-int8")
    if eight and bits not in (None, 8):
        raise InputError(f"--method {method} with --bits {bits}; accepted is 8, or --method rtn")
    if eight and group_size not in (None, "none"):
        raise InputError(
            f"--method {method} with --group-size {group_size}; accepted is none, or --method rtn"
        )
    if threshold is not None and last != "llm-int8":
        raise InputError(f"--threshold with --method {method}; accepted is --method llm-int8")
    if last == "q4_k":
        for option, given, fine in (("bits", bits, 4), ("group-size", group_size, "32")):
            if given not in (None, fine):
                raise InputError(f"--method q4_k with --{option} {given}; accepted is {fine}")
        if per_tensor:
            raise InputError("--method q4_k with --per-tensor; accepted is --method rtn")
        return QuantScheme(4, "group", 32, symmetric=False, two_level=True)
    if last == "llm-int8":
        limit = 6.0 if threshold is None else threshold
        inputs = InputScheme("tensor" if per_tensor else "token", limit, calibrated and limit > 0)
        return QuantScheme(8, "tensor" if per_tensor else "channel", None, not asymmetric, inputs)
    if per_tensor and group_size not in (None, "none"):
        raise InputError(f"--per-tensor with --group-size {group_size}; accepted is one of them")
    bits = (8 if eight else 4) if bits is None else bits
    if per_tensor:
        return QuantScheme(bits, "tensor", None, not asymmetric)
    size = group_size or ("none" if bits == 8 else "128")
    if size == "none":
        return QuantScheme(bits, "channel", None, not asymmetric)
    if not (size.isascii() and size.isdigit()):
        raise InputError(f"--group-size is {size!r}; accepted are a number and none")
    return QuantScheme(bits, "group", int(size), not asymmetric)


def _check_size(
    bits_per_weight: float | None,
    memory: str | None,
    method: str,
    bits: int | None,
    group_size: str | None,
    per_tensor: bool,
    trellis: bool,
) -> None:
    """Refuse two answers to one question: a size, and one scheme for all."""
    size = "--memory" if bits_per_weight is None else "--bits-per-weight"
    if bits_per_weight is not None and memory is not None:
        raise InputError("--bits-per-weight and --memory are both given; accepted is one of them")
    if bits_per_weight is None and memory is None:
        return
    given = {
        "--bits": bits is not None,
        "--group-size": group_size is not None,
        "--per-tensor": per_tensor,
        "--trellis": trellis,
        "--method int8": method == "int8",
    }
    for option, there in given.items():
        if there:
            raise InputError(
                f"{option} with {size}, which chooses for each matrix; accepted is one of them, and "
                "--override for matrices that shall have a scheme of yours"
            )


@_command
def plan(
    model: Model,
    method: Annotated[
        str | None,
        typer.Option(help="As quantize takes it.  [default: a table of all]", show_default=False),
    ] = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    per_tensor: PerTensor = False,
    asymmetric: Asymmetric = False,
    trellis: Trellis = False,
    threshold: Threshold = None,
    override: Override = None,
    head: Head = False,
    embeddings: Embeddings = False,
    format: Format = None,
    client: Client = None,
    tensor_parallel: TensorParallel = 1,
    memory: Annotated[str | None, typer.Option(help="That it shall run in, like 4GB.")] = None,
    device: Annotated[str, typer.Option(help="It shall run on: cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Sequences at a time, for the KV cache.")] = 1,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of each.  [default: 8192, at most the model's]", show_default=False),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="What it is for: math, code, chat, finetune or research.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Result of compare.  [default: fewbits-compare/NAME/compare.json, if it is there]",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text that quantize will get: reading it takes time too.")
    ] = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    nodes: Annotated[int, typer.Option(help="Machines that quantize it together, by torchrun.")] = 1,
    gpus: Annotated[
        int, typer.Option(help="GPUs of each machine, a rank on each; 0: one rank on its processor.")
    ] = 0,
    probe: Annotated[
        bool, typer.Option(help="Measure this machine for half a second, to tell time and memory.")
    ] = True,
    json_: Json = False,
) -> None:
    """Say what each method would make of MODEL, what it takes, and what to do; reads headers only."""
    from fewbits.outlook import look_ahead
    from fewbits.report.plan import advice_lines, forecast_lines, forecast_table, headline
    from fewbits.scale import Group

    # Headers of tens of thousands of tensors stay until the end, which is near.
    gc.set_threshold(500_000)
    # PyTorch imports it where it finds it, 100 MB and half a second; nothing is run here.
    sys.modules.setdefault("triton", None)  # type: ignore[arg-type]
    named, last = method is not None, (method or "rtn").rpartition("+")[2]
    calibrated = last == "llm-int8" and calibration is not None
    scheme = _scheme(method or "rtn", bits, group_size, per_tensor, asymmetric, threshold, calibrated)
    scheme = replace(scheme, trellis=trellis)
    found = look_ahead(
        model,
        method=method,
        scheme=scheme if named or (bits, group_size) != (None, None) or per_tensor else None,
        symmetric=not asymmetric,
        bits=None if named else bits,
        overrides=tuple(override or ()),
        head=head,
        embeddings=embeddings,
        format=format,
        clients=tuple(client or ()),
        tensor_parallel=tensor_parallel,
        memory_bytes=_bytes(memory, "--memory"),
        device=device,
        batch=batch,
        context=context,
        task=task,
        measured=measured,
        calibration=calibration,
        samples=samples,
        length=seq_len,
        measure=probe,
        group=Group(nodes, gpus),
    )
    if json_:
        _print_json(found.to_json())
        return
    out.print(headline(found), highlight=False)
    wide.print(forecast_table(found.forecast))
    lines = [*forecast_lines(found.forecast), *map(str, found.notes), *advice_lines(found.advice)]
    for line in lines:
        out.print(line, highlight=False)


@_command
def quantize(
    model: Model,
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to be made.")],
    method: Method = "rtn",
    bits: Bits = None,
    group_size: GroupSize = None,
    per_tensor: PerTensor = False,
    asymmetric: Asymmetric = False,
    trellis: Trellis = False,
    threshold: Threshold = None,
    bits_per_weight: BitsPerWeight = None,
    memory: FileSize = None,
    override: Override = None,
    head: Head = False,
    embeddings: Embeddings = False,
    calibration: Calibration = None,
    stats: Stats = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    format: Format = None,
    client: Client = None,
    tensor_parallel: TensorParallel = 1,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the report, a page, to FILE.  [default: OUT/report.html]"
        ),
    ] = None,
    rank_timeout: RankTimeout = LIMIT_S,
    restart: Restart = False,
    json_: Json = False,
) -> None:
    """Quantize MODEL, write it to OUT, and verify what was written. Run again, it goes on.

    Started by torchrun, all ranks do it together; OUT must lie where all see it.
    """
    from fewbits.calibration import check_seed
    from fewbits.pipeline import quantize as run
    from fewbits.recipe import parse_override
    from fewbits.report import blocks_table, bytes_text
    from fewbits.report.page import check_page, run_page, write_page

    check_seed(seed)  # also where nothing is drawn
    _check_size(bits_per_weight, memory, method, bits, group_size, per_tensor, trellis)
    calibrated = calibration is not None or stats is not None
    scheme = _scheme(method, bits, group_size, per_tensor, asymmetric, threshold, calibrated)
    scheme = replace(scheme, trellis=trellis)
    overrides = tuple(map(parse_override, override or ()))
    if html is not None and html.parent != out_folder:
        check_page(html)
    with join(rank_timeout) as ranks, _progress(ranks.leads) as progress:
        result = run(
            model,
            out_folder,
            method="rtn" if method == "int8" else method,
            scheme=scheme,
            overrides=overrides,
            head=head,
            embeddings=embeddings,
            calibration=calibration,
            statistics=stats,
            bits_per_weight=bits_per_weight,
            memory=_bytes(memory, "--memory"),
            samples=samples,
            length=seq_len,
            seed=seed,
            max_memory=_bytes(max_memory),
            device=own_device(device),
            format=format,
            clients=tuple(client or ()),
            tensor_parallel=tensor_parallel,
            restart=restart,
            progress=progress,
            ranks=ranks,
        )
    if not ranks.leads:
        return
    page, missing = html or out_folder / "report.html", None
    try:
        check_page(page)
        write_page(run_page(result, _own_command()), page)
    except (InputError, ResourceError) as error:  # the checkpoint is done and verified: do not fail now
        missing = f"skip: no report.html: {error}"
    if json_:
        _print_json(result.to_json())
        return
    _print_written(result, result.ledger.scheme)
    _print_allocation(result)
    if result.ledger.blocks:
        wide.print(blocks_table(result.ledger.blocks))
    if result.run.get("resumed_steps") and not result.reused:
        out.print(f"went on after {result.run['resumed_steps']} finished steps of an earlier process")
    taken, most = result.run.get("memory_bytes"), result.run.get("max_memory")
    if taken is not None and most is not None and taken["peak"] > most:
        out.print(f"warning: memory was at most {bytes_text(taken['peak'])}, above --max-memory")
    if result.ledger.blocks and taken is not None:
        out.print(
            f"{result.run['elapsed_s']:.0f} s; memory {bytes_text(taken['before'])} before, at most "
            f"{bytes_text(taken['peak'])}{'' if taken['anonymous'] else ' with mapped files'}",
            highlight=False,
        )
    _print_notes([str(note) for note in result.ledger.notes])
    out.print(missing or f"report: {page}", highlight=False)


@_command
def measure(
    model: Model,
    stats: Annotated[Path, typer.Argument(metavar="STATS", help="Folder to be made.")],
    calibration: Annotated[
        str,
        typer.Option(
            help="What the model is run on: a text file, a .jsonl file, "
            "hub:owner/name/config:split:column, or self for text that the model writes."
        ),
    ],
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    restart: Restart = False,
    json_: Json = False,
) -> None:
    """Run MODEL over calibration once, and keep in STATS what `quantize --stats` needs of it."""
    from fewbits.measure import measure as run
    from fewbits.report import bytes_text

    with _progress() as progress:
        result = run(
            model,
            stats,
            calibration=calibration,
            samples=samples,
            length=seq_len,
            seed=seed,
            max_memory=_bytes(max_memory),
            device=device,
            restart=restart,
            progress=progress,
        )
    if json_:
        _print_json(result.to_json())
        return
    told, data = result.to_json(), result.statistics.calibration
    done = "already there, and verified" if result.reused else "measured"
    out.print(
        f"{result.folder}: {done}; {bytes_text(result.size_bytes)}, {told['blocks']} blocks, "
        f"{told['inputs']} inputs; {data['samples']} samples of {data['length']} tokens of "
        f"{data['source']}; {result.run.get('elapsed_s', 0):.0f} s",
        highlight=False,
    )
    costly = _costliest(result.statistics.damage)
    if costly is not None:
        out.print(costly, highlight=False)
    _print_notes([str(note) for note in result.statistics.notes])


@_command
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A quantized checkpoint, or a hub id.")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to be made.")],
    format: Annotated[str, typer.Option(help="To write: one of those that `quantize` writes.")],
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round what the format cannot hold, and say the loss.")
    ] = False,
    client: Client = None,
    tensor_parallel: TensorParallel = 1,
    restart: Restart = False,
    json_: Json = False,
) -> None:
    """Write IN in another format to OUT, integer by integer, and verify what was written."""
    from fewbits.convert import convert as run

    with _progress() as progress:
        result = run(
            source,
            out_folder,
            format=format,
            requantize=requantize,
            clients=tuple(client or ()),
            tensor_parallel=tensor_parallel,
            restart=restart,
            progress=progress,
        )
    if json_:
        _print_json(result.to_json())
        return
    codes = [entry.quantized for entry in result.ledger.tensors.values()]
    schemes = sorted({held.scheme for held in codes if held is not None})
    _print_written(result, ", ".join(schemes))
    _print_notes([str(note) for note in result.ledger.notes])


@_command
def verify(
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="A checkpoint of fewbits.")],
    source: Annotated[str | None, typer.Option(help="The checkpoint it was made from.")] = None,
    forward: Annotated[bool, typer.Option(help="Also load it and run it on a few tokens.")] = True,
    json_: Json = False,
) -> None:
    """Read OUT back and compare every file, tensor and integer with its ledger."""
    from dataclasses import asdict

    from fewbits.checkpoint import resolve
    from fewbits.load import check_forward
    from fewbits.verify import verify as run

    with _progress() as progress:
        result = run(out_folder, None if source is None else resolve(source), progress)
    if forward:
        check_forward(out_folder)
    if json_:
        _print_json(asdict(result) | {"forward": forward})
        return
    with_source = f", {result.source_tensors} source tensors" if source is not None else ""
    ran = "; a forward pass gave finite logits" if forward else ""
    out.print(
        f"{out_folder}: verified {result.files} files, {result.tensors} tensors, the integers of "
        f"{result.codes} weights{with_source}{ran}",
        highlight=False,
    )


@_command
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or hub ids.")],
    text: Annotated[
        str, typer.Option(help="A text file, a .jsonl file, or hub:owner/name/config:split:column.")
    ],
    reference: Annotated[
        str | None, typer.Option(help="What they should behave like, usually the float model.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a window.  [default: 2048, at most the context]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many windows, evenly spread.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens per second too.")] = False,
    int8_inputs: Int8Inputs = False,
    device: RunsOn = "cpu",
    rank_timeout: RankTimeout = LIMIT_S,
    json_: Json = False,
) -> None:
    """Measure perplexity, and against a reference KL, agreement and flips, with standard errors."""
    import platform

    from fewbits.checkpoint import resolve
    from fewbits.evaluate import evaluate as run
    from fewbits.load import find_device, load
    from fewbits.report import Row, evaluation_table
    from fewbits.speed import measure_size, measure_speed
    from fewbits.text import read_text

    documents = read_text(text)
    if seq_len is not None and seq_len < 3:
        raise InputError(f"--seq-len is {seq_len}; windows need at least 3 tokens")
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; accepted are numbers from 1")
    sizes = [measure_size(resolve(model)) for model in models]
    place = find_device(own_device(device))
    other = None if reference is None else load(reference, device=place)
    rows = []
    with join(rank_timeout) as ranks, _progress(ranks.leads) as progress:
        for model, size in zip(models, sizes, strict=True):
            # The reference is compared with itself: its row shows zeros, not blanks.
            network = None  # the last one goes before the next one comes
            network = other if model == reference else load(model, device=place, int8_inputs=int8_inputs)
            measured = run(
                network, other, text=documents, length=seq_len, limit=limit, progress=progress,
                ranks=ranks,
            )  # fmt: skip
            timed = measure_speed(network) if speed and ranks.leads else None
            rows.append(Row(Path(model).name, size, measured, timed))
    if not ranks.leads:
        return
    if json_:
        _print_json({"python": platform.python_version(), "models": [row.to_json() for row in rows]})
        return
    wide.print(evaluation_table(rows))
    first = rows[0].evaluation
    out.print(
        f"{first.tokens} tokens in {first.windows} windows of at most {first.length}, from {first.text} "
        f"(sha256 {first.text_sha256[:16]}); errors are standard errors over windows; "
        f"Python {platform.python_version()}",
        highlight=False,
    )


@_command
def compare(
    model: Model,
    methods: Annotated[
        str | None,
        typer.Option(
            help="By commas: int8-tensor, int8, llm-int8, q4_k; rtn, weighted-rtn, gptq, awq, awq+gptq, "
            "best, which take --bits and --bits-per-weight; or METHOD=SCHEME, like gptq=w3-g64 and "
            "best=3.7bpw.  [default: all but q4_k, weighted-rtn and, without --bits-per-weight, best]"
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(help="By commas: 8, 4, 3, 2.  [default: 4; with --bits-per-weight none]"),
    ] = None,
    bits_per_weight: Annotated[
        str | None,
        typer.Option(
            "--bits-per-weight",
            metavar="B,...",
            help="By commas, like 3,3.5,4: of all weight files, at most; each matrix gets its own "
            "scheme, by what rounding it costs.",
            show_default=False,
        ),
    ] = None,
    group_size: Annotated[str, typer.Option(help="Columns that share a scale, or none.")] = "128",
    text: Annotated[
        str,
        typer.Option(
            help="What quality is measured on: a text file, a .jsonl file, "
            "hub:owner/name/config:split:column, self for text that the model writes, or none."
        ),
    ] = "self",
    eval_len: Annotated[
        int | None, typer.Option(help="Tokens of a window.  [default: 2048, at most the context]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many windows, evenly spread.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Like --text, for the methods that need it; not none.  [default: self]"),
    ] = None,
    stats: Stats = None,
    samples: Samples = 128,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    format: Format = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="By commas: mmlu, arc_challenge, hellaswag, or other tasks of lm-eval."),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(help="Folder with files of MMLU, ARC, HellaSwag.  [default: from the hub]"),
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="At most so many questions of a task.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Solved questions before each.  [default: the task's own]")
    ] = None,
    speed: Annotated[bool, typer.Option(help="Measure memory and tokens per second too.")] = True,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="For the quantized models and the results; what is there already is used.  "
            "[default: fewbits-compare/ and the model's name]",
        ),
    ] = None,
    max_memory: MaxMemory = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report to FILE, a page.")
    ] = None,
    rank_timeout: RankTimeout = LIMIT_S,
    json_: Json = False,
) -> None:
    """Quantize MODEL by several methods and show what each costs: memory, speed and quality."""
    from fewbits.compare import Candidate
    from fewbits.compare import compare as run
    from fewbits.comparison import default_work
    from fewbits.report.page import check_page, comparison_page, write_page
    from fewbits.report.table import comparison_facts, comparison_tables

    if html is not None:
        check_page(html)
    _positive(limit=limit, task_limit=task_limit)
    if eval_len is not None and eval_len < 3:
        raise InputError(f"--eval-len is {eval_len}; windows need at least 3 tokens")
    chosen = None if methods is None else _listed(methods)
    candidates = Candidate.all(
        chosen,
        None if bits is None else [_number("--bits", n) for n in _listed(bits)],
        group_size,
        [_size(n) for n in _listed(bits_per_weight or "")],
    )
    folder = work or default_work(model)
    with join(rank_timeout) as ranks, _progress(ranks.leads) as progress:
        found = run(
            model,
            folder,
            candidates=candidates,
            text=None if text == "none" else text,
            length=eval_len,
            limit=limit,
            calibration=calibration,
            statistics=stats,
            samples=samples,
            sample_length=seq_len,
            seed=seed,
            format=format,
            tasks=tuple(_listed(tasks or "")),
            task_data=task_data,
            task_limit=task_limit,
            shots=shots,
            max_memory=_bytes(max_memory),
            speed=speed,
            progress=progress,
            ranks=ranks,
        )
    if not ranks.leads:
        return
    if html is not None:
        write_page(comparison_page(found, _own_command()), html)
    if json_:
        _print_json(found.to_json())
        return
    for table in comparison_tables(found):
        wide.print(table, "")
    for line in comparison_facts(found):
        out.print(line, highlight=False)
    _print_notes(list(found.notes))


@_command
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    int8_inputs: Int8Inputs = False,
    compile_: Compiled = False,
    device: RunsOn = "cpu",
) -> None:
    """Stream text that MODEL writes after PROMPT."""
    import torch
    from transformers import TextStreamer

    from fewbits.calibration import check_seed
    from fewbits.evaluate import load_tokenizer
    from fewbits.load import find_device, load

    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is {max_new_tokens}; accepted are numbers from 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"--temperature is {temperature}; accepted are numbers from 0")
    check_seed(seed)
    network = load(model, device=find_device(device), int8_inputs=int8_inputs, compiled=compile_)
    tokenizer = load_tokenizer(model)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(network.device)
    context = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise InputError("the prompt holds no token")
    if context is not None and length + max_new_tokens > context:
        raise InputError(
            f"a prompt of {length} tokens and --max-new-tokens {max_new_tokens} exceed the context of "
            f"{context}"
        )
    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    network.generate(
        **inputs,
        **how,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


@_command
def bench(
    model: Model,
    prompt: Annotated[int, typer.Option(help="Tokens of the prefill.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    int8_inputs: Int8Inputs = False,
    compile_: Compiled = False,
    device: RunsOn = "cpu",
    json_: Json = False,
) -> None:
    """Measure memory and speed of MODEL, and say which kernel runs and why."""
    from fewbits.checkpoint import resolve
    from fewbits.load import find_device, kernel_notes, load
    from fewbits.native.library import summary
    from fewbits.report import bytes_text
    from fewbits.speed import measure_size, measure_speed

    if prompt < 1 or new_tokens < 1:
        raise InputError("--prompt and --new-tokens need numbers from 1")
    size = measure_size(resolve(model))
    network = load(model, device=find_device(device), int8_inputs=int8_inputs, compiled=compile_)
    notes = kernel_notes(network)
    speed = measure_speed(network, prompt, new_tokens)
    if json_:
        sizes = {"weight_bytes": size.weight_bytes, "bits_per_weight": size.bits_per_weight}
        _print_json(speed.to_json() | sizes | {"native_library": summary(), "notes": notes})
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row(
        "weights on disk", f"{bytes_text(size.weight_bytes)}, {size.bits_per_weight:.2f} bits each"
    )
    table.add_row("tensors in memory", bytes_text(speed.tensor_bytes))
    table.add_row("prefill", f"{speed.prefill:.0f} tokens/s ({speed.prompt} tokens)")
    table.add_row("decode", f"{speed.decode:.1f} tokens/s ({speed.new_tokens} tokens)")
    table.add_row("kernels", ", ".join(f"{count} x {name}" for name, count in speed.kernels.items()))
    table.add_row("native library", summary())
    table.add_row("threads", str(speed.threads))
    out.print(table)
    _print_notes(notes)


@_command
def inspect(
    model: Model,
    calibration: Annotated[
        str,
        typer.Option(
            help="What the model is run on: a text file, a .jsonl file, "
            "hub:owner/name/config:split:column, or self for text that the model writes."
        ),
    ] = "self",
    samples: Samples = 16,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a sample.  [default: 512, at most the context]")
    ] = None,
    seed: Seed = 0,
    threshold: Annotated[float, typer.Option(help="A column with an |x| above it is an outlier.")] = 6.0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a heat map to FILE, .svg or .png.")
    ] = None,
    json_: Json = False,
) -> None:
    """Show the outliers among the inputs of MODEL's matrices, and what they cost in 8 bits."""
    from fewbits.outliers import inspect_outliers
    from fewbits.report.heatmap import check_plot, write_heatmap
    from fewbits.report.table import outliers_table

    if plot is not None:
        check_plot(plot)
    with _progress() as progress:
        found = inspect_outliers(
            model,
            calibration=calibration,
            samples=samples,
            length=seq_len,
            seed=seed,
            threshold=threshold,
            progress=progress,
        )
    if plot is not None:
        write_heatmap(found, Path(model).name, plot)
    if json_:
        _print_json(found.to_json())
        return
    wide.print(outliers_table(found))
    data = found.calibration
    out.print(
        f"calibration: {data['source']}, {data['samples']} samples of {data['length']} tokens (sha256 "
        f"{data['sha256'][:16]}); outliers are columns with an |x| > {threshold:g}; errors are squared, "
        "over the squared output; ratio is the error of W8A8 over that with the outliers in 16 bit",
        highlight=False,
    )
    if any(row.experts for row in found.rows()):
        out.print(
            "experts of a block share a line: outliers, tokens and errors are summed over them, largest "
            "and median are the largest of any expert; --json has each expert",
            highlight=False,
        )
    for name in found.skipped:
        out.print(f"{name}: outside of the blocks, not looked at", highlight=False)
    _print_notes(list(found.notes))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(option: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"{option} has {text!r}; accepted are numbers, by commas")
    return int(text)


def _size(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"--bits-per-weight has {text!r}; accepted are numbers like 3.7, by commas"
        ) from None


def _positive(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; accepted are numbers from 1")


def _own_command() -> str:
    """What was typed, for the page, but for folders on the way to files."""
    words = []
    for word in sys.argv[1:]:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(option + equals + (Path(value).name if os.path.isabs(value) else value))
    return "fewbits " + shlex.join(words)


def _print_written(result: Any, scheme: str) -> None:
    """What was written, what became of every source tensor, and what was read back."""
    from fewbits.report import bytes_text

    done = "already there" if result.reused else "written"
    totals, checked = result.ledger.totals, result.verification
    of_codes = ("converted", "dequantized")
    outcomes = ("quantized", "copied", "folded", *of_codes, "dropped")
    told = [f"{totals[what]} {what}" for what in outcomes if totals[what] or what not in of_codes]
    out.print(
        f"{result.out}: {done} as {result.ledger.request['format']}, {scheme}; "
        f"{bytes_text(result.source_weight_bytes)} -> {bytes_text(result.weight_bytes)}, "
        f"{result.bits_per_weight:.2f} bits per weight over the whole file\n"
        f"ledger: {totals['source_tensors']} source tensors = {' + '.join(told)}\n"
        f"verified: {checked.files} files, {checked.tensors} tensors, the integers of {checked.codes} "
        "weights, read back by another library",
        highlight=False,
    )


def _print_allocation(result: Any) -> None:
    """Which scheme each matrix got, where they were chosen."""
    from fewbits.report.allocation import allocation_lines, allocation_table, read_schemes

    request, blocks = result.ledger.request, result.ledger.blocks
    if "allocation" not in request or "budget" not in request:
        return
    schemes, budget = read_schemes(request["allocation"]), request["budget"]
    wide.print(allocation_table(schemes))
    lines = allocation_lines(
        schemes,
        damage=budget["predicted"],
        bits_per_weight=result.bits_per_weight,
        price=budget["price"],
        realized=blocks[-1]["kl"] if blocks else None,
    )
    for line in lines:
        out.print(line, highlight=False)
    if blocks:
        out.print("realized KL leaves out what head and embedding cost", highlight=False)


def _costliest(damage: dict[str, dict[str, float]]) -> str | None:
    """Which matrix is the dearest to round, in the scheme that most can have."""
    labels = [label for nats in damage.values() for label in nats if label.startswith("w4-")]
    if not labels:
        return None
    label = max(labels, key=labels.count)
    nats = {name: found[label] for name, found in damage.items() if label in found}
    worst = max(nats, key=lambda name: nats[name])
    return (
        f"what rounding costs was predicted of {len(damage)} matrices: in {label} {len(nats)} of them "
        f"together {sum(nats.values()):.3g} nats of KL, most for {worst}, {nats[worst]:.3g}"
    )


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        out.print(note, markup=False, highlight=False)


if __name__ == "__main__":
    app()
