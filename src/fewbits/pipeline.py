"""quantize(): from a float checkpoint to a verified quantized one."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.blockwise import searched_samples
from fewbits.calibration import (
    DEFAULT_SAMPLES,
    SELF,
    Calibration,
)
from fewbits.checkpoint import (
    CONFIG,
    LEDGER,
    MAX_SHARD_BYTES,
    RUN,
    TensorInfo,
    Written,
    dtype_of,
    open_checkpoint,
    read_json,
    resolve,
)
from fewbits.errors import InputError, VerificationError
from fewbits.fit import Fitted, Size, find_format, find_unmeasured, fit, fitted_before
from fewbits.formats import GgufLayout
from fewbits.gguf_file import GGUF, write_gguf
from fewbits.journal import Journal, discard, throw_away
from fewbits.learning import learned_samples
from fewbits.ledger import (
    Ledger,
    describe_files,
    describe_machine,
    describe_source,
    plain,
    read_ledger,
)
from fewbits.load import find_device
from fewbits.measure import measure
from fewbits.memory import Memory, watch_memory
from fewbits.methods import GPTQ, Q4K, RTN, Learned, LLMInt8, Method
from fewbits.plan import Plan, make_plan
from fewbits.ranks import ALONE, Ranks
from fewbits.recipe import DEFAULT_SCHEME, LLM_INT8_SCHEME, Q4_K_SCHEME, Recipe, parse_method
from fewbits.scheme import InputScheme, QuantScheme
from fewbits.statistics import STATISTICS, Statistics, read_statistics
from fewbits.steps import SEEN_S, Steps, check_same, describe_calibration, follow, read_samples
from fewbits.tensor import Note
from fewbits.text import Text
from fewbits.transforms import Transform
from fewbits.verify import Progress, Verification, verify

_ACCEPTED = "accepted is a folder that does not exist yet, or the result of the same run"
BEST, BEST_METHOD = "best", "awq+gptq+learned"  # with schemes that are chosen
_CHOOSES = "accepted with it are rtn, weighted-rtn, gptq, awq, awq+gptq and best"
_UNMEASURED = (
    "outside of the blocks: what rounding it costs is not measured, and it stays in float; an override "
    "gives it a scheme"
)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A finished run: where, what the ledger says, what verification compared.

    `run` says how long it took and how much memory; it is no part of what is promised to be the same
    each time. `reused` tells that `out` held the finished result of the same run already.
    """

    out: Path
    ledger: Ledger
    verification: Verification
    weight_bytes: int
    source_weight_bytes: int
    parameters: int
    run: dict[str, Any]
    reused: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Over whole files: everything in the weight files, per source parameter."""
        return 8 * self.weight_bytes / self.parameters

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "request": self.ledger.request,
            "totals": self.ledger.totals,
            "weight_bytes": self.weight_bytes,
            "source_weight_bytes": self.source_weight_bytes,
            "bits_per_weight": self.bits_per_weight,
            "calibration": self.ledger.calibration,
            "blocks": self.ledger.blocks,
            "run": self.run,
            "notes": [asdict(note) for note in self.ledger.notes],
            "verified": asdict(self.verification),
            "reused": self.reused,
        }


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: str | Method | None = None,
    scheme: QuantScheme | None = None,
    overrides: tuple[tuple[str, QuantScheme | None], ...] = (),
    head: bool = False,
    embeddings: bool = False,
    transforms: tuple[Transform, ...] = (),
    learned: Learned | None = None,
    calibration: str | Path | Text | Tensor | Calibration | None = None,
    statistics: str | Path | None = None,
    bits_per_weight: float | None = None,
    memory: int | None = None,
    samples: int = DEFAULT_SAMPLES,
    length: int | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    device: str | torch.device = "cpu",
    format: str | None = None,
    clients: tuple[str, ...] = (),
    tensor_parallel: int = 1,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    restart: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Quantized:
    """Quantize a checkpoint, write it, and prove that what was written is what was chosen.

    Whatever ends the process, the same call goes on after the last block that was finished, and ends in
    the same bytes; until then the work lies beside `out`, in `.NAME.partial`.

    Args:
        model: folder of a float checkpoint, or a hub id.
        out: folder to be made. If it holds the finished result of the same run it is verified and
            left as it is.
        method: rounds each matrix; round to nearest by default. A name like "gptq" or "awq+gptq"
            stands for a method and the transforms before it; "best" for "awq+gptq" with schemes that
            are chosen such that the files are no larger than with `scheme` for all.
        scheme: 4 bits in groups of 128 by default; for "llm-int8" 8 bits by channel, inputs by token,
            with the outlier columns that calibration finds, or without it those of each call; for "q4_k"
            its own.
        overrides: (pattern, scheme or None for float); see `Recipe`.
        head: quantize the output head too.
        embeddings: quantize the embedding too, and with it a head that is tied to it: to
            `EMBEDDING_SCHEME` of recipe.py, if no override names another.
        transforms: rewrite each block before it is rounded, like `AWQ()`.
        learned: learn the rounding of each block from there, like `Learned()`; a name of a method that
            ends in "+learned" says so too.
        calibration: what calibrated methods and transforms run the model on; see
            `read_calibration`, also for samples, length and seed.
        statistics: folder that `measure` made of this model, instead of calibration: the text is not
            needed again. They are of the float model, not of what the quantized blocks before give; of
            the reference model the KL is the same within its error (0.0177 at 4 bits, 0.073 at 3).
        bits_per_weight: of all weight files, at most: the schemes are chosen such that the predicted KL
            is least. The head is chosen too, and the embedding with `embeddings` or a format that is
            named and holds it; `overrides` stay. What rounding costs is measured first, in a folder
            beside `out`, or taken from `statistics`.
        memory: the same in bytes.
        max_memory: bytes of anonymous memory that the process may take; the work is divided so that
            it stays below. Refused where that cannot be done.
        device: "cpu" or "cuda": where blocks are run and matrices rounded, one block at a time.
        format: one of `fewbits.formats.FORMATS`; by default "compressed-tensors", and "fewbits" for a
            model that it cannot hold; "gguf" for method "q4_k".
        clients: that must be able to load the result: "vllm", "vllm==0.24", "transformers", ...; what
            others would not load is a note.
        tensor_parallel: devices that a client divides the model between.
        max_shard_bytes: of a weight file.
        restart: throw away what `out` and the unfinished work beside it hold.
        progress: called with (what, done, total); on rank 0.
        ranks: processes that do this together, each of which calls it: see `fewbits.ranks.join`.

    Raises:
        InputError: nothing was written; or `out` or the work beside it is another run's.
        ResourceError: the disk failed, or has too little room; what is finished is kept.
        VerificationError: what was read back differs from what was chosen or written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = quantize("reference/model", f"{folder}/int4", scheme=QuantScheme(4, "group", 128))
    >>> result.ledger.totals["quantized"], result.verification.problems
    (42, [])
    """
    began = time.monotonic()
    best, size = method == BEST, Size(bits_per_weight, memory)
    method = BEST_METHOD if best else method
    named: tuple[Transform, ...] = ()
    if isinstance(method, str):
        named, method, said = parse_method(method)
        learned = learned or said
    method = method or RTN()
    if calibration is not None and statistics is not None:
        raise InputError("calibration and statistics are both given; accepted is one of them")
    calibrated = calibration is not None or statistics is not None
    scheme = scheme or _default_scheme(method, calibrated)
    if isinstance(method, LLMInt8):
        method = _static_or_not(scheme, overrides)
    if size.asked and isinstance(method, LLMInt8 | Q4K):
        what = "llm-int8" if isinstance(method, LLMInt8) else "q4_k"
        raise InputError(f"method {what} with a size, and it has one scheme; {_CHOOSES}")
    if isinstance(method, Q4K) and calibrated:
        method = replace(method, weighted=True)
    if isinstance(method, GPTQ) and (statistics is not None or best or size.asked):
        method = replace(method, corrected=False)  # what was measured is the float model's
    recipe = Recipe(
        method, scheme, overrides, head, named + transforms, embeddings=embeddings, learned=learned
    )
    out = Path(out)
    source = resolve(model)
    check_out(out, source)
    run = _Request(
        model, source, out, recipe, format, clients, tensor_parallel, samples, length, seed,
        max_memory, find_device(device), max_shard_bytes, restart, progress, ranks,
    )  # fmt: skip
    if not ranks.leads:
        return run.follow()
    with watch_memory() as memory_taken:
        if best or size.asked:
            result = run.take_fitted(size, calibration, statistics, began, memory_taken)
        else:
            stats = None if statistics is None else read_statistics(statistics)
            result = run.take(recipe, calibration, stats, None, began, memory_taken)
    told = ("verification", "weight_bytes", "source_weight_bytes", "parameters", "run", "reused")
    values = {name: getattr(result, name) for name in told}
    ranks.tell({"do": "end"} | values | {"verification": asdict(result.verification)})
    return result


@dataclass(frozen=True, slots=True)
class _Request:
    """What `quantize` was asked for."""

    model: str | Path
    source: Path
    out: Path
    recipe: Recipe
    format: str | None
    clients: tuple[str, ...]
    tensor_parallel: int
    samples: int
    length: int | None
    seed: int
    max_memory: int | None
    device: torch.device
    max_shard_bytes: int
    restart: bool
    progress: Progress | None
    ranks: Ranks

    def follow(self) -> Quantized:
        """Do this rank's share of what rank 0 tells; it has made sure that all can be done."""
        while (told := self.ranks.tell())["do"] == "steps":
            stats = None if told["statistics"] is None else read_statistics(told["statistics"])
            given = {
                n: None if s is None else QuantScheme.parse(s) for n, s in told["allocation"].items()
            }
            chosen = {"head": told["head"], "embeddings": told["embeddings"]}
            recipe = replace(self.recipe, allocation=given, **chosen)
            plan = make_plan(self.source, recipe, told["format"], self.clients, self.tensor_parallel)
            follow(plan, recipe, stats, self.device, self.ranks, told)
            plan.checkpoint.close()
        until = time.monotonic() + SEEN_S
        while not (self.out / LEDGER).is_file() and time.monotonic() < until:
            time.sleep(0.1)  # a file server may take a moment
        told.pop("do")
        verification = Verification(**told.pop("verification"))
        return Quantized(self.out, read_ledger(self.out), verification, **told)

    def take(
        self,
        recipe: Recipe,
        calibration: str | Path | Text | Tensor | Calibration | None,
        stats: Statistics | None,
        budget: dict[str, Any] | None,
        began: float,
        memory: Memory,
    ) -> Quantized:
        """Quantize by a recipe, or find that this was done."""
        out, model = self.out, self.model
        plan = make_plan(self.source, recipe, self.format, self.clients, self.tensor_parallel)
        if budget is not None:
            plan.notes += [Note("skip", name, _UNMEASURED) for name in _left_in_float(plan)]
        samples, length, seed = self.samples, self.length, self.seed
        if stats is not None and (budget is None or recipe.needs_calibration):
            calibration = _kept_samples(stats, plan, recipe, model, samples, length, seed)
        read = partial(_read_calibration, plan, recipe, samples, length, seed, self.progress)
        if self.restart:  # after all that may be refused
            calibration = read(calibration)
            throw_away(out)
        if out.exists():
            data = read(calibration)
            asked = self._ask(plan, recipe, data, stats, budget)
            return reuse(out, asked, plan, self.progress)
        with Journal(out) as journal:
            data = read(calibration, journal)
            asked = self._ask(plan, recipe, data, stats, budget)
            used = stats if data is not None else None
            steps = Steps(
                plan, recipe, data, asked, journal, self.max_memory, self.progress, used, self.device,
                self.ranks,
            )  # fmt: skip
            return finish(steps, began, memory, self.max_shard_bytes)

    def take_fitted(
        self,
        size: Size,
        calibration: str | Path | Text | Tensor | Calibration | None,
        statistics: str | Path | None,
        began: float,
        memory: Memory,
    ) -> Quantized:
        """Choose the schemes by what was measured, and quantize so."""
        own = self.out.parent / f".{self.out.name}.measured"
        if self.out.exists() and not self.restart:
            done = self._find_done(size, calibration, statistics)
            _throw_away_measured(own, statistics)  # of one that stopped between the last two steps
            return done
        if statistics is None and calibration is None:
            raise InputError(
                "choosing schemes needs calibration, or statistics of `fewbits measure`; accepted are a "
                f"text file, a .jsonl file, hub:owner/name/config:split:column, and {SELF}"
            )
        self._fit(size, None)  # refuses before the work what nothing fits
        if statistics is None:
            assert calibration is not None
            measure(
                self.model, own, calibration=calibration, samples=self.samples, length=self.length,
                seed=self.seed, max_memory=self.max_memory, device=self.device, restart=self.restart,
                progress=self.progress,
            )  # fmt: skip
        stats = read_statistics(own if statistics is None else statistics)
        check_statistics(stats, self.source, self.model, self.samples, self.length, self.seed)
        fitted = self._fit(size, stats.damage_of(self.recipe))
        named = replace(self, format=fitted.format)
        result = named.take(fitted.recipe, None, stats, fitted.budget, began, memory)
        _throw_away_measured(own, statistics)  # also of an earlier process that was given none
        return result

    def _fit(self, size: Size, damage: dict[str, dict[str, float]] | None) -> Fitted:
        return fit(
            self.source, self.recipe, size, damage, format=self.format, clients=self.clients,
            tensor_parallel=self.tensor_parallel, max_shard_bytes=self.max_shard_bytes,
        )  # fmt: skip

    def _find_done(
        self,
        size: Size,
        calibration: str | Path | Text | Tensor | Calibration | None,
        statistics: str | Path | None,
    ) -> Quantized:
        """The finished result of the same command, of which nothing need be measured again."""
        ledger = read_ledger(self.out)
        fitted = fitted_before(self.recipe, size, ledger)
        format = find_format(self.source, self.recipe, self.format, self.clients, self.tensor_parallel)
        if fitted is None or fitted.format != format:
            raise InputError(f"{self.out} holds another run; {_ACCEPTED}, or --restart to throw it away")
        plan = make_plan(self.source, fitted.recipe, format, self.clients, self.tensor_parallel)
        asked = self._ask(plan, fitted.recipe, None, None, fitted.budget)
        request, held = asked["request"], ledger.request
        if statistics is not None:
            stats = read_statistics(statistics)
            request |= {"calibration": stats.calibration, "statistics": stats.sha256}
        elif calibration is not None:
            data = read_samples(plan, self.samples, self.length, self.seed, self.progress, calibration)
            request |= plain({"calibration": describe_calibration(plan, data)})
            request["statistics"] = held.get("statistics")
        asked["made_with"] = ledger.made_with
        return reuse(self.out, asked, plan, self.progress)

    def _ask(
        self,
        plan: Plan,
        recipe: Recipe,
        data: Calibration | None,
        statistics: Statistics | None,
        budget: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """All that decides what comes out, as JSON: what is asked for, of what, what does the work."""
        request = recipe.describe() | {"format": plan.format.name}
        request |= {} if budget is None else {"budget": budget}
        if statistics is not None:
            request |= {"calibration": statistics.calibration, "statistics": statistics.sha256}
        elif data is not None:
            request["calibration"] = describe_calibration(plan, data)
        return {
            "fewbits": version("fewbits"),
            "request": plain(request),
            "source": plain(describe_source(self.model, plan.checkpoint)),
            "made_with": {} if data is None else describe_machine(self.device),
        }


def finish(steps: Steps, began: float, memory: Memory, max_shard_bytes: int) -> Quantized:
    """Do what is left to do, make the checkpoint of it, verify it, and move it to its place.

    Args:
        steps: begun, in their journal.
        began: `time.monotonic()` when the run began.
        memory: of this process, while it is watched.
        max_shard_bytes: of a weight file.
    """
    plan, journal = steps.plan, steps.journal
    ledger = steps.take()
    quantization = {"quantization_config": plan.format.config(plan.placements, plan.floats)}
    if isinstance(plan.format, GgufLayout):
        write = partial(_write_gguf, plan, quantization, ledger)
        journal.write_container(GGUF, write)
        quantization = {}  # the file says it
    else:
        journal.write_shards(max_shard_bytes)
    journal.write_json(CONFIG, plan.config | quantization)
    journal.carry_over(plan.checkpoint.folder, plan.checkpoint.carried())
    ledger.notes += plan.checkpoint.notes + steps.check_forward()
    ledger.files = describe_files(journal.result)
    journal.write_json(LEDGER, ledger.to_json())
    verification = _verify(journal, steps.progress)
    elapsed = round(time.monotonic() - began, 3)
    facts = {"elapsed_s": elapsed, "memory_bytes": asdict(memory), "max_memory": steps.max_memory}
    if steps.device.type != "cpu":
        facts["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(steps.device)
    journal.write_json(RUN, facts | {"resumed_steps": journal.resumed})
    journal.commit()
    return _result(journal.out, plan, ledger, verification)


def _write_gguf(
    plan: Plan,
    quantization: dict[str, Any],
    ledger: Ledger,
    path: Path,
    written: list[Written],
    read: Callable[[str], Tensor],
) -> None:
    infos = [TensorInfo(w.name, dtype_of(w.dtype), w.shape, path.name) for w in written]
    source = plan.checkpoint
    folder = source.folder if source.carried() else path.parent  # where there is no tokenizer
    ledger.notes += write_gguf(path, folder, plan.config | quantization, infos, read)


def _verify(journal: Journal, progress: Progress | None) -> Verification:
    """The finished checkpoint, before it is moved to its place."""
    try:
        return verify(journal.result, progress=progress)
    except VerificationError as error:
        what = "not moved to its place; the same command makes it again of its parts, --restart anew"
        raise VerificationError(f"{error}; {what}") from error


def check_out(out: Path, source: Path) -> None:
    """Refuse a folder that is there and not ours, or that holds the source."""
    own, where = out.resolve(), source.resolve()
    if own == where or own in where.parents:
        raise InputError(f"{out} is the source, or holds it; accepted is another folder")
    if out.exists() and not (out / LEDGER).is_file():
        raise InputError(f"{out} exists and was not written by fewbits; {_ACCEPTED}")


def _kept_samples(
    statistics: Statistics,
    plan: Plan,
    recipe: Recipe,
    model: str | Path,
    samples: int,
    length: int | None,
    seed: int,
) -> Calibration:
    """What statistics keep of their samples, if they are of this model and what is asked for."""
    if not recipe.needs_calibration:
        raise InputError(
            f"method {recipe.name} takes no statistics; accepted with it are gptq, awq, and llm-int8 "
            "whose threshold is above 0"
        )
    check_statistics(statistics, plan.checkpoint.folder, model, samples, length, seed)
    held = statistics.calibration
    count, length = statistics.shape
    fitted = count - statistics.held_out
    searched = min(searched_samples(count, length), fitted)
    kept = max(searched, learned_samples(fitted, length) if recipe.learned else 0)
    return Calibration(statistics.samples(kept), held["source"], held["seed"])


def check_statistics(
    statistics: Statistics,
    source: Path,
    model: str | Path,
    samples: int,
    length: int | None,
    seed: int,
) -> None:
    """Refuse those of another model, or of other samples than were asked for."""
    statistics.check_source(plain(describe_source(model, open_checkpoint(source))))
    held = statistics.calibration
    given = {"samples": (samples, DEFAULT_SAMPLES), "length": (length, None), "seed": (seed, 0)}
    for key, (value, default) in given.items():
        if value not in (default, held[key]):
            raise InputError(
                f"{key} is {value}, and {statistics.folder} was measured with {held[key]}; accepted is "
                "to leave it away"
            )


def _left_in_float(plan: Plan) -> list[str]:
    return [name for name in find_unmeasured(plan) if name not in plan.placements]


def _throw_away_measured(own: Path, given: str | Path | None) -> None:
    """What was measured for one run, unless it is what somebody gave, or somebody else's."""
    ours = not own.exists() or (own / STATISTICS).is_file()
    if ours and (given is None or Path(given).resolve() != own.resolve()):
        throw_away(own)


def _default_scheme(method: Method, calibrated: bool) -> QuantScheme:
    if isinstance(method, Q4K):
        return Q4_K_SCHEME
    if not isinstance(method, LLMInt8):
        return DEFAULT_SCHEME
    return replace(LLM_INT8_SCHEME, inputs=InputScheme(static=calibrated))


def _static_or_not(
    scheme: QuantScheme, overrides: tuple[tuple[str, QuantScheme | None], ...]
) -> LLMInt8:
    """The method collects what the schemes ask for."""
    schemes = (scheme, *(other for _, other in overrides))
    return LLMInt8(any(s is not None and s.inputs is not None and s.inputs.static for s in schemes))


def _result(
    out: Path, plan: Plan, ledger: Ledger, verification: Verification, reused: bool = False
) -> Quantized:
    weights = sum(
        f["size_bytes"] for n, f in ledger.files.items() if n.endswith((".safetensors", ".gguf"))
    )
    source = sum(plan.checkpoint.file_bytes.values())
    run = read_json(out / RUN) if (out / RUN).is_file() else {}  # no part of what was promised
    return Quantized(out, ledger, verification, weights, source, plan.parameters, run, reused)


def reuse(out: Path, asked: dict[str, Any], plan: Plan, progress: Progress | None) -> Quantized:
    """Verify the finished result of the same run; refuse anything else."""
    ledger = read_ledger(out)
    check_same(ledger, asked, f"{out} holds another run", _ACCEPTED)
    verification = verify(out, plan.checkpoint.folder, progress)
    discard(out)  # of a process that was stopped between the last two steps
    return _result(out, plan, ledger, verification, reused=True)


def _read_calibration(
    plan: Plan,
    recipe: Recipe,
    samples: int,
    length: int | None,
    seed: int,
    progress: Progress | None,
    source: str | Path | Text | Tensor | Calibration | None,
    journal: Journal | None = None,
) -> Calibration | None:
    """The samples that the recipe needs; None if it needs none."""
    name = recipe.name
    if not recipe.needs_calibration:
        if source is not None:
            raise InputError(
                f"method {name} takes no calibration; accepted with it are gptq, awq, and llm-int8 "
                "whose threshold is above 0"
            )
        return None
    if source is None:
        raise InputError(
            f"method {name} needs calibration; accepted are a text file, a .jsonl file, "
            f"hub:owner/name/config:split:column, {SELF} for text that the model writes itself, and "
            "statistics that `fewbits measure` made"
        )
    return read_samples(plan, samples, length, seed, progress, source, journal)
