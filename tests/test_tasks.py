"""Multiple-choice tasks: answers beside a plain loop, prompts beside hand-written ones, files."""

import csv
import hashlib
import json
import random
import sys
from pathlib import Path

import datasets
import jinja2
import pytest
import torch

import fewbits
from fewbits.errors import InputError
from fewbits.evaluate import load_tokenizer
from fewbits.scheme import QuantScheme
from fewbits.tasks import TaskScores, check_tasks, compare_scores, evaluate_tasks

SHARED = Path(__file__).parent.parent.parent / "shared/data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and texts are not here")

REFERENCE = Path(__file__).parent.parent / "reference/model"
WORDS = [
    "list",
    "file",
    "name",
    "count",
    "table",
    "value",
    "reads",
    "opens",
    "the",
    "of",
    "empty",
    "old",
]
SUBJECTS = ["anatomy", "high_school_physics", "marketing"]
ALL = ["mmlu", "arc_challenge", "hellaswag"]


def sentence(rng, length):
    return " ".join(rng.choice(WORDS) for _ in range(length))


def questions(seed, count, options=4):
    """Question, options, number of the right one; options of different lengths, for acc_norm."""
    rng = random.Random(seed)
    return [
        (
            sentence(rng, 9) + "?",
            [sentence(rng, rng.randint(1, 8)) for _ in range(options)],
            rng.randrange(options),
        )
        for _ in range(count)
    ]


