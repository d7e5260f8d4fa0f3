"""Multiple-choice tasks through lm-eval: which option a model prefers, question by question.

lm-eval (EleutherAI's lm-evaluation-harness) writes the prompts and adds up the log-likelihoods; here its
tasks are given their questions from the hub or from local files, and what a model answered is kept per
question, so that two models are compared on the same questions. Flips, questions that exactly one of the
two answers rightly, are after Dutta et al. 2024, arXiv 2407.09141: equal accuracy can hide many.

Deviations from lm-eval's own runs: log-probabilities are summed in float32 (its default is the model's
dtype, and in bfloat16 options tie that the model tells apart); `limit` spreads over the whole task,
not over the head of each subject. Beginning-of-sequence tokens are lm-eval's default: as the tokenizer
puts them. No chat template is applied.

Local layouts, in one folder:

    mmlu/test/anatomy_test.csv     question,A,B,C,D,answer; the answer A to D or 0 to 3; a header or none
    mmlu/dev/anatomy_dev.csv       likewise, for worked examples (shots)
    ARC-Challenge-Test.jsonl       {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}
    hellaswag_val.jsonl            {"activity_label", "ctx_a", "ctx_b" (or "ctx"), "endings", "label"}
    hellaswag_valid.txt            six lines each: context, label, four endings

Training files (`ARC-Challenge-Train.jsonl`, `hellaswag_train.jsonl`) give worked examples of the others.
"""

import csv
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Self

import torch

from fewbits.errors import InputError, first_line
from fewbits.estimate import Estimate, mean_estimate
from fewbits.structure import quiet_transformers
from fewbits.tensor import Note
from fewbits.untrusted import parse_json, read_bytes, shown

Progress = Callable[[str, int, int], None]  # what, how many done, of how many
Metric = Literal["acc", "acc_norm"]
_Row = dict[str, Any]

_SEED = 1234  # of the draw of worked examples: lm-eval's own default
_LOGITS = 2**26  # logits held at a time: 256 MB in float32; not tuned
_TOKENS = 2**12  # run at a time, at least one prompt; not tuned
_MAX_FILE = 2**28  # bytes of a file of questions; not tuned

_MMLU = (
    "rows of question, four options and the answer (A to D or 0 to 3), "
    "under question,choice0,choice1,choice2,choice3,answer or no header"
)
_ARC = (
    'rows like {"question": {"stem": "...", "choices": [{"text": "...", "label": "A"}, ...]}, '
    '"answerKey": "A"} with 3 to 5 options labelled A, B, ... or 1, 2, ...'
)
_HELLASWAG = (
    'rows like {"activity_label": "...", "ctx_a": "...", "ctx_b": "...", "endings": [4 of them], '
    '"label": 0 to 3}, or with "ctx" for both parts'
)
_HELLASWAG_TEXT = "six lines for each question: 'activity: context', a label of 0 to 3, four endings"


