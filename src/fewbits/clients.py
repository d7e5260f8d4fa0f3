"""Whether clients load what will be written: rules in clients.toml, asked before the work starts.

The rules were read in the clients' own source, each with the versions it holds for; nothing of a client
is imported or run. A weight is judged as its client holds it: joined with its siblings, and the share
of one device under tensor parallelism.
"""

import math
import tomllib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import chain
from typing import Any, Literal

from fewbits.errors import InputError
from fewbits.formats.placement import Placement
from fewbits.scheme import QuantScheme
from fewbits.tensor import Note

_FLOAT = "float"
_WORD = 32  # bits of a packed word in every format that has them

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What all rules have: whose it is, of which versions, and where that was read."""

    clients: tuple[str, ...]
    source: str
    since: str | None = None
    until: str | None = None
    formats: tuple[str, ...] | None = None

    def holds(self, client: str, version: Version, layout: str) -> bool:
        """For this client, version and format.

        >>> Rule(clients=("a",), source="", since="0.24").holds("a", (0, 23, 5), "gptq")
        False
        >>> Rule(clients=("a",), source="", until="0.24").holds("a", (0, 24, 5), "gptq")
        True
        """
        return (
            client in self.clients
            and (self.formats is None or layout in self.formats)
            and (self.since is None or version >= _version(self.since))
            and (self.until is None or version[: self.until.count(".") + 1] <= _version(self.until))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel(Rule):
    """What one kernel takes; fields as clients.toml explains them."""

    name: str
    takes: tuple[str, ...] | None = None
    groups: tuple[int | str, ...] | None = None
    least_group: int = 1
    channel: bool = True
    columns: int = 1
    rows: int = 1
    hidden: int = 1
    inner: int = 1
    inputs: bool = False
    experts: bool = False
    only: str | None = None

    def takes_scheme(self, scheme: QuantScheme) -> bool:
        """Whether its codes and groups are among those it takes."""
        size = scheme.group_size
        if self.takes is not None and _codes(scheme) not in self.takes:
            return False
        if size is None:
            return self.channel and (self.groups is None or "channel" in self.groups)
        return size >= self.least_group and (self.groups is None or size in self.groups)

    def takes_shape(self, held: "Held") -> bool:
        """Whether what one device holds of a weight has sides it takes."""
        inner = max(self.inner, held.scheme.group_size or 1) if self.inner > 1 else 1
        sides = (held.hidden, self.hidden), (held.inner, inner)
        whole = held.joined_rows % self.rows == 0 and held.columns % self.columns == 0
        return whole and all(side % unit == 0 for side, unit in sides)

    @property
    def schemes(self) -> str:
        """In words."""
        codes = "any codes" if self.takes is None else ", ".join(self.takes)
        if self.groups is None:
            groups = f"groups of {self.least_group} and more" if self.least_group > 1 else "any groups"
        else:
            sizes = ", ".join(str(g) for g in self.groups if g != "channel")
            whole = "--group-size none" if "channel" in self.groups else ""
            groups = " or ".join(filter(None, (sizes and f"groups of {sizes}", whole)))
        return f"{codes} in {groups} ({self._told})"

    @property
    def shapes(self) -> str:
        """In words."""
        named = {"in": self.columns, "out": self.rows, "hidden size": self.hidden, "inner": self.inner}
        units = [f"{side} a multiple of {unit}" for side, unit in named.items() if unit > 1]
        return f"{' and '.join(units) or 'any shape'} ({self._told})"

    @property
    def _told(self) -> str:
        return self.name if self.only is None else f"{self.name}, {self.only}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused(Rule):
    """Modules of one parent that are one matrix in the client."""

    lists: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts(Rule):
    """All matrices of a mixture's experts have one scheme."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split(Rule):
    """Which modules, by their last name, are divided between devices, and by which side."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    whole: tuple[str, ...]
    key_value: tuple[str, ...]
    queries: tuple[str, ...]
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary(Rule):
    """What must lie whole in the share of one device."""

    groups: bool
    words_in: bool
    words_out: Literal["never", "asymmetric", "always"]
    experts: bool = False
    only: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Head(Rule):
    """What the vocabulary must be a multiple of where the head is quantized."""

    rows: int
    words_out: Literal["never", "asymmetric"]


_KINDS: dict[str, type[Rule]] = {
    "kernel": Kernel,
    "fused": Fused,
    "experts": Experts,
    "split": Split,
    "boundary": Boundary,
    "head": Head,
}


@dataclass(frozen=True, slots=True)
class Client:
    """A program that loads checkpoints.

    Args:
        name: as in `--client`.
        label: as people write it.
        reads: formats.
        source: of that.
        oldest: first version that rules are known for; None: they were read in no particular one.
        newest: last one.
        date: of the newest.
        where: the machines that rules are of.
    """

    name: str
    label: str
    reads: tuple[str, ...]
    source: str
    oldest: str | None = None
    newest: str | None = None
    date: str | None = None
    where: str | None = None

    def said(self, version: str | None) -> str:
        """In words, with a version."""
        return " ".join(filter(None, (self.label, version, self.where)))


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a checkpoint before it is made.

    Args:
        placements: source name -> where each quantized weight stands.
        floats: module names of matrices left in float, by the source's names among others.
        format: as in `--format`.
        config: of the language model (transformers'); asked for numbers of heads only.
        head: module of the output head.
    """

    placements: Mapping[str, Placement]
    floats: Collection[str]
    format: str
    config: Any = None
    head: str | None = None