def write_mmlu(folder, tests, examples, header=True):
    for kind, subjects in (("test", tests), ("dev", examples)):
        (folder / "mmlu" / kind).mkdir(parents=True)
        for subject, rows in subjects.items():
            with (folder / "mmlu" / kind / f"{subject}_{kind}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                if header:
                    writer.writerow(["question", *(f"choice{i}" for i in range(4)), "answer"])
                for text, options, answer in rows:
                    writer.writerow([text, *options, answer if header else "ABCD"[answer]])


def arc_row(text, options, answer, labels="ABCDE"):
    choices = [{"text": option, "label": label} for option, label in zip(options, labels, strict=False)]
    return {"id": "1", "question": {"stem": text, "choices": choices}, "answerKey": labels[answer]}


def halves(text):
    words = text.split()
    return " ".join(words[:4]), " ".join(words[4:]).upper()


def hellaswag_row(text, options, answer):
    head, tail = halves(text)
    return {
        "ind": 1,
        "activity_label": "Making tea",
        "ctx_a": f"{head} [step] x.",
        "ctx_b": tail,
        "ctx": f"{head} {tail}",
        "endings": [f"{option} [title] and [b] so" for option in options],
        "label": answer,
    }


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


MMLU = {subject: questions(i, 6) for i, subject in enumerate(SUBJECTS)}
# Worked examples of one subject have one answer, which a small model repeats: so answers differ.
DEV = {subject: [(t, o, i) for t, o, _ in questions(10 + i, 3)] for i, subject in enumerate(SUBJECTS)}
ARC = questions(20, 8) + questions(21, 5, 3) + questions(22, 5, 5)
HELLASWAG = questions(30, 18)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_mmlu(folder, MMLU, DEV)
    write_jsonl(folder / "ARC-Challenge-Test.jsonl", [arc_row(*q) for q in ARC])
    write_jsonl(folder / "hellaswag_val.jsonl", [hellaswag_row(*q) for q in HELLASWAG])
    return folder


@pytest.fixture(scope="module")
def model():
    return fewbits.load(REFERENCE, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(REFERENCE)


# -- prompts, written out by hand


def mmlu_prompt(subject, text, options, examples=()):
    def block(text, options):
        lettered = "".join(f"{letter}. {o}\n" for letter, o in zip("ABCD", options, strict=True))
        return f"{text}\n{lettered}Answer:"

    about = subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    worked = "".join(f"{block(t, o)} {'ABCD'[a]}\n\n" for t, o, a in examples)
    return head + worked + block(text, options)


def mmlu_pairs(tests, examples=None, shots=0):
    """(prompt, options, right answer, characters of an option) for each question."""
    for subject in sorted(tests):
        worked = examples[subject][:shots] if shots else []
        for text, options, answer in tests[subject]:
            yield mmlu_prompt(subject, text, options, worked), list("ABCD"), answer


def arc_pairs(rows):
    for text, options, answer in rows:
        yield f"Question: {text}\nAnswer:", options, answer


def hellaswag_pairs(rows):
    """What is in brackets goes, and the space it leaves; the second part of a context is capitalized."""
    for text, options, answer in rows:
        head, tail = halves(text)
        prompt = f"Making tea: {head} x. {tail.capitalize()}"
        yield prompt, [f"{option}. and so" for option in options], answer


def digest(pairs):
    result = hashlib.sha256()
    for prompt, options, answer in pairs:
        line = json.dumps([[[prompt, f" {option}"] for option in options], answer])
        result.update(line.encode() + b"\n")
    return result.hexdigest()


# -- the oracle: one forward per option


@torch.no_grad()
def direct(model, tokenizer, pairs, normalized):
    """Chosen option of each question, and whether it is right."""
    context = model.config.max_position_embeddings
    answers, correct = [], []
    for prompt, options, answer in pairs:
        scores = []
        for option in options:
            start = len(tokenizer(prompt).input_ids)
            ids = torch.tensor(tokenizer(f"{prompt} {option}").input_ids)
            count = len(ids) - start
            ids = ids[-(context + 1) :]
            log_p = model(ids[None, :-1]).logits[0].double().log_softmax(-1)
            total = sum(float(log_p[i - 1, ids[i]]) for i in range(len(ids) - count, len(ids)))
            scores.append(total / len(option) if normalized else total)
        best = max(range(len(options)), key=scores.__getitem__)
        answers.append(best)
        correct.append(best == answer)
    return tuple(answers), tuple(correct)


CASES = {
    "mmlu": (0, lambda: mmlu_pairs(MMLU)),
    "mmlu with 2 shots": (2, lambda: mmlu_pairs(MMLU, DEV, 2)),
    "arc_challenge": (0, lambda: arc_pairs(ARC)),
    "hellaswag": (0, lambda: hellaswag_pairs(HELLASWAG)),
}


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_those_written_by_hand_and_answers_those_of_a_plain_loop(
    case, data, model, tokenizer
):
    shots, pairs = CASES[case]
    (scores,) = evaluate_tasks(model, tokenizer, [case.split()[0]], data=data, shots=shots or None)
    assert scores.sha256 == digest(pairs())
    answers, correct = direct(model, tokenizer, pairs(), scores.metric == "acc_norm")
    assert scores.answers == answers
    assert scores.correct == correct
    assert scores.accuracy.value == pytest.approx(sum(correct) / len(correct), abs=1e-12)
    assert len(set(answers)) > 1  # else the test could not fail
    assert scores.metric == ("acc" if scores.task == "mmlu" else "acc_norm")
    assert scores.shots == shots


def test_hand_written_prompts_are_lm_evals_templates():
    """So that the hand-written ones stay what lm-eval's yaml files say."""
    import lm_eval.tasks
    from lm_eval.tasks.hellaswag.utils import process_docs

    folder = Path(lm_eval.tasks.__file__).parent
    folders = [folder / name for name in ("mmlu/default", "arc", "hellaswag")]
    index = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False).task_index
    text, options, answer = MMLU["anatomy"][0]

    def render(task, **doc):
        config = index[task].cfg
        assert config.get("target_delimiter", " ") == " "
        return config.get("description", "") + jinja2.Template(config["doc_to_text"]).render(**doc)

    assert render("mmlu_anatomy", question=text, choices=options) == mmlu_prompt(
        "anatomy", text, options
    )
    assert index["mmlu_anatomy"].cfg["doc_to_choice"] == list("ABCD")
    assert render("arc_challenge", question=text) == next(arc_pairs([(text, options, answer)]))[0]
    row = datasets.Dataset.from_list([hellaswag_row(text, options, answer)])
    (doc,) = process_docs(row)
    prompt, endings, right = next(hellaswag_pairs([(text, options, answer)]))
    assert (render("hellaswag", **doc), doc["choices"], doc["gold"]) == (prompt, endings, right)


def hub(path, name=None, **_):
    """What the hub's data sets hold, made of the same questions."""
    if path == "cais/mmlu":
        columns = ("question", "choices", "answer")
        found = (("test", MMLU.get(name, questions(40, 1))), ("dev", DEV.get(name, questions(41, 5))))
        rows = {split: [dict(zip(columns, q, strict=True)) for q in qs] for split, qs in found}
    elif path == "allenai/ai2_arc":
        rows = {"test": [arc_row(*q) for q in ARC], "train": [arc_row(*q) for q in questions(42, 9)]}
        for row in rows["test"] + rows["train"]:
            row["choices"] = {k: [c[k] for c in row["question"]["choices"]] for k in ("text", "label")}
            row["question"] = row["question"]["stem"]
    else:
        assert path == "Rowan/hellaswag"
        qs = {"validation": HELLASWAG, "train": questions(43, 9)}
        rows = {k: [hellaswag_row(*q) | {"label": str(q[2])} for q in v] for k, v in qs.items()}
    return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in rows.items()})


