"""Rewards of TRL, verifiers and reasoning-gym as ours, and ours as TRL's."""

import asyncio
import contextlib
import functools
import importlib.util
import pickle
import random
import types

import numpy as np
import pytest

from textgym.rewards import (
    Bleu,
    ExactMatch,
    RewardColumnError,
    TextBatch,
    TextFailure,
    as_reward,
    terminal,
)
from textgym.rewards.interop import from_rubric, text_of
from textgym.rewards.service import Service

CHAT = [{"role": "user", "content": "2+2?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


def batch_of(texts, prompt="2+2?", **columns):
    rows = [
        {"prompt": prompt, **{name: values[i] for name, values in columns.items()}}
        for i in range(len(texts))
    ]
    return TextBatch.from_texts(texts, rows)


# ---- ours as TRL's -------------------------------------------------------------------------------


def call_as_trl(function, prompts, completions, **columns):
    """Call a reward function with all that TRL's GRPOTrainer passes (1.16)."""
    return function(
        prompts=prompts,
        completions=completions,
        completion_ids=[[1, 2, 3]] * len(prompts),
        trainer_state=types.SimpleNamespace(global_step=3),
        log_extra=lambda column, values: None,
        log_metric=lambda name, value: None,
        **columns,
    )


def test_a_reward_is_a_trl_function():
    function = ExactMatch("answer").trl()
    assert function.__name__ == "exact_match"
    assert (Bleu() + 0.5 * ExactMatch()).named("mix").trl().__name__ == "mix"
    values = call_as_trl(function, ["p"] * 3, ["4", "5", " 4 "], answer=["4", "4", "4"])
    assert values == [1.0, 0.0, 1.0] and all(type(value) is float for value in values)
    chat = call_as_trl(function, [CHAT] * 2, [said("4"), said("5")], answer=["4", "4"])
    assert chat == [1.0, 0.0]
    assert function(["p"], ["4"], answer=["4"]) == [1.0]  # called by hand, with less


def test_columns_ids_and_prompts_reach_the_reward():
    seen = {}

    def look(prompt, completion, text, token_ids, weight, **columns):
        seen.update(locals())
        return 0.5

    values = call_as_trl(as_reward(look).trl(), [CHAT], [said("a")], weight=[3], other=["x"])
    assert values == [0.5]
    assert (seen["prompt"], seen["completion"], seen["text"]) == (CHAT, said("a"), "a")
    assert seen["token_ids"] == [1, 2, 3] and seen["weight"] == 3
    assert seen["columns"]["other"] == "x"
    assert not {"trainer_state", "log_extra", "log_metric"} & set(seen["columns"])


def test_a_missing_column_is_an_error_and_not_a_none():
    with pytest.raises(RewardColumnError, match=r"'answer'.*mean 'answers'"):
        call_as_trl(ExactMatch("answer").trl(), ["p"], ["4"], answers=["4"])
    with pytest.raises(ValueError, match="one per prompt"):
        ExactMatch("answer").trl()(["p"], ["4", "5"], answer=["4"])


def test_failures_become_none_and_faults_of_the_text_the_worst():
    outcomes = {
        "none": None,
        "nan": float("nan"),
        "down": OSError("down"),
        "bad": TextFailure("does not parse"),
        "fine": 0.25,
    }

    def scripted(texts):
        return [outcomes[text] for text in texts]

    function = as_reward(scripted, low=-1.0).trl()
    assert function(["p"] * 5, list(outcomes)) == [None, None, None, -1.0, 0.25]


def test_async_rewards_are_trl_functions_too():
    async def judge(text):
        await asyncio.sleep(0)
        return len(text)

    async def trainer():  # TRL may call from within its own loop
        return as_reward(judge).trl()(["p", "p"], ["a", "bb"])

    assert asyncio.run(trainer()) == [1.0, 2.0]


def test_a_trl_function_can_be_sent_to_another_process():
    function = pickle.loads(pickle.dumps(ExactMatch("answer").trl()))
    assert function.__name__ == "exact_match"
    assert function(["p"], ["4"], answer=["4"]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ([], ""),
        (said("one"), "one"),
        ([{"content": "no role"}], "no role"),
        ([*said("call"), {"role": "tool", "content": "42"}, *said("so 42")], "call\nso 42"),
        ([{"role": "assistant", "content": None, "tool_calls": []}, *said("x")], "x"),
        (said([{"type": "text", "text": "a"}, {"type": "image"}, {"text": "b"}]), "ab"),
    ],
)
def test_the_text_of_a_completion(completion, text):
    assert text_of(completion) == text


def test_what_is_no_completion_is_refused():
    with pytest.raises(TypeError, match="chat messages, got int"):
        text_of(3)


# ---- TRL's as ours: shapes of published functions ------------------------------------------------


def think_format(completions, **kwargs):  # of conversations only
    contents = [completion[0]["content"] for completion in completions]
    return [float("<think>" in c and "</think>" in c) for c in contents]


def accuracy(completions, solution, log_extra=None, **kwargs):  # None: does not apply
    values = [
        None if not gold else float(completion[0]["content"] == gold)
        for completion, gold in zip(completions, solution, strict=True)
    ]
    if log_extra is not None:
        log_extra("solution", solution)
    return values


class RepetitionPenalty:
    """A callable object with a `__name__`, over token ids."""

    __name__ = "repetition_penalty_reward"

    def __init__(self, most):
        self.most = most

    def __call__(self, completion_ids, **kwargs):
        return [
            self.most * (1 - len(set(ids)) / len(ids)) if ids else 0.0 for ids in completion_ids
        ]


async def remote(prompts, completions, completion_ids, answer, **kwargs):
    await asyncio.sleep(0)
    return [
        float(len(ids) > 0 and a in c)
        for c, ids, a in zip(completions, completion_ids, answer, strict=True)
    ]


def test_published_shapes_plug_in_unchanged():
    chat = batch_of(["<think>x</think>4", "4"], prompt=CHAT, solution=["", "4"])
    assert as_reward(think_format).evaluate(chat).values.tolist() == [1.0, 0.0]
    scores = as_reward(accuracy).evaluate(chat, optional=True)
    assert np.isnan(scores.values[0]) and scores.values[1] == 1.0 and scores.traceback is None
    both = terminal(as_reward(think_format) + 2.0 * as_reward(accuracy))
    tracks = [both.begin(row, CHAT) for row in chat.rows]
    ended = np.array([True, True])
    assert both.pay(tracks, chat, ended, ~ended).reward.tolist() == [1.0, 2.0]

    plain = batch_of(["is 4", "5"], answer=["4", "4"])
    plain.token_ids[:] = [[1, 1, 2, 2], [3]]
    penalty = as_reward(RepetitionPenalty(-1.0), low=-1.0, high=0.0)
    assert penalty.name == "repetition_penalty_reward"
    assert penalty.evaluate(plain).values.tolist() == [-0.5, 0.0]
    assert as_reward(remote).evaluate(plain).values.tolist() == [1.0, 0.0]
    # There and back again.
    again = as_reward(penalty.trl())
    assert again.evaluate(plain).values.tolist() == [-0.5, 0.0]


# ---- verifiers -----------------------------------------------------------------------------------


class Parser:
    def parse_answer(self, completion):
        return completion[-1]["content"].split()[-1]


class Rubric:
    """What `verifiers.Rubric` keeps (0.1): functions, weights, objects by name."""

    def __init__(self, funcs, weights=None, parser=None):
        self.funcs, self.weights = funcs, weights or [1.0] * len(funcs)
        self.parser = parser or Parser()
        self.class_objects = {"parser": self.parser}


def exact_answer(parser, completion, answer, **kwargs) -> float:
    return 1.0 if parser.parse_answer(completion) == answer else 0.0


async def brief(completion) -> float:
    await asyncio.sleep(0)
    return 1.0 if len(completion[-1]["content"]) < 5 else 0.5


def looks_at_all(prompt, completion, answer, state, task, info):
    assert prompt == CHAT and completion == said(state["completion"][0]["content"])
    assert state["answer"] == answer and task == "default"
    return float(info["scale"])


def test_a_rubric_is_a_weighted_sum():
    rubric = Rubric([exact_answer, brief, looks_at_all], [1.0, 0.5, 0.0])
    batch = batch_of(
        ["it is 4", "4", "5"], answer=["4"] * 3, info=[{"scale": s} for s in (1, 2, 3)]
    )
    reward = from_rubric(rubric)
    reward.check(["prompt", "answer", "info"])
    assert reward.evaluate(batch, strict=True).values.tolist() == [1.25, 1.5, 0.5]
    weights = {part.name: weight for weight, part in reward.parts()}
    assert weights == {"exact_answer": 1.0, "brief": 0.5, "looks_at_all": 0.0}
    schedule = terminal(reward)
    tracks = [schedule.begin(row, "") for row in batch.rows]
    payment = schedule.pay(tracks, batch, np.full(3, True), np.full(3, False))
    assert payment.components["looks_at_all"].tolist() == [1, 2, 3]  # a metric


def test_one_function_and_groups_and_older_names():
    batch = batch_of(["4"], answer=["4"])
    rubric = types.SimpleNamespace(reward_funcs=[brief], reward_weights=[2.0], parser=Parser())
    assert from_rubric(rubric).evaluate(batch).values.tolist() == [2.0]
    group = types.SimpleNamespace(rubrics=[Rubric([brief]), Rubric([exact_answer], [0.25])])
    assert from_rubric(group).evaluate(batch).values.tolist() == [1.25]
    assert from_rubric(brief).name == "brief"
    partial = functools.partial(brief)
    assert from_rubric(partial).evaluate(batch).values.tolist() == [1.0]
    how = Service(retries=2)
    assert from_rubric(brief, service=how).service is how


def test_functions_of_bare_completions():
    def ends_well(prompt, completion):
        return float(prompt == "2+2?" and completion.endswith("4"))

    batch = batch_of(["it is 4"])
    assert from_rubric(ends_well, chat=False).evaluate(batch).values.tolist() == [1.0]
    # With as_reward, a function is given text for text and messages for messages.
    assert as_reward(ends_well).evaluate(batch).values.tolist() == [1.0]
    chat = batch_of(["it is 4"], prompt=CHAT, answer=["4"])
    plain = as_reward(functools.partial(exact_answer, Parser()))
    assert plain.evaluate(chat).values.tolist() == [1.0]


def test_a_rubric_that_cannot_be_a_reward_says_why():
    def compares(completions, answers):
        return [0.0] * len(completions)

    with pytest.raises(TypeError, match="'compares' compares all responses"):
        from_rubric(Rubric([compares]))
    with pytest.raises(TypeError, match="expected a rubric or a function, got int"):
        from_rubric(3)
    with pytest.raises(TypeError, match="without"):
        from_rubric(Rubric([]))
    with pytest.raises(RewardColumnError, match="'exact_answer' needs the column 'answer'"):
        from_rubric(Rubric([exact_answer])).check(["prompt", "solution"])


def test_an_exception_in_a_rubric_is_a_failure_and_not_a_zero():
    def broken(completion, state):
        return state["trajectory"][0]

    scores = from_rubric(broken).evaluate(batch_of(["4"]))
    assert np.isnan(scores.values[0]) and "KeyError: 'trajectory'" in scores.status[0]


# ---- reasoning-gym -------------------------------------------------------------------------------

reasoning = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason='needs pip install "textgym[reasoning]"',
)


