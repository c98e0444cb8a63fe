"""ReferenceLogProb: which tokens it sums, batching, loading, pickling."""

import copy
import math
import pickle

import numpy as np
import pytest

from textgym.rewards import Bleu, ReferenceLogProb, TextBatch, terminal
from textgym.rewards.reference import HuggingFaceScorer

V = 11


class Bigram:
    """log π(b | a) from a fixed table; NaN where no one may look."""

    def __init__(self):
        logits = np.random.default_rng(0).normal(size=(V, V))
        self.table = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        self.shapes = []

    def logprob(self, ids, lengths):
        self.shapes.append(ids.shape)
        out = np.full(ids.shape, np.nan)
        for b, length in enumerate(lengths):
            for t in range(1, length):
                out[b, t] = self.table[ids[b, t - 1], ids[b, t]]
        return out


def batch_of(pairs, masks=None):
    n = len(pairs)
    return TextBatch(
        prompts=[""] * n,
        texts=[""] * n,
        token_ids=[list(response) for _, response in pairs],
        prompt_ids=[list(prompt) for prompt, _ in pairs],
        rows=[{}] * n,
        stop_reasons=["stop_id"] * n,
        action_masks=masks,
    )


def random_pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, V, rng.integers(1, 6)), rng.integers(0, V, rng.integers(1, 9)))
        for _ in range(n)
    ]


def by_hand(table, prompt, response):
    ids = [*prompt, *response]
    return sum(table[ids[t - 1], ids[t]] for t in range(len(prompt), len(ids)))


def tiny_llama(vocab_size=V, seed=0, **options):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def test_sums_the_response_with_its_stop_id_and_nothing_of_the_prompt():
    bigram = Bigram()
    pairs = random_pairs(9)
    values = ReferenceLogProb(bigram).score(batch_of(pairs))
    assert values == pytest.approx([by_hand(bigram.table, *pair) for pair in pairs], rel=1e-12)


def test_batches_are_sorted_by_length_and_change_nothing():
    bigram = Bigram()
    batch = batch_of(random_pairs(10))
    expected = ReferenceLogProb(Bigram()).score(batch)
    assert ReferenceLogProb(bigram, batch_size=4).score(batch).tolist() == expected.tolist()
    assert [rows for rows, _ in bigram.shapes] == [4, 4, 2]
    widths = [width for _, width in bigram.shapes]
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_only_the_policys_own_tokens_count():
    bigram = Bigram()
    pairs = [([1, 2], [3, 4, 5]), ([1], [6, 7])]
    masks = [[True, False, True], [True, True]]
    values = ReferenceLogProb(bigram).score(batch_of(pairs, masks))
    t = bigram.table
    assert values == pytest.approx([t[2, 3] + t[4, 5], t[1, 6] + t[6, 7]], rel=1e-12)


def test_a_wrong_shape_is_a_failure_not_a_score():
    class Short(Bigram):
        def logprob(self, ids, lengths):
            return super().logprob(ids, lengths)[:, 1:]

    scores = ReferenceLogProb(Short()).evaluate(batch_of(random_pairs(2)))
    assert all("one number per id" in status for status in scores.status)


def test_a_token_that_the_reference_rules_out_is_unscored():
    bigram = Bigram()
    bigram.table[3, 4] = -math.inf
    scores = ReferenceLogProb(bigram).evaluate(batch_of([([3], [4]), ([3], [5])]))
    assert scores.status == ["inf", None]


