"""Published files become examples; what is no such file is one sentence with file and line."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest

from common.errors import UserError
from pretrain.evaluation.cbt import detokenized
from pretrain.evaluation.examples import limited
from pretrain.evaluation.files import json_lines
from pretrain.evaluation.likelihood import Limits
from pretrain.evaluation.results import notes_of
from pretrain.evaluation.tasks import TASKS, TaskResult
from pretrain.evaluation.training import RunTasks
from tests.pretrain.evaluation import published


def test_the_last_word_of_lambada_is_what_follows_the_last_blank(tmp_path: Path) -> None:
    path = published.lambada(tmp_path)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    for place in (path, tmp_path, tmp_path / "packed.jsonl.gz"):
        examples = TASKS["lambada"].read(place).examples
        assert [example.context + example.targets[0] for example in examples] == texts
        assert [example.targets for example in examples] == [(" " + text.split(" ")[-1],) for text in texts]
    assert examples[1].targets == (' "Stone',)


def test_blimp_is_one_group_for_each_file(tmp_path: Path) -> None:
    place = published.blimp(tmp_path)
    examples = TASKS["blimp"].read(place).examples
    assert [sum(e.group == name for e in examples) for name in published.SETS] == [5, 6, 7]
    rows = [json.loads(line) for name in sorted(published.SETS) for line in (place / "data" / f"{name}.jsonl").open()]
    assert [e.targets for e in examples] == [(row["sentence_good"], row["sentence_bad"]) for row in rows]
    assert {e.context for e in examples} == {""}
    assert len(limited(examples, 2)) == 6 and limited(examples, None) == examples


def test_a_mean_over_some_of_the_published_files_says_so() -> None:
    def notes(task: str, *groups: str) -> list[str]:
        return notes_of(
            TaskResult(task, {"accuracy": 0.5}, {group: {"accuracy": 0.5} for group in groups}, 9, 0, 0), 16
        )

    (note,) = notes("blimp", *published.SETS)
    assert note.startswith("blimp: the mean is over 3 of the 67 published files")
    assert notes("cbt", "NE", "V")[0].startswith("cbt: the mean is over 2 of the 4 published files")
    assert not notes("blimp", *published.ALL_SETS) and not notes("cbt", "NE", "CN", "V", "P") and not notes("lambada")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "one"}\n\n{"text": "\ufefftwo"}\r\n'.encode())
    assert list(json_lines(path, ("text",))) == [(1, {"text": "one"}), (3, {"text": "\ufefftwo"})]


def test_a_run_that_stops_records_no_task_of_a_step_whose_tasks_are_not_all_there() -> None:
    found = TaskResult("lambada", {"accuracy": 0.5}, {}, 9, 0, 0)
    whole, stopped = (Mock(evaluate=Mock(return_value=one)) for one in (found, None))
    for tasks, recorded in (((whole, whole), 2), ((whole, stopped), 0), ((stopped, whole), 0)):
        monitor = Mock()
        RunTasks(tasks, 1, Limits(1, 1)).evaluate(Mock(), Mock(), monitor, 4, lambda done: False)
        assert monitor.evaluation.call_count == recorded


def test_a_question_of_cbt_is_the_page_before_and_ten_ends(tmp_path: Path) -> None:
    place = published.cbt(tmp_path)
    found = TASKS["cbt"].read(place)
    counts = [sum(e.group == kind for e in found.examples) for kind in ("CN", "NE", "P", "V")]
    assert found.left_out == 4 and counts == [3] * 4
    lines = (place / "data" / "cbtest_CN_test_2500ex.txt").read_text().splitlines()
    sentences = [line.split(" ", 1)[1] for line in lines[:20]]
    question, answer, _, candidates = lines[20].split(" ", 1)[1].split("\t")
    example = found.examples[0]
    assert example.place.endswith("line 21") and example.targets[0].startswith(answer + ", ")
    plain = [s.replace("`` ", '"').replace(" , ''", ',"').replace(" n't", "n't").replace(" .", ".") for s in sentences]
    assert example.context == " ".join(plain) + " " + question.partition("XXXXX")[0]
    assert sorted(t.partition(",")[0] for t in example.targets) == sorted(candidates.split("|"))
    assert detokenized("`` It 's , '' he did n't say ; `` no : why ? ! ''") == '"It\'s," he didn\'t say; "no: why?!"'


def refused(name: str, place: Path, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        TASKS[name].read(place)
    assert "\n" not in str(error.value) and str(place) in str(error.value)


def test_refusals(tmp_path: Path) -> None:
    def written(name: str, text: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    for name in TASKS:
        refused(name, tmp_path / "gone", r"there is no .*gone; download")
        (tmp_path / name).mkdir()
        refused(name, tmp_path / name, r"holds no file .*; name the folder of")
    good = '{"text": "A river runs"}\n'
    refused("lambada", written("a.jsonl", good + "word\n"), "a.jsonl line 2: is not JSON")
    refused("lambada", written("b.jsonl", good + '{"words": "a b"}\n'), "b.jsonl line 2: has no text 'text'")
    refused("lambada", written("c.jsonl", good + "\n" + '{"text": "one"}'), "c.jsonl line 3: the text ends in no word")
    refused("lambada", written("d.jsonl", '{"text": "two "}\n'), "d.jsonl line 1: the text ends in no word")
    refused("lambada", written("e.jsonl", good.encode() + b"\xff\n"), "e.jsonl line 2: is no text in UTF-8")
    refused("lambada", written("f.jsonl.gz", gzip.compress(good.encode())[:-9]), "f.jsonl.gz: is a damaged gzip file")
    refused("lambada", written("g.jsonl.gz", good), "g.jsonl.gz: is a damaged gzip file")
    refused("lambada", written("h.jsonl", ""), "h.jsonl: holds no line")
    refused("blimp", written("i.jsonl", '{"sentence_good": "A"}\n'), "i.jsonl line 1: has no text 'sentence_bad'")
    lines = (published.cbt(tmp_path) / "data" / "cbtest_V_test_2500ex.txt").read_text().splitlines()
    for number, (content, words) in enumerate(
        {
            "\n".join(lines[:20]): "line 20: the question ends after 20 lines; it has 21",
            "\n".join([*lines[:3], *lines[4:]]): "line 4: does not begin with 4",
            "\n".join([*lines[:21], *lines[22:]]): "line 22: does not begin with 22",
            "\n".join([*lines[:20], lines[20].replace("\t", " ")]): "line 21: is not a question with XXXXX, a tab",
            "\n".join(line.replace("XXXXX", "word") for line in lines): "line 21: is not a question with XXXXX",
            "": "holds no question",
        }.items()
    ):
        refused("cbt", written(f"cbtest_V_test_{number}.txt", content), re.escape(words))
    refused("cbt", written("other.txt", "\n".join(lines)), "other.txt: its name does not say the kind of word")