@dataclass(slots=True)
class Held:
    """One weight as one device holds it; all experts of a block that are alike are one.

    Args:
        names: of the modules.
        leaf: last part of them.
        placement: of the weight.
        rows: (out) of its share.
        columns: (in) of its share.
        joined_rows: with those that are fused with it.
        fused: it is part of a larger matrix.
        side: which of its sides is divided, if one is.
    """

    names: list[str]
    leaf: str
    placement: Placement
    rows: int
    columns: int
    joined_rows: int
    fused: bool = False
    side: Literal["rows", "columns"] | None = None

    @property
    def scheme(self) -> QuantScheme:
        """Of the weight."""
        return self.placement.scheme

    @property
    def hidden(self) -> int:
        """Of an expert: the side towards the residual stream, which is not divided; else 0."""
        return 0 if not self.placement.expert else self.rows if self.side == "columns" else self.columns

    @property
    def inner(self) -> int:
        """Of an expert: the other side; else 0."""
        return 0 if not self.placement.expert else self.columns if self.side == "columns" else self.rows


@dataclass(slots=True)
class _Findings:
    """What does not load, and what is to be remarked: (what, accepted) -> modules."""

    refused: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    remarks: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    unknown: list[str] = field(default_factory=list)


@cache
def _data() -> dict[str, Any]:
    text = files("fewbits").joinpath("clients.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def clients() -> dict[str, Client]:
    """All that rules are known for, by name."""
    found = _data()["client"].items()
    return {name: Client(name, **(entry | {"reads": tuple(entry["reads"])})) for name, entry in found}


@cache
def _rules(table: str) -> tuple[Any, ...]:
    kind = _KINDS[table]
    return tuple(kind(**{key: _frozen(v) for key, v in entry.items()}) for entry in _data()[table])


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def parse_client(text: str) -> tuple[Client, str | None]:
    """A client and the version that is meant: `vllm`, `vllm==0.24`; by default the newest.

    Raises:
        InputError: no such client, or a version that no rules are known for.

    >>> client, version = parse_client("vllm==0.24")
    >>> client.label, version
    ('vLLM', '0.24')
    """
    name, equals, version = text.partition("==")
    client = clients().get(name)
    if client is None:
        raise InputError(
            f"--client is {text!r}; accepted are {', '.join(clients())}, where versions are known "
            "with ==VERSION"
        )
    if not equals:
        return client, client.newest
    if client.oldest is None or client.newest is None:
        raise InputError(f"--client is {text!r}; its rules are of no version: accepted is {name}")
    oldest, newest, parts = _version(client.oldest), _version(client.newest), version.split(".")
    numbers = all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts)
    if len(parts) < 2 or not numbers or not oldest[: len(parts)] <= _version(version) <= newest:
        raise InputError(
            f"--client is {text!r}; rules of {client.label} are known for {client.oldest} to "
            f"{client.newest} ({client.date})"
        )
    return client, version