@dataclass(frozen=True, slots=True)
class TaskScores:
    """What one model answered on one task; questions in an order that is the same for every model.

    Args:
        task: "mmlu", "arc_challenge", "hellaswag", or another multiple-choice task or group of lm-eval.
        metric: "acc" takes the likeliest option, "acc_norm" the one with the highest log-likelihood per
            character; "acc_norm" where lm-eval's task reports it.
        correct: whether the option that was taken is the right one.
        answers: its number, from 0.
        groups: of a group of tasks, the member (MMLU: the subject); else the task's name.
        shots: worked examples in front of each question.
        sha256: of the questions as put to the model: prompts, options, right answers.
        source: "hub", or the name of the file or folder.
        truncated: questions longer than the model's context, which lose their beginning.
        tied: questions whose best score several options share; the first of them is taken.
        notes: what was cut, tied, left out or written differently.
    """

    task: str
    metric: Metric
    correct: tuple[bool, ...]
    answers: tuple[int, ...]
    groups: tuple[str, ...]
    shots: int
    sha256: str
    source: str
    truncated: int = 0
    tied: int = 0
    notes: tuple[Note, ...] = ()

    @property
    def accuracy(self) -> Estimate:
        """Share of questions answered rightly, each counting the same (lm-eval's weights for MMLU, too).

        The error takes questions for independent draws. One by strata would leave out how subjects
        differ, so it is at most smaller; but subjects of one question, as under `limit`, have none.
        """
        return _share(self.correct)

    def to_json(self) -> dict[str, Any]:
        """For `--json`, with the accuracy; `from_json` reads it back."""
        return asdict(self) | {"accuracy": asdict(self.accuracy)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """What `to_json` gave.

        >>> scores = TaskScores("t", "acc", (True, False), (0, 2), ("t", "t"), 0, "5e", "hub")
        >>> TaskScores.from_json(json.loads(json.dumps(scores.to_json()))) == scores
        True
        """
        value = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in value.items()}
        value.pop("accuracy", None)
        value["notes"] = tuple(Note(**note) for note in value["notes"])
        return cls(**value)


@dataclass(frozen=True, slots=True)
class TaskComparison:
    """A model beside the reference on one task, paired by question; all are shares of its questions.

    Args:
        task: its name.
        accuracy: of the model.
        difference: accuracy of the model minus that of the reference.
        flips: answered rightly by exactly one of the two.
        changed: another option taken, right or wrong.
    """

    task: str
    accuracy: Estimate
    difference: Estimate
    flips: Estimate
    changed: Estimate


def compare_scores(scores: TaskScores, reference: TaskScores) -> TaskComparison:
    """What quantization changed on one task.

    Raises:
        InputError: the two did not answer the same questions.

    >>> float_ = TaskScores("t", "acc", (True, True, False), (0, 1, 2), ("t",) * 3, 0, "5e", "hub")
    >>> model = TaskScores("t", "acc", (True, False, True), (0, 2, 3), ("t",) * 3, 0, "5e", "hub")
    >>> result = compare_scores(model, float_)
    >>> result.difference.value, round(result.flips.value, 3), round(result.changed.value, 3)
    (0.0, 0.667, 0.667)
    """
    asked = [(s.task, s.metric, s.sha256, len(s.correct)) for s in (scores, reference)]
    if asked[0] != asked[1]:
        said = [
            f"{len(s.correct)} questions of {s.task} (sha256 {s.sha256[:16]})"
            for s in (scores, reference)
        ]
        raise InputError(
            f"{said[0]} and {said[1]} cannot be paired; accepted are answers to the same questions"
        )
    pairs = list(zip(scores.correct, reference.correct, strict=True))
    options = zip(scores.answers, reference.answers, strict=True)
    return TaskComparison(
        scores.task,
        scores.accuracy,
        _share([ours - theirs for ours, theirs in pairs]),
        _share([ours != theirs for ours, theirs in pairs]),
        _share([ours != theirs for ours, theirs in options]),
    )


def _share(values: Sequence[int]) -> Estimate:
    return mean_estimate(torch.tensor(values, dtype=torch.float64))


def check_tasks(names: Sequence[str], data: Path | None, shots: int | None = None) -> None:
    """Whether `evaluate_tasks` will find everything: lm-eval, the tasks, their questions.

    Reads every question once; with data=None lm-eval downloads what is not in the cache of `datasets`.

    Raises:
        InputError: something is missing or is not in an accepted layout.
    """
    _check_names(names)
    for name in names:
        _load(name, data, shots)


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    progress: Progress | None = None,
) -> list[TaskScores]:
    """Answers of a model to multiple-choice questions, by lm-eval's prompts and scores.

    Args:
        model: a transformers causal language model, quantized or not, as from `fewbits.load`.
        tokenizer: its own; BOS is put where the tokenizer puts it, which is lm-eval's default.
        names: of lm-eval's tasks or groups, each with one metric of "acc" and "acc_norm".
        data: folder of local files (see the head of this module); without it lm-eval asks the hub.
        limit: at most so many questions of each name, evenly spread over all of them.
        shots: worked examples in front of each question; lm-eval's own number by default, which is 0
            for MMLU, ARC and HellaSwag.
        progress: told the task, and how many options were scored of how many.

    Raises:
        InputError: lm-eval, a task or its questions are not there; or an option is longer than the
            model's context.
    """
    _check_names(names)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; accepted are numbers of questions from 1")
    loaded = [_load(name, data, shots) for name in names]
    with _quiet():
        lm = _language_model(model, tokenizer, progress)
        return [_score(lm, task, limit) for task in loaded]