def oracle(prompts, wrap="<answer>{}</answer>"):
    return TextBatch.from_texts([wrap.format(row["answer"]) for row in prompts], list(prompts))


@reasoning
def test_a_reasoning_gym_dataset_is_prompts_and_a_reward():
    import reasoning_gym

    from textgym.rewards.reasoning import reasoning_gym_task

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
    best, worst = reward.examples()
    for example in (best, worst):
        scores = reward.evaluate(TextBatch.from_texts([example.text], [example.row]))
        assert scores.values.tolist() == [example.value]


@reasoning
def test_entries_that_are_no_plain_data_are_made_again_in_the_worker():
    from textgym.rewards.reasoning import reasoning_gym_task

    prompts, reward = reasoning_gym_task("knights_knaves", size=3, seed=1)
    assert "'index': 2" in prompts[2]["entry"]
    assert reward.evaluate(oracle(prompts), strict=True).values.tolist() == [1.0] * 3
    forged = {**prompts[0], "entry": repr({"index": 0, "question": "another"})}
    scores = reward.evaluate(TextBatch.from_texts(["x"], [forged]))
    assert "another entry 0" in scores.status[0]


@reasoning
def test_an_answer_at_which_the_scorer_fails_gets_the_worst():
    from textgym.rewards.reasoning import reasoning_gym_task

    prompts, reward = reasoning_gym_task("prime_factorization", size=1, seed=0)
    texts = ["garbage", f"<answer>{prompts[0]['answer']}</answer>", "9" * 20_001, ""]
    scores = reward.evaluate(TextBatch.from_texts(texts, [prompts[0]] * 4))
    assert scores.values.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert scores.status == ["text: scorer: ValueError", None, "text: long", None]