def check_clients(facts: Facts, asked: Iterable[str] = (), tensor_parallel: int = 1) -> list[Note]:
    """What clients will not load of a checkpoint, or only somewhere.

    Args:
        facts: of the checkpoint.
        asked: clients as `parse_client` reads them; without any, all that read the format are looked
            at, or, with several devices, those that divide a model.
        tensor_parallel: between how many devices the model is divided.

    Returns:
        A fact for each finding; without clients that were asked for, only of what does not load.

    Raises:
        InputError: a client that was asked for, or that is to divide the model, would not load it: all
            its modules that it would not load are named.
    """
    asked = tuple(asked)
    promised = bool(asked) or tensor_parallel > 1
    notes: list[Note] = []
    problems: list[str] = []
    for client, version in _wanted(facts.format, asked, tensor_parallel):
        label = client.said(version)
        if facts.format not in client.reads:
            problems.append(
                f"{label} does not read {facts.format}; accepted is --format "
                f"{' or '.join(client.reads)}, where that can hold the model"
            )
            continue
        devices = _devices(client, tensor_parallel)
        if devices != tensor_parallel:
            notes.append(Note("skip", label, "not checked on several devices: no rules are known"))
        found = _find(facts, client.name, _version(version or "0"), devices)
        refused = [_told(names, *finding) for finding, names in found.refused.items()]
        problems += [f"{label} would not load {'; nor '.join(refused)}"] if refused else []
        if promised:
            notes += [
                Note("fact", label, f"would load {_told(names, *finding)}")
                for finding, names in found.remarks.items()
            ]
            if found.unknown:
                what = f"not known how it divides {_listed(found.unknown)}: not checked"
                notes.append(Note("skip", label, what))
        else:
            notes += [Note("fact", label, f"would not load {text}") for text in refused]
    if promised and problems:
        raise InputError("; ".join(problems))
    return notes


def joined(facts: Facts, asked: Iterable[str] = (), tensor_parallel: int = 1) -> list[tuple[str, ...]]:
    """Weights that must have one scheme, because they are one matrix in a client, or experts there.

    Args:
        facts, asked, tensor_parallel: as for `check_clients`.

    Returns:
        Source names, those of floats as if each had a weight; one may stand in several lists.
    """
    leaves: dict[str, dict[str, str]] = defaultdict(dict)  # parent -> last name -> source name
    experts: dict[str, list[str]] = defaultdict(list)
    for name in chain((f"{module}.weight" for module in facts.floats), facts.placements):
        placement = facts.placements.get(name)
        if placement is not None and placement.expert:
            experts[placement.module].append(name)
        else:
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            leaves[parent][leaf] = name
    found: dict[tuple[str, ...], None] = {}
    for client, version in _wanted(facts.format, asked, tensor_parallel):
        at = client.name, _version(version or "0"), facts.format
        lists = [names for rule in _rules("fused") if rule.holds(*at) for names in rule.lists]
        for there in leaves.values():
            for members in lists:
                together = tuple(there[leaf] for leaf in members if leaf in there)
                found |= {together: None} if len(together) > 1 else {}
        if any(rule.holds(*at) for rule in _rules("experts")):
            found |= dict.fromkeys(map(tuple, experts.values()))
    return list(found)