def _check_names(names: Sequence[str]) -> None:
    _import_lm_eval()
    if not names:
        raise InputError("no task is named; accepted are names like mmlu, arc_challenge, hellaswag")
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise InputError(f"task {twice[0]} is named twice; accepted is each name once")


def _import_lm_eval() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"tasks need lm-eval ({first_line(error)}): pip install 'fewbits[tasks]'"
        ) from None


# -- questions in local files


@dataclass(frozen=True, slots=True)
class _Local:
    """Local questions in the columns of the hub's data sets, by lm-eval's task and by split."""

    splits: dict[str, dict[str, list[_Row]]]
    source: str
    notes: tuple[Note, ...] = ()


def _local_mmlu(data: Path) -> _Local:
    folder = data / "mmlu"
    tests, examples = (_subjects(folder / kind, kind) for kind in ("test", "dev"))
    if not tests:
        raise InputError(f"{data} has no mmlu/test/*_test.csv; accepted are csv files with {_MMLU}")
    known = {
        name.removeprefix("mmlu_") for name in _manager(True).all_subtasks if name.startswith("mmlu_")
    }
    for subject, path in (tests | examples).items():
        if subject not in known:
            near = get_close_matches(subject, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"{path}: {subject} is no subject of MMLU; {hint}accepted are lm-eval's {len(known)}"
            )
    splits = {
        f"mmlu_{subject}": {
            "test": _read_mmlu(path),
            "dev": _read_mmlu(examples[subject]) if subject in examples else [],
        }
        for subject, path in sorted(tests.items())
    }
    missing = sorted(known - set(tests))
    notes = (Note("fact", "mmlu", f"{len(tests)} of {len(known)} subjects; no {', '.join(missing)}"),)
    return _Local(splits, folder.name, notes if missing else ())


def _subjects(folder: Path, kind: str) -> dict[str, Path]:
    return {path.stem.removesuffix(f"_{kind}"): path for path in sorted(folder.glob("*.csv"))}


def _read_mmlu(path: Path) -> list[_Row]:
    rows, line = [], 1
    reader = csv.reader(StringIO(_text(path)), strict=True)
    try:
        for number, row in enumerate(reader):
            header = number == 0 and row[-1:] == ["answer"]
            if row and not header:
                rows.append(_mmlu_row(row))
            line = reader.line_num + 1
    except (csv.Error, ValueError) as error:
        raise InputError(f"{path}:{line}: {error}; accepted are {_MMLU}") from None
    return _some(rows, path, _MMLU)


def _mmlu_row(row: list[str]) -> _Row:
    if len(row) != 6:
        raise ValueError(f"{len(row)} columns")
    question, *options, answer = row
    if len(answer.strip()) != 1 or answer.strip() not in "ABCD0123":
        raise ValueError(f"answer {shown(answer)}")
    _check_texts(question, *options)
    return {"question": question, "choices": options, "answer": "ABCD0123".index(answer.strip()) % 4}


def _local_arc(data: Path) -> _Local:
    files = _by_split(data, "ARC-Challenge", (".jsonl",))
    path = _first(files, ("test", "", "validation"), data, "ARC-Challenge*.jsonl", _ARC)
    train = _read_jsonl(files["train"], _arc_row, _ARC) if "train" in files else []
    splits = {"test": _read_jsonl(path, _arc_row, _ARC), "train": train}
    return _Local({"arc_challenge": splits}, path.name)


