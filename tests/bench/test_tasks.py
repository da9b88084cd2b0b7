"""Tasks: items that are the same every time, splits that share nothing, answers judged, and code that does harm."""

import json
import sys
import types

import pytest

from vllm_entropix.bench.confined import Ended, run_python
from vllm_entropix.bench.grading import Grader
from vllm_entropix.bench.tasks import KINDS
from vllm_entropix.bench.tasks.base import Graded, Item, NoOptions, Task
from vllm_entropix.bench.tasks.functions import Functions, functions
from vllm_entropix.settings.errors import ConfigError


def task(kind, **options):
    return KINDS[kind](KINDS[kind].Options.model_validate(options))


WITHOUT_FILES = ("arithmetic", "word_problems", "capitals", "animals", "python_functions", "open_prompts")


@pytest.mark.parametrize("kind", WITHOUT_FILES)
def test_items_follow_from_the_seed(kind):
    items = task(kind).items(20, "seed")
    assert items == task(kind).items(20, "seed") != task(kind).items(20, "another")
    assert len({item.id for item in items}) == len({item.question for item in items}) == 20
    assert task(kind).items(10, "seed") == items[:10]


@pytest.mark.parametrize("kind", ["capitals", "python_functions"])
def test_more_items_than_there_are_is_one_sentence(kind):
    with pytest.raises(ConfigError, match=r"has \d+ items, but the study asks for 5000 of them; ask for fewer"):
        task(kind).items(5000, "seed")
    with pytest.raises(ConfigError, match="makes 4 different items"):
        task("arithmetic", terms=[2, 2], largest=3, operations="+").items(50, "seed")


def test_arithmetic_is_right():
    for item in task("arithmetic", terms=[2, 5]).items(200, "seed"):
        sum_ = item.question.removeprefix("What is ").partition("?")[0]
        assert eval(sum_) == int(item.expected)


def test_word_problems_by_hand():
    found = {item.question: item.expected for item in task("word_problems").items(300, "seed")}
    for question, expected in found.items():
        if "gives" in question:
            words = question.split()
            assert int(expected) == int(words[2]) - int(words[6])
            break
    assert all(int(expected) >= 0 for expected in found.values())


def test_gsm8k_and_svamp_are_read_as_published(tmp_path):
    lines = [{"question": f"How many is {n}?", "answer": f"It is <<{n}={n}>>\n#### {n},000"} for n in range(1, 4)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    items = task("gsm8k", path=tmp_path / "test.jsonl").items(3, "seed")
    assert {item.id: item.expected for item in items} == {"0000": "1000", "0001": "2000", "0002": "3000"}
    entries = [{"Body": "There are 3 cats.", "Question": "How many?", "Answer": 3.0}]
    (tmp_path / "SVAMP.json").write_text(json.dumps(entries))
    [item] = task("svamp", path=tmp_path / "SVAMP.json").items(1, "seed")
    assert item.question.startswith("There are 3 cats. How many? ")
    assert task("svamp", path=tmp_path / "SVAMP.json").grade(item, "Answer: 3") == Graded("3", True)


@pytest.mark.parametrize("kind", ["gsm8k", "svamp"])
def test_a_file_that_is_missing_or_another_says_where_it_is_published(kind, tmp_path):
    with pytest.raises(ConfigError, match=r"No such file.*get the file .* of https://github.com/"):
        task(kind, path=tmp_path / "none").items(1, "seed")
    (tmp_path / "other").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match=r"it should be .* of https://github.com/"):
        task(kind, path=tmp_path / "other").items(1, "seed")


@pytest.mark.parametrize(
    ("kind", "text", "correct"),
    [("capitals", "It is {}.", True), ("capitals", "Atlantis", False), ("animals", "A {}, of course", True)],
)
def test_names_are_judged(kind, text, correct):
    item = task(kind).items(1, "seed")[0]
    assert task(kind).grade(item, text.format(item.expected)).correct is correct


# Word for word, by SmolLM2-135M-Instruct.
WRITTEN = [
    ("arithmetic", "36", "4 * 9 = 36\n\nThe answer is 36.", "36"),
    ("word_problems", "20", "Ben has 30 stickers - 10 stickers = 20 stickers left.\n\nThe answer is 20.", "20"),
    ("word_problems", "20", "wer: 2 + 20 = Ben's total number of stickers = 2 + 2 = 4\n\n4. To end it out, we'll use", "4"),
    ("arithmetic", "11", "Step 2: 2 + 3 = 5\n\nStep 3: 5 + 6 = 11\n\nThe answer is 11.", "11"),
    ("capitals", "Kathmandu", "The capital of Nepal is Kathmandu.", "Kathmandu"),
    (
        "capitals",
        "Kathmandu",
        "The capital of Nepal is Heraklati, a bustling metropolis perched on the eastern side of Nepal's",
        None,
    ),
    ("animals", "insect", "The bee belongs to the class Insecta.", "insect"),
    (
        "animals",
        "insect",
        "of the bee based on the animal classification of the animal is the Animalia class and it is a class",
        None,
    ),
]


@pytest.mark.parametrize(("kind", "expected", "text", "answer"), WRITTEN)
def test_answers_as_a_model_wrote_them(kind, expected, text, answer):
    assert task(kind).grade(Item("0", "?", expected), text) == Graded(answer, answer == expected)


