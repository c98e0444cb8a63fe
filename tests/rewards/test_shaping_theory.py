"""What density does to a policy and what it does not, by listing every episode of a small task.

Three ids (two words and the end), three tokens: every response is played through the decision
process, so the rewards are those that a learner is paid, and the policy is a table of probabilities
over all states. Nothing is sampled.
"""

import itertools

import numpy as np
import pytest

from textgym.credit import assign_credit
from textgym.mdp import Task, TokenMDP
from textgym.returns import discounted_returns, gae
from textgym.rewards import Reward, dense, steps, terminal
from textgym.tokens import symbol_tokenizer

TOKENS = symbol_tokenizer(["a", "b"], bos=None)  # ids a 0, b 1, <eos> 2
VOCABULARY, HORIZON, EOS = 3, 3, 2


class Table(Reward):
    """A value for each text, looked up."""

    cheap = True
    reads_only = True

    def __init__(self, values, default=0.0):
        self.values, self.default, self.name = values, default, "table"

    def score(self, batch):
        return [self.values.get(text, self.default) for text in batch.texts]


def texts(length):
    return [" ".join(words) for words in itertools.product("ab", repeat=length)]


RNG = np.random.default_rng(7)
OUTCOME = Table({text: float(RNG.normal()) for n in range(4) for text in texts(n)})
PHI = Table({text: float(RNG.normal()) for n in range(4) for text in texts(n)})


class Episodes:
    """Every episode of a task: its states (texts of ids), actions, rewards and end."""

    def __init__(self, reward, budget="terminate"):
        task = Task(
            prompts=[{"prompt": "a"}],
            tokenizer=TOKENS,
            reward=reward,
            max_new_tokens=HORIZON,
            budget=budget,
        )
        self.actions, rewards, self.terminated = [], [], []
        for plan in itertools.product(range(VOCABULARY), repeat=HORIZON):
            mdp = TokenMDP(task, 1)
            mdp.begin(np.zeros(1, np.int64))
            paid = []
            for action in plan:
                outcome = mdp.step([action])
                paid.append(outcome.reward[0])
                if outcome.terminated[0] or outcome.truncated[0]:
                    break
            if plan[: len(paid)] not in self.actions:
                self.actions.append(plan[: len(paid)])
                rewards.append(paid)
                self.terminated.append(bool(outcome.terminated[0]))
        self.rewards = np.concatenate(rewards)
        self.offsets = np.cumsum([0, *map(len, self.actions)])
        self.states = [plan[:t] for plan in self.actions for t in range(len(plan))]

    def last_value(self, value):
        """What follows the last action: nothing, or the value of the state where it was cut."""
        pairs = zip(self.actions, self.terminated, strict=True)
        return np.array([0.0 if done else value(plan) for plan, done in pairs])

    def returns(self, gamma, value):
        return discounted_returns(
            self.rewards, self.offsets, gamma, last_value=self.last_value(value)
        )


def phi_of(state):
    """φ of a state, which is 0 before the first token."""
    return PHI.values[TOKENS.decode(state)] if state else 0.0


def nothing(state):
    return 0.0


def beyond(state):
    """Any values of the states in which an episode is cut."""
    return float(np.sin(1.0 + sum((k + 1) * (a + 2) for k, a in enumerate(state))))


def best_actions(episodes, gamma, value):
    """The best action of every state, and by how much: backward induction over all episodes."""
    best, after = {}, dict(zip(episodes.actions, episodes.last_value(value), strict=True))
    paid = {
        plan[: t + 1]: episodes.rewards[episodes.offsets[k] + t]
        for k, plan in enumerate(episodes.actions)
        for t in range(len(plan))
    }
    for state in sorted(set(episodes.states), key=len, reverse=True):
        q = [paid[(*state, a)] + gamma * after[(*state, a)] for a in range(VOCABULARY)]
        after[state] = max(q)
        best[state] = (int(np.argmax(q)), tuple(np.array(q) - max(q)))
    return best


def policy(state):
    """Probabilities of a fixed policy, far from uniform."""
    number = sum((a + 1) * 4**k for k, a in enumerate(state))
    logits = 2.0 * np.sin(np.arange(VOCABULARY) * 1.7 + number)
    return np.exp(logits) / np.exp(logits).sum()


def expected_gradient(episodes, advantages):
    """E[Σ_t A_t ∇ log π(a_t | s_t)] with respect to the logits of every state."""
    gradient = {state: np.zeros(VOCABULARY) for state in episodes.states}
    for k, plan in enumerate(episodes.actions):
        chance = np.prod([policy(plan[:t])[a] for t, a in enumerate(plan)])
        for t, a in enumerate(plan):
            score = np.eye(VOCABULARY)[a] - policy(plan[:t])
            gradient[plan[:t]] += chance * advantages[episodes.offsets[k] + t] * score
    return np.concatenate([gradient[state] for state in sorted(gradient)])


# --- sums


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("budget", ["terminate", "truncate"])
def test_discounted_sums_telescope(gamma, budget):
    bare, shaped = Episodes(OUTCOME, budget), Episodes(dense(OUTCOME, PHI, gamma), budget)
    assert len(bare.actions) == 15 and sum(bare.terminated) == (7 if budget == "truncate" else 15)
    for k, plan in enumerate(shaped.actions):
        own = slice(shaped.offsets[k], shaped.offsets[k + 1])
        discounts = gamma ** np.arange(len(plan))
        wanted = discounts @ bare.rewards[own]
        if not shaped.terminated[k]:
            wanted += gamma ** len(plan) * phi_of(plan)
        assert discounts @ shaped.rewards[own] == pytest.approx(wanted, abs=1e-12)