def _arc_row(row: _Row) -> _Row:
    stem, choices, key = row["question"]["stem"], row["question"]["choices"], row["answerKey"]
    texts, labels = ([choice[field] for choice in choices] for field in ("text", "label"))
    if not 3 <= len(labels) <= 5:
        raise ValueError(f"{len(labels)} options")
    if labels not in (list("ABCDE")[: len(labels)], list("12345")[: len(labels)]):
        raise ValueError(f"labels {shown(labels)}")
    if key not in labels:
        raise ValueError(f"answerKey {shown(key)}")
    _check_texts(stem, *texts)
    return {"question": stem, "choices": {"text": texts, "label": labels}, "answerKey": key}


def _local_hellaswag(data: Path) -> _Local:
    files = _by_split(data, "hellaswag", (".jsonl", ".txt"))
    accepted = f"{_HELLASWAG} (.jsonl); {_HELLASWAG_TEXT} (.txt)"
    path = _first(
        files, ("validation", "", "test"), data, "hellaswag*.jsonl or hellaswag*.txt", accepted
    )
    train = _read_hellaswag(files["train"]) if "train" in files else []
    rows = _read_hellaswag(path)
    what = "contexts are in one piece, taken as written; lm-eval capitalizes the second part"
    whole = not any(row["ctx_b"] for row in rows)
    notes = (Note("fact", path.name, what),) if whole else ()
    return _Local({"hellaswag": {"validation": rows, "train": train}}, path.name, notes)


def _read_hellaswag(path: Path) -> list[_Row]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path, _hellaswag_row, _HELLASWAG)
    lines = _text(path).removesuffix("\n").split("\n")
    rows = []
    for start in range(0, len(lines), 6):
        context, *rest = lines[start : start + 6]
        activity, colon, text = context.partition(": ")
        try:
            if not colon:
                raise ValueError(f"{context[:40]!r} is no 'activity: context'")
            if len(rest) < 5:
                raise ValueError(f"{len(rest) + 1} lines")
            row = {"activity_label": activity, "ctx": text, "label": rest[0], "endings": rest[1:]}
            rows.append(_hellaswag_row(row))
        except ValueError as error:
            where = f"{path}:{start + 1}: in the question that begins here"
            raise InputError(f"{where}, {error}; accepted are {_HELLASWAG_TEXT}") from None
    return _some(rows, path, _HELLASWAG_TEXT)


def _hellaswag_row(row: _Row) -> _Row:
    first, second = (row["ctx_a"], row["ctx_b"]) if "ctx_a" in row else (row["ctx"], "")
    endings, label = row["endings"], str(row["label"]).strip()
    if len(endings) != 4:
        raise ValueError(f"{len(endings)} endings")
    if label not in ("0", "1", "2", "3"):
        raise ValueError(f"label {shown(label)}")
    if not isinstance(second, str):
        raise ValueError(f"{shown(second)} is no text")
    _check_texts(row["activity_label"], first, *endings)
    return {
        "activity_label": row["activity_label"],
        "ctx_a": first,
        "ctx_b": second,
        "endings": endings,
        "label": label,
    }


def _read_jsonl(path: Path, parse: Callable[[_Row], _Row], accepted: str) -> list[_Row]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(parse(parse_json(line)))
        except KeyError as error:
            raise InputError(f"{path}:{number}: no {error}; accepted are {accepted}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}:{number}: {error}; accepted are {accepted}") from None
    return _some(rows, path, accepted)


def _check_texts(*texts: Any) -> None:
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{shown(text)} is no text")
        text.encode()  # halves of characters are no text


def _some(rows: list[_Row], path: Path, accepted: str) -> list[_Row]:
    if not rows:
        raise InputError(f"{path} holds no question; accepted are {accepted}")
    return rows


