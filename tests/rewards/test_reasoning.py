"""reasoning-gym as prompts and rewards; its scorers run what they are given, ours do not."""

import contextlib
import pickle
import random

import numpy as np
import pytest

from textgym.rewards import TextBatch, reasoning_guard
from textgym.rewards.reasoning import answer_of, reasoning_gym_task
from textgym.rewards.reasoning_guard import is_arithmetic

reasoning_gym = pytest.importorskip(
    "reasoning_gym", reason='needs pip install "textgym[reasoning]"'
)


def oracle(prompts, wrap="<answer>{}</answer>"):
    return TextBatch.from_texts([wrap.format(row["answer"]) for row in prompts], list(prompts))


def test_a_reasoning_gym_dataset_is_prompts_and_a_reward():
    prompts, reward = reasoning_gym_task(
        "chain_sum", size=5, seed=3, template="Q: {question}\nA:", max_terms=3, max_digits=2
    )
    theirs = reasoning_gym.create_dataset("chain_sum", size=5, seed=3, max_terms=3, max_digits=2)
    assert [row["prompt"] for row in prompts] == [f"Q: {e['question']}\nA:" for e in theirs]
    assert [row["answer"] for row in prompts] == [e["answer"] for e in theirs]
    assert reward.name == "chain_sum"
    reward.check(prompts.columns)
    assert reward.evaluate(oracle(prompts), strict=True).values.tolist() == [1.0] * 5
    train, heldout = prompts.split(2)
    assert reward.evaluate(oracle(heldout), strict=True).values.tolist() == [1.0] * 2
    # What the library pays for these is what we pay.
    texts = ["-1", "the answer is 12", " 007 ", "x" * 50, "1e999999"]
    batch = TextBatch.from_texts(texts, list(prompts))
    want = [theirs.score_answer(t.strip(), e) for t, e in zip(texts, theirs, strict=True)]
    assert reward.evaluate(batch, strict=True).values.tolist() == want
    assert len(train) == 3 and pickle.loads(pickle.dumps(reward)).name == "chain_sum"
    assert [example.value for example in reward.examples()] == [1.0, 1.0, 1.0, 0.0]
    for example in reward.examples():
        scores = reward.evaluate(TextBatch.from_texts([example.text], [example.row]))
        assert scores.values.tolist() == [example.value]


def test_entries_that_are_no_plain_data_are_made_again_in_the_worker():
    prompts, reward = reasoning_gym_task("knights_knaves", size=3, seed=1)
    assert "'index': 2" in prompts[2]["entry"]
    assert reward.evaluate(oracle(prompts), strict=True).values.tolist() == [1.0] * 3
    forged = {**prompts[0], "entry": repr({"index": 0, "question": "another"})}
    scores = reward.evaluate(TextBatch.from_texts(["x"], [forged]))
    assert "another entry 0" in scores.status[0]


def test_an_answer_at_which_the_scorer_fails_gets_the_worst():
    prompts, reward = reasoning_gym_task("prime_factorization", size=1, seed=0)
    texts = ["garbage", f"<answer>{prompts[0]['answer']}</answer>", "9" * 20_001, ""]
    scores = reward.evaluate(TextBatch.from_texts(texts, [prompts[0]] * 4))
    assert scores.values.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert scores.status == ["text: scorer: ValueError", None, "text: too long", None]


def test_what_is_no_number_is_as_good_as_none():
    prompts, reward = reasoning_gym_task("complex_arithmetic", size=1, seed=1)
    texts = ["nan", "NaN+NaNi", "-nanj", "<answer> nan </answer>", str(prompts[0]["answer"])]
    scores = reward.evaluate(TextBatch.from_texts(texts, [prompts[0]] * len(texts)))
    assert scores.values.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_where_the_answer_is():
    for text, either, tag in [
        ("<answer> 4 </answer>", "4", "4"),
        ("<answer>3</answer> no, <answer>4</answer> done", "4", "4"),
        ("<answer>3<answer>4</answer>", "4", "4"),
        (" 4\n", "4", None),
        ("<answer>4", "<answer>4", None),
        ("4</answer>", "4</answer>", None),
        ("</answer><answer>", "</answer><answer>", None),
        ("<answer>4</answer><answer>", "4", "4"),
        ("", "", None),
    ]:
        assert answer_of(text, "either") == either and answer_of(text, "tag") == tag
        assert answer_of(text, "text") == text.strip()


def test_the_global_generators_are_left_alone():
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    reasoning_gym_task("pool_matrix", size=2)  # it seeds NumPy's
    assert (random.random(), np.random.random()) == expected


