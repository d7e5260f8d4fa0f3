"""Recipe: what is done to the blocks, which method rounds, and which scheme each weight gets."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from fewbits.errors import InputError
from fewbits.methods import GPTQ, METHODS, Q4K, RTN, Learned, LLMInt8, Method, WeightedRTN
from fewbits.scheme import InputScheme, QuantScheme
from fewbits.structure import Matrix
from fewbits.transforms import TRANSFORMS, Transform

DEFAULT_SCHEME = QuantScheme(4, "group", 128)
LLM_INT8_SCHEME = QuantScheme(8, "channel", inputs=InputScheme())
# Of embeddings, where nobody names another. On the reference model, whose head is tied to its embedding,
# it costs 0.0004 nats (4 bits in groups of 32: 0.021); beside matrices in 4 bits, which cost 0.027, less
# than the standard error (2026-11-26). A scale per row is next to no bytes; groups of 32: 0.0003.
EMBEDDING_SCHEME = QuantScheme(8)
Q4_K_SCHEME = QuantScheme(4, "group", 32, symmetric=False, two_level=True)
LEARNED = "learned"  # behind a method: what it gives is where learned rounding begins
FLOAT = "float"  # in place of a scheme: leave it alone


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to do with which weight.

    Args:
        method: rounds each matrix.
        transforms: rewrite each block before, in this order.
        scheme: of every weight that nothing below speaks of.
        allocation: of weights by source name, each its own scheme, or None for float.
        overrides: (pattern, scheme, or None for float); the last that matches decides. A pattern is a
            glob on module names (`*.down_proj`), or after `re:` a regular expression that must match
            whole names. One that matches more than the embedding leaves that alone, unless `embeddings`.
        head: also quantize the output head, which is left in float by default.
        embeddings: also quantize the embedding, and with it a head that is tied to it, to
            `EMBEDDING_SCHEME` by default.
        learned: learn the rounding of each block, from the codes of the method.
    """

    method: Method = field(default_factory=RTN)
    scheme: QuantScheme = DEFAULT_SCHEME
    overrides: tuple[tuple[str, QuantScheme | None], ...] = ()
    head: bool = False
    transforms: tuple[Transform, ...] = ()
    allocation: Mapping[str, QuantScheme | None] = field(default_factory=dict)
    embeddings: bool = False
    learned: Learned | None = None

    def __post_init__(self) -> None:
        others = (scheme for _, scheme in self.overrides)
        schemes = (self.scheme, *set(self.allocation.values()), *others)
        inputs = [
            scheme.inputs for scheme in schemes if scheme is not None and scheme.inputs is not None
        ]
        static = any(kind.static for kind in inputs)
        if isinstance(self.method, LLMInt8) and not inputs:
            raise InputError(
                f"method llm-int8 with scheme {self.scheme.label}, which says nothing of inputs; "
                f"accepted are schemes like {LLM_INT8_SCHEME.label}"
            )
        if static and self.method != LLMInt8(static=True):
            raise InputError(
                f"static columns in {self.scheme.label} are found by calibration, for method llm-int8; "
                "accepted with others are columns that are found in each call"
            )

        two = next((scheme for scheme in schemes if scheme is not None and scheme.two_level), None)
        if isinstance(self.method, Q4K) and (two is None or self.transforms):
            what = f"scheme {self.scheme.label}" if two is None else "transforms before it"
            raise InputError(
                f"method q4_k with {what}; accepted is {Q4_K_SCHEME.label} without transforms"
            )
        if self.learned is not None and isinstance(self.method, LLMInt8 | Q4K):
            raise InputError(
                f"method {self.name}: only codes on one grid are learned; accepted before {LEARNED} are "
                "rtn, weighted-rtn, gptq and awq"
            )
        if two is not None and not isinstance(self.method, Q4K):
            raise InputError(
                f"scheme {two.label} with method {self.name}; accepted with it is q4_k, which "
                "finds two levels of scales"
            )

    @property
    def name(self) -> str:
        """As `parse_method` reads it: `awq+gptq`."""
        names = [_name(transform, TRANSFORMS) for transform in self.transforms]
        if not (names and isinstance(self.method, WeightedRTN)):
            names.append(_name(self.method, METHODS))
        names += [] if self.learned is None else [LEARNED]
        return "+".join(names)

    @property
    def needs_calibration(self) -> bool:
        """Whether it takes tokens to run the model on."""
        return bool(self.method.needs or self.transforms or self.learned)

    @property
    def corrected(self) -> bool:
        """Whether weights make up for what rounding did before them in the block."""
        return isinstance(self.method, GPTQ) and self.method.corrected

    def assign(self, matrices: Iterable[Matrix]) -> dict[str, QuantScheme | None]:
        """The scheme of every matrix by source name; None for float.

        Raises:
            InputError: a pattern is no regular expression, or matches nothing; says what there is.
        """
        matrices = list(matrices)
        schemes = {m.source: self._usual(m) for m in matrices}
        strange = self.allocation.keys() - schemes.keys()
        if strange:
            raise InputError(f"{min(strange)} is given a scheme, and is no quantizable weight")
        schemes |= self.allocation
        for pattern, scheme in self.overrides:
            caught = [m for m in matrices if _matches(pattern, m)]
            if not caught:
                inside = [m for m in matrices if m.kind != "embedding"]
                example = ", ".join(m.source.removesuffix(".weight") for m in inside[:2])
                raise InputError(
                    f"pattern {pattern!r} matches no quantizable module; there are {example}, ..."
                )
            others = [m for m in caught if m.kind != "embedding"]
            named = caught if self.embeddings or not others else others
            schemes |= dict.fromkeys((m.source for m in named), scheme)
        return schemes

    def caught(self, matrices: Iterable[Matrix]) -> set[str]:
        """Source names of the matrices that an override speaks of."""
        patterns = [pattern for pattern, _ in self.overrides]
        return {m.source for m in matrices if any(_matches(pattern, m) for pattern in patterns)}

    def _usual(self, matrix: Matrix) -> QuantScheme | None:
        """Of a weight that neither an allocation nor an override speaks of."""
        if matrix.kind == "embedding":
            return EMBEDDING_SCHEME if self.embeddings else None
        return None if matrix.head and not self.head else self.scheme

    def describe(self) -> dict[str, Any]:
        """As in the ledger: equal descriptions give equal checkpoints."""
        overrides = [[p, FLOAT if s is None else s.label] for p, s in self.overrides]
        allocated: dict[str, list[str]] = {}
        for name, scheme in sorted(self.allocation.items()):
            allocated.setdefault(FLOAT if scheme is None else scheme.label, []).append(name)
        more: dict[str, Any] = {"allocation": allocated} if allocated else {}
        more |= {"embeddings": True} if self.embeddings else {}
        more |= {} if self.learned is None else {LEARNED: asdict(self.learned)}
        return {
            "method": self.name,
            "options": asdict(self.method),  # type: ignore[call-overload]
            "transforms": [asdict(transform) for transform in self.transforms],  # type: ignore[call-overload]
            "scheme": self.scheme.label,
            "overrides": overrides,
            "head": self.head,
        } | more