def _text(path: Path) -> str:
    try:
        text = read_bytes(path, _MAX_FILE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {first_line(error)}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _by_split(data: Path, start: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files of a task by what their names say they are; "" where they say nothing."""
    found: dict[str, Path] = {}
    for path in sorted(data.iterdir()):
        name = path.name.lower()
        if not name.startswith(start.lower()) or path.suffix not in suffixes:
            continue
        rest = name.removeprefix(start.lower())
        marks = {"train": "train", "val": "validation", "dev": "validation", "test": "test"}
        split = next((split for mark, split in marks.items() if mark in rest), "")
        if split in found:
            raise InputError(f"{found[split]} and {path.name} both fit; accepted is one of them")
        found[split] = path
    return found


def _first(
    files: dict[str, Path], order: tuple[str, ...], data: Path, pattern: str, accepted: str
) -> Path:
    for split in order:
        if split in files:
            return files[split]
    raise InputError(f"{data} has no {pattern}; accepted are {accepted}")


_LOCAL = {"mmlu": _local_mmlu, "arc_challenge": _local_arc, "hellaswag": _local_hellaswag}


# -- lm-eval's tasks


@dataclass(frozen=True, slots=True)
class _Loaded:
    """lm-eval's tasks behind one name, ready to be put to a model."""

    name: str
    members: dict[str, Any]
    metric: Metric
    shots: int
    source: str
    notes: tuple[Note, ...]


@cache
def _manager(own: bool) -> Any:
    """lm-eval's index of tasks; `own` has those of three folders, the others take seconds to index."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    few = [folder / name for name in ("mmlu/default", "arc", "hellaswag")]
    with _quiet():
        return lm_eval.tasks.TaskManager(include_path=few if own else None, include_defaults=not own)


def _load(name: str, data: Path | None, shots: int | None) -> _Loaded:
    if shots is not None and shots < 0:
        raise InputError(f"shots is {shots}; accepted are numbers from 0")
    local = None if data is None else _read_local(name, data)
    members = _from_hub(name) if local is None else _from_local(local)
    metric = _metric(name, members)
    notes = local.notes if local else ()
    numbers = set()
    for key, task in members.items():
        number = _set_shots(task, shots)
        if shots is not None and number != shots:
            what = f"lm-eval fixes the number of shots at {number}; {shots} were asked for"
            notes += (Note("fallback", key, what),)
        _check_shots(key, task, number)
        numbers.add(number)
    if len(numbers) > 1:
        raise InputError(
            f"members of {name} have {sorted(numbers)} shots; accepted is one number for all"
        )
    return _Loaded(name, members, metric, numbers.pop(), local.source if local else "hub", notes)


def _read_local(name: str, data: Path) -> _Local:
    if name not in _LOCAL:
        raise InputError(f"task {name} has no layout for local files; accepted are {', '.join(_LOCAL)}")
    if not data.is_dir():
        raise InputError(f"{data} is no folder; accepted is one that holds files of {name}")
    return _LOCAL[name](data)


def _from_local(local: _Local) -> dict[str, Any]:
    """lm-eval's own tasks, their questions swapped for ours."""
    overrides = [
        {"task": task, "custom_dataset": _dataset(splits)} for task, splits in local.splits.items()
    ]
    with _quiet():
        members: dict[str, Any] = _manager(True).load([{"group": "local", "task": overrides}])["tasks"]
    return dict(sorted(members.items()))


def _dataset(splits: dict[str, list[_Row]]) -> Callable[..., Any]:
    def build(**_: Any) -> Any:
        import datasets

        return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

    return build


def _from_hub(name: str) -> dict[str, Any]:
    manager = _manager(name in _manager(True).all_tasks)
    if name not in manager.all_tasks:
        near = get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"lm-eval knows no task {name}; {hint}accepted are its multiple-choice tasks")
    try:
        with _quiet():
            members: dict[str, Any] = manager.load([name])["tasks"]
    except Exception as error:  # the client raises many kinds; each means that we have no questions
        raise InputError(f"task {name} cannot be had from the hub: {first_line(error)}") from error
    return dict(sorted(members.items()))


def _metric(name: str, members: dict[str, Any]) -> Metric:
    """The metric that lm-eval reports for all of them; normalized where it has both."""
    reported = [set(task.aggregation()) for task in members.values()]
    # A task with a rule of its own may take another option than the likeliest.
    choice = all(
        task.OUTPUT_TYPE == "multiple_choice" and task.config.process_results is None
        for task in members.values()
    )
    metrics: tuple[Metric, Metric] = ("acc_norm", "acc")
    for metric in metrics:
        if choice and all(metric in names for names in reported):
            return metric
    raise InputError(f"task {name} is no multiple choice scored by acc or acc_norm, which are accepted")


def _set_shots(task: Any, shots: int | None) -> int:
    """As lm-eval does: a task that says 0 keeps it, one that says nothing has 0 unless asked."""
    own = task.config.num_fewshot
    if own is None or (own != 0 and shots is not None):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=_SEED)
    return int(task.config.num_fewshot)


