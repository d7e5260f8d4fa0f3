"""Steps that are kept, taken over, and made into a checkpoint; what was changed meanwhile is noticed."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fewbits import InputError, QuantScheme, ResourceError, VerificationError, disk, quantize
from fewbits.checkpoint import encode_json, hash_json
from fewbits.journal import Journal, discard, partial_folder
from models import tiny_checkpoint, tiny_model

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
G32, W8 = QuantScheme(4, "group", 32), QuantScheme(8)
REQUEST = {"method": "rtn", "scheme": {"bits": 4, "group": 32}}
IDS = torch.arange(12).view(3, 4)
STEPS = 3


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files, without what says how long it took and who works there."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("run.json", "lock"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def tensors_of_step(number: int) -> dict[str, Tensor]:
    """Of several dtypes and sizes, other ones in each step."""
    generator = torch.Generator().manual_seed(number)
    return {
        f"{number}.weight": torch.randn(5 + number, 3, generator=generator),
        f"{number}.codes": torch.randint(0, 255, (7,), dtype=torch.uint8, generator=generator),
        f"{number}.scale": torch.randn(4, 1, generator=generator).bfloat16(),
    }


def take_step(journal: Journal, states: bool = True) -> None:
    number = len(journal.steps)
    for name, tensor in tensors_of_step(number).items():
        journal.add(name, tensor)
    if states:
        journal.new_states(40).copy_(torch.arange(40, dtype=torch.uint8) + number)
    journal.commit_step({"number": number}, states)


def finish(journal: Journal, max_shard_bytes: int = 2**30) -> None:
    while len(journal.steps) < STEPS:
        take_step(journal, states=len(journal.steps) + 1 < STEPS)
    journal.write_shards(max_shard_bytes)
    journal.write_json("config.json", {"of": "all"})
    journal.commit()


class Stop(Exception):  # noqa: N818
    """Whatever ends a process."""


def begin(out, request=REQUEST):
    """A process that begins, or goes on, and does nothing."""
    with Journal(out) as journal:
        journal.begin(request, ids=IDS)


def stop_after(out: Path, steps: int, request: dict[str, Any] = REQUEST) -> Path:
    """Unfinished work for OUT."""

    def work() -> None:
        with Journal(out) as journal:
            journal.begin(request, lambda: {"tokens": 17}, IDS)
            for _ in range(steps):
                take_step(journal)
            raise Stop

    with pytest.raises(Stop):
        work()
    return partial_folder(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a checkpoint that was made without interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with Journal(out) as journal:
        journal.begin(REQUEST, ids=IDS)
        finish(journal)
    return contents(out)


# -- the checkpoint ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [2**30, 60_000, 1])
def test_transformers_loads_the_written_shards_bit_for_bit(tmp_path, max_shard_bytes):
    model, out = tiny_model("llama"), tmp_path / "out"
    state = model.state_dict()
    with Journal(out) as journal:
        journal.begin({})
        for i, (name, tensor) in enumerate(state.items()):
            journal.add(name, tensor)
            if i % 5 == 4:
                journal.commit_step({})
        journal.commit_step({})
        journal.write_shards(max_shard_bytes)
        journal.write_json("config.json", json.loads(model.config.to_json_string()))
        journal.commit()
    several = {2**30: 1, 1: len(state)}.get(max_shard_bytes)
    assert len(journal.shard_names) == several or (several is None and 1 < len(journal.shard_names) < 21)
    assert (out / INDEX).exists() == (len(journal.shard_names) > 1)
    assert {p.name for p in out.glob("*.safetensors")} == set(journal.shard_names)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("steps", [(6,), (1, 1, 1, 1, 1, 1), (2, 0, 4)])
def test_a_shard_holds_no_more_than_was_allowed_except_for_one_larger_tensor(tmp_path, steps):
    sizes = iter(enumerate([40, 60, 1, 250, 99, 2]))
    with Journal(tmp_path / "out") as journal:
        journal.begin({})
        for count in steps:  # where a step ends does not show
            for _ in range(count):
                i, size = next(sizes)
                journal.add(str(i), torch.full((size,), i, dtype=torch.uint8))
            journal.commit_step({})
        journal.write_shards(100)
        journal.commit()
    shards = [load_file(tmp_path / "out" / name) for name in journal.shard_names]
    assert [list(shard) for shard in shards] == [["0", "1"], ["2"], ["3"], ["4"], ["5"]]
    assert all(bool((t == int(name)).all()) for shard in shards for name, t in shard.items())


@pytest.mark.parametrize("kind", ["file", "empty folder", "full folder", "link to nothing"])
def test_an_out_that_exists_is_refused_and_left_alone(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "link to nothing":
        out.symlink_to(tmp_path / "nothing")
    else:
        out.touch() if kind == "file" else out.mkdir()
    if kind == "full folder":
        (out / "precious").write_text("data")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="out exists; accepted is a folder that does not exist yet"):
        Journal(out).__enter__()
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_stands_at_out_before_it_is_whole(tmp_path):
    with Journal(tmp_path / "out") as journal:
        journal.begin({})
        journal.add("a", torch.arange(100))
        journal.commit_step({})
        journal.write_shards()
        assert not (tmp_path / "out").exists()
        journal.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "out").stat().st_mode == plain.stat().st_mode  # as others would have made it
    (plain / "file").touch()
    assert (tmp_path / "out" / MODEL).stat().st_mode == (plain / "file").stat().st_mode


@pytest.mark.parametrize("resumed", [False, True])
def test_one_name_is_written_once(tmp_path, resumed):
    out = tmp_path / "out"
    if resumed:
        stop_after(out, 1)
    with Journal(out) as journal:
        journal.begin(REQUEST, ids=IDS)
        if not resumed:
            take_step(journal)
        journal.add("a", torch.arange(3))
        for name in ("a", "0.weight"):
            with pytest.raises(InputError, match=f"two tensors would be written as {name}"):
                journal.add(name, torch.arange(3))


# -- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(STEPS + 1))
def test_work_that_was_interrupted_goes_on_to_the_same_bytes(tmp_path, whole, steps):
    folder = stop_after(tmp_path / "out", steps)
    assert folder.exists() == (steps > 0)  # a step is what there is to lose
    assert not (tmp_path / "out").exists()
    with Journal(tmp_path / "out") as journal:
        journal.begin(REQUEST, ids=IDS)
        assert journal.steps == [{"number": i} for i in range(steps)]
        assert journal.resumed == steps
        states = journal.states()
        if steps:
            assert states.tolist() == list(range(steps - 1, steps + 39))
        else:
            assert states is None
        finish(journal)
    assert contents(tmp_path / "out") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [RuntimeError, KeyboardInterrupt, SystemExit, InputError, ResourceError]
)
def test_an_exception_before_the_first_step_is_done_leaves_nothing_behind(tmp_path, error):
    def begin_and_fail():
        with Journal(tmp_path / "sub" / "out") as journal:
            journal.begin(REQUEST, ids=IDS)
            journal.add("a", torch.arange(100))
            journal.new_states(10)
            assert contents(tmp_path / "sub")  # there is something to leave
            raise error

    with pytest.raises(error):
        begin_and_fail()
    assert not list((tmp_path / "sub").iterdir())


@pytest.mark.parametrize("earlier", [0, 1])
def test_an_input_at_fault_takes_only_away_what_this_process_made(tmp_path, earlier):
    folder = stop_after(tmp_path / "out", earlier)

    def fail():
        with Journal(tmp_path / "out") as journal:
            journal.begin(REQUEST, ids=IDS)
            take_step(journal)
            raise InputError("a weight")

    with pytest.raises(InputError, match="a weight"):
        fail()
    assert folder.exists() == bool(earlier)


def test_the_choices_and_token_ids_of_the_first_process_count(tmp_path):
    stop_after(tmp_path / "out", 1)
    with Journal(tmp_path / "out") as journal:
        journal.begin(REQUEST, lambda: pytest.fail("chosen already"))
        assert journal.choices == {"tokens": 17}
        assert torch.equal(journal.calibration(), IDS)
        assert journal.earlier["request"] == REQUEST


def test_states_of_one_step_make_room_for_those_of_the_next(tmp_path):
    with Journal(tmp_path / "out") as journal:
        journal.begin({})
        for number in range(3):
            take_step(journal)
            kept = [p.name for p in journal.folder.glob("states*")]
            assert kept == [f"states-{number:05}"]
        take_step(journal, states=False)
        assert journal.states() is None
        assert not list(journal.folder.glob("states*"))


@pytest.mark.parametrize(
    "name", ["step-00002", "step-00002.json.new", "states.new", "states-00000", "result/model", "notes"]
)
def test_files_that_no_record_speaks_of_are_removed(tmp_path, whole, name):
    folder = stop_after(tmp_path / "out", 2)
    before = contents(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"half of it")
    with Journal(tmp_path / "out") as journal:
        journal.begin(REQUEST, ids=IDS)
        assert contents(folder) == before
        assert not (folder / name).exists()
        finish(journal)
    assert contents(tmp_path / "out") == whole


# -- what was changed meanwhile ------------------------------------------------------------------


def change(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def rewrite(path: Path) -> None:
    """A record that agrees with itself and says something else."""
    record = json.loads(path.read_text())
    record.pop("sha256")
    key = "value" if "value" in record else "choices"
    record[key] = record[key] | {"more": 1}
    path.write_bytes(encode_json(record | {"sha256": hash_json(record)}))


def exchange(path: Path) -> None:
    other = path.with_name(path.name.replace("00000", "00001"))
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b), other.write_bytes(a)


@pytest.mark.parametrize(
    ("name", "damage", "named"),
    [
        ("step-00000.json", change, "step-00000.json"),
        ("step-00001.json", change, "step-00001.json"),
        ("step-00000.json", cut, "step-00000.json"),
        ("step-00000.json", lengthen, "step-00000.json"),
        ("step-00000.json", Path.unlink, "step-00000.json"),
        ("step-00001.json", Path.unlink, "step-00001.json"),  # the third hangs in the air
        ("step-00002.json", Path.unlink, "states-00001"),  # gone since: nothing to go on with
        ("step-00000.json", rewrite, "step-00001.json"),  # which follows on another one
        ("step-00000.json", exchange, "step-00000.json"),
        ("step-00000", change, "step-00000"),
        ("step-00001", change, "step-00001"),
        ("step-00000", cut, "step-00000"),
        ("step-00000", lengthen, "step-00000"),
        ("step-00000", Path.unlink, "step-00000"),
        ("step-00000", exchange, "step-00000"),
        ("states-00002", change, "states-00002"),
        ("states-00002", cut, "states-00002"),
        ("states-00002", Path.unlink, "states-00002"),
        ("calibration", change, "calibration"),
        ("calibration", Path.unlink, "calibration"),
        ("request.json", change, "request.json"),
        ("request.json", cut, "request.json"),
    ],
)
def test_a_file_that_was_changed_is_named_and_the_work_is_left_as_it_is(tmp_path, name, damage, named):
    folder = stop_after(tmp_path / "out", 3)
    damage(folder / name)
    before = contents(folder)

    with pytest.raises(VerificationError) as refused:
        begin(tmp_path / "out")
    message = str(refused.value)
    assert message.startswith(f"{folder / named} was changed since it was written, or is missing")
    assert message.endswith("accepted is --restart, which throws it away")
    assert "\n" not in message
    assert contents(folder) == before
    assert not (tmp_path / "out").exists()


def test_a_last_record_that_is_missing_costs_its_step_where_it_had_no_states(tmp_path, whole):
    out = tmp_path / "out"

    def work():
        with Journal(out) as journal:
            journal.begin(REQUEST, ids=IDS)
            for _ in range(2):
                take_step(journal, states=False)
            raise Stop

    with pytest.raises(Stop):
        work()
    (partial_folder(out) / "step-00001.json").unlink()
    with Journal(out) as journal:
        journal.begin(REQUEST, ids=IDS)
        assert journal.resumed == 1
        finish(journal)
    assert contents(out) == whole


# -- another run ---------------------------------------------------------------------------------


def test_another_request_is_refused_with_every_difference_and_nothing_is_lost(tmp_path, whole):
    folder = stop_after(tmp_path / "out", 2)
    before = contents(folder)
    other = {"method": "gptq", "scheme": {"bits": 3, "group": 32}, "head": True}

    with pytest.raises(InputError) as refused:
        begin(tmp_path / "out", other)
    message = str(refused.value)
    assert message.startswith(f"{folder} holds another unfinished run: ")
    assert "method was 'rtn' and is 'gptq' now" in message
    assert "scheme.bits was 4 and is 3 now" in message
    assert "head was None and is True now" in message
    assert "group" not in message
    assert "--restart" in message
    assert "\n" not in message
    assert contents(folder) == before
    with Journal(tmp_path / "out") as journal:
        journal.begin(REQUEST, ids=IDS)
        finish(journal)
    assert contents(tmp_path / "out") == whole


def test_a_second_process_is_refused_and_takes_nothing_away(tmp_path, whole):
    out = tmp_path / "out"
    with Journal(out) as journal:
        for _ in range(2):  # before the first has begun, and amid its work
            before = contents(journal.folder)
            for try_it in (lambda: Journal(out).__enter__(), lambda: discard(out)):
                with pytest.raises(InputError, match="out is being made by process") as refused:
                    try_it()
                assert str(os.getpid()) in str(refused.value)
                assert str(refused.value).endswith("accepted is another folder, or to wait")
            assert contents(journal.folder) == before
            if not journal.steps:
                journal.begin(REQUEST, ids=IDS)
                take_step(journal)
        finish(journal)
    assert contents(out) == whole


_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_journal import IDS, REQUEST, Journal, Path, take_step
with Journal(Path(sys.argv[2])) as journal:
    journal.begin(REQUEST, ids=IDS)
    take_step(journal)
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_lock_of_a_process_that_was_killed_is_taken_over_and_said(tmp_path, whole):
    command = [sys.executable, "-c", _KILLED, str(Path(__file__).parent), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Journal(tmp_path / "out") as journal:
        assert journal.stale is not None
        assert f"process {done.stdout.strip()} on " in journal.stale
        journal.begin(REQUEST, ids=IDS)
        assert journal.resumed == 1
        finish(journal)
    assert contents(tmp_path / "out") == whole


def test_a_process_that_let_go_of_its_lock_is_not_called_dead(tmp_path):
    stop_after(tmp_path / "out", 1)
    with Journal(tmp_path / "out") as journal:
        assert journal.stale is None


def test_discarded_work_is_gone_and_there_need_not_be_any(tmp_path):
    out = tmp_path / "out"
    discard(out)
    folder = stop_after(out, 2)
    (folder / "step-00000.json").write_text("damaged")
    discard(out)
    assert not list(tmp_path.iterdir())
    with Journal(out) as journal:
        journal.begin({"another": "request"})
        assert journal.steps == []


# -- the disk ------------------------------------------------------------------------------------


@dataclass
class FailingDisk:
    """Calls that concern a folder fail from some call on, until the disk is mended."""

    folder: Path
    patch: pytest.MonkeyPatch
    calls: int = 0
    broken: bool = True

    def fail(self, call: str, code: int, after: float) -> None:
        self.patch.undo()
        real, self.calls = getattr(os, call), 0

        def failing(what: int | str | Path, *args: Any, **kwargs: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else what
            if Path(path).is_relative_to(self.folder):
                self.calls += 1
                if self.broken and self.calls > after:
                    raise OSError(code, os.strerror(code))
            return real(what, *args, **kwargs)

        self.patch.setattr(disk.os, call, failing)


@pytest.fixture
def failing_disk(tmp_path, monkeypatch):
    return FailingDisk(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny llama and what becomes of it in 8 bits."""
    folder = tmp_path_factory.mktemp("source")
    tiny_checkpoint(folder / "model")
    quantize(folder / "model", folder / "out", scheme=W8)
    return folder / "model", contents(folder / "out")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="files are found by their handles")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
