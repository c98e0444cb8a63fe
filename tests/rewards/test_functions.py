"""Any callable is a reward: shapes, columns, copies, async."""

import asyncio
import functools
import pickle
import subprocess
import sys
import threading
import time

import cloudpickle
import numpy as np
import pytest

from textgym.rewards import Bleu, RewardColumnError, TextBatch, as_reward, terminal

BATCH = TextBatch(
    prompts=["1+1", "1+2"],
    texts=["two", "3"],
    token_ids=[[5, 6, 1], [7, 1]],
    prompt_ids=[[3], [4, 4]],
    rows=[{"prompt": "1+1", "answer": "2"}, {"prompt": "1+2", "answer": "3"}],
    stop_reasons=["stop_id", "length"],
)


def values(function, batch=BATCH, **options):
    scores = as_reward(function, **options).evaluate(batch)
    assert scores.status == [None] * len(batch), scores
    return scores.values.tolist()


def right(text, answer):
    return text == answer


def per_item(prompt, text, completion, token_ids, prompt_ids, stop_reason, answer, other=0.25):
    assert completion == text and prompt == f"1+{int(answer) - 1}"
    return len(token_ids) + 10 * len(prompt_ids) + 100 * (stop_reason == "length") + other


def per_batch(prompts, texts, completions, completion_ids, prompt_ids, stop_reasons, answer):
    return [
        per_item(*each)
        for each in zip(
            prompts,
            texts,
            completions,
            completion_ids,
            prompt_ids,
            stop_reasons,
            answer,
            strict=True,
        )
    ]


def trl_style(completions, answer, **kwargs):
    assert set(kwargs) >= {"prompts", "completion_ids"} and "prompt" not in kwargs
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


class Judge:
    def __call__(self, text):
        return len(text)


def test_parameter_names_decide_what_is_given():
    assert values(right) == [0, 1]
    assert values(lambda text: len(text)) == [3, 1]
    assert values(per_item) == [13.25, 122.25]
    assert values(per_batch) == [13.25, 122.25]
    assert values(trl_style) == [0, 1]
    assert values(lambda completions: [1, 2]) == [1, 2]
    assert values(lambda token_ids: len(token_ids)) == [3, 2]
    assert values(Judge()) == [3, 1]
    assert values(functools.partial(right, answer="two")) == [1, 0]
    assert values(functools.partial(lambda scale, text: scale * len(text), 2)) == [6, 2]
    assert values(lambda *, answer: int(answer)) == [2, 3]


def test_keyword_arguments_receive_every_column():
    seen = []

    def single(text, **columns):
        seen.append(columns)
        return 0

    def only_columns(**columns):
        seen.append(columns)
        return [0] * len(columns["texts"])

    values(single)
    values(only_columns)
    assert seen[0] == {
        **{"prompt": "1+1", "completion": "two", "token_ids": [5, 6, 1], "prompt_ids": [3]},
        **{"stop_reason": "stop_id", "answer": "2"},
    }
    assert seen[2]["answer"] == ["2", "3"] and seen[2]["completion_ids"] == [[5, 6, 1], [7, 1]]


def test_chat_prompts_give_trl_its_message_lists():
    chat = [{"role": "user", "content": "hi"}]
    batch = TextBatch([chat, "hi"], ["a", "b"], [[1], [1]], [[1], [1]], [{}, {}], [None, None])
    seen = {}

    def reward(prompts, completions, texts):
        seen.update(prompts=prompts, completions=completions, texts=texts)
        return [0, 0]

    values(reward, batch)
    assert seen["completions"] == [[{"role": "assistant", "content": "a"}], "b"]
    assert seen["prompts"] == [chat, "hi"] and seen["texts"] == ["a", "b"]


