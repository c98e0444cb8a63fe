"""The mathematics verifier: math-verify in a pool, and the answers that it should not pay for."""

import json
import logging
import pickle
import random
import threading

import pytest

from textgym.rewards import TextBatch, TextFailure
from textgym.rewards.verifiers import Math
from textgym.rewards.verifiers.base import as_item
from textgym.sandbox.pool import Verdict

from .hostile import HOSTILE, UNFAIR

math_verify = pytest.importorskip("math_verify")

# A small budget, because hostile texts use all of it.
LIMITS = {"cpu_seconds": 0.2, "memory_mb": 1024}
STATUSES = {None, *(f"text: {s}" for s in ("too long", "timeout", "memory", "recursion", "crash"))}


def evaluate(pairs, **options):
    rows = [{"answer": gold} for _, gold in pairs]
    return Math(**LIMITS, **options).evaluate(TextBatch.from_texts([t for t, _ in pairs], rows))


EQUAL = [
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{2}{4}"),
    (r"\boxed{0.5}", 0.5),
    (r"\boxed{0.3333333}", r"\boxed{\frac{1}{3}}"),
    (r"The answer is $\sqrt{8}$.", r"2\sqrt{2}"),
    (r"#### \frac{1}{3}", r"$\frac{1}{3}$"),
    (r"So $x = 3$", "3"),
    ("Therefore it is 7.", "7"),
    (r"\boxed{x^2 + 2x + 1}", "(x+1)^2"),
    (r"\boxed{2,1}", r"\{1,2\}"),
    (r"\boxed{x=1 \text{ or } x=2}", r"x=1 \text{ or } x=2"),
    (r"\boxed{[1,2)}", "[1,2)"),
    (r"\boxed{2+2=4}", "4"),
    (r"\boxed{y=x=4}", "4"),
    (r"\boxed{\frac{1}{2}}, that is \boxed{0.5}", r"\frac12"),
    (r"\boxed{50\%}", r"\frac12"),
    ("The answer is 1,000.", "1000"),
    ("#### 18", "9 * 2 = 18\n#### 18"),
    (r"\boxed{\frac{10}{2}}", r"\$5"),
]
DIFFERENT = [
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}"),
    (r"\boxed{2+2=5}", "5"),
    (r"\boxed{2+3=4}", "4"),
    (r"\boxed{(1,2)}", "[1,2]"),
    (r"\boxed{\mathbb{R}}", "[1,2]"),
    (r"\boxed{1,2,3}", r"\{1,2\}"),
    (r"\boxed{x>3}", "x>4"),
    (r"\boxed{x^2}", "x^3"),
    (r"\boxed{2x}", "2"),
    (r"\boxed{2x}", "x=2"),
    (r"\boxed{\frac{0}{0}}", "1"),
    (r"\boxed{\infty}", "1"),
    (r"\boxed{.5}", "5"),
    (r"\boxed{2.5+2.5=.5}", "5"),
    (r"\boxed{\sqrt{2}}", r"\$5"),
    ("I do not know", r"\frac12"),
]


def test_equal_and_different():
    equal, different = evaluate(EQUAL), evaluate(DIFFERENT)
    assert dict(zip(EQUAL, equal.values, strict=True)) == dict.fromkeys(EQUAL, 1.0)
    assert dict(zip(DIFFERENT, different.values, strict=True)) == dict.fromkeys(DIFFERENT, 0.0)
    assert set(equal.status + different.status) == {None}


def test_hedges_earn_nothing():
    for gold in ("4", "3", r"\frac{8}{2}"):
        values = evaluate([(text, gold) for text in UNFAIR]).values
        assert dict(zip(UNFAIR, values, strict=True)) == dict.fromkeys(UNFAIR, 0.0)


