"""The numeric verifier: what is a number, which is the answer, and what earns nothing."""

import json
import pickle
import random
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgym.rewards import TextBatch
from textgym.rewards.verifiers import Numeric, numbers
from textgym.rewards.verifiers.numbers import final_number, read_number
from textgym.rewards.verifiers.numeric import gold_number

from .hostile import HOSTILE, UNFAIR

ANSWERS = [
    ("42", 42),
    ("#### 42", 42),
    ("#### 1,234,567", 1234567),
    ("#### $18.50", Fraction(37, 2)),
    ("#### -5", -5),
    ("#### \u22125", -5),
    ("#### x = 5", 5),
    ("#### 42\nI hope that this helps 7 people.", 42),
    ("#### 42\n#### 42.0", 42),
    ("#### Step 1\nadd\n#### Result\nThe answer is 9", 9),
    (r"\boxed{42}", 42),
    (r"\boxed{42} so \boxed{42.0}", 42),
    (r"$\boxed{\frac{3}{4}}$", Fraction(3, 4)),
    (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
    (r"\boxed{2\frac{1}{2}}", Fraction(5, 2)),
    (r"\boxed{x = 5}", 5),
    (r"\boxed{42 \text{ apples}}", 42),
    (r"\boxed{\text{Total: } 5}", 5),
    (r"\boxed{\$1{,}000}", 1000),
    (r"\boxed{1\,000}", 1000),
    (r"\boxed{50\%}", 50),
    (r"\boxed{1.5 \times 10^{3}}", 1500),
    ("The answer is 42.", 42),
    ("the final answer is: 3/4 cup", Fraction(3, 4)),
    ("Answer: 1 1/2 cups", Fraction(3, 2)),
    ("ANSWER: 7", 7),
    ("**Answer:**\n\n**$1,042**", 1042),
    ("The answer is 3.5. That took 2 hours.", Fraction(7, 2)),
    ("The answer to question 3 is 12", 12),
    ("The answer is 6*7 = 42.", 42),
    (r"The answer is \(7\).", 7),
    ("The answer is 60 km/h.", 60),
    ("The answer is 42 m^2.", 42),
    ("The answer is 18 dollars per day.", 18),
    ("The answer is not known yet. The answer is 5.", 5),
    ("so 9 * 2 = $18", 18),
    ("1*4 = 4", 4),
    ("He pays 1,000.", 1000),
    ("cost: .5", Fraction(1, 2)),
    ("12.", 12),
    ("-0", 0),
    ("0012", 12),
    ("1.5e3", 1500),
    ("2E-2", Fraction(1, 50)),
    ("\u20ac5", 5),
    ("-$3", -3),
    ("1\u202f000", 1000),
    ("She needs 2 1/2 cups", Fraction(5, 2)),
    ("in 2024 he had 17 apples", 17),
    ("<<9*2=18>>18 every day", 18),
    ("1/2 = 0.5", Fraction(1, 2)),
    ("9" * 200, int("9" * 200)),
]
NONE = [
    *("no", "nan", "-inf", "1e999", "1e5000", "1e-999", "0x10", "1_000", "1/0", "10^3", "2**3"),
    *("1.2.3", "12,34", "#### 1,0", "--5", "+-5", "3; 4", "1,2,3", "3..5", "3 to 4", "3\u20134"),
    *("between 3 and 4", "The answer is at least 4", "The answer is not 4", "4 < 5", "H2O", "v2"),
    *(
        "x=3 or x=4",
        "The answer is x=3, x=4",
        "The answer is {3, 4}",
        "4 = 4",
        "5 = 4",
        "x >= 4",
        "~4",
    ),
    *(r"\boxed{\frac{1}{0}}", r"\boxed4", "The answer is 4 and 5", "not 4 nor 5", "9" * 201),
    *("minus 5", "The answer is negative 5", "10 plus 5", "sqrt(5)", "√5", "The answer is √5"),
]


@pytest.mark.parametrize(("text", "value"), ANSWERS)
def test_the_answer_of_a_text(text, value):
    assert Fraction(*final_number(text)) == value


@pytest.mark.parametrize("text", NONE)
def test_a_text_without_one_number_for_an_answer(text):
    assert final_number(text) is None


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-(10**15)))
def test_decimals_are_read_exactly(number):
    for text in (f"{number}", f"{number:,f}", f"The answer is {number:,f} apples."):
        assert Fraction(*final_number(text)) == Fraction(number)


@given(st.integers(-(10**20), 10**20), st.integers(1, 10**6), st.integers(-30, 30))
def test_fractions_and_exponents_are_read_exactly(top, bottom, exponent):
    assert Fraction(*read_number(f"{top}/{bottom}")) == Fraction(top, bottom)
    # Decimal is exact here and independent.
    assert Fraction(*read_number(f"{top}e{exponent}")) == Fraction(Decimal(f"{top}e{exponent}"))


@given(st.text(max_size=60))
def test_any_text_has_a_number_or_none(text):
    for whole in (text, f"#### {text}", f"\\boxed{{{text}}}", f"the answer is {text}", f"4 {text}"):
        number = final_number(whole)
        assert number is None or (isinstance(number[0], int) and number[1] > 0)


def score(texts, answers, **options):
    rows = [{"answer": answer} for answer in answers]
    return Numeric(**options).evaluate(TextBatch.from_texts(texts, rows))