def not_loaded(facts: Facts, asked: Iterable[str] = (), tensor_parallel: int = 1) -> set[str]:
    """Module names, as the source has them, of what one of those clients would not load."""
    found: set[str] = set()
    for client, version in _wanted(facts.format, asked, tensor_parallel):
        devices = _devices(client, tensor_parallel)
        refused = _find(facts, client.name, _version(version or "0"), devices).refused
        found |= set().union(*refused.values())
    return found


def _wanted(layout: str, asked: Iterable[str], tensor_parallel: int) -> list[tuple[Client, str | None]]:
    """Those asked for; without any all that read the format, or that divide a model."""
    if tensor_parallel < 1:
        raise InputError(f"--tensor-parallel is {tensor_parallel}; accepted are numbers from 1")
    wanted = [parse_client(text) for text in dict.fromkeys(asked)]
    if wanted:
        return wanted
    if tensor_parallel > 1:
        return [(c, c.newest) for name, c in clients().items() if name in _dividing()]
    return [(client, client.newest) for client in clients().values() if layout in client.reads]


def _dividing() -> set[str]:
    return {name for rule in _rules("split") for name in rule.clients}


def _devices(client: Client, tensor_parallel: int) -> int:
    """Between which it divides a model."""
    return tensor_parallel if client.name in _dividing() else 1


def _find(facts: Facts, client: str, version: Version, devices: int) -> _Findings:
    """All that the rules of a client say."""

    def of(table: str) -> list[Any]:
        return [rule for rule in _rules(table) if rule.holds(client, version, facts.format)]

    found = _Findings()
    siblings = _siblings(facts)
    lists = [names for rule in of("fused") for names in rule.lists]
    _check_fused(lists, siblings, found)
    if of("experts"):
        _check_experts(facts, found)
    splits, boundaries = of("split"), of("boundary")
    weights = list(_held(facts, lists))
    if splits:
        weights = [held for held in weights if _divide(held, splits[0], facts, devices, found)]
    _join(weights, lists)
    kernels: list[Kernel] = of("kernel")
    heads: list[Head] = of("head")
    for held in weights:
        for rule in boundaries:
            if rule.experts == held.placement.expert:
                _check_boundary(held, rule, devices, found)
        _check_kernels(held, kernels, devices, found)
        if held.placement.module == facts.head:
            _check_head(held, heads, found)
    return found


# -- one scheme for what is one matrix ---------------------------------------------------------------