def _check_shots(name: str, task: Any, shots: int) -> None:
    # lm-eval draws one more where examples may come from the questions themselves.
    needed = shots + (task.fewshot_cfg.split == task.config.test_split)
    found = len(list(task.fewshot_docs())) if shots else needed
    if found < needed:
        where = "mmlu/dev" if name.startswith("mmlu_") else "a training file beside the questions"
        raise InputError(
            f"{name} with {shots} shots needs {needed} worked examples, has {found}; accepted is {where}"
        )


# -- answers


def _score(lm: Any, loaded: _Loaded, limit: int | None) -> TaskScores:
    import lm_eval.evaluator

    members = _select(loaded.members, limit)
    lm.begin(loaded.name)
    results = lm_eval.evaluator.evaluate(
        lm=lm,
        task_dict={"tasks": members, "groups": {}, "group_map": {}},
        bootstrap_iters=0,
        log_samples=True,
    )
    digest = hashlib.sha256()
    correct, answers, groups = [], [], []
    truncated = tied = 0
    for key, task in members.items():
        group = (task.config.task_alias or key) if len(loaded.members) > 1 else loaded.name
        for sample in _first_filter(results["samples"][key]):
            scores = _option_scores(task, sample, loaded.metric)
            correct.append(bool(sample[loaded.metric]))
            answers.append(scores.index(max(scores)))
            groups.append(group)
            truncated += any(tuple(pair) in lm.truncated for pair in sample["arguments"])
            tied += scores.count(max(scores)) > 1
            digest.update(json.dumps([sample["arguments"], sample["target"]]).encode() + b"\n")
    return TaskScores(
        loaded.name, loaded.metric, tuple(correct), tuple(answers), tuple(groups), loaded.shots,
        digest.hexdigest(), loaded.source, truncated, tied,
        loaded.notes + _notes(loaded.name, len(correct), truncated, tied, lm.max_length),
    )  # fmt: skip