def test_gold_may_be_a_number_a_string_or_a_worked_answer():
    golds = [42, 42.0, "42", "$42", "42.", "It is 6*7=<<6*7=42>>42.\n#### 42", r"\boxed{42}"]
    assert score(["#### 42"] * 7, golds).values.tolist() == [1.0] * 7
    assert gold_number(0.1) == gold_number("0.1") == (1, 10)
    for bad in (None, True, "no number", "", float("nan"), float("inf"), ["42"], {}):
        scores = score(["#### 42"], [bad])
        assert scores.status[0].startswith("error:"), bad
        assert "in the column 'answer'" in scores.traceback or "unhashable" in scores.traceback


def test_tolerance():
    assert score(["0.333333"], ["1/3"]).values[0] == 1.0
    assert score(["0.333"], ["1/3"]).values[0] == 0.0
    assert score(["0.333"], ["1/3"], absolute=1e-3).values[0] == 1.0
    assert score(["1000001"], ["1000000"]).values[0] == 0.0
    assert score(["1000001"], ["1000000"], relative=1e-5).values[0] == 1.0
    assert score(["1000001"], ["1000000"], absolute=1.0).values[0] == 1.0
    assert score(["1e300"], ["-1e300"], absolute=1.0).values[0] == 0.0
    for bad in ({"absolute": -1.0}, {"relative": float("inf")}, {"absolute": float("nan")}):
        with pytest.raises(ValueError, match="tolerances"):
            Numeric(**bad)


@pytest.mark.parametrize("text", UNFAIR)
def test_hedges_earn_nothing(text):
    assert score([text], [4]).values[0] == 0.0
    assert score([text], [3]).values[0] == 0.0


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_have_finite_values(name):
    scores = score([HOSTILE[name]], [123454321])
    assert scores.values[0] == 0.0 and scores.status == [None]


@pytest.mark.parametrize("answer", [[42], {"a": 1}, None, b"42", True])
def test_a_column_of_no_numbers_says_what_was_expected(answer):
    reward = Numeric()
    rows = [{"answer": 1}, {"answer": answer}, {"answer": 1}]
    scores = reward.evaluate(TextBatch.from_texts(["1"] * 3, rows))
    assert scores.values[[0, 2]].tolist() == [1.0, 1.0]
    assert "expected a number, or a text that ends in one" in (scores.status[1] or "")


def test_a_missing_column_and_pickles():
    reward = Numeric("gold")
    with pytest.raises(ValueError, match="needs the column 'gold'"):
        reward.check(["golden"])
    batch = TextBatch.from_texts(["4"], [{"gold": "4"}])
    assert reward.score(batch) == [1.0]
    twin = pickle.loads(pickle.dumps(reward))
    assert twin.column == "gold" and twin.score(batch) == [1.0]


def gsm8k(shared, name):
    return [
        json.loads(line) for line in (shared / f"data/gsm8k/{name}.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize(("name", "size"), [("test", 1319), ("train", 7473)])
def test_worked_answers_of_gsm8k(shared, name, size):
    rows = gsm8k(shared, name)
    texts = [row["answer"] for row in rows]
    assert len(rows) == size
    assert Numeric().score(TextBatch.from_texts(texts, rows)) == [1.0] * size


@pytest.mark.parametrize("how", ["{}", "#### {}", "The answer is {}.", r"$\boxed{{{}}}$", "so ${}"])
def test_shuffled_answers_of_gsm8k_earn_what_is_equal_by_chance(shared, how):
    rows = gsm8k(shared, "test")
    # Independently of the verifier: what stands behind the mark, without commas, as a Decimal.
    golds = [row["answer"].rsplit("####", 1)[1].strip() for row in rows]
    exact = [Decimal(gold.replace(",", "")) for gold in golds]
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    expected = [float(exact[i] == exact[j]) for j, i in enumerate(order)]
    values = Numeric().score(TextBatch.from_texts([how.format(golds[i]) for i in order], rows))
    assert values == expected
    assert 0 < sum(expected) < 100


def test_verdicts_are_those_of_math_verify(shared):
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    golds = [row["answer"].rsplit("####", 1)[1].strip() for row in gsm8k(shared, "test")]
    rng = random.Random(1)
    pairs = [(gold, gold) for gold in rng.sample(golds, 60)]
    pairs += [(rng.choice(golds), rng.choice(golds)) for _ in range(60)]
    for how in ("{}", "#### {}", "The answer is {}.", r"$\boxed{{{}}}$"):
        texts = [how.format(mine) for mine, _ in pairs]
        theirs = [
            verify(
                parse(gold, parsing_timeout=None),
                parse(text, parsing_timeout=None),
                timeout_seconds=None,
            )
            for text, (_, gold) in zip(texts, pairs, strict=True)
        ]
        assert score(texts, [gold for _, gold in pairs]).values.tolist() == theirs


def test_plain_numbers_are_read_fast_as_they_are_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    atoms = ["18", "1,250", "3.5", "-7", "$", ".", " ", "or", "dollars", "kg", "to", "\n", "12,34"]
    atoms += ["1234567", "plus", "m", "%", "/", "x", "Times", "=", "e5"]
    texts = ["".join(rng.choices(atoms, k=rng.randint(1, 6))) for _ in range(20_000)]
    fast = [(numbers.read_number(text), numbers.final_number(text)) for text in texts]
    hits = 0

    def never(text: str) -> None:
        nonlocal hits
        hits += plain(text) is not None

    plain = numbers._plain
    monkeypatch.setattr(numbers, "_plain", never)
    for text, found in zip(texts, fast, strict=True):
        slow = numbers.read_number(text), numbers.final_number(text)
        for a, b in zip(found, slow, strict=True):
            assert (a is None) == (b is None) and (a is None or numbers.equal(a, b)), text
    assert hits > 1000
