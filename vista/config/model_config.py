"""Configuration of the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types, require, require_counts, require_finite
from vista.config.choices import (
    Activation,
    Architecture,
    Decay,
    Mixing,
    Normalization,
    Search,
    TargetAttentionKind,
)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The recommender: stage 1 (Summarizer), stage 2 (TargetAttention), reconstruction and heads."""

    architecture: Architecture = Architecture.vista
    dim: int = 64
    """Model width M of both stages, and of a summary token."""
    num_heads: int = 4
    """Attention heads H; must divide dim."""
    num_seeds: int = 16
    """Summary tokens K a user. 0 turns stage 1 off: the tail alone."""
    num_layers: int = 2
    """Layers of stage 1, or of SASRec and HSTU."""
    num_target_layers: int = 2
    """Layers of stage 2."""
    target_attention: TargetAttentionKind = TargetAttentionKind.pointwise
    mixing: Mixing = Mixing.separable
    conv_width: int = 3
    """Width w of the causal depthwise convolution over neighbouring events at the bottom; 1 turns it off."""
    activation: Activation = Activation.silu
    normalization: Normalization = Normalization.length
    normalization_alpha: float = 1.0
    """normalization=length: the exponent of n; 1 is the mean, 0 the sum."""
    decay: Decay = Decay.none
    decay_horizons: list[float] = field(default_factory=list)
    """One horizon tau a head: days (decay=time) or events (decay=position); 0 means that the head forgets nothing."""
    history_limit: int = 0
    """Newest events that a summary, or a baseline at a request, sees at most; 0 means all."""
    search: Search = Search.soft
    """sim: soft, by a learnt product; hard, by category (`data.item_categories`)."""
    search_top_k: int = 100
    """sim, twin: events of the history that a candidate's search finds, and its attention reads."""
    tail_len: int = 32
    """Newest events that stage 2 reads beside the summary."""
    feed_forward_ratio: float = 2.0
    """Hidden width of the gated feed-forward blocks over dim: of stage 1, the decoder and softmax layers of stage 2."""
    dropout: float = 0.2
    """Share of activations dropped in training."""
    temperature: float = 0.05
    """Divides the cosine of the retrieval head."""
    use_action: bool = True
    """The kind of action enters the event embedding, where the log has several."""
    use_rating: bool = True
    """Ratings enter stage 1 only, and only where the log has them."""
    use_time: bool = True
    """Log-bucketed gaps between events, only where the log has times."""
    num_reconstruction_layers: int = 1
    """Layers of the causal decoder of the reconstruction loss."""
    stop_gradient: bool = True
    """Of the reconstruction target; without it embeddings can collapse (there is a test that shows it)."""
    embedding_rows: int = 0
    """Rows, each dim / embedding_hashes wide, of one table that items, actions and gaps share; 0: a row a value."""
    embedding_hashes: int = 2
    """With embedding_rows: hash functions, hence rows end to end, a value; must divide dim."""

    def __post_init__(self) -> None:
        check_types(self, "model.")
        counts = ("dim", "num_heads", "num_layers", "num_target_layers", "conv_width", "tail_len", "search_top_k")
        require_counts(self, "model.", (*counts, "num_reconstruction_layers", "embedding_hashes"))
        require_counts(self, "model.", ("num_seeds", "history_limit", "embedding_rows"), least=0)
        require_finite(self, "model.", ("normalization_alpha",))
        require_finite(self, "model.", ("feed_forward_ratio", "temperature"), positive=True)
        require(
            self.dim % self.num_heads == 0,
            "model.num_heads",
            f"must divide model.dim={self.dim}, got {self.num_heads}; take one of "
            f"{[h for h in range(1, min(self.dim, 64) + 1) if self.dim % h == 0]}",
        )
        require(
            self.embedding_rows == 0 or self.dim % self.embedding_hashes == 0,
            "model.embedding_hashes",
            f"must divide model.dim={self.dim}, got {self.embedding_hashes}; take one of "
            f"{[p for p in range(1, 9) if self.dim % p == 0]}",
        )
        if self.architecture in (Architecture.sasrec, Architecture.hstu, Architecture.din):
            message = f"{self.architecture.value} reads a bounded number of events; set 200"
            require(self.history_limit > 0, "model.history_limit", message)
        require(0 <= self.dropout < 1, "model.dropout", f"must lie in [0, 1), got {self.dropout}")
        if self.decay is not Decay.none:
            require(
                self.mixing is Mixing.separable,
                "model.decay",
                "needs model.mixing=separable; set model.decay=none for bidirectional mixing",
            )
            require(
                len(self.decay_horizons) == self.num_heads and all(h >= 0 for h in self.decay_horizons),
                "model.decay_horizons",
                f"needs one horizon >= 0 a head ({self.num_heads}), got {list(self.decay_horizons)}",
            )