def _name(thing: object, kinds: Mapping[str, type]) -> str:
    names = [name for name, kind in kinds.items() if isinstance(thing, kind)]
    if not names:
        raise InputError(f"{thing!r} is unknown; accepted are {', '.join(kinds)}")
    return names[0]


def parse_method(text: str) -> tuple[tuple[Transform, ...], Method, Learned | None]:
    """Transforms, method and learning that a name like `awq+gptq+learned` stands for.

    A transform alone is followed by rounding to nearest on the grid of least output error; GPTQ behind a
    transform, which takes longer than that, is `corrected`.

    Raises:
        InputError: not such a name.

    >>> parse_method("awq")
    ((AWQ(points=11),), WeightedRTN(), None)
    """
    usual = text.removesuffix(f"+{LEARNED}")
    *names, last = usual.split("+")
    names += [last] if last in TRANSFORMS else []
    known = last in TRANSFORMS or last in METHODS
    if not known or not set(names) <= TRANSFORMS.keys() or len(set(names)) < len(names):
        raise InputError(
            f"method {text!r} is unknown; accepted are {', '.join(METHODS)}, {', '.join(TRANSFORMS)}, "
            f"a transform before a method, like awq+gptq, +{LEARNED} behind it, best, and on the "
            "command line int8"
        )
    method = WeightedRTN() if last in TRANSFORMS else METHODS[last]()
    if names and isinstance(method, GPTQ):
        method = replace(method, corrected=True)
    learned = None if usual == text else Learned()
    return tuple(TRANSFORMS[name]() for name in names), method, learned


def parse_override(text: str) -> tuple[str, QuantScheme | None]:
    """`PATTERN=SCHEME` as on the command line; the scheme may be `float`.

    Raises:
        InputError: not of that form.

    >>> pattern, scheme = parse_override("*.down_proj=w8-channel")
    >>> pattern, scheme.label
    ('*.down_proj', 'w8-channel')
    """
    pattern, equals, label = text.rpartition("=")
    if not equals or not pattern:
        raise InputError(f"override {text!r} is not PATTERN=SCHEME, like '*.down_proj=w8-channel'")
    return pattern, None if label == FLOAT else QuantScheme.parse(label)


def _matches(pattern: str, matrix: Matrix) -> bool:
    names = {matrix.module, matrix.source, matrix.source.removesuffix(".weight")}
    if not pattern.startswith("re:"):
        return any(fnmatchcase(name, pattern) for name in names)
    try:
        compiled = re.compile(pattern[3:])
    except re.error as error:
        raise InputError(f"pattern {pattern!r} is no regular expression: {error}") from None
    return any(compiled.fullmatch(name) for name in names)