def _select(members: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """The members that keep questions under a limit, with no others in their data sets."""
    if limit is None:
        return members
    splits = {k: task.config.test_split or task.config.validation_split for k, task in members.items()}
    picked = _pick({k: len(task.dataset[splits[k]]) for k, task in members.items()}, limit)
    for key, numbers in picked.items():
        data = members[key].dataset
        data[splits[key]] = data[splits[key]].select(numbers)
    return {key: members[key] for key in picked}


def _pick(sizes: dict[str, int], limit: int) -> dict[str, list[int]]:
    """Numbers of the questions of each member, evenly spread over all of them.

    >>> _pick({"a": 3, "b": 1, "c": 4}, 4)
    {'a': [0, 2], 'c': [0, 2]}
    """
    everything = [(key, number) for key, size in sizes.items() for number in range(size)]
    count = min(limit, len(everything))
    picked: dict[str, list[int]] = {}
    for i in range(count):
        key, number = everything[i * len(everything) // count]
        picked.setdefault(key, []).append(number)
    return picked


def _first_filter(samples: list[_Row]) -> list[_Row]:
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def _option_scores(task: Any, sample: _Row, metric: Metric) -> list[float]:
    """What the metric maximizes, for each option; any further log-likelihoods are for other metrics."""
    options = task.doc_to_choice(sample["doc"])
    sums = [float(sum_) for sum_, _ in sample["filtered_resps"][: len(options)]]
    if metric == "acc":
        return sums
    return [sum_ / len(option) for sum_, option in zip(sums, options, strict=True)]


def _notes(task: str, questions: int, truncated: int, tied: int, context: int) -> tuple[Note, ...]:
    notes = []
    if truncated:
        what = f"{truncated} of {questions} questions lose their beginning: longer than {context} tokens"
        notes.append(Note("clamp", task, what))
    if tied:
        what = f"in {tied} of {questions} questions the best options tie: the first of them is taken"
        notes.append(Note("fallback", task, what))
    return tuple(notes)


def _language_model(model: Any, tokenizer: Any, progress: Progress | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):  # type: ignore[misc]
        """lm-eval's model in batches bounded by memory, which says what it has to cut."""

        def begin(self, task: str) -> None:
            self.task = task
            self.truncated: set[tuple[str, str]] = set()

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
        ) -> list[Any]:
            for request in requests:
                self.check(*request)
            # Longest first, as lm-eval does: what does not fit in memory shows at once. One question's
            # options of one token stand together, for which it runs the prompt once.
            order = sorted(
                range(len(requests)),
                key=lambda i: (-len(requests[i][1] + requests[i][2]), requests[i][1] + requests[i][2]),
            )
            answers: list[Any] = [None] * len(requests)
            done = 0
            for batch in self.batches(requests, order):
                found = super()._loglikelihood_tokens(
                    [requests[i] for i in batch], disable_tqdm=True, override_bs=len(batch)
                )
                for i, answer in zip(batch, found, strict=True):
                    answers[i] = answer
                done += len(batch)
                if progress is not None:
                    progress(self.task, done, len(requests))
            return answers

        def check(self, texts: tuple[str, str], context: list[int], option: list[int]) -> None:
            if not 0 < len(option) <= self.max_length:
                raise InputError(
                    f"{self.task}: option {texts[1]!r} has {len(option)} tokens; accepted by this model "
                    f"are 1 to {self.max_length}"
                )
            if len(context) + len(option) > self.max_length + 1:
                self.truncated.add(texts)

        def batches(self, requests: list[Any], order: list[int]) -> Iterator[list[int]]:
            vocabulary = self.model.config.get_text_config().vocab_size
            tokens = min(_TOKENS, _LOGITS // vocabulary)
            while order:
                longest = min(len(requests[order[0]][1] + requests[order[0]][2]), self.max_length)
                batch: list[int] = []
                prompts: set[tuple[int, ...]] = set()
                for i in order:
                    prompts.add((*requests[i][1], *requests[i][2][:-1]))
                    if batch and len(prompts) * longest > tokens:
                        break
                    batch.append(i)
                yield batch
                order = order[len(batch) :]

    return LanguageModel(
        pretrained=model,
        tokenizer=deepcopy(tokenizer),  # lm-eval gives it a padding token
        batch_size="auto",  # given with each call
        softmax_dtype="float32",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence bars and warnings of lm-eval, `datasets` and transformers; results say what matters."""
    import datasets
    import lm_eval.api.task as task

    logger, bars, bar = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled(), task.tqdm
    level, verbosity = logger.level, datasets.logging.get_verbosity()
    logger.setLevel(logging.CRITICAL)
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    task.tqdm = lambda iterable, **_: iterable  # it has no switch
    try:
        with quiet_transformers():
            yield
    finally:
        task.tqdm = bar
        logger.setLevel(level)
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