# --- what is best


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("budget", ["terminate", "truncate"])
@pytest.mark.parametrize("potential", [None, PHI], ids=["itself", "another"])
def test_a_potential_changes_no_best_action_and_no_advantage(gamma, budget, potential):
    phi = (lambda state: OUTCOME.values[TOKENS.decode(state)]) if potential is None else phi_of
    bare = best_actions(Episodes(OUTCOME, budget), gamma, beyond)
    shaped = best_actions(
        Episodes(dense(OUTCOME, potential, gamma), budget),
        gamma,
        lambda state: beyond(state) - phi(state),
    )
    assert bare.keys() == shaped.keys() and len(bare) == 7
    for state, (action, advantage) in bare.items():
        assert shaped[state][0] == action
        assert shaped[state][1] == pytest.approx(advantage, abs=1e-12)


def naive(reward):
    """The episodes of a dense reward that pays φ_t at every token, not its growth."""
    episodes = Episodes(dense(reward))
    for k in range(len(episodes.actions)):
        own = slice(episodes.offsets[k], episodes.offsets[k + 1])
        episodes.rewards[own] = np.cumsum(episodes.rewards[own])  # φ_t from its differences
    return episodes


def test_paying_the_value_itself_at_every_token_changes_what_is_best():
    # "b" alone is worth 1; "a" leads to nothing better than 0.9, but is worth 0.9 on the way.
    task = Table({"b": 1.0, "a": 0.9, "a a": 0.9, "a a a": 0.9})
    best = best_actions(Episodes(terminal(task)), 1.0, nothing)
    assert (best[()][0], best[(1,)][0]) == (1, EOS), "write b, then stop"
    shaped = best_actions(Episodes(dense(task)), 1.0, nothing)
    assert (shaped[()][0], shaped[(1,)][0]) == (1, EOS)
    wrong = best_actions(naive(task), 1.0, nothing)
    assert (wrong[()][0], wrong[(0,)][0], wrong[(0, 0)][0]) == (0, 0, 0), "a a a earns 2.7"


# --- what is learned


@pytest.mark.parametrize(
    ("gamma", "schedule"),
    [
        (1.0, dense(OUTCOME)),
        (0.9, dense(OUTCOME, gamma=0.9)),
        (1.0, dense(OUTCOME, PHI)),
        (0.9, dense(OUTCOME, PHI, 0.9)),
        (1.0, steps(OUTCOME, " b", sees="prefix", total="growth")),
    ],
)
def test_with_the_return_to_go_the_expected_gradient_is_the_same(gamma, schedule):
    bare, shaped = Episodes(terminal(OUTCOME)), Episodes(schedule)
    assert np.abs(shaped.rewards - bare.rewards).max() > 0.1
    wanted = expected_gradient(bare, bare.returns(gamma, nothing))
    found = expected_gradient(shaped, shaped.returns(gamma, nothing))
    assert np.abs(wanted).max() > 0.01
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def advantages_of(episodes, values, gae_lambda):
    found, _ = gae(
        episodes.rewards,
        values,
        episodes.offsets,
        terminated=np.ones(len(episodes.actions), bool),
        last_value=np.zeros(len(episodes.actions)),
        gamma=1.0,
        gae_lambda=gae_lambda,
    )
    return found


def test_with_a_fixed_value_function_and_lambda_below_1_density_changes_the_gradient():
    """That is what it buys: the bootstrapped error of the value is another one."""
    bare, shaped = Episodes(terminal(OUTCOME)), Episodes(dense(OUTCOME))
    values = np.array([beyond(state) for state in bare.states])
    phi = np.array([OUTCOME.values[TOKENS.decode(s)] if s else 0.0 for s in bare.states])
    for gae_lambda in (1.0, 0.95, 0.5, 0.0):
        wanted = expected_gradient(bare, advantages_of(bare, values, gae_lambda))
        found = expected_gradient(shaped, advantages_of(shaped, values, gae_lambda))
        apart = np.abs(found - wanted).max()
        assert apart < 1e-12 if gae_lambda == 1.0 else apart > 0.003
        # A value function that knows of the potential, V - φ, undoes it (Wiewiora 2003).
        knowing = advantages_of(shaped, values - phi, gae_lambda)
        np.testing.assert_allclose(expected_gradient(shaped, knowing), wanted, atol=1e-12)


def test_only_credit_on_the_last_token_has_the_policy_gradient():
    bare = Episodes(terminal(OUTCOME))
    scores = np.add.reduceat(bare.rewards, bare.offsets[:-1])
    lengths = np.diff(bare.offsets)
    exact = expected_gradient(bare, np.repeat(scores, lengths))
    for how, unbiased in (("last", True), ("even", False), ("discounted", False)):
        credit = assign_credit(scores, bare.offsets, how, 0.5)
        found = expected_gradient(bare, discounted_returns(credit, bare.offsets, 1.0))
        apart = np.abs(found - exact).max()
        assert apart < 1e-12 if unbiased else apart > 0.01
    # Even, and no look ahead: the gradient of the score per token.
    per_token = expected_gradient(bare, np.repeat(scores / lengths, lengths))
    even = discounted_returns(assign_credit(scores, bare.offsets, "even"), bare.offsets, 0.0)
    np.testing.assert_allclose(expected_gradient(bare, even), per_token, atol=1e-12)
