"""One entry per paper; the command line, the README's table, the docs and the contract tests are made from it."""

__all__ = ["CATALOG", "SPACES", "Entry", "entry"]

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from theodolite.core.errors import InputError

SPACES = {
    "parameters": "weight space: how many coordinates the weights need",
    "hyperparameters": "search: architectures, step sizes and prompts as coordinates",
    "activations": "hidden space: bases, dictionaries and probes of what a layer holds",
    "explanations": "input space: what in an input an answer rests on",
    "data": "data space: which rows, features and questions count",
    "predictions": "output space: what can be promised about an answer",
    "networks": "trainable models whose insides can be read",
}


@dataclass(frozen=True)
class Entry:
    """A paper and the module that holds its method. module is relative to the package; arxiv is "" where there is none."""

    slug: str
    title: str
    authors: str
    year: int
    arxiv: str
    module: str
    needs: str

    @property
    def space(self) -> str:
        """The room that the module stands in."""
        return self.module.split(".", 1)[0]

    @property
    def import_name(self) -> str:
        """What to import."""
        return f"theodolite.{self.module}"

    @property
    def state(self) -> Literal["available", "planned"]:
        """ "available" where the module is there (found without importing it)."""
        path = Path(__file__).parent.joinpath(*self.module.split("."))
        return "available" if path.with_suffix(".py").exists() or path.joinpath("__init__.py").exists() else "planned"

    @property
    def summary(self) -> str:
        """First sentence of the module's docstring; the title where the method is planned."""
        if self.state == "planned":
            return self.title
        return (importlib.import_module(self.import_name).__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()

    @property
    def link(self) -> str:
        """Address of the paper, "" where it has no arXiv number."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


_NETWORK = "a network that can be trained again, with its training data"
_LM = "a language model"

CATALOG: tuple[Entry, ...] = tuple(
    Entry(*fields)
    for fields in (
        # parameters
        ("intrinsic-dimension", "Measuring the Intrinsic Dimension of Objective Landscapes", "Li, Farkhoor, Liu, Yosinski", 2018, "1804.08838", "parameters.subspace", _NETWORK),
        ("intrinsic-dimension-finetuning", "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", "Aghajanyan, Zettlemoyer, Gupta", 2020, "2012.13255", "parameters.finetuning_dimension", "a pretrained model and a task"),
        ("parameter-sharing", "In defense of parameter sharing for model-compression", "Desai, Shrivastava", 2023, "2310.11611", "parameters.sharing", _NETWORK),
        ("flora", "FLoRA: Low-Rank Core Space for N-dimension", "Si, Wang, Yang, Xu, Li, Dai, et al.", 2024, "2405.14739", "parameters.tucker", "a pretrained network and a task"),
        ("unified-peft", "Towards a Unified View of Parameter-Efficient Transfer Learning", "He, Zhou, Ma, Berg-Kirkpatrick, Neubig", 2021, "2110.04366", "parameters.peft", "a pretrained transformer and a task"),
        ("connected-peft-retrieval", "Scattered or Connected? An Optimized Parameter-efficient Tuning Approach for Information Retrieval", "Ma, Guo, Zhang, Fan, Cheng", 2022, "2208.09847", "parameters.connected", "a text encoder, queries and documents"),
        ("evolutionary-merging", "Evolutionary Optimization of Model Merging Recipes", "Akiba, Shing, Tang, Sun, Ha", 2024, "2403.13187", "parameters.merging", "two or more networks of one architecture"),
        ("relevance-pruning", "Pruning by Explaining: A Novel Criterion for Deep Neural Network Pruning", "Yeom, Seegerer, Lapuschkin, Binder, et al.", 2019, "1912.08881", "parameters.relevance_pruning", "a network and labelled data"),
        ("three-regime-pruning", "A Three-regime Model of Network Pruning", "Zhou, Yang, Chang, Mahoney", 2023, "2305.18383", "parameters.pruning_regimes", _NETWORK),
        ("infinite-width-features", "Feature Learning in Infinite-Width Neural Networks (Tensor Programs IV)", "Yang, Hu", 2020, "2011.14522", "parameters.maximal_update", "a network whose width can be chosen"),
        ("inductive-bias", "Towards Exact Computation of Inductive Bias", "Boopathy, Yue, Hwang, Iyer, Fiete", 2024, "2406.15941", "parameters.inductive_bias", "a model class and a data set"),
        # hyperparameters
        ("deep-architect", "DeepArchitect: Automatically Designing and Training Deep Architectures", "Negrinho, Gordon", 2017, "1704.08792", "hyperparameters.architecture_search", "a data set and a search space"),
        ("llm-bayesian-optimization", "Large Language Models to Enhance Bayesian Optimization", "Liu, Astorga, Seedat, van der Schaar", 2024, "2402.03921", "hyperparameters.llm_bayesian_optimization", "a search space and a language model"),
        ("self-tuning-networks", "Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response Functions", "MacKay, Vicol, Lorraine, Duvenaud, Grosse", 2019, "1903.03088", "hyperparameters.self_tuning", _NETWORK),
        ("step-law", "Predictable Scale: Part I: Optimal Hyperparameter Scaling Law in LLM Pretraining (Step Law)", "Li, Zheng, Wang, Zhang, Wang, et al.", 2025, "2503.04715", "hyperparameters.scaling_law", "final losses over step size and batch size"),
        ("verbalized-learning", "Verbalized Machine Learning: Revisiting Machine Learning with Language Models", "Xiao, Bamler, Schölkopf, Liu", 2024, "2406.04344", "hyperparameters.verbalized", "a language model and a small data set"),
        # activations
        ("interaction-basis", "Using Degeneracy in the Loss Landscape for Mechanistic Interpretability", "Bushnaq, Mendel, Heimersheim, Braun, et al.", 2024, "2405.10927", "activations.interaction_basis", "a network with consecutive layers, and inputs"),
        ("local-interaction-basis", "The Local Interaction Basis: Identifying Computationally-Relevant and Sparsely Interacting Features in Neural Networks", "Bushnaq, Heimersheim, Goldowsky-Dill, Braun, et al.", 2024, "2405.10928", "activations.local_interaction_basis", "a network with consecutive layers, and inputs"),
        ("relative-representations", "Relative representations enable zero-shot latent space communication", "Moschella, Maiorca, Fumero, Norelli, Locatello, Rodolà", 2022, "2209.15430", "activations.relative", "two encoders of the same data"),
        ("sae-evaluation", "Towards Principled Evaluations of Sparse Autoencoders for Interpretability and Control", "Makelov, Lange, Nanda", 2024, "2405.08366", "activations.dictionary_evaluation", "a transformer and a task with known attributes"),
        ("recsae", "Interpret the Internal States of Recommendation Model with Sparse Autoencoder", "Wang, Zhang, Ma, Liu", 2024, "2411.06112", "activations.recsae", "a recommendation model and its interactions"),
        ("observable-propagation", "Observable Propagation: A Data-Efficient Approach to Uncover Feature Vectors in Transformers", "Dunefsky, Cohan", 2023, "2312.16291", "activations.observables", "a decoder language model"),
        ("ast-probe", "AST-Probe: Recovering abstract syntax trees from hidden representations of pre-trained language models", "Hernández López, Weyssow, Sánchez Cuadrado, Sahraoui", 2022, "2206.11719", "activations.ast_probe", "a language model and source code"),
        ("concept-space-dynamics", "Emergence of Hidden Capabilities: Exploring Learning Dynamics in Concept Space", "Park, Okawa, Lee, Tanaka, Lubana", 2024, "2406.19370", "activations.concept_space", "a generative model with known concepts"),
        ("sufo", "Diagnosing Transformers: Illuminating Feature Spaces for Clinical Decision-Making", "Hsu, Cherapanamjeri, Park, Naumann, Odisho, Yu", 2023, "2305.17588", "activations.feature_space", "a fine-tuned encoder and labelled text"),
        ("observatory", "Observatory: Characterizing Embeddings of Relational Tables", "Cong, Hulsebos, Sun, Groth, Jagadish", 2023, "2310.07736", "activations.tables", "a language model and relational tables"),
        # explanations
        ("local-function-approximation", "Which Explanation Should I Choose? A Function Approximation Perspective to Characterizing Post Hoc Explanations", "Han, Srinivas, Lakkaraju", 2022, "2206.01254", "explanations.local_approximation", "any predictor and tabular or image inputs"),
        ("bee", "BEE: Metric-Adapted Explanations via Baseline Exploration-Exploitation", "Barkan, Elisha, Weill, Koenigstein", 2024, "2412.17512", "explanations.baseline_bandit", "an image network"),
        ("robust-counterfactuals", "Robust Counterfactual Explanations for Neural Networks With Probabilistic Guarantees", "Hamman, Noorani, Mishra, Magazzeni, Dutta", 2023, "2305.11997", "explanations.robust_counterfactuals", "a classifier of tables"),
        ("explanations-under-deletion", "Towards Bridging the Gaps between the Right to Explanation and the Right to be Forgotten", "Krishna, Ma, Lakkaraju", 2023, "2302.04288", "explanations.deletion_robust", "a classifier of tables with its training data"),
        ("graph-fidelity", "Towards Robust Fidelity for Evaluating Explainability of Graph Neural Networks", "Zheng, Shirani, Wang, Cheng, Chen, et al.", 2023, "2310.01820", "explanations.graph_fidelity", "a graph network and its explanations"),
        ("high-dimensional-surrogate", "Interpreting Black-box Machine Learning Models for High Dimensional Datasets", "Karim, Shajalal, Graß, Döhmen, Chala, et al.", 2022, "2208.13405", "explanations.surrogate", "a black box and a wide table"),
        ("simulatability", "Evaluating Explainable AI: Which Algorithmic Explanations Help Users Predict Model Behavior?", "Hase, Bansal", 2020, "2005.01831", "explanations.simulatability", "a classifier and answers of people or simulators"),
        ("function-interpretation", "A Function Interpretation Benchmark for Evaluating Interpretability Methods", "Schwettmann, Rott Shaham, Materzynska, Chowdhury, et al.", 2023, "2309.03886", "explanations.function_interpretation", _LM),
        ("learning-from-explanations", "When Can Models Learn From Explanations? A Formal Framework for Understanding the Roles of Explanation Data", "Hase, Bansal", 2021, "2102.02201", "explanations.explanation_data", "labelled text with explanations"),
        # data
        ("adaptive-data-analysis", "Preserving Statistical Validity in Adaptive Data Analysis", "Dwork, Feldman, Hardt, Pitassi, Reingold, Roth", 2014, "1411.2664", "data.reusable_holdout", "labelled data"),
        ("dsir", "Data Selection for Language Models via Importance Resampling", "Xie, Santurkar, Ma, Liang", 2023, "2302.03169", "data.importance_resampling", "a raw and a target corpus"),
        ("transport-scaling", "Performance Scaling via Optimal Transport: Enabling Data Selection from Partially Revealed Sources", "Kang, Just, Sahu, Jia", 2023, "2307.02460", "data.transport_scaling", "samples of several data sources"),
        ("optfs", "Optimizing Feature Set for Click-Through Rate Prediction", "Lyu, Tang, Liu, Chen, He, Liu", 2023, "2301.10909", "data.feature_gates", "a table of categories with clicks"),
        ("latent-label-shift", "Unsupervised Learning under Latent Label Shift", "Roberts, Mani, Garg, Lipton", 2022, "2207.13179", "data.latent_label_shift", "unlabelled data from several domains"),
        ("novel-class-discovery", "A Practical Approach to Novel Class Discovery in Tabular Data", "Troisemaine, Reiffers-Masson, Gosselin, Lemaire, Vaton", 2023, "2311.05440", "data.novel_classes", "a table with known and unknown classes"),
        ("retrieval-meta-learning", "Retrieval-Augmented Meta Learning for Low-Resource Text Classification", "Li, Li, Li, Luo, Zheng, Zhou, Su", 2023, "2309.04979", "data.retrieval_meta_learning", "a language model and few labelled texts"),
        ("hypergraph-reconstruction", "From Graphs to Hypergraphs: Hypergraph Projection and its Remediation", "Wang, Kleinberg", 2024, "2401.08519", "data.hypergraphs", "a graph and a training hypergraph"),
        ("chaos-benchmark", "Chaos as an interpretable benchmark for forecasting and data-driven modelling", "Gilpin", 2021, "2110.05266", "data.dynamics", "a time series or a forecaster"),
        ("model-error-discovery", "Interpretable structural model error discovery from sparse assimilation increments using spectral bias-reduced neural networks", "Mojgani, Chattopadhyay, Hassanzadeh", 2023, "2309.13211", "data.model_error", "a simulator and observations"),
        # predictions
        ("label-geometry", "Geometry-Aware Adaptation for Pretrained Models", "Roberts, Li, Adila, Cromp, Huang, Zhao, Sala", 2023, "2307.12226", "predictions.label_geometry", "a classifier and distances between its labels"),
        ("pac-program-sets", "PAC Prediction Sets for Large Language Models of Code", "Khakhar, Mell, Bastani", 2023, "2302.08703", "predictions.program_sets", "a language model that writes programs"),
        ("validated-inference", "Denotational validation of higher-order Bayesian inference", "Ścibior, Kammar, Vákár, Staton, Yang, et al.", 2017, "1711.03219", "predictions.inference", "a probabilistic program"),
        # networks
        ("hippo", "How to Train Your HiPPO: State Space Models with Generalized Orthogonal Basis Projections", "Gu, Johnson, Timalsina, Rudra, Ré", 2022, "2206.12037", "networks.hippo", "sequences"),
        ("diagonal-state-space", "On the Parameterization and Initialization of Diagonal State Space Models", "Gu, Gupta, Goel, Ré", 2022, "2206.11893", "networks.diagonal_ssm", "sequences"),
        ("concept-centric-transformer", "Concept-Centric Transformers: Enhancing Model Interpretability through Object-Centric Concept Learning within a Shared Global Workspace", "Hong, Park, Pavlic", 2023, "2305.15775", "networks.concept_transformer", "images with classes"),
        ("part-prototypes", "Evaluation and Improvement of Interpretability for Self-Explainable Part-Prototype Networks", "Huang, Xue, Huang, Zhang, Song, et al.", 2022, "2212.05946", "networks.part_prototypes", "images with classes and parts"),
        ("tell-clustering", "XAI Beyond Classification: Interpretable Neural Clustering", "Peng, Li, Tsang, Zhu, Lv, Zhou", 2018, "1808.07292", "networks.clustering", "any numeric data"),
        ("rep4ex", "Identifying Representations for Intervention Extrapolation", "Saengkyongam, Rosenfeld, Ravikumar, Pfister, Peters", 2023, "2310.04295", "networks.intervention_extrapolation", "observations, actions and an outcome"),
        ("sesa", "SESA: Supervised Explicit Semantic Analysis", "Bogdanova, Yazdani", 2017, "1708.03246", "networks.explicit_semantics", "pairs of texts with relevance and named concepts"),
        ("snip", "SNIP: Bridging Mathematical Symbolic and Numeric Realms with Unified Pre-training", "Meidani, Shojaee, Reddy, Barati Farimani", 2023, "2310.02227", "networks.symbolic_numeric", "numeric samples of functions"),
        ("explanatory-learning", "Explanatory Learning: Beyond Empiricism in Neural Networks", "Norelli, Mariani, Moschella, Santilli, et al.", 2022, "2201.10222", "networks.explanatory", "phenomena with rules in words"),
        ("semantic-prompt-forecasting", "S2IP-LLM: Semantic Space Informed Prompt Learning with LLM for Time Series Forecasting", "Pan, Jiang, Garg, Schneider, Nevmyvaka, Song", 2024, "2403.05798", "networks.semantic_prompt", "time series and a language model"),
    )
)  # fmt: skip


def entry(slug: str) -> Entry:
    """The entry of ``slug``; an unknown one raises InputError with the nearest names.

    >>> entry("label-geometry").space
    'predictions'
    """
    for found in CATALOG:
        if found.slug == slug:
            return found
    near = difflib.get_close_matches(slug, [e.slug for e in CATALOG], n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "see: theodolite methods"
    raise InputError(f"there is no method called {slug!r}; {hint}")
