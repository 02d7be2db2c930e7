"""Prompt files in three forms, with lines that are broken."""

from pathlib import Path

import pytest

from mfd_fast.data.prompt_file import LONGEST, Broken, read_prompts


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_the_released_layout(tmp_path: Path) -> None:
    lines = ["1.jpg\ta red cat\t5.2\tx", "no columns", "2.jpg\tthe moon\tgood\tx", "", "3.jpg\t rain \t-1e3\tx\ty\r"]
    found = read_prompts(file(tmp_path, "a.tsv", "\n".join(lines)))
    assert found.prompts == ["a red cat", "rain"]
    assert [line for line, _ in found.broken] == [2, 3]
    assert "got 'good'" in found.broken[1].reason


def test_a_first_line_may_name_the_column(tmp_path: Path) -> None:
    found = read_prompts(file(tmp_path, "a.tsv", "\ufeffid\tCaption\n1\ta cat\n2\n3\train\tmore\n"))
    assert found.prompts == ["a cat", "rain"]
    assert found.broken == [Broken(3, "1 columns, the prompt is in column 2")]


def test_json_lines(tmp_path: Path) -> None:
    lines = ['"a cat"', '{"prompt": "rain", "id": 3}', '{"text": "moon"}', '{"id": 3}', "[1]", "{", '{"prompt": 3}']
    found = read_prompts(file(tmp_path, "a.jsonl", "\n".join([*lines, '"\\ud800"', "[" * 100_000])))
    assert found.prompts == ["a cat", "rain", "moon"]
    assert [line for line, _ in found.broken] == [4, 5, 6, 7, 8, 9]


def test_text(tmp_path: Path) -> None:
    content = b"a cat\r\n\n  rain\n\xff\xfe\nx\0y\n" + b"a" * (LONGEST + 1) + b"\n"
    found = read_prompts(file(tmp_path, "a.txt", content))
    assert found.prompts == ["a cat", "rain"]
    assert [line for line, _ in found.broken] == [4, 5, 6]
    assert found.broken[0].reason == "not UTF-8"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "x", r"must end in \.tsv, \.jsonl, \.txt"),
        ("a.txt", "\n\n", r"holds no prompt \(0 broken lines\)"),
        ("a.jsonl", "{\n", r"holds no prompt \(1 broken lines, first 1: not valid JSON\)"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_prompts(file(tmp_path, name, content))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        read_prompts(tmp_path / "a.txt")
