"""Answers out of texts as models write them."""

import time
from decimal import Decimal

import pytest

from vllm_entropix.bench.extract import code, last_line, named, number

CITIES = {"canberra": "Canberra", "sydney": "Sydney", "bogota": "Bogota", "delhi": "New Delhi", "new delhi": "New Delhi"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", "42"),
        ("The sum is 42.", "42"),
        ("3 + 4 = 7", "7"),
        ("Answer: 7", "7"),
        ("**Answer:** 7", "7"),
        ("Answer: 3 + 4 = 7", "7"),
        ("Answer: 2 * (3 + 4) = 2 * 7 = 14 apples", "14"),
        ("The answer to 3 + 4 is 7.", "7"),
        ("The answer is 8, since 16 / 2 = 8 and 3 are gone", "8"),
        ("My first answer: 5\nNo. Answer: 6", "6"),
        ("12 - 5 = 7. That is the answer.", "7"),
        ("#### 1,234", "1234"),
        ("so $1,234.50 in all", "1234.50"),
        (r"\boxed{-3}", "-3"),
        (r"Thus \boxed{1{,}000} of 5", "1000"),
        ("\u22125", "-5"),
        ("12-5", "5"),
        ("x = -5", "-5"),
        ("It costs $5.", "5"),
        ("1, 2, 3", "3"),
        ("75%", "75"),
        ("7.0", "7"),
        ("007", "7"),
        ("Answer:\n\n15", "15"),
        ("Answer: none, I think 15 or 16", "15"),
        ("10 kg of apples, i.e. 20 lb.", "20"),
    ],
)
def test_the_number_that_is_meant(text, expected):
    assert number(text) == Decimal(expected)


@pytest.mark.parametrize("text", ["", "no idea", "Answer:", "####", "9" * 5000, "-", ".", "$"])
def test_where_there_is_no_number(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Canberra", "Canberra"),
        ("The capital of Australia is **Canberra**.", "Canberra"),
        ("CANBERRA!", "Canberra"),
        ("Not Sydney, but Canberra.", "Canberra"),
        ("It isn't Sydney but Canberra", "Canberra"),
        ("It isn\u2019t Sydney but Canberra", "Canberra"),
        ("Sydney is large. Answer: Canberra", "Canberra"),
        ("Canberra is my answer.", "Canberra"),
        ("Bogotá", "Bogota"),
        ("New Delhi", "New Delhi"),
        ("Delhi", "New Delhi"),
        ("Sydneysiders live elsewhere", None),
        ("", None),
    ],
)
def test_the_first_name_that_is_meant(text, expected):
    assert named(text, CITIES) == expected


BODY = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    "text",
    [
        BODY,
        f"```python\n{BODY}\n```",
        f"Here you are:\n\n```\n{BODY}\n```\nIt adds.",
        f"```python\n{BODY}",  # cut by the limit
        f"```bash\npip install x\n```\n```python\n{BODY}\n```",
        f"Sure!\n{BODY}\n\nThis function adds two numbers.",
        f"{BODY}\n\nprint(add(1, 2)",
        f"```python\n{BODY}\n\nprint(add(1, 'a'))\n```",
        "1. Define it:\n\n    ```python\n    def add(a, b):\n        return a + b\n    ```",
    ],
)
def test_the_function_that_is_meant(text):
    found = code(text, "add")
    assert found is not None
    assert found.startswith(BODY)
    compile(found, "answer", "exec")
    assert "print" not in found


@pytest.mark.parametrize("text", ["", "def subtract(a, b):\n    return a - b", "I can't.", "```python\nimport os\n```"])
def test_where_there_is_no_function(text):
    assert code(text, "add") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer> a, b </answer> more", "a, b"),
        ("Thinking ...\nAnswer: **[1, 2]**.", "[1, 2]"),
        ("The answer is blue", "blue"),
        ("one\ntwo\n\n", "two"),
        ("Answer:\nblue", "blue"),
        ("", None),
    ],
)
def test_the_line_that_is_meant(text, expected):
    assert last_line(text) == expected


LONG = ["1" * 200_000, "1," * 100_000, "answer is " * 30_000, "-" * 200_000, "(1+" * 60_000, "a=" * 90_000]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_a_text_without_end_takes_no_time(text):
    start = time.perf_counter()
    number(text)
    named(text, CITIES)
    last_line(text)
    code(text, "add")
    assert time.perf_counter() - start < 2
