"""What is trained: model, curriculum, tokens. Two sizes: for one GPU, and for a CPU, which takes two
trainings, from scratch and on to longer sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from transformers import LlamaConfig

MIXTURE = {
    "repetition": 0.02,
    "text": 0.08,
    "single": 0.15,
    "multi_key": 0.45,
    "multi_query": 0.10,
    "multi_value": 0.07,
    "variable_tracking": 0.08,
    "common_words": 0.05,
}
FIRST_MIXTURE = {"repetition": 0.5, "multi_key": 0.5}


@dataclass(frozen=True)
class Stage:
    """Sequences of `length` tokens until the share of right answers reaches `until`, or a share
    `end` of all tokens was seen. `layers` of the model are trained, all of them unless given, and
    positions jump over up to `span` tokens, the recipe's unless given.
    """

    length: int
    until: float
    end: float
    mixture: dict[str, float] = field(default_factory=lambda: MIXTURE)
    layers: int | None = None
    step_tokens: int | None = None
    span: int | None = None


@dataclass(frozen=True)
class Recipe:
    """One size of model and its training."""

    layers: int
    hidden: int
    feed_forward: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    span: int  # tokens: the longest distance that is trained, and max_position_embeddings
    step_tokens: int
    rate: float
    tokens: int  # of the whole training
    stages: tuple[Stage, ...]
    rope_theta: float = 100_000.0
    horizon: int | None = None  # tokens that the rate's cosine is laid out for, if not `tokens`
    warm_steps: int = 50  # of each stage, in which the rate rises
    goes_on: bool = False  # from the weights of another training
    workers: int = 0  # processes that make sequences
    seed: int = 1

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.span,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )


CPU = Recipe(
    layers=16, hidden=128, feed_forward=256, query_heads=4, kv_heads=2, head_dim=32,
    vocabulary=1280, span=2048, step_tokens=4096, rate=3e-3, tokens=3_400_000, rope_theta=1e6, horizon=5_000_000,
    stages=(
        Stage(64, 0.90, 0.50, FIRST_MIXTURE, layers=4, step_tokens=2048, span=64),
        Stage(128, 0.90, 0.58, layers=4, step_tokens=2048),
        Stage(256, 0.95, 0.75),
        Stage(512, 0.97, 0.85),
        Stage(1024, 2.0, 0.93),
        Stage(2048, 2.0, 1.0),
    ),
)  # fmt: skip
# From CPU's weights on. A quarter of its rate; two sequences a step, which is what a core has time for.
CPU_LONG = replace(
    CPU, span=8192, rate=8e-4, tokens=1_900_000, horizon=None, warm_steps=10, goes_on=True,
    stages=(
        Stage(4096, 2.0, 0.30, step_tokens=8192),
        Stage(8192, 2.0, 1.0, step_tokens=16384),
    ),
)  # fmt: skip
GPU = Recipe(
    layers=24, hidden=256, feed_forward=704, query_heads=8, kv_heads=2, head_dim=32,
    vocabulary=2048, span=8192, step_tokens=131072, rate=2e-3, tokens=300_000_000, workers=8,
    stages=(
        Stage(128, 0.95, 0.15, FIRST_MIXTURE),
        Stage(256, 0.95, 0.30),
        Stage(1024, 0.97, 0.50),
        Stage(4096, 0.99, 0.70),
        Stage(8192, 2.0, 1.0),
    ),
)  # fmt: skip
RECIPES = {"cpu": CPU, "cpu-long": CPU_LONG, "gpu": GPU}