def test_every_animal_and_country_is_asked_once():
    for kind, least in (("capitals", 90), ("animals", 150)):
        universe = task(kind).items(least, "seed")
        assert len({item.id for item in universe}) == least


def test_families_of_reasoning_gym_judge_themselves(monkeypatch):
    """The package isn't required: it brings matplotlib and a compiled solver. A family like its own stands in."""

    class Family(list):
        def score_answer(self, answer, entry):
            return 1.0 if answer == entry["answer"] else 0.01

    def create_dataset(name, size, seed, **parameters):
        if name != "chain_sum":
            raise ValueError(f"Dataset '{name}' not registered")
        return Family({"question": f"{n} + {seed}", "answer": str(n + seed), "metadata": parameters} for n in range(size))

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset))
    gym = task("reasoning_gym", family="chain_sum", parameters={"min_terms": 2})
    items = gym.items(3, "seed")
    assert items == gym.items(3, "seed")
    assert items[0].expected["metadata"] == {"min_terms": 2}
    assert gym.grade(items[1], f"So ...\nAnswer: {items[1].expected['answer']}.") == Graded(items[1].expected["answer"], True)
    assert gym.grade(items[1], "Answer: none") == Graded("none", False)
    with pytest.raises(ConfigError, match="can't make the family 'poetry': Dataset 'poetry' not registered"):
        task("reasoning_gym", family="poetry").items(1, "seed")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match="pip install reasoning-gym"):
        gym.items(1, "seed")


# --- functions --------------------------------------------------------------------------------------------------------

RIGHT = {
    "gcd": "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a",
    "roman": """def roman(n):
    pairs = [(1000, 'M'), (900, 'CM'), (500, 'D'), (400, 'CD'), (100, 'C'), (90, 'XC'), (50, 'L'), (40, 'XL'), (10, 'X'),
             (9, 'IX'), (5, 'V'), (4, 'IV'), (1, 'I')]
    text = ''
    for value, sign in pairs:
        text += sign * (n // value)
        n %= value
    return text""",
    "count_words": "import collections\ndef count_words(text):\n    return dict(collections.Counter(text.split()))",
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_functions_are_right(name):
    task = Functions(NoOptions())
    item = next(item for item in task.items(len(functions()), "seed") if item.id == name)
    assert task.grade(item, f"```python\n{RIGHT[name]}\n```").correct
    assert not task.grade(item, f"```python\ndef {name}(*all):\n    return 17\n```").correct


def test_examples_of_all_functions_can_be_run():
    # A function that returns nothing fails each, by an AssertionError or a TypeError and not by a mistake of the example's.
    for one in functions()[::6]:
        name, conditions = one["signature"].partition("(")[0], one["conditions"]
        ended = run_python(f"def {name}(*all):\n    return None\n" + "\n".join(f"assert {one}" for one in conditions))
        assert not ended.succeeded
        assert ended.problem.startswith(("AssertionError", "TypeError")), (name, ended)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("while True: pass", "longer"),
        ("x = [0] * (1 << 30)", "MemoryError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "can't be used here"),
        ("open('x', 'w')", "can't be written"),
        ("import os\nos.remove('/nothing')", "can't be used here"),
        ("import subprocess\nsubprocess.run(['true'])", "can't be used here"),
        ("import os\nos.fork()", "can't be used here"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "status 0"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", ""),
        ("raise ValueError('\\ud800')", ""),
    ],
)
def test_what_does_harm_ends_and_is_wrong(source, problem):
    ended = run_python(source, seconds=2)
    assert not ended.succeeded
    assert problem in ended.problem
    assert len(ended.problem) <= 200


def test_a_process_that_used_up_its_own_time_took_too_long():
    assert run_python("while True: pass", seconds=60) == Ended(False, "took longer than 5 s")


def test_harmless_source_runs():
    source = (
        "import math, random, itertools, collections, re, json, datetime, functools\nassert math.gcd(4, 6) == 2\nprint('x')"
    )
    assert run_python(source) == Ended(True)


# --- grading ----------------------------------------------------------------------------------------------------------


class Odd(Task[NoOptions]):
    """Judges by sleeping, by failing or by dying, as the answer says."""

    kind = "odd"
    rule = "none"

    def items(self, count, seed):
        return [Item("0", "?")]

    def grade(self, item, text):
        exec(text)
        return Graded(text, True)


def test_an_answer_that_hangs_or_kills_its_checker_is_wrong_and_the_next_is_judged():
    [item] = Odd(NoOptions()).items(1, "")
    with Grader({"odd": Odd(NoOptions())}, seconds=60) as grader:
        assert grader.grade("odd", item, "pass").correct
        assert grader.grade("odd", item, "import os; os._exit(1)") == Graded(None, False, "judging ended its process")
        assert grader.grade("odd", item, "1 / 0").note == "judging failed: ZeroDivisionError: division by zero"
        grader._seconds = 1.5
        assert grader.grade("odd", item, "while True: pass") == Graded(None, False, "judging took longer than 1.5 s")
        grader._seconds = 60
        assert grader.grade("odd", item, "pass").correct
