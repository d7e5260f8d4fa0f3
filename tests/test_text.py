import json

import pytest
import torch

from fewbits.errors import InputError
from fewbits.text import Text, read_text, windows


class Letters:
    """A tokenizer of one token per letter."""

    bos_token_id = 1
    chat_template = None

    def __call__(self, text, **options):
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(letter) for letter in text]}


def test_a_text_file_is_one_document_or_several_between_separators(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("One.\n<|endoftext|>\nTwo.\n\nStill two.\n<|endoftext|>\n")
    assert read_text(path).documents == ["One.", "Two.\n\nStill two."]


def test_jsonl_rows_hold_texts_or_messages(tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a\nb"}) + "\n\n" + json.dumps({"messages": messages}) + "\n")
    assert read_text(path).documents == ["a\nb", messages]
    assert read_text(path, limit=1).documents == ["a\nb"]


def test_the_hash_depends_on_every_document():
    assert Text("a", ["x", "y"]).sha256 != Text("a", ["xy"]).sha256
    assert Text("a", ["x", "y"]).sha256 == Text("b", ["x", "y"]).sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no text"), ("{}\n", "line 1"), ("not json\n", "line 1"), ("3\n", "line 1")],
)
def test_bad_rows_are_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_text(path)


def test_a_file_that_is_missing_or_no_text_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_text(tmp_path / "binary")


def test_windows_begin_with_bos_and_hold_every_token_once():
    pieces = windows(Text("t", ["abcdefg", "hi", ""]), Letters(), 4)
    assert [p.tolist()[0] for p in pieces] == [1, 1, 1, 1]
    assert "".join(chr(i) for p in pieces for i in p.tolist()[1:]) == "abcdefghi"
    assert max(len(p) for p in pieces) == 4


def test_without_bos_a_window_needs_two_tokens():
    tokenizer = Letters()
    tokenizer.bos_token_id = None
    pieces = windows(Text("t", ["abcde"]), tokenizer, 4)
    assert [p.tolist() for p in pieces] == [torch.tensor([97, 98, 99, 100]).tolist()]


def test_chat_messages_need_a_chat_template():
    with pytest.raises(InputError, match="no chat template"):
        windows(Text("t", [[{"role": "user", "content": "x"}]]), Letters(), 4)