def test_a_model_equals_the_plain_forward_of_each_sequence():
    torch = pytest.importorskip("torch")
    model = tiny_llama()
    pairs = random_pairs(12, seed=1)
    values = ReferenceLogProb(model, batch_size=5, temperature=0.7).score(batch_of(pairs))
    for (prompt, response), value in zip(pairs, values, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logprob = torch.log_softmax(model(ids).logits[0].double() / 0.7, -1)
        expected = sum(logprob[t - 1, ids[0, t]].item() for t in range(len(prompt), ids.shape[1]))
        assert value == pytest.approx(expected, abs=1e-5)


def test_the_scorer_of_a_model_gives_zero_where_nothing_is_scored():
    ids = np.array([[1, 2, 3, 0], [4, 5, 6, 7]])
    logprob = HuggingFaceScorer(tiny_llama(), None, 1.0).logprob(ids, np.array([3, 4]))
    assert logprob.shape == (2, 4) and logprob.dtype == np.float64
    assert (logprob == 0).tolist() == [[True, False, False, True], [True, False, False, False]]


def test_little_memory_gives_the_same_values(monkeypatch):
    batch = batch_of(random_pairs(7))
    expected = ReferenceLogProb(tiny_llama()).score(batch)
    monkeypatch.setattr("textgym.rewards.reference.MAX_LOGITS", 1)
    assert ReferenceLogProb(tiny_llama()).score(batch) == pytest.approx(expected, abs=1e-5)


def test_surplus_logits_are_dropped():
    model = tiny_llama(vocab_size=V + 5)
    batch = batch_of(random_pairs(3))
    full = ReferenceLogProb(model).score(batch)
    cut = ReferenceLogProb(model, vocab_size=V).score(batch)
    assert (cut > full + 1e-3).all()  # the same logits, over fewer tokens


def test_a_model_in_training_mode_is_scored_without_dropout_and_left_as_it_was():
    model = tiny_llama(attention_dropout=0.5)
    batch = batch_of(random_pairs(3))
    expected = ReferenceLogProb(model).score(batch)
    model.train()
    assert ReferenceLogProb(model).score(batch) == pytest.approx(expected, abs=1e-6)
    assert model.training


def test_a_sequence_beyond_the_context_says_so():
    scores = ReferenceLogProb(tiny_llama()).evaluate(batch_of([([1] * 30, [2] * 3)]))
    assert "at most 32 tokens, got 33" in scores.status[0]


def test_a_folder_is_loaded_when_it_is_first_used(tmp_path):
    model = tiny_llama(vocab_size=V)
    model.save_pretrained(tmp_path / "model")
    batch = batch_of(random_pairs(4))
    expected = ReferenceLogProb(model).score(batch)
    reward = ReferenceLogProb(tmp_path / "model", device="cpu")
    assert "_scorer" not in reward.__getstate__() and reward._scorer is None
    assert reward.score(batch) == pytest.approx(expected, abs=1e-5)
    data = pickle.dumps(reward)
    assert len(data) < 1000  # a recipe, no weights
    assert pickle.loads(data).score(batch) == pytest.approx(expected, abs=1e-5)
    assert copy.deepcopy(reward) is reward


def test_a_folder_that_is_not_there_is_named_at_once(tmp_path):
    for source in (tmp_path / "gone", str(tmp_path / "gone")):
        with pytest.raises(FileNotFoundError, match="gone"):
            ReferenceLogProb(source)


def test_a_folder_without_a_model_is_a_failure_that_names_it(tmp_path):
    scores = ReferenceLogProb(tmp_path).evaluate(batch_of(random_pairs(1)))
    assert scores.status[0].startswith("error: ") and str(tmp_path) in scores.traceback


def test_weights_are_never_pickled():
    with pytest.raises(pickle.PicklingError, match="folder or name"):
        pickle.dumps(ReferenceLogProb(tiny_llama()))
    twin = pickle.loads(pickle.dumps(ReferenceLogProb(Bigram(), low=-5.0)))
    assert twin.low == -5 and twin.score(batch_of(random_pairs(2))).shape == (2,)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ReferenceLogProb(3), TypeError),
        (lambda: ReferenceLogProb(Bigram(), low=-math.inf), ValueError),
        (lambda: ReferenceLogProb(Bigram(), temperature=0), ValueError),
        (lambda: ReferenceLogProb(Bigram(), batch_size=0), ValueError),
    ],
)
def test_bad_arguments(make, error):
    with pytest.raises(error):
        make()


def test_it_composes():
    reward = 0.5 * ReferenceLogProb(Bigram(), low=-20) + Bleu()
    assert terminal(reward).names == ("reference_logprob", "bleu")
    assert (reward.low, reward.high) == (-10, 1)