@reasoning
def test_where_the_answer_is():
    from textgym.rewards.reasoning import answer_of

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


@reasoning
def test_the_global_generators_are_left_alone():
    from textgym.rewards.reasoning import reasoning_gym_task

    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    reasoning_gym_task("pool_matrix", size=2)  # it seeds NumPy's
    assert (random.random(), np.random.random()) == expected


@reasoning
def test_a_task_that_is_not_reproducible_says_so(monkeypatch):
    from textgym.rewards.reasoning import reasoning_gym_task

    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.warns(UserWarning, match="'ransom_note' depend on Python's hash seed"):
        reasoning_gym_task("ransom_note", size=1)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    reasoning_gym_task("ransom_note", size=1)


@reasoning
def test_wrong_tasks_are_refused():
    from textgym.rewards.reasoning import reasoning_gym_task

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


@reasoning
@pytest.mark.parametrize("name", EVALUATED)
def test_an_answer_is_never_run(name, tmp_path):
    import reasoning_gym

    from textgym.rewards.reasoning import reasoning_gym_task

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


@reasoning
@pytest.mark.parametrize("name", EVALUATED)
def test_right_answers_are_paid_as_the_library_pays_them(name):
    import reasoning_gym

    from textgym.rewards.reasoning import reasoning_gym_task

    prompts, reward = reasoning_gym_task(name, size=8, seed=9)
    theirs = reasoning_gym.create_dataset(name, size=8, seed=9)
    want = [theirs.score_answer(entry["answer"], entry) for entry in theirs]
    assert reward.evaluate(oracle(prompts), strict=True).values.tolist() == want == [1.0] * 8
    # Answers to other questions, some of which are right for these too.
    turned = [prompts[(i + 1) % 8]["answer"] for i in range(8)]
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
    from textgym.rewards.reasoning_guard import is_arithmetic

    assert is_arithmetic(text) is safe


@reasoning
def test_every_dataset_is_known_not_to_run_answers():
    from reasoning_gym.factory import DATASETS

    from textgym.rewards import reasoning_guard

    known = reasoning_guard.BY_EVAL | reasoning_guard.BY_SYMPY | reasoning_guard.HARMLESS
    for name, (kind, _) in DATASETS.items():
        reasoning_guard.vet(object.__new__(kind))
        assert kind.__module__ in known or name not in EVALUATED

    class Unknown:
        """Its module holds a call of eval( in this very sentence."""

    with pytest.raises(RuntimeError, match="evaluates code"):
        reasoning_guard.vet(Unknown())