def test_names_bounds_and_identity():
    assert as_reward(right).name == "right" and as_reward(lambda text: 0).name == "lambda"
    assert as_reward(Judge()).name == "Judge"
    assert as_reward(functools.partial(right, answer="")).name == "right"
    assert (as_reward(right).low, as_reward(right).high) == (0, 1)
    reward = as_reward(right, name="exact", low=-2, high=3)
    assert (reward.name, reward.low, reward.high) == ("exact", -2, 3)
    assert as_reward(reward) is reward
    assert as_reward(reward, name="other").name == "other" and reward.name == "exact"
    assert as_reward("rougeL").name == "rougeL"


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: as_reward(3), TypeError, "a callable or the name of a reward, got int"),
        (lambda: as_reward(Bleu), TypeError, r"write Bleu\(\)"),
        (lambda: as_reward(terminal(right)), TypeError, "it is not a reward"),
        (lambda: as_reward("blue"), ValueError, "Did you mean 'bleu'"),
        (lambda: as_reward(lambda text, texts: 0), TypeError, "mixes"),
        (lambda: as_reward(lambda: 0), TypeError, r"def f\(text\)"),
        (lambda: as_reward(len), TypeError, r"def f\(text\)"),
        (lambda: as_reward(dict), TypeError, r"lambda text: f\(text\)"),
        (lambda: as_reward(right, low=1, high=0), ValueError, "low <= high"),
        (lambda: as_reward(right, high=float("inf")), ValueError, "finite"),
        (lambda: as_reward(right, timeout=1), ValueError, "async"),
        (lambda: as_reward(Bleu(), low=0), TypeError, "are for callables"),
        (lambda: as_reward(right, max_concurrency=0), ValueError, "at least 1"),
        (lambda: as_reward(right).named(""), ValueError, "empty"),
    ],
)
def test_what_is_not_a_reward_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_a_missing_column_is_an_error_at_construction_that_suggests_the_nearest():
    reward = as_reward(lambda text, anwser: 0.0, name="check")
    with pytest.raises(
        RewardColumnError, match=r"'check' needs the column 'anwser'.*mean 'answer'\?.*prompt"
    ):
        reward.check(["prompt", "answer"])
    with pytest.raises(RewardColumnError, match=r"mean 'text'\?"):
        as_reward(lambda txt: 0.0).check(["prompt"])
    with pytest.raises(RewardColumnError, match=r"\(none\)"):
        as_reward(right).check([])
    as_reward(lambda text, weight=1.0: weight).check([])  # a default makes a column optional
    as_reward(trl_style).check(["answer"])


def test_a_column_missing_from_one_row_is_that_rows_error():
    batch = TextBatch.from_texts(["a"], [{"answr": "a"}])
    scores = as_reward(right).evaluate(batch)
    assert "Did you mean 'answr'?" in scores.status[0]


def test_a_reward_may_change_its_arguments_without_changing_anything():
    def rude_item(text, token_ids, references, nested):
        token_ids.clear()
        references.append("x")
        nested["deep"][0].append(1)
        return 1.0

    def rude_batch(texts, completion_ids, prompts, **columns):
        texts.clear()
        completion_ids[0].clear()
        prompts.append(None)
        columns["references"][0].clear()
        columns["nested"][0]["deep"].clear()
        columns["array"][0][:] = 0
        return [1.0, 1.0]

    def row():
        return {"references": ["r"], "nested": {"deep": [[]]}, "array": np.ones(2)}

    batch = TextBatch(
        [[{"role": "user", "content": "x"}]] * 2,
        ["a", "b"],
        [[1], [2]],
        [[1], [2]],
        [row(), row()],
        [None] * 2,
    )
    for reward in (rude_item, rude_batch):
        assert values(reward, batch) == [1, 1]
        assert batch.texts == ["a", "b"] and batch.token_ids == [[1], [2]]
        assert len(batch.prompts) == 2
        for kept in batch.rows:
            assert kept["references"] == ["r"] and kept["nested"] == {"deep": [[]]}
            assert kept["array"].tolist() == [1, 1]


def test_async_items_run_concurrently_up_to_the_limit():
    running, most = 0, 0

    async def judge(text):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return len(text)

    batch = TextBatch.from_texts([str(10**i) for i in range(12)])
    assert values(judge, batch, max_concurrency=5) == list(range(1, 13))
    assert most == 5


def test_async_batches_and_async_objects():
    async def judge(texts):
        await asyncio.sleep(0)
        return [len(text) for text in texts]

    class AsyncJudge:
        async def __call__(self, text):
            return len(text)

    assert values(judge) == [3, 1]
    assert values(AsyncJudge()) == [3, 1]
    assert values(functools.partial(AsyncJudge().__call__)) == [3, 1]