def test_a_failing_disk_is_one_clear_line_and_the_same_call_goes_on(
    tmp_path, source, failing_disk, call, code
):
    model, expected = source
    out = tmp_path / "out"
    failing_disk.fail(call, code, math.inf)
    quantize(model, out, scheme=W8)
    half = failing_disk.calls // 2
    quantize(model, out, scheme=W8)  # verified only
    shutil.rmtree(out)
    reason = os.strerror(code) if code == errno.EIO else "the disk is full"
    messages = []
    for after in (0, half):
        failing_disk.fail(call, code, after)
        with pytest.raises(ResourceError, match=rf"out could not be written: .*{reason}") as failed:
            quantize(model, out, scheme=W8)
        messages.append(str(failed.value))
        assert "\n" not in messages[-1]
        assert [p.name for p in tmp_path.iterdir()] == ([".out.partial"] if after else [])
    assert messages[0].endswith("; nothing was left behind")
    assert messages[1].endswith("; what is finished is kept, and the same command goes on from there")
    failing_disk.broken = False
    assert quantize(model, out, scheme=W8).run["resumed_steps"] > 0
    assert contents(out) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_is_said_so_and_with_more_room_it_goes_on(
    source, small_disk, monkeypatch
):
    model, expected = source
    monkeypatch.setattr("fewbits.journal.free_bytes", lambda _: 10**9)  # others write too
    with pytest.raises(ResourceError, match="the disk is full; what is finished is kept"):
        quantize(model, small_disk / "out", scheme=W8)
    assert [p.name for p in small_disk.iterdir()] == [".out.partial"]
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert quantize(model, small_disk / "out", scheme=W8).run["resumed_steps"] > 0
    assert contents(small_disk / "out") == expected


