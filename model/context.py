"""How a forward pass stores and finds KV: the seam between the model and the nodes.

The model computes; it never knows whether rows are paged on the device (prefill), partly on the
host behind a hot buffer (decode) or all resident. A node builds one context per forward pass and
the layers call it in layer order, on the thread and stream that run the pass.

Shape suffixes: T tokens of the pass (all sequences, flattened), H heads, C latent width, R rope
width, D index key width, I indexer heads.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AttentionContext(Protocol):
    """Where one forward pass keeps KV rows and indexer keys.

    Call order in a layer: on a layer with an indexer of its own `store_index_keys` and `select`;
    then `store_kv`; then `attend`, which uses the newest selection.
    """

    def store_kv(self, layer: int, latent_TC: Tensor, rope_key_TR: Tensor) -> None:
        """Stores the pass's rows of `layer`: latent after its norm, rope key after rotation.

        Any float dtype; the layout decides how they are encoded.
        """

    def store_index_keys(self, index_layer: int, key_TD: Tensor) -> None:
        """Stores indexer keys (after LayerNorm and rope). `index_layer` counts indexers from 0."""

    def select(self, index_layer: int, query_TID: Tensor, weight_TI: Tensor) -> None:
        """Scores all visible positions, score = sum_i weight * relu(query . key), keeps the top-k.

        `weight_TI` (float32) already holds num_heads**-0.5 * head_dim**-0.5. Ties: lowest position
        wins. A token sees itself and all earlier tokens of its sequence. The selection serves this
        layer and the layers that share it, until the next `select`.
        """

    def attend(self, layer: int, q_latent_THC: Tensor, q_rope_THR: Tensor, scale: float) -> Tensor:
        """Softmax attention over the selected rows in the absorbed form.

        logits = scale * (q_latent . latent + q_rope . rope_key); returns sum of softmax * latent,
        shape THC, dtype of `q_latent_THC`.
        """
        ...