def _siblings(facts: Facts) -> dict[str, dict[str, str]]:
    """Parent -> last name -> scheme, or float; without experts."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in facts.floats:
        parent, _, leaf = name.rpartition(".")
        found[parent][leaf] = _FLOAT
    for name, placement in facts.placements.items():
        if not placement.expert:
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            found[parent][leaf] = placement.scheme.label
    return found


def _check_fused(
    lists: list[tuple[str, ...]], siblings: dict[str, dict[str, str]], found: _Findings
) -> None:
    for parent, labels in siblings.items():
        for members in lists:
            there = {leaf: labels[leaf] for leaf in members if leaf in labels}
            if len(set(there.values())) > 1:
                told = ", ".join(f"{leaf} {label}" for leaf, label in there.items())
                what = f"{told}, which are one matrix there", "one scheme for all of them"
                found.refused[what] += [f"{parent}.{leaf}" if parent else leaf for leaf in there]


def _check_experts(facts: Facts, found: _Findings) -> None:
    schemes: dict[str, set[str]] = defaultdict(set)
    for placement in {id(p): p for p in facts.placements.values() if p.expert}.values():
        schemes[placement.module].add(placement.scheme.label)
    for module, labels in schemes.items():
        if len(labels) > 1:
            what = f"experts in {' and '.join(sorted(labels))}", "one scheme for all experts of a block"
            found.refused[what].append(module)


# -- what one device holds ---------------------------------------------------------------------------


def _held(facts: Facts, lists: list[tuple[str, ...]]) -> Iterator[Held]:
    """Every quantized weight whose shape is known, undivided."""
    experts: dict[tuple[int, str], Held] = {}
    for name, placement in facts.placements.items():
        module = name.removesuffix(".weight")
        leaf = module.rpartition(".")[2]
        if placement.shape is None:
            continue
        key = (id(placement), leaf)
        if placement.expert and key in experts:
            experts[key].names.append(module)
            continue
        held = Held([module], leaf, placement, *placement.shape, placement.shape[0])
        if placement.expert:
            held.fused = any(leaf in members for members in lists)
            experts[key] = held
        yield held


def _divide(held: Held, rule: Split, facts: Facts, devices: int, found: _Findings) -> bool:
    """Give it the share of one device; False if there is none, or it is not known."""
    leaf, names = held.leaf, held.names
    known: tuple[tuple[Literal["rows", "columns"] | None, tuple[str, ...]], ...] = (
        ("rows", rule.rows), ("columns", rule.columns), (None, rule.whole),
    )  # fmt: skip
    sides = [side for side, leaves in known if leaf in leaves]
    is_head = held.placement.module == facts.head
    held.side = sides[0] if sides else None
    if is_head:  # by rows, which are padded
        held.joined_rows = math.ceil(held.rows / rule.vocabulary) * rule.vocabulary // devices
    if is_head or devices == 1:
        return True
    if not sides:
        found.unknown += names
        return False
    pieces = devices
    if leaf in rule.queries + rule.key_value:
        heads, pairs = _head_counts(facts.config)
        if heads is not None and heads % devices:
            what = f"{heads} heads on {devices} devices", f"--tensor-parallel with a divisor of {heads}"
            found.refused[what] += names
            return False
        if pairs is not None and leaf in rule.key_value:
            if devices % pairs and pairs % devices:
                accepted = f"--tensor-parallel with a divisor or a multiple of {pairs}"
                found.refused[f"{pairs} key-value heads on {devices} devices", accepted] += names
                return False
            pieces = min(devices, pairs)
    if held.side is not None:
        size = held.rows if held.side == "rows" else held.columns
        if size % pieces:
            word = {"rows": "out", "columns": "in"}[held.side]
            what = f"{word} {size} on {pieces} devices", f"--tensor-parallel with a divisor of {size}"
            found.refused[what] += names
            return False
        if held.side == "rows":
            held.rows //= pieces
        else:
            held.columns //= pieces
    held.joined_rows = held.rows
    return True


def _head_counts(config: Any) -> tuple[int | None, int | None]:
    """Heads, and key-value heads, of a model all whose blocks have as many."""

    def count(name: str) -> int | None:
        value = getattr(config, name, None)
        return value if isinstance(value, int) and value > 0 else None

    heads = count("num_attention_heads")
    pairs = count("num_key_value_heads")
    return heads, heads if pairs is None else pairs


def _join(weights: list[Held], lists: list[tuple[str, ...]]) -> None:
    """Tell those that are fused how many rows they have together."""
    partners = {leaf: members for members in lists for leaf in members}
    groups: dict[tuple[str, tuple[str, ...]], list[Held]] = defaultdict(list)
    for held in weights:
        if held.leaf in partners and not held.placement.expert:
            parent = held.names[0].rpartition(".")[0]
            groups[parent, partners[held.leaf]].append(held)
    for group in groups.values():
        for held in group:
            held.joined_rows = sum(member.rows for member in group)
            held.fused = len(group) > 1


def _check_boundary(held: Held, rule: Boundary, devices: int, found: _Findings) -> None:
    """Groups and packed words must end where the shares do."""
    scheme = held.scheme

    def add(what: str, accepted: str) -> None:
        if rule.only is None:
            found.refused[what, accepted] += held.names
        else:
            found.remarks[f"{what}, {rule.only}", ""] += held.names

    unit = _WORD // math.gcd(_WORD, scheme.bits)
    if held.side == "columns" and devices > 1:
        columns, size = held.columns, scheme.group_size
        shares = f"in {columns * devices} on {devices} devices, {columns} each"
        if rule.groups and size is not None and columns % size:
            add(
                f"{shares}, in groups of {size}",
                f"--group-size none or a divisor of {columns}, or fewer devices",
            )
        elif rule.words_in and columns % unit:
            add(f"{shares}, packed by {unit}", f"a multiple of {unit} each")
    packed = rule.words_out == "always" or (rule.words_out == "asymmetric" and not scheme.symmetric)
    cut = held.fused or (held.side == "rows" and devices > 1)
    if packed and cut and held.rows % unit:
        other = "" if rule.words_out == "always" else ", or symmetric codes"
        where = "on each device, " if devices > 1 else ""
        add(f"out {held.rows}, {where}packed by {unit}", f"a multiple of {unit}{other}")


# -- kernels -----------------------------------------------------------------------------------------


def _check_kernels(held: Held, kernels: list[Kernel], devices: int, found: _Findings) -> None:
    """Some kernel must take its codes and groups, and its shape."""
    expert, inputs = held.placement.expert, held.scheme.inputs is not None
    of_kind = [k for k in kernels if k.inputs == inputs and k.experts in (expert, False)]
    if any(k.experts for k in of_kind):
        of_kind = [k for k in of_kind if k.experts]
    if not of_kind:
        if kernels:  # of weights of another kind: this kind has none
            what = f"{held.scheme.label}{' of experts' if expert else ''}"
            found.refused[what, " or ".join(k.schemes for k in kernels)] += held.names
        return
    able = [k for k in of_kind if k.takes_scheme(held.scheme)]
    if not able:
        found.refused[held.scheme.label, " or ".join(k.schemes for k in of_kind)] += held.names
        return
    fitting = [k for k in able if k.takes_shape(held)]
    if not fitting:
        shape = f"{held.scheme.label}, {held.joined_rows} x {held.columns} (out x in)"
        if devices > 1:
            shape += " on each device"
        found.refused[shape, " or ".join(k.shapes for k in able)] += held.names
    elif all(k.only is not None for k in fitting):
        what = f"{held.scheme.label} by {' or '.join(k._told for k in fitting)} only"
        found.remarks[what, ""] += held.names


def _check_head(held: Held, rules: list[Head], found: _Findings) -> None:
    unit = _WORD // math.gcd(_WORD, held.scheme.bits)
    for rule in rules:
        words = rule.words_out == "asymmetric" and not held.scheme.symmetric
        rows = math.lcm(rule.rows, unit if words else 1)
        if held.rows % rows:
            accepted = f"a multiple of {rows}, or the head in float"
            found.refused[f"a quantized head of {held.rows} tokens", accepted] += held.names


# -- words -------------------------------------------------------------------------------------------


def _version(text: str) -> Version:
    return tuple(int(part) for part in text.split("."))


def _codes(scheme: QuantScheme) -> str:
    return f"w{scheme.bits}" + ("" if scheme.symmetric else "-asym")


def _told(names: list[str], what: str, accepted: str) -> str:
    return f"{_listed(names)} ({what})" + (f"; accepted is {accepted}" if accepted else "")


def _listed(names: list[str]) -> str:
    """Every module, those that differ in numbers only as one pattern and their count.

    >>> _listed(["a.0.q", "a.1.q", "a.2.k"])
    'a.*.q (2), a.2.k'
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        alike[".".join("*" if part.isdigit() else part for part in name.split("."))].append(name)
    return ", ".join(
        members[0] if len(members) == 1 else f"{pattern} ({len(members)})"
        for pattern, members in alike.items()
    )