def test_a_task_that_is_not_reproducible_says_so(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.warns(UserWarning, match="'ransom_note' depend on Python's hash seed"):
        reasoning_gym_task("ransom_note", size=1)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    reasoning_gym_task("ransom_note", size=1)


def test_wrong_tasks_are_refused():
    for arguments, error, says in [
        ({"name": "chain_sums"}, ValueError, "mean 'chain_sum'"),
        ({"name": "composite"}, ValueError, "no dataset 'composite'"),
        ({"name": "chain_sum", "template": "{q}"}, ValueError, "must hold"),
        ({"name": "chain_sum", "answer_in": "box"}, ValueError, "answer_in"),
        ({"name": "chain_sum", "max_term": 3}, TypeError, "max_term"),
        ({"name": "chain_sum", "min_terms": object()}, TypeError, "knobs of 'chain_sum'"),
    ]:
        with pytest.raises(error, match=says):
            reasoning_gym_task(**{"size": 1, **arguments})


CODE = "[__import__('os').mkdir({path!r})]"
EVALUATED = [
    *["binary_matrix", "spiral_matrix", "string_insertion", "n_queens", "countdown", "puzzle24"],
    *["simple_integration", "intermediate_integration"],
]


@pytest.mark.parametrize("name", EVALUATED)
def test_an_answer_is_never_run(name, tmp_path):
    prompts, reward = reasoning_gym_task(name, size=2, seed=4)
    theirs = reasoning_gym.create_dataset(name, size=2, seed=4)
    path = tmp_path / "made by an answer"
    code = CODE.format(path=str(path))
    quoting = ["entry['answer']", "oracle_answer", "[entry['answer']]", "list(oracle_answer)"]
    hostile = TextBatch.from_texts([code, code[1:-1], *quoting], [prompts[0]] * 6)
    scores = reward.evaluate(hostile, strict=True)
    assert max(scores.values) <= 0.01  # what countdown and puzzle24 pay for anything
    assert not path.exists()
    # In the library the same answer runs.
    with contextlib.suppress(Exception):
        theirs.score_answer(code[1:-1] if "[" not in name else code, theirs[0])
    assert path.exists()
    # Honest answers, and lists where a text was due, get what the library gives them.
    answer = prompts[0]["answer"]
    honest = [answer, repr(list(answer)), repr([row.split() for row in answer.splitlines()]), "24"]
    want = [theirs.score_answer(text, theirs[0]) for text in honest]
    batch = TextBatch.from_texts(honest, [prompts[0]] * 4)
    assert reward.evaluate(batch, strict=True).values.tolist() == want
    assert want[0] == 1.0


@pytest.mark.parametrize("name", EVALUATED)
def test_right_answers_are_paid_as_the_library_pays_them(name):
    prompts, reward = reasoning_gym_task(name, size=6, seed=9)
    theirs = reasoning_gym.create_dataset(name, size=6, seed=9)
    want = [theirs.score_answer(entry["answer"], entry) for entry in theirs]
    assert reward.evaluate(oracle(prompts), strict=True).values.tolist() == want == [1.0] * 6
    if name == "intermediate_integration":
        return  # takes half a second an answer
    # Answers to other questions, some of which are right for these too.
    turned = [prompts[(i + 1) % 6]["answer"] for i in range(6)]
    want = [theirs.score_answer(text, entry) for text, entry in zip(turned, theirs, strict=True)]
    batch = TextBatch.from_texts(turned, list(prompts))
    assert reward.evaluate(batch, strict=True).values.tolist() == want
    assert name == "puzzle24" or min(want) < 1  # which pays any four numbers that make 24


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("(1 + 2)*3/4 - 5**2", True),
        ("x**2/2 + sin(3.5*x) + C", True),
        (".5*X^2", True),
        ("x.real", False),
        ("1.5.real", False),
        ("1..real", False),
        ("1. real", False),
        ("x . real", False),
        ("x.__class__", False),
        ("__import__", False),
        ("S('x')", False),
        ("x[0]", False),
        ("{x}", False),
        ("x; y", False),
        ("x := 3", False),
        ("lambda x", False),
        ("open(x)", False),
        ("eval(x)", False),
        ("x if y else z", False),
        ("sin(x\u2024real)", False),
        ("\uff4fpen(x)", False),
    ],
)
def test_what_sympy_may_parse(text, safe):
    assert is_arithmetic(text) is safe


def test_every_dataset_is_known_not_to_run_answers():
    known = reasoning_guard.BY_EVAL | reasoning_guard.BY_SYMPY | reasoning_guard.HARMLESS
    for name, (kind, _) in reasoning_gym.factory.DATASETS.items():
        reasoning_guard.vet(object.__new__(kind))
        assert kind.__module__ in known or name not in EVALUATED

    class Unknown:
        """Its module holds a call of eval( in this very sentence."""

    with pytest.raises(RuntimeError, match="evaluates code"):
        reasoning_guard.vet(Unknown())