def test_too_little_room_is_refused_before_the_work(source, small_disk):
    with pytest.raises(ResourceError, match=r"GB of disk on the way, and 0\.000 GB are free"):
        quantize(source[0], small_disk / "out", scheme=W8, progress=lambda *_: pytest.fail("it works"))
    assert not list(small_disk.iterdir())


def test_work_that_is_done_needs_no_room_again(tmp_path, monkeypatch):
    stop_after(tmp_path / "out", 2)
    held = sum(len(content) for content in contents(partial_folder(tmp_path / "out")).values())
    spare = 2**20

    def go_on(free: int) -> None:
        monkeypatch.setattr("fewbits.journal.free_bytes", lambda _: free)
        with Journal(tmp_path / "out") as journal:
            journal.begin(REQUEST, ids=IDS, needed_bytes=10**8)
            raise Stop

    for missing, error in ((held + 10**3, ResourceError), (-(10**3), Stop)):
        with pytest.raises(error):
            go_on(10**8 - held + spare - missing)
        assert partial_folder(tmp_path / "out").exists()


def test_ctrl_c_waits_until_what_must_not_be_torn_is_done():
    done = False

    def work() -> None:
        nonlocal done
        with disk.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done = True

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done


def test_a_file_is_the_old_or_the_new_one_whatever_fails(tmp_path, failing_disk):
    path = tmp_path / "file"
    disk.write_whole(path, [b"old"])
    for call in ("open", "write", "fsync", "replace"):
        failing_disk.fail(call, errno.EIO, 0)
        with pytest.raises(OSError, match="Input/output"):
            disk.write_whole(path, [b"new"])
        failing_disk.patch.undo()
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
    disk.write_whole(path, [b"n", b"ew"])
    assert path.read_bytes() == b"new"