def test_async_works_inside_a_running_loop_and_from_threads():
    async def judge(text):
        await asyncio.sleep(0)
        return len(text)

    async def notebook():
        return values(judge)

    assert asyncio.run(notebook()) == [3, 1]
    results = []
    threads = [threading.Thread(target=lambda: results.append(values(judge))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[3, 1]] * 4


def test_async_timeout_fails_only_the_item_that_is_late():
    calls, cancelled = [], threading.Event()

    async def judge(text):
        calls.append(text)
        try:
            if text == "two":
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return 1.0

    start = time.monotonic()
    scores = as_reward(judge, timeout=0.3).evaluate(BATCH)
    assert time.monotonic() - start < 10
    assert scores.status == ["error: TimeoutError: no answer in 0.3 s", None]
    assert np.isnan(scores.values[0]) and scores.values[1] == 1
    assert calls.count("two") == 2 and calls.count("3") == 1
    assert cancelled.wait(5)


def test_a_call_that_refuses_to_be_cancelled_does_not_hold_the_run():
    async def stubborn(text):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.2)
        return 1.0

    scores = as_reward(stubborn, timeout=0.02).evaluate(BATCH)
    assert all(status.startswith("error: TimeoutError") for status in scores.status)
    time.sleep(0.3)  # let the loop finish them


def test_waiting_for_a_turn_is_not_counted_against_the_timeout():
    async def judge(text):
        await asyncio.sleep(0.1)
        return 1.0

    batch = TextBatch.from_texts(["a"] * 12)
    start = time.monotonic()
    assert values(judge, batch, max_concurrency=1, timeout=1.0) == [1] * 12
    assert time.monotonic() - start > 1.0


def test_an_async_batch_that_times_out_is_unscored_as_a_whole():
    async def judge(texts):
        await asyncio.sleep(60)

    scores = as_reward(judge, timeout=0.02).evaluate(BATCH)
    assert all(status.startswith("error: TimeoutError") for status in scores.status)


def test_async_errors_and_cancellations_are_the_items_own():
    async def judge(text):
        if text == "two":
            raise asyncio.CancelledError
        raise OSError("down")

    scores = as_reward(judge).evaluate(BATCH)
    assert scores.status == [
        "error: RuntimeError: the call was cancelled",
        "error: OSError: down",
    ]
    assert values(lambda text: 1.0) == [1, 1]  # the loop lives on


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_propagate_from_async_calls(error):
    async def judge(text):
        raise error

    async def fine(text):
        return 1.0

    with pytest.raises(error):
        as_reward(judge).evaluate(BATCH)
    assert values(fine) == [1, 1]  # the loop lives on


def test_an_async_reward_inside_an_async_reward_is_refused_not_deadlocked():
    async def inner(text):
        return 1.0

    async def outer(text):
        return as_reward(inner).evaluate(TextBatch.from_texts([text]), strict=True).values[0]

    scores = as_reward(outer).evaluate(BATCH)
    assert all("cannot score with another async reward" in s for s in scores.status)


def test_a_coroutine_from_a_plain_function_says_what_to_do():
    async def judge(text):
        return 1.0

    scores = as_reward(lambda text: judge(text)).evaluate(BATCH)
    assert "declare the reward itself `async def`" in scores.status[0]


def test_pickling_by_recipe():
    reward = as_reward(right, name="exact", low=-1, max_concurrency=3)
    twin = pickle.loads(pickle.dumps(reward))
    assert twin.evaluate(BATCH).values.tolist() == [0, 1]
    assert (twin.name, twin.low, twin.service.max_concurrency) == ("exact", -1, 3)
    twin.check(["answer"])
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(as_reward(lambda text: 1.0))
    # What Gymnasium and SB3 send to worker processes goes through cloudpickle.
    assert cloudpickle.loads(cloudpickle.dumps(as_reward(lambda text: 1.0))).evaluate(
        BATCH
    ).values.tolist() == [1, 1]


def test_an_empty_batch_calls_nothing():
    def never(texts):
        raise AssertionError

    assert len(as_reward(never).evaluate(BATCH.take([])).values) == 0


def test_async_works_in_a_forked_process():
    script = """
import os, warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of any fork beside a thread
from textgym.rewards import TextBatch, as_reward

async def judge(text):
    return 1.0

reward, batch = as_reward(judge, timeout=20), TextBatch.from_texts(["a"])
reward.evaluate(batch, strict=True)
child = os.fork()
if child == 0:
    os._exit(0 if reward.evaluate(batch).status == [None] else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_importing_rewards_is_cheap():
    script = """
import sys, textgym.rewards
heavy = {"torch", "transformers", "sacrebleu", "rouge_score", "nltk", "jsonschema", "math_verify"}
heavy |= {"sympy", "re2", "reasoning_gym", "httpx", "httpx2"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