def test_hostile_texts_and_sixty_honest_ones_in_one_batch():
    rng = random.Random(0)
    honest = []
    for _ in range(60):
        top, bottom = rng.randrange(1, 30), rng.randrange(2, 30)
        times = rng.randrange(1, 4)
        honest.append((rf"\boxed{{\frac{{{top * times}}}{{{bottom * times}}}}}", f"{top}/{bottom}"))
    mixed = list(honest)
    for text in HOSTILE.values():
        mixed.insert(rng.randrange(len(mixed)), (text, r"\frac{355}{113}"))
    scores = evaluate(mixed)
    values = dict(zip(mixed, scores.values, strict=True))
    assert [values[pair] for pair in honest] == [1.0] * 60
    assert sum(values.values()) == len(set(honest))
    assert set(scores.status) <= STATUSES
    assert "text: timeout" in scores.status and "text: too long" in scores.status


def test_hostile_texts_against_right_answers_of_their_kind():
    golds = {
        "expansion": r"\boxed{(f+e+d+c+b+a)^{60}+1}",
        "trigonometry": r"\boxed{\sin(x)}",
        "equation": r"\boxed{x^{9}-x^{7}+3x^{2}-\sin(x)=e^{x}+1}",
        "intervals": r"\boxed{\mathbb{R}}",
        "set": r"\boxed{\{" + ",".join(map(str, range(2999, -1, -1))) + r"\}}",
        "matrix": r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}",
        "tower": r"9^{9^{9}}",
    }
    scores = evaluate([(HOSTILE[name], gold) for name, gold in golds.items()])
    assert set(scores.status) <= STATUSES
    assert set(scores.values) <= {0.0, 1.0}
    assert scores.values[3] == 1.0  # they are all of the real numbers


def test_verdicts_are_those_of_math_verify_where_nothing_is_hedged(shared):
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    lines = (shared / "data/gsm8k/test.jsonl").read_text().splitlines()
    golds = [json.loads(line)["answer"].rsplit("####", 1)[1].strip() for line in lines]
    rng = random.Random(2)
    formulas = [r"\frac{1}{2}", r"\sqrt{2}", "x+1", "2x", "[0,1]", r"\{1,2\}", "x=2", r"\pi", "0.5"]
    pairs = [(rf"\boxed{{{rng.choice(golds)}}}", rng.choice(golds)) for _ in range(20)]
    pairs += [(rf"\boxed{{{mine}}}", gold) for mine in formulas for gold in formulas]
    theirs = [
        math_verify.verify(
            math_verify.parse(rf"\boxed{{{gold}}}", parsing_timeout=None),
            math_verify.parse(text, parsing_timeout=None),
            timeout_seconds=None,
        )
        for text, gold in pairs
    ]
    assert evaluate(pairs).values.tolist() == theirs


def test_it_works_in_a_thread_where_math_verify_alone_does_not():
    found = []
    thread = threading.Thread(target=lambda: found.append(evaluate([(r"\boxed{\pi}", r"\pi")])))
    thread.start()
    thread.join()
    assert found[0].values[0] == 1.0


def test_a_right_answer_that_cannot_be_read_is_nobodys_low_score():
    scores = evaluate([(r"\boxed{\pi}", ""), (r"\boxed{\pi}", None), (r"\boxed{\pi}", r"\pi")])
    assert [s is None for s in scores.status] == [False, False, True]
    assert "expected a number or LaTeX in the column 'answer'" in scores.status[0]
    assert "got nan" in evaluate([("0", float("nan"))]).status[0]
    unread = evaluate([(r"\boxed{\pi}", r"\boxed{}")])
    assert "cannot read the right answer" in unread.status[0] and unread.values[0] != 0.0


def test_pickles_and_missing_packages(monkeypatch):
    reward = pickle.loads(pickle.dumps(Math(**LIMITS)))
    assert reward.score(TextBatch.from_texts([r"\boxed{\pi}"], [{"answer": r"\pi"}])) == [1.0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "textgym\[verify\]"'):
        Math()


def test_what_the_pool_says_and_whose_fault_it_is():
    assert as_item(Verdict(0.5, "ok")) == 0.5
    for status in ("timeout", "memory", "recursion", "crash", "killed", "unparsable"):
        item = as_item(Verdict(None, status))
        assert isinstance(item, TextFailure) and str(item) == status
    assert type(as_item(Verdict(None, "error: ValueError: boom"))) is RuntimeError


def test_examples():
    reward = Math(**LIMITS)
    for example in reward.examples():
        value = reward.score(TextBatch.from_texts([example.text], [example.row]))[0]
        assert value == example.value
