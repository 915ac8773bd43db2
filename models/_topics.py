"""Common parts of topic models: top words, perplexity, and coherence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BadInput


def top_words(topics: Tensor, vocabulary: Sequence[str], count: int = 10) -> list[list[str]]:
    """The most probable words of each topic.

    Args:
        topics: probabilities ``(K, V)``.
        vocabulary: the V words.
        count: number of words per topic.

    Returns:
        K lists of words, the most probable first.

    Raises:
        BadInput: if the number of words differs from the number of columns.

    >>> import torch
    >>> top_words(torch.tensor([[0.1, 0.6, 0.3]]), ["a", "b", "c"], 2)
    [['b', 'c']]
    """
    if len(vocabulary) != topics.shape[-1]:
        raise BadInput(f"top_words: {len(vocabulary)} words for topics over {topics.shape[-1]}: expected one for each")
    return [[vocabulary[i] for i in row] for row in topics.topk(min(count, topics.shape[-1])).indices.tolist()]


def perplexity(log_prob: Tensor, counts: Tensor) -> float:
    """The perplexity per word, of a model of word counts.

    Counts have a multinomial coefficient that a sequence of words does not have; it is removed. A lower bound of
    log p(x) gives an upper bound of the perplexity.

    Args:
        log_prob: log p(x) of each document ``(N,)``, or a lower bound of it, in nats.
        counts: the documents ``(N, ...)``.

    Returns:
        exp of minus the nats per word, over all documents together.

    Raises:
        RuntimeError: if the numbers of log-probabilities and of documents differ.
        OverflowError: if the perplexity exceeds the range of a float.

    >>> import torch
    >>> from gumbo.models.likelihoods import MultinomialCounts
    >>> counts = torch.tensor([[2.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    >>> round(perplexity(MultinomialCounts(torch.zeros(2, 4)).log_prob(counts), counts), 4)
    4.0
    """
    words = counts.flatten(1)
    ways = torch.lgamma(words.sum(-1) + 1) - torch.lgamma(words + 1).sum(-1)
    return math.exp(-((log_prob - ways).sum() / words.sum()).item())


def npmi(topics: Tensor, counts: Tensor, count: int = 10) -> Tensor:
    """The coherence of each topic: the mean normalized pointwise mutual information of its top words.

    Two words of a topic are coherent if documents with one tend to contain the other: 1 if they always occur together,
    0 if they are independent, −1 if they never occur together (Lau, Newman & Baldwin 2014).

    Args:
        topics: probabilities ``(K, V)``.
        counts: documents ``(N, ...)`` of V counts, for the co-occurrences.
        count: number of words per topic.

    Returns:
        K numbers in [−1, 1].

    Raises:
        BadInput: fewer than two words per topic, which have no pair.
        IndexError: if the documents have fewer words than the topics.

    >>> import torch
    >>> documents = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    >>> npmi(torch.tensor([[0.5, 0.4, 0.1, 0.0], [0.5, 0.1, 0.4, 0.0]]), documents, count=2)
    tensor([ 1., -1.])
    """
    words = min(count, topics.shape[-1])
    if words < 2:
        raise BadInput(f"npmi: count is {count} of {topics.shape[-1]} words: expected at least two words per topic")
    present = (counts.flatten(1) > 0).double()
    found = []
    for top in topics.topk(words).indices:
        chosen = present[:, top]
        alone, together = chosen.mean(0), chosen.mT @ chosen / len(chosen)
        scores = []
        for i, j in itertools.combinations(range(words), 2):
            both = together[i, j]
            if both == 0:
                scores.append(-1.0)
            elif both == 1:
                scores.append(1.0)
            else:
                scores.append((-(both / (alone[i] * alone[j])).log() / both.log()).item())
        found.append(sum(scores) / len(scores))
    return torch.tensor(found)