def test_questions_from_the_hub_get_the_prompts_of_local_ones(data, model, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", hub)
    local = evaluate_tasks(model, tokenizer, ALL[1:], data=data)
    remote = evaluate_tasks(model, tokenizer, ALL[1:])
    for ours, theirs in zip(local, remote, strict=True):
        assert (ours.sha256, ours.answers, ours.correct) == (
            theirs.sha256,
            theirs.answers,
            theirs.correct,
        )
        assert theirs.source == "hub"
        assert compare_scores(ours, theirs).changed.value == 0


def test_other_tasks_and_groups_of_lm_eval_come_from_the_hub(model, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", hub)
    easy, stem = evaluate_tasks(model, tokenizer, ["arc_easy", "mmlu_stem"], limit=30)
    assert (easy.metric, len(easy.correct), set(easy.groups)) == ("acc_norm", 18, {"arc_easy"})
    assert stem.metric == "acc"
    assert len(stem.correct) > len(set(stem.groups)) > 5
    assert "anatomy" in stem.groups


def test_a_hub_that_does_not_answer_is_said_in_a_line(monkeypatch):
    def offline(**_):
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        InputError, match=r"task hellaswag cannot be had from the hub: no route to host$"
    ):
        check_tasks(["hellaswag"], None)


# Endings of HellaSwag can be longer than the 256 characters that babyllama105 takes: refused, see below.
REAL = [("reference", task) for task in ALL] + [("babyllama105", task) for task in ALL[:2]]


@shared
@pytest.mark.parametrize(("name", "task"), REAL)
def test_real_questions_get_the_answers_of_a_plain_loop(name, task):
    folder = REFERENCE if name == "reference" else SHARED / "models" / name
    model, tokenizer = fewbits.load(folder, dtype=torch.float32), load_tokenizer(folder)
    text, limit = SHARED / "text", 16
    (scores,) = evaluate_tasks(model, tokenizer, [task], data=text, limit=limit)
    if task == "mmlu":
        tests = {}
        for path in sorted((text / "mmlu/test").glob("*.csv")):
            rows = list(csv.reader(path.open(newline="")))[1:]
            tests[path.stem.removesuffix("_test")] = [(r[0].strip(), r[1:5], int(r[5])) for r in rows]
        pairs = list(mmlu_pairs(tests))
    elif task == "arc_challenge":
        lines = map(json.loads, (text / "ARC-Challenge-Test.jsonl").open())
        rows = [(r["question"]["stem"], r["question"]["choices"], r["answerKey"]) for r in lines]
        pairs = list(
            arc_pairs(
                (q, [c["text"] for c in cs], [c["label"] for c in cs].index(a)) for q, cs, a in rows
            )
        )
    else:
        lines = (text / "hellaswag_valid.txt").read_text().split("\n")
        pairs = [
            (lines[i].strip(), [e.strip() for e in lines[i + 2 : i + 6]], int(lines[i + 1]))
            for i in range(0, len(lines) - 1, 6)
        ]
    picked = [pairs[i * len(pairs) // limit] for i in range(limit)]
    assert scores.sha256 == digest(picked)
    answers, correct = direct(model, tokenizer, picked, scores.metric == "acc_norm")
    assert (scores.answers, scores.correct) == (answers, correct)
    context = model.config.max_position_embeddings
    lengths = [[len(tokenizer(f"{p} {option}").input_ids) for option in o] for p, o, _ in picked]
    assert scores.truncated == sum(max(each) > context + 1 for each in lengths)


# -- files


def test_mmlu_is_read_with_a_header_and_in_its_original_form(data, model, tokenizer, tmp_path):
    write_mmlu(tmp_path, MMLU, DEV, header=False)
    ours = evaluate_tasks(model, tokenizer, ["mmlu"], data=tmp_path, shots=3)
    theirs = evaluate_tasks(model, tokenizer, ["mmlu"], data=data, shots=3)
    assert ours == theirs
    assert set(ours[0].groups) == {"anatomy", "high_school_physics", "marketing"}
    assert [note.what[:16] for note in ours[0].notes] == ["3 of 57 subjects"]


def test_arc_is_read_with_numbers_for_labels(data, model, tokenizer, tmp_path):
    write_jsonl(tmp_path / "ARC-Challenge.jsonl", [arc_row(*q, "12345") for q in ARC])
    (ours,) = evaluate_tasks(model, tokenizer, ["arc_challenge"], data=tmp_path)
    (theirs,) = evaluate_tasks(model, tokenizer, ["arc_challenge"], data=data)
    assert (ours.sha256, ours.answers) == (theirs.sha256, theirs.answers)
    assert ours.source == "ARC-Challenge.jsonl"


def test_hellaswag_as_text_is_read_and_its_contexts_taken_as_written(model, tokenizer, tmp_path):
    lines = [[f"Making tea: {q}", str(a), *o] for q, o, a in HELLASWAG]
    (tmp_path / "hellaswag_valid.txt").write_text("".join(f"{line}\n" for six in lines for line in six))
    (scores,) = evaluate_tasks(model, tokenizer, ["hellaswag"], data=tmp_path)
    assert scores.sha256 == digest((f"Making tea: {q}", o, a) for q, o, a in HELLASWAG)
    assert str(scores.notes[0]).startswith("fact: hellaswag_valid.txt: contexts are in one piece")
    (tmp_path / "hellaswag_valid.txt").unlink()
    rows = [
        {"activity_label": "Making tea", "ctx": q, "endings": o, "label": a} for q, o, a in HELLASWAG
    ]
    write_jsonl(tmp_path / "hellaswag.jsonl", rows)
    assert evaluate_tasks(model, tokenizer, ["hellaswag"], data=tmp_path)[0].sha256 == scores.sha256


GOOD = "q,a,b,c,d,B\n"
GOOD_ARC = json.dumps(arc_row("q", ["a", "b", "c"], 1)) + "\n"
GOOD_SWAG = json.dumps(hellaswag_row("what", ["a", "b", "c", "d"], 1)) + "\n"


def changed(row, **changes):
    return json.dumps(json.loads(row) | changes) + "\n"


TEST = "mmlu/test/anatomy_test.csv"
ARC_TEST = "ARC-Challenge-Test.jsonl"
BROKEN = {
    "five columns": (TEST, GOOD + "q,a,b,c,B\n", "anatomy_test.csv:2: 5 columns"),
    "no such answer": (TEST, GOOD + GOOD + "q,a,b,c,d,E\n", ":3: answer 'E'"),
    "an empty option": (TEST, '"q\nq",a,b,c,d,A\nq,a,,c,d,A\n', ":3: '' is no text"),
    "an open quote": (TEST, GOOD + '"q,a,b,c,d,A\n', ":2: unexpected end of data"),
    "no question": (TEST, "question,a,b,c,d,answer\n", "holds no question"),
    "no subject": ("mmlu/test/anatomie_test.csv", GOOD, "anatomie is no subject.*did you mean anatomy"),
    "no json": (ARC_TEST, GOOD_ARC + "{\n", "ARC-Challenge-Test.jsonl:2: Expecting"),
    "no stem": (ARC_TEST, changed(GOOD_ARC, question={}), ":1: no 'stem'"),
    "a list": (ARC_TEST, "[]\n", ":1: .*accepted are rows like"),
    "wrong key": (ARC_TEST, changed(GOOD_ARC, answerKey="D"), ":1: answerKey 'D'"),
    "two options": (ARC_TEST, json.dumps(arc_row("q", ["a", "b"], 0)), ":1: 2 options"),
    "strange labels": (
        ARC_TEST, json.dumps(arc_row("q", ["a", "b", "c"], 0, "XYZ")), ":1: labels",
    ),
    "no label": ("hellaswag_val.jsonl", GOOD_SWAG + changed(GOOD_SWAG, label=""), ":2: label ''"),
    "three endings": ("hellaswag_val.jsonl", changed(GOOD_SWAG, endings=["a"] * 3), ":1: 3 endings"),
    "no context": ("hellaswag_val.jsonl", '{"label": 1, "endings": []}\n', ":1: no 'ctx'"),
    "a line lost": (
        "hellaswag_valid.txt", "A: b\n1\na\nb\nc\nd\nA: b\n1\na\nb\nc\n", ":7: .*5 lines",
    ),
    "a line moved": ("hellaswag_valid.txt", "A: b\na\nb\nc\nd\n1\n", ":1: .*label 'a'"),
    "no activity": ("hellaswag_valid.txt", "b\n1\na\nb\nc\nd\n", ":1: .*'b' is no 'activity: context'"),
    "not text": ("hellaswag_valid.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_its_line_and_what_is_accepted(case, tmp_path):
    name, content, message = BROKEN[case]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    task = next(t for t in ALL if name.lower().startswith(t[:3]))
    with pytest.raises(InputError, match=message) as caught:
        check_tasks([task], tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_said_before_any_work(data, tmp_path, monkeypatch):
    def refused(message, *arguments):
        with pytest.raises(InputError, match=message):
            check_tasks(*arguments)

    refused("task winogrande has no layout for local files; accepted are mmlu", ["winogrande"], data)
    refused("no task is named", [], data)
    refused("mmlu is named twice", ["mmlu", "mmlu"], data)
    refused("is no folder", ["mmlu"], tmp_path / "nothing")
    for task, pattern in zip(ALL, ("mmlu/test", "ARC-Challenge", "hellaswag"), strict=True):
        refused(f"has no {pattern}", [task], tmp_path)
    refused("arc_challenge with 5 shots needs 5 worked examples, has 0", ["arc_challenge"], data, 5)
    refused("hellaswag with 1 shots needs", ["hellaswag"], data, 1)
    refused(
        "anatomy with 4 shots needs 4 worked examples, has 3; accepted is mmlu/dev", ["mmlu"], data, 4
    )
    refused("shots is -1", ["mmlu"], data, -1)
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"hellaswag_{name}.jsonl", [])
    refused("both fit", ["hellaswag"], tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    refused(r"pip install 'fewbits\[tasks\]'", ["mmlu"], data)


@pytest.mark.slow  # lm-eval indexes 14,000 tasks
def test_a_name_that_lm_eval_does_not_know_gets_the_nearest_that_it_does():
    with pytest.raises(InputError, match="knows no task hellaswagg; did you mean hellaswag"):
        check_tasks(["hellaswagg"], None)


def test_training_files_give_the_worked_examples(data, model, tokenizer, tmp_path):
    write_jsonl(tmp_path / "ARC-Challenge-Test.jsonl", [arc_row(*q) for q in ARC[:3]])
    train = ("where is it", ["aa", "bb", "cc", "dd"], 2)
    write_jsonl(tmp_path / "ARC-Challenge-Train.jsonl", [arc_row(*train)])
    (scores,) = evaluate_tasks(model, tokenizer, ["arc_challenge"], data=tmp_path, shots=1)
    worked = "Question: where is it\nAnswer: cc\n\n"
    assert scores.sha256 == digest((worked + p, o, a) for p, o, a in arc_pairs(ARC[:3]))
    assert (scores.shots, scores.source) == (1, "ARC-Challenge-Test.jsonl")


# -- what is counted, and said


def test_a_limit_spreads_over_all_subjects(data, model, tokenizer):
    (scores,) = evaluate_tasks(model, tokenizer, ["mmlu"], data=data, limit=6)
    pairs = list(mmlu_pairs(MMLU))
    assert scores.sha256 == digest(pairs[i] for i in (0, 3, 6, 9, 12, 15))
    assert scores.groups == tuple(subject for subject in SUBJECTS for _ in range(2))
    with pytest.raises(InputError, match="limit is 0"):
        evaluate_tasks(model, tokenizer, ["mmlu"], data=data, limit=0)


def test_nothing_is_printed_and_the_tokenizer_stays_as_it_is(data, model, tokenizer, capfd):
    told = []
    pad, length = tokenizer.pad_token, len(tokenizer)
    evaluate_tasks(model, tokenizer, ALL, data=data, progress=lambda *a: told.append(a))
    assert capfd.readouterr() == ("", "")
    assert (tokenizer.pad_token, len(tokenizer)) == (pad, length)
    for task, total in zip(ALL, (72, 72, 72), strict=True):
        counts = [(done, of) for name, done, of in told if name == task]
        assert counts[-1] == (total, total)
        assert counts == sorted(set(counts))


def test_questions_longer_than_the_context_are_counted(model, tokenizer, tmp_path):
    def question(words):
        return " ".join(["value"] * words), ["a", "b", "c"], 0

    def tokens(words):  # the last one is only predicted, so one more than the context fits
        return len(tokenizer(next(arc_pairs([question(words)]))[0] + " a").input_ids)

    last = max(n for n in range(600) if tokens(n) <= 513)
    assert tokens(last) == 513
    assert tokens(last + 1) == 514
    rows = [question(n) for n in (1, last, last + 1, last + 2)]
    write_jsonl(tmp_path / "ARC-Challenge-Test.jsonl", [arc_row(*q) for q in rows])
    (scores,) = evaluate_tasks(model, tokenizer, ["arc_challenge"], data=tmp_path)
    assert scores.truncated == 2
    assert "clamp: arc_challenge: 2 of 4 questions lose their beginning" in str(scores.notes[0])
    answers, _ = direct(model, tokenizer, arc_pairs(rows), normalized=True)
    assert scores.answers == answers


def test_an_option_longer_than_the_context_is_refused(model, tokenizer, tmp_path):
    long = " ".join(["value"] * 600)
    write_jsonl(tmp_path / "ARC-Challenge-Test.jsonl", [arc_row("q", ["a", long, "c"], 0)])
    with pytest.raises(InputError, match="accepted by this model are 1 to 512"):
        evaluate_tasks(model, tokenizer, ["arc_challenge"], data=tmp_path)


def test_ties_are_counted_and_the_first_option_taken(model, tokenizer, tmp_path):
    rows = [("which", ["the file", "the file", "the file"], 0), ("which", ["a", "file", "the"], 0)]
    write_jsonl(tmp_path / "ARC-Challenge-Test.jsonl", [arc_row(*q) for q in rows])
    (scores,) = evaluate_tasks(model, tokenizer, ["arc_challenge"], data=tmp_path)
    assert (scores.tied, scores.answers[0]) == (1, 0)
    assert "in 1 of 2 questions the best options tie" in str(scores.notes[0])


def test_letters_that_a_vocabulary_lacks_tie(tmp_path, model, tokenizer):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "Answer": 1, ":": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    poor = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<unk>")
    write_mmlu(tmp_path, MMLU, {})
    (scores,) = evaluate_tasks(model, poor, ["mmlu"], data=tmp_path)
    assert (scores.tied, set(scores.answers)) == (18, {0})


# -- two models


def synthetic(correct, answers, **changes):
    count = len(correct)
    values = {
        "task": "t",
        "metric": "acc",
        "groups": ("t",) * count,
        "shots": 0,
        "sha256": "5e",
        "source": "hub",
    }
    correct = tuple(bool(c) for c in correct)
    return TaskScores(correct=correct, answers=tuple(int(a) for a in answers), **(values | changes))


def test_a_comparison_is_what_counting_by_hand_gives_with_the_error_of_the_bootstrap():
    generator = torch.Generator().manual_seed(0)
    right = torch.randint(4, (600,), generator=generator)
    base = torch.where(torch.rand(600, generator=generator) < 0.6, right, (right + 1) % 4)
    move = torch.rand(600, generator=generator) < 0.2
    ours = torch.where(move, torch.randint(4, (600,), generator=generator), base)
    result = compare_scores(synthetic(ours == right, ours), synthetic(base == right, base))
    good, before = (ours == right).double(), (base == right).double()
    wanted = {
        "accuracy": good,
        "difference": good - before,
        "flips": (good != before).double(),
        "changed": (ours != base).double(),
    }
    draws = torch.randint(600, (4000, 600), generator=generator)
    for name, values in wanted.items():
        estimate = getattr(result, name)
        assert estimate.value == pytest.approx(float(values.mean()), abs=1e-12)
        # The error of a standard deviation from 4000 draws is 1.1 %; four of those.
        assert estimate.error == pytest.approx(float(values[draws].mean(1).std()), rel=0.045)
    # Pairing is what makes the difference sharper than two accuracies are.
    assert result.difference.error < result.accuracy.error


@pytest.mark.parametrize("change", [{"sha256": "5f"}, {"metric": "acc_norm"}, {"task": "u"}])
def test_answers_to_other_questions_are_not_paired(change):
    with pytest.raises(InputError, match="cannot be paired"):
        compare_scores(synthetic([1, 0], [0, 0]), synthetic([1, 0], [0, 0], **change))


def test_a_quantized_model_is_compared_with_its_source(data, tokenizer, tmp_path):
    fewbits.quantize(REFERENCE, tmp_path / "out", scheme=QuantScheme.parse("w3-g32"))
    models = [fewbits.load(tmp_path / "out"), fewbits.load(REFERENCE)]
    ours, base = (evaluate_tasks(m, tokenizer, ALL, data=data) for m in models)
    for scores, reference in zip(ours, base, strict=True):
        result = compare_scores(scores, reference)
        assert abs(result.difference.value) <= result.flips.value <= result.changed.value
        assert TaskScores.from_json(json.loads(json.dumps(scores.to_json()))) == scores
        assert scores.to_json()["accuracy"]["value"] == scores.accuracy.value
    assert any(compare_scores(*pair).changed.value > 0 for pair in zip(ours, base, strict=True))
    assert evaluate_tasks(models[0], tokenizer, ["mmlu"], data=data) == ours[:1]
