"""Generative models p(x, z): one file per model."""

from __future__ import annotations

from ._base import GenerativeModel, Latent, models
from ._topics import npmi, perplexity, top_words
from .attend_infer_repeat import AttendInferRepeat
from .bayesian_regression import BayesianRegression
from .bernoulli_vae import BernoulliVAE
from .categorical_vae import CategoricalVAE
from .conditional_vae import ConditionalVAE
from .conv_vae import ConvVAE
from .deep_markov_model import DeepMarkovModel
from .expectation import Expectation, rewards
from .gaussian_mixture_vae import GaussianMixtureVAE
from .gaussian_vae import GaussianVAE
from .grid_world import GridWorld
from .heteroscedastic_regression import HeteroscedasticRegression
from .hidden_markov_model import HiddenMarkovModel
from .hierarchical_vae import HierarchicalVAE
from .latent_dirichlet_allocation import LatentDirichletAllocation
from .negative_binomial_vae import NegativeBinomialVAE
from .neural_bayes_net import NeuralBayesNet
from .neural_classifier import NeuralClassifier
from .poisson_def import PoissonDEF
from .poisson_vae import PoissonVAE
from .prod_lda import ProdLDA
from .semi_supervised_vae import SemiSupervisedVAE
from .sequence_vae import SequenceVAE
from .sigmoid_belief_network import SigmoidBeliefNetwork
from .structured_prediction import StructuredPrediction
from .switching_state_space import SwitchingStateSpace
from .vector_quantized_vae import VectorQuantizedVAE

__all__ = [
    "AttendInferRepeat",
    "BayesianRegression",
    "BernoulliVAE",
    "CategoricalVAE",
    "ConditionalVAE",
    "ConvVAE",
    "DeepMarkovModel",
    "Expectation",
    "GaussianMixtureVAE",
    "GaussianVAE",
    "GenerativeModel",
    "GridWorld",
    "HeteroscedasticRegression",
    "HiddenMarkovModel",
    "HierarchicalVAE",
    "Latent",
    "LatentDirichletAllocation",
    "NegativeBinomialVAE",
    "NeuralBayesNet",
    "NeuralClassifier",
    "PoissonDEF",
    "PoissonVAE",
    "ProdLDA",
    "SemiSupervisedVAE",
    "SequenceVAE",
    "SigmoidBeliefNetwork",
    "StructuredPrediction",
    "SwitchingStateSpace",
    "VectorQuantizedVAE",
    "models",
    "npmi",
    "perplexity",
    "rewards",
    "top_words",
]
